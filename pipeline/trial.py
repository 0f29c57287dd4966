"""The inner pipeline for some seconds, in as many processes as a run would have workers: what a setting really gives.

Each process embeds the same few shards again and again, under another name each time, without Ray.
"""

import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch

from pipeline.embed import Embedder, Job, Receipt, backbone_of
from pipeline.feed import LocalFeed
from pipeline.listing import Shard
from pipeline.output import Root
from pipeline.process import keep_memory, leave_pandas_out

START_S = 120.0  # for all processes to load torch and the model, and find a batch size

_all_ready: threading.Barrier | None = None  # of a process that is one of several


def tried(job: Job, shards: Sequence[Shard], workers: int, seconds: float) -> list[Receipt]:
    """The receipts of all workers, which start at once. `shards`: so small that each embeds several in its time."""
    if workers == 1:
        return _embedded(job, shards, seconds, 0)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _wait_for, (context.Barrier(workers),)) as processes:
        asked = [processes.submit(_embedded, job, shards, seconds, i) for i in range(workers)]
        return [receipt for answer in asked for receipt in answer.result()]


def images_per_s(receipts: list[Receipt]) -> float:
    """The steady rate: of each worker from the end of its first shard to that of its last one, summed.

    Where a worker has one receipt alone, from its start.
    """
    total = 0.0
    for worker in {r.worker for r in receipts}:
        own = sorted((r for r in receipts if r.worker == worker and r.files), key=lambda r: r.ended)
        later = own[1:] or own
        begin = own[0].ended if len(own) > 1 else own[0].started
        total += sum(r.files.counts.samples for r in later if r.files) / max(1e-3, own[-1].ended - begin)
    return total


def _wait_for(others: threading.Barrier) -> None:
    global _all_ready
    _all_ready = others
    keep_memory()
    leave_pandas_out()
    os.setsid()  # as Ray's workers: Linux divides the cores among sessions first, where others want them too


def _embedded(job: Job, shards: Sequence[Shard], seconds: float, place: int) -> list[Receipt]:
    receipts: list[Receipt] = []
    output, before = Root(job.output), torch.get_num_threads()

    def done(receipt: Receipt) -> None:
        receipts.append(receipt)
        for name in receipt.files.names.values() if receipt.files else ():
            output.delete(name)  # tokens of thousands of images a second would fill a disk

    try:
        torch.set_num_threads(job.torch_threads)
        if job.device == "cuda":
            torch.cuda.set_device(place % torch.cuda.device_count())
        backbone = backbone_of(job)
        embedder = Embedder(job, backbone, LocalFeed(job.vectors, job.decode_threads, backbone.batch_size))
        if _all_ready is not None:
            _all_ready.wait(START_S)
        embedder(_again_and_again(shards, seconds, place), done)
    except BaseException:
        if _all_ready is not None:
            _all_ready.abort()  # the others need not wait
        raise
    finally:
        torch.set_num_threads(before)
    return receipts


def _again_and_again(shards: Sequence[Shard], seconds: float, first: int) -> Iterator[Shard]:
    until = time.monotonic() + seconds
    for n in itertools.count(first):
        yield replace(shards[n % len(shards)], name=f"{os.getpid()}-{n}")
        if time.monotonic() > until:
            return
