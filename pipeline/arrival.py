"""The first act of a submitted job: is this the program that was submitted, with the same packages? Then the verb.

Runs as `python -m shipment VERB` on the cluster, where this file, `build.py` and `shipment.json` lie in a folder
`shipment` of the job's working directory, so that it can speak where the code or the packages of an image are others.
It leaves with 2 and one sentence that names what differs. Only the standard library is needed.

Ray keeps one log of both streams: lines for stdout leave with `STDOUT` before them, so that the submitter can tell
which is which.
"""

import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any, TextIO

STDOUT = "stdout| "
PYTHON = (3, 11)
USAGE = 2


class Marked(io.TextIOBase):
    """A stream of whole lines, each behind `STDOUT` and in one write."""

    def __init__(self, log: TextIO):
        self._log, self._begun = log, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._log.write(f"{STDOUT}{line}\n")
        return len(text)

    def flush(self) -> None:
        if self._begun:
            self.write("\n")
        self._log.flush()


def check(shipment: dict[str, Any]) -> str:
    """What was submitted against what is here. Returns what is the same; exits with 2 and what is not."""
    if sys.version_info < PYTHON:
        _refuse(f"{sys.executable} is Python {sys.version.split()[0]}, and {'.'.join(map(str, PYTHON))} is needed")
    from .build import build_id, differences

    here, submitted = build_id(), shipment["build"]
    wrong, told = differences(here, submitted)
    if wrong:
        _refuse(f"{sys.executable} does not run what was submitted: {'; '.join(wrong)}")
    code = f"source {here['source']}, {'as shipped' if shipment['is_shipped'] else 'of the image'}"
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    others = f" (submitted with {'; '.join(told)})" if told else ""
    return f"{code}; {versions}: as on the submitting machine{others}"


def _refuse(why: str) -> None:
    print(f"shard2vec: {why}; name the right interpreter with --python, or bring the image up to date", file=sys.stderr)
    sys.exit(USAGE)


def main() -> None:
    """Checks, says so on stderr, and becomes the verb."""
    for stream in (sys.stdout, sys.stderr):
        # Ray asks for unbuffered streams: a line would be two writes, and what another thread says lie between them.
        stream.reconfigure(line_buffering=True, write_through=False)  # type: ignore[union-attr]
    shipment = json.loads(Path(__file__).with_name("shipment.json").read_text(encoding="utf-8"))
    print(f"shard2vec: {check(shipment)}", file=sys.stderr)
    sys.stdout = Marked(sys.stdout)
    sys.argv = ["shard2vec", *shipment["arguments"]]
    runpy.run_module("jobs", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
