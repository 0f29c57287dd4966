"""Rollback: the files of an earlier version become the current one again, as a new version.

What was rolled away is noted in it, and `held` tells a scheduled job that its result is what was rolled away:

- From one set to another, a model or its preprocessing was rolled away: that set is held, also over a changed input,
  or the first new shard would bring it back overnight.
- Within a set, an input was rolled away: that list of files is held. A changed input passes.

Whatever is committed on top of the rollback ends the hold: another set, a changed input, or what was held, by a run
that was told to, or by a plain `embed`, which a person starts.
"""

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import StorageError, UsageError
from pipeline.output import Root
from pipeline.versions import Version, append, current, now, numbers, read_list, sizes_of


def roll_back(root: Root, to: int | None = None) -> Version:
    """Commits a version with the files of version `to`; by default of the one before the current.

    Before a version that is a rollback itself comes the one before that to which it went, so that it can be said again.
    The same where the current version has these files already. Raises `UsageError` where there is no such version, or
    `gc` has deleted files of it; `StorageError` where it did so just now, so that the new version lacks them.
    """
    target = current(root, _before(root) if to is None else to)
    if gone := _gone(root, target):
        raise UsageError(
            f"version {target.version} of {root.url} cannot come back: {len(gone)} of its files are gone or "
            f"altered, among them {gone[0]}"
        )

    def after(before: Version | None) -> Version:
        assert before is not None
        if before.files == target.files:
            return before
        number = before.version + 1
        away = _away(root, target, before)
        return replace(
            target,
            version=number,
            created=now(),
            removed=[],
            rolled_back={"to": target.version, "away": away},
        )

    version = append(root, after)
    assert version is not None
    if gone := _gone(root, version):
        raise StorageError(
            f"version {version.version} of {root.url} is now the current one and lacks {len(gone)} files, among them "
            f"{gone[0]}: gc deleted them meanwhile, roll back to another version"
        )
    return version


def held(before: Version | None, set_name: str, list_name: str | None) -> str:
    """Why a result would undo the rollback that the version before is; "" where it would not.

    `list_name`: of the result's files, None where they are not known yet.
    """
    if before is None or not before.rolled_back:
        return ""
    for one in before.rolled_back["away"]:
        is_set = one["set"] == set_name != before.set
        if is_set or one["files"] == list_name:
            what = f"set {set_name}" if is_set else f"the files of version {one['version']}"
            return (
                f"version {before.version} rolled back to version {before.rolled_back['to']}, away from {what}: "
                "change the job, or bring it back with --after-rollback"
            )
    return ""


def _before(root: Root) -> int:
    """The number of the version that a rollback without a number goes to."""
    now_current = current(root)
    start = now_current.rolled_back["to"] if now_current.rolled_back else now_current.version
    for number in reversed(numbers(root)):
        if number < start and current(root, number).files != now_current.files:
            return number
    raise UsageError(f"{root.url} has no version before {start} to roll back to: gc deletes what --keep does not keep")


def _away(root: Root, target: Version, before: Version) -> list[dict[str, Any]]:
    """What is newer than the target and has other files, each list once; what gc deleted is in the last rollback."""
    newer = [current(root, n) for n in numbers(root) if n > target.version]
    noted = {v.files: {"version": v.version, "set": v.set, "files": v.files} for v in reversed(newer)}
    earlier = {one["files"]: one for one in before.rolled_back.get("away", ())}
    return sorted(
        (one for one in (earlier | noted).values() if one["files"] != target.files), key=lambda one: int(one["version"])
    )


def _gone(root: Root, version: Version) -> list[str]:
    """Files of the version that are not there with their sizes, of the first kind that lacks any."""
    listed = read_list(root, version)
    for kind in listed.kinds():
        names = listed.column(kind)
        there = sizes_of(root, f"sets/{version.set}/{kind}", names)
        is_gone = pc.and_(pc.is_valid(names), pc.fill_null(pc.not_equal(there, listed.column(f"{kind}_bytes")), True))
        if gone := names.filter(pa.chunked_array([is_gone.combine_chunks()])).to_pylist():
            return list(gone)
    return []
