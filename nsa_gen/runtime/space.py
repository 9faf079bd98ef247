"""Legal values of tunables, and rules between the values of one kernel.

Tuned files and overrides are checked against them: with other values, a kernel may crash, give wrong results or read
out of bounds.
"""

from collections.abc import Mapping, Sequence

_FUNCTIONS = {"__builtins__": {}, "max": max, "min": min}

# A list of all legal values, or {"from": first, "to": last}.
Values = Sequence[int] | Mapping[str, int]


class Space:
    """The configurations that kernels may be launched with.

    `values` holds the legal values by kernel and tunable: a list, or {"from": first, "to": last}. `rules` holds Python
    expressions over the tunables of a kernel; all of them must be true.
    """

    def __init__(self, values: Mapping[str, Mapping[str, Values]], rules: Mapping[str, Sequence[str]]) -> None:
        self.values, self.rules = values, rules

    def problem(self, kernel: str, values: Mapping[str, object], some: bool = False) -> str:
        """Why values of a kernel's tunables are illegal: one line that says what is allowed; "" if they are legal.

        With `some`, tunables may be left out; rules that name a missing tunable are not checked.
        """
        if kernel not in self.values:
            return f"kernel: expected one of {', '.join(self.values)}, got {kernel!r}"
        known = self.values[kernel]
        if values.keys() - known.keys() or not (some or values.keys() == known.keys()):
            return f"{kernel}: expected {', '.join(known)}, got {', '.join(values) or 'nothing'}"
        for name, value in values.items():
            legal = _listed(known[name])
            if type(value) is not int or value not in legal:
                shown = f"{legal[0]} to {legal[-1]}" if isinstance(legal, range) else " or ".join(map(str, legal))
                return f"{kernel}.{name}: expected {shown}, got {value!r:.40}"
        for rule in self.rules.get(kernel, ()):
            if any(name in rule for name in known.keys() - values.keys()):
                continue
            if not eval(rule, _FUNCTIONS, dict(values)):
                given = ", ".join(f"{name}={value}" for name, value in values.items() if name in rule)
                return f"{kernel}: expected {rule}, got {given}"
        return ""


def _listed(values: Values) -> Sequence[int]:
    return range(values["from"], values["to"] + 1) if isinstance(values, Mapping) else values
