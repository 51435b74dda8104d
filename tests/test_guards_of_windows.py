"""What convolutions, pools and blocks must not take for what it is not: a guard each."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from drawn import drawn
from torch import nn
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.rules import overlap
from shardtensor.rules.conv import halo
from shardtensor.rules.conv.conv import _transposed as transposed
from shardtensor.rules.sliding import Stencil, plan, sliding

D = torch.float64


def conv(*args, **kwargs):
    torch.manual_seed(11)
    return (nn.Conv1d, nn.Conv2d)[len(kwargs.pop("dims", "hw")) - 1](*args, dtype=D, **kwargs)


@pytest.fixture
def by_strips(in_flight):
    """The convolutions by strips."""
    return in_flight(halo._HaloConv)


NARROW = [(1, 11), (11, 1), (1, 10, 0, 1), (4, 0, 8), (1, 1, 10), (5, 1, 1, 5)]


@pytest.mark.parametrize("cut", NARROW)
@pytest.mark.parametrize("kernel, dilation", [(5, 1), (3, 2), (7, 1)])
def test_a_shard_narrower_than_the_halo(cut, kernel, dilation, by_strips):
    """Its neighbours need rows of ranks beyond it: strips of direct neighbours do not do."""
    width = dilation * (kernel - 1) // 2
    module = conv(2, 3, (kernel, 3), padding=(width, 1), dilation=(dilation, 1))
    T.hold(module, [drawn(1, 2, 12, 4)], [T.shard(2, cut)], (len(cut),))
    assert not by_strips


STRIPS = {
    "stride, less padding": dict(kernel_size=3, stride=2),
    "stride, more padding": dict(kernel_size=3, stride=2, padding=2),
    "less padding": dict(kernel_size=5, padding=1),
    "more padding": dict(kernel_size=3, padding=2),
    "even kernel": dict(kernel_size=(4, 3), padding="same"),
    "padded ahead in a whole dim": dict(kernel_size=(3, 4), padding="same"),
}


@pytest.mark.parametrize("name", STRIPS)
def test_what_strips_do_not_serve(name, by_strips):
    T.hold(conv(2, 3, **STRIPS[name]), [drawn(2, 2, 12, 5)], [T.shard(2, (5, 7))], (2,))
    assert not by_strips


def rims(stencil, *cut):
    """Above, below, up and down of every rank; None where strips do not serve."""

    def run():
        x = st.distribute_tensor(
            torch.zeros(1, 1, sum(cut)), T.make_mesh((len(cut),)), [Shard(2)], sizes={2: cut}
        )
        ((d, _, reach),) = plan(x.spec, ((2, stencil),)).reaches
        found = halo.rims(x.spec, d, stencil, reach)
        return found and tuple(found[:4])

    found = st.simulate(len(cut), run)
    return None if None in found and len(set(found)) == 1 else found


def test_strips_are_as_wide_as_what_is_read():
    both = [(2, 2, 0, 2), (2, 2, 2, 0)]
    assert rims(Stencil(5, 1, 2), 4, 5) == rims(Stencil(5, 1, 2, 1, 2), 4, 5) == both
    assert rims(Stencil(3, 2, 1), 4, 4) == [(1, 0, 0, 1), (1, 0, 0, 0)]
    assert rims(Stencil(3, 2, 1), 5, 7) == [(1, 1, 0, 0), (0, 0, 1, 0)]


UNSERVED = {
    "less behind": (Stencil(3, 1, 1, 1, 0), 4, 5),
    "more behind": (Stencil(3, 1, 1, 1, 2), 4, 5),
    "more ahead than the one before has": (Stencil(5, 1, 2), 1, 8),
    "more behind than the next has": (Stencil(5, 1, 2), 8, 1),
    "fewer outputs than read beyond": (Stencil(7, 2, 2), 5, 2),
    "a shard that begins between kernels": (Stencil(3, 4, 1), 4, 5, 7),
    "an empty shard with an output": (Stencil(3, 2, 2), 0, 5, 4, 9),
    "a shard without outputs": (Stencil(3, 4, 1), 5, 2, 9),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_stencils_that_strips_do_not_serve(name, by_strips):
    stencil, *cut = UNSERVED[name]
    assert rims(stencil, *cut) is None
    if stencil.after is None:
        module = conv(1, 2, stencil.size, stencil.stride, stencil.before, dims="l")
        T.hold(module, [drawn(1, 1, sum(cut))], [T.shard(2, cut)], (len(cut),))
        assert not by_strips


def test_strips_of_one_sample_without_a_batch_and_of_addends(by_strips):
    T.hold(conv(2, 3, 3, padding=1), [drawn(2, 12, 5)], [T.shard(1, (5, 7))], (2,))
    T.hold(conv(2, 3, 3, padding=1, dims="l"), [drawn(2, 12)], [T.shard(1, (5, 7))], (2,))
    module = conv(4, 3, 3, padding=1)
    T.hold(module, [drawn(1, 4, 8, 5)], [T.On([Shard(1), Shard(2)])], (2, 2))
    assert not by_strips


def test_strips_beside_an_empty_shard_of_another_dim(by_strips):
    on = T.On([Shard(2), Shard(3)], {2: (4, 0), 3: (3, 4)})
    T.hold(conv(2, 3, 3, padding=1), [drawn(1, 2, 4, 7)], [on], (2, 2))
    assert by_strips


@pytest.mark.parametrize("wanted", ["weight", "bias", "input"])
def test_strips_where_one_gradient_is_wanted(wanted, by_strips):
    def run():
        mesh, x, w, b = T.make_mesh((3,)), drawn(1, 2, 9, 4), drawn(3, 2, 3, 3), drawn(3)
        given = {"input": x, "weight": w, "bias": b}
        given[wanted].requires_grad_()
        (want,) = torch.autograd.grad(F.conv2d(x, w, b, padding=1).sin().sum(), given[wanted])
        s = st.distribute_tensor(x.detach(), mesh, [Shard(2)]).requires_grad_(x.requires_grad)
        with st.trace() as t:
            y = F.conv2d(s, w, b, padding=1).sin().sum()
            (got,) = torch.autograd.grad(y, s if wanted == "input" else given[wanted])
        T.same(got, want, wanted)
        return [n.collective for n in t.sent].count("halo")

    # back go gradients of strips only where the input has one
    assert st.simulate(3, run) == [2 if wanted == "input" else 1] * 3
    assert by_strips


def test_strips_under_autocast_are_halves(by_strips):
    def run():
        x = st.distribute_tensor(
            drawn(1, 3, 8, 8, dtype=torch.float32), T.make_mesh((2,)), [Shard(2)]
        )
        module = conv(3, 4, 3, padding=1).float()
        with torch.autocast("cpu", torch.bfloat16), st.trace() as t:
            y = module(x)
        assert y.dtype is torch.bfloat16
        return t.bytes

    assert st.simulate(2, run) == [3 * 8 * 2] * 2
    assert by_strips


WRONG = {
    "same with a stride": lambda x: F.conv2d(x, drawn(2, 2, 3, 3), None, 2, "same"),
    "a kernel larger than its input": lambda x: F.conv2d(x, drawn(2, 2, 9, 3), None, 1, 0),
    "a kernel larger, dilated": lambda x: F.conv2d(x, drawn(2, 2, 3, 3), None, 1, 0, (4, 1)),
    "no stride": lambda x: F.conv2d(x, drawn(2, 2, 3, 3), None, 0),
    "no dilation": lambda x: F.conv2d(x, drawn(2, 2, 3, 3), None, 1, 1, (0, 1)),
    "no kernel": lambda x: F.conv2d(x, drawn(2, 2, 0, 3)),
    "negative padding": lambda x: F.conv2d(x, drawn(2, 2, 3, 3), None, 1, -1),
    "too few dims": lambda x: F.conv2d(x[0, 0], drawn(2, 2, 3, 3)),
    "too many dims": lambda x: F.conv2d(x[None], drawn(2, 2, 3, 3)),
    "transposed, no stride": lambda x: F.conv_transpose2d(x, drawn(2, 2, 3, 3), None, 0),
    "transposed, no dilation": lambda x: F.conv_transpose2d(x, drawn(2, 2, 3, 3), dilation=0),
    "transposed, negative padding": lambda x: F.conv_transpose2d(x, drawn(2, 2, 3, 3), None, 1, -1),
    "transposed, output padding": lambda x: F.conv_transpose2d(
        x, drawn(2, 2, 3, 3), None, 2, 1, (2, 0)
    ),
    "transposed, no output": lambda x: F.conv_transpose2d(x, drawn(2, 2, 1, 1), None, 1, (4, 0)),
    "pool: no stride": lambda x: F.max_pool2d(x, 2, (0, 1)),
    "pool: no dilation": lambda x: F.max_pool2d(x, 3, 1, 1, (0, 1)),
    "pool: no kernel": lambda x: F.max_pool2d(x, (0, 2), 1),
    "pool: negative padding": lambda x: F.avg_pool2d(x, 2, 1, -1),
    "pool: padding": lambda x: F.avg_pool2d(x, 2, 1, 2),
    "pool: no output": lambda x: F.max_pool2d(x, 9, 1),
}


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("name", WRONG)
def test_what_torch_refuses_is_refused_before_anything_is_sent(name, dim):
    fn = WRONG[name]
    with pytest.raises((RuntimeError, ValueError)):
        fn(drawn(1, 2, 8, 8))

    def run():
        x = st.distribute_tensor(drawn(1, 2, 8, 8), T.make_mesh((3,)), [Shard(dim)])
        with st.trace() as t, pytest.raises((RuntimeError, ValueError)) as error:
            fn(x)
        assert not isinstance(error.value, st.DivergenceError)
        assert not [n for n in t.sent if n.collective in ("window", "halo")]

    st.simulate(3, run)


def test_what_the_op_of_a_transposed_convolution_is_given_is_what_torch_takes():
    """Padding that a kernel covers, output padding below a stride, whatever the shards."""

    def run():
        mesh, kinds = T.make_mesh((4,)), product((1, 2, 4), (1, 2, 5), (0, 1, 2), (1, 3))
        for (k, s, p, d), cut in product(kinds, T.cuts(7)[-2:]):
            x = st.distribute_tensor(drawn(1, 1, 7), mesh, [Shard(2)], sizes={2: cut})
            if 6 * s - 2 * p + d * (k - 1) + 1 > 0:
                made = transposed(x.spec, (k,), (s,), (p,), (0,), (d,))
                assert made.padding[0] <= d * (k - 1) and 0 <= made.output_padding[0] < max(s, d)

    st.simulate(4, run)


def test_a_sharded_weight_of_groups_and_of_axes_that_shard_the_input():
    x, w, b = drawn(2, 4, 8, 5), drawn(6, 2, 3, 3), drawn(6)
    grouped = lambda x, w, b: F.conv2d(x, w, b, 1, 1, 1, 2)  # noqa: E731
    T.hold(grouped, [x, w, b], [T.shard(2), T.shard(0), None], (2,))
    T.hold(grouped, [x, w, b], [T.replicated(), T.shard(0), None], (2,))
    one = drawn(6, 4, 3, 3)
    T.hold(
        lambda x, w, b: F.conv2d(x, w, b, 1, 1), [x, one, b], [T.shard(2), T.shard(0), None], (2,)
    )
    T.hold(
        lambda x, w, b: F.conv2d(x, w, b, 1, 1), [x, one, b],
        [T.On([Shard(2), Shard(3)]), T.On([Shard(0), Replicate()]), None], (2, 2),
    )  # fmt: skip


@pytest.mark.parametrize("cut", [(3, 9), (1, 10, 0, 1), (2, 2, 8)])
def test_pools_by_strips_fill_with_what_loses(cut, by_strips):
    x = -drawn(2, 2, 12, 4).abs()
    T.hold(lambda x: F.max_pool2d(x, 3, 1, 1), [x], [T.shard(2, cut)], (len(cut),))
    T.hold(lambda x: F.max_pool2d(x, (5, 1), 2, (2, 0)), [x], [T.shard(2, cut)], (len(cut),))


def weighted(x, before, after):
    """Every element's neighbours with weights 1, 2, 3, ...; x: (n, rows)."""
    rows = F.pad(x, (before, after)).unfold(1, before + after + 1, 1)
    return rows @ torch.arange(1.0, before + after + 2, dtype=x.dtype)


@st.rule(weighted)
def weighted_rule(x, before, after):
    size = before + after + 1

    def op(rows, padding=(0,)):
        if padding[0]:
            rows = F.pad(rows, (padding[0], padding[0]))
        return rows.unfold(1, size, 1) @ torch.arange(1.0, size + 1, dtype=x.dtype)

    return sliding(x, {1: Stencil(size, 1, before, 1, after)}, op)


@pytest.mark.parametrize("cut", T.cuts(9))
@pytest.mark.parametrize("before, after", [(2, 0), (0, 3), (3, 1), (1, 1), (2, 1)])
def test_a_stencil_that_reaches_further_to_one_side(cut, before, after):
    """As many rows as there were lie as these did, and padding is the same in whole dims."""
    args = [drawn(2, 9), before, after]
    (spec,) = T.hold(weighted, args, [T.shard(1, cut), None, None], (len(cut),))
    assert spec.sizes == {1: cut}
    T.hold(weighted, args, [T.shard(0), None, None], (2,))


def test_whether_it_pays_is_asked_of_a_shard(monkeypatch):
    monkeypatch.setattr(overlap, "WORTH", 10)

    def run():
        found = []
        for n in (12, 19, 20):
            x = st.distribute_tensor(torch.zeros(n), T.make_mesh((2,)), [Shard(0)])
            found.append(overlap.pays(x.spec))
        return found

    assert st.simulate(2, run) == [[False, False, True]] * 2


OWN = {
    "as wide as the stride": (lambda x: F.conv2d(x, drawn(3, 2, 2, 2), stride=2), (4, 8)),
    "narrower than the stride": (lambda x: F.conv2d(x, drawn(3, 2, 1, 1), stride=2), (4, 8)),
    "zeros only": (lambda x: F.conv2d(x, drawn(3, 2, 3, 3), None, 3, 1), (5, 7)),
    "pool": (lambda x: F.max_pool2d(x, 2), (4, 8)),
}


@pytest.mark.parametrize("name", OWN)
def test_nothing_is_by_strips_where_nobody_reads_others(name, by_strips):
    fn, cut = OWN[name]
    T.hold(fn, [drawn(2, 2, 12, 5)], [T.shard(2, cut)], (2,))

    def run():
        mesh = T.make_mesh((2,))
        x = st.distribute_tensor(drawn(1, 2, 12, 4), mesh, [Shard(2)], sizes={2: cut})
        x.requires_grad_()
        with st.trace() as t:
            fn(x).sum().backward()
        return [n.collective for n in t.sent if n.collective in ("halo", "window", "window_add")]

    assert st.simulate(2, run) == [[]] * 2
    assert not by_strips


def test_nothing_is_by_strips_in_a_graph(by_strips):
    def run():
        x = st.distribute_tensor(drawn(1, 2, 8, 4), T.make_mesh((2,)), [Shard(2)])
        x.requires_grad_()
        w = drawn(3, 2, 3, 3)
        fn = lambda x: F.max_pool2d(F.conv2d(x, w, padding=1), 3, 1, 1)  # noqa: E731
        y = st.compile(fn, backend="aot_eager")(x)
        y.square().sum().backward()
        whole = drawn(1, 2, 8, 4).requires_grad_()
        want = fn(whole)
        want.square().sum().backward()
        T.same(y, want.detach(), "value")
        T.same(x.grad, whole.grad, "gradient")

    st.simulate(2, run)
    assert not by_strips


def test_padding_in_one_shard_is_left_to_the_op():
    def run():
        x = st.distribute_tensor(drawn(1, 1, 6, 6), T.make_mesh((1,)), [Shard(2)])
        made = plan(x.spec, ((2, Stencil(3, 1, 1)),))
        return made.reaches, made.left, F.max_pool2d(x, 3, 1, 1).placements

    assert st.simulate(1, run) == [((), (1,), (Shard(2),))]


def means(x):
    """Of three rows each."""
    return (x[:-2] + x[1:-1] + x[2:]) / 3


@st.rule(means)
def means_rule(x):
    return sliding(x, {0: Stencil(3)}, means)


@pytest.mark.parametrize("cut", [(1, 0), (0, 0, 1), (1, 1), (0, 2), (2, 1), (0, 0)])
def test_fewer_rows_than_a_kernel_has(cut):
    T.hold(means, [drawn(sum(cut), 2)], [T.shard(0, cut)], (len(cut),))
