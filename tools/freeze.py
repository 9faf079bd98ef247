"""Record what the generator emits, to show that a change does not alter it.

    python tools/freeze.py record FILE [--specs tiny] [--targets sm_90] [--resources]
    python tools/freeze.py compare FILE

For each kernel that a package launches, and for each target, FILE has a digest of its TTIR without names and locations.
With --resources, the kernel is compiled completely, and FILE also has its registers, spilled bytes and shared memory.
For a fixed set of calls in Triton's interpreter, with the operator's default and its other schedules, FILE has a digest
of the bits of every output and gradient. `compare` computes everything again, prints what differs, and exits with 1 if
anything does. Kernels with unchanged TTIR are not compiled again. Digests are valid for one version of Triton, and bits
for one kind of CPU, because numpy's functions differ between CPUs. FILE names both; `compare` refuses another Triton.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from nsa_gen._files import write_whole  # noqa: E402
from nsa_gen.hardware import TARGETS, gpu_for_target  # noqa: E402
from nsa_gen.spec import Spec, load_spec, shipped_specs  # noqa: E402

Record = dict[str, Any]
TRACED_TOKENS, TRACED_BATCH = 4096, 2


# --- kernels -------------------------------------------------------------------------------------------------------


def ttir_digest(text: str) -> str:
    """Twelve hex digits of a module's TTIR, printed without debug information: equal for renamed kernels.

    The module of a device function is left out, too: Triton 3.9 does not inline those of kernels in Gluon this early.
    """
    unnamed = re.sub(r"tt\.func public @\w+", "tt.func public @kernel", text)
    unnamed = re.sub(r"nsa_gen\.loaded\.(\w+\.)+", "", unnamed)
    return hashlib.sha256(unnamed.encode()).hexdigest()[:12]


def lower_to_ttir(specialization: Any) -> str:
    """TTIR of a launch (TTGIR for Gluon) after Triton's own first passes. Takes about 50 ms."""
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    backend = make_backend(specialization.target)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(dict(specialization.options))
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = specialization.source.make_ir(specialization.target, options, functions, modules, context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, specialization.source.language)
    return stages[specialization.source.ext](module, {}).str_nodebug()


def freeze_kernels(name: str, target: str, known: Mapping[str, list[Any]] | None, resources: bool) -> Record:
    """Kernels of one shipped spec for one target: {kernel and calls: [TTIR digest, registers, spills, shared memory]}.

    Resources are copied from `known` if the digest is the same, and None if they were not requested. Runs in its own
    process, in which Triton compiles.
    """
    import triton

    from nsa_gen.rendering import generate, import_package
    from nsa_gen.targets.launches import record_launches, specialize
    from nsa_gen.targets.resources import read_resources
    from nsa_gen.targets.tracing import trace

    spec, gpu = load_spec(name), gpu_for_target(target)
    found: dict[str, tuple[Any, set[str]]] = {}
    with tempfile.TemporaryDirectory(prefix="nsa_gen_freeze_") as folder:
        package = import_package(generate(spec, Path(folder)))
        for packed in (False, True):
            with package.configs.use_target(target), record_launches() as launches:
                trace(package, TRACED_TOKENS, TRACED_BATCH, "meta", packed, spec.passes)
            for launch in launches:
                one = specialize(launch, gpu)
                found.setdefault(one.key, (one, set()))[1].add("packed" if packed else "batched")
        compiled_before = {row[0]: row[1:] for row in (known or {}).values()}
        record: Record = {}
        for one, calls in found.values():
            digest = ttir_digest(lower_to_ttir(one))
            used: list[int | None] = list(compiled_before.get(digest, [None, None, None]))
            if resources and used[0] is None:
                read = read_resources(triton.compile(one.source, target=one.target, options=one.options), gpu)
                used = [read.registers, read.spill_bytes, read.shared_memory]
            label = f"{one.name} {'+'.join(sorted(calls))}"
            same = sum(key.startswith(f"{label} ") for key in record)
            record[f"{label} {same}"] = [digest, *used]
    return record


# --- bits ----------------------------------------------------------------------------------------------------------


def interpreted(spec: Spec) -> Spec:
    """The spec in float32 with one or two KV heads of the same group size, which the interpreter computes correctly."""
    kv = min(spec.heads.kv, 2 if spec.heads.query == spec.heads.kv else 1)
    heads = {"query": kv * (spec.heads.query // spec.heads.kv), "kv": kv}
    return type(spec).model_validate({**spec.model_dump(), "dtype": "float32", "heads": heads})


def bits(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Twelve hex digits of each tensor's dtype, shape and bits."""
    found = {}
    for name, x in tensors.items():
        content = x.detach().contiguous()
        header = f"{content.dtype} {tuple(content.shape)} ".encode()
        found[name] = hashlib.sha256(header + content.numpy().tobytes()).hexdigest()[:12]
    return found


def operator_calls(spec: Spec) -> dict[str, dict[str, Any]]:
    """Arguments of `make_inputs` by the call's name, with lengths around the ends of blocks and of the window."""
    block = spec.selection.block if spec.selection is not None else 16
    return {
        "batched": {"tokens": 2 * block + 5, "batch": 2, "kind": "gaussian"},
        "fewer queries": {"tokens": 7, "tokens_kv": 4 * block + 1, "batch": 1, "kind": "spread"},
        "packed": {"tokens": (block + 3, 0, 1, 2 * block - 1), "kind": "gaussian"},
    }


def schedules_of(module: Any) -> dict[str, dict[str, dict[str, int]]]:
    """The default, then all schedule choices as 0 and as 1, with chunks so small that a short call has several."""
    import torch

    found: dict[str, dict[str, dict[str, int]]] = {"default": {}}
    names = tuple(getattr(module.configs, "SCHEDULES", ()))
    for on in (0, 1) if names else ():
        values = {name: module.configs.get(name, torch.device("cpu")) for name in names}
        found[f"choices {on}"] = {
            name: {key: 33 if key.endswith("_TOKENS") else on for key in inner} for name, inner in values.items()
        }
    return found


def freeze_bits(name: str) -> Record:
    """Digests of outputs and gradients of one shipped spec's calls: {call: {tensor: digest}}."""
    import torch

    from nsa_gen.rendering import generate, import_package
    from nsa_gen.tuning.timed import overridden
    from nsa_gen.verification.calls import call_package
    from nsa_gen.verification.reference.inputs import make_inputs

    torch.set_num_threads(1)
    spec = interpreted(load_spec(name))
    record: Record = {}
    with tempfile.TemporaryDirectory(prefix="nsa_gen_freeze_") as folder:
        module = import_package(generate(spec, Path(folder)))
        for call, arguments in operator_calls(spec).items():
            inputs = make_inputs(spec, dtype=torch.float32, device=torch.device("cpu"), seed=20, **arguments)
            for label, choices in schedules_of(module).items():
                with overridden(module, choices):
                    record[f"{call}, {label}"] = bits(call_package(module, inputs, "backward" in spec.passes).tensors())
        if "decode" in spec.passes:
            for page_size in (None, 64):
                record[f"prefill and decode, {page_size or 'contiguous'}"] = bits(inference(module, spec, page_size))
    return record


def inference(module: Any, spec: Spec, page_size: int | None) -> dict[str, Any]:
    """Outputs of a prefill in two chunks and of decode of one and of three tokens."""
    import torch

    from nsa_gen.verification.reference.inputs import make_inputs

    block = spec.selection.block if spec.selection is not None else 16
    steps = (block + 3, 2 * block, 1, 3)
    total = sum(steps)
    inputs = make_inputs(
        spec, tokens=total, batch=2, dtype=torch.float32, device=torch.device("cpu"), seed=21, kind="gaussian"
    )
    arguments = {key: x for key, x in inputs.arguments().items() if x is not None}
    cache = module.NSACache(batch=2, capacity=-(-total // 64) * 64, page_size=page_size, max_new_tokens=8, device="cpu")
    found, start = {}, 0
    for number, length in enumerate(steps):
        part = {key: x[:, start : start + length] if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
        cache.extend(length)
        cache.write(part["k"], part["v"])
        attend = module.nsa_prefill if length > 8 else module.nsa_decode
        found[f"o {number}"] = attend(part["q"], cache, part.get("gates"))
        start += length
    return found


# --- the whole -----------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """The versions and the CPU for which digests and bits are valid."""
    import numpy
    import torch
    import triton

    text = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return {
        "triton": triton.__version__,
        "torch": torch.__version__.partition("+")[0],
        "numpy": numpy.__version__,
        "cpu": model[1] if model else platform.processor(),
    }


def interpret(wanted: bool) -> None:
    """Decide, before Triton is imported, whether this process interprets kernels."""
    os.environ["TRITON_INTERPRET"] = str(int(wanted))


def freeze(
    specs: Iterable[str], targets: Iterable[str], known: Record | None, resources: bool, parts: Iterable[str], jobs: int
) -> Record:
    """The complete record, computed in separate processes."""
    record: Record = {"environment": environment(), "kernels": {}, "bits": {}}
    before = (known or {}).get("kernels", {})
    # Triton decides on import whether it interprets kernels, so both parts have their own processes.
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        futures: dict[tuple[str, str, str], Future[Record]] = {}
        for part in parts:
            pool = ProcessPoolExecutor(jobs, context, initializer=interpret, initargs=(part == "bits",))
            stack.enter_context(pool)
            for name in specs:
                if part == "bits":
                    futures[part, name, ""] = pool.submit(freeze_bits, name)
                    continue
                for target in targets:
                    rows = before.get(name, {}).get(target)
                    futures[part, name, target] = pool.submit(freeze_kernels, name, target, rows, resources)
        for (part, name, target), future in futures.items():
            found = future.result()
            if target:
                record[part].setdefault(name, {})[target] = found
            else:
                record[part][name] = found
            print(f"{part}: {name} {target}", file=sys.stderr, flush=True)
    return record


def differences(before: Any, after: Any, path: tuple[str, ...] = ()) -> list[str]:
    """One line for each value that differs, is gone or is new."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [] if before == after else [f"{': '.join(path)}: {before} -> {after}"]
    found = []
    for key in [*before, *(key for key in after if key not in before)]:
        if key not in after:
            found.append(f"{': '.join((*path, key))}: gone")
        elif key not in before:
            found.append(f"{': '.join((*path, key))}: new: {after[key]}")
        else:
            found += differences(before[key], after[key], (*path, key))
    return found


def main() -> int:
    """Record or compare; return the exit status."""
    known = shipped_specs()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("do", choices=("record", "compare"))
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--specs", default=",".join(known), help=f"of {', '.join(known)} (all)")
    parser.add_argument("--targets", default=",".join(TARGETS), help=f"of {', '.join(TARGETS)} (all)")
    parser.add_argument("--parts", default="kernels,bits", help="of kernels, bits (both)")
    parser.add_argument("--resources", action="store_true", help="compile, and record registers, spills, shared memory")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (one a core)")
    options = parser.parse_args()
    chosen = {}
    for option, allowed in (("specs", known), ("targets", TARGETS), ("parts", ("kernels", "bits"))):
        chosen[option] = getattr(options, option).split(",")
        if unknown := [name for name in chosen[option] if name not in allowed]:
            parser.error(f"--{option}: expected names of {', '.join(allowed)}, got {', '.join(unknown)}")
    specs, targets, parts = chosen.values()
    jobs = max(1, options.jobs)
    if options.do == "record":
        record = freeze(specs, targets, None, options.resources, parts, jobs)
        write_whole(options.file, json.dumps(record, indent=0, sort_keys=True) + "\n")
        return 0
    before, here = json.loads(options.file.read_text()), environment()
    if here["triton"] != before["environment"]["triton"]:
        print(f"recorded with Triton {before['environment']['triton']}, this is {here['triton']}", file=sys.stderr)
        return 2
    if here != before["environment"]:
        print(f"recorded on {before['environment']}, this is {here}: bits may differ for that", file=sys.stderr)
    kernels = {
        spec: {target: rows for target, rows in of_spec.items() if target in targets}
        for spec, of_spec in before["kernels"].items()
        if spec in specs and "kernels" in parts
    }
    bits_before = {spec: calls for spec, calls in before["bits"].items() if spec in specs and "bits" in parts}
    every = [row for of_spec in kernels.values() for rows in of_spec.values() for row in rows.values()]
    compared = sorted({target for of_spec in kernels.values() for target in of_spec})
    with_resources = any(row[1] is not None for row in every)
    held = [part for part, of_file in (("kernels", kernels), ("bits", bits_before)) if of_file]
    record = freeze(sorted({*kernels, *bits_before}), compared, before, with_resources, held, jobs)
    found = differences({"kernels": kernels, "bits": bits_before}, {name: record[name] for name in ("kernels", "bits")})
    print("\n".join(found) if found else "nothing differs")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
