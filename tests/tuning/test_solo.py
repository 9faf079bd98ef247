"""The call that launches a kernel is found where kernels are launched as on a GPU, past Triton's dispatcher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from nsa_gen.lowering import lower
from nsa_gen.spec import load_spec

ROOT = Path(__file__).resolve().parents[2]

NOTED = """
import json, sys
from pathlib import Path
import torch
from nsa_gen.lowering import lower
from nsa_gen.rendering import generate, import_package
from nsa_gen.spec import load_spec
from nsa_gen.tuning.solo import noted_launches
from tools.gpu import host_time
spec = load_spec("llama3_8b")
module = import_package(generate(spec, Path(sys.argv[1])))
found = {}
with host_time.no_device(module):
    call = host_time.calls(module, spec, 64, "cpu")["forward and backward"]
    for kernel in lower(spec).kernels:
        for _ in range(2):  # the second launch goes past the dispatcher
            with noted_launches(module, kernel.module, kernel.name) as noted:
                call()
        if noted:
            function, arguments = noted[0]
            with torch.no_grad():
                function(**arguments)
            found[kernel.name] = [function.__module__.rpartition(".")[2], function.__name__]
print(json.dumps(found))
"""


def test_each_kernel_of_training_is_found_with_the_function_that_launches_it(
    tmp_path: Path, compiler_environment: dict[str, str]
) -> None:
    environment = {**compiler_environment, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", NOTED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    kernels = {kernel.name: kernel for kernel in lower(load_spec("llama3_8b")).kernels}
    # Of the other schedules, and of packages without a combine_backward.
    alternatives = {"selected_forward", "selected_backward_dq", "attention_delta"}
    trained = {name for name, kernel in kernels.items() if kernel.direction in ("forward", "backward")}
    assert trained - alternatives <= set(found)
    assert not [name for name, (module, _) in found.items() if module == "launch"]
    assert found["window_forward"] == ["window_attention", "window_forward"]
    # One call launches both, and shares their buffers.
    assert found["selected_forward_key_major"] == found["merge_outputs"] == ["selected_key_major_forward", "forward"]
