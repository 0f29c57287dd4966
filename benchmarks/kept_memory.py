"""What `pipeline.process.keep_memory` gives a forward pass on the CPU: a process with it and one without, in turns.

    python benchmarks/kept_memory.py [--models a,b] [--rounds 15] [--precision bf16]

Each process has one thread and passes a batch of 32 through the model when it is its turn; CPU milliseconds an image
are those of the median turn. Page faults are of the last turn, peak memory is that of the whole process.
"""

import argparse
import multiprocessing
import platform
import resource
import statistics
import time
from multiprocessing.connection import Connection
from typing import NamedTuple

MODELS = "test_vit,pit_ti_224,pit_s_224,pit_b_224,beit_base_patch16_224.in22k_ft_in22k_in1k"
BATCH = 32
WARM_UP = 3


class Turn(NamedTuple):
    cpu_ms: float  # of an image
    faults: int
    peak_mb: float


def turns(model: str, precision: str, is_kept: bool, asked: Connection) -> None:
    import torch

    from pipeline import weights
    from pipeline.backbone import Backbone
    from pipeline.config import Adapt
    from pipeline.process import keep_memory

    if is_kept:
        assert keep_memory(), "this C library cannot be asked for it"
    torch.set_num_threads(1)
    backbone = Backbone(weights.load_module(model, "random:0", Adapt()), precision=precision, batch_size=BATCH)
    images = torch.randint(0, 256, (BATCH, *backbone.preprocessing.input_size), dtype=torch.uint8)
    while asked.recv():
        faults, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
        backbone(images)
        cpu_s, used = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF)
        asked.send(Turn(1000 * cpu_s / BATCH, (used.ru_minflt - faults) // BATCH, used.ru_maxrss / 1024))


def measured(model: str, precision: str, rounds: int) -> list[list[Turn]]:
    """Of the process without, and of the one with."""
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in range(2)]
    processes = [context.Process(target=turns, args=(model, precision, bool(i), ends[i][1])) for i in range(2)]
    for process in processes:
        process.start()
    found: list[list[Turn]] = [[], []]
    for n in range(WARM_UP + rounds):
        for i, (end, _) in enumerate(ends):
            end.send(True)
            turn = end.recv()
            if n >= WARM_UP:
                found[i].append(turn)
    for (end, _), process in zip(ends, processes, strict=True):
        end.send(False)
        process.join()
    return found


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--models", default=MODELS)
    flags.add_argument("--precision", default="bf16")
    flags.add_argument("--rounds", type=int, default=15)
    asked = flags.parse_args()
    print(f"{platform.node()}, {time.strftime('%Y-%m-%d')}, {asked.precision}, {asked.rounds} rounds\n")
    print("| model | CPU ms an image: as it is | kept | speed | page faults an image | peak MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for model in asked.models.split(","):
        without, kept = measured(model, asked.precision, asked.rounds)
        before, after = (statistics.median(turn.cpu_ms for turn in all_turns) for all_turns in (without, kept))
        ratios = [a.cpu_ms / b.cpu_ms for a, b in zip(without, kept, strict=True)]
        speed = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        faults, peak = (f"{without[-1][i]:,.0f}, {kept[-1][i]:,.0f}" for i in (1, 2))
        print(f"| {model} | {before:.2f} | {after:.2f} | {speed} | {faults} | {peak} |", flush=True)


if __name__ == "__main__":
    main()
