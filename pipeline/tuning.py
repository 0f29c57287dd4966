"""What a device does best with one model, measured once a node and remembered: the batch size and the memory's layout.

Every worker of a run, and of the runs after it, takes what the first one found, so all compute with the same kernels.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pipeline import findings
from pipeline.config import MAX_BATCH
from pipeline.device import is_out_of_memory

FOLDER = "tuned"  # of the cache
CUDA_BATCHES = (64, 128, 256, 512, 1024, 2048, MAX_BATCH)
WORTH_DOUBLING = 1.05  # a larger batch is taken while it gives at least 5 % more images/s
WORTH_CHANNELS_LAST = 1.03  # … and the other layout where it gives 3 %: timing alone moves by one or two
TIMED = 4  # passes, after two that let the libraries choose their kernels
# Of the memory that is left beside the model: the rest is for the ring, for results on their way and for fragments.
ROOM_USED = 0.8


@dataclass(frozen=True)
class Tuned:
    """`channels_last`: images and convolutions in memory as NHWC."""

    batch_size: int
    channels_last: bool


def key_of(module: torch.nn.Module, device: torch.device, **settings: Any) -> dict[str, Any]:
    """What the measurement depends on; of the weights only their names and shapes. `settings`: JSON's types."""
    shapes = sorted((name, list(tensor.shape)) for name, tensor in module.state_dict().items())
    properties = torch.cuda.get_device_properties(device)
    return {
        "architecture": (getattr(module, "pretrained_cfg", None) or {}).get("architecture", ""),
        "shapes": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
        "device": properties.name,
        "memory": properties.total_memory,
        "torch": torch.__version__,
        **settings,
    }


def tuned(key: dict[str, Any], search: Callable[[], tuple[Tuned, bool]]) -> Tuned:
    """What is remembered for `key`, else what `search` finds, by one process of the node while others wait: workers
    that start together would measure each other.

    `search` also says whether its finding lasts: what a passing lack of memory made of it is not remembered.
    """
    found = recall(key)
    if found is None:
        with findings.alone(FOLDER, key):
            found = recall(key)
            if found is None:
                found, lasts = search()
                if lasts:
                    findings.remember(FOLDER, key, asdict(found))
    return found


def recall(key: dict[str, Any]) -> Tuned | None:
    """None where nothing that can be is remembered."""
    said = findings.recall(FOLDER, key) or {}
    size, layout = said.get("batch_size"), said.get("channels_last")
    if type(size) is int and 1 <= size <= MAX_BATCH and type(layout) is bool:
        return Tuned(size, layout)
    return None


def best_batch_size(images_per_s: Callable[[int], float]) -> int | None:
    """The smallest of `CUDA_BATCHES` after which doubling no longer pays; half of the smallest until one fits.

    None where not even one image does.
    """
    best = CUDA_BATCHES[0]
    speed = images_per_s(best)
    while speed == 0 and best > 1:
        best //= 2
        speed = images_per_s(best)
    if speed == 0:
        return None
    for size in CUDA_BATCHES[1:]:
        if size != 2 * best:
            break
        faster = images_per_s(size)
        if faster < speed * WORTH_DOUBLING:
            break
        best, speed = size, faster
    return best


def images_per_s(forward: Callable[[], Any], images: int, device: torch.device, allowed: int) -> float:
    """Speed of a forward pass of so many images; 0 where it does not fit, or leaves too little room.

    `allowed`: bytes that this process may hold in all, its model too.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_reserved(device)
    room = min(torch.cuda.mem_get_info(device)[0], allowed - held)
    try:
        forward()
        forward()
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(TIMED):
            forward()
        torch.cuda.synchronize(device)
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        return 0.0
    seconds = time.perf_counter() - started
    taken = torch.cuda.max_memory_reserved(device) - held
    return TIMED * images / seconds if taken <= ROOM_USED * room else 0.0
