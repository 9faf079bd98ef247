"""What becomes of an entry that is there when another with its identity is saved, such as one of other passes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from nsa_gen.rendering.legality import check_of
from nsa_gen.tuning.store import Entry

if TYPE_CHECKING:
    from nsa_gen.lowering import Program


def merged(program: Program, earlier: Entry, entry: Entry) -> Entry:
    """A tuning of the forward alone leaves an earlier one of the backward its kernels, and its times.

    Values that the package refuses are left behind.
    """
    check = check_of(program)
    before = {name: values for name, values in earlier.configs.items() if not check(name, values)}
    passes = entry.result["passes"]
    others = [name for name in earlier.result.get("passes", ()) if name not in passes]
    if not others:
        return entry
    kept = {kernel.name for kernel in program.kernels if kernel.direction in others}
    decided = {kernel.choice[0] for kernel in program.kernels if kernel.choice and kernel.direction in passes}
    configs = {name: values for name, values in before.items() if name in kept} | entry.configs
    for schedule in program.schedules:
        # Who runs the kernels that were tuned is decided anew; the rest of a schedule serves the other passes too.
        default = program.defaults[entry.identity.architecture][schedule.name].mapping()
        old = before.get(schedule.name, default)
        new = entry.configs.get(schedule.name, default)
        configs[schedule.name] = {name: new[name] if name in decided else old[name] for name in default}
        if configs[schedule.name] == default:
            del configs[schedule.name]
    then, now = earlier.result.get("ms", {}), entry.result["ms"]
    times = {kind: {**then.get(kind, {}), **now.get(kind, {})} for kind in {**then, **now}}
    return replace(entry, configs=configs, result={**entry.result, "passes": [*passes, *others], "ms": times})
