"""Decode as something to be checked and timed: a cache of a bucket's size, and steps captured as a CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nsa_gen.bench.contenders import Operator, Prepared
from nsa_gen.verification.inference import Scenario, Step
from nsa_gen.verification.inputs import make_inputs
from nsa_gen.verification.oracle import OracleParameters

if TYPE_CHECKING:
    from nsa_gen.spec import Spec
    from nsa_gen.tuning.shapes import Bucket

COLD_BYTES = 200e6
"""Bytes that the layers of a step read together, four times the L2 cache of an H100, so that each finds it cold."""
MOST_LAYERS = 32


@dataclass(frozen=True)
class DecodeInputs:
    """A full cache of some layers, and a query a sequence; `step` decodes with every layer in turn.

    Attributes:
        cache: the package's NSACache.
        q: queries (B, 1, Hq, Dk).
        arguments: gates and lists of blocks, where the operator takes them.
        out: where o is written.
        layers: how many layers a step goes through.
    """

    package: Any
    cache: Any
    q: torch.Tensor
    arguments: dict[str, torch.Tensor]
    out: torch.Tensor
    layers: int

    def step(self) -> None:
        """One token a sequence, in every layer."""
        for layer in range(self.layers):
            self.package.nsa_decode(self.q, self.cache, layer=layer, out=self.out, **self.arguments)


def step_bytes(spec: Spec, tokens: int, batch: int) -> int:
    """Bytes of keys and values that a step must read: compressed blocks, selected blocks, the window."""
    p = OracleParameters.from_spec(spec)
    element = torch.empty(0, dtype=getattr(torch, spec.dtype)).element_size()
    rows = p.compressed_blocks(tokens) + min(p.selection_count * (p.selection_block or 0), tokens)
    rows += min(p.window or 0, tokens)
    return batch * p.kv_heads * rows * (p.head_dim_qk + p.head_dim_v) * element


def decode_inputs(spec: Spec, package: Any, bucket: Bucket, *, device: torch.device, seed: int = 0) -> DecodeInputs:
    """A cache filled to its capacity with random numbers, in as many layers as leave nothing in the L2 cache."""
    generator = torch.Generator(device).manual_seed(seed)
    needed = step_bytes(spec, bucket.tokens, bucket.batch)
    layers = max(1, min(int(COLD_BYTES / needed) + 1, MOST_LAYERS)) if device.type == "cuda" else 1
    cache = package.NSACache(bucket.batch, bucket.tokens, layers=layers, device=device)
    for layer in cache.layers:
        for tensor in layer:
            tensor.normal_(generator=generator)
    cache.extend(bucket.tokens)
    small = make_inputs(spec, batch=1, tokens=64, dtype=getattr(torch, spec.dtype), device=device, seed=seed)
    shape = (bucket.batch, 1, *small.q.shape[2:])
    q = torch.randn(shape, generator=generator, dtype=small.q.dtype, device=device)
    out = torch.empty((*shape[:-1], spec.head_dim.v), dtype=q.dtype, device=device)
    arguments: dict[str, torch.Tensor] = {}
    if small.gates is not None:
        shape = (bucket.batch, 1, *small.gates.shape[2:])
        arguments["gates"] = torch.randn(shape, generator=generator, dtype=q.dtype, device=device)
    if small.indices is not None:
        assert spec.selection is not None
        blocks = torch.arange(spec.selection.count, dtype=torch.int32, device=device)
        spread = blocks * max(1, bucket.tokens // spec.selection.block // spec.selection.count)
        arguments["indices"] = spread.expand(bucket.batch, 1, spec.heads.kv, -1).contiguous()
    return DecodeInputs(package, cache, q, arguments, out, layers)


class DecodeStep(Operator):
    """Steps of decode under a candidate's configurations: captured once, replayed as its call."""

    def __init__(self, inputs: DecodeInputs, number: int, within: Any) -> None:
        super().__init__(inputs.package, str(number))
        self._inputs, self._within = inputs, within

    def prepare(self, spec: Spec, inputs: Any) -> Prepared:
        """Capture a graph; on the CPU the step is called as it is."""
        if not self._inputs.q.is_cuda:
            return Prepared(self._inputs.step, (), self._inputs.out, within=self._within)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), self._within(), torch.cuda.stream(side):
            self._inputs.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), self._within(), torch.cuda.graph(graph):
            self._inputs.step()
        return Prepared(graph.replay, (), self._inputs.out)


def check_scenario(tokens: int, batch: int, seed: int = 0) -> Scenario:
    """What candidates are checked with: caches that end inside tiles of every size, then one token and two."""
    held = (tokens - 3, tokens // 2 + 5)[:batch]
    steps = (Step("fill", held), Step("decode", (1,) * batch), Step("decode", (2,) * batch))
    return Scenario(batch, tokens, None, steps, seed=seed)
