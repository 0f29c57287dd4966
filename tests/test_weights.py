"""Weights are loaded strictly, safely, never silently random, and known by their content."""

import json
import os
import pickle
import re
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import oracle
import pytest
import safetensors.torch
import torch

from pipeline.errors import StorageError, UsageError
from pipeline.weights import architecture_of, load_module, load_staged, receive, sha256, stage


def test_random_weights_are_timms_own_initialisation() -> None:
    """random:SEED is what timm gives after torch.manual_seed(SEED), and leaves the caller's random state alone."""
    torch.manual_seed(99)
    expected = torch.rand(1)
    torch.manual_seed(99)
    ours = load_module("test_vit", "random:7").state_dict()
    assert torch.equal(torch.rand(1), expected)
    theirs = oracle.module("test_vit", 7).state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert sha256(ours) != sha256(load_module("test_vit", "random:8").state_dict())


@pytest.mark.parametrize("kind", ["safetensors", "pth", "wrapped"])
def test_weights_from_a_file_are_these_weights(kind: str, tmp_path: Path) -> None:
    """Every layout of a checkpoint gives the same vectors and the same identity."""
    state = oracle.module("test_vit", 3).state_dict()
    folder = tmp_path / "of.safetensors.models"  # the file's own ending counts
    folder.mkdir()
    path = folder / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}} if kind == "wrapped" else state, path)
    loaded = load_module("test_vit", str(path)).state_dict()
    assert sha256(loaded) == sha256(state)


def test_an_architectures_own_layout_is_renamed_as_timm_does(tmp_path: Path) -> None:
    """PiT's authors call its pooling layers `pools.N`; timm's own filter renames them, then strictness holds."""
    state = oracle.module("pit_ti_224").state_dict()
    published = {
        re.sub(r"transformers\.([12])\.pool", lambda m: f"pools.{int(m[1]) - 1}", k): v for k, v in state.items()
    }
    assert published.keys() != state.keys()
    torch.save(published, tmp_path / "w.pth")
    assert sha256(load_module("pit_ti_224", str(tmp_path / "w.pth")).state_dict()) == sha256(state)


def test_weights_that_do_not_fit_name_the_keys(tmp_path: Path) -> None:
    """Missing, unexpected and misshapen keys are named, and the rest counted."""
    state = oracle.module("test_vit").state_dict()
    del state["norm.weight"]
    state["extra.bias"] = torch.zeros(1)
    state["head.weight"] = torch.zeros(10, 64)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UsageError) as e:
        load_module("test_vit", str(tmp_path / "w.pth"))
    for part in ("missing keys: norm.weight", "unexpected keys: extra.bias", "head.bias (1000,) for (10,)"):
        assert part in str(e.value)


class Malicious:
    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/shard2vec-was-here",)


@pytest.mark.parametrize("content", [pickle.dumps(Malicious()), b"", b"no checkpoint", pickle.dumps({"a": 1})])
def test_a_bad_checkpoint_is_refused_and_runs_no_code(content: bytes, tmp_path: Path) -> None:
    """Rubbish and hostile pickles end with one sentence; nothing in them is executed."""
    marker = Path("/tmp/shard2vec-was-here")
    marker.unlink(missing_ok=True)
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UsageError) as e:
        load_module("test_vit", str(tmp_path / "w.pth"))
    assert "\n" not in str(e.value)
    assert not marker.exists()


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    """A wrong URL or a wrong word is told before any work."""
    with pytest.raises(UsageError, match="cannot be read"):
        load_module("test_vit", str(tmp_path / "absent.safetensors"))
    with pytest.raises(UsageError, match="pretrained, random:SEED or the URL"):
        load_module("test_vit", "pretraind")


def test_an_unknown_model_gets_the_nearest_names() -> None:
    """A typo is answered with what was meant."""
    with pytest.raises(UsageError, match="pit_b_224"):
        load_module("pit_b_242", "random:0")


def test_pretrained_without_a_hub_is_an_error_not_a_random_model() -> None:
    """When the hub cannot be reached, the run ends; nothing is embedded with random weights."""
    with pytest.raises(UsageError, match="pretrained weights of test_vit cannot be had"):
        load_module("test_vit", "pretrained")


def save_local_dir(folder: Path, classes: int, stored: int) -> Path:
    """A `local-dir:` model as timm saves it: config.json and weights."""
    import timm

    net = timm.create_model("test_vit", num_classes=stored)
    folder.mkdir()
    safetensors.torch.save_file(net.state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, 160, 160], "fixed_input_size": True, "num_classes": stored, "classifier": "head"}
    cfg |= {"first_conv": "patch_embed.proj", "label_names": [f"n{i}" for i in range(stored)]}
    config = {"architecture": "test_vit", "num_classes": classes, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_local_folder_brings_its_own_classes_and_names(tmp_path: Path) -> None:
    """local-dir: gives the weights, class count and label names that lie there."""
    from pipeline.backbone import facts_of

    name = f"local-dir:{save_local_dir(tmp_path / 'm', 7, 7)}"
    net = load_module(name, "pretrained")
    stored = safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")
    assert sha256(net.state_dict()) == sha256(stored)
    facts = facts_of(net, name)
    assert (facts.classes, facts.labels_source, facts.label_names[:2]) == (7, "model", ("n0", "n1"))


def test_a_folders_own_configuration_is_part_of_the_set(tmp_path: Path) -> None:
    """The same weights through other layers give other vectors: what config.json builds is part of the set."""
    folder = save_local_dir(tmp_path / "m", 7, 7)
    first = architecture_of(f"local-dir:{folder}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_args": {"act_layer": "relu"}}))
    assert architecture_of(f"local-dir:{folder}") != first == "test_vit {}"
    assert architecture_of("pit_b_224.in1k") == "pit_b_224.in1k"


def test_a_staged_file_is_the_weights_and_nothing_else(own_cache: Path) -> None:
    """Staging writes one safetensors file under the weights' own digest; a second time it is found there."""
    module = oracle.module("test_vit", 5)
    digest = sha256(module.state_dict())
    path = stage(module, digest)
    assert path == own_cache / "weights" / f"{digest}.safetensors"
    before = path.stat().st_ino
    assert stage(module, digest).stat().st_ino == before
    assert sha256(load_staged("test_vit", path).state_dict()) == digest


def test_a_node_that_lacks_the_weights_takes_them_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that start together wait for the first; what is not these weights is not kept, and is named."""
    module = oracle.module("test_vit")
    digest = sha256(module.state_dict())
    content = stage(module, digest).read_bytes()
    monkeypatch.setenv("SHARD2VEC_CACHE", str(tmp_path))
    taken = list[int]()

    def fetch() -> bytes:
        taken.append(1)
        time.sleep(0.2)
        return content

    with ThreadPoolExecutor(4) as pool:
        (path,) = set(pool.map(lambda _: receive(digest, fetch), range(4)))
    assert taken == [1] and path.read_bytes() == content
    assert [p.name for p in path.parent.glob("[!.]*")] == [f"{digest}.safetensors"]
    path.unlink()
    for wrong, why in ((content[:-8], "damaged"), (safetensors.torch.save({}), f"are damaged: .* for {digest}")):
        with pytest.raises(StorageError, match=why):
            receive(digest, lambda wrong=wrong: wrong)
        assert not list(path.parent.glob("*.safetensors")) and len(list(path.parent.iterdir())) == 1


def test_a_full_disk_keeps_no_part_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try would leave a file of the model's size; the sentence says where there is no room."""
    module = oracle.module("test_vit")
    digest, content = sha256(module.state_dict()), bytes(100_000)
    monkeypatch.setenv("SHARD2VEC_CACHE", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(StorageError, match=r"weights cannot be kept in .*weights"):
            stage(module, digest)
        with pytest.raises(OSError, match="too large"):
            receive(digest, lambda: content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "weights").iterdir()] == [f".{digest}.lock"]


def test_a_damaged_staged_file_is_not_used(own_cache: Path) -> None:
    """One flipped bit in the cache would be wrong vectors under the right name: it is refused."""
    module = oracle.module("test_vit", 6)
    path = stage(module, sha256(module.state_dict()))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StorageError, match="are damaged"):
        load_staged("test_vit", path)
    path.unlink()
