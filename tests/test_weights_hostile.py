"""Hostile weights run no code: whatever a file's bytes are, what it is called, and what a configuration says."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import safetensors.torch
import torch
from containers import Quiet, serving, tar_bytes, write_folder
from test_weights import save_local_dir

from pipeline.errors import UsageError
from pipeline.weights import load_module, sha256


class Evil:
    """What a pickle of it does when it is loaded by `pickle.load`: it leaves a file behind."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


def torch_zip(evil: Evil) -> bytes:
    sink = io.BytesIO()
    torch.save({"head.weight": torch.zeros(1), "state_dict": evil}, sink)
    return sink.getvalue()


def torch_legacy(evil: Evil) -> bytes:
    sink = io.BytesIO()
    torch.save({"state_dict": evil}, sink, _use_new_zipfile_serialization=False)
    return sink.getvalue()


def torch_old_tar(evil: Evil) -> bytes:
    """The layout before 0.1.10: a tar of pickles."""
    return tar_bytes({name: pickle.dumps(evil, 2) for name in ("storages", "tensors", "pickle")})


def torchscript(evil: Evil) -> bytes:
    sink = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), sink)
    with zipfile.ZipFile(sink, "a") as archive:
        archive.writestr("archive/extra.pkl", pickle.dumps(evil))
    return sink.getvalue()


def odd_zip(evil: Evil) -> bytes:
    """The pickle lies twice and below a folder of another name than the archive's."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name in ("a/data.pkl", "b/data.pkl", "data.pkl", "../data.pkl", "a/version"):
            archive.writestr(name, pickle.dumps(evil))
    return sink.getvalue()


def bare(evil: Evil) -> bytes:
    return pickle.dumps(evil)


def objects(evil: Evil) -> bytes:
    """A NumPy archive whose arrays are pickles."""
    sink = io.BytesIO()
    np.savez(sink, **{"head.weight": np.array([evil], dtype=object)})
    return sink.getvalue()


def header(evil: Evil) -> bytes:
    """A safetensors file with a pickle in place of its JSON header."""
    content = pickle.dumps(evil)
    return struct.pack("<Q", len(content)) + content


ATTACKS: tuple[Callable[[Evil], bytes], ...] = (
    torch_zip, torch_legacy, torch_old_tar, torchscript, odd_zip, bare, objects, header,
)  # fmt: skip


def works_on_plain_pickle(evil: Evil) -> bool:
    pickle.loads(pickle.dumps(evil))
    there = evil.marker.exists()
    evil.marker.unlink(missing_ok=True)
    return there


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_checkpoint_runs_code(attack: Callable[[Evil], bytes], tmp_path: Path) -> None:
    """Whatever its bytes are and its name says, by path or by URL: one sentence, and nothing has been executed."""
    evil = Evil(tmp_path / "executed")
    assert works_on_plain_pickle(evil)
    for ending in (".pth", ".pt", ".bin", ".safetensors", ".npz"):
        path = tmp_path / f"w{ending}"
        path.write_bytes(attack(evil))
        for url in (str(path), f"file://{path}"):
            with pytest.raises(UsageError) as e:
                load_module("test_vit", url)
            assert "\n" not in str(e.value) and str(path) in str(e.value)
    assert not evil.marker.exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as timm saves it, without its weights."""
    folder = save_local_dir(tmp_path_factory.mktemp("saved") / "m", 7, 7)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_local_dir_runs_code(attack: Callable[[Evil], bytes], saved: Path, tmp_path: Path) -> None:
    """Nor does a folder that brings its weights along."""
    evil = Evil(tmp_path / "executed")
    for name in ("pytorch_model.bin", "model.safetensors", "odd.pth.tar"):
        (saved / name).write_bytes(attack(evil))
        with pytest.raises(UsageError, match="cannot be had") as e:
            load_module(f"local-dir:{saved}", "pretrained")
        (saved / name).unlink()
        assert "\n" not in str(e.value) and not evil.marker.exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_model_of_the_hub_runs_code(
    attack: Callable[[Evil], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it lies in the hub's own cache: timm's and huggingface_hub's real loading, without the network."""
    evil = Evil(tmp_path / "executed")
    snapshot = hub_snapshot(tmp_path, monkeypatch)
    (snapshot / "config.json").write_text(json.dumps(HUB_CONFIG))
    for name in ("pytorch_model.bin", "model.safetensors"):
        (snapshot / name).write_bytes(attack(evil))
        with pytest.raises(UsageError) as e:
            load_module("hf-hub:somebody/model", "pretrained")
        assert "\n" not in str(e.value) and not evil.marker.exists()


HUB_CONFIG = {
    "architecture": "test_vit",
    "pretrained_cfg": {"num_classes": 1000, "input_size": [3, 160, 160], "fixed_input_size": True},
}


def hub_snapshot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model in a hub cache of this test's own."""
    import huggingface_hub.constants
    import huggingface_hub.file_download

    for module in (huggingface_hub.constants, huggingface_hub.file_download):
        if hasattr(module, "HF_HUB_CACHE"):
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(folder / "hub"))
    model = folder / "hub" / "models--somebody--model"
    write_folder(model, {"refs/main": b"0" * 40})
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    # "No such file" is remembered by the cache as well, so that another name is looked for.
    write_folder(model / ".no_exist" / ("0" * 40), {"model.safetensors": b""})
    return snapshot


def test_the_hubs_cache_is_really_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would be worth nothing otherwise: a good file in the same place is loaded."""
    snapshot = hub_snapshot(tmp_path, monkeypatch)
    (snapshot / "config.json").write_text(json.dumps(HUB_CONFIG))
    state = oracle.module("test_vit", 3).state_dict()
    torch.save(state, snapshot / "pytorch_model.bin")
    assert sha256(load_module("hf-hub:somebody/model", "pretrained").state_dict()) == sha256(state)


def test_a_configuration_opens_nothing_but_its_own_folder(tmp_path: Path) -> None:
    """Whatever it names: a URL is not asked, a file and a hub's model elsewhere are not opened, strictness stays."""
    folder, evil = save_local_dir(tmp_path / "m", 7, 7), Evil(tmp_path / "executed")
    elsewhere = tmp_path / "elsewhere.pth"
    torch.save(oracle.module("test_vit", 9).state_dict(), elsewhere)
    stored = sha256(safetensors.torch.load_file(folder / "model.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    with counting(tmp_path) as (url, asked):
        for key, value in {
            "url": f"{url}/w.pth",
            "file": str(elsewhere),
            "hf_hub_id": "somebody/else",
            "hf_hub_filename": "../../evil.bin",
            "custom_load": "hf",
            "source": "timm",
            "state_dict": {"head.weight": [1.0]},
        }.items():
            changed = config | {"pretrained_cfg": config["pretrained_cfg"] | {key: value}}
            (folder / "config.json").write_text(json.dumps(changed))
            module = load_module(f"local-dir:{folder}", "pretrained")
            assert sha256(module.state_dict()) == stored, key
        for arguments in (
            {"checkpoint_path": str(elsewhere)},
            {"pretrained_cfg_overlay": {"file": str(elsewhere)}},
            {"pretrained_filter_fn": "os.system"},
            {"block_fn": f"os.system('touch {evil.marker}')"},
            {"pretrained_strict": False, "depth": 3},
            {"features_only": True},
            {"cache_dir": str(tmp_path)},
        ):
            (folder / "config.json").write_text(json.dumps(config | {"model_args": arguments}))
            with pytest.raises(UsageError) as e:
                load_module(f"local-dir:{folder}", "pretrained")
            assert "\n" not in str(e.value), arguments
        (folder / "config.json").write_text(json.dumps(config | {"architecture": f"local-dir:{tmp_path}"}))
        with pytest.raises(UsageError):
            load_module(f"local-dir:{folder}", "pretrained")
        assert asked == [] and not evil.marker.exists()


class counting(serving):
    """An HTTP server of a folder that remembers what it was asked for."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        asked = self._asked = list[str]()

        class Counting(Quiet):
            def __init__(self, *args: Any, **settings: Any):
                super().__init__(*args, directory=str(folder), **settings)

            def do_GET(self) -> None:
                asked.append(self.path)
                SimpleHTTPRequestHandler.do_GET(self)

            do_HEAD = do_GET

        self._server.RequestHandlerClass = Counting  # type: ignore[assignment]

    def __enter__(self) -> tuple[str, list[str]]:  # type: ignore[override]
        return super().__enter__(), self._asked
