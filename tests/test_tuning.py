"""What a device does best is measured once, by one worker, remembered, and learnt from."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from test_device import Fits, noise_for

from pipeline.backbone import Backbone
from pipeline.config import MAX_BATCH
from pipeline.device import Staging
from pipeline.tuning import CUDA_BATCHES, Tuned, best_batch_size, recall, remember, tuned

KEY = {"architecture": "pit_b", "size": [3, 224, 224], "device": "a device", "share": 0.3333}


@pytest.mark.parametrize(
    ("speeds", "best"),
    [
        ({64: 100.0, 128: 180.0, 256: 184.0, 512: 400.0}, 128),
        ({64: 100.0, 128: 200.0, 256: 400.0, 512: 800.0}, 512),
        ({64: 100.0, 128: 0.0}, 64),
        ({64: 0.0, 32: 0.0, 16: 50.0}, 16),
        ({size: float(size) for size in CUDA_BATCHES}, MAX_BATCH),
    ],
)
def test_the_batch_grows_while_it_pays(speeds: dict[int, float], best: int) -> None:
    """`auto` takes the smallest batch after which doubling gives less than 5 %, and one that fits the memory."""
    assert best_batch_size(lambda size: speeds.get(size, 0.0)) == best


def test_a_search_is_done_once_a_node(cache: Path) -> None:
    """The second worker, and the next run, take what the first one found; another model, share or engine searches."""
    searches: list[int] = []

    def search() -> Tuned:
        searches.append(1)
        return Tuned(256, True)

    assert tuned(KEY, search) == tuned(KEY, search) == Tuned(256, True)
    assert len(searches) == 1
    tuned(KEY | {"share": 1.0}, search)
    assert len(searches) == 2 and len(list(cache.glob("*.json"))) == 2


def test_workers_that_start_together_search_once(cache: Path) -> None:
    """They would measure each other: one searches, the others wait for what it finds."""
    searches: list[int] = []
    begun = threading.Event()

    def search() -> Tuned:
        searches.append(1)
        begun.wait(0.2)
        return Tuned(128, False)

    got: list[Tuned] = []
    threads = [threading.Thread(target=lambda: got.append(tuned(KEY, search))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [Tuned(128, False)] * 4 and len(searches) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        json.dumps({"key": KEY, "batch_size": 0, "channels_last": True}).encode(),
        json.dumps({"key": KEY, "batch_size": 10**9, "channels_last": True}).encode(),
        json.dumps({"key": KEY, "batch_size": "64", "channels_last": True}).encode(),
        json.dumps({"key": KEY, "batch_size": True, "channels_last": True}).encode(),
        json.dumps({"key": KEY, "batch_size": 64}).encode(),
        json.dumps({"key": KEY | {"share": 1}, "batch_size": 64, "channels_last": True}).encode(),
    ],
)
def test_a_damaged_file_is_as_none(content: bytes, cache: Path) -> None:
    """Whatever lies there in its place, the search is done again and its result put there."""
    remember(KEY, Tuned(64, False))
    (path,) = cache.iterdir()
    path.write_bytes(content)
    assert recall(KEY) is None
    assert tuned(KEY, lambda: Tuned(512, False)) == Tuned(512, False) == recall(KEY)


def test_a_cache_that_takes_no_files_costs_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full or read-only disk is no reason not to run."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHARD2VEC_CACHE", str(tmp_path / "file"))
    assert tuned(KEY, lambda: Tuned(512, False)) == Tuned(512, False)


def test_a_halved_batch_is_remembered(cache: Path) -> None:
    """What a run learns by running out of memory the next run starts with; the rest is kept."""
    backbone = Backbone(Fits(3, torch.OutOfMemoryError("simulated")), batch_size=8, classes=False)
    backbone._tuning = KEY
    remember(KEY, Tuned(8, False))
    backbone(torch.zeros(8, 3, 8, 8, dtype=torch.uint8))
    assert recall(KEY) == Tuned(2, False)


def test_channels_last_changes_no_more_than_rounding() -> None:
    """The other layout gives the same vectors, and going back gives the same bits."""
    backbone = Backbone(oracle.module("resnet10t"), batch_size=2)
    noise = torch.randint(0, 256, (2, *backbone.preprocessing.input_size), dtype=torch.uint8)
    plain = backbone(noise).to_numpy().embedding
    backbone._lay_out(channels_last=True)
    assert backbone.normalize(noise).is_contiguous(memory_format=torch.channels_last)
    assert oracle.relative(backbone(noise).to_numpy().embedding, plain) < 1e-5
    backbone._lay_out(channels_last=False)
    assert np.array_equal(backbone(noise).to_numpy().embedding, plain)


@pytest.mark.gpu
def test_cuda_finds_a_batch_size_once(cache: Path) -> None:
    """`auto` on a GPU ends with one of the sizes it may try, and the next process has it from the cache."""
    first = Backbone(oracle.module("test_vit"), device="cuda", precision="bf16")
    (path,) = cache.glob("*.json")
    said = json.loads(path.read_bytes())
    assert first.batch_size in CUDA_BATCHES and said["batch_size"] == first.batch_size
    path.write_text(json.dumps(said | {"batch_size": 17, "channels_last": True}))
    again = Backbone(oracle.module("test_vit"), device="cuda", precision="bf16")
    assert again.batch_size == 17 and again._layout == torch.channels_last


@pytest.mark.gpu
def test_cuda_search_leaves_room(cache: Path, full_device: Callable[[int], None]) -> None:
    """With little memory left, a smaller size is found, and the ring beside it finds its place."""
    full_device(3 * 2**30)
    backbone = Backbone(oracle.module("vgg11"), device="cuda")
    assert backbone.batch_size < MAX_BATCH
    staging = Staging(backbone)
    noise = noise_for(backbone, 1) * backbone.batch_size
    passed = [staging(noise) for _ in range(4)]
    assert all(len(one.to_numpy().embedding) == len(noise) for one in passed)


@pytest.mark.gpu
def test_cuda_channels_last_keeps_to_the_precision(cache: Path) -> None:
    """The other layout gives bf16's vectors within bf16's error."""
    backbone = Backbone(oracle.module("pit_ti_224"), device="cuda", precision="bf16", batch_size=8)
    images = torch.from_numpy(np.stack([n.pixels for n in noise_for(backbone, 8)]))
    found = []
    for channels_last in (False, True):
        backbone._lay_out(channels_last)
        found.append(backbone(images).to_numpy().embedding)
    a, b = found
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() >= 0.9998
