"""Each stage measured with the pipeline's own code, and what a setting reaches: right in kind, whatever the machine."""

import itertools
import os
import time
from dataclasses import replace
from pathlib import Path

import made
import numpy as np
import oracle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from containers import write_tar
from pictures import jpeg

from pipeline import measure, trial
from pipeline.backbone import Backbone
from pipeline.columns import Columns
from pipeline.cuda_images import DeviceImages, HeaderDecoder, Jpeg
from pipeline.errors import UsageError
from pipeline.images import Decoded, Decoder
from pipeline.listing import Shard, list_shards
from pipeline.machine import CPU_WORKER_BYTES, cores, cpu_workers, memory_bytes
from pipeline.output import Root
from pipeline.weights import sha256, stage


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> list[Shard]:
    """Two tars of 12 images each, one of them broken."""
    folder = tmp_path_factory.mktemp("measured")
    for name in "ab":
        images = {f"{i}.jpg": jpeg(90 + i, 60 + 20 * (name == "b"), seed=i) for i in range(12)}
        write_tar(folder / f"{name}.tar", images | {"11.jpg": b"broken" * 9})
    return list_shards([str(folder)])


def decoder() -> Decoder:
    return Decoder(made.vector_set().preprocessing)


def test_reading_goes_over_the_shards_again_and_keeps_each_image_once(listed: list[Shard]) -> None:
    """As long as it is told; the bytes and images a second are the reader's."""
    found = measure.read(listed, 0.2)
    assert len(found.images) == 24 and found.cost.images > 24
    assert found.a_shard == 12 and 0.2 <= found.cost.seconds < 2
    assert found.stored_bytes > sum(map(len, found.images))


def test_what_is_kept_is_a_sample_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of the first shards may be cheaper than others: each has the same chance, and the bytes stay bounded."""
    monkeypatch.setattr(measure, "KEPT_IMAGES", 200)
    monkeypatch.setattr(measure, "KEPT_BYTES", 400)
    kept = measure._Kept()
    for n in range(10_000):
        kept.offer(n.to_bytes(2, "big"))
    assert len(set(kept.images)) == 200
    assert np.mean([int.from_bytes(image, "big") for image in kept.images]) == pytest.approx(5000, rel=0.1)
    for n in range(10_000):
        kept.offer(bytes(n % 9))
    assert sum(map(len, kept.images)) <= 400


def test_images_behind_urls_are_read_too(tmp_path: Path) -> None:
    """As many at a time as a run fetches; what is not there is no image."""
    (tmp_path / "in").mkdir()
    (tmp_path / "a.jpg").write_bytes(jpeg(40, 40))
    urls = [str(tmp_path / "a.jpg"), str(tmp_path / "gone.jpg")]
    pq.write_table(pa.table({"url": urls * 8}), tmp_path / "in" / "x.parquet")
    found = measure.read(list_shards([str(tmp_path / "in")], columns=Columns(allow_urls=(str(tmp_path),))), 0.05)
    assert found.images == [jpeg(40, 40)] * 8


def test_what_holds_no_image_is_refused(tmp_path: Path, listed: list[Shard]) -> None:
    """With one sentence, before anything is measured."""
    write_tar(tmp_path / "none" / "x.tar", {"a.txt": b"no image"})
    with pytest.raises(UsageError, match="holds no image"):
        measure.read(list_shards([str(tmp_path / "none")]), 0.05)
    with pytest.raises(UsageError, match="none of 2 images of the input can be decoded \\(corrupt"):
        measure.usable(decoder(), [b"<html>", b"<html>"])
    images, pixels = measure.usable(decoder(), measure.read(listed, 0.05).images)
    assert len(images) == len(pixels) == 22


def test_threads_decode_at_once(listed: list[Shard]) -> None:
    """Their seconds on the clock are shared, their CPU seconds summed; each goes on for as long as it is told."""
    images = [image for image in measure.read(listed, 0.05).images if image[:1] == b"\xff"]

    def slow(data: bytes) -> Decoded:
        time.sleep(0.02)
        return decoder_(data)

    decoder_ = decoder()
    cost = measure.decode(slow, images, 4, 0.3)  # type: ignore[arg-type]
    assert 0.3 <= cost.seconds < 1 and cost.images > 1.5 * cost.seconds / 0.02
    assert 0 < cost.cpu_s < cost.seconds


def test_a_difference_is_the_pixels_and_the_embeddings(listed: list[Shard]) -> None:
    """None from itself; of a decoder that is off by two levels exactly those."""
    _, exact = measure.usable(decoder(), measure.read(listed, 0.05).images)
    plain = Backbone(oracle.module(made.MODEL))

    def shifted(decoded: Decoded) -> Decoded:
        pixels = decoded.pixels.copy()
        pixels[0] = np.where(pixels[0] < 250, pixels[0] + 2, pixels[0] - 2)
        return decoded._replace(pixels=pixels)

    reference = measure.embeddings(plain, exact, 9)
    assert len(reference) == len(exact) == 22 and len(measure.embeddings(plain, exact, 0)) == 2
    assert measure.difference(exact, exact, plain, reference) == (0, 0.0, pytest.approx(1, abs=1e-9))
    off = measure.difference([shifted(d) for d in exact], exact, plain, reference)
    assert (off.largest, off.mean) == (2, pytest.approx(2 / 3)) and 0.9 < off.cosine < 1


def test_a_batch_is_decoded_on_the_device_alone() -> None:
    """What the decoding threads do before is not timed with it; a device of the test's own, which takes 10 ms."""
    images = [jpeg(120, 90, seed=i) for i in range(3)]
    header = HeaderDecoder(made.vector_set().preprocessing)
    sizes: list[int] = []

    def blank(jpegs: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        sizes.append(len(jpegs))
        time.sleep(0.01)
        frames = [header(bytes(jpeg.numpy())) for jpeg in jpegs]
        return [torch.zeros(3, *frame.stored, dtype=torch.uint8) for frame in frames if isinstance(frame, Jpeg)]

    there = DeviceImages(made.vector_set().preprocessing, torch.device("cpu"), decoder(), decode=blank)
    cost = measure.decode_on_device(header, there, images, 30, 0.05)
    assert cost.images == 30 and 0.01 <= cost.seconds < 0.5 and set(sizes[1:]) == {30}


def test_the_fastest_of_several_passes_counts(listed: list[Shard]) -> None:
    """A pass that something else slowed down says nothing of the model."""
    backbone = Backbone(oracle.module(made.MODEL), batch_size=4)
    passes, plain = itertools.count(), backbone._forward

    def now_and_then_slow(images: torch.Tensor) -> object:
        time.sleep(0.3 if next(passes) % 2 else 0.01)
        return plain(images)

    backbone._forward = now_and_then_slow  # type: ignore[method-assign, assignment]
    _, pixels = measure.usable(decoder(), measure.read(listed, 0.05).images)
    cost = measure.forward(backbone, pixels, 0.4)
    assert cost.images == 4 and 0.01 < cost.seconds < 0.3 and 0 < cost.cpu_s < 0.3


def test_writing_leaves_files_that_a_reader_opens(tmp_path: Path, listed: list[Shard]) -> None:
    """Rows of the model's own width, published as a run's are."""
    _, pixels = measure.usable(decoder(), measure.read(listed, 0.05).images)
    arrays = Backbone(oracle.module(made.MODEL))(measure.batch_of(pixels, 32)).to_numpy()
    cost = measure.write(made.vector_set(), (), arrays, Root(str(tmp_path)), 0.01)
    files = list((tmp_path / made.vector_set().folder / "embeddings").iterdir())
    assert sum(pq.read_metadata(f).num_rows for f in files) == cost.images >= measure.SHARD_ROWS
    assert 0 < cost.cpu_s <= cost.seconds


def test_a_trial_embeds_shards_again_and_again(tmp_path: Path, listed: list[Shard]) -> None:
    """Several shards in its time, all in files that are deleted at once, at the rate from the first end to the last."""
    module = oracle.module(made.MODEL)
    staged = stage(module, sha256(module.state_dict()))
    job = replace(made.job(tmp_path / "out"), weights=str(staged))
    receipts = trial.tried(job, listed, 1, 0.5)
    assert len(receipts) > 2 and all(r.embedded and not r.error for r in receipts)
    assert len({r.shard for r in receipts}) == len(receipts)
    assert len({r.bytes_read for r in receipts}) == len(listed), "one after the other"
    ends = sorted(r.ended for r in receipts)
    assert trial.images_per_s(receipts) == pytest.approx(12 * (len(ends) - 1) / (ends[-1] - ends[0]))
    assert not [f for f in (tmp_path / "out").rglob("*") if f.is_file()]


def test_the_rate_of_a_trial_is_all_workers_together() -> None:
    """Each from the end of its first shard; one that embedded a single shard, from its start."""
    two = [made.receipt("a", 0, 5, 100), made.receipt("a", 4, 7, 100), made.receipt("b", 0, 4, 100)]
    assert trial.images_per_s(two) == pytest.approx(100 / 2 + 100 / 4)


def test_workers_fit_into_the_memory() -> None:
    """One a core, fewer where each would have less than it needs, and one at least."""
    assert [cpu_workers(8, gb * CPU_WORKER_BYTES) for gb in (0.5, 4, 100)] == [1, 3, 8]
    assert 1 <= cores() <= (os.cpu_count() or 1) and memory_bytes() > 2**20
