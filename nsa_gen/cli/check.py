"""`nsa-gen check`: is a spec valid, and if not, where?"""

from __future__ import annotations

from nsa_gen.cli.common import JsonOption, SpecsArgument, print_json, problem_as_dict, stop, try_spec


def check(specs: SpecsArgument, as_json: JsonOption = False) -> None:
    """Validate specs.

    Prints every mistake with its file, line and column, all of them at once.

    \b
    Example:
      nsa-gen check specs/llama3_8b.yaml
    """
    results = []
    valid = True
    for argument in specs:
        spec, problems = try_spec(argument)
        valid = valid and not problems
        results.append(
            {
                "spec": argument,
                "ok": not problems,
                "name": spec.name if spec else None,
                "problems": [problem_as_dict(problem) for problem in problems],
            }
        )
        if not as_json:
            print("\n".join(map(str, problems)) if problems else f"{argument}: ok")
    if as_json:
        print_json({"ok": valid, "specs": results})
    stop(valid)
