"""`bench`: what each stage costs on this machine, what limits a run, how fast it can be, and with which setting."""

import io
import shlex
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table

from jobs import exits, flags

IMAGES, WIDTH, HEIGHT, QUALITY = 64, 500, 375, 92  # where no input is named: of the size and weight of ImageNet's


def bench(
    model: Annotated[str, typer.Option(help="Any timm name, hf-hub:… or local-dir:…")] = "pit_s_224",
    input: Annotated[
        list[str] | None, typer.Option(help="Your images, as for embed; repeatable [photo-like ones are made]")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="As for embed; speed does not depend on them [random:0]")] = None,
    outputs: Annotated[str | None, typer.Option(help="As for embed")] = None,
    image_size: Annotated[str | None, typer.Option(help="H or HxW [the model's own]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    decode: Annotated[str | None, typer.Option(help="This one alone [each]")] = None,
    engine: Annotated[str | None, typer.Option(help="This one alone [each that starts soon]")] = None,
    precision: Annotated[str | None, typer.Option(help="This one alone [each that the hardware has]")] = None,
    batch_size: Annotated[str, typer.Option(help="This one alone [several]")] = "auto",
    actors: Annotated[int | None, typer.Option(min=1, help="So many processes [for this machine]")] = None,
    seconds: Annotated[float, typer.Option(help="To measure for; starting and compiling comes on top")] = 60,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, last")] = False,
    config: Annotated[str | None, typer.Option(help="A YAML file of these flags; the command line wins")] = None,
) -> None:
    """Measure this machine: each stage's cost, the ceiling, what limits, and the setting to use.

    Example: shard2vec bench --model pit_s_224 --seconds 60
    """

    def body() -> int:
        from pipeline.bench import Asked, Bench
        from pipeline.config import Adapt, RunConfig

        with tempfile.TemporaryDirectory(prefix="shard2vec-bench-") as scratch:
            asked = Asked(
                config=RunConfig(
                    inputs=tuple(input) if input else (str(_make_images(Path(scratch))),),
                    output=f"{scratch}/out",
                    model=model,
                    weights=weights or "random:0",
                    outputs=flags.words(outputs),
                    adapt=Adapt(image_size=flags.size(image_size)),
                    precision=precision or "auto",
                    engine=engine or "eager",
                    decode=decode or "exact",
                    batch_size=flags.batch_size(batch_size),
                    actors=(actors, actors) if actors else None,
                    device=device,
                ),
                seconds=seconds,
                decode=decode,
                engine=engine,
                precision=None if precision == "auto" else precision,
            )
            result = Bench(asked, exits.say)()
        given = [word for url in input or ["shards/*.tar"] for word in ("--input", url)]
        given += ["--output", "out", *(["--weights", weights] if weights else [])]
        result["command"] = f"shard2vec embed {' '.join(map(shlex.quote, [*given, *result.pop('flags')]))}"
        _print(result, sys.stderr if json else sys.stdout)
        if json:
            exits.print_json(result)
        return 0

    exits.run(body, json)


def _make_images(folder: Path) -> Path:
    """A shard of photo-like images."""
    from jobs import pictures

    path = folder / "made.tar"
    with tarfile.open(path, "w") as tar:
        for n in range(IMAGES):
            sink = io.BytesIO()
            pictures.photo(pictures.LOOKS[n % len(pictures.LOOKS)], n, WIDTH, HEIGHT).save(
                sink, "JPEG", quality=QUALITY
            )
            header = tarfile.TarInfo(f"{n:04d}.jpg")
            header.size = len(sink.getvalue())
            tar.addfile(header, io.BytesIO(sink.getvalue()))
    return path


def _print(result: dict[str, Any], stream: TextIO) -> None:
    machine, images = result["machine"], result["images"]
    table = Table(box=None, pad_edge=False)
    for name, justify in (("stage", "left"), ("how", "left"), ("CPU ms", "right"), ("images/s", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for stage, how, row, remark in _rows(result):
        table.add_row(stage, how, f"{row['cpu_ms']:.3f}", f"{row['images_per_s']:,.0f}", remark)
    console = Console(file=stream, width=None if stream.isatty() else 120, highlight=False)
    gpus = ", ".join(machine["gpus"])
    console.print(f"{result['model']} on {machine['cores']} cores{f' and {gpus}' if gpus else ''}; ", end="")
    console.print(
        f"{images['count']} images of {images['mean_bytes'] / 1000:.0f} kB, {images['mean_pixels'] / 1e6:.2f} Mpx"
    )
    console.print(table)
    console.print("in brackets: the stated bound; cosines are with embeddings of exact pixels in eager fp32")
    for line in result["notes"]:
        console.print(line)
    for name, line in _conclusions(result):
        print(f"{name:>9}  {line}", file=stream)  # never wrapped: the command is to be copied


def _rows(result: dict[str, Any]) -> list[tuple[str, str, dict[str, Any], str]]:
    """Stage, how, its numbers, a remark. `images/s` are of one thread or worker."""
    rows = [("read", "one reader", result["read"], f"{result['read']['mb_per_s']:,.0f} MB/s")]
    for one in result["decode"]:
        threads = f"{result['machine']['cores']} threads {one['images_per_s_threads']:,.0f}/s"
        rows.append(("decode", one["decode"], one, f"{threads}; {_error(one)}"))
    rows.append(("transfer", "into batches", result["transfer"], ""))
    for one in result["forward"]:
        how = f"{one['engine']} {one['precision']}, {one['batch_size']} a batch"
        bound = f" [{one['bound']['cosine']}]" if one["bound"] else ""
        rows.append(("forward", how, one, f"cosine {one['cosine']:.6f}{bound}; starts in {one['start_s']} s"))
    rows.append(("write", f"{result['write']['dim']}-d rows", result["write"], ""))
    return rows


def _error(decoding: dict[str, Any]) -> str:
    """What was measured, and in brackets the bound."""
    if decoding["decode"] == "exact":
        return "timm's own pixels"
    bound = decoding["bound"]
    return (
        f"levels off {decoding['largest_levels']} [{bound['levels']}], mean {decoding['mean_levels']:.4f} "
        f"[{bound['mean_levels']}], cosine {decoding['cosine']:.6f} [{bound['cosine']}]"
    )


def _conclusions(result: dict[str, Any]) -> list[tuple[str, str]]:
    top, tried = result["ceiling"], result["trial"]
    costs = " + ".join(f"{stage} {ms:.2f}" for stage, ms in sorted(top["cpu_ms"].items(), key=lambda c: -c[1]))
    busy = ", ".join(f"{stage} {share:.0%}" for stage, share in tried["stage_busy"].items())
    busy += f", cores {tried['cores_busy']:.0%}"
    if tried["device_busy"] is not None:
        busy += f", device {tried['device_busy']:.0%}"
    return [
        ("ceiling", f"{top['images_per_s']:,.1f} images/s by {top['limited_by']}; CPU ms an image: {costs}"),
        ("expected", f"{result['expected_images_per_s']:,.1f} images/s, limited by {result['limited_by']}"),
        ("tried", f"{tried['images']:,} images with --actors {tried['workers']}; busy: {busy}"),
        ("use", result["command"]),
    ]
