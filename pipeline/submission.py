"""The Ray adapter of `submit`: a cluster's job API, with bounded waits and every failure in one sentence.

Nothing here connects to Ray itself: all of it is HTTP, to the dashboard of the cluster's head.
"""

import asyncio
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobSubmissionClient

from pipeline.errors import FAILED, INTERRUPTED, USAGE, UsageError
from pipeline.retries import redact, said
from pipeline.shipment import FOLDER

CONNECT_S, ANSWER_S = 10.0, 60.0  # Ray's own client waits for ever
LOST_S = 120.0  # without an answer while a job is followed: a head that starts anew needs one
POLL_S = 1.0
STOP_WAIT_S = 60  # from SIGTERM to SIGKILL, for the last writes to a slow store; Ray's own 3 s are few
STOPPED_S = STOP_WAIT_S + 30.0
NOT_RUN = (126, 127)  # a shell's exit codes of what it cannot start
OURS = "shard2vec."  # before the names of a job's metadata
# Loggers that tell of each upload, and set their own level when they are imported.
CHATTY = ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk")
NAMED = {"cpu": "entrypoint_num_cpus", "gpu": "entrypoint_num_gpus", "memory": "entrypoint_memory"}


@dataclass(frozen=True)
class SubmittedJob:
    """One attempt of a run, as the cluster knows it."""

    id: str
    verb: str
    run: str
    attempt: int
    source: str  # of the code that it was submitted with, as `build_id` tells it
    status: str  # PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED
    exit_code: int | None  # None until it is over
    message: str  # Ray's, in one line
    started: float | None  # seconds of the epoch
    ended: float | None

    @property
    def is_over(self) -> bool:
        return self.exit_code is not None


class _Unknown(UsageError):
    """The cluster has no such job."""


class JobServer:
    """The job server at a URL, or at what Ray's own commands take for one, as `auto`.

    Every call raises `UsageError` where the token is missing or refused and `OSError` where no answer comes in time;
    the constructor `UsageError` for that too.
    """

    def __init__(self, address: str, headers: Mapping[str, str] | None = None):
        if JobDetails is None:
            raise UsageError("submit needs Ray's job client: pip install 'shard2vec[jobs]'")
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray's client lets its variables win over what it is given
        self.address = redact(address)
        try:
            with self._allowed():
                self._client = _Client(address, headers=dict(headers or {}))
        except (OSError, RuntimeError, ValueError, RayError) as e:
            raise UsageError(f"no Ray job server answers at {self.address}: {said(e)}") from e

    def jobs(self) -> list[SubmittedJob]:
        """All of ours, oldest first."""
        with self._allowed():
            found = [_job(details) for details in self._client.list_jobs()]
        return sorted((job for job in found if job), key=lambda job: (job.started or 0.0, job.attempt))

    def job(self, id: str) -> SubmittedJob:
        """Raises `UsageError` where the cluster knows no such job of ours."""
        found = None
        try:
            with self._allowed():
                found = _job(self._client.get_job_info(id))
        except RuntimeError as e:
            if "status code 404" not in str(e):
                raise OSError(f"{self.address} cannot tell of job {id}: {said(e)}") from e
        if found is None:
            raise _Unknown(f"{self.address} knows no job {id} of shard2vec: see `shard2vec submit --list`")
        return found

    def submit(
        self,
        id: str,
        verb: str,
        folder: Path,
        *,
        python: str,
        env: Mapping[str, str],
        resources: Mapping[str, float],
        metadata: Mapping[str, str],
    ) -> bool:
        """Starts `verb` as job `id` in a copy of `folder`; False where the id is taken, by another just now.

        `python`: the interpreter, by a path or a name of the head's PATH. `env`: variables of all the job's processes,
        which the dashboard shows. `resources`: what the job's driver occupies, of `cpu`, `gpu`, `memory` (bytes) or
        the cluster's own; with any, it may run on another node than the head.
        """
        named: dict[str, Any] = {NAMED[name]: amount for name, amount in resources.items() if name in NAMED}
        own = {name: amount for name, amount in resources.items() if name not in NAMED}
        try:
            with self._allowed():
                self._client.submit_job(
                    entrypoint=f"exec {shlex.quote(python)} -m {FOLDER} {verb}",
                    submission_id=id,
                    runtime_env={
                        "working_dir": str(folder),
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **env},
                    },
                    metadata={OURS + name: value for name, value in metadata.items()},
                    entrypoint_resources=own or None,
                    **named,
                )
        except (OSError, RuntimeError) as e:
            if any(job.id == id for job in self.jobs()):
                return False
            raise OSError(f"{self.address} does not take the job: {said(e)}") from e
        return True

    def log(self, id: str) -> str:
        """All that the job has said so far. Raises `UsageError` where there is no such job of ours."""
        self.job(id)
        try:
            with self._allowed():
                return str(self._client.get_job_logs(id))
        except RuntimeError as e:
            raise OSError(f"{self.address} cannot give the log of job {id}: {said(e)}") from e

    def stop(self, id: str) -> SubmittedJob:
        """Ends the job as a scheduler would, with SIGTERM, and waits for it. Raises `OSError` where it does not end."""
        job = self.job(id)
        if not job.is_over:
            self._ask_to_stop(id)
        give_up = time.monotonic() + STOPPED_S
        while not job.is_over and time.monotonic() < give_up:
            time.sleep(POLL_S)
            job = self.job(id)
        if not job.is_over:
            when = "; Ray ends it when it starts" if job.status == "PENDING" else ""
            raise OSError(f"job {id} is {job.status} still, {STOPPED_S:.0f} s after it was asked to end{when}")
        return job

    def follow(self, id: str, say: Callable[[str], None], start_timeout_s: float) -> SubmittedJob:
        """Gives `say` each line of the log as it comes, until the job is over.

        Raises `OSError` where it does not start in time, and is stopped then, or where the cluster does not answer for
        `LOST_S` or has forgotten the job. Ctrl-C ends the following alone.
        """
        return asyncio.run(self._follow(id, _Lines(say), start_timeout_s))

    async def _follow(self, id: str, lines: "_Lines", start_timeout_s: float) -> SubmittedJob:
        begun = heard = time.monotonic()
        tail: asyncio.Task[None] | None = None
        while True:
            try:
                job = await asyncio.to_thread(self.job, id)
            except _Unknown as e:
                raise OSError(f"{self.address} has forgotten job {id}: the same command submits it again") from e
            except OSError as e:
                if time.monotonic() - heard > LOST_S:
                    silent = f"no answer from {self.address} for {LOST_S:.0f} s"
                    raise OSError(f"{silent}, and job {id} may go on: {said(e)}") from e
            else:
                heard = time.monotonic()
                if job.is_over:
                    break
                if job.status != "PENDING" and (tail is None or tail.done()):
                    if tail:
                        tail.result()
                    tail = asyncio.create_task(self._tail(id, lines))
                elif job.status == "PENDING" and heard - begun > start_timeout_s:
                    await asyncio.to_thread(self._ask_to_stop, id)
                    raise OSError(f"job {id} has not started within {start_timeout_s:g} s{_why(job.message)}")
            await asyncio.sleep(POLL_S)
        if tail:
            tail.cancel()
            with suppress(asyncio.CancelledError):
                await tail
        log = ""
        with suppress(OSError):  # its node is gone, or it never had one
            log = await asyncio.to_thread(self.log, id)
        lines.begin()
        lines.add(log)
        lines.end()
        return job

    async def _tail(self, id: str, lines: "_Lines") -> None:
        """Until the connection ends, for whatever reason."""
        lines.begin()
        pieces = self._client.tail_job_logs(id)
        while True:
            try:
                text = await anext(pieces)
            except (StopAsyncIteration, aiohttp.ClientError, OSError, RuntimeError):  # the last of Ray's own client
                return
            lines.add(text)

    def _ask_to_stop(self, id: str) -> None:
        try:
            with self._allowed():
                self._client.stop_job(id)
        except RuntimeError as e:
            raise OSError(f"{self.address} cannot stop job {id}: {said(e)}") from e

    @contextmanager
    def _allowed(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as e:
            how = "RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH for a file that holds it"
            if "required" in str(e) or "(not 'token')" in str(e):
                raise UsageError(f"{self.address} asks for a token: set {how}") from e
            raise UsageError(f"{self.address} refuses the token that it was given: set {how}") from e


class _Client(JobSubmissionClient):
    """Ray's, but nothing is waited for without end."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, **{"timeout": (CONNECT_S, ANSWER_S)} | options)


class _Lines:
    """A text that comes in pieces, and from its beginning again at each `begin`: each whole line once."""

    def __init__(self, say: Callable[[str], None]):
        self._say, self._seen, self._known, self._line = say, 0, 0, ""

    def begin(self) -> None:
        self._known = self._seen

    def add(self, text: str) -> None:
        new = text[self._known :]
        self._known = max(0, self._known - len(text))
        self._seen += len(new)
        *lines, self._line = (self._line + new).split("\n")
        for line in lines:
            self._say(line)

    def end(self) -> None:
        if self._line:
            self._say(self._line)


def _job(details: Any) -> SubmittedJob | None:
    """None for a job that is not of ours."""
    metadata = details.metadata or {}
    if not details.submission_id or f"{OURS}attempt" not in metadata:
        return None
    code, message = _ended(details)
    return SubmittedJob(
        id=details.submission_id,
        verb=metadata[f"{OURS}verb"],
        run=metadata[f"{OURS}run"],
        attempt=int(metadata[f"{OURS}attempt"]),
        source=metadata[f"{OURS}source"],
        status=details.status.value,
        exit_code=code,
        message=message,
        started=details.start_time and details.start_time / 1000,
        ended=details.end_time and details.end_time / 1000,
    )


def _ended(details: Any) -> tuple[int | None, str]:
    """The exit code, as a shell would tell it, and the reason in one line."""
    message = said(Exception((details.message or "").partition(", last available logs")[0])) if details.message else ""
    if not details.status.is_terminal():
        return None, message
    code = details.driver_exit_code
    if details.status.value == "STOPPED":
        return INTERRUPTED, "stopped"
    if code is None:
        return (0 if details.status.value == "SUCCEEDED" else FAILED), message
    if code in NOT_RUN:
        return USAGE, f"the cluster cannot run `{details.entrypoint}`: name its interpreter with --python"
    return (code if code >= 0 else 128 - code), ""


def _why(message: str) -> str:
    return f" ({message})" if message else ""
