"""The benchmark against other tools: what it calls a wrong result, what it does with a failed run, its table."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pictures import jpeg
from PIL import Image

from benchmarks.peers.embedder import Embedder, transform_of
from benchmarks.peers.job import STARTED, Job, marked
from benchmarks.peers.measure import born, measure
from benchmarks.peers.plain import table
from benchmarks.peers.table import Row, Run, line
from benchmarks.peers.vectors import Oracle

IDS = [f"shard/{i}" for i in range(6)]
Columns = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("peers")
    (folder / "files/shard").mkdir(parents=True)
    (folder / "out").mkdir()
    for seed, sample_id in enumerate(IDS):
        (folder / f"files/{sample_id}.jpg").write_bytes(jpeg(seed=seed))
    return Job(tars=folder, files=folder / "files", output=folder / "out", model="test_vit", precision="fp32")


@pytest.fixture(scope="module")
def oracle(job: Job) -> Oracle:
    return Oracle(job)


@pytest.fixture(scope="module")
def by_timm(job: Job) -> Iterator[tuple[Columns, Columns]]:
    """What timm gives for the images, and for the images turned left to right."""
    threads, transform = torch.get_num_threads(), transform_of(job.model)
    images = torch.stack([transform(Image.open(job.files / f"{i}.jpg").convert("RGB")) for i in IDS])
    embedder = Embedder(job, threads=1)
    yield embedder(images), embedder(images.flip(3))
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("nothing", "None"),
        ("mirrored", "wrong vectors"),
        ("not finite", "wrong vectors"),
        ("an id twice", "6 rows with 5 of 6 ids"),
        ("classes out of order", "wrong scores"),
        ("without the best class", "wrong scores"),
    ],
)
def test_a_wrong_result_is_told(
    job: Job, oracle: Oracle, by_timm: tuple[Columns, Columns], change: str, said: str
) -> None:
    """timm's own vectors pass; anything else is refused with what is wrong."""
    columns, ids = {name: values.copy() for name, values in by_timm[change == "mirrored"].items()}, list(IDS)
    if change == "not finite":
        columns["embedding"][2, 0] = np.nan
    if change == "an id twice":
        ids[1] = ids[0]
    if change == "classes out of order":
        columns["topk_index"] = columns["topk_index"][:, ::-1].copy()
    if change == "without the best class":
        columns |= {name: columns[name][:, 1:].copy() for name in ("topk_index", "topk_score")}
    pq.write_table(table(ids, [columns]), job.output / "vectors.parquet")
    assert str(oracle.objection([job.output / "vectors.parquet"])).startswith(said)


def test_a_run_without_vectors_is_told(job: Job, oracle: Oracle, by_timm: tuple[Columns, Columns]) -> None:
    """A peer that wrote nothing is no peer that was fast; the model left its time marks all the same."""
    assert oracle.objection([]) == "wrote no vectors"
    assert marked(job, "ready") <= marked(job, "first")


def test_a_failed_run_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    """A peer's last words are its reason, and a process that it left behind is ended."""
    (tmp_path / "peer.py").write_text(
        "import os, pathlib, subprocess, sys, time\n"
        "left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path('left').write_text(str(left.pid))\n"
        "time.sleep(1.5)\n"
        f"sys.exit('no more after ' + os.environ['{STARTED}'])\n"
    )
    before = time.time()
    done = measure([sys.executable, "peer.py"], 60, tmp_path)
    assert done.told is None
    assert before <= float(done.failure.removeprefix("no more after ")) <= time.time()
    assert done.peak_mb > 0
    assert not born(int((tmp_path / "left").read_text()))
    assert born(os.getpid())


def test_a_run_without_an_end_is_ended(tmp_path: Path) -> None:
    """A peer that hangs costs its time limit."""
    done = measure([sys.executable, "-c", "import time; time.sleep(60)"], 1, tmp_path)
    assert done.failure == "not done after 1 s"


def test_the_table_reads_as_medians_and_failures() -> None:
    """Ratios go round by round, and one failed round shows as a failure with its reason."""
    two = [Run(images_per_s=100.0), Run(images_per_s=200.0), Run(images_per_s=50.0)]
    ours = [Run(images_per_s=v, all_in_images_per_s=5.0, first_row_s=1.0, peak_mb=7.0) for v in (90.0, 190.0, 50.0)]
    assert line(Row("ours", ours, two)) == "| ours | 90.0 (50.0–190.0) | 0.95 (0.90–1.00) | 5.0 | 1.0 | 7 |"
    assert line(Row("ours", [*ours, Run(failure="a | b")], two)) == "| ours | failed in 1 of 4: a / b | | | | |"
    assert "| – |" in line(Row("ours", ours, []))
