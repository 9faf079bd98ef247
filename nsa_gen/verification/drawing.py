"""Random specs, drawn with a function that picks: that of a seeded `random.Random`, or a Hypothesis strategy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from nsa_gen.spec import Spec, SpecError, parse_spec
from nsa_gen.spec.constraints import MOST_COMPRESSED_KEYS

T = TypeVar("T")

PHIS = ("mean", "weighted", "linear", "mlp")


class Pick(Protocol):
    """Picks one of several options: `random.Random(seed).choice`, or a strategy's draw."""

    def __call__(self, options: Sequence[T], /) -> T: ...


class Sizes:
    """The sizes from which a spec is drawn: small enough for Triton's interpreter, or those used on GPUs."""

    def __init__(self, wide: bool) -> None:
        self.kv_heads = (1, 2, 3) if wide else (1, 2)
        self.groups = (1, 2, 3, 4, 5, 7, 8, 12, 16) if wide else (1, 2, 3)
        self.head_dims = (16, 24, 32, 64, 80, 96, 128, 192, 256) if wide else (16, 24, 32)
        self.blocks = (16, 32, 64, 128, 1024) if wide else (16, 32, 16, 32, 1024)
        self.index_dims = (16, 32, 64, 128, 256) if wide else (16, 32)
        self.strides = (2, 4, 8, 16) if wide else (2, 4, 8)
        self.counts = (1, 2, 3, 5, 8, 13, 16, 100, 512) if wide else (1, 2, 3, 5, 67)
        self.windows = (1, 2, 7, 16, 17, 64, 100, 512) if wide else (1, 2, 7, 16, 17)
        self.hidden = (16, 32, 64) if wide else (16,)
        self.largest_compression = 64 if wide else 32


def drawn_spec(pick: Pick, *, dtypes: Sequence[str] = ("float32", "float16"), wide: bool = False) -> Spec:
    """A legal spec: any of the branches, phis, positions, sinks, joint branches, gates and ways of sharing K and V.

    Small specs are cheap enough for the interpreter. `wide` ones have the head dims, groups, blocks and counts that are
    used on GPUs.
    """
    import yaml

    sizes = Sizes(wide)
    branches = pick(("cmp slc win", "cmp slc", "cmp win", "slc win", "cmp", "slc", "win"))
    kv = pick(sizes.kv_heads)
    dtype = pick(dtypes)
    document: dict[str, Any] = {
        "version": 1,
        "name": "drawn",
        "heads": {"query": kv * pick(sizes.groups), "kv": kv},
        "head_dim": {"qk": pick(sizes.head_dims), "v": pick(sizes.head_dims)},
        "dtype": dtype,
        "scale": pick(("auto", 0.37, 0.1)),
        "kv": pick(("shared", "per_branch")),
        "combine": {"gate": pick(("sigmoid", "given", "none"))},
        "passes": pick((["forward", "backward"], ["forward", "backward"], ["forward"], ["forward", "decode"])),
    }
    if wide and dtype == "float32":
        document["fp32_precision"] = pick(("ieee", "tf32"))
    block = pick(sizes.blocks)
    if "cmp" in branches:
        document["compression"] = _compression(pick, block, sizes)
    if "slc" in branches:
        count = pick(sizes.counts)
        means = pick((True, False, False))  # by mean keys or an indexer
        if means or ("cmp" in branches and pick((True, True, False))):
            most = count - 1 if means else count
            initial = pick(range(min(most, 3) + 1) if wide else range(most + 1))
            rest = count - initial
            least = 1 if means else 0
            local = pick(range(least, (min(rest, 3) if wide else rest) + 1))
            document["selection"] = {"block": block, "count": count, "initial": initial, "local": local}
            if means:
                document["version"] = 2
                indexed = initial + local < count and pick((True, False))
                scores = {"indexer": {"dim": pick(sizes.index_dims)}} if indexed else "mean"
                document["selection"]["scores"] = scores
            elif pick((True, False, False)):
                document["version"] = 2
                document["selection"]["pool"] = "max"
            if not means and initial + local < count and pick((True, False, False)):
                document["version"] = 2
                compression = document["compression"]
                phi = "external" if compression["phi"] == "external" else "mean"
                sizes_of_blocks = {name: compression[name] for name in ("stride", "block")}
                document["compression"] = {**sizes_of_blocks, "phi": phi, "output": False}
        else:
            document["selection"] = {"block": block, "count": count, "indices": "input"}
        scope = pick(("group", "group", "head", "all"))
        if scope != "group":
            document["version"] = 2
            document["selection"]["scope"] = scope
        if pick((True, False, False)):
            document["version"] = 2
            document["selection"]["sink"] = "learned"
    if "win" in branches:
        document["window"] = {"size": pick(sizes.windows)}
        if pick((True, False, False)):
            document["version"] = 2
            document["window"]["sink"] = "learned"
    joinable = "slc" in branches and "win" in branches and document["kv"] == "shared"
    if joinable and pick((True, False, False)):
        document["version"] = 2
        sinks = [document[name].pop("sink", "none") for name in ("selection", "window")]
        document["combine"] |= {"joint": ["selection", "window"], "sink": sinks[1]}
    raw = "slc" in branches or "win" in branches or document["compression"]["phi"] != "external"
    if "decode" in document.get("passes", ()) and raw and pick((True, False, False)):
        document |= {"version": 2, "cache": {"dtype": "e4m3"}}
    try:
        return parse_spec(yaml.safe_dump(document, sort_keys=False))
    except SpecError as error:  # the drawing is wrong, not the example
        raise AssertionError(f"a spec was drawn that is not legal: {error}") from error


def spec_of_seed(seed: int, *, dtypes: Sequence[str], wide: bool) -> Spec:
    """The spec of a seed. Its name contains the seed."""
    return drawn_spec(random.Random(seed).choice, dtypes=dtypes, wide=wide).replace(name=f"drawn_{seed}")


def _compression(pick: Pick, block: int, sizes: Sizes) -> dict[str, Any]:
    stride = pick([stride for stride in sizes.strides if block <= MOST_COMPRESSED_KEYS * stride])
    found: dict[str, Any] = {
        "stride": stride,
        "block": stride * pick(range(1, min(block, sizes.largest_compression) // stride + 1)),
    }
    if pick((True, False, False, False)):
        return {**found, "phi": "external"}
    key, value = pick(PHIS), pick(PHIS)
    hidden = {"hidden": pick(sizes.hidden)} if "mlp" in (key, value) else {}
    found["phi"] = {"key": key, "value": value, **hidden}
    return {**found, "position": {side: pick(("none", "learned")) for side in ("key", "value")}}
