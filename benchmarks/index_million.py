"""A million vectors: our index beside exact search and beside Lance, at equal recall.

    python benchmarks/index_million.py --folder /tmp/million --rows 1000000

Writes a version of synthetic vectors with our own writer: clusters on a curved surface of 32 dimensions in 384, every
hundredth one a near copy of another. Builds the index by the command line, and Lance's IVF_PQ over the same vectors,
each in a process of its own whose memory is watched; then asks each the same queries, which are not among the vectors,
in turns. `anonymous` memory is what a process holds itself, without pages of files that are mapped.

Run again over the same folder it goes on with what is there. What a build took is told of whole builds alone: it is
kept beside them, in `ours.json` and `lance.json`, and read from there where the index was there already.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline import versions
from pipeline.backbone import Arrays
from pipeline.config import VectorSet
from pipeline.exact import Nearest
from pipeline.images import Preprocessing
from pipeline.listing import Shard
from pipeline.output import Root
from pipeline.rows import ShardWriter
from pipeline.search import Searcher
from pipeline.shards import Sample
from pipeline.vectors import ROW_BITS, Vectors, to_unit

DIM, LATENT, CENTRES, SHARD_ROWS, QUERIES = 384, 32, 4000, 10_000, 500
LANCE_PROBES, LANCE_REFINE, LANCE_LISTS = (32, 48, 64), (2, 5), 1024
RECALL_QUERIES = 100  # of those, that Lance's recall and ours are compared with


def rows_of(shard: int, count: int = SHARD_ROWS) -> np.ndarray:
    """float32 (count, DIM); the same for the same shard."""
    shared, rng = np.random.default_rng(0), np.random.default_rng([1, shard])
    first = shared.standard_normal((LATENT, DIM)).astype(np.float32) / np.sqrt(LATENT)
    second = shared.standard_normal((DIM, DIM)).astype(np.float32) / np.sqrt(DIM)
    centres = shared.standard_normal((CENTRES, LATENT)).astype(np.float32)
    spread = shared.uniform(0.3, 0.9, CENTRES).astype(np.float32)
    share = 1 / np.arange(1, CENTRES + 1) ** 0.5
    cluster = rng.choice(CENTRES, size=count, p=share / share.sum())
    latent = centres[cluster] + spread[cluster, None] * rng.standard_normal((count, LATENT)).astype(np.float32)
    latent[100::100] = latent[99:-1:100][: len(latent[100::100])]
    rows = np.tanh(1.5 * latent @ first) @ second
    return rows + 0.03 * rng.standard_normal((count, DIM)).astype(np.float32)


def vector_set() -> VectorSet:
    preprocessing = Preprocessing(
        input_size=(3, 224, 224),
        crop_pct=0.9,
        crop_mode="center",
        interpolation="bicubic",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    return VectorSet(
        model="synthetic", architecture="synthetic", weights_sha256="0" * 64, preprocessing=preprocessing,
        exif_orientation=True, precision="fp32", engine="eager", decode="exact", outputs=("embedding",), tensors=(),
        pooling="avg", dim=DIM, classes=0, top_k=0, labels_sha256="", labels_source="none", normalized=False,
        vector_type="float32",
    )  # fmt: skip


def write(root: Root, rows: int) -> versions.Version:
    vectors, files = vector_set(), []
    versions.create_set(root, vectors.folder, vectors.as_dict() | {"set": vectors.name})
    for number in range(rows // SHARD_ROWS):
        shard = Shard(name=f"shard-{number:05d}", format="webdataset", url="", size=0, etag=f"{number:016x}")
        if (there := versions.published(root, vectors.folder, shard)) is not None:
            files.append(there)
            continue
        with ShardWriter(vectors, shard, (), root.scratch()) as writer:
            block = rows_of(number)
            samples = [Sample(row, str(row)) for row in range(len(block))]
            for at in range(0, len(block), 2000):
                some = block[at : at + 2000]
                arrays = Arrays(some, np.linalg.norm(some, axis=1), None, None)
                writer.rows(samples[at : at + 2000], [(640, 480)] * len(some), arrays)
            files.append(versions.publish(root, vectors.folder, shard, writer)[0])
    version = versions.commit(root, vectors.name, files)
    assert version is not None
    return version


class watched:
    """A child process: its wall seconds, its largest resident and anonymous memory in MB, and what it printed."""

    def __init__(self, command: list[str]):
        started = time.monotonic()
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.resident_mb = self.anonymous_mb = 0.0
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        self.printed, _ = self._child.communicate()
        self.seconds = time.monotonic() - started
        thread.join()
        if self._child.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {self._child.returncode}")

    def _watch(self) -> None:
        status = Path(f"/proc/{self._child.pid}/status")
        while self._child.poll() is None:
            try:
                told = dict(line.split(":", 1) for line in status.read_text().splitlines())
                self.resident_mb = max(self.resident_mb, int(told["VmHWM"].split()[0]) / 1024)
                self.anonymous_mb = max(self.anonymous_mb, int(told["RssAnon"].split()[0]) / 1024)
            except (OSError, KeyError):
                pass
            time.sleep(0.02)


def build_lance(out: str, path: str) -> None:
    """What the child does: our Parquet, normalised, as a Lance dataset, and its index. Prints the index's seconds."""
    import lance
    import pyarrow as pa

    root = Root(out)
    vectors = Vectors(root, versions.current(root))
    schema = pa.schema([("number", pa.int64()), ("vector", pa.list_(pa.float32(), DIM))])

    def batches() -> Iterator[Any]:
        for block in vectors.all_blocks():
            column = pa.FixedSizeListArray.from_arrays(pa.array(block.unit.reshape(-1)), DIM)
            yield pa.record_batch([pa.array(block.numbers), column], schema=schema)

    dataset = lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), path, mode="overwrite")
    started = time.monotonic()
    dataset.create_index("vector", "IVF_PQ", metric="cosine", num_partitions=LANCE_LISTS, num_sub_vectors=DIM // 4)
    print(time.monotonic() - started)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def recall(found: list[np.ndarray], true: np.ndarray) -> float:
    return float(np.mean([len(set(a[:10].tolist()) & set(b.tolist())) / 10 for a, b in zip(found, true, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--build-lance", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    out, lance_path = given.folder / "out", given.folder / "lance"
    if given.build_lance:
        build_lance(str(out), str(lance_path))
        return
    if given.rows < SHARD_ROWS or given.rows % SHARD_ROWS:
        parser.error(f"--rows {given.rows}: a shard has {SHARD_ROWS:,}, so give a multiple of that")
    given.folder.mkdir(parents=True, exist_ok=True)
    root = Root(str(out))
    started = time.monotonic()
    version = write(root, given.rows)
    written_mb = folder_bytes(out / "sets") / 1e6
    say(f"written, or there: {version.rows:,} x {DIM}, {time.monotonic() - started:.0f} s, {written_mb:,.0f} MB")
    build_ours(out, version, given.folder / "ours.json")
    lance_build(given.folder, lance_path, version, given.folder / "lance.json")
    compare(root, version, lance_path, given.rounds)


def build_ours(out: Path, version: versions.Version, record: Path) -> None:
    """Says what the build took where all of it was this run's, or was recorded when it was."""
    ours = watched([sys.executable, "-m", "jobs", "index", str(out), "--kind", "ivf", "--json"])
    built = json.loads(ours.printed.splitlines()[-1])
    of_build = {"data": built["data"], "created": built["created"]}
    if built["is_new"] and built["trained"] and built["parts_made"] == version.shards:
        keep(record, ours, of_build)
    told = recorded(record, of_build)
    if told is None:
        made = f"{built['parts_made']} of {version.shards} files were encoded now" if built["is_new"] else "all of it"
        say(f"index: no figure of its build, as some was there before ({made}): delete {out / 'index'} to measure it")
    else:
        say(f"index: {figures(told)}{'' if built['is_new'] else ', by an earlier run'}")
    say(json.dumps({name: value for name, value in built.items() if name != "seconds"}))


def lance_build(folder: Path, path: Path, version: versions.Version, record: Path) -> None:
    """Builds Lance's where it is not there whole, over as many vectors, and says what its build took."""
    of_build = {"files": version.files}
    is_there = lance_is_whole(path, version.rows)
    if not is_there:
        theirs = watched([sys.executable, __file__, "--build-lance", "--folder", str(folder)])
        index_mb = folder_bytes(path / "_indices") / 1e6
        keep(record, theirs, of_build | {"index_s": float(theirs.printed), "index_mb": index_mb})
    told = recorded(record, of_build)
    if told is None:
        say(f"lance: no figure of its build, which was there before: delete {path} to measure it")
    else:
        index = f"{told['index_s']:.0f} s of it for an index of {told['index_mb']:,.0f} MB"
        say(f"lance: {figures(told)}, {index}{', by an earlier run' if is_there else ''}")


def lance_is_whole(path: Path, rows: int) -> bool:
    """Whether a dataset of so many rows lies there, and its index covers them: a build cut short leaves none."""
    import lance

    try:
        dataset = lance.dataset(str(path))
    except (ValueError, OSError):  # nothing there, or the beginning of it
        return False
    return dataset.count_rows() == rows and any("vector" in index.field_names for index in dataset.describe_indices())


def keep(record: Path, build: watched, of_build: dict[str, Any]) -> None:
    took = {"seconds": build.seconds, "resident_mb": build.resident_mb, "anonymous_mb": build.anonymous_mb}
    record.write_text(json.dumps(took | of_build))


def recorded(record: Path, of_build: dict[str, Any]) -> dict[str, Any] | None:
    """What `keep` wrote of just this build; None where it wrote of another, or nothing."""
    told: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    return told if told and all(told.get(name) == value for name, value in of_build.items()) else None


def figures(told: dict[str, Any]) -> str:
    memory = f"{told['resident_mb']:,.0f} MB resident, {told['anonymous_mb']:,.0f} MB anonymous"
    return f"{told['seconds']:.0f} s, {memory}"


def compare(root: Root, version: versions.Version, lance_path: Path, rounds: int) -> None:
    import faiss
    import lance

    queries = to_unit(rows_of(10**6, QUERIES))
    searcher, dataset = Searcher(root, version), lance.dataset(str(lance_path))
    index = searcher.index
    assert index is not None
    true = Nearest(queries, 10).add_all(searcher.vectors.all_blocks()).numbers

    def refined(some: np.ndarray) -> list[np.ndarray]:
        """Whole searches without the columns that are told: candidates, and their exact cosines from Parquet."""
        found = searcher.candidates(some, 10)
        exact = searcher.vectors.fetch(found.reshape(-1)).reshape(*found.shape, -1)
        order = np.argsort(-np.einsum("qcd,qd->qc", exact, some), axis=1, kind="stable")
        return list(np.take_along_axis(found, order, axis=1))

    def of_lance(some: np.ndarray, probes: int, refine: int) -> list[np.ndarray]:
        nearest = {"column": "vector", "k": 10, "nprobes": probes, "refine_factor": refine}
        return [
            dataset.to_table(columns=["number", "_distance"], nearest=nearest | {"q": query})["number"].to_numpy()
            for query in some
        ]

    points = [(refine, probes) for refine in LANCE_REFINE for probes in LANCE_PROBES]
    few, few_true = queries[:RECALL_QUERIES], true[:RECALL_QUERIES]
    least = recall(refined(few), few_true)
    reached = {(r, p): recall(of_lance(few, p, r), few_true) for r, p in points}
    say(f"recall@10 of {RECALL_QUERIES} queries: ours {least:.4f}, lance's by (refine, probes): {reached}")
    able = [at for at, value in reached.items() if value >= least]
    short = "" if able else f", its best point: none of {len(points)} reaches our recall"
    able = able or [max(reached, key=lambda at: reached[at])]
    speeds = {at: seconds(lambda at=at: of_lance(queries[:50], at[1], at[0])) for at in able}
    refine, probes = min(speeds, key=lambda at: speeds[at])
    flat, counts = faiss.IndexFlatIP(DIM), searcher.vectors.counts
    for block in searcher.vectors.all_blocks():
        flat.add(block.unit)
    contenders: dict[str, tuple[int, Callable[[np.ndarray], list[np.ndarray]]]] = {
        f"ours, one by one, {index.probes} of {index.lists} lists, exact scores from Parquet": (
            20, lambda some: [found for query in some for found in refined(query[None])]
        ),
        "ours, one by one, the index alone": (
            500, lambda some: [searcher.candidates(query[None], 10)[0] for query in some]
        ),
        "ours, all at once, exact scores from Parquet": (500, refined),
        "ours, all at once, the index alone": (500, lambda some: list(searcher.candidates(some, 10))),
        f"Lance IVF_PQ, one by one, {probes} of {LANCE_LISTS} lists, refined {refine} times{short}": (
            RECALL_QUERIES, lambda some: of_lance(some, probes, refine)
        ),
        "exact, one by one, faiss' flat index in memory": (
            20, lambda some: [in_memory(flat, one[None], counts)[0] for one in some]
        ),
        "exact, all at once, faiss' flat index in memory": (200, lambda some: in_memory(flat, some, counts)),
        "exact, all at once, from Parquet": (
            200, lambda some: list(Nearest(some, 10).add_all(searcher.vectors.all_blocks()).numbers)
        ),
    }  # fmt: skip
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, float] = {}
    for _ in range(rounds):
        for name, (count, call) in contenders.items():
            started = time.perf_counter()
            answers = call(queries[:count])
            taken[name].append(count / (time.perf_counter() - started))
            found[name] = recall(answers, true[:count])
        say(json.dumps({name: round(values[-1], 1) for name, values in taken.items()}))
    told = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line.split(":")[1].strip() for line in told if line.startswith("model name"))
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(
        f"{cpu}, {os.cpu_count()} cores, {threads} threads, Python {platform.python_version()}, {time.strftime('%F')}\n"
    )
    print("| | queries | queries/s, median (range) | recall@10 of these |\n| --- | --- | --- | --- |")
    for name, values in taken.items():
        span = f"{statistics.median(values):,.1f} ({min(values):,.1f}–{max(values):,.1f})"
        print(f"| {name} | {contenders[name][0]} | {span} | {found[name]:.3f} |")


def in_memory(flat: Any, some: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """faiss' own exact search; its rows' places → our numbers."""
    firsts = np.concatenate([[0], np.cumsum(counts)])
    best = flat.search(some, 10)[1]
    files = np.searchsorted(firsts, best, side="right") - 1
    return list((files << ROW_BITS) + best - firsts[files])


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
