"""Drift: how far two sets, or two versions, tell the same of the same images.

Measured on a sample of the ids that both have, drawn by a hash of the id, so that the same question has the same answer
whoever asks it:

    overlap_at_10    share of an image's ten nearest neighbours, by cosine, that it has in both; needs 11 ids
    mean_cosine      of an image's two vectors; of one model only, elsewhere it means nothing
    norm_shift       mean norm in B / mean norm in A - 1
    top1_agreement   share of images with the same first class in both
    class_shift      total variation distance, 0…1, of the histograms of first classes

What is read: the ids of at most 64 shards that both have (by a hash of the name, so the same ones again), and of their
row groups those with drawn ids. Neighbours of 2,000 images are sought among 20,000 vectors, exactly, in float32, which
takes 2 · 2,000 · 20,000 · D multiplications for each side, whatever the size of the sets: seconds. Fewer vectors where
20,000 of them are more than 256 MB. The other measures are over all that were drawn.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from heapq import nsmallest
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import versions
from pipeline.errors import UsageError
from pipeline.flow import ordered
from pipeline.lists import FileList
from pipeline.output import Root
from pipeline.parquet_files import open_parquet
from pipeline.readers import newest_of
from pipeline.storage import digest
from pipeline.vectors import to_unit

NEIGHBOURS = 10
QUERIES, VECTORS, VECTOR_BYTES = 2_000, 20_000, 256 * 2**20  # bytes of each side's vectors
SHARDS = 64
SHARDS_AT_ONCE = 4  # each holds two shards' ids, or two row groups
QUERIES_AT_ONCE = 256  # 20 MB of scores
MOVED = 10  # classes named


@dataclass(frozen=True)
class ClassMove:
    """One class's share of the images, by first class, on each side."""

    index: int
    name: str  # "" where the classes have none
    share_a: float
    share_b: float


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What was compared and what came out; None with its reason in `unmeasured` where a measure cannot be had."""

    a: str  # version 3, or a set's name
    b: str
    set_a: str
    set_b: str
    same_weights: bool
    shards: int  # that both have
    shards_read: int
    ids: int  # that both have, of the shards that were read
    vectors: int  # drawn from these
    queries: int
    overlap_at_10: float | None = None
    overlap_by_chance: float | None = None  # what neighbours drawn blindly among so many vectors would share
    mean_cosine: float | None = None
    norm_shift: float | None = None
    top1_agreement: float | None = None
    class_shift: float | None = None
    moved: list[ClassMove] = field(default_factory=list)  # the classes whose share changed most
    unmeasured: dict[str, str] = field(default_factory=dict)  # measure → why it is None

    def as_dict(self) -> dict[str, Any]:
        """The object of `compare --json`, rounded to 6 digits."""
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two: a set, and which of its files count."""

    name: str
    set: str
    files: pa.Table  # columns shard, etag, embeddings: a row a shard

    @classmethod
    def of(cls, name: str, set_name: str, files: FileList) -> "Side":
        return cls(name=name, set=set_name, files=files.table.select(["shard", "etag", "embeddings"]))


def compare(root: Root, a: int | str, b: int | str) -> Drift:
    """Drift from A to B, each a version's number or a set's name: its newest version, else its finished shards.

    Raises `UsageError` for what the output does not have, and where A and B have no id in common.
    """
    sides = side(root, a), side(root, b)
    found = drift(root, *sides)
    if not found.ids:
        raise UsageError(f"{sides[0].name} and {sides[1].name} have no id in common: there is nothing to compare")
    return found


def side(root: Root, name: int | str) -> Side:
    """A version by its number, a set by its name. Raises `UsageError` where there is none."""
    if str(name).isdecimal():
        return _of_version(root, versions.current(root, int(name)))
    if (newest := newest_of(root, str(name))) is not None:
        return _of_version(root, newest)
    names = list(versions.done(root, f"sets/{name}"))
    if not names:
        sets = ", ".join(sorted({n.split("/")[1] for n in root.list("sets")})) or "none"
        numbers = ", ".join(map(str, versions.numbers(root))) or "none"
        raise UsageError(f"{name}: {root.url} has no such version ({numbers}) and no such set ({sets}) with shards")
    stems = [n.removeprefix(f"sets/{name}/embeddings/").removesuffix(".parquet").rpartition("-") for n in names]
    columns = {"shard": [s[0] for s in stems], "etag": [s[2] for s in stems], "embeddings": names}
    return Side(name=str(name), set=str(name), files=pa.table(columns))


def _of_version(root: Root, version: versions.Version) -> Side:
    return Side.of(f"version {version.version}", version.set, versions.read_list(root, version))


def drift(root: Root, a: Side, b: Side, *, unchanged_only: bool = False) -> Drift:
    """Drift from A to B; with no id in common all measures are None.

    `unchanged_only`: ids of shards whose input is the same in both, by its etag, so that what differs is the set.
    """
    facts = versions.described(root, a.set), versions.described(root, b.set)
    pairs = _pairs(a.files, b.files, unchanged_only)
    chosen = nsmallest(SHARDS, pairs, key=lambda pair: digest(pair.shard))
    drawn, ids = _draw(root, chosen, min(VECTORS, VECTOR_BYTES // (4 * max(f["dim"] for f in facts))))
    rows = [_read(root, chosen, drawn, which) for which in (0, 1)]
    n = len(drawn)
    return Drift(
        a=a.name,
        b=b.name,
        set_a=a.set,
        set_b=b.set,
        same_weights=facts[0]["weights_sha256"] == facts[1]["weights_sha256"],
        shards=len(pairs),
        shards_read=len(chosen),
        ids=ids,
        vectors=n,
        queries=min(n, QUERIES),
        **_measures(rows[0], rows[1], facts),
    )


# which ids


class _Pair(NamedTuple):
    shard: str
    files: tuple[str, str]  # embeddings of A and B


def _pairs(a: pa.Table, b: pa.Table, unchanged_only: bool) -> list[_Pair]:
    """The shards that both have; where a set has several of one input's states, the one that the other has too."""
    of_a, of_b = _by_state(a), _by_state(b)
    same = [_Pair(state[0], (of_a[state], of_b[state])) for state in of_a.keys() & of_b.keys()]
    if unchanged_only:
        return same
    known = {pair.shard for pair in same}
    rest_a, rest_b = ({s[0]: file for s, file in of.items() if s[0] not in known} for of in (of_a, of_b))
    return same + [_Pair(shard, (rest_a[shard], rest_b[shard])) for shard in rest_a.keys() & rest_b.keys()]


def _by_state(files: pa.Table) -> dict[tuple[str, str], str]:
    """(shard, etag) → embeddings file."""
    columns = (files[name].to_pylist() for name in ("shard", "etag", "embeddings"))
    return {(shard, etag): file for shard, etag, file in zip(*columns, strict=True)}


# hash of the id, number of the pair, row in A's file, row in B's
_DRAWN = np.dtype([("hash", np.uint64), ("pair", np.int64), ("rows", np.int64, 2)])


def _draw(root: Root, pairs: Sequence[_Pair], most: int) -> tuple[np.ndarray, int]:
    """The `most` ids with the smallest hashes, in the order of their hashes, and how many ids there were."""
    drawn, ids = np.empty(0, _DRAWN), 0
    for found in ordered(lambda i: _common(root, i, pairs[i]), range(len(pairs)), SHARDS_AT_ONCE):
        ids += len(found)
        drawn = np.concatenate([drawn, found])
        drawn = drawn[np.argsort(drawn["hash"], kind="stable")][:most]
    return drawn, ids


def _common(root: Root, number: int, pair: _Pair) -> np.ndarray:
    """The ids that both files of a shard have."""
    a = _ids(root, pair.files[0])
    b = a if pair.files[0] == pair.files[1] else _ids(root, pair.files[1])
    at = pc.index_in(a, value_set=b)
    rows_a = np.flatnonzero(pc.is_valid(at).to_numpy())
    found = np.empty(len(rows_a), _DRAWN)
    found["hash"] = [_hash(i) for i in a.take(pa.array(rows_a)).to_pylist()]
    found["pair"] = number
    found["rows"] = np.stack([rows_a, at.drop_null().to_numpy()], axis=1)
    return found


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _ids(root: Root, name: str) -> pa.ChunkedArray:
    with open_parquet(root, name) as file:
        return file.read(columns=["id"])["id"]


# what is said of them


class _Rows(NamedTuple):
    """Columns of the drawn ids, in their order; None where the set does not keep them."""

    embedding: np.ndarray | None  # float32 (n, D)
    norm: np.ndarray  # float64 (n,)
    top1: np.ndarray | None  # int32 (n,)
    names: dict[int, str]  # of the classes that came first somewhere


def _read(root: Root, pairs: Sequence[_Pair], drawn: np.ndarray, which: int) -> _Rows:
    """`which`: 0 for A, 1 for B."""
    asked = [(i, np.flatnonzero(drawn["pair"] == i)) for i in np.unique(drawn["pair"])]
    tables = ordered(
        lambda one: _rows_of(root, pairs[one[0]].files[which], drawn["rows"][one[1], which]), asked, SHARDS_AT_ONCE
    )
    return _joined(list(tables), np.concatenate([at for _, at in asked]) if asked else np.empty(0, int))


def _joined(tables: Sequence[_Rows], order: np.ndarray) -> _Rows:
    """One after the other, then row i at `order[i]`."""
    back = np.argsort(order)

    def column(parts: Iterable[np.ndarray | None]) -> np.ndarray | None:
        there = [part for part in parts if part is not None]
        return np.concatenate(there)[back] if there else None

    norm = column(t.norm for t in tables)
    names = {index: name for t in tables for index, name in t.names.items()}
    return _Rows(
        column(t.embedding for t in tables),
        np.empty(0) if norm is None else norm,
        column(t.top1 for t in tables),
        names,
    )


def _rows_of(root: Root, name: str, rows: np.ndarray) -> _Rows:
    """The named rows of an embeddings file, in that order; row groups without any are not read."""
    with open_parquet(root, name) as file:
        wanted = ("embedding", "norm", "topk_index", "topk_label")
        columns = [c for c in wanted if c in file.schema_arrow.names]
        parts, order, start = list[pa.Table](), list[np.ndarray](), 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            here = np.flatnonzero((rows >= start) & (rows < end))
            if len(here):
                part = file.read_row_group(group, columns=columns)
                parts.append(part.take(pa.array(rows[here] - start)))
                order.append(here)
            start = end
        table = pa.concat_tables(parts).combine_chunks()
        return _arrays(table.take(pa.array(np.argsort(np.concatenate(order)))))


def _arrays(table: pa.Table) -> _Rows:
    def fixed(column: str) -> np.ndarray | None:
        if column not in table.column_names:
            return None
        lists = table[column].combine_chunks()
        return lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), -1)

    embedding, topk = fixed("embedding"), fixed("topk_index")
    top1 = None if topk is None else topk[:, 0]
    names: dict[int, str] = {}
    if top1 is not None and table["topk_label"].null_count < len(table):
        first = pc.list_element(table["topk_label"], 0).to_pylist()
        names = {int(i): name for i, name in zip(top1, first, strict=True) if name is not None}
    norm = table["norm"].to_numpy().astype(np.float64)
    return _Rows(None if embedding is None else embedding.astype(np.float32, copy=False), norm, top1, names)


# the measures


def _measures(a: _Rows, b: _Rows, facts: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    unmeasured: dict[str, str] = {}
    n = len(a.norm)
    if not n:
        names = ("overlap_at_10", "mean_cosine", "norm_shift", "top1_agreement", "class_shift")
        return {"unmeasured": dict.fromkeys(names, "no id is in both")}
    if a.embedding is None or b.embedding is None:
        unmeasured["overlap_at_10"] = unmeasured["mean_cosine"] = "a set keeps no embeddings"
    else:
        units = to_unit(a.embedding), to_unit(b.embedding)
        if n > NEIGHBOURS:
            found["overlap_at_10"] = _overlap(*units)
            found["overlap_by_chance"] = NEIGHBOURS / (n - 1)
        else:
            unmeasured["overlap_at_10"] = f"{n} ids are in both: ten neighbours need {NEIGHBOURS + 1}"
        if any(facts[0][key] != facts[1][key] for key in ("architecture", "dim")):
            unmeasured["mean_cosine"] = "the models differ"
        else:
            found["mean_cosine"] = float(np.einsum("nd,nd->n", *units, dtype=np.float64).mean())
    if a.norm.mean() > 0:
        found["norm_shift"] = float(b.norm.mean() / a.norm.mean() - 1)
    else:
        unmeasured["norm_shift"] = "all norms of A are 0"
    if why := _unlike(a, b, facts):
        unmeasured["top1_agreement"] = unmeasured["class_shift"] = why
    else:
        assert a.top1 is not None and b.top1 is not None
        found["top1_agreement"] = float((a.top1 == b.top1).mean())
        counts = [np.bincount(top1, minlength=facts[0]["classes"]) for top1 in (a.top1, b.top1)]
        found["class_shift"] = float(np.abs(counts[1] - counts[0]).sum() / (2 * n))
        found["moved"] = _moved(counts[0], counts[1], a.names | b.names)
    return found | {"unmeasured": unmeasured}


def _unlike(a: _Rows, b: _Rows, facts: tuple[dict[str, Any], dict[str, Any]]) -> str:
    """Why classes cannot be compared by their index; "" where they can."""
    if a.top1 is None or b.top1 is None:
        return "a set keeps no classes"
    counts = [f["classes"] for f in facts]
    if counts[0] != counts[1]:
        return f"the models have {counts[0]} and {counts[1]} classes"
    labels = [f["labels_sha256"] for f in facts]
    return "the classes have other names" if all(labels) and labels[0] != labels[1] else ""


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """The mean share of neighbours in common. `a` and `b`: unit vectors of the same ids, the queries first."""
    shared = 0
    queries = min(len(a), QUERIES)
    for at in range(0, queries, QUERIES_AT_ONCE):
        block = slice(at, min(at + QUERIES_AT_ONCE, queries))
        shared += int((_neighbours(a, block)[:, :, None] == _neighbours(b, block)[:, None, :]).sum())
    return shared / (queries * NEIGHBOURS)


def _neighbours(vectors: np.ndarray, block: slice) -> np.ndarray:
    """int64 (queries, 10): the rows nearest to each of the block's, itself left out."""
    scores = vectors[block] @ vectors.T
    scores[np.arange(len(scores)), np.arange(block.start, block.stop)] = -np.inf
    return np.argpartition(scores, -NEIGHBOURS, axis=1)[:, -NEIGHBOURS:]


def _moved(a: np.ndarray, b: np.ndarray, names: dict[int, str]) -> list[ClassMove]:
    """The classes whose share changed most. `a`, `b`: images by class."""
    change, n = np.abs(b - a), int(a.sum())
    order = [int(i) for i in np.argsort(-change, kind="stable")[:MOVED] if change[i]]
    return [ClassMove(i, names.get(i, ""), float(a[i] / n), float(b[i] / n)) for i in order]
