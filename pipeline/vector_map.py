"""A sample of a version's vectors → a map in two dimensions, neighbours of a few, near-duplicates among them.

The sample is the same every time: shards evenly spaced over the list, row groups over each, rows over each of these.
Everything is exact within it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.flow import ordered
from pipeline.forest import Forest
from pipeline.lists import FileList, ShardFiles
from pipeline.output import Root
from pipeline.parquet_files import open_parquet
from pipeline.vectors import to_unit

SAMPLE_ROWS = 10_000  # 40 MB of 1024-d; all pairs of them take a core some seconds
SAMPLE_SHARDS = (40, 400)  # at least, where there are so many; at most, where shards are small
GROUP_ROWS = 2048  # taken of a row group, at most, so that a large shard gives more than one
MAP_POINTS = 2000
QUERIES, NEIGHBOURS = 12, 6
NEAR = 0.97  # cosine: below it are pictures of one scene, above it mostly copies
CLOSEST_KEPT = 8  # of each vector: joins groups of any size, and bounds what a model that tells nothing apart gives
GROUPS, OF_GROUP = 8, 6  # shown
SIMILARITY_BINS = 40
AT_ONCE, ROWS_AT_ONCE = 8, 1024


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """`vectors`: float32 (n, D), as stored. The lists: a value a row; `first`: -1 where no classes are kept."""

    vectors: np.ndarray
    ids: list[str]
    shards: list[str]
    labels: list[int | None]
    first: list[int]
    names: list[str]  # of the first class
    scores: list[float]
    of: int  # rows of the version

    def __len__(self) -> int:
        return len(self.ids)

    def tile(self, place: int) -> "Tile":
        return Tile(self.ids[place], self.shards[place], self.names[place])


class Tile(NamedTuple):
    """One image of a sheet. `name`: of its first class, "" where none are kept."""

    id: str
    shard: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Map:
    """`x`, `y`: of `points`, places in the sample, along the two directions in which they differ most."""

    points: list[int]
    x: list[float]
    y: list[float]
    explained: tuple[float, float]  # share of the variance


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Of one image, the nearest first; by cosine."""

    query: Tile
    nearest: list[Tile]
    similarity: list[float]


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """`nearest`: of each of `nearest_among` vectors the cosine to its nearest other, as counts between `edges`."""

    edges: list[float]
    nearest: list[int]
    median: float
    nearest_among: int
    among: int  # vectors that the groups were sought among
    images: int  # of these, in any group
    count: int  # of groups
    groups: list[list[Tile]]  # the first of the largest, those of one size by similarity
    sizes: list[int]  # of these, as a whole
    least: list[float]  # of each shown group: every member has another at this cosine or a higher one
    cut: int = 0  # images that have so many as similar that not all were looked at


def sample(root: Root, files: FileList) -> Sampled | None:
    """None of a version without rows. Rows come in the list's order."""
    chosen, each = _choose(files)
    if not chosen:
        return None
    read = list(ordered(lambda f: _read(root, f, each), chosen, AT_ONCE))
    table = pa.concat_tables(read).combine_chunks()
    width = table["embedding"].type.list_size
    flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    first, names, scores = _classes(table)
    return Sampled(
        vectors=flat.reshape(-1, width).astype(np.float32),
        ids=table["id"].to_pylist(),
        shards=table["shard"].to_pylist(),
        labels=table["label"].to_pylist(),
        first=first,
        names=names,
        scores=scores,
        of=files.totals.rows,
    )


def _choose(files: FileList) -> tuple[list[ShardFiles], int]:
    """Shards that have rows, evenly spaced, and how many rows to take of each."""
    rows = files.table["rows"].to_numpy()
    there = np.flatnonzero(rows > 0)
    if not len(there):
        return [], 0
    least, most = SAMPLE_SHARDS
    wanted = int(np.clip(np.ceil(SAMPLE_ROWS / rows[there].mean()), least, most))
    count = min(wanted, len(there))
    places = there[np.floor((np.arange(count) + 0.5) * len(there) / count).astype(np.int64)]
    return [files[int(place)] for place in places], -(-SAMPLE_ROWS // count)


def _read(root: Root, f: ShardFiles, most: int) -> pa.Table:
    with open_parquet(root, f.embeddings, f.sizes["embeddings"]) as file:
        wanted = ["id", "shard", "label", "embedding", "topk_index", "topk_score", "topk_label"]
        columns = [c for c in wanted if c in file.schema_arrow.names]
        groups = file.num_row_groups
        picked = _even(groups, min(groups, -(-most // GROUP_ROWS)))
        share = -(-most // len(picked))
        parts = []
        for group in picked.tolist():
            table = file.read_row_group(group, columns=columns)
            parts.append(table.take(_even(table.num_rows, min(table.num_rows, share))))
    return pa.concat_tables(parts).replace_schema_metadata(None)


def _even(there: int, count: int) -> np.ndarray:
    return np.floor((np.arange(count) + 0.5) * there / count).astype(np.int64)


def _classes(table: pa.Table) -> tuple[list[int], list[str], list[float]]:
    n = table.num_rows
    if "topk_index" not in table.column_names:
        return [-1] * n, [""] * n, [0.0] * n
    index, scores = ([row[0] for row in table[c].to_pylist()] for c in ("topk_index", "topk_score"))
    labels = [row[0] if row else None for row in table["topk_label"].to_pylist()]
    names = [name if name is not None else f"class {i}" for i, name in zip(index, labels, strict=True)]
    return index, names, scores


def project(sampled: Sampled) -> Map:
    """Principal components of at most `MAP_POINTS` vectors, by the smaller of the two matrices of products."""
    points = _even(len(sampled), min(len(sampled), MAP_POINTS))
    x = sampled.vectors[points].astype(np.float64)
    x -= x.mean(axis=0)
    if len(x) <= x.shape[1]:
        values, own = np.linalg.eigh(x @ x.T)
        places = own[:, -2:] * np.sqrt(np.maximum(values[-2:], 0))
    else:
        values, own = np.linalg.eigh(x.T @ x)
        places = x @ own[:, -2:]
    if places.shape[1] < 2:  # one vector, or one dimension
        places, values = np.pad(places, ((0, 0), (2 - places.shape[1], 0))), np.pad(values, (1, 0))
    places, total = places[:, ::-1], max(float(values.sum()), 1e-12)
    places = places * np.where(places[np.abs(places).argmax(axis=0), [0, 1]] < 0, -1, 1)  # the sign is anybody's
    return Map(
        points=points.tolist(),
        x=places[:, 0].tolist(),
        y=places[:, 1].tolist(),
        explained=(max(0.0, float(values[-1] / total)), max(0.0, float(values[-2] / total))),
    )


def neighbours(sampled: Sampled, drawn: Map) -> list[Neighbours]:
    """Of queries evenly spread over the map, left to right; none where there is but one vector."""
    order = np.array(drawn.points)[np.argsort(drawn.x, kind="stable")]
    queries = order[_even(len(order), min(len(order), QUERIES))]
    vectors = to_unit(sampled.vectors)
    count = min(NEIGHBOURS, len(sampled) - 1)
    if count < 1:
        return []
    found = []
    for query in queries.tolist():
        similarity = vectors @ vectors[query]
        similarity[query] = -np.inf
        nearest = np.argsort(-similarity, kind="stable")[:count]
        found.append(
            Neighbours(
                query=sampled.tile(query),
                nearest=[sampled.tile(i) for i in nearest.tolist()],
                similarity=similarity[nearest].tolist(),
            )
        )
    return found


def duplicates(sampled: Sampled) -> Duplicates | None:
    """Groups that a cosine of `NEAR` or more holds together, by each vector's closest; None of fewer than two."""
    if len(sampled) < 2:
        return None
    vectors, kept = to_unit(sampled.vectors), min(CLOSEST_KEPT, len(sampled) - 1)
    nearest = np.empty(len(vectors), np.float32)
    forest = Forest(len(vectors))
    for at in range(0, len(vectors), ROWS_AT_ONCE):
        block = vectors[at : at + ROWS_AT_ONCE] @ vectors.T
        here = np.arange(len(block))
        block[here, at + here] = -np.inf
        closest = np.argpartition(-block, kept - 1, axis=1)[:, :kept]
        values = np.take_along_axis(block, closest, axis=1)
        nearest[at : at + len(block)] = values.max(axis=1)
        is_near = values >= NEAR
        for i in np.flatnonzero(is_near.any(axis=1)):
            forest.join(np.append(closest[i, is_near[i]], at + i))
    places, ends, least = forest.groups(nearest)
    bins = np.linspace(np.floor(20 * min(NEAR, float(nearest.min()))) / 20, 1, SIMILARITY_BINS + 1)
    counts, _ = np.histogram(np.clip(nearest, bins[0], 1), bins)
    sizes = np.diff(ends, prepend=0)[:GROUPS].tolist()
    shown = [places[end - size : end][:OF_GROUP].tolist() for end, size in zip(ends.tolist(), sizes, strict=False)]
    return Duplicates(
        edges=bins.tolist(),
        nearest=counts.tolist(),
        median=float(np.median(nearest)),
        nearest_among=len(sampled),
        among=len(sampled),
        images=len(places),
        count=len(ends),
        groups=[[sampled.tile(i) for i in members] for members in shown],
        sizes=sizes,
        least=least[:GROUPS].tolist(),
    )
