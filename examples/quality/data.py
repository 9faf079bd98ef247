"""Bytes to train and evaluate on: Python's own sources, and tasks whose questions come long after what they ask for.

Everything follows from a seed, a step and a row number. A resumed run therefore needs no saved state of the data, and a
batch does not depend on the number of processes that share it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import string
import sysconfig
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

NOISE, TEXT, ANSWER = range(3)
"""How the loss counts a byte: drawn at random (not counted), text, or an answer (ANSWER plus the task's number)."""
SKIPPED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}
TRAINED_SHARES, HELD_OUT_SHARES = (1 / 4, 1 / 2, 1), (3 / 8, 3 / 4, 3 / 2)
"""Lengths of tasks as shares of a sequence: the trained ones, and the held-out ones."""
LETTERS = string.ascii_lowercase.encode()
PAIRS = [bytes([a, b]) for a in LETTERS for b in LETTERS]
NODES = string.ascii_letters.encode()
QUESTION, NEEDLE = b"\x06", b"\x07"
BETWEEN_NEEDLES = 256
"""There is at most one needle per this many bytes."""
FIRST_ANSWERED = 4
"""Regression: examples before the first answer that counts. There are two unknown weights."""
BINS = 12
"""Regression: answers are rounded to whole numbers from -BINS to BINS."""


@dataclass(frozen=True)
class Corpus:
    """Text to train on, held-out text, and a digest of both."""

    train: bytes
    held_out: bytes
    digest: str

    def slice(self, held_out: bool, size: int, draw: random.Random) -> bytes:
        """`size` bytes from a random place in the text."""
        text = self.held_out if held_out else self.train
        start = draw.randrange(len(text) - size + 1)
        return text[start : start + size]


@cache
def library(packages: str = "") -> Corpus:
    """The sources of Python's standard library, as installed on this machine; one file in twenty is held out.

    They come with every interpreter, under the PSF license, and are read but not copied. Other versions of Python have
    other sources: runs are comparable only if their digests are equal. `packages` are names of installed packages,
    separated by commas, whose sources are read too. Raises ValueError if one is not installed.
    """
    roots = [Path(sysconfig.get_path("stdlib"))]
    for package in filter(None, packages.split(",")):
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise ValueError(f"packages: expected installed packages, got {package}")
        roots.append(Path(found.submodule_search_locations[0]))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for root in roots:
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if name not in SKIPPED)
            for name in sorted(files):
                if name.endswith(".py") and not name.startswith("_sysconfigdata"):  # the machine's own paths
                    path = Path(folder, name)
                    held_out = zlib.crc32(path.relative_to(root).as_posix().encode()) % 20 == 0
                    parts[held_out].append(path.read_bytes())
    train, held_out_text = (b"\n".join(each) for each in parts)
    return Corpus(train, held_out_text, hashlib.sha256(train + held_out_text).hexdigest()[:16])


@dataclass
class Page:
    """A sequence under construction: its bytes, and the kind of each byte."""

    text: bytearray = field(default_factory=bytearray)
    kinds: bytearray = field(default_factory=bytearray)

    def write(self, text: bytes, kind: int = NOISE) -> None:
        self.text += text
        self.kinds += bytes([kind]) * len(text)


Filler = Callable[[int], bytes]
"""Returns the given number of bytes of text."""


def _words(count: int, draw: random.Random) -> list[bytes]:
    """Distinct keys of one letter, or of two if the alphabet has too few letters."""
    known = [bytes([a]) for a in LETTERS] if count <= len(LETTERS) else PAIRS
    return draw.sample(known, min(count, len(known)))


def recall(length: int, draw: random.Random, filler: Filler) -> Page:
    """Keys with one value each, then text, then a question for every key, in another order."""
    page, keys = Page(), _words(max(2, length // 16), draw)
    values = {key: bytes([draw.choice(LETTERS)]) for key in keys}
    asked = draw.sample(keys, len(keys))
    for key in keys:
        page.write(key + values[key] + b" ")
    page.write(filler(length - 2 * len(page.text) - 1), TEXT)
    page.write(QUESTION)
    for key in asked:
        page.write(key)
        page.write(values[key], ANSWER)
        page.write(b" ")
    return page


def needle(length: int, draw: random.Random, filler: Filler, depth: float | None = None) -> Page:
    """Keys with values of four letters, at random places in a text; then a question for every key, in another order.

    With a `depth` (0: at the start, 1: at the end) there is one needle.
    """
    page, count = Page(), draw.randint(1, max(1, length // BETWEEN_NEEDLES)) if depth is None else 1
    values = {bytes(key): bytes(draw.choices(LETTERS, k=4)) for key in draw.sample(PAIRS, count)}
    around = length - sum(len(QUESTION + NEEDLE + NEEDLE + key + key + value + value) for key, value in values.items())
    places = sorted(round(around * (draw.random() if depth is None else depth)) for _ in values)
    for (key, value), before, place in zip(values.items(), [0, *places], places, strict=False):
        page.write(filler(place - before), TEXT)
        page.write(NEEDLE + key + value + NEEDLE)
    page.write(filler(around - places[-1]), TEXT)
    for key in draw.sample(list(values), count):
        page.write(QUESTION + key)
        page.write(values[key], ANSWER)
    return page


def hops(length: int, draw: random.Random, filler: Filler) -> Page:
    """Links between letters, in random order, spread over a text. The question is where 1, 2 or 3 links lead."""
    page, steps = Page(), draw.randint(1, 3)
    count = max(1, min(length // 24 // steps, len(NODES) // (steps + 1)))
    nodes = draw.sample(NODES, count * (steps + 1))
    chains = [nodes[i::count] for i in range(count)]
    links = [bytes([a]) + b">" + bytes([b]) + b" " for chain in chains for a, b in pairwise(chain)]
    draw.shuffle(links)
    free = length - 4 * len(links) - 4 * count
    for i, link in enumerate(links):
        page.write(filler(free * (i + 1) // len(links) - free * i // len(links)), TEXT)
        page.write(link)
    for chain in chains:
        page.write(QUESTION + bytes([chain[0]]) + str(steps).encode())
        page.write(bytes(chain[-1:]), ANSWER)
    return page


def copying(length: int, draw: random.Random, filler: Filler) -> Page:
    """Random letters, a text, and the same letters again."""
    page, letters = Page(), bytes(draw.choices(LETTERS, k=length // 4))
    page.write(letters)
    page.write(filler(length - 2 * len(letters) - 1), TEXT)
    page.write(QUESTION)
    page.write(letters, ANSWER)
    return page


def regression(length: int, draw: random.Random, filler: Filler) -> Page:
    """Points of two numbers from -4 to 4, as digits, each with a letter for a linear function's rounded value."""
    page, weights = Page(), (draw.gauss(0, 1), draw.gauss(0, 1))
    for i in range(length // 4):
        x = [draw.randint(-4, 4) for _ in weights]
        y = round(sum(w * each for w, each in zip(weights, x, strict=True)))
        page.write(bytes(ord("4") + each for each in x))
        page.write(bytes([ord("M") + max(-BINS, min(BINS, y))]), ANSWER if i >= FIRST_ANSWERED else NOISE)
        page.write(b" ")
    page.write(b"\n" * (length - len(page.text)))
    return page


TASKS: dict[str, Callable[..., Page]] = {
    "recall": recall,
    "needle": needle,
    "hops": hops,
    "copy": copying,
    "regression": regression,
}
SHORTEST = 32
"""Fewest bytes of a sequence of a task."""


def task_page(task: str, length: int, draw: random.Random, corpus: Corpus, held_out: bool, **more: float) -> Page:
    """One sequence of a task with `length` bytes; the first byte names the task."""
    if length < SHORTEST:
        raise ValueError(f"tokens: expected at least {SHORTEST} bytes of a task, got {length}")
    page, number = Page(), list(TASKS).index(task)
    page.write(bytes([1 + number]))
    body = TASKS[task](length - 1, draw, lambda size: corpus.slice(held_out, size, draw), **more)
    page.text += body.text
    page.kinds += body.kinds.replace(bytes([ANSWER]), bytes([ANSWER + number]))
    return page


def _tensors(pages: Sequence[Page]) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) int64, and their kinds (B, T) uint8."""
    tokens, kinds = (
        torch.stack([torch.frombuffer(bytearray(getattr(page, name)), dtype=torch.uint8) for page in pages])
        for name in ("text", "kinds")
    )
    return tokens.long(), kinds


def training_batch(
    corpus: Corpus,
    seed: int,
    step: int,
    rows: range,
    tokens: int,
    task_share: float,
    tasks: Sequence[str] = tuple(TASKS),
) -> tuple[Tensor, Tensor]:
    """Rows of a step's batch: tokens (B, T) int64 and kinds (B, T) uint8.

    A row is a slice of the text or, with probability `task_share`, one or more sequences of one of `tasks`. They have
    a quarter, a half or the whole of the row's length.
    """
    pages = []
    for row in rows:
        draw, page = random.Random(f"train/{seed}/{step}/{row}"), Page()
        if draw.random() < task_share:
            task, share = draw.choice(tasks), draw.choice(TRAINED_SHARES)
            while len(page.text) < tokens:
                left, size = tokens - len(page.text), round(tokens * share)
                each = task_page(task, left if left < 2 * size else size, draw, corpus, held_out=False)
                page.text += each.text
                page.kinds += each.kinds
        else:
            page.write(corpus.slice(False, tokens, draw), TEXT)
        pages.append(page)
    return _tensors(pages)


def held_out_batch(
    corpus: Corpus, what: str, tokens: int, rows: range, seed: int = 0, **more: float
) -> tuple[Tensor, Tensor]:
    """Held-out text (`what` is "text") or sequences of a task, in the form that `training_batch` returns."""
    pages = []
    for row in rows:
        draw, page = random.Random(f"held out/{seed}/{what}/{tokens}/{more}/{row}"), Page()
        if what == "text":
            page.write(corpus.slice(True, tokens, draw), TEXT)
        else:
            page = task_page(what, tokens, draw, corpus, held_out=True, **more)
        pages.append(page)
    return _tensors(pages)
