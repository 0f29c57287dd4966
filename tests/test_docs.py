"""What the documents say can be typed and computed: commands, flags, the bill of a large run."""

import re
import shlex
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import made
import numpy as np
import pytest
import typer

from jobs.__main__ import app
from pipeline.backbone import Arrays
from pipeline.listing import Shard
from pipeline.rows import ShardWriter
from pipeline.shards import Sample
from pipeline.storage import list_files

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))
import bill  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "deploy").rglob("*.md"))]
YAML = sorted((ROOT / "deploy").rglob("*.yaml"))
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
LARGE = (ROOT / "docs" / "large.md").read_text()


def commands(text: str) -> Iterator[list[str]]:
    """The words after `shard2vec` of each command in fenced blocks, in inline code and in entrypoints."""
    fenced = re.findall(r"^ *```[a-z]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))
    entrypoints = [line.replace('"', "") for line in re.findall(r"^ *entrypoint: (.*)$", text, re.MULTILINE)]
    for line in "\n".join([*fenced, *inline, *entrypoints]).replace("\\\n", " ").split("\n"):
        if found := re.search(r"(?:^|(?<!-n)[\s/`])shard2vec\s+(.*)", line.partition(" # ")[0]):
            words = shlex.split(re.split(r"[|;>&]|\s#", found[1])[0].replace("…", " "))
            if words and re.fullmatch("[a-z]+", words[0]):
                yield words


def unknown(words: list[str]) -> list[str]:
    """What of a command this version does not know: its verb, or flags. `submit` has another verb's behind its own."""
    verb, *rest = words
    if verb not in COMMANDS:
        return [verb]
    known = {flag for parameter in COMMANDS[verb].params for flag in parameter.opts} | {"--help"}
    inner = next((i for i, word in enumerate(rest) if word in COMMANDS), None) if verb == "submit" else None
    own = rest if inner is None else rest[:inner]
    flags = [word.partition("=")[0] for word in own if word.startswith("--")]
    return [flag for flag in flags if flag not in known] + ([] if inner is None else unknown(rest[inner:]))


@pytest.mark.parametrize("page", [*PAGES, *YAML], ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_are_shown_exist(page: Path) -> None:
    """Every verb and every flag, as this version has them."""
    wrong = [(" ".join(words), bad) for words in commands(page.read_text()) if (bad := unknown(words))]
    assert not wrong


def globs(text: str) -> list[str]:
    """The patterns that commands read, as they are written."""
    pairs = (pair for words in commands(text) for pair in pairwise(words))
    return [value for flag, value in pairs if flag == "--input" and "*" in value]


@pytest.mark.parametrize("page", [page for page in PAGES if globs(page.read_text())], ids=lambda path: path.name)
def test_patterns_that_are_shown_match(page: Path, tmp_path: Path) -> None:
    """A file with a name for each star is found by them, here as in a bucket."""
    for pattern in globs(page.read_text()):
        here = tmp_path / re.sub(r"^\w+://[^/]+/", "", pattern)
        file = Path(str(here).replace("**", "x/y").replace("*", "z"))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        assert [entry.url for entry in list_files(str(here))] == [str(file)], pattern


def test_the_check_of_commands_can_fail() -> None:
    text = "```\nshard2vec embed --colour red\n```\n`shard2vec paint o`\n entrypoint: a && shard2vec gc o --kep 2"
    assert [unknown(words) for words in commands(text)] == [["--colour"], ["paint"], ["--kep"]]
    assert len([words for page in PAGES for words in commands(page.read_text())]) > 20


# docs/large.md

BLOCKS = re.findall(r"^```\n\$ python benchmarks/bill\.py (.*)\n((?:.+\n)*)```", LARGE, re.MULTILINE)


@pytest.mark.parametrize(("flags", "said"), BLOCKS, ids=[str(i) for i in range(len(BLOCKS))])
def test_the_bill_is_what_the_page_says(flags: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    bill.main(shlex.split(flags))
    assert capsys.readouterr().out == said


def test_the_page_shows_bills() -> None:
    assert len(BLOCKS) == 3


def test_the_bills_driver_is_the_measured_one() -> None:
    """README's table of growth: the steps from listing to commit with one resumption, and the largest memory."""
    rows = re.findall(r"^\| (.+?) \| ([\d.]+ s, .*?) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    cells = {name: [cell.split(" s, ") for cell in rest.split(" | ")] for name, rest in rows}
    steps = ("list and plan, all to do", "hand out", "take in", "resume there", "collect and commit")
    for column, shards in enumerate((10**4, 10**5, 10**6)):
        seconds = sum(float(row[column][0]) for name, row in cells.items() if name.startswith(steps))
        memory = max(_mb(row[column][1]) for row in cells.values())
        assert bill.GROWTH[shards] == (pytest.approx(seconds, rel=0.01), pytest.approx(memory, rel=0.01))
    assert bill.driver(500_000) == (67.5, 1450) and bill.driver(2_000_000) == (270, 5800)


def _mb(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"MB": 1, "GB": 1000}[unit]


def test_the_bills_row_is_a_measured_one(tmp_path: Path) -> None:
    """Bytes a row of a file of 4,096 with names of classes, to a twentieth; and of float16, as the page has it."""
    for vector_type, bytes_a_row in (("float32", bill.ROW_BYTES[384]), ("float16", 751)):
        assert _row_bytes(tmp_path, 384, vector_type) == pytest.approx(bytes_a_row, rel=0.05)
        assert f" {bytes_a_row:,} " in LARGE
    assert bill.row_bytes(768) == 2644 and 1341 < bill.row_bytes(512) < 2644


def _row_bytes(folder: Path, dim: int, vector_type: str) -> float:
    from timm.data import ImageNetInfo  # type: ignore[import-untyped]

    names = ImageNetInfo("imagenet-1k").label_descriptions()
    shard = Shard(name="photos-00000", format="webdataset", url="/in/x.tar", size=1, etag="0123456789abcdef")
    random, count = np.random.default_rng(0), 4096
    with ShardWriter(made.vector_set(dim=dim, vector_type=vector_type), shard, tuple(names), str(folder)) as writer:
        for at in range(0, count, 256):
            samples = [Sample(at + i, f"{at + i:09d}", label=int(random.integers(1000))) for i in range(256)]
            vectors = random.normal(size=(256, dim)).astype(np.float32)
            index = random.permuted(np.tile(np.arange(1000, dtype=np.int32), (256, 1)), axis=1)[:, :5]
            score = np.sort(random.dirichlet(np.full(5, 0.5), 256).astype(np.float32), axis=1)[:, ::-1]
            writer.rows(samples, [(500, 375)] * 256, Arrays(vectors, np.linalg.norm(vectors, axis=1), index, score))
        return writer.finish_embeddings({}).stat().st_size / count
