"""`submit`: any verb as a job on a Ray cluster, followed to its end; what became of such jobs, and their end."""

import json as jsons
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import arguments, exits
from pipeline import head
from pipeline.arrival import STDOUT
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.shipment import Shipment
    from pipeline.submission import JobServer, SubmittedJob

LOCAL = "http://127.0.0.1:8265"  # Ray's dashboard, unless told otherwise
SHOWN_PATHS = 3
SETTINGS = {"allow_interspersed_args": False}  # behind the verb all belongs to the verb


def submit(
    context: typer.Context,
    command: Annotated[list[str] | None, typer.Argument(metavar="VERB …", help="A verb with its own flags")] = None,
    address: Annotated[
        str | None, typer.Option(help=f"The cluster's dashboard [RAY_API_SERVER_ADDRESS, RAY_ADDRESS, else {LOCAL}]")
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the job's id and leave it to itself")] = False,
    status: Annotated[str | None, typer.Option(metavar="ID", help="What became of a job")] = None,
    logs: Annotated[str | None, typer.Option(metavar="ID", help="What a job has said so far")] = None,
    stop: Annotated[str | None, typer.Option(metavar="ID", help="End a job; the same command resumes it")] = None,
    list: Annotated[bool, typer.Option("--list", help="All jobs of shard2vec on the cluster")] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Pass this variable on; the dashboard shows it; repeatable"),
    ] = None,
    python: Annotated[str, typer.Option(help="The cluster's interpreter: a path, or a name of its PATH")] = "python",
    no_ship: Annotated[
        bool, typer.Option("--no-ship", help="Run the code of the image, if it is this very version")
    ] = False,
    resource: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=AMOUNT", help="What the job's driver occupies: cpu, gpu, memory or your own; repeatable"
        ),
    ] = None,
    start_timeout: Annotated[float, typer.Option(min=1, help="Seconds until the job must have started")] = 600,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, last")] = False,
) -> None:
    """Run a verb as a job on a Ray cluster, follow it, and end with its own exit code.

    This version of shard2vec is shipped; the dependencies are the cluster's, and checked. The same command again
    follows the job while it runs, and starts the next attempt after that.

    Example: shard2vec submit --address http://head:8265 embed --input 's3://b/*.tar' --output s3://b/out --model vit_s
    """
    as_json = json or bool(command and "--json" in command)
    found = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or LOCAL

    def body() -> int:
        asked = [name for name, it in (("VERB", command), ("--status", status), ("--logs", logs)) if it]
        asked += [name for name, it in (("--stop", stop), ("--list", list)) if it]
        if len(asked) != 1:
            raise UsageError(f"submit needs one of VERB, --status, --logs, --stop and --list, not {len(asked)}")
        if command:
            shipment = _shipment(context, command, as_json)
            passed, resources = _variables(env or []), _resources(resource or [])
            server = _server(found)
            id = _start(server, shipment, python=python, env=passed, resources=resources, is_shipped=not no_ship)
            if no_wait:
                exits.print_json({"id": id, "address": server.address}) if as_json else print(id)
                return 0
            return _follow(server, id, start_timeout, as_json)
        server = _server(found)
        if logs:
            _print_log(server.log(logs), logs, json)
        elif list:
            _print_jobs(server.jobs(), json)
        else:
            job = server.stop(stop) if stop else server.job(str(status))
            exits.print_json(_told(job)) if json else print(_line(job))
        return 0

    with head.as_settled():
        exits.run(body, as_json)


def _shipment(context: typer.Context, command: list[str], as_json: bool) -> "Shipment":
    """The verb, checked on this machine as far as that is possible."""
    assert context.parent is not None
    verbs: dict[str, Any] = context.parent.command.commands  # type: ignore[attr-defined]
    verb, *given = command
    if verb not in verbs or verb == "submit":
        raise UsageError(f"submit {verb}: choose one of {', '.join(v for v in verbs if v != 'submit')}")
    takes_json = any(p.name == "json" for p in verbs[verb].params)
    if as_json and takes_json and "--json" not in given:
        given = ["--json", *given]
    shipment, local, params = arguments.parse(verbs[verb], verb, given, context.parent)
    check = getattr(verbs[verb].callback, "check", None)  # where the verb can tell a mistake from its flags alone
    if check:
        check(**params)
    if local:
        more = f" and {len(local) - SHOWN_PATHS} more" if len(local) > SHOWN_PATHS else ""
        exits.say(f"shard2vec: every node must see these, as on a shared disk: {', '.join(local[:SHOWN_PATHS])}{more}")
    return shipment


def _variables(names: list[str]) -> dict[str, str]:
    for name in names:
        if name not in os.environ:
            raise UsageError(f"--env {name}: this machine has no such variable")
    return {name: os.environ[name] for name in names}


def _resources(given: list[str]) -> dict[str, float]:
    amounts = dict[str, float]()
    for text in given:
        name, _, amount = text.partition("=")
        try:
            amounts[name] = int(amount) if name == "memory" else float(amount)
        except ValueError:
            amounts[name] = -1
        if not name or amounts[name] <= 0:
            raise UsageError(f"--resource {text}: must be a name and an amount, as in cpu=1")
    return amounts


def _server(address: str) -> "JobServer":
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when Ray is imported; without it no token is sent
    try:
        headers = jsons.loads(os.environ.get("RAY_JOB_HEADERS") or "{}")
    except ValueError:
        raise UsageError("RAY_JOB_HEADERS is no JSON object") from None
    try:
        from pipeline.submission import JobServer
    except ImportError as e:
        raise UsageError(f"submit needs Ray's job client ({e}): pip install 'shard2vec[jobs]'") from e

    return JobServer(address, headers)


def _start(
    server: "JobServer",
    shipment: "Shipment",
    *,
    python: str,
    env: dict[str, str],
    resources: dict[str, float],
    is_shipped: bool,
) -> str:
    """The id of the run's attempt that is under way: a new one, or that of whoever was first."""
    from pipeline.build import build_id

    build, run = build_id(), shipment.run_id(resources)
    attempts = [job for job in server.jobs() if (job.verb, job.run) == (shipment.verb, run)]
    last = max(attempts, key=lambda job: job.attempt, default=None)
    if last and not last.is_over:
        other = "" if last.source == build["source"] else f", with other code ({last.source}, here {build['source']})"
        exits.say(f"shard2vec: job {last.id} is this run, and under way{other}")
        return last.id
    attempt = last.attempt + 1 if last else 1
    id = f"{shipment.verb}-{run}-{attempt}"
    with tempfile.TemporaryDirectory(prefix="shard2vec-") as folder:
        shipment.write(Path(folder), build, is_shipped)
        is_ours = server.submit(
            id,
            shipment.verb,
            Path(folder),
            python=python,
            env=env,
            resources=resources,
            metadata={"verb": shipment.verb, "run": run, "attempt": str(attempt), "source": build["source"]},
        )
    how = "this version is shipped" if is_shipped else "the code is the image's"
    checked = "the dependencies are the cluster's" if is_shipped else "and so are the dependencies"
    exits.say(
        f"shard2vec: job {id} on {server.address}: {how} (source {build['source']}), {checked}, the job checks both"
        if is_ours
        else f"shard2vec: job {id} is this run, and was started just now by another"
    )
    return id


def _follow(server: "JobServer", id: str, start_timeout: float, as_json: bool) -> int:
    """The job's own exit code, after its last line."""
    printed = said = ""

    def relay(line: str) -> None:
        nonlocal printed, said
        if line.startswith(STDOUT):
            printed = line.removeprefix(STDOUT)
            print(printed, flush=True)
        else:
            said = line.removeprefix("shard2vec: ")
            exits.say(line)

    try:
        job = server.follow(id, relay, start_timeout)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"job {id} goes on: the same command follows it, "
            f"`shard2vec submit --address {server.address} --stop {id}` ends it"
        ) from None
    assert job.exit_code is not None
    exits.say(f"shard2vec: {_line(job)}")
    if as_json and not printed.startswith("{"):
        exits.print_json({"error": job.message or said, "exit_code": job.exit_code})
    return job.exit_code


def _print_log(log: str, id: str, as_json: bool) -> None:
    lines = [line.removeprefix(STDOUT) for line in log.splitlines()]
    if as_json:
        exits.print_json({"id": id, "lines": lines})
    else:
        print(*lines, sep="\n")


def _print_jobs(jobs: "list[SubmittedJob]", as_json: bool) -> None:
    if as_json:
        exits.print_json({"jobs": [_told(job) for job in jobs]})
    else:
        for job in jobs:
            print(_line(job))


def _told(job: "SubmittedJob") -> dict[str, Any]:
    return asdict(job)


def _line(job: "SubmittedJob") -> str:
    """`embed-1a2b3c4d-2 FAILED with 3 after 75 s`."""
    code = "" if job.exit_code is None else f" with {job.exit_code}"
    seconds = round((job.ended or time.time()) - job.started) if job.started else 0
    message = f": {job.message}" if job.message and job.exit_code else ""
    return f"{job.id} {job.status}{code} {'after' if job.is_over else 'for'} {seconds} s{message}"
