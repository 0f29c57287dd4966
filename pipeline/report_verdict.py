"""A report's figures → what a reader wants to know first, in sentences."""

from collections.abc import Mapping

from pipeline.progress import outcome
from pipeline.report_figures import Figures

ENDS = {
    "running": "is still running",
    "died": "died before it ended: run the same command to go on",
    "failed": "failed: run the same command to go on",
    "refused": "was refused by a gate",
    "stalled": "stalled and was ended: run the same command to go on",
    "interrupted": "was interrupted: run the same command to go on",
}
LIMITS = {
    "read": "the store and reading out of shards",
    "decode": "decoding images",
    "transfer": "making batches for the device",
    "forward": "the forward pass",
    "write": "writing Parquet",
}


def reasons(counts: Mapping[str, int]) -> str:
    """`3 corrupt, 1 truncated`, the largest first."""
    return ", ".join(f"{n:,} {reason}" for reason, n in sorted(counts.items(), key=lambda one: (-one[1], one[0])))


def rate(images_per_s: float) -> str:
    return f"{images_per_s:,.0f}" if images_per_s >= 10 else f"{images_per_s:.1f}"


def _plural(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def verdict(f: Figures) -> str:
    """What ran, how many rows and rejects, what limited it, and what became of it."""
    total = f.files.totals
    share = f" ({total.rejected / total.samples:.1%})" if total.rejected else ""
    rejects = f"{_plural(total.rejected, 'sample')}{share} {'was' if total.rejected == 1 else 'were'} rejected"
    rejects = rejects if total.rejected else "no sample was rejected"
    if f.run is None:
        assert f.version is not None
        return f"Version {f.version.version} holds {_plural(total.rows, 'row')}; {rejects}."
    told = f.run.result
    if f.run.state != "committed":
        so_far = f"Its set has {_plural(total.rows, 'row')} in {_plural(len(f.files), 'shard')}; {rejects}."
        return f"The run {ENDS.get(outcome(f.run), outcome(f.run))}. {so_far}"
    if told["shards_embedded"]:
        fresh = _plural(told["shards_embedded"], "shard")
        of = "" if told["shards_embedded"] == told["shards"] else f" of {told['shards']:,}"
        did = f"Embedded {fresh}{of} at {rate(told['images_per_s'])} images/s, {_limited(told['limited_by'])}."
    else:
        did = f"Nothing was to embed: all {_plural(told['shards'], 'shard')} were done before."
    where = f"Version {f.version.version}" if f.version else "The set"
    return f"{did} {where} holds {_plural(total.rows, 'row')}; {rejects}."


def _limited(by: str) -> str:
    return f"limited by {LIMITS[by]}" if by in LIMITS else "limited by nothing that was always busy"


def limits(f: Figures) -> str:
    """What to do about what limited the run; "" where nothing did."""
    by = f.run.result.get("limited_by") if f.run else None
    return {
        "read": "More actors read more shards at once; a nearer or faster store, or larger shards, help most.",
        "decode": "More cores, or `--feeders` on other machines, decode more; `--decode fast` takes half the time of "
        "`exact`, and `scaled` less for large images.",
        "transfer": "Fewer, larger batches help; so does a second actor on the device.",
        "forward": "A faster `--engine`, `--precision bf16`, or more devices help; `shard2vec bench` tells which.",
        "write": "Leave out tokens or features that nobody reads, or write to a faster store.",
        "waiting": "A run of few images or few shards starts and ends more than it works; else other programs took "
        "the cores.",
    }.get(str(by), "")
