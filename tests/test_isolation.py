"""The promises of pipeline/isolation.py: what kills a decoder costs one image."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import poison
import pytest
from pictures import broken, decoder, jpeg, sound

from pipeline.errors import Reject
from pipeline.isolation import IsolatedDecoder

KILLS = {
    "segfault": ("corrupt", "its decoder crashed (SIGSEGV)"),
    "out of memory": ("too_large", "its decoder was killed, as the system does where memory runs out"),
    "exit": ("corrupt", "its decoder crashed (exit status 3)"),
    "hang": ("corrupt", "decoding took more than 120 s and was stopped"),
}


@pytest.fixture(scope="module")
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IsolatedDecoder]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in poison.environment(tmp_path_factory.mktemp("poison")).items():
            patch.setenv(name, value)
        patch.setattr("pipeline.isolation.AT_ONCE", 2)
        made = IsolatedDecoder(decoder("test_vit").preprocessing)
        made(jpeg())
        yield made
        made.close()


def test_results_are_the_decoders(isolated: IsolatedDecoder) -> None:
    """The same pixels and sizes, the same rejects in the same words, for all that is odd and all that is broken."""
    plain = decoder("test_vit")
    for name, data in sound().items():
        got, want = isolated(data), plain(data)
        assert np.array_equal(got.pixels, want.pixels) and got[1:] == want[1:], name
    for name, (_, data) in broken().items():
        with pytest.raises(Reject) as want:
            plain(data)
        with pytest.raises(Reject) as got:
            isolated(data)
        assert got.value.args == want.value.args, name


@pytest.mark.parametrize("kind", KILLS)
def test_what_kills_its_process_is_a_reject(isolated: IsolatedDecoder, kind: str) -> None:
    """A segmentation fault, a kill, an exit, a hang: each is named, and the images after it are decoded."""
    for _ in range(2):
        with pytest.raises(Reject) as why:
            isolated(poison.poison(kind))
        assert (why.value.reason, why.value.message) == KILLS[kind] and why.value.stage == "decode"
        assert isolated(jpeg()).width == 96


def test_threads_get_their_own_answers(isolated: IsolatedDecoder) -> None:
    """Deadly images among sound ones, from more threads than there are processes: each image has its own result."""
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
    nursery = isolated._nurseries.get()
    isolated._nurseries.put(nursery)
    assert nursery is not None
    nursery._process.kill()
    assert isolated(jpeg()).width == 96


def test_closed_it_can_be_used_again(isolated: IsolatedDecoder) -> None:
    """A worker closes it after each call, and the next call may have a shard for it: as often as it takes."""
    for _ in range(3):
        processes = [n for n in isolated._nurseries.queue if n is not None]
        isolated.close()
        assert all(n._process.poll() is not None for n in processes)
    assert isolated(jpeg()).width == 96


def test_no_process_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is the machine's fault and no reject: the shard is left to the next run."""
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(ChildProcessError, match="died 3 times"):
        IsolatedDecoder(decoder("test_vit").preprocessing)(jpeg())
