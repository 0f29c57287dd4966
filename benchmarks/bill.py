"""What a large run takes: node-hours, their price, requests, bytes, the driver's memory. Arithmetic over named figures.

    python benchmarks/bill.py [--images 1e9] [--shards 1e5] [--model convit_base] [--nodes 16] [--price 4.00] …

A node is one GPU with its cores, as in deploy/kuberay, or cores alone. Where a figure comes from is said beside it:
`measured` ones are in README.md or docs/large.md, `arithmetic` ones are a GPU's peak times a share, which nobody here
has seen. The pilot in docs/large.md gives yours: then say `--speed`.
"""

import argparse
import math
from collections.abc import Sequence

MIB, GB, TB = 2**20, 1e9, 1e12

# Images/s of the forward pass alone: one H200, the low ends of 790 TFLOP/s bf16 at 40 to 55 %, and a thread of a CPU.
FORWARD_GPU = {"pit_b_224": 12_700.0, "convit_base": 9_000.0, "beit_base_patch16_224": 9_000.0}  # arithmetic
FORWARD_GPU |= {"vit_pwee_patch16_reg1_gap_256": 42_000.0}
FORWARD_CORE = {"pit_ti_224": 190.4, "pit_s_224": 57.9, "pit_b_224": 15.1, "beit_base_patch16_224": 11.4}  # OpenVINO
DIM = {"pit_ti_224": 256, "vit_pwee_patch16_reg1_gap_256": 256, "pit_s_224": 576, "convit_base": 768}
DIM |= {"beit_base_patch16_224": 768, "pit_b_224": 1024}
DECODE_CORE = {110_000: 918.0, 250_000: 438.0}  # images/s by bytes of a JPEG: 500×375 and 1024×768; measured
ROW_BYTES = {256: 909, 384: 1341, 768: 2644, 1024: 3505}  # of embeddings files of 4,096 rows with top 5; measured
LIST_BYTES = 42  # a shard, in a version's list; measured

RANGE_BYTES, PAGE = 16 * MIB, 1000  # of one GET of a shard, and keys in one answer to a listing
# Of each shard, counted at a proxy before a store: docs/large.md.
PUTS = 2  # rejects, embeddings; each is one request up to 100 MiB
HEADS = 2  # is its output there; is its input still the one that was listed
LISTINGS = 3  # of the output's shards in a run: embeddings when it plans, embeddings and rejects when it commits
NOTE_S, PART_S = 10, 60  # a progress note, and a part of the journal, are put so often

# Of one driver: seconds of its processor from the listing to the commit, and its largest memory; benchmarks/growth.py.
GROWTH = {10**4: (1.34, 74), 10**5: (13.9, 392), 10**6: (135.0, 2900)}  # shards: (s, MB); measured


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=positive, default=1e9)
    parser.add_argument("--shards", type=positive, default=1e5)
    parser.add_argument("--image-bytes", type=positive, default=110_000, help="of an image as it is stored")
    parser.add_argument("--model", default="convit_base", help="one whose forward pass has a figure here")
    parser.add_argument("--dim", type=whole, help="of its embedding [the model's]")
    parser.add_argument("--nodes", type=whole, default=16)
    parser.add_argument("--cores", type=whole, default=16, help="of a node")
    parser.add_argument("--network", type=positive, default=25.0, help="Gbit/s of a node, from the store")
    parser.add_argument("--cpu", action="store_true", help="nodes without a GPU, engine openvino")
    parser.add_argument("--speed", type=positive, help="images/s of a node, as your pilot had it [by the figures here]")
    parser.add_argument(
        "--share", type=positive, default=0.85, help="of a node's ceiling that a run reaches [an assumption]"
    )
    parser.add_argument(
        "--lost", type=float, default=0.05, help="of the work done twice, by lost nodes [an assumption]"
    )
    parser.add_argument("--price", type=positive, default=4.0, help="of a node's hour: an example, not an offer")
    args = parser.parse_args(argv)
    for line in bill(args):
        print(line)


def positive(text: str) -> float:
    if not 0 < (number := float(text)) < math.inf:
        raise ValueError
    return number


def whole(text: str) -> int:
    return int(positive(str(int(text))))


def bill(args: argparse.Namespace) -> list[str]:
    """The lines that it prints."""
    speed, why = (args.speed, "your pilot's") if args.speed else node_speed(args)
    hours = args.images * (1 + args.lost) / speed / 3600
    wall_s = hours / args.nodes * 3600
    shards, shard_bytes = int(args.shards), args.images * args.image_bytes / args.shards
    gets = shards * math.ceil(shard_bytes / RANGE_BYTES)
    pages = math.ceil(shards / PAGE)
    other = math.ceil(wall_s / NOTE_S) + math.ceil(wall_s / PART_S)
    dim = args.dim or DIM.get(args.model, 768)
    cpu_s, driver_mb = driver(shards)
    gbit_s = speed * args.image_bytes * 8 / 1e9
    per_shard = args.images / shards
    each = f"{shards:,} shards of {per_shard:,.0f}, {shard_bytes / GB:.2f} GB each"
    return [
        f"input           {args.images:,.0f} images, {each}",
        f"a node          {speed:,.0f} images/s ({why})",
        f"node-hours      {hours:,.0f}, with {args.lost:.0%} done twice",
        f"hours           {hours / args.nodes:,.1f} on {args.nodes} nodes",
        f"price           {hours * args.price:,.0f} at {args.price:.2f} an hour of a node, an example",
        f"read            {args.images * args.image_bytes / TB:,.1f} TB, {gbit_s:.1f} Gbit/s a node,"
        f" {gbit_s * args.nodes:,.0f} in all",
        f"GET             {gets:,} of up to {RANGE_BYTES // MIB} MiB, {gets / wall_s:,.0f} a second",
        f"PUT             {PUTS * shards + other:,}: {PUTS} a shard, {other:,} notes and journal parts",
        f"HEAD            {HEADS * shards:,}: {HEADS} a shard",
        f"LIST            {pages * (1 + LISTINGS):,}: pages of {PAGE:,} of the input,"
        f" and {LISTINGS} times of the output",
        f"written         {args.images * row_bytes(dim) / TB:,.2f} TB: {row_bytes(dim):,.0f} bytes a row of {dim},"
        f" {per_shard * row_bytes(dim) / 1e6:,.0f} MB a file",
        f"a version       {shards * LIST_BYTES / 1e6:.1f} MB of list",
        f"the driver      {cpu_s:,.0f} s of processor, {driver_mb:,.0f} MB beside its model",
    ]


def node_speed(args: argparse.Namespace) -> tuple[float, str]:
    """Images/s of a node, and what limits it."""
    known = FORWARD_CORE if args.cpu else FORWARD_GPU
    if args.model not in known:
        raise SystemExit(f"--model {args.model}: no figure here: one of {', '.join(known)}, or give --speed and --dim")
    core = DECODE_CORE[min(DECODE_CORE, key=lambda size: abs(size - args.image_bytes))]
    ceilings = {"network": args.network * 1e9 / 8 / args.image_bytes}
    if args.cpu:  # decoding and the forward pass share the cores
        both = 1 / core + 1 / known[args.model]
        ceilings[f"decoding and forward, measured a core, {args.cores} cores"] = args.cores / both
    else:
        ceilings["forward, arithmetic"] = known[args.model]
        ceilings[f"decoding, measured a core, {args.cores} cores"] = args.cores * core
    limit = min(ceilings, key=lambda name: ceilings[name])
    return ceilings[limit] * args.share, f"{args.share:.0%} of its ceiling: {limit}"


def row_bytes(dim: int) -> float:
    """Of an embeddings file: measured, or on the line through the measured ones."""
    (low, a), (high, b) = min(ROW_BYTES.items()), max(ROW_BYTES.items())
    return ROW_BYTES.get(dim, a + (b - a) * (dim - low) / (high - low))


def driver(shards: int) -> tuple[float, float]:
    """(seconds of processor, MB): by the next larger count that was measured, in proportion below it and beyond."""
    known = min((count for count in GROWTH if count >= shards), default=max(GROWTH))
    s, mb = GROWTH[known]
    return s * shards / known, max(mb * shards / known, min(mb for _, mb in GROWTH.values()))


if __name__ == "__main__":
    main()
