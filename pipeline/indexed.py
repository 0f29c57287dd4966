"""A report's neighbours and near-duplicates of a whole version, through its index, where it has one.

Without an index, or without faiss to read it, those of the sample stay; `Whole.how` says which they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.errors import StorageError, UsageError
from pipeline.near_duplicates import near_duplicates
from pipeline.output import Root
from pipeline.search import Hit, Searcher
from pipeline.vector_map import GROUPS, NEAR, NEIGHBOURS, OF_GROUP, Duplicates, Neighbours, Sampled, Tile
from pipeline.versions import Version

JOINED_VECTORS = 200_000  # of more, looking up each one's neighbours takes minutes: `near-duplicates` does that


@dataclass(frozen=True)
class Whole:
    """`how`: a sentence on what the neighbours were sought in."""

    neighbours: list[Neighbours]
    duplicates: Duplicates | None
    how: str


def of_version(
    root: Root,
    version: Version | None,
    sampled: Sampled,
    of_sample: Sequence[Neighbours],
    duplicates: Duplicates | None,
) -> Whole:
    """`of_sample`, `duplicates`: the sample's; the queries stay the same."""
    where = "all rows" if len(sampled) == sampled.of else f"the sample of {len(sampled):,} rows"
    try:
        searcher = Searcher(root, version) if version else None
        if version is None or searcher is None or searcher.index is None:
            return Whole(list(of_sample), duplicates, f"Sought in {where}.")
        found = [_neighbours(searcher, sampled, one) for one in of_sample]
        whole = duplicates
        if duplicates and version.rows <= JOINED_VECTORS:
            whole = _duplicates(root, version, sampled, duplicates)
    except (UsageError, StorageError) as e:
        return Whole(list(of_sample), duplicates, f"Sought in {where}: the index cannot be used ({e}).")
    index = searcher.index
    recall = f"recall@10 {index.recall_at_10:.3f}"
    return Whole(found, whole, f"Sought in all {index.vectors:,} rows through the {index.kind} index, {recall}.")


def _neighbours(searcher: Searcher, sampled: Sampled, one: Neighbours) -> Neighbours:
    vector = sampled.vectors[sampled.ids.index(one.query.id)]
    if not vector.any():
        return one  # it has no direction
    hits = searcher(vector.astype(np.float64), top=NEIGHBOURS, without=one.query.id).hits
    return Neighbours(query=one.query, nearest=[_tile(hit) for hit in hits], similarity=[hit.score for hit in hits])


def _tile(hit: Hit) -> Tile:
    return Tile(hit.id, hit.shard, hit.class_name or ("" if hit.class_index is None else f"class {hit.class_index}"))


def _duplicates(root: Root, version: Version, sampled: Sampled, of_sample: Duplicates) -> Duplicates:
    """The groups of all vectors; how near the nearest other is stays the sample's."""
    found = near_duplicates(root, version, above=NEAR)
    names = dict(zip(sampled.ids, sampled.names, strict=True))
    shown = found.first(GROUPS, OF_GROUP)
    return replace(
        of_sample,
        among=len(found.vectors),
        images=found.images,
        count=found.count,
        groups=[[Tile(m.id, m.shard, names.get(m.id, "")) for m in group] for group in shown],
        sizes=found.sizes()[:GROUPS].tolist(),
        least=found.least[:GROUPS].tolist(),
        cut=found.cut,
    )
