"""The promises of pipeline/isolation.py: what kills a decoder costs one image."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import poison
import pytest
from pictures import HOWS, broken, decoder, jpeg, sound

from pipeline.errors import Reject
from pipeline.isolation import IsolatedDecoder

KILLS = {
    "segfault": ("corrupt", "its decoder crashed (SIGSEGV)"),
    "out of memory": ("too_large", "its decoder was killed, as the system does where memory runs out"),
    "exit": ("corrupt", "its decoder crashed (exit status 3)"),
    "hang": ("corrupt", "decoding took more than 120 s of a core, and was stopped"),
    "loop": ("corrupt", "decoding took more than 120 s of a core, and was stopped"),
    "nonsense": ("corrupt", "its decoder crashed (exit status 1)"),
    "endless answer": ("corrupt", "its decoder crashed (exit status 1)"),
}


@pytest.fixture(scope="module")
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IsolatedDecoder]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in poison.environment(tmp_path_factory.mktemp("poison")).items():
            patch.setenv(name, value)
        made = IsolatedDecoder(decoder("test_vit").preprocessing)
        made(jpeg())
        yield made
        made.close()


@pytest.mark.parametrize("how", HOWS)
def test_results_are_the_decoders(isolated: IsolatedDecoder, how: str) -> None:
    """The same pixels and sizes, the same rejects in the same words, for all that is odd and all that is broken."""
    plain = decoder("test_vit", how=how)
    if how != "exact":
        isolated = IsolatedDecoder(plain.preprocessing, how=how)
    for name, data in sound().items():
        got, want = isolated(data), plain(data)
        assert np.array_equal(got.pixels, want.pixels) and got[1:] == want[1:], name
    for name, (_, data) in broken().items():
        with pytest.raises(Reject) as want:
            plain(data)
        with pytest.raises(Reject) as got:
            isolated(data)
        assert got.value.args == want.value.args, name
    isolated.close()


@pytest.mark.parametrize("kind", KILLS)
def test_what_kills_its_process_is_a_reject(isolated: IsolatedDecoder, kind: str) -> None:
    """A segmentation fault, a kill, an exit, a hang: each is named, and the images after it are decoded."""
    for _ in range(2):
        with pytest.raises(Reject) as why:
            isolated(poison.poison(kind))
        assert (why.value.reason, why.value.message) == KILLS[kind] and why.value.stage == "decode"
        assert isolated(jpeg()).width == 96


def test_threads_get_their_own_answers(isolated: IsolatedDecoder) -> None:
    """Deadly images among sound ones, from many threads: each image has its own result."""
    images = [poison.poison("segfault") if i % 7 == 3 else jpeg(60 + i, 50) for i in range(40)]

    def width(data: bytes) -> int:
        try:
            return isolated(data).width
        except Reject:
            return 0

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(width, images)) == [0 if i % 7 == 3 else 60 + i for i in range(40)]


def test_a_dead_nursery_has_a_successor(isolated: IsolatedDecoder) -> None:
    """The image is asked for again; where no process stays alive, the error says what may be wrong."""
    assert isolated._nursery is not None
    isolated._nursery._process.kill()
    assert isolated(jpeg()).width == 96


def test_an_image_whose_decoder_was_killed_by_somebody_is_decoded(isolated: IsolatedDecoder, tmp_path: Path) -> None:
    """A kill may be the machine's doing: the image is tried once more, and only a second one makes it a reject."""
    (tmp_path / "once").write_text("")
    assert isolated(jpeg(mode="CMYK", comment=f"kill once {tmp_path / 'once'}")).width == 96
    assert not (tmp_path / "once").exists()


def test_what_lies_in_the_working_directory_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own `pipeline` or `json.py` there is somebody else's code."""
    (tmp_path / "pipeline").mkdir()
    for name in ("pipeline/__init__.py", "json.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'was-here')!r}, 'w')\nraise ImportError\n")
    monkeypatch.chdir(tmp_path)
    decode = IsolatedDecoder(decoder("test_vit").preprocessing)
    assert decode(jpeg()).width == 96 and not (tmp_path / "was-here").exists()
    decode.close()


def test_closed_it_can_be_used_again(isolated: IsolatedDecoder) -> None:
    """A worker closes it after each call, and the next call may have a shard for it: as often as it takes."""
    for _ in range(3):
        nursery = isolated._nursery
        isolated.close()
        assert nursery is None or nursery._process.poll() is not None
    assert isolated(jpeg()).width == 96


def test_no_process_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is the machine's fault and no reject: the shard is left to the next run."""
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(ChildProcessError, match="died 3 times"):
        IsolatedDecoder(decoder("test_vit").preprocessing)(jpeg())
