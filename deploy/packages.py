"""Names of what shard2vec needs with the extras that the image has, on Linux: packages.txt.

    python deploy/packages.py >deploy/packages.txt      after `make lock`, in an environment of that lock

It follows the requirements through the packages that are installed here; versions and hashes are the lock's.
"""

import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("s3", "gcs", "azure", "openvino", "jobs", "index", "report")
MACHINES = ("x86_64", "aarch64")


def needed(pyproject: Path) -> list[str]:
    """Sorted, each package once, without shard2vec itself. Raises `PackageNotFoundError` where one is not installed."""
    project = tomllib.loads(pyproject.read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    todo = [Requirement(line) for line in lines]
    followed = set[tuple[str, str]]()
    for requirement in todo:
        for extra in ("", *requirement.extras):
            if (requirement.name, extra) not in followed:
                followed.add((requirement.name, extra))
                todo += required_by(requirement.name, extra)
    return sorted({str(canonicalize_name(name)) for name, _ in followed})


def required_by(package: str, extra: str) -> list[Requirement]:
    """What the installed package requires with this extra ("": with none) on any of the machines."""
    environments = [default_environment() | {"platform_machine": machine, "extra": extra} for machine in MACHINES]
    found = [Requirement(line) for line in distribution(package).requires or []]
    return [r for r in found if r.marker is None or any(r.marker.evaluate(e) for e in environments)]


if __name__ == "__main__":
    print("\n".join(needed(Path(__file__).resolve().parent.parent / "pyproject.toml")))
