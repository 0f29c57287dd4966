"""A backbone's weights: from the hub, a seed or a URL, into one local safetensors file that is named by its content.

`load_module` gives the timm model with its weights, strictly loaded, never silently random. `stage` leaves them on
this node under their SHA-256, so that every actor of the node loads the same bytes without network or pickle.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import load_model_config_from_hf, load_state_dict, parse_model_name
from timm.models._hub import load_model_config_from_path

from pipeline.architecture import OWN, State, build, classifiers, line, load_strictly
from pipeline.cache import cache_folder, clear_old
from pipeline.config import Adapt
from pipeline.describe import check_model_name
from pipeline.errors import StorageError, UsageError
from pipeline.storage import read_bytes, redact

# What timm's factories take beside a model's own arguments: where weights come from and how strictly they fit. In a
# config.json's `model_args` these would be obeyed without a word.
LOADING = re.compile("pretrained.*|checkpoint_path|cache_dir|features_only|feature_.*|kwargs_filter|model_cfg|pruned")


CONFIGS = {"local-dir": load_model_config_from_path, "hf-hub": load_model_config_from_hf}  # (cfg, name, arguments)


def load_module(model: str, weights: str, adapt: Adapt = OWN) -> torch.nn.Module:
    """The timm model in eval mode on the CPU, float32, with the weights asked for.

    `weights`: `pretrained`, `random:SEED` (timm's own initialisation after `torch.manual_seed(SEED)`) or a URL. The
    class count of a file's head is the model's, unless `adapt` names one. Raises `UsageError` for an unknown model
    and for weights that are not there or do not fit.
    """
    check_model_name(model)
    _check_arguments(model)
    if weights.startswith("random:"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(weights.removeprefix("random:")))
            return build(model, adapt)
    if weights == "pretrained":
        module = _pretrained(model)
        if adapt == OWN:
            return module
        stored, wanted = getattr(module, "num_classes", None), adapt.num_classes
        if wanted not in (None, 0, stored):
            raise UsageError(f"--num-classes {wanted}: the pretrained head of {model} has {stored} classes; 0 drops it")
        state: State = module.state_dict()
    else:
        state = _state_from_url(weights)
    adapted = build(model, adapt)
    classes = _head_classes(adapted, state)
    if classes is not None and adapt.num_classes is None:
        adapt = replace(adapt, num_classes=classes)
        adapted = build(model, adapt)
    load_strictly(adapted, state, f"weights {redact(weights)}", model, adapt)
    return adapted


def _head_classes(module: torch.nn.Module, state: State) -> int | None:
    """The class count of the checkpoint's head, where it has one and it is not the module's."""
    own = module.state_dict()
    for key in (f"{name}.weight" for name in classifiers(module)):
        if key in state and key in own and state[key].shape[:1] != own[key].shape[:1]:
            return int(state[key].shape[0])
    return None


def architecture_of(model: str) -> str:
    """What decides the layers: timm's name; of `local-dir:` and `hf-hub:` also the arguments in their config.json."""
    source, name = parse_model_name(model)
    if source not in CONFIGS:
        return str(name)
    _, architecture, arguments = CONFIGS[source](name)
    return f"{architecture} {json.dumps(arguments or {}, sort_keys=True, default=str)}"


def _check_arguments(model: str) -> None:
    """Refuses a config.json that says how its weights are to be loaded, beside what the model is built with."""
    source, name = parse_model_name(model)
    if source not in CONFIGS:
        return
    try:
        arguments = dict(CONFIGS[source](name)[2] or {})
    except Exception as e:  # a config.json holds anything; timm takes its parts as they come
        raise UsageError(f"model {model}: its config.json cannot be used: {line(e)}") from e
    if wrong := [key for key in arguments if LOADING.fullmatch(key)]:
        raise UsageError(f"model {model}: `model_args` of its config.json may not hold {', '.join(wrong)}")


def _pretrained(model: str) -> torch.nn.Module:
    try:
        module = timm.create_model(model, pretrained=True).eval()
    except Exception as e:  # the hub's client raises its HTTP library's errors beside OSError and RuntimeError
        raise UsageError(
            f"pretrained weights of {model} cannot be had: {_why(e)}; "
            "give --weights with the URL of a file, or random:SEED to try things out"
        ) from e
    cfg = getattr(module, "pretrained_cfg", {}) or {}
    stored, built = cfg.get("num_classes"), getattr(module, "num_classes", None)
    if stored is not None and built is not None and stored != built:
        # timm drops the head's weights here without a word and leaves it at random.
        raise UsageError(f"pretrained weights of {model} have {stored} classes, the model {built}: its head is random")
    return module


def _why(e: Exception) -> str:
    """Without torch's advice to try again unsafely, which nobody here can follow."""
    text, unsafe, _ = line(e).partition("weights_only=True blocked")
    if unsafe or "weights_only" in text:
        return "it holds other things than tensors, which may run code when they are loaded, or is no checkpoint at all"
    return text


def _state_from_url(url: str) -> State:
    if not url.partition("?")[0].endswith((".safetensors", ".pth", ".pt", ".bin")):
        raise UsageError(f"--weights {redact(url)}: pretrained, random:SEED or the URL of a .safetensors or .pth file")
    try:
        content = read_bytes(url)
    except (OSError, StorageError) as e:
        raise UsageError(f"weights {redact(url)} cannot be read: {line(e)}") from e
    suffix = ".safetensors" if url.partition("?")[0].endswith(".safetensors") else ".pth"
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / f"weights{suffix}"
        local.write_bytes(content)
        try:
            state = load_state_dict(str(local), weights_only=True)
        except Exception as e:  # a damaged or hostile file can fail anywhere in its parser; no code of it has run
            raise UsageError(f"weights {redact(url)} are no readable checkpoint: {_why(e)}") from e
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise UsageError(f"weights {redact(url)} hold no tensors")
    return tensors


def sha256(state: dict[str, Any]) -> str:
    """SHA-256 over (key, dtype, shape, bytes) in the order of the keys: the weights' identity, whatever the file."""
    total = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        total.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def stage(module: torch.nn.Module, digest: str) -> Path:
    """Leaves the module's weights, whose SHA-256 is `digest`, in this node's cache; returns the safetensors file.

    Raises `StorageError` or `OSError` where the disk does not take it; nothing of it stays there.
    """
    state = module.state_dict()
    folder = cache_folder() / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{digest}.safetensors"
    if final.exists():
        final.touch()
    else:
        with _partial(final) as partial:
            try:
                safetensors.torch.save_file({k: v.detach().clone().contiguous() for k, v in state.items()}, partial)
            except safetensors.SafetensorError as e:  # a full disk, too
                raise StorageError(f"weights cannot be kept in {folder}: {line(e)}") from e
    clear_old(folder)
    return final


def receive(digest: str, content: Callable[[], "bytes | memoryview"]) -> Path:
    """The staged file on a node that may lack it: `content` gives its bytes, to one process while others wait.

    Raises `StorageError` where these are not the weights of that SHA-256.
    """
    folder = cache_folder() / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{digest}.safetensors"
    with (folder / f".{digest}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of one who dies it is free again
        if not final.exists():
            with _partial(final) as partial:
                partial.write_bytes(content())
                try:
                    found = sha256(safetensors.torch.load_file(partial))
                except safetensors.SafetensorError as e:
                    found = line(e)
                if found != digest:
                    raise StorageError(f"weights that came to {platform.node()} are damaged: {found} for {digest}")
    final.touch()
    clear_old(folder)
    return final


@contextmanager
def _partial(final: Path) -> Iterator[Path]:
    """The path of a file beside it, that takes its place when the context ends well; on an error nothing stays.

    It has a name that no process on any machine has: the folder may be shared.
    """
    partial = final.with_name(f".{final.stem}.{secrets.token_hex(8)}")
    try:
        yield partial
        with open(partial, "rb") as f:
            os.fsync(f.fileno())
        os.replace(partial, final)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load_staged(model: str, path: Path, adapt: Adapt = OWN) -> torch.nn.Module:
    """The model with the weights of a staged file: what each actor calls. Raises `StorageError` for a damaged file."""
    module = build(model, adapt)
    module.load_state_dict(safetensors.torch.load_file(path), strict=True)
    if sha256(module.state_dict()) != path.stem:
        raise StorageError(f"staged weights {path} are damaged: delete the file and run again")
    return module
