"""What a device does best is measured once, by one worker, remembered, and learnt from."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import made
import numpy as np
import oracle
import pytest
import torch
from test_backbone import Ties

from pipeline import findings, tuning
from pipeline.backbone import Backbone
from pipeline.config import MAX_BATCH
from pipeline.device import Room, Staging, room_of
from pipeline.tuning import CUDA_BATCHES, FOLDER, Tuned, best_batch_size, recall, tuned

KEY = {"architecture": "pit_b", "size": [3, 224, 224], "device": "a device", "share": 0.3333}


@pytest.mark.parametrize(
    ("speeds", "best"),
    [
        ({64: 100.0, 128: 180.0, 256: 184.0, 512: 400.0}, 128),
        ({64: 100.0, 128: 200.0, 256: 400.0, 512: 800.0}, 512),
        ({64: 100.0, 128: 0.0}, 64),
        ({64: 0.0, 32: 0.0, 16: 50.0}, 16),
        ({}, None),
        ({size: float(size) for size in CUDA_BATCHES}, MAX_BATCH),
    ],
)
def test_the_batch_grows_while_it_pays(speeds: dict[int, float], best: int | None) -> None:
    """`auto` takes the smallest batch after which doubling gives less than 5 %, and one that fits, if any does."""
    assert best_batch_size(lambda size: speeds.get(size, 0.0)) == best


def test_a_search_is_done_once_a_node(cache: Path) -> None:
    """The second worker, and the next run, take what the first one found; another model, share or engine searches."""
    searches: list[int] = []

    def search() -> tuple[Tuned, bool]:
        searches.append(1)
        return Tuned(256, True), True

    assert tuned(KEY, search) == tuned(KEY, search) == Tuned(256, True)
    assert len(searches) == 1
    tuned(KEY | {"share": 1.0}, search)
    assert len(searches) == 2 and len(list(cache.glob("*.json"))) == 2


def test_what_a_passing_lack_of_memory_made_is_not_remembered(cache: Path) -> None:
    """A device that others filled: the next run searches again, and has its speed back."""
    assert tuned(KEY, lambda: (Tuned(1, False), False)) == Tuned(1, False)
    assert recall(KEY) is None and not list(cache.glob("*.json"))
    assert tuned(KEY, lambda: (Tuned(512, True), True)) == Tuned(512, True) == recall(KEY)


def test_workers_that_start_together_search_once(cache: Path) -> None:
    """They would measure each other: one searches, the others wait for what it finds."""
    searches: list[int] = []
    begun = threading.Event()

    def search() -> tuple[Tuned, bool]:
        searches.append(1)
        begun.wait(0.2)
        return Tuned(128, False), True

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
    findings.remember(FOLDER, KEY, {"batch_size": 64, "channels_last": False})
    assert recall(KEY) == Tuned(64, False)
    (path,) = cache.iterdir()
    path.write_bytes(content)
    assert recall(KEY) is None
    assert tuned(KEY, lambda: (Tuned(512, False), True)) == Tuned(512, False) == recall(KEY)


def test_a_cache_that_takes_no_files_costs_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full or read-only disk is no reason not to run."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHARD2VEC_CACHE", str(tmp_path / "file"))
    assert tuned(KEY, lambda: (Tuned(512, False), True)) == Tuned(512, False)


def test_a_search_says_whether_it_lasts(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remembered: a size that fits where all the memory promised is free. A size or a layout found where nothing fits,
    or where others hold a part of the share, and one that was halved later on, are for that run alone."""
    backbone = Backbone(Ties(), batch_size=8)
    keys: list[dict[str, object]] = []
    monkeypatch.setattr(tuning, "key_of", lambda module, device, **settings: keys.append(settings) or settings)
    for room, asked, speed, lasts in (
        (Room(100, 8, True), None, 10.0, True),
        (Room(100, 7, True), None, 0.0, False),
        (Room(100, 7, True), 16, 0.0, False),
        (Room(100, 6, True), 16, 10.0, True),
        (Room(30, 2, False), None, 10.0, False),
    ):
        monkeypatch.setattr(backbone, "_images_per_s", lambda size, allowed, speed=speed: speed)
        backbone._tune(asked, (), 1.0, room)
        assert backbone.batch_size == (asked or (CUDA_BATCHES[0] if speed else 1))
        assert (recall(keys[-1]) is not None) == lasts
    backbone._halve()
    assert [key["room"] for key in keys] == [8, 7, 7, 6, 2] and len(list(cache.glob("*.json"))) == 2
    assert {recall(key).batch_size for key in keys if recall(key)} == {CUDA_BATCHES[0], 16}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("share", "free", "room"),
    [
        (1.0, 80, Room(80, 8, True)),
        (1.0, 79, Room(79, 7, True)),
        (1.0, 9, Room(9, 0, True)),
        (0.5, 80, Room(40 - 1.5, 3, True)),
        (0.5, 38, Room(40 - 1.5, 3, False)),
        (0.01, 80, Room(0.4, 0, True)),
    ],
)
def test_room_is_what_is_free_or_the_share(share: float, free: float, room: Room) -> None:
    """In GB of 80. Who has a device alone has what is free of it, in steps of an eighth; else the share, if it is."""
    found = room_of(share, int(free * 2**30), 80 * 2**30)
    assert found[1:] == room[1:] and found.bytes == pytest.approx(room.bytes * 2**30)


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
    noise = made.noise_for(backbone, 1) * backbone.batch_size
    passed = [staging(noise) for _ in range(4)]
    assert all(len(one.to_numpy().embedding) == len(noise) for one in passed)


@pytest.mark.gpu
def test_cuda_channels_last_keeps_to_the_precision(cache: Path) -> None:
    """The other layout gives bf16's vectors within bf16's error."""
    backbone = Backbone(oracle.module("pit_ti_224"), device="cuda", precision="bf16", batch_size=8)
    images = torch.from_numpy(np.stack([n.pixels for n in made.noise_for(backbone, 8)]))
    found = []
    for channels_last in (False, True):
        backbone._lay_out(channels_last)
        found.append(backbone(images).to_numpy().embedding)
    a, b = found
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() >= 0.9998
