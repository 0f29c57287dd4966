"""What a submitted job takes along: a folder with its arguments, our packages and the check of both on arrival.

The arguments may hold signed URLs, and everybody who may look at a cluster's dashboard sees entrypoints, metadata and
environments. So they lie in a file of the working directory, as do lists of inputs that are local here.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.build import PACKAGES, package_folder

FOLDER = "shipment"  # of the working directory, and the module that the entrypoint runs
ARRIVAL = {"arrival.py": "__main__.py", "build.py": "build.py"}


@dataclass(frozen=True)
class Shipment:
    """A verb with its arguments, as they hold in any process of the cluster."""

    verb: str
    arguments: Sequence[str]  # the verb first
    lists: Mapping[str, str] = field(default_factory=dict)  # name in the working directory → content

    def run_id(self, resources: Mapping[str, float]) -> str:
        """8 hex digits over what is asked for: the same command on the same lists with the same resources."""
        kept = [argument for argument in self.arguments if argument != "--json"]
        asked = json.dumps([kept, sorted(self.lists.items()), sorted(resources.items())])
        return hashlib.sha256(asked.encode()).hexdigest()[:8]

    def write(self, folder: Path, build: Mapping[str, Any], is_shipped: bool) -> None:
        """Fills the folder, which becomes the job's working directory. Without our packages unless `is_shipped`."""
        inside = folder / FOLDER
        inside.mkdir()
        here = Path(__file__).parent
        for name, name_there in ARRIVAL.items():
            shutil.copyfile(here / name, inside / name_there)
        told = {"arguments": list(self.arguments), "build": build, "is_shipped": is_shipped}
        (inside / "shipment.json").write_text(json.dumps(told), encoding="utf-8")
        for name, content in self.lists.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content, encoding="utf-8")
        for package in PACKAGES if is_shipped else ():
            source = package_folder(package)
            assert source is not None  # this process runs from it
            shutil.copytree(source, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
