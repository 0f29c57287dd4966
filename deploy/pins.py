"""The entries of requirements.lock, with their hashes, that go into the image: those of packages.txt, or those named.

    python pins.py [--without PATTERN …] [NAME …]

The lock also has what tests, lint and benchmarks need. Exit 1 where it lacks one that is asked for. Needs Python alone:
it runs in the image's build.
"""

import argparse
import fnmatch
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lock", type=Path, default=HERE.parent / "requirements.lock")
    parser.add_argument("--without", action="append", default=[], help="a name, or a pattern of names; repeatable")
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    asked = args.names or (HERE / "packages.txt").read_text().split()
    names = [name for name in asked if not any(fnmatch.fnmatch(name, pattern) for pattern in args.without)]
    pinned = entries(args.lock.read_text())
    if missing := [name for name in names if name not in pinned]:
        print(f"{args.lock} lacks {', '.join(missing)}", file=sys.stderr)
        return 1
    print("".join(pinned[name] for name in names), end="")
    return 0


def entries(lock: str) -> dict[str, str]:
    """By package, its lines in a requirements file with hashes; several pins where they hold for different Pythons."""
    found = dict[str, str]()
    for entry in re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE):
        if name := re.match(r"[A-Za-z0-9._-]+(?===)", entry):
            found[canonical(name[0])] = found.get(canonical(name[0]), "") + entry.rstrip("\n") + "\n"
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
