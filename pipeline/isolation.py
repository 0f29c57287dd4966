"""Decoding where a crash costs one image: in processes apart, for shards that have taken a worker down.

A decoder fed by strangers may end its whole process: a segmentation fault, an abort, the kernel's out-of-memory
killer. What enters and leaves is as for `images.Decoder`; an image that kills its process leaves as a `Reject`.

    decoding threads, in turn → a nursery: a process that has imported everything, and forks → a child that decodes
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast, get_args

import numpy as np

from pipeline.errors import Reason, Reject
from pipeline.images import Decoded, Decoder, Preprocessing

CPU_S = 120  # of one image; the largest that is taken needs some 20 s
WALL_S = 240  # of one image, on a machine that has others to serve; twice that is below the 600 s of the watchdog
MEMORY_BYTES = 4 * 2**30  # of one child beyond what it inherits; the largest image that is taken needs 2.7 GB
TRIES = 3  # of one image, where it was the nursery that died
DEATHS = 2  # of an image's decoder by a kill or too long a time, which may be the machine's fault
TOLD_BYTES = 2**16  # of an answer beside its pixels
LENGTH = struct.Struct("<Q")
ODD = (ValueError, LookupError, TypeError, OverflowError)  # what a senseless answer raises where it is read
PR_SET_PDEATHSIG = 1  # prctl(2)


class IsolatedDecoder:
    """Called as a `Decoder` is, from any thread, with the same results to the bit; `close` ends its processes.

    One image at a time, so that its memory is known: a shard that takes workers down may be of large ones.
    """

    def __init__(self, preprocessing: Preprocessing, *, exif_orientation: bool = True, how: str = "exact"):
        self._settings = {"preprocessing": asdict(preprocessing), "exif_orientation": exif_orientation, "how": how}
        self._shape = preprocessing.input_size
        self._one_image = threading.Lock()
        self._nursery: _Nursery | None = None

    def __call__(self, data: bytes) -> Decoded:
        """Raises `Reject`, also where the image crashed its process; `ChildProcessError` where none can be had."""
        with self._one_image:
            for _ in range(DEATHS):
                told, body = self._ask(data)
                if told.get("ended") not in (-signal.SIGKILL, -signal.SIGALRM):
                    break
        if "ended" in told:
            raise _killed(told["ended"])
        if "reason" in told:
            raise Reject(told["reason"], "decode", told["message"])
        return Decoded(np.frombuffer(bytearray(body), np.uint8).reshape(self._shape), told["width"], told["height"])

    def _ask(self, data: bytes) -> tuple[dict[str, Any], bytes]:
        for _ in range(TRIES):
            self._nursery = self._nursery or _Nursery(self._settings)
            try:
                return _parsed(self._nursery.ask(data), prod(self._shape))
            except ODD:  # the next answer may be the rest of this one
                self._end_nursery()
                return {"ended": ANSWERED_NONSENSE}, b""
            except (OSError, EOFError):
                self._end_nursery()
        raise ChildProcessError(f"the process that decodes apart died {TRIES} times: is there enough memory?")

    def close(self) -> None:
        """Until it is called again."""
        with self._one_image:
            self._end_nursery()

    def _end_nursery(self) -> None:
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None


def _killed(status: int) -> Reject:
    """`status`: as `subprocess` gives it, a negative one is the signal's."""
    if status in (-signal.SIGPROF, -signal.SIGALRM):
        return Reject("corrupt", "decode", f"decoding took more than {CPU_S} s of a core, and was stopped")
    if status == -signal.SIGKILL:
        return Reject("too_large", "decode", "its decoder was killed, as the system does where memory runs out")
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return Reject("corrupt", "decode", f"its decoder crashed ({how})")


class _Nursery:
    """The parent's side of the nursery."""

    def __init__(self, settings: dict[str, Any]):
        home = str(Path(__file__).resolve().parent.parent)
        inherited = os.environ.get("PYTHONPATH", "")
        self._process = subprocess.Popen(
            # -P: else the working directory's own `pipeline` or `json` would be imported.
            [sys.executable, "-P", "-m", "pipeline.isolation", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a crash's last words are not for the user
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in (home, inherited) if p)},
        )

    def ask(self, data: bytes) -> bytes:
        stdin, stdout = cast(BinaryIO, self._process.stdin), cast(BinaryIO, self._process.stdout)
        _write(stdin, data)
        stdin.flush()
        return _read(stdout)

    def close(self) -> None:
        self._process.kill()
        with contextlib.suppress(OSError):
            self._process.communicate()


ANSWERED_NONSENSE = 1  # as if it had ended so


# Frames: a length of 8 bytes, then as many bytes. An answer's frame: a line of JSON, then the pixels.


def _write(stream: BinaryIO, data: bytes) -> None:
    stream.write(LENGTH.pack(len(data)))
    stream.write(data)


def _read(stream: BinaryIO, most: int | None = None) -> bytes:
    """Raises `EOFError` where the other side has gone, `ValueError` where it wants to tell more than `most` bytes."""
    (length,) = LENGTH.unpack(_exactly(stream, LENGTH.size))
    if most is not None and length > most:
        raise ValueError(f"{length} bytes of an answer")
    return _exactly(stream, length)


def _exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data


def _answer(told: dict[str, Any], body: bytes = b"") -> bytes:
    return json.dumps(told).encode() + b"\n" + body


def _parsed(answer: bytes, pixels: int) -> tuple[dict[str, Any], bytes]:
    """JSON and raw bytes, never a pickle: a decoder that strangers' bytes have taken over may write what it likes.

    Raises one of `ODD` for an answer that is none.
    """
    line, _, body = answer.partition(b"\n")
    told = json.loads(line)
    if "ended" in told:
        return {"ended": int(told["ended"])}, b""
    if "reason" in told:
        if told["reason"] not in get_args(Reason):
            raise ValueError(told["reason"])
        return {"reason": told["reason"], "message": str(told["message"])}, b""
    if len(body) != pixels:
        raise ValueError(f"{len(body)} bytes of pixels")
    return {"width": int(told["width"]), "height": int(told["height"])}, body


# The nursery's own process


def serve(settings: dict[str, Any], source: BinaryIO, sink: BinaryIO) -> None:
    """Answers each image of `source` on `sink` by way of a child, until that ends; a dead child has a successor."""
    _die_with_the_parent()
    preprocessing = Preprocessing.of(settings["preprocessing"])  # JSON has no tuples
    decoder = Decoder(preprocessing, exif_orientation=settings["exif_orientation"], how=settings["how"])
    child: _Child | None = None
    while True:
        try:
            data = _read(source)
        except EOFError:
            return
        child = child or _Child(decoder)
        try:
            answer = child.ask(data)
        except (OSError, EOFError, ValueError) as e:
            answer, child = _answer({"ended": child.status(kill=isinstance(e, ValueError))}), None
        _write(sink, answer)
        sink.flush()


class _Child:
    """A fork of the nursery that decodes until an image kills it."""

    def __init__(self, decoder: Decoder):
        (theirs, to_them), (ours, to_us) = os.pipe(), os.pipe()
        self._most_bytes = prod(decoder.preprocessing.input_size) + TOLD_BYTES
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(to_them)
                os.close(ours)
                _decode_all(decoder, os.fdopen(theirs, "rb"), os.fdopen(to_us, "wb"))
            finally:
                os._exit(1)
        os.close(theirs)
        os.close(to_us)
        self._sink, self._source = os.fdopen(to_them, "wb"), os.fdopen(ours, "rb")

    def ask(self, data: bytes) -> bytes:
        _write(self._sink, data)
        self._sink.flush()
        return _read(self._source, self._most_bytes)

    def status(self, kill: bool) -> int:
        """How it ended; one that has to be killed had answered nonsense."""
        if kill:
            os.kill(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        for stream in (self._sink, self._source):
            with contextlib.suppress(OSError):
                stream.close()
        return ANSWERED_NONSENSE if kill else os.waitstatus_to_exitcode(status)


def _decode_all(decoder: Decoder, source: BinaryIO, sink: BinaryIO) -> None:
    _die_with_the_parent()
    _bound_this_process()
    while True:
        data = _read(source)
        _bound_the_time(CPU_S, WALL_S)
        try:
            decoded = decoder(data)
            answer = _answer({"width": decoded.width, "height": decoded.height}, decoded.pixels.tobytes())
        except Reject as why:
            answer = _answer({"reason": why.reason, "message": why.message})
        _bound_the_time(0, 0)
        _write(sink, answer)
        sink.flush()


def _die_with_the_parent() -> None:
    """However that ends: a worker that is killed leaves nobody behind who still decodes for it."""
    with contextlib.suppress(OSError, AttributeError):  # no Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _bound_the_time(cpu_s: int, wall_s: int) -> None:
    """The signals end the process; 0 is no bound."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.alarm(wall_s)


def _bound_this_process() -> None:
    """No core files of gigabytes; memory; and the first to go where the kernel must choose."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # no Linux
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        Path("/proc/self/oom_score_adj").write_text("1000")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):  # what a library prints must not come between the answers
        os.dup2(nowhere, descriptor)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]), sys.stdin.buffer, sys.stdout.buffer)
