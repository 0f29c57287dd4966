"""A file that the user named: whole, or as it was before."""

from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.result_file import check_place, written_whole


def test_a_file_appears_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    """Whoever fails on the way leaves nothing beside it."""
    path = tmp_path / "x.png"
    for content in (b"one", b"two"):
        with written_whole(path, "--sheet") as part:
            part.write_bytes(content)
            assert not path.exists() or path.read_bytes() == b"one"
        assert path.read_bytes() == content
    with pytest.raises(ZeroDivisionError), written_whole(path, "--sheet") as part:
        part.write_bytes(b"half")
        raise ZeroDivisionError
    no_space = pytest.raises(UsageError, match=r"--sheet .*x\.png cannot be written: No space left")
    with no_space, written_whole(path, "--sheet") as part:
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    assert path.read_bytes() == b"two" and list(tmp_path.iterdir()) == [path]


def test_a_place_where_no_file_can_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is not there, a folder in its place; a bare name is in the working directory."""
    monkeypatch.chdir(tmp_path)
    check_place(Path("x.html"), "--html")
    check_place(tmp_path / "x.html", "--html")
    with pytest.raises(UsageError, match=r"--html no/x\.html: there is no folder no$"):
        check_place(Path("no/x.html"), "--html")
    with pytest.raises(UsageError, match=r"--html .*: is a folder"):
        check_place(tmp_path, "--html")
