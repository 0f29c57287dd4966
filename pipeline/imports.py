"""timm and torchvision without torch's compiler, which both import and only `--engine compile` needs.

Without it each process of a run starts in half the time: importing `pipeline.embed` and `pipeline.actors` took 7.1 CPU
seconds and 843 MB, and takes 3.5 and 704 (torch 2.15, torchvision 0.29, timm 1.0.31; two cores of an Intel Xeon,
2026-11-28). While timm or torchvision is imported, stand-ins give the two names that they take from the compiler;
afterwards these are gone, and whoever wants the compiler imports it as ever. Any other name that is asked for meanwhile
brings the real one at once, so that another release costs time and nothing else.
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

IMPORTERS = ("torchvision", "timm")
COMPILER, UTILS = "torch._dynamo", "torch._dynamo.utils"


def defer_compiler() -> None:
    """From now on `IMPORTERS` are imported so; nothing is imported by this."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the importers where they are, and has their code run beside the stand-ins."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in IMPORTERS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _beside_stand_ins(spec.loader.exec_module)  # type: ignore
        return spec


def _beside_stand_ins(execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def executed(module: ModuleType) -> None:
        with _stand_ins():
            execute(module)

    return executed


@contextmanager
def _stand_ins() -> Iterator[None]:
    if COMPILER in sys.modules:  # the compiler itself, or the stand-ins: timm imports torchvision
        yield
        return
    sys.modules |= {
        COMPILER: _StandIn(COMPILER, disable=_disable),
        UTILS: _StandIn(UTILS, is_compile_supported=_is_compile_supported),
    }
    try:
        yield
    finally:
        _remove()


def _remove() -> None:
    for name in (COMPILER, UTILS):
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]


class _StandIn(ModuleType):
    """A module with a few names; any other is the real module's, which takes its place then."""

    def __init__(self, name: str, **names: Any):
        super().__init__(name)
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and (self.__name__, name) != (COMPILER, "__path__"):
            raise AttributeError(name)  # as `inspect` and `import` ask; who wants another part asks for the path
        _remove()
        return getattr(importlib.import_module(self.__name__), name)


def _disable(fn: Any = None, recursive: bool = True, **_: Any) -> Any:
    """What keeps the compiler out of a function: as it is. timm has it for one class, which trains."""
    return fn if fn is not None else lambda fn: fn


def _is_compile_supported(device_type: str) -> Any:
    return importlib.import_module(UTILS).is_compile_supported(device_type)
