"""Deletes from an output what no kept version names, and nothing that a run may be about to commit."""

from collections.abc import Callable

from pipeline.flow import ordered
from pipeline.output import Root
from pipeline.stored_index import FOLDER, index_names, read_all
from pipeline.versions import OLD_SCRATCH_S, current, numbers, read_list, version_name

DELETES_AT_ONCE = 32  # one after the other, a million take hours of waiting for a store's answers


def collect_garbage(root: Root, keep: int, live_sets: Callable[[], set[str]]) -> list[str]:
    """Deletes what none of the last `keep` versions names; returns the names of what went.

    An index goes with its version, and of its training and parts what no kept version can use. `live_sets`: the sets
    that runs are writing now. What such a set holds stays, and so does every list of files: a commit may be about to
    name them. Candidates are listed first, so that what appears meanwhile is none of them; old versions go first, so
    that no reader finds one whose files are gone.
    """
    candidates = {*root.list("versions"), *root.list("sets"), *root.list(FOLDER)}
    live = live_sets()
    known = numbers(root)
    dropped, kept = known[:-keep], [current(root, n) for n in known[-keep:]]
    named = {name for v in kept for name in (v.files, version_name(v.version), f"sets/{v.set}/set.json")}
    indexes = read_all(root)
    for version in kept:
        files = read_list(root, version)
        for kind in files.kinds():
            named.update(files.names(kind))
        named.update(name for name in index_names(version, files, indexes, candidates) if name in candidates)
    old_versions = [name for n in dropped if (name := version_name(n)) in candidates]
    for name in old_versions:
        root.delete(name)

    def is_live(name: str) -> bool:
        return bool(live) if name.startswith("versions/") else name.split("/")[1] in live

    rest = sorted(name for name in candidates - named - set(old_versions) if not is_live(name))
    for _ in ordered(root.delete, rest, DELETES_AT_ONCE):
        pass
    root.clear_scratch(OLD_SCRATCH_S)
    return [*old_versions, *rest]
