"""Image bytes → small JPEGs, as far as they decode at all: rejects too, so in a process of its own.

What a run refused may be a bomb or crash its decoder; here it costs its thumbnail. The process ends by its limits, and
the next image has another one. A cut image shows the part that is there.
"""

import io
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast

from PIL import Image, ImageFile, ImageOps

SIDE = 128  # pixels, the longer one: 64 on paper, sharp on screens of two pixels a pixel; if nothing else is asked
QUALITY = 80  # 4 to 6 kB
PIXELS = 60_000_000  # decoded at most; JPEGs are scaled down while they are
CPU_S, WALL_S = 20, 60  # of one image
DEATHS = 2  # over one image: the first may have been the system's doing, where memory is short
MEMORY_BYTES = 2**30  # beyond what the process starts with
LENGTH = struct.Struct("<Q")


class Shrinker:
    """Called with an image's bytes, from any thread, one at a time; a context that leaves no process behind.

    `formats`: Pillow's names of those that may be decoded; some of its others run programs on the bytes.
    """

    def __init__(self, formats: Sequence[str], side: int = SIDE) -> None:
        self._formats, self._side = ",".join(formats), side
        self._one = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, data: bytes) -> bytes | None:
        """A JPEG of at most `side` pixels a side; None of what does not decode."""
        with self._one:
            for _ in range(DEATHS):
                try:
                    self._process = self._process or _start(self._formats, self._side)
                    _write(cast(BinaryIO, self._process.stdin), data)
                    return _read(cast(BinaryIO, self._process.stdout)) or None
                except (OSError, EOFError):
                    self._end()
        return None

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            with suppress(OSError):
                self._process.communicate()
            self._process = None

    def __enter__(self) -> "Shrinker":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()


def _start(formats: str, side: int) -> "subprocess.Popen[bytes]":
    home, inherited = str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")
    return subprocess.Popen(
        # -P: else the working directory's own `pipeline` would be imported.
        [sys.executable, "-P", "-m", "pipeline.shrinking", formats, str(side)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # a crash's last words are not for the user
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in (home, inherited) if p)},
    )


def _write(stream: BinaryIO, data: bytes) -> None:
    stream.write(LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def _read(stream: BinaryIO) -> bytes:
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError
    (count,) = LENGTH.unpack(head)
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data


# The process


def shrink(data: bytes, formats: list[str], side: int = SIDE) -> bytes:
    """The JPEG; empty where nothing can be shown of it."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            image.draft("RGB", (side, side))
            if image.width * image.height > PIXELS:
                return b""
            upright = ImageOps.exif_transpose(image)
        upright.thumbnail((side, side), reducing_gap=2.0)
        sink = io.BytesIO()
        _rgb(upright).save(sink, "JPEG", quality=QUALITY, optimize=True)
        return sink.getvalue()
    # A decoder fed by strangers raises nearly anything, and whatever it is, there is no picture.
    except Exception:
        return b""


def _rgb(image: Image.Image) -> Image.Image:
    """16 bits a channel scaled to 8; what is transparent shows the page's middle grey."""
    if image.mode.startswith(("I", "F")):
        low, high = image.getextrema()
        span = max(float(high) - float(low), 1e-9)  # type: ignore[arg-type]
        image = image.convert("F").point(lambda v: (v - low) * (255 / span)).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        ground = Image.new("RGBA", image.size, (128, 128, 128, 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return image.convert("RGB")


def serve(formats: Sequence[str], side: int, source: BinaryIO, sink: BinaryIO) -> None:
    """Answers each image until `source` ends; a signal ends the process with the image that takes too long."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    warnings.simplefilter("ignore")
    Image.init()
    known = [name for name in formats if name in Image.OPEN]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):  # no Linux
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        Path("/proc/self/oom_score_adj").write_text("1000")
    while True:
        try:
            data = _read(source)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        signal.alarm(WALL_S)
        answer = shrink(data, known, side)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        _write(sink, answer)


if __name__ == "__main__":
    serve(sys.argv[1].split(","), int(sys.argv[2]), sys.stdin.buffer, sys.stdout.buffer)
