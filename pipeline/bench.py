"""What one model costs on this machine, stage by stage; how fast a run of it can be, and with which setting.

    each stage alone → the cheapest ways → the ceiling → that setting tried in a run's own processes → what to expect

The ceiling is made of what each stage costs alone, and processors get slower when all of them work. The trial works
with all of them, so what it reached is what a run may expect.
"""

import io
import itertools
import math
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline import machine, measure, trial, weights
from pipeline.backbone import Backbone, resolve_device, resolve_precision
from pipeline.ceiling import Ceiling, Decoding, Forward, Room, ceiling, chosen, workers_on_gpus
from pipeline.config import DECODES, RunConfig
from pipeline.cuda_images import DeviceImages, HeaderDecoder, OnDevice, check_decoder
from pipeline.embed import Job
from pipeline.engines import Unavailable, release, resolve_engine
from pipeline.errors import NoRoom, UsageError
from pipeline.images import Decoded, Decoder
from pipeline.listing import Shard, list_shards
from pipeline.output import Root
from pipeline.process import keep_memory
from pipeline.resizing import BOUNDS
from pipeline.sets import check_device, vector_set
from pipeline.speed import Means, Sums

# Shares of the seconds asked for. To load torch in the trial's processes, and to compile, comes on top.
READ, COMPARE, DECODE, TRANSFER, FORWARD, WRITE, TRIAL = 0.04, 0.04, 0.14, 0.02, 0.4, 0.04, 0.25
OTHER_BATCHES = {"cpu": (8, 16, 64), "cuda": (64, 256)}  # beside the usual one, while there is time
WORTH_ANOTHER_BATCH = 1.03
COMPILE_S = 150.0  # with so much time compiling is tried unasked: it alone may take a minute
BUSY = 0.5  # load of a core before we begin
TRIAL_SHARD_S = 1.5  # of one worker: several shards in a trial of some seconds
TRIAL_SHARD_BYTES = 512 * 2**20


@dataclass(frozen=True, kw_only=True)
class Asked:
    """`config`: of the run that is to be fast, its output a scratch folder. None: whatever is fastest."""

    config: RunConfig
    seconds: float = 60.0
    decode: str | None = None
    engine: str | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.seconds < math.inf:
            raise UsageError(f"--seconds {self.seconds}: must be 1 or more")


class Bench:
    """Called once, gives the object of `bench --json`. Raises `UsageError` for what a run of it would refuse too."""

    def __init__(self, asked: Asked, say: Callable[[str], None]):
        keep_memory()  # as a run's workers do
        self.asked, self.config, self.say = asked, asked.config, say
        self.shards = list_shards(self.config.inputs, format=self.config.format, columns=self.config.columns)
        self.device = resolve_device(self.config.device)
        check_device(self.config, self.device)
        if self.config.decode == "cuda":
            check_decoder(torch.device(self.device))
        self.module = weights.load_module(self.config.model, self.config.weights, self.config.adapt)
        self.vectors, self.labels = vector_set(
            self.config, self.module, resolve_precision(self.config.precision, self.device)
        )
        self.staged = weights.stage(self.module, self.vectors.weights_sha256)
        gpus, cores = torch.cuda.device_count() if self.device == "cuda" else 0, machine.cores()
        workers = gpus or machine.cpu_workers(cores, machine.memory_bytes())
        self.room = Room(cores=cores, gpus=gpus, workers=self.config.actors[1] if self.config.actors else workers)
        self.load, self.notes = os.getloadavg()[0], list[str]()

    def __call__(self) -> dict[str, Any]:
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads(self.room.workers))
        try:
            return self._measured()
        finally:
            torch.set_num_threads(before)

    def _measured(self) -> dict[str, Any]:
        seconds = self.asked.seconds
        self.say(f"reading {len(self.shards)} shards")
        read = measure.read(self.shards, READ * seconds)
        images, pixels = measure.usable(self._decoder("exact"), read.images)
        plain = self._backbone("eager", "fp32", measure.COMPARED if self.room.gpus else None)
        reference = measure.embeddings(plain, pixels, COMPARE * seconds)
        decodings = list(self._decodings(images, pixels, plain, reference))
        forwards = self._forwards(pixels, reference)
        fastest = self._proven(forwards)
        transfer = measure.transfer(pixels, fastest.batch_size, plain, TRANSFER * seconds)
        arrays = plain(measure.batch_of(pixels, fastest.batch_size)).to_numpy()
        write = measure.write(self.vectors, self.labels, arrays, Root(self.config.output), WRITE * seconds)
        del plain
        release(self.module, self.device)  # the trial's processes need it
        others = {"read": read.cost, "transfer": transfer, "write": write}
        ceilings = {d.decode: ceiling(self.room, d, fastest, **others) for d in decodings}
        decoding = chosen(decodings, ceilings)
        top = ceilings[decoding.decode]
        workers = self._workers(decoding, top)
        tried = self._tried(decoding, fastest, workers, images, top, read.a_shard)
        expected = min(tried["images_per_s"], top.alone["read"])
        if self.load > BUSY * self.room.cores:
            self.notes += self._of_load(tried)
        return {
            "machine": self._machine(),
            "model": self.config.model,
            "images": _about(images, pixels) | {"a_shard": read.a_shard},
            "read": read.cost.as_dict() | {"mb_per_s": round(read.stored_bytes / read.cost.seconds / 1e6, 1)},
            "decode": [
                d.as_dict() | {"ceiling_images_per_s": round(ceilings[d.decode].images_per_s, 2)} for d in decodings
            ],
            "transfer": transfer.as_dict(),
            "forward": [f.as_dict() for f in forwards],
            "write": write.as_dict() | {"dim": self.vectors.dim},
            "notes": self.notes,
            "ceiling": top.as_dict(),
            "expected_images_per_s": round(expected, 2),
            "limited_by": "read" if expected < tried["images_per_s"] else tried["limited_by"],
            "trial": tried,
            "flags": self._flags(decoding, fastest, workers),
        }

    def _threads(self, workers: int) -> int:
        return max(1, self.room.cores // workers)

    def _backbone(self, engine: str, precision: str, batch_size: int | None) -> Backbone:
        return Backbone(
            self.module,
            engine=engine,
            precision=precision,
            device=self.device,
            classes=bool(self.vectors.top_k),
            top_k=self.vectors.top_k,
            batch_size=batch_size or self.config.batch_size,
            tensors=self.vectors.tensors,
        )

    # decode

    def _decoder(self, decode: str) -> Decoder:
        return Decoder(self.vectors.preprocessing, exif_orientation=self.vectors.exif_orientation, how=decode)

    def _decodings(
        self, images: Sequence[bytes], pixels: Sequence[Decoded], plain: Backbone, reference: torch.Tensor
    ) -> Iterator[Decoding]:
        modes = [self.asked.decode] if self.asked.decode else list(DECODES if self.room.gpus else BOUNDS)
        each = DECODE * self.asked.seconds / len(modes) / 2
        some, exact = images[: measure.COMPARED], pixels[: measure.COMPARED]
        for mode in modes:
            self.say(f"decoding: {mode}")
            there = None
            if mode == "cuda":
                decoder: Callable[[bytes], Any] = HeaderDecoder(
                    self.vectors.preprocessing, exif_orientation=self.vectors.exif_orientation
                )
                try:
                    device = DeviceImages(self.vectors.preprocessing, plain.device, self._decoder(mode))
                except (UsageError, NoRoom) as e:
                    if self.asked.decode:
                        raise
                    self.notes.append(f"cuda was left out: {e}")
                    continue
                there = measure.decode_on_device(decoder, device, images, plain.batch_size, each)
                decoded = [_on_host(d) for d in device([decoder(image) for image in some])]
            else:
                decoder = self._decoder(mode)
                decoded = [decoder(image) for image in some]
            yield Decoding(
                decode=mode,
                one=measure.decode(decoder, images, 1, each),
                all=measure.decode(decoder, images, self.room.cores, each),
                difference=measure.difference(decoded, exact, plain, reference),
                there=there,
            )

    # forward

    def _forwards(self, pixels: Sequence[Decoded], reference: torch.Tensor) -> list[Forward]:
        """Every engine and precision with the usual batch, then other sizes of the fastest while there is time."""
        ways = list(self._ways())
        until = time.monotonic() + FORWARD * self.asked.seconds
        each = FORWARD * self.asked.seconds / (len(ways) + 2)
        forwards = [f for way in ways if (f := self._forward(*way, None, pixels, reference, each))]
        if not forwards:
            raise UsageError("; ".join(self.notes))
        if self.config.batch_size is None:
            best = self._fastest(forwards)
            for size in OTHER_BATCHES[self.device]:
                if time.monotonic() + best.start_s + each > until:
                    break
                other = self._forward(best.engine, best.precision, size, pixels, reference, each / 2)
                forwards += [other] if other else []
        return forwards

    def _ways(self) -> Iterator[tuple[str, str]]:
        """Engines with precisions, as far as they are asked for and there is time to start them."""
        soon = ["eager", "openvino"] if self.device == "cpu" else ["eager"]
        if self.asked.seconds >= COMPILE_S:
            soon.append("compile")
        elif not self.asked.engine:
            self.notes.append(f"compile was left out, it starts slowly: --engine compile, or --seconds {COMPILE_S:.0f}")
        native = self.vectors.precision  # what `auto` became
        precisions = [self.asked.precision] if self.asked.precision else list(dict.fromkeys([native, "fp32"]))
        yield from itertools.product([self.asked.engine] if self.asked.engine else soon, precisions)

    def _forward(
        self,
        engine: str,
        precision: str,
        batch_size: int | None,
        pixels: Sequence[Decoded],
        reference: torch.Tensor,
        seconds: float,
    ) -> Forward | None:
        self.say(f"forward: {engine} {precision}{f', {batch_size} images a batch' if batch_size else ''}")
        started = time.perf_counter()
        try:
            backbone = self._backbone(engine, precision, batch_size)
        except Unavailable as e:
            self.notes.append(f"{engine} {precision} cannot be used: {e}")
            return None
        cosine = measure.cosine(backbone, pixels, reference)
        start_s = time.perf_counter() - started
        cost = measure.forward(backbone, pixels, seconds)
        return Forward(
            engine=engine,
            precision=precision,
            batch_size=backbone.batch_size,
            start_s=start_s,
            cost=cost,
            cosine=cosine,
        )

    def _fastest(self, forwards: Sequence[Forward]) -> Forward:
        """The first of those that are as good as the best: the usual batch, unless another is worth it."""

        def images_per_s(forward: Forward) -> float:
            return forward.cost.images_per_s if self.room.gpus else 1000 / forward.cost.cpu_ms

        best = max(map(images_per_s, forwards))
        return next(f for f in forwards if images_per_s(f) * WORTH_ANOTHER_BATCH >= best)

    def _proven(self, forwards: list[Forward]) -> Forward:
        """The fastest that a run would take too: an engine has to be as near to eager fp32 as it promises.

        The module is on the device again afterwards, for the backbone that was measured first.
        """
        while True:
            best = self._fastest(forwards)
            _, why_not = resolve_engine(
                best.engine,
                self.module,
                precision=best.precision,
                device=self.device,
                batch_size=best.batch_size,
                threads=1 if self.room.gpus else torch.get_num_threads(),
                weights_sha256=self.vectors.weights_sha256,
                tensors=self.vectors.tensors,
                classes=bool(self.vectors.top_k),
                top_k=self.vectors.top_k,
            )
            self.module.to(self.device)
            if not why_not:
                return best
            self.notes.append(why_not)
            forwards = [f for f in forwards if (f.engine, f.precision) != (best.engine, best.precision)]
            if not forwards:
                raise UsageError(why_not)

    # the setting

    def _workers(self, decoding: Decoding, top: Ceiling) -> int:
        if self.config.actors or not self.room.gpus:
            return self.room.workers
        return workers_on_gpus(self.room, decoding, top.images_per_s)

    def _tried(
        self,
        decoding: Decoding,
        forward: Forward,
        workers: int,
        images: Sequence[bytes],
        top: Ceiling,
        a_shard: int | None,
    ) -> dict[str, Any]:
        """`a_shard`: images of one, which ends in a short batch. Where there are more than the time allows: fewer."""
        seconds, threads = max(1.0, TRIAL * self.asked.seconds), self._threads(workers)
        self.say(f"trying it: --actors {workers} for {seconds:.0f} s")
        vectors = replace(self.vectors, decode=decoding.decode, engine=forward.engine, precision=forward.precision)
        job = Job(
            vectors=vectors,
            labels=self.labels,
            weights=str(self.staged),
            adapt=replace(self.config.adapt, num_classes=vectors.classes or self.config.adapt.num_classes),
            output=self.config.output,
            device=self.device,
            batch_size=forward.batch_size,
            decode_threads=threads,
            torch_threads=1 if self.room.gpus else threads,
            gpu_share=min(1.0, self.room.gpus / workers) if self.room.gpus else 1.0,
        )
        batches = max(1, round(top.images_per_s / workers * min(TRIAL_SHARD_S, seconds / 3) / forward.batch_size))
        shards = self._shards(images, min(batches * forward.batch_size, a_shard or sys.maxsize))
        receipts = trial.tried(job, shards, workers, seconds)
        sums = Sums()
        for receipt in receipts:
            sums.add(receipt)
        of_a_gpu = self.room.gpus / workers
        told = sums.speed(Means(cores=self.room.cores, threads=threads, gpus=of_a_gpu)).as_dict()
        stage_seconds = {stage: round(s, 3) for stage, s in sums.stage_seconds.items()}
        steady = round(trial.images_per_s(receipts), 2)
        return {
            "workers": workers,
            "images": sums.samples,
            **told,
            "images_per_s": steady,
            "stage_seconds": stage_seconds,
        }

    def _of_load(self, tried: dict[str, Any]) -> list[str]:
        """Nothing where the trial took no more of the clock than its own CPU seconds."""
        note = f"others are at work here (a load of {self.load:.1f}): a run would reach more without them"
        if self.room.gpus:
            return [note]
        alone = self.room.cores * tried["images"] / sum(tried["cpu_seconds"].values())
        if alone <= tried["images_per_s"]:
            return []
        return [f"{note}, {alone:,.0f} images/s by the CPU seconds that the trial took"]

    def _shards(self, images: Sequence[bytes], count: int) -> list[Shard]:
        """Tars of so many images each, of all that are at hand, and the same again where there are fewer."""
        count = max(1, min(count, TRIAL_SHARD_BYTES * len(images) // sum(map(len, images))))
        scratch, again = Path(Root(self.config.output).scratch()), itertools.cycle(images)
        paths = [scratch / f"{shard:06d}.tar" for shard in range(max(1, len(images) // count))]
        for path in paths:
            with tarfile.open(path, "w") as tar:
                for n, image in enumerate(itertools.islice(again, count)):
                    header = tarfile.TarInfo(f"{n:06d}.jpg")
                    header.size = len(image)
                    tar.addfile(header, io.BytesIO(image))
        return list_shards([str(path) for path in paths])

    def _flags(self, decoding: Decoding, forward: Forward, workers: int) -> list[str]:
        """Of `embed`: what was asked for, and what was found."""
        outputs, size = self.config.outputs, self.config.adapt.image_size
        flags = {
            "--model": self.config.model,
            "--outputs": ",".join(outputs) if outputs else None,
            "--image-size": f"{size[0]}x{size[1]}" if size else None,
            "--device": self.device,
            "--decode": decoding.decode,
            "--engine": forward.engine,
            "--precision": forward.precision,
            "--batch-size": forward.batch_size,
            "--actors": workers,
            "--gpus-per-actor": round(self.room.gpus / workers, 3) if self.room.gpus else None,
        }
        return [str(word) for flag, value in flags.items() if value is not None for word in (flag, value)]

    # what is told

    def _machine(self) -> dict[str, Any]:
        names = [torch.cuda.get_device_name(i) for i in range(self.room.gpus)]
        return {"cores": self.room.cores, "gpus": names, "device": self.device, "workers": self.room.workers}


def _on_host(image: Any) -> Decoded:
    if isinstance(image, OnDevice):
        return Decoded(image.pixels.cpu().numpy(), image.width, image.height)
    assert isinstance(image, Decoded)  # `exact` decoded it
    return image


def _about(images: Sequence[bytes], pixels: Sequence[Decoded]) -> dict[str, Any]:
    return {
        "count": len(images),
        "mean_bytes": round(sum(map(len, images)) / len(images)),
        "mean_pixels": round(sum(d.width * d.height for d in pixels) / len(pixels)),
    }
