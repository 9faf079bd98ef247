"""Tile sizes by architecture."""

from collections.abc import Iterator
from contextlib import contextmanager

KEY_BLOCK = {"gfx942": 32}
_current = ["sm_90"]


@contextmanager
def use_target(target: str) -> Iterator[None]:
    """Choose tiles for `target` within the block."""
    _current.append(target)
    try:
        yield
    finally:
        _current.pop()


def key_block() -> int:
    """Keys a tile covers on the chosen architecture."""
    return KEY_BLOCK.get(_current[-1], 64)
