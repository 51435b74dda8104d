"""The model's calls inside of a step of `tiled`: one halo of the input, where that pays."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_tiled_alone import CASES, MEETING, Net, conv, same
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.paged import pager, width
from shardtensor.ranks.simulate import Turns


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Nearly everything is paged, and the rows made twice may be as many as those made."""
    monkeypatch.setattr(pager, "LEAST", 512)
    monkeypatch.setattr(width, "MORE", 2.0)


def whole(y):
    return torch.utils._pytree.tree_map_only(
        st.ShardTensor, lambda y: y.detach().full_tensor().clone(), y
    )


def loss_of(y):
    ends = [y for y in torch.utils._pytree.tree_leaves(y) if getattr(y, "requires_grad", False)]
    return sum((y * (i + 1)).sin().square().mean() for i, y in enumerate(ends))


def left(model, x, call, calls=1):
    """What calls of a model and their backward leave: outputs, gradients, buffers, draws."""
    grad = torch.is_grad_enabled()
    torch.manual_seed(3)
    ys, given = [], x.requires_grad_(grad)
    for _ in range(calls):
        ys.append(call(model, given))
    drawn = torch.rand(2)
    if grad:
        sum(map(loss_of, ys)).backward()
    return whole(ys), drawn, *([whole(given.grad)] * grad)


def held(model, x, parts, dim, folder, memory=2**9, calls=1, prepare=lambda model: None):
    """The tiled model after a step, which leaves what the plain model does."""
    dims = (dim,) if isinstance(dim, int) else dim
    twin = copy.deepcopy(model)
    run = st.tiled(twin, parts, dim, memory=memory, spill=folder)

    def step(model, mesh):
        prepare(model)
        given = st.distribute_tensor(x, mesh, [Shard(d % x.ndim) for d in dims], src_data_rank=None)
        return left(model, given, lambda model, x: model(x), calls)

    got = run.run(step)
    want = left(model, x.clone(), lambda model, x: model(x), calls)
    state = [([p.grad for p in m.parameters()], list(m.buffers())) for m in (twin, model)]
    same((got, state[0]), (want, state[1]))
    return run


@pytest.mark.parametrize(
    ("name", "grad"),
    [("unet", False), ("unet", True), ("unet on 2 x 2", False), ("pyramid", False),
     ("resnet", False), ("dropout", False), ("one part", False)],
)  # fmt: skip
def test_a_step_leaves_what_the_plain_model_does(name, grad, tmp_path):
    make, shape, parts, dim = CASES[name]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        run = held(model, x, parts, dim, tmp_path)
    assert (run.halo is None) == grad


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(2, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return F.dropout(self.conv(x), 0.3) * self.calls


def test_rows_are_cut_as_the_inputs_and_calls_are_counted_once(tmp_path):
    model, x = Counting().double(), torch.randn(1, 2, 30, 6).double()
    run = st.tiled(model, 3, 2, memory=2**9, spill=tmp_path)

    def step(model, mesh):
        given = st.ShardTensor.from_local(
            x[:, :, [slice(0, 13), slice(13, 20), slice(20, 30)][mesh.get_rank()]], mesh, [Shard(2)]
        )
        y = model(model(given))
        return y.spec.dims[2].sizes, y.full_tensor()

    with torch.no_grad():
        torch.manual_seed(1)
        sizes, y = run.run(step)
        assert sizes == (13, 7, 10) and run.halo == (1,) and model.calls == 2
        model.calls.zero_()
        torch.manual_seed(1)
        same(y, model(model(x)))


def keeps(m, x):
    m.last = m["a"](x)
    return m.last + 1


STEPS_MEET = [
    *MEETING.items(),
    ("what is kept", Net(keeps, a=conv(2, 3))),
]  # fmt: skip


@pytest.mark.parametrize("name", [n for n, _ in STEPS_MEET if "written" not in n])
def test_parts_of_a_step_meet_where_they_must(name, tmp_path):
    torch.manual_seed(0)
    model, x = copy.deepcopy(dict(STEPS_MEET)[name]).double(), torch.randn(1, 2, 36, 6).double()
    with torch.no_grad():
        assert held(model, x, 3, 2, tmp_path).halo is None


class Switched(nn.Module):
    """What it needs of other rows changes with an attribute; it counts its calls in many ways."""

    def __init__(self):
        super().__init__()
        self.conv, self.centred = conv(2, 2), False
        self.calls, self.seen, self.by_kind, self.names = 0, [], {"all": [0]}, set()
        self.register_buffer("grown", torch.ones(()))

    def forward(self, x):
        self.calls += 1
        self.seen.append(self.calls)
        self.by_kind["all"][0] += 1
        self.names.add(len(self.names))
        self.grown = self.grown * 1.5
        counted = self.calls + len(self.seen) + self.by_kind["all"][0] + len(self.names)
        y = F.dropout(self.conv(x), 0.3) * self.grown * counted
        return y - y.mean() if self.centred else y


@torch.no_grad()
def test_a_call_meets_that_needs_more_than_one_like_it_before(tmp_path):
    torch.manual_seed(0)
    model, x = Switched().double(), torch.randn(1, 2, 30, 6).double()

    def calls(model, x):
        torch.manual_seed(1)
        found = []
        for model.centred in (False, True, True):
            found.append(whole(model(x)))
        return found

    def step(model, mesh):
        return calls(model, st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None))

    run = st.tiled(copy.deepcopy(model), 3, 2, memory=2**9, spill=tmp_path)
    same(run.run(step), calls(model, x))
    assert run.halo is None


def test_the_halo_is_that_of_the_last_call(tmp_path):
    model, x = Net(lambda m, x: m["a"](x), a=conv(2, 3)).double(), torch.randn(1, 2, 30, 6).double()
    run = st.tiled(model, 3, 2, memory=2**9, spill=tmp_path)
    found = []
    for last in (False, True):

        def step(model, mesh, last=last):
            given = st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None)
            for grad in (not last, last):
                with torch.set_grad_enabled(grad):
                    model(given)

        run.run(step)
        found.append(run.halo)
    assert found == [(1,), None]


def test_a_hook_of_the_step_sees_the_rows_of_its_part(tmp_path):
    seen = []

    def prepare(model):
        model.parts["a"].register_forward_hook(lambda m, args, y: seen.append(y.shape))

    model, x = Net(lambda m, x: m["a"](x), a=conv(2, 3)).double(), torch.randn(1, 2, 30, 6).double()
    with torch.no_grad():
        assert held(model, x, 3, 2, tmp_path, prepare=prepare).halo is None
    assert seen == 3 * [(1, 3, 30, 6)]


@torch.no_grad()
def test_what_lies_between_is_in_no_file(tmp_path, monkeypatch, plain_transport):
    """But what enters a call, and what leaves it."""
    torch.manual_seed(0)
    layers = [layer for i in range(4) for layer in (conv(4 if i else 1, 4), nn.GELU())]
    model = nn.Sequential(*layers, conv(4, 1, 1)).double()
    x, y = torch.randn(1, 1, 256, 16).double(), torch.zeros(1, 1, 256, 16).double()
    waits, wait = [], Turns.wait
    monkeypatch.setattr(Turns, "wait", lambda *args: waits.append(1) or wait(*args))

    def step(model, mesh):
        rows = slice(32 * mesh.get_rank(), 32 * mesh.get_rank() + 32)
        given = st.ShardTensor.from_local(
            x[:, :, rows].clone(), mesh, [Shard(2)], sizes={2: (32,) * 8}
        )
        out = model(given)
        y[:, :, rows] = out.to_local()

    found = []
    for more in (-1.0, 0.25):
        monkeypatch.setattr(width, "MORE", more)
        waits.clear()
        run = st.tiled(model, 8, 2, memory=2**17 - 1, spill=tmp_path)
        run.run(step)
        same(y, model(x))
        found.append((run.halo, len(waits), run.paging.spilled))
    (met, often, most), (halo, seldom, least) = found
    assert met is None and halo == (4,)
    assert 2 * seldom <= often and least <= x.nbytes + y.nbytes < most / 3
