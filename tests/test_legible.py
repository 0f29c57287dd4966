"""Strangers' text: no signature, no unseen character, no endless line gets to a reader."""

import pytest

from pipeline.legible import first_synonym, legible, shorten


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("photos/cat", "photos/cat"),
        ("a <b> & 'c'", "a <b> & 'c'"),  # escaping is the page's
        ("x/https://h.test/a.jpg?X-Amz-Signature=SECRET", "x/https://h.test/a.jpg"),
        ("s3://user:pw@h/a?sig=SECRET twice s3://h/b?sig=SECRET", "s3://h/a twice s3://h/b"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("a\x1b[31m\nb", "a\\x1b[31m\\nb"),
        ("写真/ねこ", "写真/ねこ"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert legible(text) == shown


def test_a_class_of_many_names_goes_by_its_first() -> None:
    assert first_synonym("wallet, billfold, notecase", 24) == "wallet"
    assert first_synonym("crane, bird", 24) == "crane, bird"
    assert first_synonym("x" * 30 + ", y", 9) == "xxxx…xxxx"
    assert "SECRET" not in first_synonym("a" * 30 + " https://h.test/a?X-Amz-Signature=" + "SECRET" * 9, 40)


def test_long_text_keeps_both_ends() -> None:
    assert shorten("photos-00012/x", 9) == "phot…12/x"
    assert legible("a" * 10**6 + "b", 11) == "aaaaa…aaaaa"
