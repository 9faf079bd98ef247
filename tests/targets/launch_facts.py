"""Run by test_launches in its own process: record launches of one kernel, print how each specialises as JSON."""

import json

import torch
import triton
import triton.language as tl

from nsa_gen.hardware import gpu_for_target
from nsa_gen.targets.launches import record_launches, specialize


@triton.jit
def kernel(pointer, number, flag, pair, BLOCK: tl.constexpr, MODE: tl.constexpr = "plain"):
    tl.store(pointer + tl.arange(0, BLOCK), number)


def facts(pointer, number, flag=True, pair=(3, 1), target="sm_90", grid=(1,), **keywords) -> dict:
    with record_launches() as launches:
        kernel[grid](pointer, number, flag, pair, BLOCK=16, **keywords)
    (launch,) = launches
    one = specialize(launch, gpu_for_target(target))
    names = kernel.arg_names
    return {
        "key": one.key,
        "grid": launch.grid,
        "signature": one.source.signature,
        "constants": {".".join([names[path[0]], *map(str, path[1:])]): v for path, v in one.source.constants.items()},
        "attributes": {
            ".".join([names[path[0]], *map(str, path[1:])]): attributes
            for path, attributes in one.source.attrs.items()
            if attributes
        },
        "declared": one.constants,
        "num_warps": one.options["num_warps"],
        "num_stages": one.options["num_stages"],
    }


def main() -> None:
    tensor = torch.empty(64, dtype=torch.bfloat16, device="meta")
    before = triton.runtime.jit.JITFunction.run
    results = {
        "plain": facts(tensor, 7),
        "again": facts(torch.empty(128, dtype=torch.bfloat16, device="meta"), 9),
        "one": facts(tensor, 1),
        "sixteen": facts(tensor, 4096),
        "wide": facts(tensor, 2**33 + 1),
        "float": facts(tensor, 0.5),
        "none": facts(tensor, None),
        "unaligned": facts(tensor[1:], 7),
        "float16": facts(tensor.to(torch.float16), 7),
        "int64": facts(tensor.to(torch.int64), 7),
        "amd": facts(tensor, 7, target="gfx942"),
        "options": facts(tensor, 7, num_warps=8, num_stages=5, MODE="fancy"),
        "called_grid": facts(tensor, 7, grid=lambda given: (given["number"], given["BLOCK"])),
        "number_grid": facts(tensor, 7, grid=3),
    }
    results["restored"] = triton.runtime.jit.JITFunction.run is before
    try:
        facts(tensor, 7, num_wraps=8)
    except KeyError as error:
        results["unknown_option"] = str(error)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
