"""Running cases of a package here, or in a process of its own, which a faulty package may end without ending us."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

import nsa_gen
from nsa_gen._process import LineProcess, ending
from nsa_gen.verification.cases import FORWARD_ONLY, Case
from nsa_gen.verification.checking import check_case
from nsa_gen.verification.dense import OracleParameters
from nsa_gen.verification.examples import Example, ExampleResult, parse_example, run_example
from nsa_gen.verification.inference import Scenario, Step, run_scenario
from nsa_gen.verification.inputs import make_inputs
from nsa_gen.verification.report import Row, raised
from nsa_gen.verification.schedules import Variation, varied

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
        self._opening = {
            "spec": spec.resolved_yaml(),
            "package": str(folder),
            "workplace": str(workplace),
            "device": str(device),
        }
        self._environment = _environment(device)
        self._process: LineProcess | None = None

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
        process, self._process = self._process, None
        if process is not None:
            process.close()

    def _ask(self, request: Mapping[str, Any], label: str) -> list[Row]:
        process = self._process or self._start()
        try:
            process.tell(request)
            answer = json.loads(process.read_line(SILENCE_SECONDS))
        except TimeoutError:
            self.close()
            return [_died(label, f"did not answer within {SILENCE_SECONDS:g} s")]
        except (EOFError, BrokenPipeError):
            how = ending(process.wait() or 0)
            self.close()
            return [_died(label, how)]
        if answer["lost"]:
            self.close()
        return [Row(**row) for row in answer["rows"]]

    def _start(self) -> LineProcess:
        process = LineProcess([sys.executable, "-m", "nsa_gen.verification.worker"], self._environment)
        try:
            process.tell(self._opening)
            process.read_line(SILENCE_SECONDS)
        except (EOFError, BrokenPipeError):
            how, said = ending(process.wait() or 0), process.errors()
            process.close()
            raise RuntimeError(f"the process that verifies {how} before its first case:\n{said}") from None
        except BaseException:
            process.close()
            raise
        self._process = process
        return process


def _died(label: str, how: str) -> Row:
    problem = f"the process that ran it {how}, as after a read or write out of bounds"
    return Row(label, "process", "raised", math.inf, 0.0, False, problem)


def _environment(device: torch.device) -> dict[str, str]:
    """The environment of the process: Triton's interpreter for the CPU alone, and this nsa_gen importable."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if device.type == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    roots = [str(Path(nsa_gen.__file__).resolve().parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, roots))
    return environment


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
    if request["do"] == "case":
        return runner.case(case_from(request["case"]), request["seed"], request["gradients"])
    if request["do"] == "scenario":
        return runner.scenario(scenario_from(request["scenario"]), variation_from(request["variation"]))
    spec = runner.spec
    if request["spec"] is not None:
        from nsa_gen.spec import parse_spec

        spec = parse_spec(request["spec"])
    return list(runner.example(spec, parse_example(request["example"], request["seed"])).rows)
