"""Ranks that part are told so, on every rank, with rank, op and line; those that agree go on."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.utils.checkpoint import checkpoint

import shardtensor as st
from shardtensor import testing as T
from shardtensor.agree import difference
from shardtensor.comm import count

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


def unguarded(case):
    case(rows(T.make_mesh((dist.get_world_size(),))), dist.get_rank())


@pytest.mark.parametrize("case", [branch, other_sizes, other_window, other_dtype])
def test_simulated_ranks_compare_what_they_send_always(case):
    with pytest.raises(st.DivergenceError, match=r"ranks part: rank|gives rank"):
        st.simulate(3, unguarded, case)


def test_a_simulated_rank_that_raises_is_named():
    with pytest.raises(st.RankError, match="rank 1: ValueError: a bad row"):
        st.simulate(2, unguarded, raises)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        h = checkpoint(self.a, x, use_reentrant=False)
        return self.b(self.norm(h).relu())


def trained():
    torch.manual_seed(0)
    n = dist.get_world_size()
    mesh = T.make_mesh((n,) if n < 4 else (2, 2))
    model = st.parallelize(Net(), mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    image = torch.randn(1, 2, 9, 8)
    x = st.distribute_tensor(image, mesh, [Shard(2), Shard(3)][: mesh.ndim], src_data_rank=None)
    losses = []
    for _ in range(2):
        loss = (model(x) - x).square().mean() + x.sort(2).values.mean() + x[:, :, 2:5].amax()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained_guarded():
    with st.guard():
        return trained()


def test_training_that_agrees_is_not_disturbed():
    plain = st.simulate(1, trained)[0]
    for n in (2, 3, 4):
        for losses in st.simulate(n, trained_guarded):
            assert losses == pytest.approx(plain, rel=1e-4)


@pytest.mark.gloo
def test_training_in_workers():
    plain = st.simulate(1, trained)[0]
    for losses in T.run_workers(3, trained_guarded):
        assert losses == pytest.approx(plain, rel=1e-4)


def compiled():
    mesh = T.make_mesh((dist.get_world_size(),))
    model = Net().double()
    for p in model.parameters():
        nn.init.constant_(p, 0.1)
    image = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(1)).double()
    x = st.distribute_tensor(image, mesh, [Shard(2)], src_data_rank=None)
    run = st.compile(model.b, backend="aot_eager")
    h = st.distribute_tensor(image.repeat(1, 2, 1, 1), mesh, [Shard(2)], src_data_rank=None)
    with st.guard(5.0):
        out = run(h)
        out.square().mean().backward()
        value = x.mean().item()
        try:
            if dist.get_rank() == 0:
                run(h)
            x.sum()
        except st.DivergenceError as e:
            return value, str(e)


@pytest.mark.gloo
def test_compiled_programs_agree_too():
    (v, first), (w, second) = T.run_workers(2, compiled)
    assert v == w and first == second and "rank 0 in" in first and "window" in first


def subgroups():
    """Two halves that do different things agree each among themselves."""
    mesh = T.make_mesh((2, 2))
    half = mesh["b"]
    me = dist.get_rank()
    x = rows(half)
    with st.guard(5.0):
        found = (x * 2).sum().item() if me < 2 else x.roll(1, 0).amax().item()
        try:
            if me == 2:
                x.mean()
            x.sum()
        except st.DivergenceError as e:
            return str(e)
    return found


@pytest.mark.parametrize("run", [st.simulate, pytest.param(T.run_workers, marks=pytest.mark.gloo)])
def test_groups_agree_among_themselves(run):
    if run is st.simulate:
        with pytest.raises(st.DivergenceError, match=r"rank 2 in `mean`.*rank 3 in `sum`"):
            st.simulate(4, subgroups_raising)
        return
    a, b, c, d = T.run_workers(4, subgroups)
    assert a == b == 2 * sum(range(14)) and c == d and "rank 2 in `mean`" in c and "rank 0" not in c


def subgroups_raising():
    found = subgroups()
    if isinstance(found, str):
        raise st.DivergenceError(found)


def agreeing(x, me):
    """What one rank may do alone, and what all do alike."""
    loss = (x.requires_grad_() * 2).sum()
    if me == 0:
        # reads values that all ranks have
        text = f"{loss:.3f} {(loss.detach() * 100).item()} {x.shape} {x.to_local().sum()}"
        assert text.startswith("182.000 18200.0")
    place = torch.randn(6) if me == 0 else torch.zeros(6)
    st.distribute_tensor(place, x.device_mesh, [Shard(0)])
    for _ in range(2):
        # an error that all ranks catch
        with pytest.raises(RuntimeError):
            x.matmul(torch.ones(3, 3))
        with pytest.raises(st.UnsupportedOpError), st.fallback("error"):
            torch.linalg.det(x[:2])
    loss.backward()
    with pytest.raises(st.DivergenceError):
        (x * (1 + me)).sum()
    # all ranks were told, and go on
    return x.detach().sum().item()


def agreed(case):
    with st.guard(20.0):
        return case(rows(T.make_mesh((dist.get_world_size(),))), dist.get_rank())


@pytest.mark.gloo
def test_what_agrees_goes_on():
    assert T.run_workers(2, agreed, agreeing) == [91.0] * 2


def test_nothing_looks_on_outside():
    assert st.ShardTensor.backward.__module__ == st.ShardTensor.redistribute.__module__
    assert count.Hooks.called is None
    assert not count.records and count.Hooks.meeting is None and count.Hooks.calling is None


def test_records_are_compared_by_base_name_of_the_file():
    def record(line, gives, gets):
        facts = {"dtype": "torch.int8", "gives": gives, "gets": gets}
        return {"collective": "window", "op": "roll", "line": line, "facts": facts}

    one = record("/a/f.py:3", [0, 4], [0, 8])
    assert difference({0: one, 1: record("/b/f.py:3", [8, 0], [4, 0])}) == ""
    assert "rank 0 in `roll`" in difference({0: one, 1: record("/b/f.py:4", [8, 0], [4, 0])})
    wrong = difference({0: one, 1: record("/b/f.py:3", [4, 0], [4, 0])})
    assert "rank 1 gives rank 0 4 bytes, where rank 0 expects 8" in wrong


def test_the_example_of_the_docs(tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "debugging.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    exec(compile(block, "train.py", "exec"), names)
    want = (
        "ranks part: rank 0 in `sum` (all-reduce of float32 [1]) at train.py:13; rank 1 in `mean`"
    )
    assert want in names["message"] and want in " ".join(text.split())


SCRIPT = """
import os, sys, time, torch, shardtensor as st
from torch.distributed.tensor import Replicate, Shard
mesh, device = st.init()
x = st.distribute_tensor(torch.arange(6.0, device=device), mesh, [Shard(0)], src_data_rank=None)
me, case = mesh.get_rank(), sys.argv[1]
if case == "print" and me == 0:
    print(x.sum().item())
elif case == "raise" and me == 1:
    raise KeyError("no such variable")
elif case == "late" and me == 0:
    time.sleep(5)
x.mean().item()
os.write(1, b"finished\\n")
"""


@pytest.mark.gloo
@pytest.mark.parametrize(
    "case, expected",
    [
        ("print", "rank 0 in `sum` (all-reduce of float32 [1])"),
        ("raise", "rank 1 raised KeyError: 'no such variable'"),
        ("late", "rank 0 did not come in 2 s"),
        ("good", "finished"),
    ],
)
def test_a_program_under_SHARDTENSOR_DEBUG(case, expected, tmp_path):
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "SHARDTENSOR_DEBUG": "1",
        "SHARDTENSOR_DEBUG_TIMEOUT": "2",
    }
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        case,
    ]
    begin = time.monotonic()
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=120)
    text = done.stdout + done.stderr
    assert expected in text, text
    assert time.monotonic() - begin < 60
    assert (done.returncode == 0) == (case == "good") == (text.count("finished") == 2)
