"""SIGTERM and Ctrl-C end a run cleanly until it commits; from then on it says that it did, whatever comes."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_jobs import call
from test_reembed import publish, shard
from test_run import config

from pipeline import reembed as reembed_module
from pipeline import run as run_module
from pipeline import signals, versions
from pipeline.config import RunConfig
from pipeline.errors import UsageError
from pipeline.output import Root
from pipeline.progress import read_notes
from pipeline.receipts import Ledger
from pipeline.reembed import Terms, reembed
from pipeline.run import embed

ENDS = (signal.SIGINT, signal.SIGTERM)


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers_stay() -> Iterator[None]:
    """Whatever happens within, what was there is there again: Ctrl-C as Python has it, in a background too."""
    was = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(number) for number in ENDS]
    yield
    assert [signal.getsignal(number) for number in ENDS] == before and not signals._before
    signal.signal(signal.SIGINT, was)


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_interrupts_waits_and_is_forgotten_in_the_end(number: signal.Signals) -> None:
    """Held, it waits; listened to again, it comes at once; held again, it is forgotten by the outermost context."""
    with pytest.raises(KeyboardInterrupt), signals.interruptible():
        send(number)
    with signals.interruptible():
        with signals.interruptible(), signals.heard():
            signals.hold()
        send(number)
        with pytest.raises(KeyboardInterrupt), signals.heard():
            pytest.fail("it waited")
        send(number)
        with pytest.raises(KeyboardInterrupt), signals.heard():
            pytest.fail("it waited, for it was held again")
        with signals.heard(), pytest.raises(KeyboardInterrupt):
            send(number)
        send(number)


def test_what_is_ignored_stays_so_and_other_threads_hear_nothing() -> None:
    """Ctrl-C of a job in a shell's background; a run in a thread, which cannot set handlers."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.interruptible():
            signals.hold()
            send(signal.SIGINT)
            with signals.heard():
                send(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    heard: list[object] = []

    def run() -> None:
        with signals.interruptible():
            signals.hold()
            with signals.heard():
                heard.append(signal.getsignal(signal.SIGTERM))

    with signals.interruptible():
        expected = signal.getsignal(signal.SIGTERM)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert heard == [expected] and signal.getsignal(signal.SIGTERM) == expected


@pytest.fixture
def asked(tmp_path: Path) -> RunConfig:
    """Two shards that are embedded already, and an output that has no version yet."""
    shard(tmp_path / "in", "a", 0, 2)
    shard(tmp_path / "in", "b", 100, 2)
    found = config(tmp_path / "in", tmp_path / "out", max_reject_rate=0.0)
    publish(found)
    (tmp_path / "out" / "versions").mkdir()  # so that no Ray starts ahead
    return found


def sending(call: Callable[..., Any], *numbers: signal.Signals) -> Callable[..., Any]:
    def sends(*given: Any, **more: Any) -> Any:
        send(*numbers)
        return call(*given, **more)

    return sends


def test_before_the_commit_it_ends_the_run_and_after_it_the_run_says_committed(
    asked: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While planning: 130 and one sentence. Before the version is put: interrupted. After: committed, and its note."""
    root = Root(asked.output)
    argv = ["embed", "--input", *asked.inputs, "--output", root.url, "--model", "test_vit", "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "list_shards", sending(run_module.list_shards, signal.SIGTERM))
        code, out, err = call(*argv)
        assert (code, json.loads(out)["exit_code"]) == (130, 130)
        assert err == "shard2vec: interrupted; run the same command to go on\n" and not read_notes(root)
    with monkeypatch.context() as patch:
        patch.setattr(versions, "list_name", sending(versions.list_name, signal.SIGTERM))
        ended = embed(asked, lambda line: None)
    assert (ended.exit_code, ended.json["version"], versions.numbers(root)) == (130, None, [])
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "put", sending(Ledger.put, *ENDS))
        ended = embed(asked, lambda line: None)
    assert (ended.exit_code, ended.json["version"], versions.numbers(root)) == (0, 1, [1])
    assert sorted(note.state for note in read_notes(root)) == ["committed", "interrupted"]


def test_a_scheduled_run_that_is_ended_while_it_cleans_up_has_committed(
    asked: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Amid the cleaning, or since the commit: what is left of it is skipped; so it is where another gc was faster."""
    run = replace(asked)

    def ended(shards: tuple[str, ...], collect: Callable[..., Any], put: Callable[..., Any]) -> tuple[object, ...]:
        said: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr(reembed_module, "collect_garbage", collect)
            patch.setattr(Ledger, "put", put)
            found = reembed(replace(run, inputs=shards), Terms(keep=1), said.append)
        told = [found.json[key] for key in ("result", "version", "deleted", "lease")]
        return (found.exit_code, *told, said[-1])

    def gone(*_: object) -> None:
        raise UsageError("out has no version 7: it has 8")

    put, a, b = Ledger.put, f"{tmp_path}/in/a.tar", f"{tmp_path}/in/b.tar"
    collect = reembed_module.collect_garbage
    failed = "the result is committed, and cleaning up failed: "
    assert ended(asked.inputs, sending(collect, signal.SIGTERM), put) == (
        *(0, "committed", 1, None, "held"),
        f"{failed}interrupted",
    )
    never = lambda *_: pytest.fail("the signal came before")  # noqa: E731
    assert ended((a,), never, sending(put, signal.SIGTERM)) == (0, "committed", 2, None, "held", f"{failed}interrupted")
    assert ended((b,), gone, put) == (0, "committed", 3, None, "held", f"{failed}out has no version 7: it has 8")
