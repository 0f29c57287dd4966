"""What tests share: one Ray for the whole session, small shards of procedural photos, a store with faults."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import fsspec
import pytest
import stamina
from containers import FlakyStore, clear_memory

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a hub


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests that run jobs in this process. It exports metrics, as a cluster's does."""
    from pipeline import cluster

    with ExitStack() as running:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_enable_metrics_collection", "1")
            running.enter_context(cluster.local_ray())
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Staged weights go to a folder of the session's own, in workers too."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARD2VEC_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three tars with 13 + 7 + 4 samples: rows, labels, odd modes and three broken images."""
    from oracle import write_shards

    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def memory() -> Iterator[str]:
    """The URL of an empty store in this process's memory."""
    clear_memory()
    yield "memory://store"
    clear_memory()


@pytest.fixture
def flaky() -> Iterator[type[FlakyStore]]:
    """`FlakyStore`, empty and without faults; retries wait for nothing."""
    fsspec.register_implementation("flaky", FlakyStore, clobber=True)
    FlakyStore.reads, FlakyStore.writes, FlakyStore.is_answer_lost = [], [], False
    FlakyStore.closed, FlakyStore.calls = set(), 0
    with stamina.set_testing(True, attempts=16):
        yield FlakyStore
    clear_memory()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHARD2VEC_CACHE", str(tmp_path))
    return tmp_path / "tuned"


@pytest.fixture
def full_device() -> Iterator[Callable[[int], None]]:
    """Takes the device's memory but for so many bytes, until the test ends."""
    import torch

    hogs: list[torch.Tensor] = []

    def fill(but_for: int) -> None:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        hogs.append(torch.empty(max(0, free - but_for), dtype=torch.uint8, device="cuda"))

    yield fill
    hogs.clear()
    torch.cuda.empty_cache()


def pytest_configure(config: pytest.Config) -> None:
    """Two processes of tests with a thread for each core would wait for each other: three times the seconds."""
    config.addinivalue_line("markers", "by_model: runs next to the others of the same backbone, which is made once")
    config.option.loadscopereorder = False  # xdist's order is by the number of tests, which says nothing of seconds
    if os.environ.get("PYTEST_XDIST_WORKER"):
        import torch

        torch.set_num_threads(1)


FAST, RAY, SLOW = range(3)


def rank(item: pytest.Item) -> int:
    return (
        SLOW if item.get_closest_marker("slow") else RAY if "ray_session" in getattr(item, "fixturenames", ()) else FAST
    )


def group(item: pytest.Item) -> str:
    """What shares a server, a Ray or a backbone stays together, so that each is made once."""
    if item.get_closest_marker("by_model"):
        (model,) = (value for name, value in item.callspec.params.items() if name in ("model", "name"))  # type: ignore[attr-defined]
        return f"by_model {model}"
    return "ray" if "ray_session" in getattr(item, "fixturenames", ()) else f"{item.path.name} {rank(item)}"


@pytest.hookimpl(tryfirst=True)  # before xdist's own, which reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first, then those with Ray, then the slow ones; GPU tests skip where there is no GPU.

    With several processes the other way round: long groups first, and what fits everywhere in the end.
    """
    import torch

    is_shared = bool(os.environ.get("PYTEST_XDIST_WORKER"))
    order = {FAST: 2, RAY: 0, SLOW: 1} if is_shared else {FAST: 0, RAY: 1, SLOW: 2}
    members: dict[str, list[pytest.Item]] = {}
    for item in items:
        members.setdefault(group(item), []).append(item)
    for name, of_group in members.items():
        for item in of_group:
            item.add_marker(pytest.mark.xdist_group(name))
    groups = sorted(members.values(), key=lambda of_group: min(order[rank(item)] for item in of_group))
    items[:] = [item for of_group in groups for item in of_group]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))
