"""What computes a backbone's body: torch step by step (`eager`), one compiled graph (`compile`), OpenVINO on the CPU.

`start` gives a function of normalised batches of one shape, warmed. `resolve_engine` proves an engine before a run, on
the model itself, against eager fp32; where it cannot be had or leaves its stated error, the run is eager and says why.
The engine is in the set's name, so after that nothing changes it: what a worker cannot make ends the run.
"""

import gc
import importlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import timm
import torch
from torch.nn.functional import cosine_similarity, interpolate
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from pipeline import findings, machine
from pipeline.architecture import line
from pipeline.build import version_of
from pipeline.cache import KEEP_S, cache_folder
from pipeline.config import TensorColumn
from pipeline.errors import NoRoom
from pipeline.features import Body, Caught, Taps

if TYPE_CHECKING:
    from pipeline.backbone import Backbone, Vectors

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TRACED = 2  # images of the batch that OpenVINO's graph is traced with: one would let sizes of 1 spread by themselves
PROVEN = 2  # different images that an engine is proven with, again and again over a whole batch
SPOTS = 16  # of random colour a side, smoothly joined: more like a photo than noise is
FOLDER = "engines"  # of the cache: those that were too far off
TELEMETRY = "openvino_telemetry"
ADVICE = " Set TORCH"  # with this begins what torch's compiler tells its developers after each error


class Bound(NamedTuple):
    """How far an embedding, a token or a map may be from torch's own in fp32."""

    cosine: float  # at least, of each row
    relative: float  # at most: the largest difference, as a share of the largest value; of the embedding


# Seen, 1 - cosine and difference, on the seeds with random weights. OpenVINO: 1e-12 and 2e-6 in fp32, 5e-5 and 1.1e-2
# in bf16. Compiled: 5e-5 and 1.2e-2 in bf16; on test_vit and pit_ti alone 3e-13, 9e-7 in fp32 and 6e-7, 2e-3 in fp16.
# Eager bf16 itself comes to 6e-5 and 1.3e-2 (benchmarks/engines.py). Every model is held to this before a run.
STATED_ERROR = {
    ("compile", "fp32"): Bound(0.999999, 2e-5),
    ("compile", "bf16"): Bound(0.9999, 2e-2),
    ("compile", "fp16"): Bound(0.99999, 5e-3),
    ("openvino", "fp32"): Bound(0.999999, 2e-5),
    ("openvino", "bf16"): Bound(0.9999, 2e-2),
}


class Unavailable(Exception):
    """The engine does not run here, or not this model; the message says why."""


class _TooFar(Unavailable):
    """The engine runs, and leaves its stated error: with the same weights it always will."""


def start(engine: str, module: torch.nn.Module, taps: Taps, batch: torch.Tensor, *, precision: str = "fp32") -> "Body":
    """The body as a function of batches like `batch`, float32 (B, C, H, W) on the model's device, already warm.

    To be called in torch's inference mode, as its results are: compiled code goes by it.
    What it gives is the caller's to keep. Raises `Unavailable` where the engine cannot be had.
    """
    if engine == "eager":
        return Eager(taps, batch.device, precision)
    _check(engine, precision, batch.device.type)
    try:
        run = (Compiled if engine == "compile" else OpenVINO)(module, taps, batch, precision)
        run(batch)
    except (Unavailable, torch.OutOfMemoryError):
        raise
    except Exception as e:  # whatever a compiler raises for a model that it cannot take, or without its tools
        raise Unavailable(f"{type(e).__name__}: {line(e).partition(ADVICE)[0]}") from e
    return run


def _check(engine: str, precision: str, device: str) -> None:
    if engine == "openvino" and device != "cpu":
        raise Unavailable(f"OpenVINO runs on the CPU here, the device is {device}")
    if (engine, precision) not in STATED_ERROR:
        has = ", ".join(p for e, p in STATED_ERROR if e == engine)
        raise Unavailable(f"it has no {precision}, only {has}")


class Eager:
    """torch step by step, any batch."""

    def __init__(self, taps: Taps, device: torch.device, precision: str):
        self._body, self._device, self._dtype = taps.body, device.type, DTYPES.get(precision)

    def __call__(self, x: torch.Tensor) -> tuple[Any, Caught]:
        with torch.autocast(self._device, dtype=self._dtype, enabled=self._dtype is not None):
            return self._body(x)


class Compiled:
    """One graph of torch.compile for one shape; a second compilation is an error. On CUDA it replays CUDA graphs.

    On the CPU the weights are its constants. A process has one at a time: to compile another ends the first.
    """

    def __init__(self, module: torch.nn.Module, taps: Taps, batch: torch.Tensor, precision: str):
        # Workers find there what the driver compiled. torch's own place lies below /tmp and is anybody's to fill.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_compiled_folder())
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no CUDA here
        from torch._inductor import config as compiler  # late: it takes a second, and reads the environment

        device, dtype = batch.device.type, DTYPES.get(precision)
        Eager(taps, batch.device, precision)(batch[:1])  # ConViT makes a buffer in its first pass
        self._hooks = ExitStack()  # they stay: what they take is part of the graph
        body = self._hooks.enter_context(taps.tapped())

        def graph(x: torch.Tensor) -> tuple[Any, Caught]:
            with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
                return body(x)

        torch._dynamo.reset()  # it counts the models that went through `graph`, and gives up at the ninth
        self._is_cuda = device == "cuda"
        mode = "reduce-overhead" if self._is_cuda else None
        self._graph = torch.compile(graph, fullgraph=True, dynamic=False, mode=mode)
        # On the CPU weights become constants, cast and packed once, with GELU in the product before it: a fifth faster.
        with warnings.catch_warnings(), compiler.patch(freezing=not self._is_cuda):
            warnings.simplefilter("ignore")  # advice on TF32 and the like
            for _ in range(3 if self._is_cuda else 1):  # compiled, recorded, replayed
                self._graph(batch)

    def __call__(self, x: torch.Tensor) -> tuple[Any, Caught]:
        with torch.compiler.set_stance("fail_on_recompile"):
            found: tuple[Any, Caught] = self._graph(x.contiguous())
        # The next replay writes where this one's results lie.
        return tree_map_only(torch.Tensor, torch.clone, found) if self._is_cuda else found


class OpenVINO:
    """A graph of OpenVINO for one shape, on as many threads as torch has."""

    def __init__(self, module: torch.nn.Module, taps: Taps, batch: torch.Tensor, precision: str):
        ov = _openvino()
        with taps.tapped() as body, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing is deprecated; of torch.export's graphs OpenVINO lacks operators
            traced = _Traced(module, body)
            model = ov.convert_model(torch.jit.trace(traced, (batch[:TRACED],), check_trace=False))
        model.reshape({model.inputs[0]: list(batch.shape)})
        hint = {"fp32": "f32", "bf16": "bf16"}[precision]
        compiled = ov.Core().compile_model(
            model,
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
                "INFERENCE_PRECISION_HINT": hint,
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "ENABLE_CPU_PINNING": False,  # two workers would choose the same core
            },
        )
        computes = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if computes != hint:
            raise Unavailable(f"OpenVINO computes in {computes} on this processor, not in {hint}")
        self._request, self._nesting = compiled.create_infer_request(), traced.nesting

    def __call__(self, x: torch.Tensor) -> tuple[Any, Caught]:
        found = self._request.infer([x.contiguous().numpy()], share_inputs=True)
        leaves = [torch.from_numpy(found[i]) for i in range(len(found))]
        body, caught = tree_unflatten(leaves, self._nesting)
        return body, caught


def _compiled_folder() -> Path:
    return cache_folder() / "inductor"


class _Traced(torch.nn.Module):
    """The body with its results in a row, which is what a traced graph can give."""

    def __init__(self, module: torch.nn.Module, body: Body):
        super().__init__()
        self.module, self._body = module, body

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves, self.nesting = tree_flatten(self._body(x))
        return tuple(leaves)


def _openvino() -> Any:
    """OpenVINO, without its telemetry: importing it would send an event to Google Analytics and write to the home."""
    if sys.modules.get("openvino") is None:
        before = sys.modules.get(TELEMETRY)
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # importing it fails; openvino has a stand-in then
        try:
            importlib.import_module("openvino")
        except ImportError as e:
            raise Unavailable(f"OpenVINO is not installed ({line(e)}): pip install 'shard2vec[openvino]'") from e
        finally:
            del sys.modules[TELEMETRY]
            if before is not None:
                sys.modules[TELEMETRY] = before
    return sys.modules["openvino"]


# before a run


def resolve_engine(
    engine: str,
    module: torch.nn.Module,
    *,
    precision: str,
    device: str,
    threads: int = 1,
    weights_sha256: str = "",
    tensors: Sequence[TensorColumn] = (),
    **settings: Any,
) -> tuple[str, str]:
    """The engine that a run gets, and where that is not the one asked for, a sentence with the reason.

    Compares a whole batch with eager fp32, compiled as the workers will compile, which find its kernels in the cache.
    `threads`: of torch in each worker. `settings`: what else the workers' `Backbone` gets, for the batch's size goes by
    it too. The module comes back on the CPU. That the vectors of weights of this SHA-256 are too far off is remembered
    on this node, and not proven again; what may be otherwise tomorrow is.
    """
    if engine == "eager":
        return engine, ""
    settings |= {"precision": precision, "device": device, "tensors": tensors}
    key = _key(engine, weights_sha256, threads, settings)
    why = str((findings.recall(FOLDER, key) or {}).get("why", "")) if weights_sha256 else ""
    try:
        if not why:
            _check(engine, precision, device)
            if engine == "compile":
                _clear_compiled()
            with _threads(threads):
                _prove(engine, module, STATED_ERROR[engine, precision], settings)
    except _TooFar as e:
        why = str(e)
        if weights_sha256:
            findings.remember(FOLDER, key, {"why": why})
    except (Unavailable, NoRoom, torch.OutOfMemoryError) as e:
        why = line(e)
    finally:
        release(module, device)
    return ("eager", f"--engine {engine} cannot be used, eager runs instead: {why}") if why else (engine, "")


def release(module: torch.nn.Module, device: str) -> None:
    """Takes the module back to the CPU, and leaves the device's memory to other processes."""
    module.cpu()
    if device == "cuda":
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _key(engine: str, weights_sha256: str, threads: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What a proof depends on."""
    is_cuda = settings["device"] == "cuda" and torch.cuda.is_available()
    return {
        "engine": engine,
        "bound": STATED_ERROR.get((engine, settings["precision"])),
        "weights": weights_sha256,
        "threads": threads,
        "processor": torch.cuda.get_device_name() if is_cuda else machine.cpu_name(),
        "versions": [torch.__version__, timm.__version__, version_of("openvino")],
        **settings,
        "tensors": [asdict(column) for column in settings["tensors"]],
    }


def _clear_compiled() -> None:
    """Deletes what nothing has read for `KEEP_S`; before a proof, which makes anew what its run needs of that."""
    for folder, _, names in os.walk(_compiled_folder()):
        for path in (Path(folder) / name for name in names):
            with suppress(OSError):  # another run deletes too
                if time.time() - max(path.stat().st_atime, path.stat().st_mtime) > KEEP_S:
                    path.unlink()


def _prove(engine: str, module: torch.nn.Module, bound: Bound, settings: dict[str, Any]) -> None:
    """Raises `Unavailable` where any row of a batch is further from eager fp32 than `bound`."""
    from pipeline.backbone import Backbone

    of_two = {"precision": "fp32", "batch_size": PROVEN, "classes": False}
    plain = Backbone(module, **settings | of_two)
    images = _pictures(plain)
    want = plain(images)
    made = Backbone(module, engine=engine, **settings)
    rows = torch.arange(made.batch_size) % PROVEN
    found = difference(made(images[rows]), want, rows.to(made.device))
    if not (found.cosine >= bound.cosine and found.relative <= bound.relative):
        promised = f"{engine} {settings['precision']} promises {bound.cosine} and {bound.relative:.0e}"
        raise _TooFar(
            f"with this model its results have a cosine of {found.cosine:.6f} with torch's in fp32 and differ by "
            f"{found.relative:.1e}, and {promised}"
        )


def difference(got: "Vectors", want: "Vectors", rows: torch.Tensor) -> Bound:
    """Smallest cosine of `got` with `want[rows]` in any of their tensors, and the embedding's largest difference."""
    pairs = [(a.double(), b.double()[rows]) for a, b in zip(_all(got), _all(want), strict=True)]
    cosines = torch.stack([cosine_similarity(a, b).min() for a, b in pairs])
    embedding, expected = pairs[0]
    return Bound(float(cosines.min()), float((embedding - expected).abs().max() / expected.abs().max()))


def _all(vectors: "Vectors") -> tuple[torch.Tensor, ...]:
    return (vectors.embedding, *vectors.tensors)


def _pictures(backbone: "Backbone") -> torch.Tensor:
    channels, height, width = backbone.preprocessing.input_size
    spots = torch.rand(PROVEN, channels, SPOTS, SPOTS, generator=torch.Generator().manual_seed(0))
    smooth = interpolate(spots, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth * 255).to(torch.uint8)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compiled code and its place in the cache go by torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
