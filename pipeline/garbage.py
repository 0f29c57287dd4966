"""Deletes from an output what no kept version names, and nothing that a run may be about to commit."""

from collections.abc import Callable

from pipeline.flow import ordered
from pipeline.output import Root
from pipeline.stored_index import FOLDER, index_names, read_all
from pipeline.versions import OLD_SCRATCH_S, current, numbers, read_list, version_name

DELETES_AT_ONCE = 32  # one after the other, a million take hours of waiting for a store's answers
SLICE = 1_000  # names, some seconds of a store's: so old is at most what is known of runs and versions, when they go


def collect_garbage(root: Root, keep: int, live_sets: Callable[[], set[str]]) -> list[str]:
    """Deletes what none of the last `keep` versions names; returns the names of what went.

    An index goes with its version, and of its training and parts what no kept version can use. `live_sets`: the sets
    that runs are writing now. What such a set holds stays, and so does every list of files: a commit may be about to
    name them. Candidates are listed first, so that what appears meanwhile is none of them; old versions go first, so
    that no reader finds one whose files are gone. What a run or a rollback takes up while others go is looked up anew
    before each slice; sets that were in one answer stay spared.
    """
    candidates = {*root.list("versions"), *root.list("sets"), *root.list(FOLDER)}
    live = live_sets()
    known = numbers(root)
    dropped, kept = known[:-keep], known[-keep:]
    named = _named(root, kept, candidates)
    deleted = [name for n in dropped if (name := version_name(n)) in candidates]
    for name in deleted:
        root.delete(name)

    def may_go(name: str) -> bool:
        is_live = bool(live) if name.startswith("versions/") else name.split("/")[1] in live
        return not is_live and name not in named

    rest = sorted(filter(may_go, candidates - set(deleted)))
    newest = known[-1] if known else 0
    for at in range(0, len(rest), SLICE):
        live = live | live_sets()
        if new := [n for n in numbers(root) if n > newest]:
            named |= _named(root, new, candidates)
            newest = new[-1]
        going = list(filter(may_go, rest[at : at + SLICE]))
        for _ in ordered(root.delete, going, DELETES_AT_ONCE):
            pass
        deleted += going
    root.clear_scratch(OLD_SCRATCH_S)
    return deleted


def _named(root: Root, kept: list[int], candidates: set[str]) -> set[str]:
    """All that these versions name."""
    named, indexes = set[str](), read_all(root)
    for version in (current(root, n) for n in kept):
        files = read_list(root, version)
        named |= {version.files, version_name(version.version), f"sets/{version.set}/set.json"}
        for kind in files.kinds():
            named.update(files.names(kind))
        named.update(name for name in index_names(version, files, indexes, candidates) if name in candidates)
    return named
