"""The scheduled job: lease → list → diff → embed what changed → gates → commit → clean up.

Two starts at once are one run: the second finds the lease taken, does nothing and ends well. What stands between a
result and the current version, beside the reject rate of every run:

    rows             at least so many
    shrinkage        not so much smaller than the current version: a prefix that was emptied by mistake
    rollback         what was rolled away does not come back by itself (`rollback.held`)
    drift            where the set changed, on shards whose input did not: neighbour overlap, top-1 agreement

Drift is measured whenever the set changed, and refused where a bound is given: another model shares few neighbours with
the last one and is right for all that, so no bound would fit by default. A refused result keeps its files: the same
command with another bound has only to commit. Until it does, readers see the current version, whichever set it is of.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pipeline import cluster, signals, versions
from pipeline.bill import bill
from pipeline.compare import Drift, Side, drift
from pipeline.config import RunConfig
from pipeline.errors import COMMITTED, Stalled, StorageError, UsageError
from pipeline.garbage import collect_garbage
from pipeline.lease import TIMEOUT_S, Lease, Lost, Taken, holder
from pipeline.lists import FileList
from pipeline.output import Root
from pipeline.progress import looks, sets_in_use
from pipeline.result import ENDS, Result, idle, plan_line, stalled
from pipeline.rollback import held
from pipeline.run import Refused, Run, embed, plan
from pipeline.versions import Version
from pipeline.watch import Failed

USUAL_SHRINK, USUAL_SHRINK_ROWS = 0.5, 10_000


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a scheduled job asks beyond its run. Raises `UsageError` naming the value that cannot be."""

    min_rows: int = 1  # an input of empty shards makes no version
    max_shrink: float | None = None  # share of the current version's rows; None: 0.5, where it has 10,000 or more
    min_overlap: float | None = None  # of ten nearest neighbours, 0…1; None: measured, not refused
    min_top1_agreement: float | None = None  # share of images, 0…1
    keep: int | None = 3  # versions, the current one among them: two to roll back to; None: all
    after_rollback: bool = False  # lets what was rolled away come back
    lease_timeout_s: float = TIMEOUT_S

    def __post_init__(self) -> None:
        if self.min_rows < 0:
            raise UsageError(f"--min-rows {self.min_rows}: must be 0 or more")
        if self.keep is not None and self.keep < 1:
            raise UsageError(f"--keep {self.keep}: must be 1 or more, or all: the current version always stays")
        for flag in ("max_shrink", "min_overlap", "min_top1_agreement"):
            value = getattr(self, flag)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"--{flag.replace('_', '-')} {value}: must lie between 0 and 1")


def reembed(config: RunConfig, terms: Terms, say: Callable[[str], None]) -> Result:
    """One scheduled run. Its `json` has the keys of `embed`'s, and `result`, `lease`, `version_before`, `deleted`.

    `result`: committed, unchanged, taken, or how else it ended. Raises `UsageError` for what is wrong before any work.
    """
    root = versions.open_output(config.output)
    before = versions.read_version(root)
    if config.dry_run:
        return _dry(config, root, before, say)
    try:
        with signals.interruptible(), Lease(root, terms.lease_timeout_s) as lease:
            before = versions.read_version(root)
            ended = embed(config, say, _Gates(terms, lease))
            number = before.version if before else None
            # No version: metrics beside vectors.
            is_new = ended.exit_code == COMMITTED and ended.json["version"] not in (None, number)
            cleaned = _clean_up(root, terms.keep, lease, is_new, say) if ended.exit_code == COMMITTED else {}
    except Taken as e:
        told = {"result": "taken", "lease": f"taken-by {e}", "version_before": before.version if before else None}
        return Result(COMMITTED, f"nothing done: the lease on {root.url} is held by {e}", idle(root.url, before) | told)
    word = ENDS[ended.exit_code] if is_new or ended.exit_code != COMMITTED else "unchanged"
    return replace(ended, json=ended.json | {"result": word, "lease": "held", "version_before": number} | cleaned)


def _dry(config: RunConfig, root: Root, before: Version | None, say: Callable[[str], None]) -> Result:
    try:
        with cluster.used(config.ray_address, say):
            run = plan(config, say)
    except Stalled as e:
        ended = stalled(e, root.url)
        return replace(ended, json=ended.json | {"result": ENDS[ended.exit_code]})
    say(plan_line(run))
    told, message = bill(run, before)
    taken = holder(root)
    return Result(
        COMMITTED,
        f"dry run, nothing was read or written: {message}" + (f"; the lease is held by {taken}" if taken else ""),
        told | {"result": "dry-run", "lease": f"taken-by {taken}" if taken else "free"},
    )


class _Gates:
    """What `run.embed` asks before it works and before it commits."""

    def __init__(self, terms: Terms, lease: Lease):
        self._terms, self._lease = terms, lease
        self._asked: list[int] = []  # versions that the result was held against

    def before_work(self, run: Run) -> None:
        """A model that was rolled away embeds nothing either."""
        if not self._terms.after_rollback and (why := held(run.before, run.vectors.name, None)):
            raise Refused(why)

    def before_commit(self, run: Run, files: FileList, before: Version | None) -> None:
        number = before.version if before else 0
        if number not in self._asked:
            self._ask(run, files, before)
            self._asked.append(number)
        try:
            self._lease.check()
        except Lost as e:
            raise Failed(f"{e}: nothing was committed") from e

    def _ask(self, run: Run, files: FileList, before: Version | None) -> None:
        terms, rows = self._terms, files.totals.rows
        wrong = [f"{rows:,} rows, --min-rows is {terms.min_rows:,}"] if rows < terms.min_rows else []
        if before:
            run.gates |= {"against": before.version, "rows_before": before.rows, "drift": None}
            wrong += [w for w in (self._shrunk(before, rows), self._rolled_back(run, files, before)) if w]
        if before and before.set != run.vectors.name:
            moved = self._drift(run, files, before)
            run.gates["drift"] = moved.as_dict() if moved else None
            for measure, flag, least in (
                ("overlap_at_10", "--min-overlap", terms.min_overlap),
                ("top1_agreement", "--min-top1-agreement", terms.min_top1_agreement),
            ):
                value = getattr(moved, measure, None)
                if least is not None and value is None:
                    why = moved.unmeasured[measure] if moved else "the current version cannot be read"
                    wrong.append(f"{measure} cannot be measured ({why}), {flag} is {least:g}")
                elif least is not None and value is not None and value < least:
                    wrong.append(f"{measure} is {value:.4f}, {flag} is {least:g}")
        if wrong:
            stays = f"version {before.version} stays" if before else "there is no version"
            raise Refused(f"{'; '.join(wrong)}; no version was committed, {stays}")

    def _shrunk(self, before: Version, rows: int) -> str:
        most = self._terms.max_shrink
        if most is None:
            most = USUAL_SHRINK if before.rows >= USUAL_SHRINK_ROWS else 1.0
        if rows >= before.rows * (1 - most):
            return ""
        return (
            f"{rows:,} rows are {1 - rows / before.rows:.0%} fewer than the {before.rows:,} of version "
            f"{before.version}, --max-shrink is {most:.0%}"
        )

    def _rolled_back(self, run: Run, files: FileList, before: Version) -> str:
        if self._terms.after_rollback or not before.rolled_back:
            return ""
        return held(before, run.vectors.name, versions.list_name(run.vectors.name, files))

    def _drift(self, run: Run, files: FileList, before: Version) -> Drift | None:
        """None where the current version is damaged and no bound needs it."""
        try:
            old = Side.of(f"version {before.version}", before.set, versions.read_list(run.root, before))
            new = Side.of(run.vectors.name, run.vectors.name, files)
            return drift(run.root, old, new, unchanged_only=True)
        except (StorageError, FileNotFoundError):
            if self._terms.min_overlap is not None or self._terms.min_top1_agreement is not None:
                raise
            return None


def _clean_up(root: Root, keep: int | None, lease: Lease, is_new: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Deletes what the kept versions do not name. What an unfinished run may go on from stays.

    A failure here takes nothing back, nor does a signal: the version is committed, and the next run cleans up.
    """
    if keep is None or (not is_new and len(versions.numbers(root)) <= keep):
        return {"deleted": 0}
    try:
        with signals.heard():
            lease.check()
            notes = looks(root)
            return {"deleted": len(collect_garbage(root, keep, lambda: sets_in_use(next(notes))))}
    except (Lost, StorageError, OSError, UsageError, KeyboardInterrupt) as e:  # UsageError: another gc was here
        say(f"the result is committed, and cleaning up failed: {str(e) or 'interrupted'}")
        return {"deleted": None}
