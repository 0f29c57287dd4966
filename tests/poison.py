"""Images that kill the process that decodes them, really: Pillow, patched before anything else is imported.

No image that crashes a current Pillow is known, so one is made: the folder's `sitecustomize` goes into the environment
of the run, and every process of it meets a JPEG whose comment says so with a jump to address 0, a kill, a hang, a loop
or a lie. Of four colours, as others are not Pillow's to decode.
"""

import os
from pathlib import Path

from pictures import jpeg

PATCH = """
import ctypes, os, signal, struct, time
from PIL import JpegImagePlugin

load = JpegImagePlugin.JpegImageFile.load

def poisoned(image):
    comment = image.info.get("comment")
    if comment == b"segfault":
        ctypes.string_at(0)
    if comment == b"out of memory":
        os.kill(os.getpid(), signal.SIGKILL)
    if comment == b"exit":
        os._exit(3)
    if comment == b"hang":
        signal.alarm(1)
        time.sleep(60)
    if comment == b"loop":
        signal.setitimer(signal.ITIMER_PROF, 0.2)
        while True:
            pass
    if comment in (b"nonsense", b"endless answer"):
        answer = b"[1" if comment == b"nonsense" else b""
        for pipe in range(3, 64):
            try:
                os.write(pipe, struct.pack("<Q", len(answer) or 2**62) + answer)
            except OSError:
                continue
        time.sleep(60)
    if comment and comment.startswith(b"kill once ") and os.path.exists(comment[10:]):
        os.unlink(comment[10:])
        os.kill(os.getpid(), signal.SIGKILL)
    return load(image)

JpegImagePlugin.JpegImageFile.load = poisoned
"""


def poison(kind: str) -> bytes:
    """`kind`: segfault, out of memory, exit, hang, loop, nonsense or endless answer (of a decoder taken over)."""
    return jpeg(mode="CMYK", comment=kind)


def environment(folder: Path) -> dict[str, str]:
    """What makes them deadly, for a process to be started."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(PATCH)
    home = str(Path(__file__).resolve().parent.parent)
    return {"PYTHONPATH": os.pathsep.join([str(folder), home])}
