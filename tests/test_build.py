"""Which code a process runs: its own sources to the byte, and the packages that decide a vector."""

import copy
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from pipeline.build import build_id, differences, source_id

REPOSITORY = Path(__file__).resolve().parent.parent


def elsewhere(folder: Path, *path: Path) -> str:
    """`source_id` of a process that finds our packages there."""
    code = (
        f"import sys\nsys.path[:0] = {[str(p) for p in path]}\nfrom pipeline.build import source_id\nprint(source_id())"
    )
    return subprocess.check_output([sys.executable, "-P", "-c", code], cwd=folder, text=True).strip()


def test_a_copy_is_the_same_code_and_a_changed_byte_is_not(tmp_path: Path) -> None:
    """Wherever it lies, both packages in one folder or apart, with or without what Python compiled."""
    skip = shutil.ignore_patterns("__pycache__")
    for package in ("pipeline", "jobs"):
        shutil.copytree(REPOSITORY / package, tmp_path / package / package, ignore=skip)
    assert elsewhere(tmp_path, tmp_path / "pipeline", tmp_path / "jobs") == source_id()
    with (tmp_path / "jobs" / "jobs" / "gc.py").open("a") as file:
        file.write("\n")
    assert elsewhere(tmp_path, tmp_path / "pipeline", tmp_path / "jobs") != source_id()


def test_what_can_change_a_vector_forbids_and_the_rest_is_told() -> None:
    """A build for another device is the same version; a package that lacks is named."""
    ours = build_id()
    assert ours["versions"]["timm"] == version("timm") and differences(ours, copy.deepcopy(ours)) == ([], [])
    theirs = copy.deepcopy(ours)
    theirs["versions"] |= {"torch": ours["versions"]["torch"].partition("+")[0] + "+cpu", "pyarrow": "1.0"}
    assert differences(ours, theirs) == ([], [f"pyarrow 1.0, here {version('pyarrow')}"])
    theirs["versions"] |= {"timm": "0.9", "pillow": ""}
    theirs["source"] = "f" * 16
    assert differences(ours, theirs)[0] == [
        f"shard2vec's source ffffffffffffffff, here {ours['source']}",
        f"timm 0.9, here {version('timm')}",
        f"pillow missing, here {version('pillow')}",
    ]
