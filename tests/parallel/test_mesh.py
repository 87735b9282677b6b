from __future__ import annotations

import pytest

from veomni.errors import LayoutError
from veomni.parallel.mesh import ParallelDims, ParallelState, get_parallel_state
from veomni.testing.ranks import run_ranks


@pytest.mark.parametrize(
    ("sizes", "world", "expected"),
    [
        ({}, 8, {"dp_shard": 8, "fsdp": 8, "data": 8}),
        ({"dp_replicate": 2}, 8, {"dp_shard": 4, "fsdp": 4, "data": 8}),
        ({"dp_replicate": -1, "dp_shard": 1}, 8, {"dp_replicate": 8, "fsdp": 1}),
        ({"ulysses": 4}, 8, {"dp_shard": 2, "fsdp": 8, "data": 2, "sequence": 4}),
        ({"ulysses": 2, "cp": 2, "ep": 4}, 8, {"dp_shard": 2, "fsdp": 8, "sequence": 4, "expert_shards": 2}),
        ({"dp_replicate": 2, "ep": 2}, 8, {"experts": 2, "expert_shards": 2, "expert_replicas": 2}),
        ({"dp_replicate": -1, "dp_shard": 1, "ep": 2}, 8, {"experts": 2, "expert_shards": 1, "expert_replicas": 4}),
        ({"dp_replicate": 2, "ep_strided": 8}, 8, {"experts": 8, "expert_shards": 1, "expert_replicas": 1}),
    ],
)
def test_resolve_fills_in_the_rest(sizes, world, expected):
    dims = ParallelDims(**sizes).resolve(world)
    assert {name: getattr(dims, name, None) or dims.size(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("sizes", "world", "message"),
    [
        ({"dp_shard": 3}, 4, "multiply to 3 .dp_shard 3. but there are 4 ranks"),
        ({"ulysses": 3}, 4, "multiply to 3"),
        ({"dp_shard": 0}, 4, "dp_shard has size 0"),
        ({"tp": -1}, 4, "tp has size -1"),
        ({"dp_replicate": -1}, 4, "both -1"),
        ({"ep": 3}, 4, "expert parallel size 3 does not divide the 4 ranks"),
    ],
)
def test_layouts_that_do_not_work_are_rejected(sizes, world, message):
    with pytest.raises(LayoutError, match=message) as caught:
        ParallelDims(**sizes).resolve(world)
    assert caught.value.fix


def views():
    state = ParallelState(ParallelDims(dp_replicate=2, ulysses=2).resolve(4), "cpu")
    return {
        "rank": {
            name: state.rank(name)
            for name in ("dp_replicate", "dp_shard", "ulysses", "data", "sequence", "fsdp", "loss")
        },
        "size": {name: state.size(name) for name in ("data", "sequence", "fsdp", "loss", "tp")},
        "parameters": state.parameter_mesh.mesh.tolist(),
    }


def test_views_of_a_live_mesh():
    found = run_ranks(views, 4)
    for rank, seen in enumerate(found):
        assert seen["size"] == {"data": 2, "sequence": 2, "fsdp": 2, "loss": 4, "tp": 1}
        assert seen["rank"]["dp_replicate"] == rank // 2
        assert seen["rank"]["ulysses"] == rank % 2
        assert seen["rank"]["data"] == rank // 2
        assert seen["rank"]["fsdp"] == rank % 2
        assert seen["rank"]["loss"] == rank
        assert seen["parameters"] == [[0, 1], [2, 3]]


def test_no_mesh_before_a_launch():
    with pytest.raises(LayoutError, match=r"call launcher\.launch"):
        get_parallel_state()
