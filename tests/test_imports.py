"""timm comes without torch's compiler, and who wants the compiler has the real one."""

import importlib
import subprocess
import sys
from json import JSONDecoder
from pathlib import Path

import pytest

from pipeline import imports

SCRIPT = """
import sys
import pipeline.actors, pipeline.embed, timm, torchvision, torch
assert "pipeline.weights" not in sys.modules  # a worker that dies over its weights has told before that it started
from torchvision.ops import roi_align
assert not [name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor", "sympy"))]
assert timm.create_model("test_vit").eval()(torch.zeros(1, 3, 160, 160)).shape == (1, 1000)
assert timm.data.ImageNetInfo("imagenet-1k").num_classes() == 1000  # files beside the modules
assert roi_align(torch.ones(1, 1, 8, 8), torch.tensor([[0, 0, 0, 4, 4.0]]), 2).tolist() == [[[[1, 1], [1, 1]]]]
roi = sys.modules["torchvision.ops.roi_align"]
assert roi.is_compile_supported("cpu") is True  # which brings the compiler
import torch._dynamo
from torch._dynamo.utils import is_compile_supported
assert torch._dynamo.__file__.endswith("torch/_dynamo/__init__.py") and torch._dynamo is sys.modules["torch._dynamo"]
"""


def test_timm_is_imported_without_the_compiler_and_works() -> None:
    """None of its modules is loaded; what torchvision took from it works, and afterwards it is the real one."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_what_a_stand_in_has_not_is_the_real_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another release of timm may ask for anything: it costs the import that was to be spared."""
    stand_in = imports._StandIn("json", config=1)
    assert stand_in.config == 1 and stand_in.JSONDecoder is JSONDecoder
    with pytest.raises(AttributeError, match="__file__"):  # `inspect` asks every module
        _ = stand_in.__file__
    monkeypatch.setitem(sys.modules, imports.COMPILER, imports._StandIn(imports.COMPILER))
    monkeypatch.setitem(sys.modules, imports.UTILS, imports._StandIn(imports.UTILS))
    with pytest.raises(AttributeError):
        _ = sys.modules[imports.UTILS].__path__  # it is no package: `from … import` asks for that first
    with imports._stand_ins():  # those that are there stay: timm imports torchvision
        assert isinstance(sys.modules[imports.COMPILER], imports._StandIn)
    imports._remove()
    assert imports.COMPILER not in sys.modules and imports.UTILS not in sys.modules


def test_only_the_importers_are_found_so() -> None:
    """All else is found as ever, and the hook is there once however often it is asked for."""
    finders = list(sys.meta_path)
    imports.defer_compiler()
    assert sys.meta_path == finders and sum(isinstance(f, imports._Finder) for f in finders) == 1
    finder = next(f for f in finders if isinstance(f, imports._Finder))
    assert finder.find_spec("json") is None and finder.find_spec("timm.data") is None
    spec = finder.find_spec("timm")
    assert spec is not None and spec.origin == importlib.import_module("timm").__file__
