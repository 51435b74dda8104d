"""Plans of models whose code reads values: schedules, constants, masks, indices, points."""

import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shardtensor.plan.estimate import Layout, Task, estimate
from shardtensor.plan.search import plan
from shardtensor.plan.step import replay
from shardtensor.plan.step.ledger import Ledger
from shardtensor.ranks.measure import peak_bytes
from shardtensor.train.options import Options


class Schedule(nn.Module):
    """Rates by item() in the constructor; one of them read in forward."""

    def __init__(self):
        super().__init__()
        self.rates = [r.item() for r in torch.linspace(0, 0.3, 3)]
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in self.rates)
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        for conv, rate in zip(self.convs, self.rates, strict=True):
            y = conv(x)
            x = x + (F.dropout(y, rate) if rate > 0 else y)
        return x * 2 if self.gain.item() > 1 else x


class Constants(nn.Module):
    """Numpy's, torch.tensor's and tables of positions."""

    def __init__(self):
        super().__init__()
        kernel = np.outer([1, 2, 1], [1, 2, 1]).astype("float32")
        self.kernel = torch.from_numpy(kernel / kernel.sum())[None, None]
        self.conv = nn.Conv2d(5, 3, 1)
        self.register_buffer("table", torch.arange(4) % 3)

    def forward(self, x):
        x = (x - torch.tensor([0.4, 0.5, 0.6]).view(-1, 1, 1)) / float(np.float32(0.2))
        y = F.conv2d(x, self.kernel.repeat(3, 1, 1, 1), padding=1, groups=3)
        at = torch.linspace(-1, 1, x.shape[3]), torch.linspace(-1, 1, x.shape[2])
        grid = torch.stack(torch.meshgrid(at[1], at[0], indexing="ij"))
        picked = y[:, self.table[: int(self.table.max()) + 1]]
        return self.conv(torch.cat([picked, grid[None].expand(len(x), -1, -1, -1)], 1))


class Fno(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 3, 8, 8, dtype=torch.cfloat))

    def forward(self, x):
        modes = torch.fft.rfft2(x)
        out = torch.zeros(len(x), 3, x.shape[2], x.shape[3] // 2 + 1, dtype=torch.cfloat)
        out[:, :, :8, :8] = torch.einsum("bixy,ioxy->boxy", modes[:, :, :8, :8], self.weight)
        return torch.fft.irfft2(out, s=x.shape[2:]) + x


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        out = torch.zeros(len(x), 8, *x.shape[2:])
        out[:, :4] = self.conv(x)
        out[:, 4:] = x.mean(1, keepdim=True)
        return out


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.message, self.out = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x, edges):
        source, target = edges
        sent = self.message(torch.cat([x[source], x[target]], -1)).relu()
        total = torch.zeros(len(x), 16).index_add_(0, target, sent)
        return x + self.out(total)


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 16)

    def forward(self, x, batch):
        return torch.zeros(int(batch.max()) + 1, 16).index_add_(0, batch, self.layer(x))


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x[x > 0] * self.scale


class Sorted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x).sort(1).values


class Near(nn.Module):
    """Features of the nearest points, of each sample its own: rows of other ranks by values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 8)

    def forward(self, pos):
        at = torch.cdist(pos, pos).topk(4, largest=False).indices
        x = self.layer(pos)
        return x.gather(1, at.flatten(1)[..., None].expand(-1, -1, 8)).unflatten(1, at.shape[1:])


class Compiled(nn.Module):
    """A part that torch.compile compiles when it is called."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)
        self.part = torch.compile(lambda x: x * x.sigmoid(), backend=never)

    def forward(self, x):
        return self.part(self.layer(x))


def never(graph, inputs):
    raise AssertionError("compiled")


class Checked(nn.Module):
    """Refuses bad inputs and scales by one of their values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        if torch.isnan(x).any():
            raise ValueError("not a number")
        assert torch.isfinite(x).all()
        return self.layer(x / x.abs().max().item())


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x[..., : int((x > 0).sum())] * self.scale


class FromWeights(nn.Module):
    """A constructor that fake tensors cannot run: it is run for real."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.width = int(self.conv.weight.detach().flatten().argmax() >= 0)
        self.shape = np.asarray(self.conv.weight.detach()).shape

    def forward(self, x):
        return self.conv(x) * self.width


IMAGE, POINTS = [(1, 3, 16, 16)], [(64, 3), (2, 128)]
INTS = (torch.float32, torch.int64)
KINDS = [
    (Schedule, IMAGE, (2, 3), (), ()),
    (Constants, IMAGE, (2, 3), (), ()),
    (Fno, [(1, 3, 32, 32)], (2,), (), ()),
    (Parts, IMAGE, (2, 3), (), ()),
    (Graph, POINTS, (0,), INTS, ()),
    (Pooled, [(64, 3), torch.arange(64) // 16], (0,), (), ()),
    (Masked, [(1, 8, 64)], (2,), (), ("a mask",)),
    (Sorted, [(1, 64, 8)], (1,), (), ()),
    (Near, [(2, 64, 3)], (1,), (), ()),
    (Compiled, IMAGE, (2, 3), (), ()),
    (Checked, [(1, 64, 8)], (1,), (), ("any is", "all is", "a number")),
    (FromWeights, IMAGE, (2, 3), (), ()),
]


@pytest.fixture(autouse=True)
def no_default_device():
    """A default device is a mode of torch's, between the code that fills a tensor and its call."""
    before = torch.get_default_device()
    torch.set_default_device(None)
    yield
    torch.set_default_device(None if before.type == "cpu" else before)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("make, shapes, dims, dtypes, told", KINDS)
def test_what_a_plan_knows(make, shapes, dims, dtypes, told, ranks):
    task = Task(make, shapes, dtypes, dims)
    cuts = (ranks, *[1] * (len(dims) - 1))
    found = estimate(task, Layout(1, dims, cuts))
    assert not found.refused and not found.gathered
    assert found.memory["activations"] > 0
    for what in told:
        assert any(what in a and "test_plan_kinds.py" in a for a in found.assumed), what


def test_a_size_that_inputs_decide_is_refused_with_its_line():
    found = estimate(Task(Counts, [(1, 8, 64)]), Layout(1, (2,), (1,)))
    assert "test_plan_kinds.py" in found.refused and "as a tensor" in found.refused
    edges = Task(Pooled, [(64, 3), (64,)], INTS, (0,))
    assert "as a tensor" in estimate(edges, Layout(1, (0,), (2,))).refused


@pytest.mark.parametrize("make", [Parts, Fno])
def test_memory_beside_a_real_step(make):
    torch.manual_seed(0)
    model, x = make(), torch.randn(1, 3, 256, 256)
    # as torch does by default on GPUs
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)

    def step():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    weights = sum(p.nbytes for p in model.parameters())
    # with AdamW's two moments
    real = sorted(peak_bytes(step) for _ in range(3))[1] + x.nbytes + 3 * weights
    task = Task(make, [(1, 3, 256, 256)])
    assert estimate(task, Layout(1, (2, 3), (1, 1))).peak == pytest.approx(real, rel=0.1)


def test_an_input_s_values_change_nothing_outside():
    batch = torch.arange(64) // 16
    kept, state = batch.clone(), torch.get_rng_state()
    estimate(Task(Pooled, [(64, 3), batch], (), (0,)), Layout(1, (0,), (2,)))
    assert batch.equal(kept) and torch.get_rng_state().equal(state)


class Heavy(nn.Module):
    """Almost all is held by one module, and sent by another."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(3, 64, 1), *(nn.GELU() for _ in range(5)))
        self.narrow = nn.Conv2d(64, 3, 3, padding=1)

    def forward(self, x):
        return self.narrow(self.wide(x))


def test_the_tree_says_who_holds_and_who_sends():
    found = estimate(Task(Heavy, [(1, 3, 64, 64)]), Layout(1, (2,), (2,)))
    tree = found.tree()
    whole = tree[""]
    held = found.memory["activations"] + found.memory["communication"]
    assert whole.held == held and tree["wide"].held > 0.5 * held
    assert whole.sent == sum(s.bytes for s in found.sent)
    windows = found.collectives()["window"][2]
    assert tree["narrow"].sent >= windows > 0 and not tree["wide.1"].sent
    assert whole.total == pytest.approx(found.compute + found.communication)
    assert tree.children("")[0].module == "wide"
    assert any("checkpoint `wide`" in told for told in tree.advice(8))
    assert "wide" in str(tree)


def test_what_repeats_is_run_once():
    """The optimizer's step, of weights alike, in all layouts; alone it would be booked the same."""
    made = []

    def optimizer(weights):
        made.append(len(weights))
        return torch.optim.SGD(weights, momentum=0.9)

    kinds = dict(dims=(2,), optimizer=optimizer, precisions=(None, "bf16"))
    found = plan(Heavy, [(2, 3, 64, 64)], 2, **kinds)
    assert len(found) == 4 and made == [4]
    for e in found:
        task = Task(Heavy, [(2, 3, 64, 64)], dims=(2,), optimizer=optimizer)
        one = estimate(task, e.layout)
        assert (one.memory, one.compute) == (e.memory, pytest.approx(e.compute))
        assert one.collectives() == e.collectives()


class Several(nn.Module):
    """Ops whose kernels for "meta" stand in for a fake mode."""

    def __init__(self):
        super().__init__()
        self.norms = nn.Sequential(nn.BatchNorm2d(6), nn.GroupNorm(2, 6), nn.LayerNorm(16))
        self.linear = nn.Linear(16, 16)
        self.still = nn.BatchNorm2d(6).eval()
        self.convs = nn.Sequential(
            nn.Conv2d(6, 6, 3, padding=1, groups=3), nn.ReLU(), nn.Conv2d(6, 6, (2, 3), 1, (2, 1))
        )

    def forward(self, x):
        wide = x.permute(0, 2, 3, 1).contiguous().movedim(-1, 1)
        x = x + self.convs(x)[:, :, :-3] + self.convs[0](wide)
        y = self.linear(self.norms(x)).permute(0, 2, 3, 1)
        y = self.still(F.silu(y).movedim(-1, 1)) + F.gelu(x) + F.relu(x) * torch.sigmoid(x)
        a, b = y.reshape(len(y), 6, -1).chunk(2, 1)
        z = torch.cat([a @ b.transpose(1, 2), a.new_zeros(len(y), 3, 1)], -1)
        return F.pad(z.unflatten(1, (3, 1)).tanh().expand(-1, -1, 4, -1)[:, 1:], (1, 1)).double()


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_kernels_for_meta_give_what_a_fake_mode_gives(ranks, precision, monkeypatch):
    task = Task(Several, [(2, 6, 16, 16)], dims=(2,))
    layout = Layout(1, (2,), (ranks,), Options(precision=precision))
    kept = []
    for direct in (replay.Call._direct, lambda *_: None):
        monkeypatch.setattr(replay, "_entries", {})
        monkeypatch.setattr(replay.Call, "_direct", direct)
        assert not estimate(task, layout).refused
        kept.append({k: e and (e.results, e.kind, e.cost) for k, e in replay._entries.items()})
        task.booked.clear()
    quick, slow = kept
    # no kernel gives the gradients of a batch norm that nobody asked for, but a fake mode does
    more = {k for k, e in quick.items() if e and None in e[0] and "batch" in e[2].kind}
    # a fake mode's results of some ops cannot be kept
    same = {k for k, e in slow.items() if e} - more
    assert {k: quick[k] for k in same} == {k: slow[k] for k in same}
    assert len(same) > 100


def test_a_plan_does_not_depend_on_the_garbage_collector(monkeypatch):
    found, before = [], gc.get_threshold()
    try:
        for threshold in (0, 5):
            gc.set_threshold(threshold)
            monkeypatch.setattr(replay, "_entries", {})
            task = Task(Several, [(2, 6, 16, 16)], dims=(2,))
            one = estimate(task, Layout(1, (2,), (3,)))
            found.append((one.memory, one.course))
    finally:
        gc.set_threshold(*before)
    assert found[0] == found[1]


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm2d(4), lambda: nn.GroupNorm(2, 4)])
def test_a_norm_s_statistics_need_no_memory(norm):
    """32 TiB of it: what is run on real zeros would end here."""
    shape = (1, 4, 2**21, 2**20)
    task = Task(lambda: nn.Sequential(nn.Conv2d(4, 4, 1), norm()), [shape], dims=(2,))
    for precision in (None, "bf16"):
        found = estimate(task, Layout(1, (2,), (4,), Options(precision=precision)))
        assert not found.refused and found.peak > 2**43


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wide", [None, False, True])
def test_the_statistics_have_the_real_ones_form(dtype, wide):
    x = torch.zeros(2, 3, 4, dtype=dtype)
    kept = None if wide is None else torch.zeros(3, dtype=torch.float32 if wide else dtype)
    if wide and dtype == torch.float64:
        return
    real = torch.batch_norm_update_stats(x, kept, kept, 0.1)
    with Ledger() as ledger, ledger.fake:
        fakes = [None if t is None else ledger.fake.from_tensor(t) for t in (x, kept)]
        found = torch.batch_norm_update_stats(fakes[0], fakes[1], fakes[1], 0.1)
    for a, b in zip(real, found, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


class Framed(nn.Module):
    """Attention of frames to those before, by a mask of numbers, in heads of 16."""

    def forward(self, x):
        # B C T H W -> B (T H W) C
        b, c, t, h, w = x.shape
        tokens = x.permute(0, 2, 3, 4, 1).reshape(b, 1, t * h * w, c)
        frame = torch.arange(t).repeat_interleave(h * w)
        mask = torch.where(frame[:, None] >= frame, 0, -float("inf")).to(x.dtype)
        y = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens, attn_mask=mask)
        return y.reshape(b, t, h, w, c)


def test_a_mask_of_numbers_around_a_ring():
    """What CUDA's kernels would count is asked of those for CPUs, whose values are as wide."""
    found = estimate(
        Task(Framed, [(1, 16, 3, 32, 32)], dims=(3,), train=False), Layout(1, (3,), (4,))
    )
    assert not found.refused and found.peak > 0
