"""What code runs here: a digest of our sources, and the versions of what decides a vector. Loads neither torch nor Ray.

The driver computes the set's name, workers on other nodes its vectors: both must be the same program.
"""

import hashlib
import importlib.util
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("pipeline", "jobs")
# Another version of these may give another vector; of the others it is only told.
DECISIVE = ("torch", "torchvision", "timm", "pillow", "simplejpeg")
TOLD = ("pyarrow", "numpy")


def build_id() -> dict[str, Any]:
    """`source`: 16 hex digits over the sources that this process imports; `versions`: by package, "" where it lacks.

    JSON's own types only, so that it can be sent, printed and compared.
    """
    return {"source": source_id(), "versions": {name: version_of(name) for name in (*DECISIVE, *TOLD)}}


def source_id() -> str:
    """SHA-256, shortened, over the names and contents of our Python files, wherever they lie."""
    total = hashlib.sha256()
    for package in PACKAGES:
        folder = package_folder(package)
        for path in sorted(folder.rglob("*.py")) if folder else ():
            content = path.read_bytes()
            total.update(f"{package}/{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())  # type: ignore[arg-type]
            total.update(content)
    return total.hexdigest()[:16]


def package_folder(package: str) -> Path | None:
    """Where Python finds it; None where it does not."""
    spec = importlib.util.find_spec(package)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What forbids that both work on one set, and what is only told: each as `torch 2.9.0, here 2.10.0`.

    Builds of one version for different devices (`2.10.0+cpu`, `2.10.0+cu130`) are taken for the same code.
    """
    wrong, told = list[str](), list[str]()
    if ours["source"] != theirs["source"]:
        wrong.append(f"shard2vec's source {theirs['source']}, here {ours['source']}")
    for name in (*DECISIVE, *TOLD):
        here, there = ours["versions"][name], theirs["versions"].get(name, "")
        if here.partition("+")[0] != there.partition("+")[0]:
            (wrong if name in DECISIVE else told).append(f"{name} {there or 'missing'}, here {here or 'missing'}")
    return wrong, told


@cache
def version_of(package: str) -> str:
    """Of what is installed here; empty where it is not. Looked up once: that takes 0.5 ms, and every file says it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
