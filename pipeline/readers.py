"""What readers open: the Parquet files of one version, all of one set, never a listing."""

import pyarrow.compute as pc
import pyarrow.dataset as ds

from pipeline.errors import StorageError, UsageError
from pipeline.lists import KINDS, FileList
from pipeline.output import Root
from pipeline.tensor_rows import PREFIX
from pipeline.versions import Version, current, existing_output, numbers, read_list

OF_ONE_SHARD = (f"{PREFIX}shard".encode(), f"{PREFIX}input_etag".encode())  # keys of a file's metadata


def files(url: str, *, kind: str = "embeddings", version: int | None = None, set_name: str | None = None) -> list[str]:
    """The URLs of a version's files of one kind, ready for any Parquet reader; all of one set.

    `version`: the current one by default. `set_name`: the newest version of that set instead, whatever has become
    current since; with both, the version must be of the set. Raises `UsageError` where there is no such version.
    """
    root, listed = _listed(url, kind, version, set_name)
    return [f"{root.url}/{name}" for name in listed.names(kind)]


def open_dataset(
    url: str, *, kind: str = "embeddings", version: int | None = None, set_name: str | None = None
) -> ds.Dataset:
    """A pyarrow dataset of one version, chosen as by `files`: one set, whole files, each row once.

    Its schema's metadata is what holds for all files: the set, the model, `shard2vec.dim` …
    """
    root, listed = _listed(url, kind, version, set_name)
    found = ds.dataset([root.at(name) for name in listed.names(kind)], format="parquet", filesystem=root.fs)
    common = {k: v for k, v in (found.schema.metadata or {}).items() if k not in OF_ONE_SHARD}
    return found.replace_schema(found.schema.with_metadata(common))


def _listed(url: str, kind: str, number: int | None, set_name: str | None) -> tuple[Root, FileList]:
    if kind not in KINDS:
        raise UsageError(f"--kind {kind}: choose one of {', '.join(KINDS)}")
    root = existing_output(url)
    version = current(root, number) if set_name is None else _of_set(root, set_name, number)
    listed = read_list(root, version)
    if listed.column(kind).null_count:
        raise UsageError(f"version {version.version} of {root.url} has no {kind}: it was embedded without")
    folder = f"sets/{version.set}/"
    if not pc.all(pc.starts_with(listed.column(kind), folder), min_count=0).as_py():
        raise StorageError(f"{version.files}, the list of version {version.version}, names files outside {folder}")
    return root, listed


def newest_of(root: Root, set_name: str) -> Version | None:
    """The newest version of a set; None where it has none."""
    of_all = (current(root, number) for number in reversed(numbers(root)))
    return next((version for version in of_all if version.set == set_name), None)


def _of_set(root: Root, set_name: str, number: int | None) -> Version:
    """The newest version of the set, or the numbered one, which must be of it."""
    version = newest_of(root, set_name) if number is None else current(root, number)
    if version is None:
        known = ", ".join(sorted({current(root, each).set for each in numbers(root)})) or "none"
        raise UsageError(f"--set {set_name}: {root.url} has no version of it; sets with versions: {known}")
    if version.set != set_name:
        raise UsageError(f"--set {set_name}: version {number} of {root.url} is of {version.set}")
    return version
