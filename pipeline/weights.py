"""A backbone's weights: from the hub, a seed or a URL, into one local safetensors file that is named by its content.

`load_module` gives the timm model with its weights, strictly loaded, never silently random. `stage` leaves them on
this node under their SHA-256, so that every actor of the node loads the same bytes without network or pickle.
"""

import hashlib
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import load_state_dict

from pipeline.describe import check_model_name
from pipeline.errors import StorageError, UsageError
from pipeline.storage import read_bytes, redact

KEEP_STAGED_S = 30 * 86400  # a staged file that nothing has used for so long is deleted
NAMED_KEYS = 6  # keys spelled out in an error; the rest is counted


def load_module(model: str, weights: str) -> torch.nn.Module:
    """The timm model in eval mode on the CPU, float32, with the weights asked for.

    `weights`: `pretrained`, `random:SEED` (timm's own initialisation after `torch.manual_seed(SEED)`) or a URL.
    Raises `UsageError` for an unknown model and for weights that are not there or do not fit.
    """
    check_model_name(model)
    if weights == "pretrained":
        return _pretrained(model)
    if weights.startswith("random:"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(weights.removeprefix("random:")))
            return build(model)
    module = build(model)
    _load_strictly(module, _state_from_url(weights), f"weights {redact(weights)}")
    return module


def build(model: str) -> torch.nn.Module:
    """The architecture alone, in eval mode, its weights as timm initialises them."""
    try:
        return timm.create_model(model, pretrained=False).eval()
    except (RuntimeError, ValueError, OSError, TypeError, AssertionError) as e:
        raise UsageError(f"model {model} cannot be built: {_line(e)}") from e


def _pretrained(model: str) -> torch.nn.Module:
    try:
        module = timm.create_model(model, pretrained=True).eval()
    except Exception as e:  # the hub's client raises its HTTP library's errors beside OSError and RuntimeError
        raise UsageError(
            f"pretrained weights of {model} cannot be had: {_line(e)}; "
            "give --weights with the URL of a file, or random:SEED to try things out"
        ) from e
    cfg = getattr(module, "pretrained_cfg", {}) or {}
    stored, built = cfg.get("num_classes"), getattr(module, "num_classes", None)
    if stored is not None and built is not None and stored != built:
        # timm drops the head's weights here without a word and leaves it at random.
        raise UsageError(f"pretrained weights of {model} have {stored} classes, the model {built}: its head is random")
    return module


def _state_from_url(url: str) -> dict[str, torch.Tensor]:
    if not url.partition("?")[0].endswith((".safetensors", ".pth", ".pt", ".bin")):
        raise UsageError(f"--weights {redact(url)}: pretrained, random:SEED or the URL of a .safetensors or .pth file")
    try:
        content = read_bytes(url)
    except (OSError, StorageError) as e:
        raise UsageError(f"weights {redact(url)} cannot be read: {_line(e)}") from e
    suffix = ".safetensors" if ".safetensors" in url else ".pth"
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / f"weights{suffix}"
        local.write_bytes(content)
        try:
            state = load_state_dict(str(local), weights_only=True)
        except Exception as e:  # a damaged or hostile file can fail anywhere in its parser; no code of it has run
            raise UsageError(f"weights {redact(url)} are no readable checkpoint: {_line(e)}") from e
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise UsageError(f"weights {redact(url)} hold no tensors")
    return tensors


def _load_strictly(module: torch.nn.Module, state: dict[str, torch.Tensor], what: str) -> None:
    problem = _misfit(module, state)
    if problem:
        # Weights in their authors' own layout: the architecture's own filter renames them, as `pretrained` does.
        renamed = _filtered(module, state)
        if renamed is None or _misfit(module, renamed):
            raise UsageError(f"{what} do not fit {type(module).__name__}: {problem}")
        state = renamed
    module.load_state_dict(state, strict=True)


def _misfit(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> str:
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
        for k in sorted(own.keys() & state.keys())
        if state[k].shape != own[k].shape
    ]
    found = (("missing keys", missing), ("unexpected keys", extra), ("other shapes", shapes))
    return "; ".join(f"{name}: {_some(keys)}" for name, keys in found if keys)


def _filtered(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    rename = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if rename is None:
        return None
    try:
        return dict(rename(dict(state), module))
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        return None  # not a layout that the filter knows: the plain misfit is the message


def _some(keys: list[str]) -> str:
    rest = len(keys) - NAMED_KEYS
    return ", ".join(keys[:NAMED_KEYS]) + (f" and {rest} more" if rest > 0 else "")


def _line(e: BaseException) -> str:
    return " ".join(str(e).split())[:400].rstrip(".") or type(e).__name__


def sha256(state: dict[str, Any]) -> str:
    """SHA-256 over (key, dtype, shape, bytes) in the order of the keys: the weights' identity, whatever the file."""
    total = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        total.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def cache_folder() -> Path:
    """`$SHARD2VEC_CACHE`, else `shard2vec` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "shard2vec"
    return Path(os.environ.get("SHARD2VEC_CACHE", default))


def stage(module: torch.nn.Module, digest: str) -> Path:
    """Leaves the module's weights, whose SHA-256 is `digest`, in this node's cache; returns the safetensors file."""
    state = module.state_dict()
    folder = cache_folder() / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{digest}.safetensors"
    if final.exists():
        final.touch()
    else:
        partial = folder / f".{digest}.{os.getpid()}"
        safetensors.torch.save_file({k: v.detach().clone().contiguous() for k, v in state.items()}, partial)
        with open(partial, "rb") as f:
            os.fsync(f.fileno())
        os.replace(partial, final)
    for old in folder.iterdir():
        with suppress(FileNotFoundError):  # another run's partial file, just renamed
            if time.time() - old.stat().st_mtime > KEEP_STAGED_S:
                old.unlink()
    return final


def load_staged(model: str, path: Path) -> torch.nn.Module:
    """The model with the weights of a staged file: what each actor calls. Raises `StorageError` for a damaged file."""
    module = build(model)
    module.load_state_dict(safetensors.torch.load_file(path), strict=True)
    if sha256(module.state_dict()) != path.stem:
        raise StorageError(f"staged weights {path} are damaged: delete the file and run again")
    return module
