"""Many whole embeddings from S3 to S3 through a proxy that fails, and what they lost: nothing, or this is a defect.

    PYTHONPATH=. python tests/chaos_faults.py --rounds 20 --seed 1

Every round draws its faults by the seed: which kinds, how many requests, bursts, latency, an outage; now and then a
shard is replaced while it may be read. A run that fails is run again, as a user would. The last run is the command
line's. Each is committed, verified against its input, and compared row by row with the undisturbed run.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import fsspec  # noqa: E402
import made  # noqa: E402
import oracle  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from fault_proxy import KINDS, FaultProxy, Faults  # noqa: E402
from s3_server import S3Server  # noqa: E402

from pipeline import versions  # noqa: E402
from pipeline.errors import StorageError, UsageError  # noqa: E402
from pipeline.listing import Shard, list_shards  # noqa: E402
from pipeline.lists import FileList  # noqa: E402
from pipeline.output import Root  # noqa: E402
from pipeline.verify import verify  # noqa: E402

PATHS = ("a/one.tar", "a/two.tar", "three.tar.gz")
BUCKET = "chaos"
SHARE = 0.3  # of requests that fail in the run of the command line
STALL_S = 3.0
RUNS = 5  # of one command, until it ends right
Rows = dict[str, dict[str, Any]]


@dataclass
class Tally:
    """What all rounds came to."""

    injected: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    runs: int = 0  # of the embedding: more than the rounds where one had to be resumed
    samples: int = 0
    lost: int = 0
    duplicated: int = 0
    half_read_files: int = 0
    different_rows: int = 0
    replaced_shards: int = 0
    slowdowns: list[float] = field(default_factory=list)


class Chaos:
    """The store, the proxy before it, the shards in it and what they must become."""

    def __init__(self, server: S3Server, proxy: FaultProxy, shards: Path, seed: int):
        self._server, self._proxy, self._shards, self._random = server, proxy, shards, random.Random(seed)
        self._client, self.tally = server.client(), Tally()
        self._put("in")
        began = time.monotonic()
        self._expected = self._embedded("in", "undisturbed")
        self._undisturbed_s = time.monotonic() - began

    def round(self, number: int) -> None:
        """One whole embedding under faults of its own."""
        source = f"in-{number}"
        self._put(source)
        replaced = self._random.random() < 0.2
        faults = self._draw()
        with self._disturbed(faults):
            if self._random.random() < 0.2:
                self._proxy.outage(self._random.choice((1.0, 4.0, 10.0)))
            began = time.monotonic()
            found = self._embedded(source, f"out-{number}", replaced)
            self.tally.slowdowns.append((time.monotonic() - began) / self._undisturbed_s)
        self.tally.rounds += 1
        self.tally.replaced_shards += replaced
        self._compare(found, self._expected)

    def command_line(self) -> dict[str, float]:
        """The real command, undisturbed and with three of ten requests failing; seconds of both."""
        seconds = {}
        for name, faults in {"undisturbed": Faults(), "disturbed": Faults(share=SHARE, stall_s=STALL_S)}.items():
            output = f"s3://{BUCKET}/cli-{name}"
            with self._disturbed(faults):
                began = time.monotonic()
                self._until_done(self._command("embed", "--output", output, "--input", f"s3://{BUCKET}/in"))
                seconds[name] = time.monotonic() - began
            told = self._until_done(self._command("verify", output, "--input", f"s3://{BUCKET}/in"))
            self._count(told["ids"], told["missing"], told["duplicated"], told["bad_files"])
        return seconds

    # the parts of a round

    def _put(self, prefix: str) -> None:
        for path in PATHS:
            body = (self._shards / path).read_bytes()
            self._client.put_object(Bucket=BUCKET, Key=f"{prefix}/{path}", Body=body)

    def _draw(self) -> Faults:
        kinds = self._random.sample(KINDS, self._random.randint(1, len(KINDS)))
        return Faults(
            share=self._random.uniform(0.05, 0.35),
            kinds=tuple(kinds),
            burst=self._random.choice((1, 1, 3)),
            stall_s=STALL_S,
            latency_s=self._random.choice((0, 0, 0.05)),
        )

    @contextlib.contextmanager
    def _disturbed(self, faults: Faults) -> Iterator[None]:
        self._proxy.calm(self._random.randrange(2**32))
        self._proxy.faults = faults
        yield
        self.tally.injected += self._proxy.calm()

    def _embedded(self, source: str, output: str, replaced: bool = False) -> Rows:
        """Runs until a version is there, verifies it in calm, and gives its rows and rejects by id."""
        root = Root(f"s3://{BUCKET}/{output}")
        for _ in range(RUNS):
            try:
                listed, job = list_shards([f"s3://{BUCKET}/{source}"]), made.job(root.url)
                if replaced:  # other bytes of the same images: a tar behind whose end mark zeros lie
                    body = (self._shards / PATHS[0]).read_bytes() + bytes(1024)
                    self._client.put_object(Bucket=BUCKET, Key=f"{source}/{PATHS[0]}", Body=body)
                    replaced = False
                self.tally.runs += 1
                receipts = made.embed(job, listed)
                if any(r.error for r in receipts):
                    continue
                known = FileList.of(r.files for r in receipts if r.files)
                files = versions.collect(root, job.vectors.folder, listed, known)
                version = versions.commit(root, job.vectors.name, files)
                assert version is not None
                return self._verified(root, version, listed)
            except (StorageError, UsageError):  # the second: no listing for 20 s
                continue
        raise RuntimeError(f"{output}: no version after {RUNS} runs")

    def _verified(self, root: Root, version: versions.Version, listed: list[Shard]) -> Rows:
        faults, self._proxy.faults = self._proxy.faults, Faults()
        found = verify(root, version, listed)
        rows: Rows = {}
        for files in versions.read_list(root, version):
            for name in (files.embeddings, files.rejects):
                rows |= {row["id"]: row for row in pq.read_table(root.open(name)).to_pylist()}
        self._count(found.ids, found.missing, found.duplicated, found.bad_files)
        self._proxy.faults = faults
        return rows

    def _count(self, ids: int, missing: int, duplicated: int, bad_files: int) -> None:
        self.tally.samples += ids
        self.tally.lost += missing
        self.tally.duplicated += duplicated
        self.tally.half_read_files += bad_files

    def _compare(self, found: Rows, expected: Rows) -> None:
        self.tally.lost += len(expected.keys() - found.keys())
        self.tally.different_rows += sum(found[i] != expected[i] for i in found.keys() & expected.keys())

    def _command(self, verb: str, *words: str) -> list[str]:
        command = [sys.executable, "-m", "jobs", verb, *words, "--json"]
        if verb == "embed":
            command += ["--model", made.MODEL, "--weights", "random:0", "--precision", "fp32"]
            command += ["--actors", "1", "--max-reject-rate", "0.2"]
        return command

    def _until_done(self, command: list[str]) -> dict[str, Any]:
        said = ""
        for _ in range(RUNS):
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
            said = done.stderr
            if done.returncode == 0:
                return dict(json.loads(done.stdout.splitlines()[-1]))
            print(f"{command[3]} ended with {done.returncode}: {said[-500:]}", file=sys.stderr)
        raise RuntimeError(f"{' '.join(command)} failed {RUNS} times: {said[-2000:]}")


def run(rounds: int, seed: int, with_command_line: bool = True) -> dict[str, Any]:
    """All rounds; counts of what was injected, done and lost. `lost`, `duplicated` and the like are 0 or a defect."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        server = stack.enter_context(S3Server(Path(folder) / "s3"))
        proxy = stack.enter_context(FaultProxy(server.endpoint, seed))
        shards = oracle.write_shards(Path(folder) / "shards")
        stack.enter_context(_environment(server.environment() | {"AWS_ENDPOINT_URL": proxy.endpoint}))
        server.create_bucket(BUCKET)
        chaos = Chaos(server, proxy, shards, seed)
        for number in range(rounds):
            chaos.round(number)
        seconds = chaos.command_line() if with_command_line else {}
    tally = chaos.tally
    slow = sorted(tally.slowdowns)
    return {
        "seed": seed,
        "rounds": tally.rounds,
        "runs": tally.runs,
        "samples": tally.samples,
        "faults": dict(sorted(tally.injected.items())) | {"all": tally.injected.total()},
        "replaced_shards": tally.replaced_shards,
        "lost": tally.lost,
        "duplicated": tally.duplicated,
        "half_read_files": tally.half_read_files,
        "different_rows": tally.different_rows,
        "slowdown_median": round(slow[len(slow) // 2], 2) if slow else None,
        "slowdown_max": round(slow[-1], 2) if slow else None,
        "command_line_s": {name: round(s, 1) for name, s in seconds.items()},
    }


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """The environment that leads to the proxy, without another AWS's or fsspec's words in it."""
    before = dict(os.environ)
    for name in [n for n in os.environ if n.startswith(("AWS_", "FSSPEC_"))]:
        del os.environ[name]
    os.environ |= values
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before
        fsspec.get_filesystem_class("s3").clear_instance_cache()


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rounds", type=int, default=20)
    flags.add_argument("--seed", type=int, default=1)
    given = flags.parse_args()
    told = run(given.rounds, given.seed)
    print(json.dumps(told))
    sys.exit(any(told[what] for what in ("lost", "duplicated", "half_read_files", "different_rows")))
