"""Ranks that part are told so, on every rank, with rank, op and line; those that agree go on."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from threads import backward_apart
from torch import nn
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.comm import counters, observers
from shardtensor.comm.mismatch import difference

HERE = Path(__file__).name


def line(mark):
    """The number of the line that ends with a comment."""
    lines = Path(__file__).read_text().splitlines()
    (found,) = [i for i, text in enumerate(lines, 1) if text.endswith(f"# {mark}")]
    return f"{HERE}:{found}"


def rows(mesh, n=7, **kwargs):
    whole = torch.arange(2.0 * n).reshape(n, 2)
    return st.distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None, **kwargs)


def alone(x, me):
    if me == 0:
        x.sum().item()  # alone


def branch(x, me):
    if me == 1:
        return x.amax().item()  # amax
    return x.sum().item()  # sum


def printed(x, me):
    if me == 0:
        str(x.mean().tolist())  # printed


def other_sizes(x, me):
    n = x.device_mesh.size()
    y = st.ShardTensor.from_local(
        torch.ones(2 + me, 2), x.device_mesh, [Shard(0)], sizes={0: [2 + me] * n}
    )
    y.full_tensor()  # sizes


def other_window(x, me):
    x.roll(1 + me, 0)  # window


def other_dtype(x, me):
    (x.double() if me else x).sum()  # dtype


def other_plain(x, me):
    (x * torch.full((2,), 1.0 + me)).sum()  # plain


def other_seed(x, me):
    torch.manual_seed(me)
    y = st.distribute_tensor(torch.randn(6), x.device_mesh, [Shard(0)], src_data_rank=None)  # seed
    y.sum()


def other_weights(x, me):
    torch.manual_seed(me)
    nn.Linear(2, 3)(x).sum()  # weights


def raises(x, me):
    if me == 1:
        raise ValueError("a bad row")  # raises
    x.sum().item()


def in_backward(x, me):
    w = torch.ones(2, requires_grad=True)
    loss = (x * w).sum()
    if me == 0:
        loss.backward()  # backward


def hook_raises(x, me):
    w = torch.ones(2, requires_grad=True)
    y = x * w
    if me == 1:
        y.register_hook(lambda g: 1 / 0)  # hook
    y.sum().backward()


def flips(x, me):
    if me == 1:
        x = x.flip(1)  # flips
    x.sum()


def writes(x, me):
    if me == 1:
        x[:, 0] = 1.0  # writes
    x.sum()


def last_op(x, me):
    if me == 1:
        x = x * 2  # last op


def order(x, me):
    (x.relu().t() if me else x.t().relu()).sum()  # order


def goes_back(x, me):
    y = x.requires_grad_() * x
    if me == 1:
        y.backward(torch.ones(7, 2))  # goes back
    x.detach().sum()


def cuts(x, me):
    y = st.distribute_tensor(torch.ones(6), x.device_mesh, [Replicate()], src_data_rank=None)
    if me == 1:
        y.redistribute(placements=[Shard(0)])  # cuts
    x.sum()


def catches(x, me):
    if me == 1:
        with pytest.raises(RuntimeError):
            x.matmul(torch.ones(3, 3))  # catches
    x.sum()


def other_sample(x, me):
    torch.manual_seed(me)
    st.distribute_tensor(torch.randn(6), x.device_mesh, [Shard(0)])  # sample


def other_factor(x, me):
    y = st.distribute_tensor(torch.ones(2), x.device_mesh, [Replicate()], src_data_rank=None)
    if me == 1:
        y = y * 2
    (x * y).sum()  # factor


def needs_gradient(x, me):
    if me == 1:
        x.requires_grad = True
    (x * 2).sum()  # gradient


def returns(x, me):
    if me != 1:
        x.sum()  # returns


# case: (what the message has, marks of lines that it names)
PARTED = {
    alone: ("rank 0 in `sum`", ["alone", "after"]),
    branch: ("rank 1 in `amax` .*ranks? 0", ["amax", "sum"]),
    printed: ("rank 0 in `mean`", ["printed", "after"]),
    other_sizes: ("rank 0 in `full_tensor` .all-gather", ["sizes"]),
    other_window: ("rank 0 gives rank|bytes to others", ["window"]),
    other_dtype: ("float64", ["dtype"]),
    other_plain: ("rank 0 and rank 1 gave `mul`", ["plain"]),
    other_seed: ("rank 0 and rank 1 gave `distribute_tensor`", ["seed"]),
    other_weights: ("rank 0 and rank 1 gave `linear`", ["weights"]),
    raises: ("rank 1 raised ValueError: a bad row", ["raises"]),
    in_backward: ("rank 0 in `backward`", ["backward", "after"]),
    hook_raises: ("rank 1 raised ZeroDivisionError", ["hook"]),
    flips: ("rank 1 `flip`", ["flips"]),
    writes: ("rank 1 `setitem`", ["writes"]),
    last_op: ("rank 1 `mul`", ["last op"]),
    order: ("ranks? 1.* `relu`", ["order"]),
    goes_back: ("rank 1 `backward`", ["goes back"]),
    cuts: ("rank 1 `redistribute`", ["cuts"]),
    catches: ("rank 1 `matmul`", ["catches"]),
    other_sample: ("rank 0 and rank 1 gave `distribute_tensor`.*the same sample", ["sample"]),
    other_factor: ("rank 0 and rank 1 gave `mul`", ["factor"]),
    needs_gradient: ("rank 0 and rank 1 gave `mul`.*requires grad", ["gradient"]),
    returns: (r"rank 1 in `mean`|rank 1 in end of the guard", ["returns"]),
}


def guarded(case):
    """What each rank raised."""
    mesh = T.make_mesh((dist.get_world_size(),))
    try:
        with st.guard(20.0):
            case(rows(mesh), dist.get_rank())
            rows(mesh).mean().item()  # after
    except st.DivergenceError as e:
        return f"{e}"
    except (ValueError, ZeroDivisionError) as e:
        return type(e).__name__
    return "nothing"


def check(case, found):
    pattern, marks = PARTED[case]
    own = {raises: "ValueError", hook_raises: "ZeroDivisionError"}.get(case)
    for rank, message in enumerate(found):
        if own and rank == 1:
            assert message == own
            continue
        assert re.search(pattern, message), f"rank {rank}: {message}"
        for mark in marks:
            assert line(mark) in message, f"rank {rank}: {message}"


@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_names_rank_op_and_line(ranks):
    # one pool: after an error nobody has entered a collective, so the group still works
    for case in PARTED:
        check(case, T.run_workers(ranks, guarded, case))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", [c for c in PARTED if c not in (raises, hook_raises)])
def test_on_simulated_ranks(case, ranks):
    check(case, st.simulate(ranks, guarded, case))


def test_a_backward_on_a_thread_of_its_own_has_the_line_that_called_it():
    with backward_apart():
        check(in_backward, st.simulate(2, guarded, in_backward))


def unguarded(case):
    case(rows(T.make_mesh((dist.get_world_size(),))), dist.get_rank())


@pytest.mark.parametrize("case", [branch, other_sizes, other_window, other_dtype])
def test_simulated_ranks_compare_what_they_send_always(case):
    with pytest.raises(st.DivergenceError, match=r"ranks part: rank|gives rank"):
        st.simulate(3, unguarded, case)


def test_a_simulated_rank_that_raises_is_named():
    with pytest.raises(st.RankError, match="rank 1: ValueError: a bad row"):
        st.simulate(2, unguarded, raises)


def test_nothing_looks_on_outside():
    assert st.ShardTensor.backward.__module__ == st.ShardTensor.redistribute.__module__
    assert observers.Hooks.called is None
    assert (
        not counters.records and observers.Hooks.meeting is None and observers.Hooks.calling is None
    )


def test_records_are_compared_by_base_name_of_the_file():
    def record(line, gives, gets):
        facts = {"dtype": "torch.int8", "gives": gives, "gets": gets}
        return {"collective": "window", "op": "roll", "line": line, "facts": facts}

    one = record("/a/f.py:3", [0, 4], [0, 8])
    assert difference({0: one, 1: record("/b/f.py:3", [8, 0], [4, 0])}) == ""
    assert "rank 0 in `roll`" in difference({0: one, 1: record("/b/f.py:4", [8, 0], [4, 0])})
    wrong = difference({0: one, 1: record("/b/f.py:3", [4, 0], [4, 0])})
    assert "rank 1 gives rank 0 4 bytes, where rank 0 expects 8" in wrong
