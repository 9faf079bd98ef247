"""Run a package's checks, in this process or in a separate one, which a faulty package may end."""

from __future__ import annotations

import faulthandler
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from pydantic import TypeAdapter

from nsa_gen.verification.cases import Case
from nsa_gen.verification.checking import check_case
from nsa_gen.verification.examples import Build, Example
from nsa_gen.verification.inference import Scenario, run_scenario
from nsa_gen.verification.properties import Trial
from nsa_gen.verification.report import Row, raised
from nsa_gen.verification.schedules import Variation, varied
from nsa_gen.workers import Handle, Say, Worker, WorkerDied, WorkerFailure, serve, worker_environment

if TYPE_CHECKING:
    from nsa_gen.spec import Spec

SILENCE_SECONDS = 3600.0
"""Time limit of a case. The largest ones take minutes in the interpreter."""


@dataclass(frozen=True)
class CaseCheck:
    """A call with inputs of a seed: the forward and, with `gradients`, the backward."""

    case: Case
    seed: int
    gradients: bool

    @property
    def label(self) -> str:
        """Its name in a row of the report."""
        return self.case.label

    def check(self, spec: Spec, module: Any, device: torch.device, build: Build | None) -> list[Row]:
        """The comparisons of the call."""
        trial = Trial(spec, module, self.case, self.seed, device.type, build)
        gradients = self.gradients and trial.gradients
        return check_case(module, trial.parameters, self.case, trial.inputs(), with_gradients=gradients)


@dataclass(frozen=True)
class ScenarioCheck:
    """A scenario of one cache, with the values of a variation."""

    scenario: Scenario
    variation: Variation | None

    @property
    def label(self) -> str:
        """Its name in a row of the report."""
        return f"{self.scenario.text} seed {self.scenario.seed}"

    def check(self, spec: Spec, module: Any, device: torch.device, build: Build | None) -> list[Row]:
        """The comparisons of every step that attends."""
        with varied(module, self.variation):
            return run_scenario(spec, module, self.scenario, device.type)


Check = CaseCheck | ScenarioCheck | Example
"""The kinds of checks in a verification."""
CHECKS = {kind.__name__: kind for kind in (CaseCheck, ScenarioCheck, Example)}


class Runner(Protocol):
    """Runs checks of a spec's package, or of another spec's. Every failure becomes a row."""

    def run(self, check: Check, spec: Spec | None = None) -> list[Row]: ...

    def close(self) -> None: ...


@dataclass
class InProcess:
    """Runs a package that is imported here. `build` makes packages of other specs (None: there are none)."""

    spec: Spec
    module: Any
    device: torch.device
    build: Build | None = None

    def run(self, check: Check, spec: Spec | None = None) -> list[Row]:
        """The rows of a check. An exception becomes a row."""
        try:
            module = self.module
            if spec is not None and spec is not self.spec:
                assert self.build is not None
                module = self.build(spec)
            return check.check(spec or self.spec, module, self.device, self.build)
        except Exception as error:
            return [raised(check.label, error)]

    def close(self) -> None:
        """There is nothing to end."""


class Isolated:
    """Runs a package's checks in another process, and starts a new one when it has ended.

    `folder` is the package's. Packages of other specs are generated in `workplace`.
    """

    def __init__(self, spec: Spec, folder: Path, workplace: Path, device: torch.device) -> None:
        self._spec = spec
        opening = {
            "spec": spec.resolved_yaml(),
            "package": str(folder),
            "workplace": str(workplace),
            "device": str(device),
        }
        command = (sys.executable, "-m", __name__)
        self._worker = Worker(command, worker_environment(interpreted=device.type == "cpu"), opening)
        self._started = False

    def run(self, check: Check, spec: Spec | None = None) -> list[Row]:
        """As `InProcess.run`. If the process ended, a row says how."""
        other = None if spec is None or spec is self._spec else spec.resolved_yaml()
        try:
            if not self._started:
                self._start()
            answer = self._worker.ask({**as_request(check), "spec": other}, SILENCE_SECONDS)
        except WorkerDied as died:
            problem = f"{died}, as after a read or write out of bounds"
            return [Row(check.label, "process", "raised", math.inf, 0.0, False, problem)]
        if answer["lost"]:
            self._worker.end()
        return [Row(**row) for row in answer["rows"]]

    def close(self) -> None:
        """End the process."""
        self._worker.close()

    def _start(self) -> None:
        try:
            self._worker.ask({"kind": None}, SILENCE_SECONDS)
        except WorkerFailure as failure:
            raise RuntimeError(
                f"the process that verifies failed before its first case: {failure}\n{failure.detail}"
            ) from None
        self._started = True


def as_request(check: Check) -> dict[str, Any]:
    """A check as JSON data."""
    return {"kind": type(check).__name__, "check": asdict(check)}


def from_request(request: Mapping[str, Any]) -> Check:
    """The inverse of `as_request`, through JSON."""
    return TypeAdapter(CHECKS[request["kind"]]).validate_python(request["check"])


def main() -> None:
    """Run a package's checks in a worker: `python -m nsa_gen.verification.running`.

    Answers are {"rows": [...], "lost": whether this process can no longer use the device}. A request without a kind has
    no rows, and only shows that the process has started.
    """
    from nsa_gen.rendering import import_package
    from nsa_gen.spec import parse_spec
    from nsa_gen.verification.calls import quick_interpreter
    from nsa_gen.verification.verify import builder

    faulthandler.enable()

    def build(opening: dict[str, Any]) -> Handle:
        device = torch.device(opening["device"])
        if device.type == "cpu":
            quick_interpreter()
        module = import_package(Path(opening["package"]))
        runner = InProcess(parse_spec(opening["spec"]), module, device, builder(Path(opening["workplace"])))

        def handle(request: dict[str, Any], say: Say) -> dict[str, Any]:
            rows: list[Row] = []
            if request["kind"] is not None:
                spec = None if request["spec"] is None else parse_spec(request["spec"])
                rows = runner.run(from_request(request), spec)
            return {"rows": [asdict(row) for row in rows], "lost": _lost(device)}

        return handle

    serve(build)


def _lost(device: torch.device) -> bool:
    """Whether every further call on the device would fail, for example after a fault of a kernel."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    main()
