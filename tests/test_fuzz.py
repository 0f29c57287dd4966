"""Damage anywhere in real files: each sample is a row or a reject, and nothing else is ever raised."""

import gzip
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import damage
import numpy as np
import pictures
import pytest
from containers import growth, samples_of, shard_of
from damage import Edit, edits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import images
from pipeline.errors import REASONS, Reject
from pipeline.shards import read_samples
from tests import chaos_rubbish

FUZZ = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Whatever a test of this file reads, the process grows by no more than this, page for page."""
    pictures.decoder()(pictures.jpeg())  # what is loaded on first use is no growth
    with growth() as taken:
        yield
    assert taken.peak_bytes < 150e6


def check_shard(path: Path, form: str, content: bytes) -> None:
    """Rows count up, ids are unique, `read_keys` agrees (all in `samples_of`); a second reading gives the same."""
    path.write_bytes(content)
    samples = samples_of(path, form)
    again = list(read_samples(shard_of(path, form)))
    assert [(s.id_key, s.image, s.label, s.url) for s in again] == [
        (s.id_key, s.image, s.label, s.url) for s in samples
    ]
    for sample, other in zip(samples, again, strict=True):
        assert (sample.reject and sample.reject.args) == (other.reject and other.reject.args)
        assert sample.reject is None or (sample.reject.reason in REASONS and sample.reject.stage == "read")
        f"{sample.id_key} {sample.reject and sample.reject.message}".encode()  # the output's columns hold UTF-8


@settings(FUZZ, max_examples=400)
@given(name=st.sampled_from(sorted(damage.tars())), edits=edits, repair=st.booleans())
def test_a_damaged_tar_gives_rows_and_rejects(tmp_path: Path, name: str, edits: list[Edit], repair: bool) -> None:
    """Of any dialect, packed or not; with headers whose checksum is right again, so that their fields are believed."""
    content = damage.damaged(damage.tars()[name], edits)
    check_shard(tmp_path / "x", "webdataset", damage.with_tar_checksums(content) if repair else content)


@settings(FUZZ, max_examples=100)
@given(edits=edits)
def test_a_damaged_tar_that_was_packed_then_gives_the_same(tmp_path: Path, edits: list[Edit]) -> None:
    """The damage lies in the tar, the gzip stream is sound: the same samples as from the plain one."""
    content = damage.with_tar_checksums(damage.damaged(damage.tars()["long_names.tar"], edits))
    (tmp_path / "plain").write_bytes(content)
    plain = samples_of(tmp_path / "plain")
    check_shard(tmp_path / "packed", "webdataset", gzip.compress(content))
    packed = samples_of(tmp_path / "packed")
    if content[:2] != b"\x1f\x8b":
        assert [(s.id_key, s.image) for s in packed] == [(s.id_key, s.image) for s in plain]


@settings(FUZZ, max_examples=400)
@given(name=st.sampled_from(sorted(damage.tables())), edits=edits)
def test_a_damaged_parquet_file_gives_rows_and_rejects(tmp_path: Path, name: str, edits: list[Edit]) -> None:
    """Pages, footer, Arrow's own schema in it; with page checksums and without."""
    check_shard(tmp_path / "x", "parquet", damage.damaged(damage.tables()[name], edits))


@settings(FUZZ, max_examples=500)
@given(
    channels=st.sampled_from(list(images.MODES)),
    how=st.sampled_from(pictures.HOWS),
    name=st.sampled_from(damage.IMAGES),
    edits=edits,
    repair=st.booleans(),
)
def test_a_damaged_image_gives_pixels_or_a_reject(
    channels: int, how: str, name: str, edits: list[Edit], repair: bool
) -> None:
    """The model's size and channels, or a reason from the list: what Pillow alone gives, or two levels off."""
    content = damage.damaged(pictures.sound()[name], edits)
    content = damage.with_png_checksums(content) if repair else content
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "read_frame", lambda data: None)
        want, pixels = outcome(channels, "exact", content)
    got, near = outcome(channels, how, content)
    assert got == want
    assert np.abs(pixels - near).max(initial=0) <= (0 if how == "exact" else 2)


def outcome(channels: int, how: str, content: bytes) -> tuple[object, np.ndarray]:
    """The size or the reject, and the pixels."""
    try:
        got = pictures.decoder(channels=channels, how=how)(content)
    except Reject as why:
        assert why.reason in REASONS and why.stage == "decode"
        assert 0 < len(why.message) <= 200 and why.message.isprintable()
        return why.args, np.zeros(0)
    assert got.pixels.shape == (channels, 224, 224) and got.pixels.dtype == np.uint8
    return got[1:], got.pixels.astype(np.int16)


# The long version


SLEEP = "import time; time.sleep(60)"


@pytest.mark.parametrize(
    ("script", "how"),
    [
        ("pass", None),
        ("import os; os.abort()", "crashes"),
        ("1 / 0", "crashes"),
        (SLEEP, "timeouts"),
        (f"x = b'x' * 10**8; {SLEEP}", "too_much_memory"),
    ],
)
def test_the_long_run_sees_how_a_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, how: str | None
) -> None:
    """An interpreter that aborts, a broken promise, an endless input, memory: each is told from a sound end."""
    monkeypatch.setattr(chaos_rubbish, "INPUT_S", 1.5)
    (tmp_path / "tally").write_bytes(chaos_rubbish.TALLY.pack(1, 0, 0, 20 * 2**20, 0))
    child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    assert chaos_rubbish._watch(child, tmp_path / "tally", 10, 80 * 2**20) == how
