"""The glossary's words are those of the code: its identifiers exist, and what it rules out is no identifier."""

from __future__ import annotations

import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")


def rows() -> list[tuple[str, str, list[str], list[str]]]:
    """(word, meaning, identifiers that use it, identifiers that do not exist) of each row of the tables."""
    found = []
    for line in GLOSSARY.splitlines():
        if line.startswith("| ") and not line.startswith(("| word ", "| --- ")):
            word, meaning, used, avoided = (cell.strip() for cell in line.strip("|").split("|"))
            found.append((word, meaning, re.findall(r"`([^`]+)`", used), re.findall(r"`([^`]+)`", avoided)))
    return found


@cache
def identifiers() -> frozenset[str]:
    """Every name in nsa_gen/ and templates/, without what stands in comments and strings."""
    names: set[str] = set()
    for path in (ROOT / "nsa_gen").rglob("*.py"):
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
            if token.type == tokenize.NAME:
                names.add(token.string)
    for path in (ROOT / "templates").rglob("*.jinja"):
        text = path.read_text(encoding="utf-8")
        text = re.sub(r'"""(?:.|\n)*?"""|#(?!%).*$', "", text, flags=re.MULTILINE)
        names |= set(re.findall(r"[A-Za-z_]\w*", text))
    return frozenset(names)


@pytest.mark.parametrize(("word", "meaning", "used", "avoided"), rows(), ids=[row[0] for row in rows()])
def test_a_word_of_the_glossary_is_the_one_in_the_code(word, meaning, used, avoided):
    assert meaning and avoided and (used)
    for name in used:
        assert name in identifiers() or (ROOT / name).is_dir(), f"{word}: {name} is no identifier"
    for name in avoided:
        assert name not in identifiers(), f"{word}: {name} is used; write it by the glossary's word"


def test_no_word_is_explained_twice_or_ruled_out_and_used():
    words = [word for word, *_ in rows()]
    assert len(words) > 30 and len(set(words)) == len(words)
    used = {name for _, _, names, _ in rows() for name in names}
    avoided = [name for *_, names in rows() for name in names]
    assert not used & set(avoided) and len(set(avoided)) == len(avoided)


def test_comments_and_strings_are_no_identifiers():
    assert "online_softmax_step" in identifiers() and "nsa_attention" in identifiers()
    assert "FlashAttention" not in identifiers()
