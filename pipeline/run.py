"""The whole of `embed`, from top to bottom: list → plan → embed on Ray → collect → gate → commit."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline import actors, cluster, head, machine, site, versions, weights
from pipeline.config import RunConfig, VectorSet
from pipeline.embed import Job, Receipt
from pipeline.errors import Stalled, StorageError, UsageError
from pipeline.feeders import STREAMS
from pipeline.journal import Journal
from pipeline.layout import lay_out, threads_alone
from pipeline.listing import Shard, check_columns, list_shards
from pipeline.lists import FileList
from pipeline.output import Root
from pipeline.progress import Display, Note, State
from pipeline.sets import check_device, vector_set
from pipeline.speed import Means, Sums
from pipeline.watch import Failed, watch

FAILED_SHARDS = 10  # after so many, and more than half of all, the run is not going to end well
COMMITTED, FAILED, REFUSED, STALLED, INTERRUPTED = 0, 1, 3, 4, 130
ENDS = {COMMITTED: "committed", FAILED: "failed", REFUSED: "refused", STALLED: "stalled", INTERRUPTED: "interrupted"}
AGAIN = "run the same command to go on"


class Refused(Exception):
    """A gate kept the result from becoming a version."""


@dataclass
class Run:
    """One run: what it has before it, all resolved, and what has become of it so far."""

    config: RunConfig
    root: Root
    shards: list[Shard]
    before: int  # the version that was current when the shards were listed; 0 where there was none
    vectors: VectorSet
    engine_fallback: str  # why the engine is not the one asked for; "" where it is
    labels: tuple[str, ...]
    module: Any  # the torch module, weights loaded
    device: str
    todo: list[Shard]
    removed: list[str]
    started: float  # time.monotonic()
    journal: Journal
    sums: Sums = field(default_factory=Sums)
    failed: list[Receipt] = field(default_factory=list)
    means: Means = field(default_factory=lambda: Means(cores=1, threads=1))


@dataclass
class Result:
    """How the run ended: the exit code, a sentence for a person, and the object of `--json`."""

    exit_code: int
    message: str
    json: dict[str, Any] = field(default_factory=dict)


def say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def embed(config: RunConfig, say: Callable[[str], None] = say_on_stderr) -> Result:
    """Embeds what the output lacks and commits a version. `say` gets a line for a person at each step.

    Raises `UsageError` for whatever can be found wrong before any work; everything later is in the `Result`.
    """
    is_early = not config.dry_run and head.is_early(config.output)
    # Where no cluster is used a local Ray starts while the input is listed and the model loaded.
    with cluster.used(config.ray_address, say), head.starting(is_early, config.feeders or 0):
        try:
            return _embed(config, say)
        except Stalled as e:  # while planning: no node came, nothing has been written
            return Result(STALLED, f"{e}; {AGAIN}")


def _embed(config: RunConfig, say: Callable[[str], None]) -> Result:
    run = plan(config, say)
    if config.dry_run:
        say(_describe(run))
        return Result(COMMITTED, "dry run: nothing was read or written", _dry(run))
    versions.create_set(run.root, run.vectors.folder, run.vectors.as_dict() | {"set": run.vectors.name})
    run.root.clear_scratch(versions.OLD_SCRATCH_S)
    say(_describe(run))
    state = State(set=run.vectors.name, shards=len(run.shards), shards_unchanged=len(run.shards) - len(run.todo))
    note = Note(run.root, state)
    files = FileList.of([])
    try:
        with _terminated_as_interrupted():
            if run.todo:
                _embed_todo(run, state, say)
            files = _collect(run)
            _gate(config, files)
            version = _commit(run, files, say)
    except Refused as e:
        ended = Result(REFUSED, str(e))
    except Stalled as e:
        ended = Result(STALLED, f"{e}; {AGAIN}")
    except (Failed, StorageError, OSError) as e:
        ended = Result(FAILED, f"{e}; {AGAIN}")
    except KeyboardInterrupt:
        ended = Result(INTERRUPTED, f"interrupted; {AGAIN}")
    except BaseException:
        note.close("failed")
        raise
    else:
        report = _report(run, files, version)
        what = f"version {version.version} of {run.root.url}" if version else f"metrics of {run.vectors.name}"
        ended = Result(COMMITTED, f"{what}: {_summary(report)}", report)
    run.journal.put()
    state.result = ended.json or _report(run, files, None)
    note.close(ENDS[ended.exit_code])
    return replace(ended, json=state.result)


def plan(config: RunConfig, say: Callable[[str], None] = say_on_stderr) -> Run:
    """Lists the input, loads the model, and compares with what the output has. Reads no shard, writes nothing there.

    Where there is work, the engine is proven on the model first; `say` hears of what it cannot do.
    """
    started = time.monotonic()
    root = versions.open_output(config.output)
    before = versions.read_version(root)
    shards = _list(config, root)
    device = site.resolve_device(config)
    check_device(config, device)
    module = weights.load_module(config.model, config.weights, config.adapt)
    vectors, labels = vector_set(config, module, site.resolve_precision(config, device, say))
    todo = _todo(root, vectors, shards)
    engine, fallback = config.engine, ""
    if todo:
        if engine == "compile":
            say(f"compiling {config.model}: about a minute, the first time")
        engine, fallback = site.resolve_engine(config, module, vectors, device, _threads(config, device, shards), say)
    if fallback:
        say(fallback)
        vectors = replace(vectors, engine=engine)
        todo = _todo(root, vectors, shards)
    check_columns(todo, config.columns)
    return Run(
        config=config,
        root=root,
        shards=shards,
        before=before.version if before else 0,
        vectors=vectors,
        engine_fallback=fallback,
        labels=labels,
        module=module,
        device=device,
        todo=sorted(todo, key=lambda s: (-s.size, s.name)),
        removed=versions.removed(root, before, vectors.name, {s.name for s in shards}),
        started=started,
        journal=Journal(root, vectors.name),
    )


def _threads(config: RunConfig, device: str, shards: Sequence[Shard]) -> int:
    """Of each worker: compiled code goes by them."""
    if cluster.is_shared():
        return lay_out(config, device, cluster.nodes(), len(shards), len(shards), cluster.can_grow()).threads
    return threads_alone(config, os.cpu_count() or 1, machine.memory_bytes(), len(shards))


def _todo(root: Root, vectors: VectorSet, shards: Sequence[Shard]) -> list[Shard]:
    done = versions.done(root, vectors.folder)
    return [s for s in shards if versions.file_name(vectors.folder, "embeddings", s.name, s.etag) not in done]


def _list(config: RunConfig, root: Root) -> list[Shard]:
    return list_shards(config.inputs, format=config.format, columns=config.columns, exclude=root.url)


def _embed_todo(run: Run, state: State, say: Callable[[str], None]) -> None:
    """Embeds what is to do, adding each receipt to the run as it comes. Raises `Failed` or `Stalled`."""
    staged = weights.stage(run.module, run.vectors.weights_sha256)
    run.module = None  # the actors load their own
    with cluster.local_ray(run.config.feeders or 0):
        nodes = cluster.nodes()
        layout = lay_out(run.config, run.device, nodes, len(run.shards), len(run.todo), cluster.can_grow())
        most, threads = layout.actors[1], layout.threads
        run.means = Means(
            cores=max(1, sum(node.cpus for node in nodes)),
            threads=threads,
            gpus=layout.gpus or (1 / most if run.device == "cuda" else 0.0),  # Ray need not know that one is shared
            streams=layout.feeders * STREAMS,
        )
        job = Job(
            vectors=run.vectors,
            labels=run.labels,
            weights=str(staged),
            adapt=run.config.adapt.of_classes(run.vectors.classes),
            output=run.root.url,
            device=run.device,
            batch_size=run.config.batch_size,
            decode_threads=threads,
            # Threads that decode call torch's resize, each for itself; the forward pass takes none of the CPU's.
            torch_threads=1 if run.device == "cuda" else threads,
            gpu_share=min(1.0, layout.gpus or 1 / most),
            feeders=layout.feeders,
        )
        content = site.share(staged) if cluster.is_shared() else None
        if layout.feeders and run.config.feeders is None:
            say(f"feeders: {layout.feeders * most}, for nodes without a GPU have most of the CPUs; --feeders 0: none")
        with Display(state) as display, actors.Pool(job, run.todo, layout, content) as pool:
            for receipt in watch(pool, layout.actors, state, display, run.config.stall_timeout_s, say):
                run.sums.add(receipt)
                if receipt.files:
                    run.journal.add(receipt.files)
                if receipt.error:
                    run.failed.append(receipt)
                    say(f"shard {receipt.shard} failed: {receipt.error}")
                _check_failures(run)
    _check_failures(run, finished=True)


def _check_failures(run: Run, finished: bool = False) -> None:
    failed = run.failed
    if failed and (finished or (len(failed) >= FAILED_SHARDS and len(failed) > run.sums.receipts / 2)):
        raise Failed(f"{len(failed)} of {len(run.todo)} shards failed, the first one with: {failed[0].error}")


class _terminated_as_interrupted:
    """SIGTERM, as schedulers send it, ends the run like Ctrl-C: cleanly and resumable."""

    def __enter__(self) -> None:
        self._ours = threading.current_thread() is threading.main_thread()
        if self._ours:
            self._before = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGTERM, self._before)


def _collect(run: Run) -> FileList:
    """The files of all shards: by receipt, of this run or an unfinished one, by the version before, else by footers."""
    before = versions.read_version(run.root)
    listed = versions.read_list(run.root, before) if before and before.set == run.vectors.name else FileList.of([])
    return versions.collect(run.root, run.vectors.folder, run.shards, run.journal.read() + listed)


def _gate(config: RunConfig, files: FileList) -> None:
    total = files.totals
    if total.samples and total.rejected > config.max_reject_rate * total.samples:
        raise Refused(
            f"{total.rejected} of {total.samples} samples were rejected ({total.rejected / total.samples:.2%}, "
            f"--max-reject-rate is {config.max_reject_rate:.2%}): {_reasons(total.rejects)}; no version was committed"
        )


def _commit(run: Run, files: FileList, say: Callable[[str], None]) -> versions.Version | None:
    """The version; None where metrics alone would take the place of vectors that readers use."""

    def stays(before: versions.Version) -> bool:
        if before.version != run.before and (how := _has_changed(run)):
            raise Failed(f"{how}, and version {before.version} was committed meanwhile")
        return run.config.only_metrics and "embedding" in versions.outputs_of(run.root, before)

    version = versions.commit(run.root, run.vectors.name, files, stays)
    if version:
        run.journal.drop()
    else:
        say("the current version and its vectors stay: metrics make no version beside them")
    return version


def _has_changed(run: Run) -> str:
    """How, or "": a run that stood still for a week must not bring the input of that day back."""
    try:
        now = _list(run.config, run.root)
    except UsageError as e:
        return f"the input cannot be listed again ({e})"
    is_same = len(now) == len(run.shards) and all(
        (a.name, a.etag) == (b.name, b.etag) for a, b in zip(now, run.shards, strict=True)
    )
    return "" if is_same else "the input has changed"


def _reasons(rejects: dict[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in sorted(rejects.items(), key=lambda r: (-r[1], r[0]))) or "none"


def _report(run: Run, files: FileList, version: versions.Version | None) -> dict[str, Any]:
    """The object of `embed --json`; counts are over all shards of the result, speed over what this run embedded."""
    sums = run.sums
    total = files.totals if files else sums.counts
    seconds = time.monotonic() - run.started
    accuracy: dict[str, Any] = {}
    if total.labelled or run.config.only_metrics:
        accuracy = {"labelled": total.labelled}
    if total.labelled:
        hits = {"top1": total.top1 / total.labelled, "top5": total.top5 / total.labelled}
        accuracy |= hits
    return {
        "set": run.vectors.name,
        **_engine(run),
        "version": version.version if version else None,
        "output": run.root.url,
        "shards": len(run.shards),
        "shards_embedded": sums.shards,
        "shards_unchanged": len(run.shards) - len(run.todo),
        "shards_removed": len(run.removed),
        "samples": total.samples,
        "rows": total.rows,
        "rejects": dict(sorted(total.rejects.items())),
        "seconds": round(seconds, 3),
        **sums.speed(run.means).as_dict(),
        "images_per_s_all_in": round(sums.samples / seconds, 2),
        "stage_seconds": {stage: round(s, 3) for stage, s in sums.stage_seconds.items()},
        "bytes_read": sums.bytes_read,
        "failed": [{"shard": r.shard, "error": r.error} for r in run.failed],
        "removed": run.removed,
        **accuracy,
    }


def _summary(result: dict[str, Any]) -> str:
    rejects = sum(result["rejects"].values())
    parts = [f"{result['rows']:,} rows, {rejects:,} rejects ({_reasons(result['rejects'])})"]
    if result["shards_removed"]:
        parts.append(f"{result['shards_removed']} shards removed: {', '.join(result['removed'][:3])}")
    if "top1" in result:
        of = f"the labels of {result['labelled']:,} images"
        parts.append(f"top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%} against {of}")
    elif result.get("labelled") == 0:
        parts.append("no accuracy: no image has a label of this model's classes")
    return "; ".join([*parts, result["speed"]])


def _describe(run: Run) -> str:
    vectors, count = run.vectors, len(run.shards)
    columns = ", ".join(f"{f.column} {'+'.join('x'.join(map(str, s)) for s in f.shapes)}" for f in vectors.tensors)
    what = f"{vectors.dim}-d embeddings" if "embedding" in vectors.outputs else "metrics only"
    return (
        f"{vectors.name}: {what}{f', {columns}' if columns else ''}, "
        f"{vectors.precision} on {run.device} ({vectors.engine}); "
        f"{count} shards, {len(run.todo)} to embed, {count - len(run.todo)} unchanged, {len(run.removed)} removed"
    )


def _engine(run: Run) -> dict[str, Any]:
    return {"engine": run.vectors.engine, "engine_fallback": run.engine_fallback or None}


def _dry(run: Run) -> dict[str, Any]:
    return {
        "dry_run": True,
        "set": run.vectors.name,
        **_engine(run),
        "output": run.root.url,
        "shards": len(run.shards),
        "shards_to_embed": len(run.todo),
        "shards_unchanged": len(run.shards) - len(run.todo),
        "shards_removed": len(run.removed),
        "bytes_to_read": sum(s.size for s in run.todo),
        "to_embed": [s.name for s in run.todo],
        "removed": run.removed,
        "seconds": round(time.monotonic() - run.started, 3),
    }
