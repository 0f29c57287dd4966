"""A report's neighbours and near-duplicates of a whole version, through its index, where it has one.

Without an index, or without faiss to read it, those of the sample stay; `Whole.how` says which they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline import stored_index
from pipeline.errors import StorageError, UsageError
from pipeline.near_duplicates import Member, near_duplicates
from pipeline.output import Root
from pipeline.search import Hit, search
from pipeline.vector_map import GROUPS, NEAR, NEIGHBOURS, Duplicates, Neighbours, Sampled, Tile
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
    index = stored_index.index_of(root, version) if version else None
    if version is None or index is None:
        where = "all rows" if len(sampled) == sampled.of else f"the sample of {len(sampled):,} rows"
        return Whole(list(of_sample), duplicates, f"Sought in {where}.")
    try:
        found = [_neighbours(root, version, sampled, one) for one in of_sample]
        if duplicates and version.rows <= JOINED_VECTORS:
            duplicates = _duplicates(root, version, sampled, duplicates)
    except (UsageError, StorageError) as e:
        return Whole(list(of_sample), duplicates, f"Sought in the sample: the index cannot be used ({e}).")
    recall = f"recall@10 {index.recall_at_10:.3f}"
    return Whole(found, duplicates, f"Sought in all {index.vectors:,} rows through the {index.kind} index, {recall}.")


def _neighbours(root: Root, version: Version, sampled: Sampled, one: Neighbours) -> Neighbours:
    vector = sampled.vectors[sampled.ids.index(one.query.id)]
    if not vector.any():
        return one  # it has no direction
    hits = search(root, version, vector.astype(np.float64), top=NEIGHBOURS, without=one.query.id).hits
    return Neighbours(query=one.query, nearest=[_tile(hit) for hit in hits], similarity=[hit.score for hit in hits])


def _tile(hit: Hit) -> Tile:
    return Tile(hit.id, hit.shard, hit.class_name or ("" if hit.class_index is None else f"class {hit.class_index}"))


def _duplicates(root: Root, version: Version, sampled: Sampled, of_sample: Duplicates) -> Duplicates:
    """The groups of all vectors; how near the nearest other is stays the sample's."""
    found = near_duplicates(root, version, above=NEAR)
    names = dict(zip(sampled.ids, sampled.names, strict=True))
    shown = found.groups[:GROUPS]
    return Duplicates(
        edges=of_sample.edges,
        nearest=of_sample.nearest,
        median=of_sample.median,
        among=found.vectors,
        images=sum(map(len, found.groups)),
        count=len(found.groups),
        groups=[[_member(m, names) for m in group] for group in shown],
        least=[min(m.score for m in group) for group in shown],
    )


def _member(member: Member, names: dict[str, str]) -> Tile:
    return Tile(member.id, member.shard, names.get(member.id, ""))
