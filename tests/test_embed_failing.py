"""An embedding process that runs out of memory or disk, or finds a defect of its own."""

import subprocess
import sys
from pathlib import Path

import made
import numpy as np
import pytest
import torch
from containers import write_tar
from pictures import jpeg
from test_embed import rows

from pipeline import embed as embed_module
from pipeline.listing import list_shards


def test_out_of_memory_mid_shard_keeps_every_row_and_small_batches(tmp_path: Path, shards: Path) -> None:
    """When the device's memory gives out, the rows are the same, and later batches are as small as was found."""
    plain = rows(made.embed(made.job(tmp_path / "a"), shards), tmp_path / "a")
    embedder = made.embedder(made.job(tmp_path / "b", batch_size=8))
    sizes = []
    original = embedder.backbone._module.forward_features

    def forward(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError("simulated")
        sizes.append(len(x))
        return original(x)

    embedder.backbone._module.forward_features = forward
    found = rows(made.receipts(embedder, list_shards([str(shards)])), tmp_path / "b")
    assert found.keys() == plain.keys()
    for name, row in plain.items():
        assert np.allclose(row["embedding"], found[name]["embedding"], rtol=1e-5, atol=1e-6)
    assert embedder.backbone.batch_size == 2 and max(sizes) == 2


def test_a_lost_sample_is_our_defect_and_never_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the reader gave is counted apart from what was written: if they differ, the shard is not published."""
    write_tar(tmp_path / "in" / "x.tar", {f"{i}.jpg": jpeg(seed=i) for i in range(5)})
    original = embed_module.ShardWriter.rows
    monkeypatch.setattr(
        embed_module.ShardWriter, "rows", lambda self, *batch: original(self, *batch) if len(batch[0]) == 4 else None
    )
    with pytest.raises(RuntimeError, match="5 samples read, 4 written"):
        made.embed(made.job(tmp_path / "out", batch_size=4), tmp_path / "in")
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_a_full_disk_fails_the_shard_and_leaves_nothing(tmp_path: Path) -> None:
    """When no more can be written (here: a limit on file sizes), the shard fails and its partial files go."""
    write_tar(tmp_path / "in" / "x.tar", {f"{i}.jpg": jpeg(40, 40, seed=i % 7) for i in range(400)})
    code = (
        "import sys, resource; sys.path[:0] = sys.argv[3:]; import made; from pathlib import Path;"
        "job = made.job(sys.argv[2]); e = made.embedder(job);"
        "from pipeline.listing import list_shards; listed = list_shards([sys.argv[1]]);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000));"
        "(r,) = made.receipts(e, listed); print(r.error); assert r.files is None"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", code, tmp_path / "in", tmp_path / "out", here, here.parent]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "write: " in done.stdout and "File too large" in done.stdout
    left = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert not [p for p in left if "rejects" not in p.parts]  # a few bytes of rejects had gone out before
