"""Real Ray clusters of several nodes on this machine, each with its own environment, and nothing left behind."""

import contextlib
import json
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STORE_BYTES = 80 * 2**20
HEAD_ID = "f" * 51 + "00000"  # what the autoscaler of nodes that are none takes the head for


def until(is_so: Callable[[], object], timeout_s: float = 120) -> bool:
    """Whether it came to be so in time."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def processes(mark: str, name: str = "") -> list[int]:
    """Those whose command line or environment holds `mark`, and whose command line begins with `name`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (path / "cmdline").read_bytes()
            if command.startswith(name.encode()) and mark.encode() in command + (path / "environ").read_bytes():
                found.append(int(path.name))
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Nodes:
    """`add` and `remove` nodes of a cluster that has a head, at `address`."""

    def __init__(self, folder: str, head: dict[str, Any]):
        from ray.cluster_utils import Cluster

        self._cluster = Cluster()
        # Ray's log monitor is a process for each node, that shows drivers what no test reads.
        self._common = {"object_store_memory": STORE_BYTES, "include_dashboard": False, "include_log_monitor": False}
        self._cluster.add_node(temp_dir=folder, **self._common, **head)
        self.address = str(self._cluster.address)

    def add(self, env: dict[str, str] | None = None, **resources: Any) -> Any:
        return self._cluster.add_node(env_vars=env, **self._common, **resources)

    def remove(self, node: Any) -> None:
        """At once, as when a machine goes."""
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        from ray._common.utils import reset_ray_address

        for node in (*self._cluster.worker_nodes, self._cluster.head_node):
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        reset_ray_address()


@contextlib.contextmanager
def cluster(**head: Any) -> Iterator[Nodes]:
    """Whatever it has started ends with the context."""
    folder = tempfile.mkdtemp(prefix="rc")  # short: Ray makes sockets below it
    try:
        nodes = Nodes(folder, head)
        try:
            yield nodes
        finally:
            nodes.close()
    finally:
        for pid in processes(folder + "/"):
            with contextlib.suppress(ProcessLookupError):
                if pid != os.getpid():
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def autoscaling(most: int, idle_s: float, **kind: float) -> Iterator[tuple[Nodes, Callable[[], int]]]:
    """A head of one CPU and up to `most` nodes of a kind that Ray's own autoscaler starts and stops; counts them.

    `ray.cluster_utils.AutoscalingCluster` does the same, but ends every Ray of the machine when it starts.
    """
    port = free_port()
    config = {
        "cluster_name": "tests",
        "max_workers": most,
        "idle_timeout_minutes": idle_s / 60,
        "upscaling_speed": 10,
        "provider": {
            "type": "external",  # by its name the wheel lacks a file for it
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "auth": {"ssh_user": "nobody"},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {**kind, "object_store_memory": STORE_BYTES},
                "node_config": {},
                "min_workers": 0,
                "max_workers": most,
            },
        },
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "cluster_synced_files": [],
    }
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    config |= {f"{name}_commands": [] for name in commands}
    env = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
    }
    identity = {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
    before = dict(os.environ)
    os.environ.update(env | identity)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        try:
            with cluster(num_cpus=1, gcs_server_port=port, autoscaling_config=file.name, env_vars=identity) as nodes:
                mark = f":{port}".encode()
                yield nodes, lambda: sum(mark in Path(f"/proc/{p}/cmdline").read_bytes() for p in _raylets()) - 1
        finally:
            os.environ.clear()
            os.environ.update(before)


def _raylets() -> list[int]:
    return [p for p in processes("raylet") if Path(f"/proc/{p}/comm").read_text().strip() == "raylet"]
