"""A Ray of this machine alone, in a process of its own: it starts while torch is imported and the input is listed.

The process ends, and all that it started with it, when the context of `starting` does or when this process is gone,
however far it has come by then: where a run finds nothing to do, or a mistake, it costs nobody a second.
"""

import importlib
import os
import secrets
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline import reach

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported, as what follows
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

OBJECT_STORE_BYTES = 200 * 2**20  # only receipts and shard listings pass through it …
SETTINGS = {  # of the Ray that is started here, unless the user has made them
    "RAY_worker_niceness": "0",  # Ray's is 15: beside anything else that computes its workers would hardly move
    # What a dashboard and a Prometheus would be told: nobody asks a Ray that ends with the run. It took 1.5 % of two
    # busy cores.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
}
FEEDER_BYTES = 64 * 2**20  # … and, of each feeder, the chunks under way
START_S = 120.0  # on a machine that has other work; some seconds on a free one

_head: "subprocess.Popen[str] | None" = None
_address = ""  # of Ray, once it is known to be up
_own: dict[str, str] = {}  # settings of authentication that the user has not made


def _settle_token() -> None:
    """A token of this process's own for the Ray that it starts, unless the user has settled how it is to be.

    Without one Ray would write its own to the user's home, which a later `ray start` then asks for; with authentication
    off any process that reaches its port may run code here.
    """
    wanted = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    if os.environ.get("RAY_AUTH_MODE", "token") == "token":
        _own.update({name: value for name, value in wanted.items() if name not in os.environ})
        os.environ.update(_own)
        _look_again()


@contextmanager
def reaching(address: str) -> Iterator[None]:
    """For a running cluster the user's own settings hold; whether it answers is asked meanwhile."""
    with as_settled(), reach.asking(address):
        yield


@contextmanager
def as_settled() -> Iterator[None]:
    """Within, the user's own settings of authentication hold: there is no token of ours.

    A process that is connected already keeps its token: without it Ray's core ends the process at its next question.
    """
    before = {} if _is_connected() else dict(_own)
    for name in before:
        del os.environ[name], _own[name]
    if before:
        _look_again()
    try:
        yield
    finally:
        if before:
            _own.update(before)
            os.environ.update(before)
            _look_again()


def _look_again() -> None:
    """Ray's core reads the environment when it is imported, and again only when it is told so, as Ray itself does."""
    if "ray" in sys.modules:
        raylet: Any = importlib.import_module("ray._raylet")
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


def _is_connected() -> bool:
    ray: Any = sys.modules.get("ray")
    return _head is not None or (ray is not None and ray.is_initialized())


def is_up() -> bool:
    """Whether the Ray that this process uses is the one started here."""
    return _head is not None


def is_early(output: str | None) -> bool:
    """Whether Ray should start before it is known that anything is to do: where no version is there yet.

    A run that finds nothing new took 4.6 s, and 6.2 where Ray started beside it on two cores. A bucket is not asked.
    """
    return not (output and Path(output, "versions").is_dir())


@contextmanager
def starting(is_wanted: bool = True, feeders: int = 0) -> Iterator[None]:
    """Has Ray start, unless it runs here or starts already; within, `address` is where to connect."""
    global _head, _address
    if not is_wanted or _is_connected():
        yield
        return
    # In a job of a cluster Ray would look for that job's working directory in this Ray too, where it is not.
    os.environ.pop("RAY_JOB_CONFIG_JSON_ENV_VAR", None)
    # The workers import the checkout or the installation that this process runs from.
    home = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH", "")
    _head = subprocess.Popen(
        [sys.executable, "-m", "pipeline.head", str(OBJECT_STORE_BYTES + feeders * FEEDER_BYTES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # a group of its own, which Ctrl-C does not reach and which ends as one
        env=SETTINGS | os.environ | {"PYTHONPATH": os.pathsep.join(p for p in (home, inherited) if p)},
    )
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(_head.pid, signal.SIGKILL)
        _head.communicate()
        _head, _address = None, ""


def address() -> str:
    """Waits until Ray is up. Raises `OSError` where it could not start, or does not in `START_S`."""
    global _address
    assert _head is not None and _head.stdout is not None
    with selectors.DefaultSelector() as pipe:
        pipe.register(_head.stdout, selectors.EVENT_READ)
        if not _address and pipe.select(START_S):  # one line, put there whole
            _address = _head.stdout.readline().strip()
    if not _address:
        raise OSError("Ray cannot be started on this machine: its logs are in /tmp/ray/session_latest/logs")
    return _address


def _main() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import logging

    import ray

    from pipeline.machine import cores

    _without_monitors()
    context = ray.init(
        address="local",
        num_cpus=cores(),  # Ray alone does not see that it may run on some of them only
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=int(sys.argv[1]),
    )
    print(context.address_info["gcs_address"], flush=True)
    threading.Event().wait()


def _without_monitors() -> None:
    """Ray starts a process that shows workers' logs to drivers, and one that would start nodes: nobody has either here.

    They took 2.2 of the 12.1 CPU seconds of Ray's start (Ray 2.60, Intel Xeon, 2026-11-28). `ray.init` has no argument
    for them, and `ray start` hides its flags. A Ray that has other names for them starts with all that it has.
    """
    try:
        from ray._private.parameter import RayParams
    except ImportError:
        return

    whole = RayParams.__init__

    def without(self: RayParams, *args: Any, **given: Any) -> None:
        whole(self, *args, **given)
        self.include_log_monitor, self.no_monitor = False, True

    RayParams.__init__ = without


def _end_with_parent() -> None:
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)


_settle_token()  # here, for Ray's core reads it when Ray is imported, by whichever module is first


if __name__ == "__main__":
    _main()
