"""Hours of rubbish for the readers and the decoder: `python -m tests.chaos_rubbish SECONDS [SEED]`.

Each target runs in a process of its own, which may die, hang or grow: that is counted, its input is kept, and the next
process goes on. Where atheris is installed it steers by the coverage of our modules, `tarfile` and Pillow's plugins;
elsewhere the same edits are made from random seeds.
"""

import importlib.util
import json
import mmap
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

INPUT_S = 30.0  # one input may take that long
# And that much memory: of a tar its largest image; of Parquet a few copies of a page; the largest image, 2.7 GB.
TARGETS = {"tar": 300 * 2**20, "parquet": 300 * 2**20, "image": 3 * 2**30}
TALLY = struct.Struct("QQQQQ")  # inputs, rows, rejects, resident bytes at the start, the most since
MAX_INPUT_BYTES = 2**18
TOO_MUCH_MEMORY = 99  # exit code


def run(seconds: float, seed: int = 0, *, engine: str | None = None, inputs: int | None = None) -> dict[str, Any]:
    """Every target for a third of the time, or for `inputs` inputs. `engine`: `atheris`, `seeds`, or what is there.

    Gives for each target: inputs, rows, rejects, crashes, timeouts, too_much_memory, peak_bytes (above what the process
    held before its first input), found (paths of the inputs, in a temporary folder that stays where there are any).
    """
    engine = engine or ("atheris" if importlib.util.find_spec("atheris") else "seeds")
    return {"engine": engine} | {t: _hunt(t, seconds / len(TARGETS), seed, engine, inputs) for t in TARGETS}


def _hunt(target: str, seconds: float, seed: int, engine: str, inputs: int | None) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix=f"rubbish-{target}-"))
    found = {"inputs": 0, "rows": 0, "rejects": 0, "crashes": 0, "timeouts": 0, "too_much_memory": 0, "peak_bytes": 0}
    kept: list[str] = []
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 1:
        (folder / "tally").write_bytes(bytes(TALLY.size))
        command = [sys.executable, "-m", "tests.chaos_rubbish", "--child", target, str(folder)]
        command += [engine, str(left), str(seed), str(inputs or 0)]
        with open(folder / "log", "wb") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log, cwd=Path(__file__).parent.parent)
            how = _watch(child, folder / "tally", left + INPUT_S, TARGETS[target])
        tried, rows, rejects, start, peak = TALLY.unpack((folder / "tally").read_bytes())
        for name, count in (("inputs", tried), ("rows", rows), ("rejects", rejects)):
            found[name] += count
        found["peak_bytes"] = max(found["peak_bytes"], peak - start)
        if how is not None:
            found[how] += 1
            found["peak_bytes"] = max(found["peak_bytes"], TARGETS[target] if how == "too_much_memory" else 0)
            kept.append(str(folder / f"{how}-{seed}"))
            Path(kept[-1]).write_bytes((folder / "current").read_bytes() if (folder / "current").exists() else b"")
            (folder / "log").rename(folder / f"{how}-{seed}.log")
        seed += 1
        if inputs is not None:
            break
    return found | {"found": kept}


def _watch(child: "subprocess.Popen[bytes]", tally: Path, seconds: float, most_bytes: int) -> str | None:
    """How the process went wrong: `crashes`, `timeouts` or `too_much_memory`; None where it came to its end."""
    watched, ends = psutil.Process(child.pid), time.monotonic() + seconds + 60
    seen, since = -1, time.monotonic()
    try:
        while child.poll() is None:
            time.sleep(0.02)
            tried, _, _, start, _ = TALLY.unpack(tally.read_bytes())
            if tried != seen:
                seen, since = tried, time.monotonic()
            try:
                grown = watched.memory_info().rss - start if start else 0
            except psutil.NoSuchProcess:
                continue
            if grown > most_bytes:
                return "too_much_memory"
            if time.monotonic() > min(ends, since + INPUT_S + (0 if start else 120)):
                return "timeouts"
    finally:
        child.kill()
        child.wait()
    how = {0: None, TOO_MUCH_MEMORY: "too_much_memory"}
    return how.get(child.returncode, "crashes")


# In the process that may die


class _Tally:
    """Counts that outlive the process, and the input under way."""

    def __init__(self, folder: Path, most_bytes: int):
        with open(folder / "tally", "r+b") as file:
            self._shared = mmap.mmap(file.fileno(), TALLY.size)
        self._current = os.open(folder / "current", os.O_CREAT | os.O_WRONLY)
        self._counts = [0, 0, 0, 0, 0]
        self._most_bytes = most_bytes

    def begin(self, data: bytes) -> None:
        os.ftruncate(self._current, 0)
        os.pwrite(self._current, data, 0)
        if not self._counts[3]:
            self._counts[3] = psutil.Process().memory_info().rss

    def end(self, rows: int, rejects: int) -> None:
        for i, n in enumerate((1, rows, rejects)):
            self._counts[i] += n
        self._counts[4] = max(self._counts[3], _peak_bytes())
        TALLY.pack_into(self._shared, 0, *self._counts)
        if self._counts[4] - self._counts[3] > self._most_bytes:  # too short a peak for the parent to see
            os._exit(TOO_MUCH_MEMORY)


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _child(target: str, folder: Path, engine: str, seconds: float, seed: int, inputs: int) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    if engine == "atheris":
        import atheris

        names = ["tarfile", "PIL", "pipeline.tars", "pipeline.tables", "pipeline.images", "pipeline.shards"]
        with atheris.instrument_imports(include=names, enable_loader_override=False):
            tries, seeds = _target(target, folder)
    else:
        tries, seeds = _target(target, folder)
    tally = _Tally(folder, TARGETS[target])
    for data in seeds:  # what is loaded on first use is no growth
        tries(data)

    def one(data: bytes) -> None:
        tally.begin(data)
        tally.end(*tries(data))

    if engine == "atheris":
        _steered(one, seeds, folder, seconds, seed)
        return
    chance, ends = random.Random(seed), time.monotonic() + seconds
    done = 0
    while time.monotonic() < ends and (not inputs or done < inputs):
        one(_mutated(chance.choice(seeds), chance))
        done += 1


def _steered(one: Callable[[bytes], None], seeds: list[bytes], folder: Path, seconds: float, seed: int) -> None:
    import atheris

    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for i, data in enumerate(seeds):
        (corpus / f"seed-{i}").write_bytes(data)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.2:
            return atheris.Mutate(data, max_size)
        return _mutated(chance.choice((data, data, chance.choice(seeds))), chance)[:max_size]

    flags = [f"-max_total_time={max(1, int(seconds))}", f"-seed={seed + 1}", f"-max_len={MAX_INPUT_BYTES}"]
    flags += ["-rss_limit_mb=0", "-timeout=1000", f"-artifact_prefix={folder}/", "-verbosity=0"]
    atheris.Setup([sys.argv[0], str(corpus), *flags], one, custom_mutator=mutate)
    atheris.Fuzz()


def _mutated(data: bytes, chance: random.Random) -> bytes:
    """Damaged; half the time with the checksums set right again, so that what they guard is believed."""
    import damage

    data = damage.damaged(data, damage.random_edits(chance))
    if chance.random() < 0.5:
        data = damage.with_png_checksums(damage.with_tar_checksums(data))
    return data


def _target(target: str, folder: Path) -> tuple[Callable[[bytes], tuple[int, int]], list[bytes]]:
    """A function that raises where a promise is broken, else gives rows and rejects; and files to begin with."""
    import damage
    import pictures
    from containers import samples_of

    if target == "image":
        decoders = [pictures.decoder(channels=channels) for channels in (1, 3, 4)]
        return lambda data: _decoded(decoders[len(data) % 3], data), list(pictures.sound().values())
    path = folder / "shard"

    def read(data: bytes) -> tuple[int, int]:
        path.write_bytes(data)
        samples = samples_of(path, "parquet" if target == "parquet" else "webdataset")
        "".join(s.id_key + (s.reject.message if s.reject else "") for s in samples).encode()
        rejects = sum(s.reject is not None for s in samples)
        return len(samples) - rejects, rejects

    return read, list((damage.tables() if target == "parquet" else damage.tars()).values())


def _decoded(decoder: Any, data: bytes) -> tuple[int, int]:
    from pipeline.errors import REASONS, Reject

    try:
        assert decoder(data).pixels.shape == decoder.preprocessing.input_size
    except Reject as why:
        assert why.reason in REASONS and 0 < len(why.message) <= 200 and why.message.isprintable(), why.args
        return 0, 1
    return 1, 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(sys.argv[2], Path(sys.argv[3]), sys.argv[4], float(sys.argv[5]), int(sys.argv[6]), int(sys.argv[7]))
    else:
        print(json.dumps(run(float(sys.argv[1]), int((sys.argv[2:] or ["0"])[0])), indent=1))
