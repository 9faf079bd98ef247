"""The call that launches a kernel is found where kernels are launched as on a GPU, past Triton's dispatcher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from nsa_gen.lowering import lower
from nsa_gen.spec import load_spec

NOTED = """
import json, sys
from pathlib import Path
import torch
from nsa_gen.lowering import lower
from nsa_gen.rendering import generate, import_package
from nsa_gen.spec import load_spec
from nsa_gen.tuning.timed import noted_launches
from tools.gpu import host_time
spec = load_spec("llama3_8b")
module = import_package(generate(spec, Path(sys.argv[1])))
found = {}
with host_time.no_device(module):
    call = host_time.calls(module, spec, 64, "cpu")["forward and backward"]
    for kernel in lower(spec).kernels:
        with noted_launches(module, kernel) as noted:
            call()
        if noted:
            function, arguments = noted[0]
            with torch.no_grad():
                function(**arguments)
            found[kernel.name] = [function.__module__.rpartition(".")[2], function.__name__]
    # A version of Triton that is not known launches by itself.
    combine = sys.modules[module.__name__ + ".kernels.combine"]
    combine.combine_forward_kernel = combine.combine_forward_kernel.kernel
    with noted_launches(module, lower(spec).kernel("combine_forward")) as noted:
        call()
    found["by Triton"] = noted[0][0].__name__
print(json.dumps(found))
"""


def test_each_kernel_of_training_is_found_with_the_function_that_launches_it(
    tmp_path: Path, compiling: Callable[..., CompletedProcess[str]]
) -> None:
    found = json.loads(compiling(NOTED, str(tmp_path)).stdout)
    assert found.pop("by Triton") == "combine_forward"
    kernels = {kernel.name: kernel for kernel in lower(load_spec("llama3_8b")).kernels}
    # Of the other schedules, of packages without a combine_backward, and of packed calls.
    alternatives = {"selected_forward", "selected_backward_dq", "attention_delta", "pad_outputs", "pad_gradients"}
    trained = {name for name, kernel in kernels.items() if kernel.direction in ("forward", "backward")}
    assert trained - alternatives <= set(found)
    assert not [name for name, (module, _) in found.items() if module == "launch"]
    assert found["window_forward"] == ["banded", "forward"]
    # One call launches both, and shares their buffers.
    assert found["selected_forward_key_major"] == found["merge_outputs"] == ["selected_key_major_forward", "forward"]
