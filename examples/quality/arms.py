"""The attentions of the study, and the sizes at which it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from examples.quality.model import Choice, Mode
from examples.quality.training import Settings
from nsa_gen.spec import Spec


@dataclass(frozen=True)
class Profile:
    """Sizes of a study: `settings` of every run, and the attentions' heads, blocks and counts.

    `selected` is the number of tokens that the arms of other block lengths select.
    """

    name: str
    mode: Mode
    settings: dict[str, Any]
    dtype: str
    heads: int
    head_dim: int
    groups: tuple[int, ...]
    group: int
    compression: tuple[int, int]
    blocks: tuple[int, ...]
    selected: int
    counts: tuple[int, ...]
    block: int
    count: int
    local: int
    window: int
    hidden: int
    rows: int

    def spec(self, name: str, group: int = 0, *, scored: str = "compression", **parts: Any) -> Spec:
        """A spec at these sizes; `parts` replaces sections, None leaves one out."""
        block, stride = self.compression
        selection = {"block": self.block, "count": self.count, "initial": 1, "local": self.local, "scores": scored}
        sections = {
            "compression": {"block": block, "stride": stride, "phi": "mean"},
            "selection": selection,
            "window": {"size": self.window},
            **parts,
        }
        present = {name: value for name, value in sections.items() if value is not None}
        gate = "sigmoid" if len(present) > 1 else "none"
        return Spec.model_validate(
            {
                "version": 2,
                "name": name.replace("-", "_"),
                "heads": {"query": self.heads, "kv": self.heads // (group or self.group)},
                "head_dim": self.head_dim,
                "dtype": self.dtype,
                "combine": {"gate": gate},
                "passes": ["forward", "backward", "decode"],
                **present,
            }
        )

    def arms(self) -> dict[str, Choice]:
        """The attentions by name, in the order of the table."""
        selection = {"block": self.block, "count": self.count, "initial": 1, "local": self.local}
        block, stride = self.compression
        mlp = {"block": block, "stride": stride, "phi": {"key": "mlp", "value": "mlp", "hidden": self.hidden}}
        moba = {"block": self.block, "count": self.count, "initial": 0, "local": 1, "scores": "mean", "scope": "head"}
        sink = {"size": self.window, "sink": "learned"}
        specs = {f"nsa-group-{group}": self.spec("nsa", group) for group in self.groups}
        specs |= {
            "no-compression": self.spec("no-compression", scored="mean", compression=None),
            "no-selection": self.spec("no-selection", selection=None),
            "no-window": self.spec("no-window", window=None),
        }
        specs |= {f"count-{n}": self.spec("count", selection={**selection, "count": n}) for n in self.counts}
        for size in self.blocks:
            of_size = {**selection, "block": size, "count": self.selected // size}
            specs[f"block-{size}"] = self.spec("block", selection=of_size)
        specs |= {
            "phi-mlp": self.spec("phi-mlp", compression=mlp),
            "moba": self.spec("moba", compression=None, window=None, selection=moba),
            "window-sink": self.spec("window-sink", compression=None, selection=None, window=sink),
        }
        dense = {f"dense-group-{group}": Choice("dense", self.spec("nsa", group)) for group in self.groups}
        return dense | {name: Choice(self.mode, spec) for name, spec in specs.items()}

    def run(self, arm: str, seed: int, steps: int) -> Settings:
        """The settings of a run."""
        choice = self.arms()[arm]
        return Settings(choice.mode, choice.spec.resolved_yaml(), seed=seed, steps=steps, **self.settings)


PROFILES = {
    "cpu": Profile(
        name="cpu",
        mode="reference",
        settings={"width": 64, "layers": 2, "tokens": 192, "batch": 4, "lr": 6e-3, "warmup": 20},
        dtype="float32",
        heads=4,
        head_dim=16,
        groups=(1, 2, 4),
        group=2,
        compression=(8, 4),
        blocks=(32, 64),
        selected=128,
        counts=(2, 8),
        block=16,
        count=4,
        local=1,
        window=32,
        hidden=32,
        rows=2,
    ),
    "gpu": Profile(
        name="gpu",
        mode="operator",
        settings={"width": 512, "layers": 6, "tokens": 8192, "batch": 4, "lr": 2e-3, "warmup": 20},
        dtype="bfloat16",
        heads=16,
        head_dim=64,
        groups=(1, 4, 16),
        group=4,
        compression=(32, 16),
        blocks=(32, 128),
        selected=1024,
        counts=(4, 8, 32),
        block=64,
        count=16,
        local=2,
        window=512,
        hidden=256,
        rows=4,
    ),
}
