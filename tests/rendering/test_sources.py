"""The text of generated packages: lint-clean, self-contained, and quick to make."""

from __future__ import annotations

import ast
import getpass
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path, PurePosixPath

import jinja2
import pytest

from nsa_gen._resources import templates_dir
from nsa_gen.hardware import TABLES
from nsa_gen.lowering import lower
from nsa_gen.rendering import generate, render
from nsa_gen.rendering.environment import environment
from nsa_gen.rendering.package import HEADER, SIGNATURE, TILES, templates_digest
from nsa_gen.spec import Spec, load_spec, parse_spec
from tests.lowering.drawn_specs import spec_names, specs, structures
from tests.pitfalls.carried_bounds import carried_bounds

DRAWN = 25


@pytest.fixture(scope="module", params=spec_names(DRAWN))
def spec(request) -> Spec:
    """Each spec in turn, for all tests of it: a package is rendered and parsed once."""
    return specs(DRAWN)[request.param]


@pytest.fixture(scope="module")
def texts(spec) -> dict[str, str]:
    """The files of the spec's package."""
    return render(spec)


@pytest.fixture(scope="module")
def modules(texts) -> dict[str, ast.Module]:
    """The syntax trees of its modules."""
    return parsed(texts)


def parsed(texts: dict[str, str]) -> dict[str, ast.Module]:
    return {name: ast.parse(text, name) for name, text in texts.items() if name.endswith(".py")}


@pytest.fixture(scope="module")
def all_packages(tmp_path_factory) -> Path:
    """A folder with the packages of all specs."""
    out = tmp_path_factory.mktemp("packages")
    for spec in specs(DRAWN).values():
        generate(spec, out)
    return out


def said_by_ruff(command: tuple[str, ...], packages: Path, project_root: Path) -> str:
    """What ruff says of the packages of a folder, "" where it finds nothing."""
    ruff = Path(sys.executable).with_name("ruff")
    done = subprocess.run(
        [str(ruff), *command, "--no-cache", "--config", str(project_root / "pyproject.toml"), "."],
        cwd=packages,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr if done.returncode else ""


RUFF = pytest.mark.parametrize("command", [("check",), ("format", "--check", "--diff")], ids=lambda command: command[0])


@RUFF
def test_ruff_has_nothing_to_say_of_any_package(all_packages, project_root, command):
    assert said_by_ruff(command, all_packages, project_root)[:6000] == ""


@pytest.fixture(scope="module")
def packages_drawn_anew(tmp_path_factory) -> Path:
    """A folder with packages of many structures, others on every run; each has its spec.yaml."""
    out = tmp_path_factory.mktemp("drawn_anew")
    for number, spec in enumerate(structures(600, derandomize=False)):
        generate(spec.replace(name=f"drawn_{number}"), out)
    return out


@RUFF
def test_ruff_has_nothing_to_say_of_packages_drawn_anew(packages_drawn_anew, project_root, command):
    assert said_by_ruff(command, packages_drawn_anew, project_root)[:6000] == ""


def test_every_file_begins_with_what_made_it(spec, texts):
    for name, text in texts.items():
        if name == TILES:  # JSON has no comments
            assert json.loads(text)["by"].startswith(f"{SIGNATURE[2:]} "), name
            continue
        first, *rest = text.splitlines()[:6]
        assert first.startswith(f"{SIGNATURE} "), name
        if name in ("__init__.py", "spec.yaml"):
            assert spec.name in first
            assert rest[:2] == [f"# spec: {spec.digest()}", f"# templates: {templates_digest()}"]
            assert rest[2].startswith("# regenerate: nsa-gen generate ")
            del rest[:3]
        else:
            assert first == HEADER, name
        if rest[0].startswith("# pyright: "):  # what type checkers cannot know of kernels
            assert "triton.jit" in text or "gluon.jit" in text, name
            del rest[0]
        assert not rest[0].startswith("#"), name
        if name.endswith(".py"):
            assert rest[0].startswith('"""'), name


def test_a_name_and_a_description_change_no_module_but_the_first(spec, texts):
    renamed = render(spec.replace(name="another", description="With another name."))
    assert {name for name in texts if texts[name] != renamed[name]} == {"__init__.py", "spec.yaml", TILES}


def test_the_spec_in_a_package_reads_back_as_an_equal_spec(spec, texts):
    assert parse_spec(texts["spec.yaml"]) == spec


def test_every_module_parses_and_imports_torch_triton_the_standard_library_and_its_own_modules_only(modules):
    own = {name.removesuffix(".py") for name in modules}
    for name, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported = [node.module or ""]
            elif isinstance(node, ast.ImportFrom):
                home = PurePosixPath(name).parents[node.level - 1] / (node.module or "").replace(".", "/")
                found = str(home) in own or all(str(home / alias.name) in own for alias in node.names)
                assert found, (name, ast.unparse(node))
                if name.startswith("runtime/"):
                    assert home.is_relative_to("runtime"), (name, ast.unparse(node))
                continue
            else:
                continue
            for module in imported:
                root = module.partition(".")[0]
                assert root in ("torch", "triton") or root in sys.stdlib_module_names, (name, module)


def test_no_kernel_carries_what_bounds_a_loop_inside_it(modules):
    assert carried_bounds(modules.values()) == []


def test_kernels_and_configurations_name_each_other(spec, texts, modules):
    kernels = {
        node.name.removesuffix("_kernel"): name.removeprefix("kernels/").removesuffix(".py")
        for name, tree in modules.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    tables = json.loads(texts["tiles.json"])["tiles"]
    assert set(tables) == {"interpreter", *TABLES}
    program = lower(spec)
    if program.hopper:  # it has one configuration, by its design
        for name in ("hopper_banded_forward", "hopper_banded_repair"):
            assert kernels.pop(name) == name
    if program.local_in_window:
        assert kernels.pop("local_lists") == "inverted_index"
    if program.hopper_banded_backward or program.hopper_selected_backward:
        assert kernels.pop("row_statistics") == "hopper_backward"
    if program.hopper_banded_dq:  # it has one configuration, by its design
        assert kernels.pop("hopper_banded_backward_dq") == "hopper_banded_dq"
    if program.hopper_banded_backward:  # it has one configuration, by its design
        assert kernels.pop("hopper_banded_backward_dkdv") == "hopper_banded_backward"
    if program.hopper_selected_forward:  # it has one configuration, by its design
        assert kernels.pop("hopper_selected_forward") == "hopper_selected_forward"
    if program.hopper_selected_backward:  # it has one configuration, by its design
        assert kernels.pop("hopper_selected_backward") == "hopper_selected_backward"
    for target, table in tables.items():
        assert set(table) == {
            *(kernel.name for kernel in program.kernels),
            *(decision.name for decision in program.decisions),
        }, target
        assert table == {name: config.mapping() for name, config in program.defaults[target].items()}
    assert kernels == {kernel.function: kernel.module for kernel in program.kernels}


def test_every_kernel_is_launched_with_its_own_configuration(spec, texts):
    source = "".join(text for name, text in texts.items() if name.endswith(".py") and name != "configs.py")
    for kernel in lower(spec).kernels:
        assert re.search(rf"prepare\w*\(\s*{kernel.function}_kernel,|\b{kernel.function}_kernel\[", source), kernel.name
        # The launches of banded kernels are told the branch, and put the kernel's name together.
        branch, _, rest = kernel.name.partition("_")
        named = f'"{branch}"' in source and f'configs.get(f"{{branch}}_{rest}"' in source
        assert f'"{kernel.name}"' in source or named, kernel.name


def test_every_tunable_is_a_constant_of_its_kernel_or_read_by_its_launch(spec, modules):
    names, constants = {}, {}
    for module, tree in modules.items():
        nodes = list(ast.walk(tree))
        names[module] = {node.id for node in nodes if isinstance(node, ast.Name)}
        constants[module] = {node.value for node in nodes if isinstance(node, ast.Constant)}
    for kernel in lower(spec).kernels:
        (function,) = (
            node
            for node in modules[f"kernels/{kernel.module}.py"].body
            if isinstance(node, ast.FunctionDef) and node.name == f"{kernel.function}_kernel"
        )
        taken = {
            argument.arg
            for argument in function.args.args
            if argument.annotation is not None and ast.unparse(argument.annotation) == "tl.constexpr"
        }
        # Such as the number of shares that a sum is divided into: config.pop("SHARES").
        read = set().union(*(constants[module] for module in modules if function.name in names[module]))
        tiles = {tunable.name for tunable in kernel.tunables} - {"num_warps", "num_stages"}
        assert tiles <= taken | read, kernel.name


MOST_ARGUMENTS = 14
"""Of a function. What belongs together is a NamedTuple."""
FREE = ("_kernel", "nsa_attention", "attention_forward", "__init__")
"""Ends of the names of others: kernels are launched with flat lists, and what users call takes each tensor by name."""


def test_no_function_takes_more_than_fourteen_arguments(modules):
    counts = {
        f"{name}: {node.name}": len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
        for name, tree in modules.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and not node.name.endswith(FREE)
    }
    assert counts
    assert {name: count for name, count in counts.items() if count > MOST_ARGUMENTS} == {}


def test_no_date_no_path_of_this_machine_and_no_leftover_of_a_template(spec, texts):
    private = [str(Path.home()), str(Path.cwd()), str(templates_dir()), "/tmp/", f"/{getpass.getuser()}/"]
    for name, text in texts.items():
        body = text.replace(spec.description, "")
        assert not re.search(r"\b20[0-9]{2}-[01][0-9]-[0-3][0-9]\b", body), name
        assert not any(path in body for path in private if len(path) > 3), name
        for leftover in ("{{", "}}", "{%", "%}", "{#", "Undefined", "None of None"):
            braces = leftover in ("{{", "}}") and ('f"' in body or name == TILES)  # JSON nests objects
            assert leftover not in body or braces, (name, leftover)
        assert text.endswith("\n")
        assert not text.endswith("\n\n")
        assert "\t" not in body
        assert "\r" not in body


def test_every_module_and_every_exported_function_says_what_it_does(modules):
    assert all(ast.get_docstring(tree) for tree in modules.values())
    exported = set(_exported(modules["__init__.py"]))
    documented = {
        node.name
        for tree in modules.values()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node)
    }
    defined = {
        node.name for tree in modules.values() for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert exported & defined <= documented


def _exported(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def test_all_names_that_a_package_exports_exist(modules):
    tree = modules["__init__.py"]
    exported = _exported(tree)
    bound: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Assign):
            bound |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            bound.add(node.target.id)
    assert "nsa_attention" in exported
    assert set(exported) <= bound
    assert len(set(exported)) == len(exported)


def test_an_undefined_name_in_a_template_is_an_error():
    assert environment().undefined is jinja2.StrictUndefined
    with pytest.raises(jinja2.UndefinedError, match="no_such_name"):
        environment().from_string("{{ no_such_name }}").render()
    with pytest.raises(jinja2.UndefinedError, match="no_such_field"):
        environment().from_string("{{ spec.no_such_field }}").render(spec=load_spec("tiny"))


def test_every_template_is_used_by_some_package(all_packages):
    used: set[str] = set()
    loader = environment().loader
    assert loader is not None
    templates = set(loader.list_templates())
    for name in templates:
        source = loader.get_source(environment(), name)[0]
        used |= set(re.findall(r"""["']((?:macros|kernels|package)/[\w./]+\.jinja)["']""", source))
    paths = [path.relative_to(all_packages).as_posix().partition("/")[2] for path in all_packages.rglob("*.*")]
    rendered = {f"{'' if path.startswith('kernels/') else 'package/'}{path}.jinja" for path in paths}
    assert templates - used - rendered == set()


def test_rendering_imports_neither_torch_nor_triton():
    code = (
        "import sys\n"
        "from nsa_gen.rendering import render\n"
        "from nsa_gen.spec import load_spec\n"
        "render(load_spec('nsa_paper'))\n"
        "print([name for name in ('torch', 'triton') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "value",
    [
        'a "quoted" word',
        "it's",
        "both ' and \"",
        "back\\slash",
        "ends with a backslash\\",
        'ends with a quote"',
        'three """ quotes',
        'closes """; import this; """',
        "new\nline",
        "λ 웙",
        "{{ x }} {% y %}",
        "a word " * 60,
    ],
)
def test_any_description_is_only_text_in_every_module(value):
    """Whatever a spec's author writes there, it is no code of the package, and SPEC holds it unchanged."""
    spec = load_spec("tiny").replace(description=value)
    plain = render(load_spec("tiny"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an invalid escape sequence is only warned of
        found = parsed(render(spec))
    for name, tree in found.items():
        expected = [type(node) for node in ast.parse(plain[name]).body]
        assert [type(node) for node in tree.body] == expected, name
    strings = {node.value for tree in found.values() for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert spec.description in strings


def test_every_spec_in_a_package_is_the_spec(spec, modules):
    """SPEC in the package holds what the model holds."""
    for tree in modules.values():
        for node in tree.body:
            target = node.target if isinstance(node, ast.AnnAssign) else None
            if isinstance(node, ast.Assign):
                target = node.targets[0]
            if getattr(target, "id", "") == "SPEC":
                literal = next(child for child in ast.walk(node) if isinstance(child, ast.Dict))
                assert _same(ast.literal_eval(literal), spec.model_dump(mode="json"))
                return
    raise AssertionError("no module assigns SPEC")


def _same(left: object, right: object) -> bool:
    """Equal, tuples and lists being one."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[name], right[name]) for name in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return left == right
