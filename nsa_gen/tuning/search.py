"""The search for one bucket: schedules first, each kernel by itself, schedules with their winners, and a final.

Schedules and all of decode are timed as whole passes, because they change the work of other kernels (partial sums,
index build, merges). A kernel of the forward or backward is timed by the call that launches it; its gain must also show
in the whole passes of the final. Every race includes the default, interleaved, and the ratio to the default counts.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nsa_gen.lowering import Plan
from nsa_gen.tuning.backend import Crew
from nsa_gen.tuning.race import BACKWARD, FORWARD, WORST, Candidate, Race, Reading, Score, pick, scores, spread
from nsa_gen.tuning.space import KINDS, Bucket
from nsa_gen.tuning.stage0 import KEPT_SHARE, Effort, Selection, Survivor
from nsa_gen.tuning.store import Configs

Tell = Callable[[int, int, float, str], None]
NOTHING_COMPARED = "the budget was spent before anything was compared, so nothing is saved"
DEFAULT, EVEN = Candidate(), Score(1.0, 0.0)
"""The cost model's choice, and its score."""
HOPELESS = 1.5
"""A schedule this much slower than the best one, with the default's tiles, is not pursued."""


@dataclass(frozen=True)
class BucketResult:
    """A tuned bucket.

    Attributes:
        bucket: the bucket.
        configs: the values that differ from the cost model's choice; empty if that won.
        gain: the default's time divided by the winner's, for whole passes, as a geometric mean over kinds of input.
        noise: half-width of the interval that likely contains the gain.
        times: milliseconds by kind of input and pass: {"independent": {"forward": {"default": 1.0, "tuned": 0.9}}}.
        saved: the file with the result; None if it could not be saved, and `problem` says why.
        problem: what went wrong with the bucket as a whole; empty if nothing did.
        cut_short: whether the budget ran out before every kernel was tried.
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
        return {**asdict(self), "saved": None if self.saved is None else str(self.saved)}


@dataclass
class Search:
    """Tunes one bucket.

    Attributes:
        program: the plan that is tuned.
        target: the GPU's architecture.
        bucket: the bucket.
        selections: what stage 0 left of each kernel.
        crew: measures candidates.
        passes: forward, or forward and backward.
        effort: how much is tried.
        deadline: time.monotonic() after which no further kernel is started; the final is run in any case.
        tell: called with progress: candidates done and expected, the least ratio to the default, the current step.
    """

    program: Plan
    target: str
    bucket: Bucket
    selections: Sequence[Selection]
    crew: Crew
    passes: tuple[str, ...]
    effort: Effort
    deadline: float
    tell: Tell = lambda done, total, best, what: None

    def __post_init__(self) -> None:
        self._selections = {each.kernel: each for each in self.selections}
        self._defaults = {name: config.mapping() for name, config in self.program.defaults[self.target].items()}
        self._choices = {choice for decision in self.program.decisions for choice in decision.choices}
        # Kinds of input in the races before the final.
        self._kinds = self.bucket.kinds if self.effort.every_kind else self.bucket.kinds[:1]
        self._best = 1.0
        self._done = 0
        self._total = self._expected()
        self._cut_short = False
        self._right: set[str] = set()
        self._fault = ""

    def run(self) -> BucketResult:
        """Search, and run the final."""
        self._fault = self.crew.check(DEFAULT, self.bucket)
        if self._fault:
            return self._result()
        combos = self._live_combos()
        ranked: dict[str, list[Survivor]] = {}
        base = DEFAULT
        for sweep in range(self.effort.sweeps):
            found = self._sweep(base if sweep else DEFAULT, combos)
            ranked |= {kernel: best for kernel, best in found.items() if best}
            base = self._composed(combos, ranked)
        base = self._sized(base)
        return self._final(base, combos, ranked)

    # Schedules

    def _combos(self) -> list[Configs]:
        """All combinations of the choices among kernels, the default's first; [{}] if there is no choice."""
        found: list[Configs] = [{}]
        for decision in self.program.decisions:
            names = [each.name for each in decision.tunables if each.name in self._choices and self._wanted(each.name)]
            if not names:
                continue
            values = [each.values for each in decision.tunables if each.name in names]
            each = [dict(zip(names, picked, strict=True)) for picked in itertools.product(*values)]
            found = [{**combo, decision.name: one} for combo in found for one in each]
        return sorted(found, key=lambda combo: combo != self._default_combo(combo))

    def _wanted(self, choice: str) -> bool:
        """Whether a tuned pass has a kernel that runs for this choice.

        A choice that no kernel runs for concerns every pass. It is open only if all passes are tuned.
        """
        runs = {kernel.direction for kernel in self.program.kernels if kernel.choice and kernel.choice[0] == choice}
        if runs:
            return not runs.isdisjoint(self.passes)
        return {kernel.direction for kernel in self.program.kernels} - {"decode"} <= set(self.passes)

    def _default_combo(self, combo: Configs) -> Configs:
        return {name: {key: self._defaults[name][key] for key in values} for name, values in combo.items()}

    def _live_combos(self) -> list[Configs]:
        """The combinations worth tuning: those that, with the default's tiles, are not much slower than the best."""
        combos = [{}] if self.bucket.decode else self._combos()
        if len(combos) == 1:
            return combos
        candidates = [DEFAULT, *(Candidate(combo) for combo in combos[1:])]
        found = self._measure(candidates, self.passes, "schedules")
        best = min(score.ratio for score in found)
        return [combo for combo, score in zip(combos, found, strict=True) if score.ratio <= HOPELESS * best] or combos[
            :1
        ]

    def _sized(self, base: Candidate) -> Candidate:
        """The best sizes of schedules (tokens of a chunk) around the default's, tried with the winners so far."""
        reach = (-2, -1, 1, 2) if self.effort.every_kind else (-1, 1)
        for decision in () if self.bucket.decode else self.program.decisions:
            if self.target not in decision.targets or set(self.passes).isdisjoint(decision.passes):
                continue
            for tunable in decision.tunables:
                if tunable.name in self._choices or self._late():
                    continue
                at = tunable.values.index(self._defaults[decision.name][tunable.name])
                near = [tunable.values[at + i] for i in reach if 0 <= at + i < len(tunable.values)]
                tried = [base, *(base.with_configs({decision.name: {tunable.name: value}}) for value in near)]
                costs = [(0.0,), *((float(value),) for value in near)]
                base = tried[self._contest(tried, self.passes, costs, tunable.name)[0]]
        return base

    # Kernels

    def _sweep(self, base: Candidate, combos: Sequence[Configs]) -> dict[str, list[Survivor]]:
        """For each kernel of the remaining schedules, the candidates that beat the default, best first."""
        tasks = [
            (selection, around)
            for kernel in self.program.kernels
            if (selection := self._selections.get(kernel.name)) is not None and len(selection.survivors) > 1
            for around in [self._around(kernel.choice, base, combos)]
            if around is not None
        ]
        # The slowest kernels first: if time runs out, the ones that are left matter least.
        tasks.sort(key=lambda task: -task[0].survivors[0].seconds)
        self._check_together(tasks)
        found = self.crew.map(lambda task: self._tune_kernel(*task), tasks)
        return {selection.kernel: best for (selection, _), best in zip(tasks, found, strict=True)}

    def _check_together(self, tasks: Sequence[tuple[Selection, Candidate]]) -> None:
        """Check one candidate of each kernel together, then the next ones. If a check fails, each is checked alone.

        Kernels of different schedules are not checked together, because only one of them would be launched.
        """
        for key in dict.fromkeys(around.key for _, around in tasks):
            group = [selection for selection, around in tasks if around.key == key]
            around = next(each for _, each in tasks if each.key == key)
            for number in range(1, max(len(each.survivors) for each in group)):
                members = [each for each in group if number < len(each.survivors)]
                if len(members) < 2 or self._late():
                    continue
                together = around.with_configs({each.kernel: each.survivors[number].config for each in members})
                if not self.crew.check(together, self.bucket, several=True):
                    single = (around.with_configs({m.kernel: m.survivors[number].config}) for m in members)
                    self._right |= {each.key for each in single}

    def _around(self, choice: tuple[str, int] | None, base: Candidate, combos: Sequence[Configs]) -> Candidate | None:
        """The base, with the first of these schedules that runs the kernel; None if none does."""
        if choice is None:
            return base
        name, value = choice
        for combo in combos:
            if any(values.get(name) == value for values in combo.values()):
                return base if combo == self._default_combo(combo) and not base.configs else base.with_configs(combo)
        return None

    def _tune_kernel(self, selection: Selection, around: Candidate) -> list[Survivor]:
        """The candidates of a kernel that win their race against the default, and the best one after it."""
        if self._late():
            return []
        survivors = selection.survivors
        tried = [around, *(around.with_configs({selection.kernel: each.config}) for each in survivors[1:])]
        alone = "" if self.bucket.decode else selection.kernel
        costs = [each.cost for each in survivors]
        winner, found = self._contest(tried, (selection.direction,), costs, selection.kernel, alone)
        if winner == 0:
            return []
        others = sorted(
            (n for n in range(len(found)) if n not in (0, winner) and found[n].ratio < 1.0),
            key=lambda n: found[n].ratio,
        )
        return [survivors[number] for number in (winner, *others)]

    def _composed(self, combos: Sequence[Configs], ranked: Mapping[str, list[Survivor]]) -> Candidate:
        """The best schedule, each raced with the winners of its kernels."""
        candidates = [DEFAULT, *(self._with_winners(combo, ranked) for combo in combos)]
        distinct = list({each.key: each for each in candidates}.values())
        if len(distinct) == 1:
            return distinct[0]
        found = self._measure(distinct, self.passes, "schedules with their winners")
        return distinct[pick(found, [(float(len(each.configs)),) for each in distinct])]

    def _with_winners(
        self, combo: Configs, ranked: Mapping[str, list[Survivor]], direction: str | None = None
    ) -> Candidate:
        """A schedule with the best candidate of each kernel that it runs (of one direction, if given)."""
        chosen = {key: value for values in combo.values() for key, value in values.items()}
        configs: Configs = {} if combo == self._default_combo(combo) else {n: dict(v) for n, v in combo.items()}
        for kernel in self.program.kernels:
            runs = kernel.choice is None or chosen.get(kernel.choice[0]) == kernel.choice[1]
            best = ranked.get(kernel.name)
            if runs and best and direction in (None, kernel.direction):
                configs[kernel.name] = dict(best[0].config)
        return Candidate(configs)

    # Races

    def _contest(
        self,
        candidates: Sequence[Candidate],
        passes: tuple[str, ...],
        costs: Sequence[tuple[float, ...]],
        what: str,
        kernel: str = "",
    ) -> tuple[int, list[Score]]:
        """Successive halving: a short race of all, then a longer race of the best on every kind of input."""
        right = [0, *(n for n in range(1, len(candidates)) if not self._check(candidates[n]))]
        if len(right) > 4:
            short = [candidates[number] for number in right]
            found = scores([self._race(short, KINDS[0], passes, self.effort.seconds / 2, kernel)], passes)
            right = [right[number] for number in spread(found, max(3, 1 + len(short) // KEPT_SHARE))]
        finalists = [candidates[number] for number in right]
        found = self._measure(finalists, passes, what, kernel, checked=True)
        result = [WORST] * len(candidates)
        for number, score in zip(right, found, strict=True):
            result[number] = score
        return right[pick(found, [costs[number] for number in right])], result

    def _measure(
        self,
        candidates: Sequence[Candidate],
        passes: tuple[str, ...],
        what: str,
        kernel: str = "",
        *,
        checked: bool = False,
    ) -> list[Score]:
        """Scores relative to the first candidate, over every kind of input."""
        right = [n for n in range(len(candidates)) if n == 0 or checked or not self._check(candidates[n])]
        tried, seconds = [candidates[n] for n in right], self.effort.seconds
        readings = [self._race(tried, kind, passes, seconds, kernel) for kind in self._kinds]
        result = [WORST] * len(candidates)
        for number, score in zip(right, scores(readings, passes), strict=True):
            result[number] = score
        self._report(result, passes, what)
        return result

    def _check(self, candidate: Candidate) -> str:
        return "" if candidate.key in self._right else self.crew.check(candidate, self.bucket)

    def _race(
        self, candidates: Sequence[Candidate], kind: str, passes: tuple[str, ...], seconds: float, kernel: str = ""
    ) -> list[Reading]:
        found = self.crew.race(Race(tuple(candidates), self.bucket, kind, passes, seconds, kernel))
        self._done += len(candidates)
        if not candidates[0].configs and found[0].error:
            self._fault = found[0].error
        return found

    def _final(self, best: Candidate, combos: Sequence[Configs], ranked: Mapping[str, list[Survivor]]) -> BucketResult:
        """Race the best eight and the default, interleaved, on every kind of input, for longer."""
        finalists = self._finalists(best, combos, ranked)
        if len(finalists) == 1:
            return self._result()
        right = [each for n, each in enumerate(finalists) if n == 0 or not self._check(each)]
        kinds, seconds = self.bucket.kinds, self.effort.final_seconds
        readings = {kind: self._race(right, kind, self.passes, seconds) for kind in kinds}
        found = scores(list(readings.values()), self.passes)
        if self._fault:
            return self._result()
        # The winner must not be slower in any pass, because somebody may run only that pass.
        for name in self.passes:
            for number, score in enumerate(scores(list(readings.values()), (name,))):
                if score.ratio - score.noise > 1.0:
                    found[number] = WORST
        winner = pick(found, [(float(len(each.configs)),) for each in right])
        self._total = self._done
        self._report(found, self.passes, "final")
        return self._result(right[winner], found[winner], {k: (race[0], race[winner]) for k, race in readings.items()})

    def _result(
        self,
        winner: Candidate = DEFAULT,
        score: Score = EVEN,
        times: Mapping[str, tuple[Reading, Reading]] | None = None,
    ) -> BucketResult:
        """The result, from the winner's and the default's readings in the final by kind of input."""
        problem = f"the default itself fails: {self._fault}" if self._fault else ""
        if self._cut_short and not times and not problem:
            # An entry would say that the default won, and hide what another run has found.
            problem = NOTHING_COMPARED
        table = self.program.defaults[self.target]
        # All values of each kernel and schedule of which one differs from the default.
        configs = {name: {**table[name].mapping(), **values} for name, values in winner.configs.items()}
        milliseconds = {
            kind: {
                name: {"default": round(default.times[name].median, 4), "tuned": round(tuned.times[name].median, 4)}
                for name in self.passes
            }
            for kind, (default, tuned) in (times or {}).items()
        }
        gain, noise = 1 / score.ratio, score.noise / score.ratio**2
        return BucketResult(self.bucket, configs, gain, noise, milliseconds, problem=problem, cut_short=self._cut_short)

    def _finalists(
        self, best: Candidate, combos: Sequence[Configs], ranked: Mapping[str, list[Survivor]]
    ) -> list[Candidate]:
        """The default, the best, its halves, the other schedules, and the best with runners-up, up to a limit."""
        found = [DEFAULT, best]
        found += [self._with_winners(combos[0], ranked, direction) for direction in (FORWARD, BACKWARD)]
        found += [self._with_winners(combo, ranked) for combo in combos]
        for kernel, order in sorted(ranked.items(), key=lambda item: -self._selections[item[0]].survivors[0].seconds):
            if len(order) > 1 and kernel in best.configs:
                found.append(best.with_configs({kernel: order[1].config}))
        distinct = list({each.key: each for each in found}.values())
        return distinct[: 1 + self.effort.finalists]

    # Time and progress

    def _late(self) -> bool:
        late = time.monotonic() >= self.deadline
        self._cut_short |= late
        return late

    def _expected(self) -> int:
        """About how many candidates will have been timed at the end."""
        kernels = sum(len(each.survivors) * 2 for each in self._selections.values()) * self.effort.sweeps
        return kernels + 4 * len(self._combos()) + 10 * len(self.program.decisions) + 2 * (1 + self.effort.finalists)

    def _report(self, found: Sequence[Score], passes: tuple[str, ...], what: str) -> None:
        if passes == self.passes:
            self._best = min(self._best, *(score.ratio for score in found))
        self.tell(self._done, max(self._total, self._done), self._best, f"{self.bucket.label}: {what}")
