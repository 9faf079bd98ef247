"""`nsa-gen check`: is a spec valid, and if not, where?"""

from __future__ import annotations

from nsa_gen.cli.common import JsonOption, SpecsArgument, print_json, problem_as_dict, stop, try_spec


def check(specs: SpecsArgument, as_json: JsonOption = False) -> None:
    """Validate specs.

    Prints all errors at once, each with its file, line and column.

    \b
    Example:
      nsa-gen check specs/llama3_8b.yaml
    """
    results = []
    for argument in specs:
        spec, problems = try_spec(argument)
        name, mistakes = spec.name if spec else None, [problem_as_dict(problem) for problem in problems]
        results.append({"spec": argument, "ok": not problems, "name": name, "problems": mistakes})
        if not as_json:
            print("\n".join(map(str, problems)) if problems else f"{argument}: ok")
    valid = all(result["ok"] for result in results)
    if as_json:
        print_json({"ok": valid, "specs": results})
    stop(valid)
