"""Everything that `shard2vec embed` writes, against timm's own calls in a plain loop, over the same photos, in fp32.

    python benchmarks/every_output.py --photos DIR [--models a,b]

Runs the command line twice a model: tokens, timm's default feature maps and, where there are two, both heads; then
feature maps by name. Prints, as Markdown, `equal` where every value has the bits of timm's (rounded to the column's
type), else the largest difference as a share of the largest value.
"""

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

import pipeline

PIT = ("pit_ti", "pit_xs", "pit_s", "pit_b", "pit_ti_distilled", "pit_xs_distilled", "pit_s_distilled")
MODELS = (
    *(f"{name}_224" for name in (*PIT, "pit_b_distilled")),
    "vit_pwee_patch16_reg1_gap_256.sbb_in1k",
    "convit_base.fb_in1k",
    "beit_base_patch16_224.in22k_ft_in22k_in1k",
)
NAMES = {
    "pit": ("stage_1/block_2", "patch_embedding", "stage_0/pool", "features_all", "features", "logits"),
    "": ("block_7", "patch_embedding", "features_all", "features", "logits"),
}
KINDS = ("tokens", "features", "heads")
BATCH = 32


def expected(model: str, photos: Path, names: tuple[str, ...]) -> dict[str, dict[str, np.ndarray]]:
    """Column → id → what timm itself gives; names as the layers give them."""
    torch.manual_seed(0)
    net: Any = timm.create_model(model).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=net))
    found: dict[str, dict[str, np.ndarray]] = {}
    for tar in sorted(photos.glob("*.tar")):
        images = {}
        with tarfile.open(tar) as members:
            for member in members:
                if member.name.endswith(".jpg"):
                    image = Image.open(io.BytesIO(members.extractfile(member).read())).convert("RGB")  # type: ignore[union-attr]
                    images[f"{tar.stem}/{member.name.partition('.')[0]}"] = transform(image)
        for start in range(0, len(images), BATCH):
            ids = list(images)[start : start + BATCH]
            for column, tensor in passed(net, torch.stack([images[i] for i in ids]), names).items():
                found.setdefault(column, {}).update(zip(ids, tensor.flatten(1).numpy(), strict=True))
    return found


@torch.inference_mode()
def passed(net: Any, x: torch.Tensor, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """timm's separate calls, a pass each; what lies inside by hooks on the modules."""
    seen: dict[str, Any] = {}
    places = {name: module for name in names if (module := place(net, name)) is not None}
    handles = [m.register_forward_hook(lambda _, *both, n=n: seen.update({n: both})) for n, m in places.items()]
    body = net.forward_features(x)
    for handle in handles:
        handle.remove()
    out = {"embedding": net.forward_head(body, pre_logits=True), "topk_score": net(x).softmax(1).topk(5).values}
    out["tokens"] = body.half()
    count = len(getattr(net, "transformers", ())) or len(net.blocks)
    maps = net.forward_intermediates(x, indices=list(range(max(0, count - 3), count)))[1]
    out |= {f"feature_{i}": m.half() for i, m in enumerate(maps)}
    two = getattr(net, "head_dist", None) is not None
    if two:
        out["heads"] = torch.stack([net.head(body[:, 0]), net.head_dist(body[:, 1])], 1)
    ends = {
        "logits": out["heads"] if two else net.forward_head(body),
        "features": body if two else out["embedding"],
        "features_all": body,
    }
    for name in names:
        if name not in places:
            out[f"name {name}"] = ends[name].half()
            continue
        args, output = seen[name]
        value = args[0] if name == "patch_embedding" else output
        if isinstance(value, tuple):  # PiT's grid and class tokens
            value = torch.cat([value[1], value[0].flatten(2).transpose(1, 2)], 1)
        out[f"name {name}"] = value.half()
    return out


def place(net: Any, name: str) -> Any:
    """The module that computes, or for `patch_embedding` takes, what tfimm calls so; None for the ends."""
    stages = getattr(net, "transformers", None)
    if name == "patch_embedding":
        return net.blocks[0] if stages is None else stages[0]
    if name == "features_all":
        return None if stages is None else stages[-1].blocks[-1]
    if name.endswith("/pool"):
        return stages[int(name[6]) + 1].pool
    if "block_" in name:
        stage, _, block = name.rpartition("block_")
        return (net.blocks if stages is None else stages[int(stage[6])].blocks)[int(block)]
    return None


def embedded(model: str, photos: Path, output: Path, outputs: str, *flags: str) -> float:
    """Runs the command line; returns the seconds of the forward stage."""
    command = [sys.executable, "-m", "jobs", "embed", "--input", str(photos), "--output", str(output), "--model", model]
    command += [
        "--weights",
        "random:0",
        "--precision",
        "fp32",
        "--decode",
        "exact",
        "--outputs",
        outputs,
        "--json",
        *flags,
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    return float(json.loads(run.stdout.splitlines()[-1])["stage_seconds"]["forward"])


def difference(output: Path, kind: str, column: str, want: dict[str, np.ndarray]) -> float:
    """Largest difference of a column, as a share of its largest value; 0.0 where all bits are the same."""
    apart = largest = 0.0
    rows = 0
    for batch in pipeline.open_dataset(str(output), kind=kind).to_batches(columns=["id", column], batch_size=64):
        values = batch.column(column).flatten().to_numpy(zero_copy_only=False).reshape(len(batch), -1)
        theirs = np.stack([want[i] for i in batch.column("id").to_pylist()])
        rows += len(batch)
        apart = max(apart, float(np.abs(values.astype(np.float32) - theirs.astype(np.float32)).max()))
        largest = max(largest, float(np.abs(theirs).max()))
    if rows != len(want):
        raise SystemExit(f"{output} {kind}: {rows} rows of {len(want)}")
    return apart / largest


def shown(values: list[float]) -> str:
    return "–" if not values else "equal" if max(values) == 0 else f"{max(values):.1e}"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--photos", type=Path, required=True, help="a folder of WebDataset tars")
    flags.add_argument("--models", default=",".join(MODELS))
    asked = flags.parse_args()
    print(f"{platform.node()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, fp32\n")
    print("| model | images | embedding | scores | tokens | maps | named features | heads |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for model in asked.models.split(","):
        names = NAMES["pit" if model.startswith("pit") else ""]
        want = expected(model, asked.photos, names)
        with tempfile.TemporaryDirectory() as folder:
            first, second = Path(folder) / "first", Path(folder) / "second"
            kinds = [k for k in KINDS if k != "heads" or k in want]
            embedded(model, asked.photos, first, ",".join(["embedding", "classes", *kinds]))
            embedded(model, asked.photos, second, "features", "--feature-names", ",".join(names))
            apart = {c: difference(first, "embeddings", c, want[c]) for c in ("embedding", "topk_score")}
            apart |= {c: difference(first, c, c, want[c]) for c in kinds if c != "features"}
            maps = [difference(first, "features", c, want[c]) for c in want if c.startswith("feature_")]
            named = [difference(second, "features", f"feature_{i}", want[f"name {n}"]) for i, n in enumerate(names)]
        cells = [shown([apart[c]]) for c in ("embedding", "topk_score", "tokens")]
        heads = shown([apart["heads"]] if "heads" in apart else [])
        cells += [shown(maps), f"{shown(named)} ({len(names)})", heads]
        print(f"| {model} | {len(want['embedding'])} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
