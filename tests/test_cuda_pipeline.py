"""`--decode cuda` in a run, with libjpeg-turbo as the device's decoder: the rows, the rejects, and what is said."""

from dataclasses import replace
from pathlib import Path

import made
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from containers import write_tar
from pictures import jpeg, png
from test_cuda_images import CPU, MODEL, jpegs
from test_device import LazyCuda

from pipeline import cuda_images, embed
from pipeline.backbone import Backbone
from pipeline.config import RunConfig
from pipeline.cuda_images import DeviceImages, OnDevice, decode_jpegs
from pipeline.device import Staging
from pipeline.errors import Reject, UsageError
from pipeline.images import Decoded, Decoder
from pipeline.listing import list_shards
from pipeline.resizing import why_not_fast
from pipeline.sets import decoding_note


class CpuAsCuda(LazyCuda):
    """Streams that work at once, as the backbone here does."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)


def test_the_pipeline_gives_the_files_of_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU as the device: its rows have the bits of `exact`, the others' those of `fast`, all in order.

    What the device gives up and the CPU then refuses is a reject, in its place among those that were found sooner.
    """
    given = jpegs()
    given["unreadable"] = jpeg(150, 100, seed=99)
    others = {"png": png(120, 90), "cut": given["photo_0"][:900], "text": b"no image\n"}
    given |= others
    order = [*given][::3] + [*given][1::3] + [*given][2::3]
    write_tar(tmp_path / "in" / "x.tar", {f"{name}.jpg": given[name] for name in order})

    def fails(data: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        if any(bytes(d.numpy()) == given["unreadable"] for d in data):
            raise RuntimeError("Failed to decode batch: 2")
        return decode_jpegs(data, device)

    def cpu(data: bytes) -> Decoded:
        assert data == given["unreadable"]
        raise Reject("corrupt", "decode", "JPEG: nothing in it")

    def staging(backbone: Backbone, _: None) -> Staging:
        return Staging(backbone, DeviceImages(backbone.preprocessing, CPU, cpu, fails), cuda=CpuAsCuda())

    rows, rejects = {}, []
    for how in ("exact", "fast", "cuda"):
        job = made.job(tmp_path / how, decode=how)
        if how == "cuda":
            monkeypatch.setattr(embed, "_device_images", lambda *_: None)
            monkeypatch.setattr(embed, "Staging", staging)
        (receipt,) = made.receipts(made.embedder(job, pad=True), list_shards([str(tmp_path / "in")]))
        assert receipt.error is None and receipt.files.counts.samples == len(given)
        read = {
            k: pq.read_table(tmp_path / how / receipt.files.names[k]).to_pylist() for k in ("embeddings", "rejects")
        }
        rows[how] = {row["key"]: row for row in read["embeddings"]}
        rejects = [row["key"] for row in read["rejects"]]
    assert [*rows["cuda"]] == [name for name in order if name not in ("cut", "text", "unreadable")]
    for name, row in rows["cuda"].items():
        assert row == rows["fast" if name in others else "exact"][name], name
    assert rejects == [name for name in order if name in ("cut", "text", "unreadable")]


def test_large_images_are_decoded_before_their_batch_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many encoded bytes at most wait for a batch; what leaves as a reject makes room, and the rows are the same."""
    given = {f"{i:02d}": jpeg(300, 200, seed=i) for i in range(12)} | {"05": jpeg(300, 200, seed=99)}
    write_tar(tmp_path / "in" / "x.tar", {f"{name}.jpg": data for name, data in given.items()})
    asked: list[int] = []

    def fails(data: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        asked.append(sum(map(len, data)))
        if any(bytes(d.numpy()) == given["05"] for d in data):
            raise RuntimeError("Failed to decode batch: 2")
        return decode_jpegs(data, device)

    def cpu(data: bytes) -> Decoded:
        raise Reject("corrupt", "decode", "JPEG: nothing in it")

    def staging(backbone: Backbone, _: None) -> Staging:
        return Staging(backbone, DeviceImages(backbone.preprocessing, CPU, cpu, fails), cuda=CpuAsCuda())

    monkeypatch.setattr(embed, "ENCODED_BYTES", 2 * max(map(len, given.values())))
    monkeypatch.setattr(embed, "_device_images", lambda *_: None)
    monkeypatch.setattr(embed, "Staging", staging)
    want = [Decoder(made.vector_set().preprocessing)(data).pixels for data in given.values()]
    job, sizes, seen = made.job(tmp_path / "out", decode="cuda", batch_size=8), [], []
    embedder = made.embedder(job)
    passing = embedder._staging.__class__.__call__

    def passed(self: Staging, images: list[OnDevice], *rest: object) -> object:
        sizes.append(len(images))
        seen.extend(image.pixels.numpy() for image in images)
        return passing(self, images, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Staging, "__call__", passed)
    (receipt,) = made.receipts(embedder, list_shards([str(tmp_path / "in")]))
    assert receipt.error is None and receipt.files.counts.rejects == {"corrupt": 1}
    assert sizes == [8, 3] and max(asked) <= embed.ENCODED_BYTES + max(map(len, given.values()))
    del want[5]
    assert all(np.array_equal(a, b) for a, b in zip(seen, want, strict=True))


def test_decoding_on_a_device_needs_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--decode cuda on the CPU, or where torchvision has no decoder, ends before any work."""
    write_tar(tmp_path / "in" / "x.tar", {"a.jpg": jpeg()})
    pytest.importorskip("ray")
    from pipeline import run, site, weights

    config = RunConfig(
        inputs=(str(tmp_path / "in"),), output=str(tmp_path / "out"), model=made.MODEL, weights="random:0",
        decode="cuda", device="cpu",
    )  # fmt: skip
    with pytest.raises(UsageError, match="--decode cuda: the device is the CPU"):
        run.plan(config, lambda line: None)

    def lacks(device: torch.device) -> None:
        raise UsageError(f"--decode cuda: no decoder on {device}")

    monkeypatch.setattr(site, "resolve_device", lambda config: "cuda")
    monkeypatch.setattr(cuda_images, "check_decoder", lacks)
    monkeypatch.setattr(weights, "load_module", lambda *_: pytest.fail("that is work"))
    with pytest.raises(UsageError, match="--decode cuda: no decoder on cuda"):
        run.plan(config, lambda line: None)


def test_a_slower_way_than_the_flag_names_is_said() -> None:
    """Models, and processors, for which images are not decoded or resized as `--decode` has it; else nothing."""
    vectors = made.vector_set(decode="cuda")
    grey = replace(vectors.preprocessing, input_size=(1, 160, 160), mean=(0.5,), std=(0.5,))
    lanczos, rgba = replace(MODEL, interpolation="lanczos"), replace(MODEL, input_size=(4, 160, 160))
    there = "the processor decodes and not the device"
    for preprocessing, how, wanted in (
        (MODEL, "cuda", ()),
        (grey, "cuda", ("--decode cuda: the model takes L images", there)),
        (lanczos, "cuda", (f"resized by lanczos, which {there}", "resized by lanczos: they are resized as by exact")),
        (grey, "fast", ()),
        (rgba, "scaled", ("--decode scaled: the model takes RGBA images: they are resized as by exact",)),
        (lanczos, "exact", ()),
    ):
        said = decoding_note(replace(vectors, preprocessing=preprocessing, decode=how), is_here=False)
        assert all(part in said for part in wanted) and bool(said) == bool(wanted), said
    assert "(NEON)" in why_not_fast(MODEL, "NEON") and not why_not_fast(MODEL, "AVX2")


def test_a_processor_without_the_quick_resize_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where images are decoded on this machine; of a cluster's nodes this one tells nothing."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    fast = made.vector_set(decode="fast")
    assert decoding_note(fast, is_here=True).endswith("(DEFAULT): they are resized as by exact, which takes longer")
    assert decoding_note(fast, is_here=False) == ""
