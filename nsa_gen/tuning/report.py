"""What a tuning comes to: a result for each bucket, what was quarantined, and where everything is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsa_gen.tuning.estimate import Estimate
from nsa_gen.tuning.identity import Device
from nsa_gen.tuning.shapes import Bucket
from nsa_gen.tuning.stage0 import Selection
from nsa_gen.tuning.store import Configs


@dataclass(frozen=True)
class BucketResult:
    """A tuned bucket.

    Attributes:
        bucket: which.
        configs: what differs from the cost model's choice; empty where that won.
        gain: the default's time over the winner's, whole passes, geometric mean over kinds of input.
        noise: half-width of the interval that the gain is likely in.
        times: milliseconds by kind of input and pass: {"independent": {"forward": {"default": 1.0, "tuned": 0.9}}}.
        saved: the file it was saved in; None if it could not be, and `problem` says why.
        problem: what went wrong with the bucket as a whole; empty if nothing.
        cut_short: the budget ran out before every kernel was tried.
    """

    bucket: Bucket
    configs: Configs
    gain: float = 1.0
    noise: float = 0.0
    times: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    saved: Path | None = None
    problem: str = ""
    cut_short: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **vars(self),
            "bucket": self.bucket.to_json(),
            "saved": None if self.saved is None else str(self.saved),
        }


@dataclass(frozen=True)
class TuneReport:
    """Everything a tuning found.

    `selections` is what stage 0 left, by bucket; `quarantined` maps candidates to the reason they failed. `device` is
    None where nothing was measured (`--dry-run`), and `expected` then says how long measuring would take.
    """

    name: str
    target: str
    device: Device | None
    selections: dict[Bucket, tuple[Selection, ...]]
    results: tuple[BucketResult, ...] = ()
    quarantined: dict[str, str] = field(default_factory=dict)
    measured: int = 0
    resumed: int = 0
    journal: Path | None = None
    seconds: float = 0.0
    expected: Estimate | None = None

    @property
    def wrong(self) -> dict[str, str]:
        """Candidates that computed something else: each is a fault of a kernel or of the compiler."""
        return {name: reason for name, reason in self.quarantined.items() if reason.startswith("wrong")}

    @property
    def ok(self) -> bool:
        """Every bucket has a result that was saved, and no candidate was wrong."""
        return not self.wrong and all(not each.problem for each in self.results)

    def to_json(self) -> dict[str, Any]:
        """The report as `json.dumps` takes it."""
        return {
            "ok": self.ok,
            "name": self.name,
            "target": self.target,
            "gpu": None if self.device is None else vars(self.device),
            "results": [each.to_json() for each in self.results],
            "quarantined": self.quarantined,
            "measured": self.measured,
            "resumed": self.resumed,
            "journal": None if self.journal is None else str(self.journal),
            "seconds": round(self.seconds, 1),
            "expected": None if self.expected is None else self.expected.to_json(),
            "stage0": {
                bucket.name: [each.to_json() for each in selections] for bucket, selections in self.selections.items()
            },
        }
