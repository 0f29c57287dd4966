"""Deletes from an output what no kept version names, and nothing that a run may be about to commit."""

from collections.abc import Callable

from pipeline.output import Root
from pipeline.versions import OLD_SCRATCH_S, current, numbers, read_list, version_name


def collect_garbage(root: Root, keep: int, live_sets: Callable[[], set[str]]) -> list[str]:
    """Deletes what none of the last `keep` versions names; returns the names of what went.

    `live_sets`: the sets that runs are writing now. What such a set holds stays, and so does every list of files:
    a commit may be about to name them. Candidates are listed first, so that what appears meanwhile is none of them;
    old versions go first, so that no reader finds one whose files are gone.
    """
    candidates = [*root.list("versions"), *root.list("sets")]
    live = live_sets()
    known = numbers(root)
    dropped, kept = known[:-keep], [current(root, n) for n in known[-keep:]]
    named = {name for v in kept for f in read_list(root, v) for name in f.names.values()}
    named |= {name for v in kept for name in (v.files, version_name(v.version), f"sets/{v.set}/set.json")}
    old_versions = [version_name(n) for n in dropped]
    garbage = [name for name in old_versions if name in candidates]
    for name in candidates:
        is_live = name.startswith("versions/") if live else False
        is_live |= name.startswith("sets/") and name.split("/")[1] in live
        if name not in named and name not in old_versions and not is_live:
            garbage.append(name)
    for name in garbage:
        root.delete(name)
    root.clear_scratch(OLD_SCRATCH_S)
    return garbage
