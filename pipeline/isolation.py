"""Decoding where a crash costs one image: in processes apart, for shards that have taken a worker down.

A decoder fed by strangers may end its whole process: a segmentation fault, an abort, the kernel's out-of-memory
killer. What enters and leaves is as for `images.Decoder`; an image that kills its process leaves as a `Reject`.

    decoding threads → a nursery each: a process that has imported everything, and forks → a child that decodes
"""

import contextlib
import json
import os
import queue
import resource
import signal
import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, cast, get_args

import numpy as np

from pipeline.errors import Reason, Reject
from pipeline.images import Decoded, Decoder, Preprocessing

AT_ONCE = 4  # nurseries of one worker, 250 MB each
DECODE_S = 120  # the largest image that is taken needs some 20 s of one core
MEMORY_BYTES = 4 * 2**30  # of one child beyond what it inherits; the largest image that is taken needs 2.7 GB
TRIES = 3  # of one image, where it was the nursery that died
LENGTH = struct.Struct("<Q")


class IsolatedDecoder:
    """Called as a `Decoder` is, from any thread, with the same results to the bit; `close` ends its processes."""

    def __init__(self, preprocessing: Preprocessing, *, exif_orientation: bool = True):
        self._settings = {"preprocessing": asdict(preprocessing), "exif_orientation": exif_orientation}
        self._shape = preprocessing.input_size
        self._nurseries: queue.LifoQueue[_Nursery | None] = queue.LifoQueue()
        for _ in range(AT_ONCE):
            self._nurseries.put(None)  # started when it is needed

    def __call__(self, data: bytes) -> Decoded:
        """Raises `Reject`, also where the image crashed its process; `ChildProcessError` where none can be had."""
        nursery = self._nurseries.get()
        try:
            for _ in range(TRIES):
                nursery = nursery or _Nursery(self._settings)
                try:
                    told, body = nursery.ask(data)
                    return self._result(told, body)
                except (OSError, EOFError):
                    nursery.close()
                    nursery = None
            raise ChildProcessError(f"the process that decodes apart died {TRIES} times: is there enough memory?")
        finally:
            self._nurseries.put(nursery)

    def _result(self, told: dict[str, Any], body: bytes) -> Decoded:
        if "reason" in told:
            raise Reject(told["reason"], "decode", told["message"])
        if "ended" in told:
            raise _killed(told["ended"])
        pixels = np.frombuffer(bytearray(body), np.uint8).reshape(self._shape)
        return Decoded(pixels, told["width"], told["height"])

    def close(self) -> None:
        """Until it is called again."""
        idle = []
        with contextlib.suppress(queue.Empty):
            while True:
                idle.append(self._nurseries.get_nowait())
        for nursery in idle:
            if nursery is not None:
                nursery.close()
            self._nurseries.put(None)


def _killed(status: int) -> Reject:
    """`status`: as `subprocess` gives it, a negative one is the signal's."""
    if status == -signal.SIGALRM:
        return Reject("corrupt", "decode", f"decoding took more than {DECODE_S} s and was stopped")
    if status == -signal.SIGKILL:
        return Reject("too_large", "decode", "its decoder was killed, as the system does where memory runs out")
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return Reject("corrupt", "decode", f"its decoder crashed ({how})")


class _Nursery:
    """The parent's side of one nursery."""

    def __init__(self, settings: dict[str, Any]):
        home = str(Path(__file__).resolve().parent.parent)
        inherited = os.environ.get("PYTHONPATH", "")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.isolation", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a crash's last words are not for the user
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in (home, inherited) if p)},
        )

    def ask(self, data: bytes) -> tuple[dict[str, Any], bytes]:
        stdin, stdout = cast(BinaryIO, self._process.stdin), cast(BinaryIO, self._process.stdout)
        _write(stdin, data)
        stdin.flush()
        return _parsed(_read(stdout))

    def close(self) -> None:
        self._process.kill()
        with contextlib.suppress(OSError):
            self._process.communicate()


# Frames: a length of 8 bytes, then as many bytes. An answer's frame: a line of JSON, then the pixels.


def _write(stream: BinaryIO, data: bytes) -> None:
    stream.write(LENGTH.pack(len(data)))
    stream.write(data)


def _read(stream: BinaryIO) -> bytes:
    """Raises `EOFError` where the other side has gone."""
    (length,) = LENGTH.unpack(_exactly(stream, LENGTH.size))
    return _exactly(stream, length)


def _exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data


def _answer(told: dict[str, Any], body: bytes = b"") -> bytes:
    return json.dumps(told).encode() + b"\n" + body


def _parsed(answer: bytes) -> tuple[dict[str, Any], bytes]:
    """JSON and raw bytes, never a pickle: a decoder that strangers' bytes have taken over may write what it likes."""
    line, _, body = answer.partition(b"\n")
    told = json.loads(line)
    if told.get("reason", "corrupt") not in get_args(Reason):
        raise EOFError
    return told, body


# The nursery's own process


def serve(settings: dict[str, Any], source: BinaryIO, sink: BinaryIO) -> None:
    """Answers each image of `source` on `sink` by way of a child, until that ends; a dead child has a successor."""
    preprocessing = Preprocessing.of(settings["preprocessing"])  # JSON has no tuples
    decoder = Decoder(preprocessing, exif_orientation=settings["exif_orientation"])
    child: _Child | None = None
    while True:
        try:
            data = _read(source)
        except EOFError:
            return
        child = child or _Child(decoder)
        try:
            answer = child.ask(data)
        except (OSError, EOFError):
            answer, child = _answer({"ended": child.status()}), None
        _write(sink, answer)
        sink.flush()


class _Child:
    """A fork of the nursery that decodes until an image kills it."""

    def __init__(self, decoder: Decoder):
        (theirs, to_them), (ours, to_us) = os.pipe(), os.pipe()
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
        return _read(self._source)

    def status(self) -> int:
        """How it ended."""
        _, status = os.waitpid(self._pid, 0)
        for stream in (self._sink, self._source):
            with contextlib.suppress(OSError):
                stream.close()
        return os.waitstatus_to_exitcode(status)


def _decode_all(decoder: Decoder, source: BinaryIO, sink: BinaryIO) -> None:
    _bound_this_process()
    while True:
        data = _read(source)
        signal.alarm(DECODE_S)
        try:
            decoded = decoder(data)
            answer = _answer({"width": decoded.width, "height": decoded.height}, decoded.pixels.tobytes())
        except Reject as why:
            answer = _answer({"reason": why.reason, "message": why.message})
        signal.alarm(0)
        _write(sink, answer)
        sink.flush()


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
