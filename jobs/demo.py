"""`demo`: makes small shards, some images broken, embeds them, and shows what a user gets. Needs no network."""

import contextlib
import io
import shutil
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from jobs import exits

HUB_ANSWERS_S, HUB_DELIVERS_S = 3.0, 30.0  # beyond these the demo goes on with a seeded random backbone
REJECT_RATE = 0.5  # the demo breaks some images on purpose: about 2 %, more where it makes few
NEIGHBOURS = 6

READ_IT = """import pandas as pd
rows = pd.concat(pd.read_parquet(f) for f in files)
print(rows[["id", "width", "height", "norm"]].assign(first=rows.topk_label.str[0]).sample(5).to_string())
"""


def demo(
    output: Annotated[Path, typer.Option(help="Where shards, vectors and the picture go")] = Path("demo"),
    images: Annotated[int, typer.Option(min=16, help="How many images to make")] = 320,
    model: Annotated[str, typer.Option(help="Any timm name")] = "pit_ti_224",
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, last")] = False,
) -> None:
    """Make image shards, embed them, verify the result and draw nearest neighbours.

    Example: shard2vec demo --output demo
    """

    def body() -> int:
        from jobs import pictures
        from pipeline import signals, versions
        from pipeline.config import RunConfig
        from pipeline.run import embed
        from pipeline.verify import verify

        shards, out = output / "shards", output / "vectors"
        if not shards.exists():
            making = output / "shards.part"
            shutil.rmtree(making, ignore_errors=True)
            made = pictures.write_shards(making, images=images)
            making.rename(shards)  # whole or not at all: an interrupted demo starts it anew
            exits.say(f"made {made['images']} images in {shards}, broken on purpose: {made['broken']}")
        weights = _weights(model)
        exits.say(
            f"$ shard2vec embed --input {shards} --output {out} --model {model} --weights {weights} "
            f"--max-reject-rate {REJECT_RATE}"
        )
        result = embed(
            RunConfig(
                inputs=(str(shards),), output=str(out), model=model, weights=weights, max_reject_rate=REJECT_RATE
            ),
            exits.say,
        )
        exits.say(f"shard2vec: {result.message}")
        if result.exit_code == 0:
            with signals.heard(), contextlib.redirect_stdout(sys.stderr if json else sys.stdout):
                root = versions.existing_output(str(out))
                version = versions.current(root)
                found = verify(root, version)
                sheet = _draw_neighbours(shards, str(out), output / "neighbours.png")
                print(_summary(result.json, found.ids, found.clean, version.version, sheet))
                _show_reading(str(out))
            result = result if found.clean else replace(result, exit_code=exits.FAILED)
        if json:
            exits.print_json(result.json)
        return result.exit_code

    exits.run(body, json)


def _weights(model: str) -> str:
    """`pretrained` where the hub answers quickly and delivers, else `random:0`; says which."""
    started = time.monotonic()
    if _hub_answers() and _delivered(model):
        exits.say(f"weights: pretrained, from the hub ({time.monotonic() - started:.1f} s)")
        return "pretrained"
    exits.say(
        "weights: the hub does not answer, so a seeded RANDOM backbone stands in: neighbours go by colour and "
        "layout, class names mean nothing"
    )
    return "random:0"


def _hub_answers() -> bool:
    from huggingface_hub.constants import ENDPOINT

    host = urlsplit(ENDPOINT)
    try:
        with socket.create_connection((host.hostname or "", host.port or 443), timeout=HUB_ANSWERS_S):
            return True
    except OSError:
        return False


def _delivered(model: str) -> bool:
    """Whether the hub gives the weights in time; they are in its cache then."""
    from pipeline.errors import UsageError
    from pipeline.weights import load_module

    arrived = threading.Event()

    def load() -> None:
        with contextlib.suppress(UsageError):
            load_module(model, "pretrained")
            arrived.set()

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(HUB_DELIVERS_S)
    return arrived.is_set()


def _summary(result: dict[str, Any], ids: int, clean: bool, version: int, sheet: Path) -> str:
    rejects = "".join(f"\n    {n:>5}  {reason}" for reason, n in result["rejects"].items())
    return f"""
version {version} · set {result["set"]}
  rows     {result["rows"]:>5}
  rejects  {sum(result["rejects"].values()):>5}{rejects}
  verify   {ids} ids, each exactly once: {"yes" if clean else "NO"}
  speed    {result["speed"]}
  output   {result["output"]}
  picture  {sheet}
"""


def _show_reading(out: str) -> None:
    print(f"Read it (files: `shard2vec files {out}`, or pipeline.files):\n")
    print("".join(f"    {line}\n" for line in READ_IT.splitlines()))
    from pipeline import readers

    exec(READ_IT, {"files": readers.files(out)})


def _draw_neighbours(shards: Path, out: str, path: Path) -> Path:
    """One query a look, beside the images whose embeddings have the highest cosine with its own."""
    import numpy as np

    from jobs import pictures
    from pipeline import readers

    table = readers.open_dataset(out).to_table(columns=["id", "key", "embedding"]).to_pandas().sort_values("id")
    vectors = np.stack(table["embedding"].to_list())
    vectors -= vectors.mean(axis=0)  # a random backbone's vectors all point one way; what differs is what counts
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    looks = [key.rpartition("_")[0] for key in table["key"]]
    first = [looks.index(look) for look in pictures.LOOKS if look in looks]
    chosen = {q: np.argsort(-(vectors @ vectors[q]), kind="stable")[: NEIGHBOURS + 1] for q in first}
    keys = table["key"].to_list()
    images = _images(shards, {table["id"].iloc[i] for found in chosen.values() for i in found})
    rows = []
    for query, found in chosen.items():
        others = [i for i in found if i != query][:NEIGHBOURS]
        captions = [keys[query], *(f"{vectors[i] @ vectors[query]:.2f} {keys[i]}" for i in others)]
        rows.append([(images[table["id"].iloc[i]], c) for i, c in zip([query, *others], captions, strict=True)])
    pictures.contact_sheet(rows, path, title="Nearest neighbours by cosine similarity (embeddings centred)")
    return path


def _images(shards: Path, ids: set[str]) -> dict[str, Any]:
    from PIL import Image, ImageOps

    from pipeline.listing import list_shards
    from pipeline.shards import read_samples

    return {
        f"{shard.name}/{sample.id_key}": ImageOps.exif_transpose(Image.open(io.BytesIO(sample.image))).convert("RGB")
        for shard in list_shards([str(shards)])
        for sample in read_samples(shard)
        if f"{shard.name}/{sample.id_key}" in ids
    }
