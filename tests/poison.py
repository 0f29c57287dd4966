"""Images that kill the process that decodes them, really: Pillow, patched before anything else is imported.

No image that crashes a current Pillow is known, so one is made: the folder's `sitecustomize` goes into the environment
of the run, and every process of it meets a JPEG whose comment says so with a jump to address 0, a kill or a hang.
"""

import os
from pathlib import Path

from pictures import jpeg

PATCH = """
import ctypes, os, signal, time
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
    return load(image)

JpegImagePlugin.JpegImageFile.load = poisoned
"""


def poison(kind: str) -> bytes:
    """`kind`: segfault, out of memory, exit or hang."""
    return jpeg(comment=kind)


def environment(folder: Path) -> dict[str, str]:
    """What makes them deadly, for a process to be started."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(PATCH)
    home = str(Path(__file__).resolve().parent.parent)
    return {"PYTHONPATH": os.pathsep.join([str(folder), home])}
