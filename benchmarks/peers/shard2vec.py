"""This project's command line, as a user runs it.

Its steady rate is that of `embed --json`: each actor's first read to its last row written, without start-up, model
staging and commit. The first row counts once a reader can see its file, which is that of a whole shard.
"""

import json
import subprocess
import sys
import time

from benchmarks.peers.job import Job, job_flags, job_of, tell

VECTORS = "sets/*/embeddings/*.parquet"
LOOK_EVERY_S = 0.02


def command(job: Job, decode: str | None) -> list[str]:
    embed = ["-m", "jobs", "embed", "--input", str(job.tars), "--output", str(job.output), "--json"]
    model = ["--model", job.model, "--weights", "random:0", "--precision", job.precision]
    return [sys.executable, *embed, *model, *(["--decode", decode] if decode else [])]


def main() -> None:
    parser = job_flags(__doc__)
    parser.add_argument("--decode", help="the command line's own choice where it is left out")
    asked = parser.parse_args()
    job = job_of(asked)
    first = None
    with subprocess.Popen(command(job, asked.decode), stdout=subprocess.PIPE, text=True) as run:
        while first is None and run.poll() is None:
            time.sleep(LOOK_EVERY_S)
            first = time.time() if any(job.output.glob(VECTORS)) else None
        printed = run.communicate()[0]
    if run.returncode or first is None:
        sys.exit(f"shard2vec embed ended with {run.returncode}")
    told = json.loads(printed.splitlines()[-1])
    tell(told["rows"] / told["images_per_s"], first, VECTORS)


if __name__ == "__main__":
    main()
