"""`python -m tests.rendering.lower_kernels [SPEC...]`: what Triton's front end refuses of their kernels, for sm_90.

Without a spec, of those of unusual sizes. A process of its own, in which Triton is not the interpreter. A kernel takes
some 50 ms, as nothing is compiled.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from nsa_gen.hardware import gpu_for_target
from nsa_gen.rendering import generate, import_package
from nsa_gen.spec import Spec, load_spec
from nsa_gen.targets.launches import Launch, record_launches, specialize
from nsa_gen.targets.tracing import trace
from tests.support import small_spec
from tools.freeze import lower_to_ttir

TARGET, TOKENS, BATCH = "sm_90", 4096, 2
UNUSUAL = (
    small_spec("slc", gate="none", scores="mean", count=60, passes=("forward",)),
    small_spec("cmp slc", pool="max", count=60, output=False, passes=("forward", "decode")),
    small_spec("slc win", scores="mean", block=1024, count=20),
    small_spec("slc", gate="none", index=128, block=128, count=16, group=16, kv_heads=4, dims=(128, 128)),
    small_spec("slc win", index=256, count=60, scope="head", dtype="bfloat16", passes=("forward", "decode")),
    small_spec("slc", index=16, scope="all", kv_heads=2, cache="e4m3", passes=("forward", "decode")),
    small_spec(joint=True, sink_joint="learned", cache="e4m3", passes=("forward", "decode")),
)


def launches_of(spec: Spec, folder: Path) -> list[Launch]:
    """Launches of batched and packed calls of every pass."""
    package = import_package(generate(spec, folder))
    found: list[Launch] = []
    for packed in (False, True):
        with package.configs.use_target(TARGET), record_launches() as launches:
            trace(package, TOKENS, BATCH, "meta", packed, spec.passes)
        found += launches
    return found


def main(paths: list[str]) -> int:
    """Lower the kernels of each spec; 1 if any is refused."""
    gpu, refused = gpu_for_target(TARGET), 0
    for spec in map(load_spec, paths) if paths else UNUSUAL:
        with tempfile.TemporaryDirectory() as folder:
            found = {one.key: one for one in (specialize(each, gpu) for each in launches_of(spec, Path(folder)))}
            for one in found.values():
                try:
                    lower_to_ttir(one)
                except Exception as error:
                    refused += 1
                    print(f"{spec.name}: {one.name}: {error!r:.600}")
            print(f"{spec.name}: {len(found)} kernels")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
