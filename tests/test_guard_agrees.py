"""Under the guard, ranks that agree go on: training, compiled programs, groups, errors that all catch."""

import pytest
import torch
import torch.distributed as dist
from test_guard import rows
from torch import nn
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

import shardtensor as st
from shardtensor import testing as T


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
