"""The device's ring, its clock and its memory, on a real CUDA device."""

import time
from collections.abc import Callable
from pathlib import Path

import made
import numpy as np
import oracle
import pytest
import torch

from pipeline import device
from pipeline.backbone import Backbone
from pipeline.device import Staging
from pipeline.errors import NoRoom

SHAPE = (3, 4, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["test_vit", "resnet10t"])
def test_cuda_batches_come_back_right_whatever_is_under_way(model: str, cache: Path) -> None:
    """Forty batches through the ring, waited for late: to the bit what each of them gives alone."""
    backbone = Backbone(oracle.module(model), device="cuda", batch_size=16)
    noise = made.noise_for(backbone, 16)
    sizes = [16, 3, 16, 1]
    want = [backbone(torch.from_numpy(np.stack([n.pixels for n in noise[:size]]))).to_numpy() for size in sizes]
    staging = Staging(backbone)
    waiting = []
    for i in range(40):
        waiting.append((i, staging(noise[: sizes[i % 4]])))
        if len(waiting) > 6 or i == 39:
            for at, passed in waiting if i == 39 else [waiting.pop(0)]:
                got = passed.to_numpy()
                assert np.array_equal(got.embedding, want[at % 4].embedding)
                assert np.array_equal(got.topk_index, want[at % 4].topk_index)


@pytest.mark.gpu
def test_cuda_tells_its_seconds(cache: Path) -> None:
    """The device's own time of a batch: more than nothing, less than the clock on the wall, and more for more work."""
    backbone = Backbone(oracle.module("pit_ti_224"), device="cuda", batch_size=64)
    staging = Staging(backbone)
    noise = made.noise_for(backbone, 64)
    staging(noise).to_numpy()
    started = time.perf_counter()
    passed = [staging(noise) for _ in range(8)]
    for one in passed:
        one.to_numpy()
    wall = time.perf_counter() - started
    seconds = [one.seconds() for one in passed]
    assert all(s["forward"] > 0 and s["copy"] > 0 for s in seconds)
    assert sum(s["forward"] for s in seconds) < 1.05 * wall


@pytest.mark.gpu
def test_cuda_waits_sleep(cache: Path) -> None:
    """Who waits for the device leaves its core to the decoding threads."""
    backbone = Backbone(oracle.module("pit_b_224"), device="cuda", batch_size=128)
    staging = Staging(backbone)
    noise = made.noise_for(backbone, 128)
    staging(noise).to_numpy()
    passed = [staging(noise) for _ in range(3)]
    wall, cpu = time.perf_counter(), time.thread_time()
    passed[-1].to_numpy()
    wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
    assert wall < 0.01 or cpu < 0.5 * wall


@pytest.mark.gpu
def test_cuda_out_of_memory_in_the_ring_loses_no_row(cache: Path, full_device: Callable[[int], None]) -> None:
    """Memory that is gone when the run is under way: halves, the same rows, and the ring goes on."""
    backbone = Backbone(oracle.module("vgg11"), device="cuda", batch_size=1024)
    staging = Staging(backbone)
    full_device(2 * 2**30)
    noise = made.noise_for(backbone, 8) * 128
    passed = [staging(noise), staging(noise)]
    got = [one.to_numpy().embedding for one in passed]
    assert backbone.batch_size < 1024
    for embedding in got:
        assert len(embedding) == 1024
        assert oracle.relative(embedding[-8:], embedding[:8]) < 1e-3


@pytest.mark.gpu
def test_cuda_without_room_says_so(cache: Path, full_device: Callable[[int], None]) -> None:
    """A device whose memory others hold: one sentence with the figures."""
    module = oracle.module("vgg11")  # 0.5 GB
    full_device(100 * 2**20)
    with pytest.raises(NoRoom, match=r"has no room for the model, .* of its .* GB are free"):
        Backbone(module, device="cuda")


@pytest.mark.gpu
def test_cuda_keeps_to_its_share(cache: Path) -> None:
    """A process with a third of a device is refused more than that by torch, whatever is free."""
    device_ = torch.device("cuda", torch.cuda.current_device())
    _, total = torch.cuda.mem_get_info()
    try:
        room = device.limit_memory(device_, 1 / 3).bytes
        assert total / 6 <= room < total / 3
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(int(0.4 * total), dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device_)
