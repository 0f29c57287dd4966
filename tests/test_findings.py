"""What a node remembers is whole, is what was asked for, and does not stay for ever."""

import os
import resource
import time
from pathlib import Path

import pytest

from pipeline.cache import KEEP_S
from pipeline.findings import recall, remember

KEY = {"model": "pit_b", "size": (3, 224, 224)}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHARD2VEC_CACHE", str(tmp_path))
    return tmp_path / "kind"


def test_a_finding_is_found_by_all_that_it_depends_on(kept: Path) -> None:
    """Tuples come back as JSON has them; another key or kind has nothing."""
    remember("kind", KEY, {"why": "it is so"})
    assert recall("kind", KEY) == recall("kind", KEY | {"size": [3, 224, 224]}) == {"why": "it is so"}
    assert recall("kind", KEY | {"model": "pit_s"}) is None and recall("other", KEY) is None
    assert [path.suffix for path in kept.iterdir()] == [".json"]


def test_what_nothing_asks_for_is_deleted(kept: Path) -> None:
    """After a month; what is asked for now and then stays."""
    for name in ("used", "unused"):
        remember("kind", KEY | {"model": name}, {})
    for path in kept.iterdir():
        os.utime(path, (0, time.time() - KEEP_S - 60))
    assert recall("kind", KEY | {"model": "used"}) == {}
    remember("kind", KEY, {})
    assert recall("kind", KEY | {"model": "unused"}) is None and len(list(kept.iterdir())) == 2


def test_a_full_disk_leaves_no_part_of_it(kept: Path) -> None:
    """Nothing is remembered, and nothing said."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        remember("kind", KEY, {"why": "x" * 10_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert recall("kind", KEY) is None and list(kept.iterdir()) == []
