"""What a run would cost, before it runs: shards, images, hours. What is not known is estimated, and said to be."""

from typing import TYPE_CHECKING, Any

from pipeline import versions
from pipeline.progress import State, duration, read_notes
from pipeline.result import dry
from pipeline.versions import Version

if TYPE_CHECKING:
    from pipeline.run import Run

NOTES = 100  # former runs that are asked for their speed, newest first


def bill(run: "Run", before: Version | None) -> tuple[dict[str, Any], str]:
    """The object of `--dry-run --json`, and a sentence.

    `images`: counted where the current version has the shard with the same input, elsewhere by bytes an image: of those
    shards, or of former runs. `hours`: at the steady rate of the last run of this set, or of any; None where nothing
    tells.
    """
    notes = [n for n in reversed(read_notes(run.root, newest=NOTES)) if n.result.get("samples_embedded")]
    counted, rest, bytes_per_image, source = _images(run, before, notes)
    images = None if rest and bytes_per_image is None else counted + round(rest / (bytes_per_image or 1))
    images_per_s, of = _speed(run, notes)
    hours = images / images_per_s / 3600 if images is not None and images_per_s else None
    told = dry(run) | {
        "images": images,
        "images_estimated": bool(rest),
        "images_from": source,
        "images_per_s": images_per_s,
        "images_per_s_from": of,
        "hours": 0.0 if images == 0 else hours,
    }
    return told, _sentence(told)


def _images(run: "Run", before: Version | None, notes: list[State]) -> tuple[int, int, float | None, str]:
    """Images that were counted, bytes of the shards that were not, bytes an image, and where all that is from."""
    known: dict[tuple[str, str], int] = {}
    if before is not None:
        listed = versions.read_list(run.root, before)
        columns = (listed.column(name).to_pylist() for name in ("shard", "etag", "samples"))
        known = {(shard, etag): samples for shard, etag, samples in zip(*columns, strict=True)}
    counted = sum(known.get((s.name, s.etag), 0) for s in run.todo)
    rest = sum(s.size for s in run.todo if (s.name, s.etag) not in known)
    if not rest:
        return counted, 0, None, f"counted by version {before.version}" if counted and before else "nothing to embed"
    alike = [(s.size, known[s.name, s.etag]) for s in run.shards if (s.name, s.etag) in known]
    if images := sum(n for _, n in alike):
        return counted, rest, sum(size for size, _ in alike) / images, "bytes an image of the current version's shards"
    for note in notes:
        if note.result.get("bytes_read"):
            share = note.result["bytes_read"] / note.result["samples_embedded"]
            return counted, rest, share, f"bytes an image of the run of set {note.set}"
    return counted, rest, None, "no former run to estimate by"


def _speed(run: "Run", notes: list[State]) -> tuple[float | None, str]:
    for note in sorted(notes, key=lambda n: n.set != run.vectors.name):  # stable: the newest of this set, then of any
        if note.result.get("images_per_s"):
            other = "" if note.set == run.vectors.name else f", of another set, {note.set}"
            return note.result["images_per_s"], f"the last run{other}"
    return None, "no former run to go by"


def _sentence(told: dict[str, Any]) -> str:
    about = "about " if told["images_estimated"] else ""
    images = "unknown" if told["images"] is None else f"{about}{told['images']:,}"
    parts = [f"shards to embed: {told['shards_to_embed']:,}; images: {images} ({told['images_from']})"]
    if told["shards_to_embed"]:
        rate = f", at the {told['images_per_s']:,.1f} images/s of" if told["hours"] is not None else ":"
        time = "unknown" if told["hours"] is None else f"about {duration(3600 * told['hours'])}"
        parts.append(f"time: {time}{rate} {told['images_per_s_from']}")
    gone = told["removed"]
    names = f" ({', '.join(gone[:3])}{' …' if len(gone) > 3 else ''})" if gone else ""
    return "; ".join([*parts, f"shards to drop: {len(gone):,}{names}"])
