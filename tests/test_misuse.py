"""The table of misuse: each case on 2 and 3 ranks, simulated and in worker processes."""

import re

import misuse
import pytest
import torch
import torch.distributed as dist
from misuse import CASES
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

SOLO = [name for name, c in CASES.items() if c.kind == "parted"]
REST = [name for name, c in CASES.items() if c.kind != "parted"]


def check(name, found):
    """Each rank's outcome is what the case says, and the same everywhere."""
    case = CASES[name]
    for outcome in found:
        if case.kind == "refused":
            errors = case.error if isinstance(case.error, tuple) else (case.error,)
            assert outcome[0] == "error", f"{name} was not refused: {outcome}"
            assert {e.__name__ for e in errors} & set(outcome[1]), f"{name}: {outcome[1:]}"
            assert re.search(case.match, outcome[2]), f"{name}: {outcome[2]}"
        else:
            assert outcome[0] == "value" or case.kind == "torchs", f"{name}: {outcome}"
        assert outcome[:2] == found[0][:2], f"{name}: ranks differ, {found}"


def test_there_are_enough():
    assert len(CASES) >= 150 and len(SOLO) >= 15


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", REST)
def test_refused_or_right(name, ranks):
    check(name, st.simulate(ranks, misuse.outcome, name))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", SOLO)
def test_ranks_that_part_are_told(name, ranks):
    with pytest.raises(st.RankError, match=CASES[name].match):
        st.simulate(ranks, misuse.guarded, name)


def in_worker(names):
    """name -> outcome, or the error of a rank that parted."""
    found = {}
    for name in names:
        try:
            found[name] = misuse.guarded(name)
        except Exception as e:
            found[name] = ("parted", [c.__name__ for c in type(e).__mro__], f"{e}")
    return found


@pytest.mark.gloo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ranks", [2, 3])
def test_in_workers_under_the_guard(ranks):
    """All in one process group: no case leaves ranks apart, hung or out of step."""
    # the pool's processes may not start others
    rest = [name for name in REST if name != "workers_that_load"]
    for names in (rest[i : i + 40] for i in range(0, len(rest), 40)):
        found = T.run_workers(ranks, in_worker, names)
        for name in names:
            check(name, [f[name] for f in found])
    found = T.run_workers(ranks, in_worker, SOLO)
    for name in SOLO:
        errors = [f[name] for f in found]
        assert all(e[0] == "parted" for e in errors), f"{name}: {errors}"
        told = [e for e in errors if "DivergenceError" in e[1]]
        # one rank may have raised an error of its own
        assert len(told) >= ranks - 1, f"{name}: {errors}"
        own = " ".join(e[2] for e in errors)
        assert re.search(CASES[name].match, " ".join(e[2] for e in told) + own), f"{name}: {errors}"
        assert all(re.search(r"rank \d|ranks \d", e[2]) for e in told), f"{name}: {errors}"
        assert any("misuse/" in e[2] for e in told), f"{name}: {errors}"


def after_the_end():
    mesh = T.make_mesh((dist.get_world_size(),))
    x = st.distribute_tensor(misuse.whole(), mesh, [Shard(0)], src_data_rank=None)
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match="make the mesh and its ShardTensors anew"):
        x.sum()


@pytest.mark.parametrize("ranks", [2, 3])
def test_use_after_the_process_group_is_destroyed(ranks):
    st.simulate(ranks, after_the_end)


def nested():
    st.simulate(2, dist.get_rank)


def test_simulate_inside_simulate():
    with pytest.raises(st.RankError, match="simulate inside simulate"):
        st.simulate(2, nested)
    assert st.simulate(2, dist.get_rank) == [0, 1]


def through_torch_compile_and_script():
    mesh = T.make_mesh((dist.get_world_size(),))
    x = st.distribute_tensor(misuse.whole(), mesh, [Shard(0)], src_data_rank=None)
    layer = torch.nn.Linear(4, 2).double()
    torch.nn.init.ones_(layer.weight)
    T.same(torch.compile(layer, backend="eager")(x), layer(misuse.whole()), "torch.compile")
    T.same(torch.jit.script(layer)(x), layer(misuse.whole()), "torch.jit.script")
    with pytest.raises(RuntimeError):
        torch.jit.trace(layer, (x,))


@pytest.mark.filterwarnings("ignore")
def test_torch_compile_and_torch_jit():
    torch.manual_seed(0)
    st.simulate(2, through_torch_compile_and_script)
