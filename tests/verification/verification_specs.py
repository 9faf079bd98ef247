"""Small specs for the tests of the verification room."""

from __future__ import annotations

from typing import Any

from nsa_gen.spec import Spec
from tests.support import small_spec


def spec_of(
    *,
    branches: str = "cmp slc win",
    position: str = "none",
    position_value: str | None = None,
    query_heads: int = 4,
    kv_heads: int = 2,
    indices_given: bool = False,
    tiny: bool = False,
    **more: Any,
) -> Spec:
    """A spec with l = 8, d = 4, l' = 16 and head dims 16 and 24; `tiny` has one pair of heads. See `small_spec`."""
    query_heads, kv_heads = (2, 1) if tiny else (query_heads, kv_heads)
    return small_spec(
        branches,
        group=query_heads // kv_heads,
        kv_heads=kv_heads,
        dims=(16, 16 if tiny else 24),
        position=(position, position_value or position),
        indices="input" if indices_given else "computed",
        **more,
    )
