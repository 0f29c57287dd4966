"""What test_cluster.py tells of, done in a process of its own: one Ray a process, and this one is a cluster's driver.

python cluster_job.py FOLDER        prints one JSON object, last
"""

import json
import os
import secrets
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "HF_HUB_OFFLINE": "1"}

from clusters import Nodes, cluster, until  # noqa: E402
from containers import write_tar  # noqa: E402
from pictures import jpeg  # noqa: E402

from pipeline import cluster as clusters  # noqa: E402
from pipeline import reach, versions, weights  # noqa: E402
from pipeline.actors import Pool, ray  # noqa: E402
from pipeline.config import RunConfig  # noqa: E402
from pipeline.embed import Job, Receipt  # noqa: E402
from pipeline.errors import UsageError  # noqa: E402
from pipeline.layout import lay_out  # noqa: E402
from pipeline.listing import list_shards  # noqa: E402
from pipeline.output import Root  # noqa: E402
from pipeline.run import embed  # noqa: E402
from pipeline.verify import verify  # noqa: E402

SHARDS, IMAGES = 10, 8


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except UsageError as e:
        return str(e)
    return "nothing was refused"


def run(config: RunConfig) -> dict[str, Any]:
    said = list[str]()
    result = embed(config, said.append)
    return {"exit_code": result.exit_code, "message": result.message, "json": result.json, "said": said}


def published(output: Path) -> int:
    return len(list(output.glob("sets/*/embeddings/*.parquet")))


def first_run(nodes: Nodes, config: RunConfig, folder: Path) -> dict[str, Any]:
    """The second node has a cache of its own, and goes in the midst of it."""
    second = nodes.add(num_cpus=1, num_gpus=1, env={"SHARD2VEC_CACHE": str(folder / "second")})
    refused = refusal(lambda: embed(replace(config, device="auto"), lambda line: None))
    staged = folder / "second" / "weights"
    seen = dict[str, Any]()

    def kill() -> None:
        seen["staged"] = until(lambda: list(staged.glob("*.safetensors")))
        until(lambda: published(Path(config.output)) >= 2)
        seen["files"] = sorted(p.name for p in staged.glob("*.safetensors"))
        seen["published"] = published(Path(config.output))
        nodes.remove(second)

    killer = threading.Thread(target=kill)
    killer.start()
    found = run(config)
    killer.join()
    return {"device": refused, "first": found, "seen": seen}


def stale_node(nodes: Nodes, config: RunConfig, folder: Path) -> dict[str, Any]:
    """A node whose installation is of another day: refused where it cannot be helped, else our code is sent there."""
    for package in ("pipeline", "jobs"):
        shutil.copytree(REPOSITORY / package, folder / "stale" / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "stale" / "pipeline" / "garbage.py").open("a") as file:
        file.write("# another day\n")
    other = folder / "stale" / "timm-0.9.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.9.1\n")
    nodes.add(num_cpus=2, num_gpus=1, env={"PYTHONPATH": str(folder / "stale")})
    clusters._connect(nodes.address)
    fixed = refusal(lambda: embed(replace(config, ray_address=None), lambda line: None))
    ray.shutdown()
    unlike = refusal(lambda: embed(config, lambda line: None))
    shutil.rmtree(other)
    return {"fixed": fixed, "versions": unlike}


def fractions(nodes: Nodes, config: RunConfig, folder: Path) -> dict[str, Any]:
    """Half a GPU each, of the stale node, which claims one: Ray gives it to two workers and none to a third."""
    shards = list_shards(list(config.inputs))
    asked = replace(config, gpus_per_actor=0.5, actors=(1, 3), device="cuda")
    said = list[str]()
    with clusters.used(nodes.address, said.append):
        layout = lay_out(asked, "cuda", clusters.nodes(), len(shards), len(shards))
        left, started, receipts = 1.0, 0, list[Receipt]()
        with Pool(tiny_job(folder / "halves"), shards, layout) as pool:
            while not pool.is_done:
                news = pool.read()
                receipts += news.receipts
                started = max(started, news.started)
                left = min(left, ray.available_resources().get("GPU", 0.0))
            cores = pool.cores
    return {
        "said": said,
        "errors": [r.error for r in receipts if r.error],
        "layout": [*layout.actors, layout.gpus],
        "samples": sum(r.files.counts.samples for r in receipts if r.files),
        "left": left,
        "cores": cores,
        "started": started,
    }


def tiny_job(output: Path) -> Job:
    import made
    import oracle

    job = made.job(output, batch_size=4)
    digest = weights.sha256(oracle.module(made.MODEL).state_dict())
    staged = weights.stage(oracle.module(made.MODEL), digest)
    return replace(job, vectors=replace(job.vectors, weights_sha256=digest), weights=str(staged))


def main(folder: Path) -> dict[str, Any]:
    for s in range(SHARDS):
        write_tar(folder / "in" / f"s{s:02d}.tar", {f"{i:03d}.jpg": jpeg(60, 50, seed=i % 5) for i in range(IMAGES)})
    os.environ |= {"SHARD2VEC_CACHE": str(folder / "head"), "PYTHONPATH": str(REPOSITORY)}
    os.chdir(folder)  # Ray's workers also look where the driver is
    with cluster(num_cpus=1) as nodes:
        config = RunConfig(
            inputs=(str(folder / "in"),),
            output=str(folder / "out"),
            model="pit_ti_224",
            weights="random:0",
            precision="fp32",
            batch_size=2,
            actors=(2, 2),
            device="cpu",
            ray_address=nodes.address,
        )
        found = first_run(nodes, config, folder)
        found |= stale_node(nodes, config, folder)
        found["halves"] = fractions(nodes, config, folder)
        found["tokens"] = tokens(nodes.address)
    root = Root(config.output)
    found["verify"] = verify(root, versions.current(root), list_shards(list(config.inputs))).clean
    return found


def tokens(address: str) -> dict[str, str]:
    """What a driver hears that has the wrong token, or none."""
    found = {}
    right = dict(os.environ)
    for name, env in (("wrong", {"RAY_AUTH_TOKEN": "0" * 64}), ("none", {"RAY_AUTH_MODE": "disabled"})):
        os.environ.update(env)
        found[name] = refusal(lambda: reach.check(address))
        os.environ.update(right)
    return found


if __name__ == "__main__":
    told = main(Path(sys.argv[1]))
    print(json.dumps(told), flush=True)
    os._exit(0)
