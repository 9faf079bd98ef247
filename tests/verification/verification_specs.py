"""Small specs for the tests of the verification room."""

from __future__ import annotations

from nsa_gen.spec import Combine, Compression, HeadDim, Heads, Phi, Position, Selection, Spec, Window


def spec_of(
    *,
    branches: str = "cmp slc win",
    phi: str = "mean",
    phi_value: str | None = None,
    position: str = "none",
    position_value: str | None = None,
    kv: str = "shared",
    gate: str = "sigmoid",
    scale: float | str = "auto",
    count: int = 3,
    initial: int = 1,
    local: int = 1,
    window: int = 10,
    query_heads: int = 4,
    kv_heads: int = 2,
    indices_given: bool = False,
    scores: str = "compression",
    dtype: str = "float32",
    tiny: bool = False,
) -> Spec:
    """A spec with l = 8, d = 4, l' = 16 and head dims 16 and 24; `tiny` has one pair of heads."""
    compression = selection = None
    if "cmp" in branches:
        kinds = Phi(key=phi, value=phi_value or phi, hidden=16 if "mlp" in (phi, phi_value) else None)
        positions = Position(key=position, value=position_value or position)
        compression = Compression(block=8, stride=4, phi=kinds, position=positions)
    if "slc" in branches:
        if indices_given:
            selection = Selection(block=16, count=count, indices="input", initial=0, local=0)
        else:
            selection = Selection(block=16, count=count, initial=initial, local=local, scores=scores)
    return Spec(
        version=2 if scores == "mean" else 1,
        name="under_test",
        heads=Heads(query=2, kv=1) if tiny else Heads(query=query_heads, kv=kv_heads),
        head_dim=HeadDim(qk=16, v=16 if tiny else 24),
        dtype=dtype,
        scale=scale,
        kv=kv,
        compression=compression,
        selection=selection,
        window=Window(size=window) if "win" in branches else None,
        combine=Combine(gate=gate),
    )
