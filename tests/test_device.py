"""Batches on their way to a device and back: right whatever the device does when, and measured by the device itself.

What CUDA does with streams is played by a device that works as late as it may: a copy or a forward pass happens when
somebody waits for it, and not before. What is reused too early, or read too early, is wrong there every time.
"""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made
import numpy as np
import oracle
import pyarrow.parquet as pq
import pytest
import torch
from containers import write_tar
from pictures import jpeg

from pipeline import device, embed
from pipeline.backbone import Backbone, Vectors, resolve_device
from pipeline.device import Staging, is_out_of_memory, out_of_memory_explained
from pipeline.errors import NoRoom, UsageError
from pipeline.images import Decoded

SHAPE = (3, 4, 4)


class LazyStream:
    """Work in its order, done only when it must be."""

    one = threading.RLock()  # the feeding and the writing thread both make it work

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []
        self.done = 0

    def wait_event(self, event: "LazyEvent") -> None:
        stream, at = event.stream, event.at  # a later `record` does not move what is waited for
        self.work.append(lambda: stream.run(at))

    def run(self, until: int) -> None:
        with self.one:
            while self.done < until:
                self.done += 1
                self.work[self.done - 1]()


class LazyEvent:
    waits = 0

    def record(self, stream: LazyStream) -> None:
        self.stream, self.at = stream, len(stream.work)

    def synchronize(self) -> None:
        LazyEvent.waits += 1
        self.stream.run(self.at)

    def elapsed_time(self, other: "LazyEvent") -> float:
        assert self.stream is other.stream and self.stream.done >= self.at and other.stream.done >= other.at
        return 1000.0 * (other.at - self.at)  # a second for each piece of work


class LazyCuda:
    """In the place of `device.Cuda`."""

    def __init__(self) -> None:
        self.incoming, self.outgoing, self.computing = LazyStream(), LazyStream(), LazyStream()
        self.current = self.computing

    @contextlib.contextmanager
    def on(self, stream: LazyStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def event(self) -> LazyEvent:
        return LazyEvent()

    def pinned(self, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(tuple(shape), 77, dtype=dtype)

    empty = pinned

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        def body() -> None:
            target.copy_(source)

        self.current.work.append(body)


class LazyBackbone:
    """Gives the mean of each image, when its stream comes to it."""

    def __init__(self, cuda: LazyCuda, batch_size: int = 4):
        self.batch_size, self.device = batch_size, torch.device("cuda", 0)
        self.preprocessing = SimpleNamespace(input_size=SHAPE)
        self._cuda = cuda

    def __call__(self, images: torch.Tensor) -> Vectors:
        embedding, norm = torch.full((len(images), 1), -1.0), torch.full((len(images),), -1.0)

        def compute() -> None:
            embedding.copy_(images.float().mean(dim=(1, 2, 3))[:, None])
            norm.copy_(embedding[:, 0].abs())

        self._cuda.computing.work.append(compute)
        return Vectors(embedding, norm, None, None)


def images_of(values: list[int]) -> list[Decoded]:
    return [Decoded(np.full(SHAPE, value, np.uint8), 4, 4) for value in values]


@pytest.mark.parametrize("behind", [0, 1, 2, 5, 20])
def test_every_batch_comes_back_as_it_was_given(behind: int) -> None:
    """However late the results are waited for, and however late the device works, no batch sees another's images."""
    cuda = LazyCuda()
    staging = Staging(LazyBackbone(cuda), cuda=cuda)
    batches = [[(7 * b + i) % 256 for i in range(1 + b % 4)] for b in range(20)]
    waiting, got = [], []
    for values in batches:
        waiting.append(staging(images_of(values)))
        if len(waiting) > behind:
            got.append(waiting.pop(0).to_numpy())
    got += [passed.to_numpy() for passed in waiting]
    assert [a.embedding[:, 0].tolist() for a in got] == [[float(v) for v in values] for values in batches]
    assert all(a.norm.tolist() == a.embedding[:, 0].tolist() for a in got)


def test_feeding_waits_for_the_device_only_where_the_ring_is_full() -> None:
    """Three batches go out before the first one is waited for, and then one for each."""
    cuda = LazyCuda()
    staging = Staging(LazyBackbone(cuda), cuda=cuda)
    LazyEvent.waits = 0
    for batch in range(5):
        staging(images_of([batch]))
        assert LazyEvent.waits == max(0, batch + 1 - device.RING)
    assert cuda.computing.done == 4  # of two batches, each waiting for its copy and then computing


def test_large_batches_have_a_smaller_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned and device memory are bounded, whatever --batch-size: two places at least, three at most."""
    cuda = LazyCuda()
    monkeypatch.setattr(device, "RING_BYTES", 2 * 16 * 48)
    for batch_size, places in ((4, 3), (16, 2), (64, 2)):
        assert len(Staging(LazyBackbone(cuda, batch_size), cuda=cuda)._ring) == places


def test_the_device_tells_how_long_it_worked() -> None:
    """`forward` is what lies between its events, without the wait before it; `copy` is one in and two out."""
    cuda = LazyCuda()
    passed = Staging(LazyBackbone(cuda), cuda=cuda)(images_of([1, 2]))
    passed.to_numpy()
    seconds = passed.seconds()
    assert seconds == {"forward": 1.0, "copy": 3.0}
    assert passed.kept is None


def test_results_are_waited_for_from_another_thread() -> None:
    """The writer waits for one batch while the next ones are being fed."""
    cuda = LazyCuda()
    staging = Staging(LazyBackbone(cuda), cuda=cuda)
    first, _ = staging(images_of([5])), staging(images_of([6]))
    got: list[float] = []
    writer = threading.Thread(target=lambda: got.append(first.to_numpy().embedding[0, 0]))
    writer.start()
    writer.join()
    assert got == [5.0]
    assert cuda.computing.done == 2  # the second batch was not waited for


def test_the_cpu_stacks_and_passes_on() -> None:
    """Without a device there is no ring, and the vectors are the backbone's own, to the bit."""
    backbone = Backbone(oracle.module(made.MODEL), batch_size=4)
    channels, height, width = backbone.preprocessing.input_size
    noise = np.random.default_rng(0).integers(0, 256, (3, channels, height, width), np.uint8)
    staging = Staging(backbone)
    passed = staging([Decoded(pixels, 9, 9) for pixels in noise])
    assert not staging._ring
    assert np.array_equal(passed.to_numpy().embedding, backbone(torch.from_numpy(noise)).to_numpy().embedding)
    assert passed.seconds() == {}


def test_a_ring_gives_the_files_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the whole inner pipeline, over several shards and short batches: the same rows, to the bit."""
    for shard in range(3):
        members = {f"{i}.jpg": jpeg(40 + i, 30, seed=10 * shard + i) for i in range(5 + shard)}
        write_tar(tmp_path / "in" / f"{shard}.tar", members)

    class Late(Backbone):
        """Computes when its stream comes to it."""

        def __call__(self, images: torch.Tensor) -> Vectors:
            shaped = super().__call__(images)
            late = shaped.mapped(torch.zeros_like)

            def compute() -> None:
                for target, now in zip(late[:4], super(Late, self).__call__(images)[:4], strict=True):
                    target.copy_(now)

            cuda.computing.work.append(compute)
            return late

    cuda = LazyCuda()
    files = []
    for name, kind in (("plain", Backbone), ("late", Late)):
        job = made.job(tmp_path / name)
        monkeypatch.setattr(made, "Backbone", kind)
        if kind is Late:
            monkeypatch.setattr(embed, "Staging", lambda backbone, images: Staging(backbone, images, cuda=cuda))
        receipts = made.embed(job, tmp_path / "in")
        assert [r.error for r in receipts] == [None] * 3
        tables = [pq.read_table(tmp_path / name / r.files.embeddings) for r in receipts]
        files.append([table.drop_columns(["topk_label"]).to_pylist() for table in tables])
        assert all(r.seconds["forward"] > 0 for r in receipts)
    assert files[0] == files[1]


# memory


class Fits(torch.nn.Module):
    """A model whose device has room for so many images, and says it in the given words when it has not."""

    pretrained_cfg = {"input_size": (3, 8, 8), "num_classes": 0}  # noqa: RUF012
    num_classes = 0

    def __init__(self, room: int, error: RuntimeError):
        super().__init__()
        self.room, self.error = room, error

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.room:
            raise self.error
        return x.flatten(1)[:, :8]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x


LACKS_MEMORY = (
    torch.OutOfMemoryError("simulated"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    torch.AcceleratorError("CUDA error: out of memory"),
)


@pytest.mark.parametrize("error", LACKS_MEMORY)
def test_memory_that_runs_out_halves_the_batch_in_the_ring(error: RuntimeError) -> None:
    """Torch's error and those of the libraries beneath it: the same rows again, every one, and the ring goes on."""
    backbone = Backbone(Fits(3, error), batch_size=8, classes=False)
    assert is_out_of_memory(error)
    staging = Staging(backbone)
    for start in (0, 8):
        images = [Decoded(np.full((3, 8, 8), start + i, np.uint8), 8, 8) for i in range(8)]
        got = staging(images).to_numpy().embedding[:, 0]
        want = [float(backbone.normalize(torch.from_numpy(i.pixels)[None])[0, 0, 0, 0]) for i in images]
        assert got.tolist() == want
    assert backbone.batch_size == 2


def test_other_errors_are_no_lack_of_memory() -> None:
    """A model's own error is raised as it is: halving the batch would only hide it."""
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    backbone = Backbone(Fits(0, error), batch_size=8, classes=False)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        backbone(torch.zeros(8, 3, 8, 8, dtype=torch.uint8))
    assert backbone.batch_size == 8


def test_a_device_without_room_says_so() -> None:
    """The sentence names the device and what did not fit, whatever torch can still tell about it."""
    said = pytest.raises(NoRoom, match=r" has no room for the model.*Tried to allocate")
    with said, out_of_memory_explained(torch.device("cuda", 0), "the model"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


def test_float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was set before, by which of torch's names: no product or convolution is of TF32, and none warns."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    for before in (lambda: setattr(matmul, "allow_tf32", True), lambda: setattr(matmul, "fp32_precision", "tf32")):
        before()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            device.keep_float32()
        assert matmul.fp32_precision != "tf32" and cudnn.conv.fp32_precision != "tf32"
        assert not matmul.allow_tf32 and not cudnn.allow_tf32  # reading these refuses a mixture


def test_pinned_memory_that_cannot_be_had_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence gives the size and what to do."""

    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(NoRoom, match=r"37 MB of pinned host memory cannot be had .*smaller --batch-size"):
        device.Cuda.pinned(None, (256, 3, 224, 224), torch.uint8)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_device_is_named_with_cudas_own_reason() -> None:
    """--device cuda ends before any work, with what CUDA says of it."""
    with pytest.raises(UsageError, match=r"no CUDA device is here \(.+\); --device cpu"):
        resolve_device("cuda")


# on a device
