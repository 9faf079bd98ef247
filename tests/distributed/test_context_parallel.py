"""Sequences that several ranks share, each a process on the CPU, beside the same sequences in one process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from nsa_gen.distributed import ContextParallel
from nsa_gen.distributed.sharding import Shards
from tests.distributed.worker import CASES, SHARDED
from tests.ranks import run_ranks
from tests.support import GPU, operator_of

WORLD = 4
CHOOSING = {"whole", "packed", "mean_scores", "indexer", "indexer_packed"}
"""Cases whose operator chooses blocks."""

pytestmark = [
    pytest.mark.skipif(GPU, reason="ranks on the CPU; on a GPU they would share it"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"),
]


@pytest.fixture(scope="module")
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, float]]]:
    """By case, what each of its ranks found; of the cases that are not left to another run."""
    folder = tmp_path_factory.mktemp("ranks")
    asked = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    names = [name for name in CASES if name in asked | CHOOSING] + [SHARDED]
    found: dict[str, list[dict[str, float]]] = {}
    for printed in run_ranks(WORLD, folder, ["-m", "tests.distributed.worker"], str(folder), *names, timeout=400):
        for line in printed.splitlines():
            told = json.loads(line)
            found.setdefault(told["case"], []).append(told["errors"])
    return found


@pytest.mark.parametrize("name", CASES)
def test_ranks_find_what_one_process_finds(name: str, ranks: dict[str, list[dict[str, float]]]) -> None:
    found = ranks[name]
    assert len(found) == CASES[name].ranks
    for errors in found:
        assert {"o", "dq"} <= errors.keys()
        for quantity, error in errors.items():
            # The same blocks; and sums of at most eight parts, each rounded to float32.
            bound = 0 if quantity in ("indices", "counts") else 8 * torch.finfo(torch.float32).eps
            assert 0 <= error <= bound, quantity


def test_the_choice_of_blocks_is_compared_where_there_is_one(ranks: dict[str, list[dict[str, float]]]) -> None:
    assert {name for name, found in ranks.items() if "indices" in found[0]} == CHOOSING


def test_a_step_under_fsdp_of_ranks_that_share_a_sequence_is_the_step_of_one_process(
    ranks: dict[str, list[dict[str, float]]],
) -> None:
    for found in ranks[SHARDED]:
        assert found["error"] < 1e-6 < 1e-4 < found["moved"]


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_rank_alone_runs_the_package_as_it_is(one_rank: None) -> None:
    op = operator_of("win")
    parallel = ContextParallel(op.module, init_device_mesh("cpu", (1,), mesh_dim_names=("cp",)))
    shards = parallel.shards(7, torch.tensor([0, 3, 7]))
    assert shards == Shards(7, 1, "head_tail", (0, 3, 7)) and not shards.spans
    assert parallel.positions(shards).tolist() == [0, 1, 2, 0, 1, 2, 3]
    q, k, v, gates = torch.randn(7, 2, 16), torch.randn(7, 1, 16), torch.randn(7, 1, 16), torch.randn(7, 2, 1)
    bounds = torch.tensor([0, 3, 7], dtype=torch.int32)
    o = parallel.attention(q, k, v, gates, shards=shards)
    assert torch.equal(o, op.module.nsa_attention(q, k, v, gates, cu_seqlens=bounds))
    assert parallel.specs == (op.spec,)
    assert torch.equal(parallel.unshard(parallel.shard(q, shards), shards), q)


def test_a_group_is_asked_for_before_there_is_one() -> None:
    with pytest.raises(ValueError, match="mesh: expected a process group"):
        ContextParallel("tiny")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"spec": os}, TypeError, "spec: expected a generated package, got the module os"),
        ({"mesh": 3}, TypeError, "mesh: expected a DeviceMesh of one dim or a process group, got int"),
        ({"order": "zigzag"}, ValueError, "order: expected head_tail or contiguous, got 'zigzag'"),
        ({"head_groups": 3}, ValueError, "head_groups: expected a divisor of the 2 KV heads, got 3"),
        ({"head_groups": 1.0}, TypeError, "head_groups: expected an int, got float 1.0"),
        ({"reduction": "sum"}, ValueError, "reduction: expected exchange or reduce_scatter, got 'sum'"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(
    one_rank: None, arguments: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        ContextParallel(**{"spec": "tiny", **arguments})


def test_a_mesh_of_two_dims_and_blocks_from_outside_are_refused(one_rank: None) -> None:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "cp"))
    with pytest.raises(ValueError, match=r'mesh: expected one dim, such as mesh\["cp"\], got 2'):
        ContextParallel("tiny", mesh)
    with pytest.raises(ValueError, match=r"compression.phi: expected a phi that the operator computes, got external"):
        ContextParallel(operator_of("cmp win", phi="external").spec, mesh["cp"])
    shared = operator_of("slc", scores="mean", scope="all", kv_heads=2).spec
    with pytest.raises(ValueError, match=r"head_groups: expected 1 with selection.scope: all, got 2"):
        ContextParallel(shared, mesh["cp"], head_groups=2)


def test_arguments_of_a_call_are_refused_by_name(one_rank: None) -> None:
    parallel = ContextParallel(operator_of("win").module)
    shards = parallel.shards(5)
    q, k, gates = torch.randn(1, 5, 2, 16), torch.randn(1, 5, 1, 16), torch.randn(1, 5, 2, 1)
    more: dict[str, Any] = {"shards": shards}
    with pytest.raises(TypeError, match="shards: expected Shards, got int"):
        parallel.attention(q, k, k, gates, shards=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shards: expected those of 1 ranks, got 2"):
        parallel.attention(q, k, k, gates, shards=Shards(5, 2))
    with pytest.raises(
        ValueError, match=r"k: expected this rank's 5 rows of \(B, rows, ...\), got shape \(1, 4, 1, 16\)"
    ):
        parallel.attention(q, k[:, :4], k, gates, **more)
    with pytest.raises(TypeError, match=r"v: expected a torch.Tensor, got None"):
        parallel.attention(q, k, None, gates, **more)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sink_slc: expected one of"):
        parallel.attention(q, k, k, gates, sink_slc=torch.zeros(2), **more)
    with pytest.raises(ValueError, match="x: expected 5 tokens in dim 1"):
        parallel.shard(q[:, :3], shards)
    with pytest.raises(ValueError, match="x: expected 5 tokens in dim 1"):
        parallel.unshard(q[:, :3], shards)
    with pytest.raises(TypeError, match=r"cu_seqlens: expected integers \(N \+ 1,\), got torch.float32"):
        parallel.shards(5, torch.tensor([0.0, 5.0]))
