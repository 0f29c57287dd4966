"""Listing 100,000 objects of an S3 server: `list_files` and `Root.list` beside plain s3fs; time and peak memory.

    python benchmarks/listing.py [--keys 100000] [--rounds 5]

It starts SeaweedFS, from the `test` extra, in a folder that it deletes again, and puts the objects, 4 minutes on two
cores. Each round is a process of its own, so that nothing is listed already and the peak is the listing's.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

WAYS = ("list_files", "Root.list", "s3fs")
FOLDERS = 100
THREADS = 16


def main() -> None:
    from s3_server import S3Server

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # one round, in a process of its own
    parser.add_argument("--url", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(listed(args.way, args.url)))
        return
    with tempfile.TemporaryDirectory() as folder, S3Server(Path(folder)) as server:
        bucket = server.create_bucket("many")
        began = time.monotonic()
        fill(server, bucket, args.keys)
        print(f"{args.keys:,} objects put in {time.monotonic() - began:.0f} s", flush=True)
        environment = os.environ | server.environment()
        rounds = [[one(way, f"s3://{bucket}/in", environment) for way in WAYS] for _ in range(args.rounds)]
    for i, way in enumerate(WAYS):
        show(way, [told[i] for told in rounds], args.keys)


def fill(server: "S3Server", bucket: str, keys: int) -> None:  # type: ignore[name-defined]  # noqa: F821
    own = threading.local()

    def put(i: int) -> None:
        if not hasattr(own, "client"):
            own.client = server.client()
        own.client.put_object(Bucket=bucket, Key=f"in/{i % FOLDERS:03}/{i:08}.jpg", Body=b"x")

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(put, range(keys)):
            pass


def one(way: str, url: str, environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--way", way, "--url", url]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    told: dict[str, float] = json.loads(done.stdout)
    return told


def listed(way: str, url: str) -> dict[str, float]:
    """One listing by a warm client: objects, seconds, seconds of CPU, and the MB that it added to the peak."""
    import fsspec

    from pipeline.output import Root
    from pipeline.storage import list_files, resolve

    fs = fsspec.filesystem("s3", skip_instance_cache=True) if way == "s3fs" else resolve(url)[0]
    fs.info(url.rpartition("/")[0])
    calls = {
        "list_files": lambda: list_files(url),
        "Root.list": lambda: Root(url).list(""),
        "s3fs": lambda: fs.find(url, detail=True),
    }
    before, began, cpu = peak_mb(), time.monotonic(), time.process_time()
    found = calls[way]()
    seconds, cpu_s = time.monotonic() - began, time.process_time() - cpu
    return {"objects": len(found), "seconds": seconds, "cpu_s": cpu_s, "mb": peak_mb() - before}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def show(way: str, told: list[dict[str, float]], keys: int) -> None:
    assert all(t["objects"] == keys for t in told), told
    seconds = [t["seconds"] for t in told]
    print(
        f"{way:10}  {statistics.median(seconds):5.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"
        f"  CPU {statistics.median(t['cpu_s'] for t in told):5.1f} s  peak {max(t['mb'] for t in told):5.0f} MB more"
    )


if __name__ == "__main__":
    main()
