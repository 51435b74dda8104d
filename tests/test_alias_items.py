"""Rows and items of one memory along the cut: writes to some of them, other dtypes, what overlaps."""

import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

D = torch.float64
X = torch.arange(21, dtype=D).reshape(7, 3).sin()


def other_rows_added(x):
    x[:3] += x[4:]
    x[:, :1] -= x[:, 2:]
    x[:2].mul_(x[2:4])
    x[::2] += x[1::2].sum(0)
    x[1::2] += x[:6:2]
    x[-1:] += x[:1]
    return x


def other_items(x):
    y = torch.cat([x, x[:, :1]], 1)
    wide, narrow = y.view(torch.complex128), y.view(torch.float32)
    rows, flat = y[1:].view(torch.complex128), y.flatten().view(torch.complex128)
    return wide, narrow, rows * 2, flat, narrow.view(D), y[:, 2:].view(torch.int16)


def whole_items_written(x):
    x.view(torch.int32).zero_()
    return x, x.view(torch.uint8)


def expanded(x):
    b = x.unsqueeze(-1).expand(7, 3, 2)
    b.zero_()
    b[..., 0] = x + 1
    return x, b


def row_of_hidden(x):
    part, r = x[..., 0].chunk(2)[0], x[-1]
    r.data.add_(1)
    return part, r, x


@pytest.mark.parametrize(
    "fn", [other_rows_added, other_items, whole_items_written, expanded, row_of_hidden]
)
@pytest.mark.parametrize("cut", [(7,), (4, 3), (1, 6), (0, 5, 2), (3, 0, 4, 0)])
@pytest.mark.parametrize("grad", [False, True])
def test_right_along_cut_rows(fn, cut, grad):
    def run(x):
        a = x * 1
        if not grad or fn is not other_rows_added:
            return (*T.tensors(fn(a)), x)
        a[:3] += a[4:]
        a[-1:] -= a[:1]
        (a * a).sum().backward()
        return a, x.grad

    want = run(X.clone().requires_grad_(grad))

    def on_rank():
        x = st.distribute_tensor(
            X, T.make_mesh((len(cut),)), [Shard(0)], src_data_rank=None, sizes={0: cut}
        )
        for g, w in zip(run(x.requires_grad_(grad)), want, strict=True):
            T.same(g, w, fn.__name__)

    st.simulate(len(cut), on_rank)


@pytest.mark.parametrize("cut", [(4,), (2, 2), (1, 3), (0, 4), (1, 1, 2), (3, 0, 1)])
def test_items_of_another_size_along_the_cut(cut):
    x = torch.arange(12, dtype=D).reshape(3, 4).cos()

    def run():
        mesh = T.make_mesh((len(cut),))
        y = st.distribute_tensor(x, mesh, [Shard(1)], src_data_rank=None, sizes={1: cut})
        for dtype in (torch.complex128, torch.float32, torch.uint8):
            T.same(y.view(dtype), x.view(dtype), str(dtype))
            T.same(y[:, 2:].view(dtype), x[:, 2:].view(dtype), str(dtype))
        T.same(y.view(torch.uint8).view(D), x, "there and back")
        T.same(y[:, :0].view(torch.complex128), x[:, :0].view(torch.complex128), "nothing")
        for wrong in (y.t(), y[:, 1:], y[:, 1:3], y[:, ::2]):
            with pytest.raises(RuntimeError, match=r"divisible|dense|must be 1"):
                wrong.view(torch.complex128)

    st.simulate(len(cut), run)


def unfolded(x):
    x.t().unfold(0, 2, 1)[[0, 1]] = 0


def unfolded_added(x):
    x.t().unfold(0, 2, 1).add_(1)


def row_of_expanded(x):
    for row in x.unsqueeze(-1).expand(7, 3, 2):
        row += 1


def same_rows_in_part(x):
    x[1:] += x[:-1]


def turned_without_gradients(x):
    with torch.no_grad():
        x.t_()


def squeezed_without_gradients(x):
    row = x[:1]
    with torch.no_grad():
        row.squeeze_()


@pytest.mark.parametrize(
    "fn",
    [
        unfolded, unfolded_added, row_of_expanded, same_rows_in_part, turned_without_gradients,
        squeezed_without_gradients,
    ],
)  # fmt: skip
@pytest.mark.parametrize("cut", [(4, 3), (0, 7), (2, 5, 0)])
def test_shared_elements_are_refused_alike(fn, cut):
    def run():
        x = st.distribute_tensor(
            X, T.make_mesh((len(cut),)), [Shard(0)], src_data_rank=None, sizes={0: cut}
        )
        with pytest.raises((st.UnsupportedOpError, RuntimeError), match=r"share|no_grad|single"):
            fn(x.requires_grad_("without" in fn.__name__) * 1)
        return (x * 1).sum().item()

    assert len(set(st.simulate(len(cut), run))) == 1


@pytest.mark.parametrize("name", ["index_fill_", "masked_fill_", "index_put_", "copy_"])
def test_what_torch_only_warns_of_is_refused(name):
    def run():
        x = st.distribute_tensor(X, T.make_mesh((2,)), [Shard(0)], src_data_rank=None)
        same = x.unsqueeze(-1).expand(7, 3, 2)
        call = {
            "index_fill_": lambda: same.index_fill_(0, torch.tensor([2]), 0),
            "copy_": lambda: same[0].copy_(same[0]),
            "masked_fill_": lambda: same.masked_fill_(same > 0, 0),
            "index_put_": lambda: same.index_put_((torch.tensor([2]),), torch.tensor(0.0).double()),
        }[name]
        with pytest.raises(st.UnsupportedOpError, match=f"{name} on .* whose elements share"):
            call()

    st.simulate(2, run)


def complex_rows_written(x):
    """Numbers that share memory with their real parts."""
    c = torch.view_as_complex(x.view(5, 3, 2))
    c[1].mul_(2j)
    a, b = c[2], c[-1]
    b.copy_(a)
    a.add_(1j)
    c[0:1].squeeze(0).imag.mul_(3)
    return x, c.abs()


def real_rows_written(x):
    c = torch.complex(x, 2 * x)
    c.real[1].mul_(2)
    c.imag[2].add_(1)
    torch.view_as_real(c)[-1].mul_(3)
    torch.view_as_real(c[0]).add_(1)
    c.conj()[2].mul_(2j)
    c.mT.real[:, 3].sin_()
    return torch.view_as_real(c)


def rows_of_other_items_written(x):
    y = x.detach()
    long, narrow = y.view(torch.int64), y.view(torch.float32)
    long[1].add_(4)
    narrow[-1].fill_(1)
    y[2].view(torch.int16)[..., 0] = 5
    return y


@pytest.mark.parametrize(
    "fn", [complex_rows_written, real_rows_written, rows_of_other_items_written]
)
@pytest.mark.parametrize("cut", [(5,), (2, 3), (1, 4, 0), (0, 3, 0, 2)])
def test_rows_written_in_another_dtype(fn, cut):
    x = torch.arange(30, dtype=D).reshape(5, 6).sin()
    T.hold(lambda x: fn(x * 1), [x], [T.shard(0, cut)], (len(cut),))
