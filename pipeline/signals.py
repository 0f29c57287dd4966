"""SIGTERM and Ctrl-C while a command works: both end it, cleanly and resumably, until its result is being made final.

From then on they wait. What is left, a commit and the telling of it, takes as long as a store's retries at most; and a
signal amid it would have a run that committed end as one that did not. Ray's SIGKILL comes 60 s after its SIGTERM.

Python hears signals in its main thread alone: elsewhere nothing here does anything, and no signal comes.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None

_before: dict[signal.Signals, _Handler] = {}  # what the outermost `interruptible` found; empty without one
_is_held = _has_come = False


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, SIGTERM, as schedulers send it, is Ctrl-C: `KeyboardInterrupt`. The outermost one ends what waits."""
    global _is_held, _has_come
    if _before or threading.current_thread() is not threading.main_thread():
        yield
        return
    _before.update({number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)})
    try:
        _listen()
        yield
    finally:
        for number, handler in _before.items():
            _set(number, handler)
        _before.clear()
        _is_held = _has_come = False


def hold() -> None:
    """From here on signals wait, until `heard`, or until the outermost `interruptible` ends and forgets them."""
    global _is_held
    if _is_ours():
        for number, handler in _before.items():
            if handler is not signal.SIG_IGN:  # of a job in the background of a shell
                _set(number, _wait)
        _is_held = True


@contextmanager
def heard() -> Iterator[None]:
    """Within, signals interrupt, and one that waits does so at once; where they were held they are again after it."""
    global _has_come
    if not (_is_ours() and _is_held):
        yield
        return
    try:
        _listen()
        if _has_come:
            _has_come = False
            raise KeyboardInterrupt
        yield
    finally:
        hold()


def _is_ours() -> bool:
    return bool(_before) and threading.current_thread() is threading.main_thread()


def _listen() -> None:
    _set(signal.SIGINT, _before[signal.SIGINT])
    _set(signal.SIGTERM, signal.default_int_handler)


def _wait(number: int, frame: FrameType | None) -> None:
    global _has_come
    _has_come = True


def _set(number: signal.Signals, handler: _Handler) -> None:
    if handler is not None:  # one that Python did not put there, and cannot put back
        signal.signal(number, handler)
