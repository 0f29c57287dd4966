"""Threads around bounded queues that end together, a bound on the bytes between them, calls a few at a time, groups."""

import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")


class Stopped(Exception):
    """Raised in a thread of the flow that waits when the flow has ended."""


class Flow:
    """Threads around bounded queues that end together: whoever waits is woken when one of them fails."""

    POLL_S = 0.2

    def __init__(self) -> None:
        self._stopping = threading.Event()
        self._error: BaseException | None = None

    def start(self, run: Callable[[], None], then: "queue.Queue[Any] | None" = None) -> threading.Thread:
        """Runs in a thread; puts None to `then` at the end of it."""

        def body() -> None:
            try:
                run()
                if then is not None:
                    self.put(then, None)
            except Stopped:
                pass
            except BaseException as e:  # handed to the thread that called us, which raises it
                self._error = e
                self._stopping.set()

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        return thread

    def stop(self) -> None:
        self._stopping.set()

    def check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._stopping.is_set():
            raise Stopped

    def pause(self, seconds: float) -> None:
        """Waits so long, or until the flow ends."""
        self._stopping.wait(seconds)
        self.check()

    def put(self, target: "queue.Queue[Any]", item: object) -> None:
        while True:
            self.check()
            try:
                return target.put(item, timeout=self.POLL_S)
            except queue.Full:
                pass

    def get(self, source: "queue.Queue[Any]") -> Any:
        while True:
            self.check()
            try:
                return source.get(timeout=self.POLL_S)
            except queue.Empty:
                pass

    def wait(self, future: "Future[T]") -> T:
        while True:
            self.check()
            try:
                return future.result(timeout=self.POLL_S)
            except TimeoutError:
                if future.done():  # the sample's own TimeoutError, not our waiting
                    return future.result()


class ByteBudget:
    """Bytes of encoded images in memory at once; a single image beyond the limit passes when nothing else is there."""

    def __init__(self, limit: int):
        self._limit, self._taken, self._freed = limit, 0, threading.Condition()

    def take(self, count: int, flow: Flow) -> None:
        with self._freed:
            while self._taken and self._taken + count > self._limit:
                flow.check()
                self._freed.wait(Flow.POLL_S)
            self._taken += count

    def give(self, count: int) -> None:
        with self._freed:
            self._taken -= count
            self._freed.notify_all()


def ordered(call: Callable[[S], T], items: Iterable[S], at_once: int) -> Iterator[T]:
    """`call` of each item, in order, in so many threads; no more items and results than twice that are held."""
    with ThreadPoolExecutor(at_once) as pool:
        under_way = deque[Future[T]]()
        try:
            for item in items:
                under_way.append(pool.submit(call, item))
                if len(under_way) >= 2 * at_once:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items; one or two more are made meanwhile, in a thread."""
    iterator, end = iter(items), object()
    made = ordered(lambda _: next(iterator, end), repeat(None), 1)
    for item in made:
        if item is end:
            return
        yield item  # type: ignore[misc]


def grouped(items: Iterable[T], weight: Callable[[T], int], limit: int, most: int = sys.maxsize) -> Iterator[list[T]]:
    """Consecutive ones, `most` of them and of so much `weight` together at most; what alone weighs more comes alone."""
    several: list[T] = []
    total = 0
    for item in items:
        size = weight(item)
        if several and (len(several) == most or total + size > limit):
            yield several
            several, total = [], 0
        several.append(item)
        total += size
    if several:
        yield several
