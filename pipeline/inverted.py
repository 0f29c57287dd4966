"""faiss: vectors in lists by their nearest centroid, as codes of a byte a dimension or as float32; the only user of it.

A `flat` index is one list of float32, which every search goes through: exact. An `ivf` index has many lists of which a
search probes a few. Both lie as two files: the trained index without vectors, as faiss writes it, and the lists, each
its codes and then its numbers (int64), then all lists' sizes (int64). That one is mapped and never read as a whole.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import StorageError, UsageError

KINDS = ("flat", "ivf")
NUMBER_BYTES = SIZE_BYTES = 8
PIECE_BYTES = 16 * 2**20  # of codes that are encoded, kept and read together
GROUP_BYTES = 128 * 2**20  # of codes merged at once: more spare writes of short pieces
ITERATIONS = 10  # of k-means
SEED = 1


class Codes(NamedTuple):
    """Some consecutive vectors of one file as they lie in an index, ordered by list. `rows`: of the file."""

    lists: np.ndarray  # int32 (n,)
    rows: np.ndarray  # int32 (n,)
    codes: np.ndarray  # uint8 (n, code bytes)


def faiss() -> Any:
    """The library. Raises `UsageError` where it is not installed."""
    try:
        import faiss as library
    except ImportError as e:
        raise UsageError(f"an index needs faiss, which is not installed ({e}): pip install 'shard2vec[index]'") from e
    return library


def train(sample: np.ndarray, kind: str, lists: int) -> Any:
    """A trained index without vectors. `sample`: float32 (n, D), unit length; n may be 0 for `flat`."""
    lib, dim = faiss(), sample.shape[1]
    quantizer = lib.IndexFlatIP(dim)
    if kind == "flat":
        index = lib.IndexIVFFlat(quantizer, dim, 1, lib.METRIC_INNER_PRODUCT)
        quantizer.add(np.zeros((1, dim), np.float32))
        index.is_trained = True
    else:
        index = lib.IndexIVFScalarQuantizer(
            quantizer, dim, lists, lib.ScalarQuantizer.QT_8bit, lib.METRIC_INNER_PRODUCT, True
        )
        index.cp.niter, index.cp.seed, index.cp.spherical = ITERATIONS, SEED, True
        index.cp.min_points_per_centroid = 1  # it warns on stderr of fewer than 39, which small sets have
        index.cp.max_points_per_centroid = max(256, -(-len(sample) // lists))
        index.train(np.ascontiguousarray(sample))
    quantizer.this.disown()
    index.own_fields = True
    return index


def to_bytes(index: Any) -> bytes:
    return bytes(faiss().serialize_index(index).tobytes())


def from_bytes(content: bytes, name: str) -> Any:
    """What `to_bytes` gave. Raises `StorageError` where it is damaged."""
    lib = faiss()
    try:
        return lib.deserialize_index(np.frombuffer(content, np.uint8))
    except Exception as e:  # its reader raises RuntimeError, MemoryError or an assertion's exception of its own
        why = " ".join(str(e).split())[:200]
        folder = name.rpartition("/")[0]  # parts and lists of another training are of no use
        raise StorageError(f"{name} is damaged ({why}): delete the folder {folder} and run `index` again") from e


def encode(index: Any, blocks: Iterable[np.ndarray]) -> Iterator[Codes]:
    """The codes of one file's vectors, given in blocks of float32 (n, D), in pieces of `PIECE_BYTES` and a block.

    Of a piece three copies are held for a moment.
    """
    held, size, first = list[np.ndarray](), 0, 0
    for block in blocks:
        if len(block):
            held.append(index.sa_encode(np.ascontiguousarray(block)))
            size += held[-1].nbytes
        if size >= PIECE_BYTES:
            yield _piece(index, np.concatenate(held), first)
            first += sum(map(len, held))
            held, size = [], 0
    if held:
        yield _piece(index, np.concatenate(held), first)


def _piece(index: Any, codes: np.ndarray, first: int) -> Codes:
    """`codes`: uint8, each the number of its list and then the code itself, of the rows from `first` on."""
    coarse = index.coarse_code_size()
    lists = np.zeros(len(codes), np.int32)
    for byte in range(coarse):
        lists |= codes[:, byte].astype(np.int32) << (8 * byte)
    order = np.argsort(lists, kind="stable")
    return Codes(lists[order], (first + order).astype(np.int32), np.ascontiguousarray(codes[order, coarse:]))


def merge(index: Any, pieces: Iterator[tuple[int, Codes]], sizes: np.ndarray, path: Path) -> None:
    """Writes the lists of all pieces to `path`; a piece's rows become numbers from the first of its file on.

    `pieces`: (first number of the file, codes) of each, in order; `GROUP_BYTES` and a piece of them are held at once,
    twice. `sizes`: int64 (lists,), of all together.
    """
    code_size, entry = index.code_size, index.code_size + NUMBER_BYTES
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]) * entry
    filled = np.zeros(len(sizes), np.int64)
    with path.open("wb") as file:
        handle = file.fileno()
        for group in _grouped(pieces):
            lists, firsts, counts = np.unique(group.lists, return_index=True, return_counts=True)
            for at, begin, count in zip(lists.tolist(), firsts.tolist(), counts.tolist(), strict=True):
                here, span = int(filled[at]), slice(begin, begin + count)
                start = int(starts[at])
                _write(handle, group.codes[span], start + here * code_size)
                _write(handle, group.numbers[span], start + int(sizes[at]) * code_size + here * NUMBER_BYTES)
                filled[at] += count
        if not np.array_equal(filled, sizes):
            raise StorageError("parts of the index changed while they were merged: run `index` again")
        _write(handle, sizes, int(sizes.sum()) * entry)


class _Group(NamedTuple):
    """Several pieces as one, ordered by list."""

    lists: np.ndarray  # int32 (n,)
    numbers: np.ndarray  # int64 (n,)
    codes: np.ndarray  # uint8 (n, code bytes)


def _grouped(pieces: Iterator[tuple[int, Codes]]) -> Iterator[_Group]:
    held = list[tuple[int, Codes]]()
    size = 0
    for first, piece in pieces:
        held.append((first, piece))
        size += piece.codes.nbytes
        if size >= GROUP_BYTES:
            yield _joined(held)
            held, size = [], 0
    if held:
        yield _joined(held)


def _joined(held: Sequence[tuple[int, Codes]]) -> _Group:
    lists = np.concatenate([piece.lists for _, piece in held])
    order = np.argsort(lists, kind="stable")
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    numbers, codes = np.empty(len(order), np.int64), np.empty((len(order), held[0][1].codes.shape[1]), np.uint8)
    at = 0
    for first, piece in held:  # each to its places: the codes are never there a third time
        there = places[at : at + len(piece.lists)]
        numbers[there], codes[there] = first + piece.rows.astype(np.int64), piece.codes
        at += len(piece.lists)
    return _Group(lists[order], numbers, codes)


def _write(handle: int, values: np.ndarray, at: int) -> None:
    view = np.ascontiguousarray(values).data.cast("B")
    while view:
        done = os.pwrite(handle, view, at)
        view, at = view[done:], at + done


def open_lists(index: Any, path: Path) -> Any:
    """The trained index over the lists that `merge` wrote to `path`. Raises `StorageError` where they do not fit."""
    lib = faiss()
    tail = index.nlist * SIZE_BYTES
    with path.open("rb") as file:
        total = max(0, file.seek(0, os.SEEK_END) - tail)
        file.seek(total)
        sizes = np.frombuffer(file.read(tail), np.int64)
    if len(sizes) != index.nlist or int(sizes.sum()) * (index.code_size + NUMBER_BYTES) != total:
        raise StorageError(f"{path} is damaged: delete it and run `index` again")
    lists = lib.OnDiskInvertedLists(index.nlist, index.code_size, str(path))
    counts = sizes.astype(np.uint64)  # a pointer does not keep its array
    lists.set_all_lists_sizes(lib.swig_ptr(counts))
    lists.totsize, lists.read_only = total, True
    if total:
        lists.do_mmap()
    index.replace_invlists(lists, True)
    lists.this.disown()
    index.ntotal = int(sizes.sum())
    return index


def find(index: Any, queries: np.ndarray, k: int, probes: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores, float32 (Q, k), highest first, and numbers, int64 (Q, k), -1 where fewer were found."""
    lib = faiss()
    parameters = lib.SearchParametersIVF(nprobe=min(probes, index.nlist))
    scores, numbers = index.search(np.ascontiguousarray(queries, np.float32), k, params=parameters)
    return scores, numbers


def only_list(index: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of a flat index: numbers, int64 (n,), and vectors, float32 (n, D), both as they are mapped; for its lifetime."""
    lib, count = faiss(), index.ntotal
    numbers = lib.rev_swig_ptr(index.invlists.get_ids(0), count)
    codes = lib.rev_swig_ptr(index.invlists.get_codes(0), count * index.code_size)
    return numbers, codes.view(np.float32).reshape(count, index.d)
