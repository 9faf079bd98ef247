"""Running cases of a package here, or in a process of its own, which a faulty package may end without ending us."""

from __future__ import annotations

import faulthandler
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from nsa_gen.verification.cases import FORWARD_ONLY, Case
from nsa_gen.verification.checking import check_case
from nsa_gen.verification.dense import OracleParameters
from nsa_gen.verification.examples import Example, ExampleResult, parse_example, run_example
from nsa_gen.verification.inference import Scenario, Step, run_scenario
from nsa_gen.verification.inputs import make_inputs
from nsa_gen.verification.report import Row, raised
from nsa_gen.verification.schedules import Variation, varied
from nsa_gen.workers import Handle, Say, Worker, WorkerDied, WorkerFailure, serve, worker_environment

if TYPE_CHECKING:
    from nsa_gen.spec import Spec

SILENCE_SECONDS = 3600.0
"""How long a case may take; the largest ones of the interpreter take minutes."""


class Runner(Protocol):
    """Runs what a verification consists of; whatever goes wrong is a row too."""

    def case(self, case: Case, seed: int, gradients: bool) -> list[Row]: ...

    def scenario(self, scenario: Scenario, variation: Variation | None) -> list[Row]: ...

    def example(self, spec: Spec, example: Example) -> ExampleResult: ...

    def close(self) -> None: ...


@dataclass
class InProcess:
    """Runs a package that is imported here. `build` makes the packages of other specs (None: it cannot be done)."""

    spec: Spec
    module: Any
    device: torch.device
    build: Callable[[Spec], Any] | None = None

    def case(self, case: Case, seed: int, gradients: bool) -> list[Row]:
        """The comparisons of one call."""
        try:
            inputs = make_inputs(
                self.spec,
                batch=case.batch,
                tokens=case.tokens,
                tokens_kv=case.tokens_kv,
                dtype=getattr(torch, self.spec.dtype),
                device=self.device,
                seed=seed,
                kind=case.kind,  # type: ignore[arg-type]
            )
            gradients = gradients and case.gradients and case.kind not in FORWARD_ONLY
            parameters = OracleParameters.from_spec(self.spec)
            return check_case(self.module, parameters, case, inputs, with_gradients=gradients)
        except Exception as error:
            return [raised(case.label, error)]

    def scenario(self, scenario: Scenario, variation: Variation | None) -> list[Row]:
        """The comparisons of what happens to one cache."""
        try:
            with varied(self.module, variation):
                return run_scenario(self.spec, self.module, scenario, self.device.type)
        except Exception as error:
            return [raised(f"{scenario.text} seed {scenario.seed}", error)]

    def example(self, spec: Spec, example: Example) -> ExampleResult:
        """The comparisons of a drawn example."""
        module = self.module
        if spec is not self.spec:
            assert self.build is not None
            module = self.build(spec)
        return run_example(spec, module, example, self.device.type, self.build)

    def close(self) -> None:
        """Nothing to end."""


class Isolated:
    """Runs a package's cases in another process, and starts a fresh one when that has ended.

    `folder` is the package's, `workplace` where packages of other specs are generated.
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

    def case(self, case: Case, seed: int, gradients: bool) -> list[Row]:
        """As `InProcess.case`; a row that says how the process ended, if it did."""
        request = {"do": "case", "case": asdict(case), "seed": seed, "gradients": gradients}
        return self._ask(request, case.label)

    def scenario(self, scenario: Scenario, variation: Variation | None) -> list[Row]:
        """As `InProcess.scenario`."""
        more = None if variation is None else asdict(variation)
        request = {"do": "scenario", "scenario": asdict(scenario), "variation": more}
        return self._ask(request, f"{scenario.text} seed {scenario.seed}")

    def example(self, spec: Spec, example: Example) -> ExampleResult:
        """As `InProcess.example`."""
        other = None if spec is self._spec else spec.resolved_yaml()
        request = {"do": "example", "spec": other, "example": example.text, "seed": example.seed}
        return ExampleResult(example, tuple(self._ask(request, example.case.label)))

    def close(self) -> None:
        """End the process."""
        self._worker.close()

    def _ask(self, request: Mapping[str, Any], label: str) -> list[Row]:
        try:
            if not self._started:
                self._start()
            answer = self._worker.ask(request, SILENCE_SECONDS)
        except WorkerDied as died:
            problem = f"{died}, as after a read or write out of bounds"
            return [Row(label, "process", "raised", math.inf, 0.0, False, problem)]
        if answer["lost"]:
            self._worker.end()
        return [Row(**row) for row in answer["rows"]]

    def _start(self) -> None:
        try:
            self._worker.ask({"do": "begin"}, SILENCE_SECONDS)
        except WorkerFailure as failure:
            raise RuntimeError(
                f"the process that verifies failed before its first case: {failure}\n{failure.detail}"
            ) from None
        self._started = True


def case_from(fields: Mapping[str, Any]) -> Case:
    """The inverse of `asdict(case)`, through JSON."""
    tokens = fields["tokens"]
    tokens = tuple(tokens) if isinstance(tokens, list) else tokens
    return Case(**{**fields, "tokens": tokens, "variation": variation_from(fields["variation"])})


def variation_from(fields: Mapping[str, Any] | None) -> Variation | None:
    """The inverse of `asdict(variation)`, through JSON."""
    if fields is None:
        return None
    return Variation(fields["number"], tuple(map(tuple, fields["values"])), tuple(fields["recompute"]))


def scenario_from(fields: Mapping[str, Any]) -> Scenario:
    """The inverse of `asdict(scenario)`, through JSON."""
    steps = tuple(Step(step["kind"], tuple(step["counts"])) for step in fields["steps"])
    return Scenario(**{**fields, "steps": steps})


def answer(runner: InProcess, request: Mapping[str, Any]) -> list[Row]:
    """What the process says to a request of `Isolated`."""
    if request["do"] == "begin":
        return []
    if request["do"] == "case":
        return runner.case(case_from(request["case"]), request["seed"], request["gradients"])
    if request["do"] == "scenario":
        return runner.scenario(scenario_from(request["scenario"]), variation_from(request["variation"]))
    spec = runner.spec
    if request["spec"] is not None:
        from nsa_gen.spec import parse_spec

        spec = parse_spec(request["spec"])
    return list(runner.example(spec, parse_example(request["example"], request["seed"])).rows)


def main() -> None:
    """Run a package's cases in a worker: `python -m nsa_gen.verification.running`.

    Answers are {"rows": [...], "lost": whether the device is of no more use to this process}.
    """
    from nsa_gen.rendering import import_package
    from nsa_gen.spec import parse_spec
    from nsa_gen.verification.calls import quick_device_functions
    from nsa_gen.verification.verify import builder

    faulthandler.enable()

    def build(opening: dict[str, Any]) -> Handle:
        device = torch.device(opening["device"])
        if device.type == "cpu":
            quick_device_functions()
        module = import_package(Path(opening["package"]))
        runner = InProcess(parse_spec(opening["spec"]), module, device, builder(Path(opening["workplace"])))

        def handle(request: dict[str, Any], say: Say) -> dict[str, Any]:
            rows = answer(runner, request)
            return {"rows": [asdict(row) for row in rows], "lost": _lost(device)}

        return handle

    serve(build)


def _lost(device: torch.device) -> bool:
    """Whether every further call on the device would fail, as after a fault of a kernel."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    main()
