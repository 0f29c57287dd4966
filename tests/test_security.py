"""Hostile input runs no code, leaves the output's folder alone and shows nobody's secrets."""

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

import made
import numpy as np
import oracle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from containers import Quiet, serving, tar_bytes, write_folder
from pictures import jpeg
from test_weights import save_local_dir

from jobs import job_file
from pipeline.errors import UsageError
from pipeline.weights import load_module, sha256

SECRET = "TopSecret0123"


# Checkpoints


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


@pytest.mark.parametrize("ending", [".pth", ".pt", ".bin", ".safetensors", ".npz"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_checkpoint_runs_code(attack: Callable[[Evil], bytes], ending: str, tmp_path: Path) -> None:
    """Whatever its bytes are and its name says, by path or by URL: one sentence, and nothing has been executed."""
    evil = Evil(tmp_path / "executed")
    assert works_on_plain_pickle(evil)
    path = tmp_path / f"w{ending}"
    path.write_bytes(attack(evil))
    for url in (str(path), f"file://{path}"):
        with pytest.raises(UsageError) as e:
            load_module("test_vit", url)
        assert "\n" not in str(e.value) and str(path) in str(e.value)
    assert not evil.marker.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.pth", "odd.pth.tar"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_local_dir_runs_code(attack: Callable[[Evil], bytes], name: str, tmp_path: Path) -> None:
    """Nor does a folder that brings its weights along."""
    folder, evil = save_local_dir(tmp_path / "m", 7, 7), Evil(tmp_path / "executed")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(attack(evil))
    with pytest.raises(UsageError, match="cannot be had") as e:
        load_module(f"local-dir:{folder}", "pretrained")
    assert "\n" not in str(e.value) and not evil.marker.exists()


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_no_model_of_the_hub_runs_code(
    attack: Callable[[Evil], bytes], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it lies in the hub's own cache: timm's and huggingface_hub's real loading, without the network."""
    evil = Evil(tmp_path / "executed")
    snapshot = hub_snapshot(tmp_path, monkeypatch)
    (snapshot / "config.json").write_text(json.dumps(HUB_CONFIG))
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


def test_a_job_file_is_data(tmp_path: Path) -> None:
    """A tag that would make an object in Python's full YAML makes none here."""
    marker = tmp_path / "executed"
    for text in (
        f"!!python/object/apply:os.system ['touch {marker}']",
        f"input: !!python/object/apply:os.system ['touch {marker}']",
        "model: !!python/name:os.system",
    ):
        (tmp_path / "job.yaml").write_text(text)
        try:
            argv = job_file.expand(["embed", "--config", str(tmp_path / "job.yaml")])
        except UsageError as e:
            assert "\n" not in str(e)
        else:
            assert all(isinstance(arg, str) for arg in argv)
    assert not marker.exists()


def test_a_parquet_files_metadata_is_data(tmp_path: Path) -> None:
    """Arrow's schema, extension types and pandas' metadata in a file build nothing: no pickle is read."""
    evil = Evil(tmp_path / "executed")
    content = pickle.dumps(evil)
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": content,
    }
    pandas = {b"pandas": content, b"huggingface": content}
    schema = pa.schema(
        [pa.field("image", pa.binary(), metadata=metadata), pa.field("key", pa.string())], metadata=pandas
    )
    image = jpeg(20, 20)
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": [image], "key": ["k"]}, schema=schema), tmp_path / "in" / "x.parquet")
    (receipt,) = made.embed(made.job(tmp_path / "out"), tmp_path / "in")
    assert receipt.error is None and receipt.files and receipt.files.counts.rows == 1
    assert not evil.marker.exists()
