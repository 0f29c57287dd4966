"""The whole of `embed`, from top to bottom: list → plan → embed on Ray → collect → gate → commit."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from pipeline import actors, cluster, head, machine, signals, site, versions, weights
from pipeline.config import RunConfig, VectorSet
from pipeline.embed import Job, Receipt
from pipeline.errors import (
    AGAIN,
    COMMITTED,
    FAILED,
    INTERRUPTED,
    REFUSED,
    STALLED,
    Stalled,
    StorageError,
    UsageError,
)
from pipeline.feeders import STREAMS
from pipeline.journal import Journal
from pipeline.layout import Layout, lay_out, threads_alone
from pipeline.listing import Shard, check_columns, list_shards
from pipeline.lists import FileList
from pipeline.meters import Meters
from pipeline.output import Root
from pipeline.progress import Display, Note, State
from pipeline.receipts import Ledger
from pipeline.result import ENDS, Result, dry, plan_line, reasons, report, stalled, summary
from pipeline.rows import package_versions
from pipeline.sets import check_device, decoding_note, vector_set
from pipeline.speed import Means, Sums
from pipeline.watch import Failed, watch

FAILED_SHARDS = 10  # after so many, and more than half of all, the run is not going to end well


class Refused(Exception):
    """A gate kept the result from becoming a version."""


class Gates(Protocol):
    """What a run's caller asks beyond the reject rate; raises `Refused`, or `Failed`."""

    def before_work(self, run: "Run") -> None:
        """When it is known what is to do."""

    def before_commit(self, run: "Run", files: FileList, before: versions.Version | None) -> None:
        """`files`: the result's, of all shards. `before`: the current version; asked again where that is another."""


@dataclass
class Run:
    """One run: what it has before it, all resolved, and what has become of it so far."""

    config: RunConfig
    root: Root
    shards: list[Shard]
    before: versions.Version | None  # that was current when the shards were listed
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
    ledger: Ledger = field(default_factory=Ledger)
    failed: list[Receipt] = field(default_factory=list)
    means: Means = field(default_factory=lambda: Means(cores=1, threads=1))
    gates: dict[str, Any] = field(default_factory=dict)  # what they measured


def embed(config: RunConfig, say: Callable[[str], None], gates: Gates | None = None) -> Result:
    """Embeds what the output lacks and commits a version. `say` gets a line for a person at each step.

    Raises `UsageError` for whatever can be found wrong before any work, and `KeyboardInterrupt`, of SIGTERM too, before
    it; everything later is in the `Result`. From the commit on signals wait: a result that says committed is returned.
    """
    is_early = not config.dry_run and head.is_early(config.output)
    with (
        signals.interruptible(),
        cluster.used(config.ray_address, say),
        # Where no cluster is used a local Ray starts while the input is listed and the model loaded.
        head.starting(is_early, config.feeders or 0),
    ):
        try:
            return _embed(config, say, gates)
        except Stalled as e:  # while planning: no node came, nothing has been written
            return stalled(e, config.output)


def _embed(config: RunConfig, say: Callable[[str], None], gates: Gates | None) -> Result:
    run = plan(config, say)
    if config.dry_run:
        say(plan_line(run))
        return Result(COMMITTED, "dry run: nothing was read or written", dry(run))
    versions.create_set(run.root, run.vectors.folder, run.vectors.as_dict() | {"set": run.vectors.name})
    run.root.clear_scratch(versions.OLD_SCRATCH_S)
    say(plan_line(run))
    state = State(set=run.vectors.name, shards=len(run.shards), shards_unchanged=len(run.shards) - len(run.todo))
    state.machine, state.packages = machine.facts(run.device), package_versions()
    note, meters = Note(run.root, state), Meters(state, run.root.url, run.before)
    files = FileList.of([])
    try:
        if gates:
            gates.before_work(run)
        if run.todo:
            _embed_todo(run, state, meters, say)
        files = _collect(run)
        _gate(config, files)
        if gates:
            gates.before_commit(run, files, versions.read_version(run.root))
        signals.hold()  # until the result is told, or whoever called listens again
        version = _commit(run, files, say, gates)
        meters.succeed(version)
    except Refused as e:
        ended = Result(REFUSED, str(e))
    except Stalled as e:
        ended = Result(STALLED, f"{e}; {AGAIN}")
    except (Failed, StorageError, OSError) as e:
        ended = Result(FAILED, f"{e}; {AGAIN}")
    except KeyboardInterrupt:
        ended = Result(INTERRUPTED, f"interrupted; {AGAIN}")
    except BaseException:
        run.ledger.put(run.root, state.name)
        note.close("failed")
        raise
    else:
        told = report(run, files, version)
        what = f"version {version.version} of {run.root.url}" if version else f"metrics of {run.vectors.name}"
        ended = Result(COMMITTED, f"{what}: {summary(told)}", told)
    run.journal.put()
    run.ledger.put(run.root, state.name)
    state.message = ended.message
    state.result = ended.json or report(run, files, None)
    note.close(ENDS[ended.exit_code])
    return replace(ended, json=state.result)


def plan(config: RunConfig, say: Callable[[str], None]) -> Run:
    """Lists the input, loads the model, and compares with what the output has. Reads no shard, writes nothing there.

    Where there is work, the engine is proven on the model first; `say` hears of what it cannot do.
    """
    started = time.monotonic()
    root = versions.open_output(config.output)
    before = versions.read_version(root)
    shards = _list(config, root)
    device = site.resolve_device(config)
    check_device(config, device)
    site.check_decoding(config, device)
    module = weights.load_module(config.model, config.weights, config.adapt)
    vectors, labels = vector_set(config, module, site.resolve_precision(config, device, say))
    todo = _todo(root, vectors, shards)
    engine, fallback = config.engine, ""
    if todo and (note := decoding_note(vectors, is_here=not cluster.is_shared())):
        say(note)
    if todo and engine != "eager":
        if engine == "compile":
            say(f"compiling {config.model}: about a minute, the first time")
        threads, share = _worker(config, device, shards, todo, say)
        engine, fallback = site.resolve_engine(config, module, vectors, device, threads, share, say)
    if fallback:
        say(fallback)
        vectors = replace(vectors, engine=engine)
        todo = _todo(root, vectors, shards)
    check_columns(todo, config.columns)
    return Run(
        config=config,
        root=root,
        shards=shards,
        before=before,
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


def _worker(
    config: RunConfig, device: str, shards: Sequence[Shard], todo: Sequence[Shard], say: Callable[[str], None]
) -> tuple[int, float]:
    """Of each: torch's threads, and its share of a GPU. Compiled code goes by the ones, its batch by the other."""
    if device == "cpu" and not cluster.is_shared():
        return threads_alone(config, machine.cores(), machine.memory_bytes(), len(shards)), 1.0
    nodes = site.nodes_for(config, device, say) if cluster.is_shared() else [site.here()]
    layout = lay_out(config, device, nodes, len(shards), len(todo), cluster.can_grow())
    return _torch_threads(device, layout), _gpu_share(device, layout)


def _torch_threads(device: str, layout: Layout) -> int:
    """Threads that decode call torch's resize, each for itself; on a GPU the forward pass takes none of the CPU's."""
    return 1 if device == "cuda" else layout.threads


def _gpu_share(device: str, layout: Layout) -> float:
    return min(1.0, layout.gpus or 1 / layout.actors[1]) if device == "cuda" else 1.0


def _todo(root: Root, vectors: VectorSet, shards: Sequence[Shard]) -> list[Shard]:
    done = versions.done(root, vectors.folder)
    return [s for s in shards if versions.file_name(vectors.folder, "embeddings", s.name, s.etag) not in done]


def _list(config: RunConfig, root: Root) -> list[Shard]:
    return list_shards(config.inputs, format=config.format, columns=config.columns, exclude=root.url)


def _embed_todo(run: Run, state: State, meters: Meters, say: Callable[[str], None]) -> None:
    """Embeds what is to do, adding each receipt to the run as it comes. Raises `Failed` or `Stalled`."""
    staged = weights.stage(run.module, run.vectors.weights_sha256)
    run.module = None  # the actors load their own
    with cluster.local_ray(run.config.feeders or 0):
        nodes = site.nodes_for(run.config, run.device, say)
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
            torch_threads=_torch_threads(run.device, layout),
            gpu_share=_gpu_share(run.device, layout),
            feeders=layout.feeders,
        )
        content = site.share(staged) if cluster.is_shared() else None
        if layout.feeders and run.config.feeders is None:
            say(f"{layout.feeders} feeders a worker: most CPUs are on nodes without a GPU; --feeders 0: none")
        with meters.at(run.means.gpus), Display(state) as display, actors.Pool(job, run.todo, layout, content) as pool:
            for receipt in watch(pool, layout.actors, state, display, run.config.stall_timeout_s, say, meters.see):
                if pool.cores > run.means.cores:  # an autoscaler has brought some
                    run.means = replace(run.means, cores=pool.cores)
                run.sums.add(receipt)
                run.ledger.add(receipt)
                meters.add(receipt)
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
            f"--max-reject-rate is {config.max_reject_rate:.2%}): {reasons(total.rejects)}; no version was committed"
        )


def _commit(run: Run, files: FileList, say: Callable[[str], None], gates: Gates | None) -> versions.Version | None:
    """The version; None where metrics alone would take the place of vectors that readers use."""

    def stays(before: versions.Version | None) -> bool:
        with signals.heard():  # drift may take minutes to measure again, and nothing is committed yet
            if before and before != run.before and (how := _has_changed(run)):
                raise Failed(f"{how}, and version {before.version} was committed meanwhile")
            if before and run.config.only_metrics and "embedding" in versions.outputs_of(run.root, before):
                return True
            if gates:
                gates.before_commit(run, files, before)
        return False

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
