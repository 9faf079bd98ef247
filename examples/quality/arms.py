"""The attentions of the study, and the sizes at which it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from examples.quality.model import Choice, Mode
from examples.quality.training import Settings
from nsa_gen.spec import Spec


@dataclass(frozen=True)
class Profile:
    """Sizes of a study.

    Attributes:
        name: of the profile.
        mode: what sparse attention runs by.
        settings: of every run.
        shape: dtype and head dim of every spec.
        heads: query heads.
        groups: numbers of query heads that share a KV head; `group` is the base's.
        sections: compression, selection and window of the base.
        counts: other numbers of selected blocks.
        blocks: other lengths of blocks, of which as many are selected as make `selected` tokens.
        hidden: width of the mlp phi.
        rows: sequences of each task in an evaluation.
        lengths: of text and needles in an evaluation, beside those that follow from the trained one.
    """

    name: str
    mode: Mode
    settings: dict[str, Any]
    shape: dict[str, Any]
    heads: int
    groups: tuple[int, ...]
    group: int
    sections: dict[str, dict[str, Any]]
    counts: tuple[int, ...]
    blocks: tuple[int, ...]
    selected: int
    hidden: int
    rows: int
    lengths: tuple[int, ...] = ()

    @property
    def base(self) -> str:
        """The name of the arm from which the others differ in one part."""
        return f"nsa-group-{self.group}"

    def spec(self, name: str, group: int = 0, **changes: dict[str, Any] | None) -> Spec:
        """The base's spec with changed fields of sections; None leaves a section out."""
        changed = {key: None if value is None else {**self.sections[key], **value} for key, value in changes.items()}
        present = {key: value for key, value in {**self.sections, **changed}.items() if value is not None}
        heads = {"query": self.heads, "kv": self.heads // (group or self.group)}
        combine = {"gate": "sigmoid" if len(present) > 1 else "none"}
        passes = ["forward", "backward", "decode"]
        fields = {"version": 2, "name": name, "heads": heads, "combine": combine, "passes": passes}
        return Spec.model_validate({**fields, **self.shape, **present})

    def arms(self) -> dict[str, Choice]:
        """The attentions by name, in the order of the table."""
        by_group = {group: self.spec("nsa", group) for group in self.groups}
        moba = {"initial": 0, "local": 1, "scores": "mean", "scope": "head"}
        mlp = {"phi": {"key": "mlp", "value": "mlp", "hidden": self.hidden}, "position": {"key": "learned"}}
        specs = {f"nsa-group-{group}": spec for group, spec in by_group.items()}
        specs |= {
            "no-compression": self.spec("no_compression", compression=None, selection={"scores": "mean"}),
            "no-selection": self.spec("no_selection", selection=None),
            "no-window": self.spec("no_window", window=None),
        }
        specs |= {f"count-{n}": self.spec("count", selection={"count": n}) for n in self.counts}
        for size in self.blocks:
            specs[f"block-{size}"] = self.spec("block", selection={"block": size, "count": self.selected // size})
        specs |= {
            "phi-mlp": self.spec("phi_mlp", compression=mlp),
            "moba": self.spec("moba", compression=None, window=None, selection=moba),
            "window-sink": self.spec("window_sink", compression=None, selection=None, window={"sink": "learned"}),
        }
        dense = {f"dense-group-{group}": Choice("dense", spec) for group, spec in by_group.items()}
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
        shape={"dtype": "float32", "head_dim": 16},
        heads=4,
        groups=(1, 2, 4),
        group=2,
        sections={
            "compression": {"block": 8, "stride": 4, "phi": "mean"},
            "selection": {"block": 16, "count": 4, "initial": 1, "local": 1},
            "window": {"size": 32},
        },
        counts=(2, 8),
        blocks=(32, 64),
        selected=128,
        hidden=32,
        rows=2,
    ),
    "gpu": Profile(
        name="gpu",
        mode="operator",
        settings={
            "width": 512,
            "layers": 6,
            "tokens": 8192,
            "batch": 4,
            "lr": 7e-4,
            "warmup": 100,
            "tasks": "recall,needle,copy",
            "growth": 0.6,
            "packages": "torch",
        },
        shape={"dtype": "bfloat16", "head_dim": 64},
        heads=16,
        groups=(1, 4, 16),
        group=4,
        sections={
            "compression": {"block": 32, "stride": 16, "phi": "mean"},
            "selection": {"block": 64, "count": 16, "initial": 1, "local": 2},
            "window": {"size": 512},
        },
        counts=(4, 8, 32),
        blocks=(32, 128),
        selected=1024,
        hidden=256,
        rows=8,
        lengths=(16384, 32768),
    ),
}
