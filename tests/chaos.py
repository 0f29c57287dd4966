"""Everything at once, for longer than the tests: kills, races, faults, rubbish; then the table of what it came to.

    make chaos                                                    all of it, about an hour on two cores
    python tests/chaos.py --only 'worker killed' --share 0.2 --seed 7

Exits with 1 where a sample was lost or doubled, a file half written, or anything else not as promised.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import chaos_faults  # noqa: E402
import chaos_rubbish  # noqa: E402
import stamina  # noqa: E402
from chaos_job import Score  # noqa: E402
from chaos_kills import KILLS  # noqa: E402
from chaos_races import RACES  # noqa: E402

FAULT_ROUNDS = 20
RUBBISH_S = 900.0
SPENT = ("crashes", "timeouts", "too_much_memory")


def faults(folder: Path, rng: random.Random, rounds: int) -> Score:
    found = chaos_faults.run(rounds, rng.randrange(2**31))
    wrong = [f"{found['different_rows']} rows differ"] if found["different_rows"] else []
    return Score(
        abuses=found["faults"]["all"],
        samples=found["samples"],
        lost=found["lost"],
        duplicated=found["duplicated"],
        half_files=found["half_read_files"],
        wrong=wrong,
        told={name: found[name] for name in ("rounds", "runs", "slowdown_median", "slowdown_max", "command_line_s")},
    )


def rubbish(folder: Path, rng: random.Random, seconds: int) -> Score:
    found = chaos_rubbish.run(seconds, rng.randrange(2**31))
    targets = {name: told for name, told in found.items() if isinstance(told, dict)}
    wrong = [
        f"{name}: {told[how]} {how}: {told['found']}" for name, told in targets.items() for how in SPENT if told[how]
    ]
    inputs = sum(told["inputs"] for told in targets.values())
    samples = sum(told["rows"] + told["rejects"] for told in targets.values())
    peaks = {name: f"{told['peak_bytes'] / 2**20:.0f} MB at most" for name, told in targets.items()}
    return Score(abuses=inputs, samples=samples, wrong=wrong, told=peaks | {"engine": found["engine"]})


ABUSES: dict[str, tuple[Callable[[Path, random.Random, int], Score], int]] = {
    **KILLS,
    **RACES,
    "fault between us and the store": (faults, FAULT_ROUNDS),
    "damaged tar, Parquet or image": (rubbish, int(RUBBISH_S)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=ABUSES, help="repeatable; all of them without it")
    parser.add_argument("--share", type=float, default=1.0, help="of the usual number of abuses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="a file for all figures")
    asked = parser.parse_args()
    stamina.instrumentation.set_on_retry_hooks([])  # its default prints a line for every retry
    scores: dict[str, Score] = {}
    for name in asked.only or ABUSES:
        abuse, count = ABUSES[name]
        started = time.monotonic()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            score = abuse(Path(folder), random.Random(f"{asked.seed} {name}"), max(1, round(count * asked.share)))
        score.told["minutes"] = round((time.monotonic() - started) / 60, 1)
        scores[name] = score
        print(f"{name}: {score}", file=sys.stderr, flush=True)
        if asked.json:
            asked.json.write_text(json.dumps({n: asdict(s) for n, s in scores.items()}, indent=1))
    print(table(scores), flush=True)
    return 0 if all(score.is_clean for score in scores.values()) else 1


def table(scores: dict[str, Score]) -> str:
    """Markdown, as the README has it."""
    lines = ["| abuse | times | samples | lost | duplicated | half files | otherwise wrong |", "| --- |" + " --- |" * 6]
    for name, s in scores.items():
        cells: list[Any] = [f"{s.abuses:,}", f"{s.samples:,}", s.lost, s.duplicated, s.half_files, len(s.wrong)]
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # Ray's and the clients' threads have nothing more to say
