"""Decoded images → the device and its vectors back, with the copies beside the computing; CUDA's memory and errors.

    images → a ring of pinned buffers → incoming stream → forward → outgoing stream → pinned results

While a batch computes, the next one is copied to the device and the results of the last come back. The feeding thread
waits for the device only where the whole ring is under way, the writing thread only for the batch that it writes. On
the CPU a batch is stacked and passed on, and that is all.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from pipeline.backbone import Arrays, Backbone, Vectors
    from pipeline.cuda_images import DeviceImages, Jpeg, OnDevice
from pipeline.errors import NoRoom, Reject
from pipeline.images import Decoded

RING = 3  # batches: one computes, one is copied, one is filled …
RING_BYTES = 2**30  # … and two of larger ones: 2048 images of 224x224 are 0.3 GB, on the host and on the device
# Of a share of a device, what torch's allocator does not count: the process's context, kernels, nvJPEG's buffers. A
# context with cuDNN and cuBLAS loaded takes 0.5 to 0.8 GB by NVIDIA's own figures; not yet measured here.
CONTEXT_BYTES = 3 * 2**29
ROOM_STEPS = 8  # what is found for some room holds for about as much
# A handle that cannot be made is reported as not initialised.
LIBRARY_LACKS_MEMORY = re.compile("out of memory|(CUDNN|CUBLAS|CUSOLVER)_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)")
Timed = Callable[[str], AbstractContextManager[Any]]


def untimed(part: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass
class Passed:
    """One batch that has been, or on CUDA is being, through the backbone."""

    vectors: "Vectors"  # on the host; on CUDA not before `to_numpy` has waited for them
    spans: tuple[tuple[str, Any, Any], ...] = ()  # a part, and the CUDA events around its work on the device
    arrived: Any = None  # the event after which the vectors are there
    kept: Any = None  # what the device still copies from

    def to_numpy(self) -> "Arrays":
        """Waits for this batch, and for nothing that came after it."""
        if self.arrived is not None:
            self.arrived.synchronize()
            self.kept = None
        return self.vectors.to_numpy()

    def seconds(self) -> dict[str, float]:
        """Of a CUDA device, once `to_numpy` has returned: its time for `forward`, and for `copy` there and back.

        Where several processes share a device, its time for one of them includes waiting for the others' kernels.
        """
        total: dict[str, float] = {}
        for part, begin, end in self.spans:
            total[part] = total.get(part, 0.0) + begin.elapsed_time(end) / 1000
        return total


class Cuda:
    """The calls that only a CUDA device can answer; all else here is the same for a device of a test's own."""

    def __init__(self, device: torch.device):
        self.device = device
        self.incoming, self.outgoing = torch.cuda.Stream(device), torch.cuda.Stream(device)

    @property
    def computing(self) -> Any:
        return torch.cuda.current_stream(self.device)

    def on(self, stream: Any) -> Any:
        """A context in which work and memory are the stream's."""
        return torch.cuda.stream(stream)

    def event(self) -> Any:
        """`blocking`: who waits for it sleeps, where CUDA would spin on a core that decoding threads need."""
        return torch.cuda.Event(enable_timing=True, blocking=True)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Host memory that the device copies from and to by itself.

        From torch's cache of it, which gives out no block before the copies with it are over.
        """
        try:
            return torch.empty(*shape, dtype=dtype, pin_memory=True)
        except RuntimeError as e:
            size = torch.Size(shape).numel() * dtype.itemsize / 2**20
            raise NoRoom(
                f"{size:.0f} MB of pinned host memory cannot be had ({_line(e)}): choose a smaller --batch-size or "
                "fewer --actors, or raise the container's limits of memory and of locked memory"
            ) from e

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Device memory; what was queued on it before is over, so that every stream may write to it."""
        with out_of_memory_explained(self.device, "the buffers of its batches"):
            tensor = torch.empty(*shape, dtype=dtype, device=self.device)
            torch.cuda.synchronize(self.device)
        return tensor

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """On the current stream; returns before it is done."""
        target.copy_(source, non_blocking=True)


@dataclass
class _Slot:
    """One place of the ring. `free`: the event after which nothing reads it any more."""

    host: torch.Tensor  # uint8 (batch, C, H, W), pinned
    there: torch.Tensor  # the same on the device
    free: Any = None
    array: np.ndarray = field(init=False)  # the memory of `host`

    def __post_init__(self) -> None:
        self.array = self.host.numpy()


class Staging:
    """Passes batches through one backbone; called from one thread, what it gives may be waited for in another."""

    def __init__(self, backbone: "Backbone", images: "DeviceImages | None" = None, cuda: Any = None):
        """`images` decodes on the device, for `--decode cuda`. `cuda`: by default the device's own."""
        self._backbone, self._images = backbone, images
        self._cuda: Any = cuda or (Cuda(backbone.device) if backbone.device.type == "cuda" else None)
        self._ring: list[_Slot] = []
        self._next = 0
        if self._cuda is not None:
            shape = (backbone.batch_size, *backbone.preprocessing.input_size)
            places = max(2, min(RING, RING_BYTES // torch.Size(shape).numel()))
            for _ in range(places):
                host, there = self._cuda.pinned(shape, torch.uint8), self._cuda.empty(shape, torch.uint8)
                self._ring.append(_Slot(host, there))

    def decoded(self, images: "Sequence[Decoded | Jpeg | OnDevice]") -> "Sequence[Decoded | OnDevice | Reject]":
        """What is encoded still is decoded on the device, in the stream that fills the ring."""
        assert self._images is not None
        with self._cuda.on(self._cuda.incoming):
            return self._images(images)

    def __call__(self, images: Sequence["Decoded | OnDevice"], timed: Timed = untimed) -> Passed:
        """`images`: the backbone's batch size at most. On CUDA it returns while the device still works.

        `timed`: a context around what this thread does, by its part: `transfer`, then `forward`, or `launch` on CUDA.
        """
        return self._on_cuda(images, timed) if self._cuda is not None else self._on_cpu(images, timed)

    def _on_cpu(self, images: Sequence[Any], timed: Timed) -> Passed:
        with timed("transfer"):
            batch = torch.from_numpy(np.stack([image.pixels for image in images]))
        with timed("forward"):
            return Passed(self._backbone(batch))

    def _on_cuda(self, images: Sequence["Decoded | OnDevice"], timed: Timed) -> Passed:
        cuda, n = self._cuda, len(images)
        slot = self._ring[self._next]
        self._next = (self._next + 1) % len(self._ring)
        if slot.free is not None:
            slot.free.synchronize()
        marks = [cuda.event() for _ in range(6)]
        with timed("transfer"), cuda.on(cuda.incoming):
            marks[0].record(cuda.incoming)
            self._fill(slot, images)
            marks[1].record(cuda.incoming)
        slot.free = marks[1]  # if the forward pass fails
        with timed("launch"):
            computing = cuda.computing
            computing.wait_event(marks[1])
            marks[2].record(computing)
            vectors = self._backbone(slot.there[:n]).mapped(torch.Tensor.contiguous)  # a strided copy would go in two
            marks[3].record(computing)
            slot.free = marks[3]
            cuda.outgoing.wait_event(marks[3])
            with cuda.on(cuda.outgoing):
                marks[4].record(cuda.outgoing)
                arrived = vectors.mapped(self._fetched)
                marks[5].record(cuda.outgoing)
        spans = zip(("copy", "forward", "copy"), marks[::2], marks[1::2], strict=True)
        return Passed(arrived, tuple(spans), arrived=marks[5], kept=vectors)

    def _fill(self, slot: _Slot, images: Sequence["Decoded | OnDevice"]) -> None:
        """One host copy an image, then one of them all to the device; those decoded there lie between them."""
        here = [image.pixels for image in images if isinstance(image, Decoded)]
        if here:
            np.stack(here, out=slot.array[: len(here)])
        if len(here) == len(images):
            self._cuda.copy(slot.there[: len(here)], slot.host[: len(here)])
            return
        pinned = iter(slot.host)
        for row, image in zip(slot.there, images, strict=False):
            self._cuda.copy(row, next(pinned) if isinstance(image, Decoded) else image.pixels)

    def _fetched(self, tensor: torch.Tensor) -> torch.Tensor:
        host = self._cuda.pinned(tensor.shape, tensor.dtype)
        self._cuda.copy(host, tensor)
        return host


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a smaller batch may help: torch's own error, or that of a library beneath it, by its message."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return LIBRARY_LACKS_MEMORY.search(str(error)) is not None


@contextmanager
def out_of_memory_explained(device: torch.device, what: str) -> Iterator[None]:
    """Raises `NoRoom` with the memory's figures where the device has no room for `what`, or cannot be used."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError) as e:
        raise no_room(device, what, e) from e


def no_room(device: torch.device, what: str, error: BaseException) -> NoRoom:
    """With the memory's figures, as far as the device still tells any."""
    return NoRoom(f"{name_of(device)} has no room for {what}, {_free(device)}: {_line(error)}")


def name_of(device: torch.device) -> str:
    try:
        return torch.cuda.get_device_name(device)
    except (RuntimeError, AssertionError):  # torch without CUDA asserts
        return str(device)


def _free(device: torch.device) -> str:
    try:
        free, total = torch.cuda.mem_get_info(device)
    except (RuntimeError, AssertionError, ValueError):  # the device is lost and says nothing more, or it is the CPU
        return "and does not tell how much is free"
    return f"{free / 2**30:.1f} of its {total / 2**30:.1f} GB are free"


def why_no_cuda() -> str:
    """The reason that CUDA gives itself, as a missing driver, in brackets; empty where it gives none."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as e:
        return f" ({_line(e)})"
    return ""


class Room(NamedTuple):
    """What a process may hold of a device's memory."""

    bytes: int
    steps: int  # `ROOM_STEPS` would be the whole device
    is_free: bool  # False: others hold some of it


def limit_memory(device: torch.device, share: float) -> Room:
    """What this process may hold of the device; of less than a whole one, torch then refuses to take more.

    `share`: of the device, as `--gpus-per-actor`. The processes that share one cannot know of each other's peaks, so
    each keeps to its own part: an out-of-memory then is of that process's own making, and halving its batch helps.
    """
    free, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(_fraction(share, total), device)
    return room_of(share, free + torch.cuda.memory_reserved(device), total)


def room_of(share: float, free: int, total: int) -> Room:
    """`free`: bytes of the device that nobody else holds. Who has it alone may take all of these."""
    room = free if share >= 1 else int(_fraction(share, total) * total)
    return Room(room, ROOM_STEPS * room // total, room <= free)


def _fraction(share: float, total: int) -> float:
    return 1.0 if share >= 1 else max(share / 2, share - CONTEXT_BYTES / total)


def keep_float32() -> None:
    """Products and convolutions of float32 on CUDA are of float32, not of TF32's 10 bits.

    The first are so by default, unless the environment says TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, as NVIDIA's containers
    do. By torch's older names: they set what the newer ones (`fp32_precision`) read, and these do not set what its
    compiler reads, which then refuses the mixture: https://github.com/pytorch/pytorch/issues/166387
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are newer ones
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
