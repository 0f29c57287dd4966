"""What a worker's forward pass on the CPU gains over torch as it is: by `pipeline.process.keep_memory`, and by engines.

    python benchmarks/kept_memory.py [--models a,b] [--engines eager,openvino] [--rounds 15] [--precision bf16]

One process leaves memory to the C library and is eager; the others keep theirs, one for each engine. They have one
thread each and pass a batch of 32 through the model in turns; CPU milliseconds an image are those of the median turn,
the speed is to the first process's, turn by turn. Page faults are of the last turn, peak memory is the whole process's.
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


def turns(model: str, precision: str, engine: str | None, asked: Connection) -> None:
    """`engine` None: eager, and memory as it is."""
    import torch

    from pipeline import weights
    from pipeline.backbone import Backbone
    from pipeline.config import Adapt
    from pipeline.process import keep_memory

    if engine:
        assert keep_memory(), "this C library cannot be asked for it"
    torch.set_num_threads(1)
    module = weights.load_module(model, "random:0", Adapt())
    backbone = Backbone(module, engine=engine or "eager", precision=precision, batch_size=BATCH)
    images = torch.randint(0, 256, (BATCH, *backbone.preprocessing.input_size), dtype=torch.uint8)
    while asked.recv():
        faults, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
        backbone(images)
        cpu_s, used = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF)
        asked.send(Turn(1000 * cpu_s / BATCH, (used.ru_minflt - faults) // BATCH, used.ru_maxrss / 1024))


def measured(model: str, precision: str, engines: list[str | None], rounds: int) -> list[list[Turn]]:
    """Of a process for each."""
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in engines]
    processes = [
        context.Process(target=turns, args=(model, precision, engine, there))
        for engine, (_, there) in zip(engines, ends, strict=True)
    ]
    for process in processes:
        process.start()
    found: list[list[Turn]] = [[] for _ in engines]
    for n in range(WARM_UP + rounds):
        for own, (here, _) in zip(found, ends, strict=True):
            here.send(True)
            turn = here.recv()
            if n >= WARM_UP:
                own.append(turn)
    for (here, _), process in zip(ends, processes, strict=True):
        here.send(False)
        process.join()
    return found


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--models", default=MODELS)
    flags.add_argument("--engines", default="eager")
    flags.add_argument("--precision", default="bf16")
    flags.add_argument("--rounds", type=int, default=15)
    asked = flags.parse_args()
    print(f"{platform.node()}, {time.strftime('%Y-%m-%d')}, {asked.precision}, {asked.rounds} rounds\n")
    print("| model | engine | CPU ms an image | speed | page faults an image | peak MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    engines = [None, *asked.engines.split(",")]
    for model in asked.models.split(","):
        plain, *kept = measured(model, asked.precision, engines, asked.rounds)
        for engine, turns_ in zip(engines, (plain, *kept), strict=True):
            ratios = [a.cpu_ms / b.cpu_ms for a, b in zip(plain, turns_, strict=True)]
            speed = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})" if engine else "1.00"
            cpu_ms, last = statistics.median(turn.cpu_ms for turn in turns_), turns_[-1]
            what = f"{model} | {engine or 'eager, memory as it is'} | {cpu_ms:.2f} | {speed}"
            print(f"| {what} | {last.faults:,.0f} | {last.peak_mb:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
