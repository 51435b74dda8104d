"""Strides of the whole, where shards of one row, or gaps of some ranks, do not show them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, same, simulate

LAST = torch.channels_last
X = torch.linspace(-1, 1, 3 * 4 * 2 * 5, dtype=torch.float64).reshape(3, 4, 2, 5)


def image(x):
    return x.contiguous(memory_format=LAST)


WAYS = {
    "transpose": lambda x: x.transpose(0, 1),
    "then an op": lambda x: x.transpose(0, 1) * 2,
    "then two": lambda x: (x.permute(3, 0, 2, 1).exp() + 1).mT,
    "of two": lambda x: x.permute(2, 1, 0, 3) + x.permute(2, 1, 0, 3),
    "clone": lambda x: x.mT.clone(),
    "detach": lambda x: (x.transpose(0, 3) * 2).detach().clone(),
    "data": lambda x: (x.transpose(0, 3) * 2).data + 1,
    "like": lambda x: torch.zeros_like(x.permute(1, 2, 3, 0)),
    "channels last": lambda x: x.contiguous(memory_format=LAST) + 1,
    "to channels last": lambda x: x.to(memory_format=LAST).relu(),
    "like channels last": lambda x: torch.empty_like(x, memory_format=LAST).zero_(),
    "rows": lambda x: x[1:],
    "columns": lambda x: x[:, 1:3],
    "columns of columns": lambda x: x[:, 1:][..., 1:3],
    "steps": lambda x: x[:, ::2],
    "turned columns": lambda x: x[:, :, 1:].transpose(0, 2) * 2,
    "split": lambda x: x.split(2, 1)[1],
    "chunk": lambda x: x.chunk(2, 3)[0].transpose(0, 3),
    "select": lambda x: x.transpose(1, 3)[:, 0],
    "unbind": lambda x: x.permute(2, 3, 0, 1).unbind(0)[1],
    "diagonal": lambda x: x.flatten(1).diagonal(),
    "unfold": lambda x: x.unfold(1, 2, 1),
    "expand": lambda x: x[:, :1].expand(-1, 3, -1, -1).transpose(0, 1),
    "squeeze": lambda x: x[:, 1:2].transpose(0, 3).squeeze(),
    "padded": lambda x: F.pad(x.transpose(0, 3) * 2, (1, 1)),
    "padded in channels last": lambda x: F.pad(x.contiguous(memory_format=LAST), (0, 0, 1, 0)),
    "in place": lambda x: x.clone().transpose_(0, 1).unsqueeze_(2).sin(),
    "contiguous": lambda x: x.transpose(0, 1).contiguous(),
    "softmax": lambda x: x.transpose(0, 1).softmax(-1),
    "sum": lambda x: x.permute(1, 3, 0, 2).sum(-1),
    "where": lambda x: torch.where(x.mT > 0, x.mT, 0),
    "cat": lambda x: torch.cat([x.mT, x.mT]),
    "conv": lambda x: torch.conv2d(x.contiguous(memory_format=LAST), x.new_ones(2, 4, 1, 1)),
    "matmul": lambda x: x.transpose(0, 1) @ x.new_ones(5, 2),
    "einsum of a row": lambda x: torch.einsum("...ik,...j->ij", x[:1, :, 0], x.new_ones(3)),
    "einsum": lambda x: torch.einsum("abcd->dcab", x),
    "slices into a plain tensor": lambda x: x.new_ones(3, 4, 2, 5).slice_scatter(x[:, :1], 1, 0, 1),
    "tensor_split": lambda x: x.tensor_split(3, 1)[1],
    "picked": lambda x: x.transpose(0, 1)[:, [2, 0]],
    "roll": lambda x: x.permute(2, 0, 3, 1).roll((1, 2), (1, 3)),
    "rolled around": lambda x: x.permute(2, 0, 3, 1).roll((20, 60), (1, 3)),
    "the last of each row": lambda x: x.select(-1, -1),
    "a row of all": lambda x: x.unbind(3)[1],
    "rolled image": lambda x: x.contiguous(memory_format=LAST).roll(1, 2),
    "flip": lambda x: x.permute(2, 0, 3, 1).flip(1, 3),
    "diff": lambda x: x.transpose(0, 1).diff(dim=3),
    "diff of a turned dim": lambda x: x.permute(3, 2, 1, 0).diff(dim=2),
    "group_norm": lambda x: F.group_norm(x.transpose(1, 3), 1),
    "group_norm of an image": lambda x: F.group_norm(x.contiguous(memory_format=LAST), 2),
    "conv of columns": lambda x: torch.conv2d(image(x)[:, :2], x.new_ones(2, 2, 1, 1)),
    "group_norm of columns": lambda x: F.group_norm(image(x)[:, :2], 2),
    "pooled columns": lambda x: F.avg_pool2d(image(x)[:, 1:3], (1, 2)),
    "diff of columns": lambda x: image(x)[:, 1:].diff(dim=3),
    "shuffled steps": lambda x: F.channel_shuffle(x[:, ::2], 2),
    "copied": lambda x: x.mT.index_copy(2, torch.tensor([0, 1]), x.mT[:, :, :2]),
    "scattered": lambda x: x.mT.scatter_add(2, torch.zeros(3, 4, 5, 2).long(), x.mT),
    "put": lambda x: x.mT.put(torch.tensor([0, 3]), x.new_ones(2)),
    "renorm": lambda x: x.transpose(0, 1).renorm(2, 0, 1),
    "narrow_copy": lambda x: x.transpose(0, 1).narrow_copy(3, 1, 2),
    "turned by four": lambda x: x.transpose(0, 1).rot90(4),
    "split at numbers in a tensor": lambda x: x.tensor_split(torch.tensor([1, 3]), 1)[1],
    "in doubles": lambda x: x[:, ::2].double(memory_format=LAST),
    "places": lambda x: (x.transpose(0, 1) > -9).nonzero(),
    "with a turned plain one": lambda x: torch.ones(3, 5, 4, dtype=x.dtype).mT * x[:, :, 0],
    "raveled steps": lambda x: x[..., ::2].ravel(),
    "as it is": lambda x: x[:, 1:].conj_physical(),
    "from a number in a tensor": lambda x: x.narrow(1, torch.tensor(1), 2),
    "with what moves": lambda x: x[:2, :2].permute(2, 0, 1, 3) + x[:2, :2].permute(0, 1, 2, 3),
    "steps joined": lambda x: x[..., ::2].view(12, 2, 3),
    "steps joined, as another": lambda x: x[..., ::2].view_as(x.new_ones(12, 2, 3)),
    "a copy as a view": lambda x: torch.view_copy(x.mT, (3, -1)),
    "on a diagonal": lambda x: torch.diag_embed(x.mT, 1, 1, 2),
    "signs": lambda x: x.copysign(x.transpose(0, 1).reshape(3, 2, 5, 4).permute(0, 3, 1, 2)),
    "fft": lambda x: torch.fft.fft(x, dim=1),
    "fft of two dims": lambda x: torch.fft.fftn(x, dim=(0, 2)),
    "rfft": lambda x: torch.fft.rfft(x, dim=0),
    "rfft of a turned one": lambda x: torch.fft.rfft(x.transpose(0, 1)),
    "irfft": lambda x: torch.fft.irfft(torch.fft.rfft2(x, dim=(0, 3)), dim=2),
    "hfft": lambda x: torch.fft.hfft(x, dim=1),
    "reflectors": lambda x: torch.geqrf(x.flatten(1))[0],
    "reshape": lambda x: x.transpose(0, 1).reshape(4, -1),
    "view": lambda x: x.transpose(0, 1).unsqueeze(0).flatten(2, 3),
}  # fmt: skip
CUTS = [
    (0, (1, 1, 1)),
    (0, (2, 0, 1)),
    (1, (1, 3)),
    (1, (2, 2)),
    (2, (1, 1)),
    (3, (1, 1, 2, 1)),
    (3, (2, 3)),
]


def seen(x):
    """What is alike on all devices: strides of dims of more than one row."""
    long = [s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1]
    return long, x.is_contiguous(), x.ndim == 4 and x.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("dim, sizes", CUTS)
def test_strides_are_those_of_one_device(dim, sizes):
    def run():
        s = st.distribute_tensor(
            X, make_mesh((len(sizes),)), [Shard(dim)], src_data_rank=None, sizes={dim: sizes}
        )
        for name, way in WAYS.items():
            got, want = way(s), way(X)
            assert seen(got) == seen(want), (name, got.stride(), want.stride())
            same(got, want, name)

    simulate(len(sizes), run)


@pytest.mark.parametrize("sizes", [(3, 2), (0, 5), (1, 4)])
def test_a_dim_of_one_row_tells_nothing_of_the_others(sizes):
    """Its own stride may be any."""
    part = X.contiguous(memory_format=LAST)[:, 1:2].detach().requires_grad_()
    (part * part).sum().backward()

    def run():
        s = st.distribute_tensor(
            image(X), make_mesh((2,)), [Shard(3)], src_data_rank=None, sizes={3: sizes}
        )
        p = s[:, 1:2].detach().requires_grad_()
        (p * p).sum().backward()
        assert seen(p.grad)[0] == seen(part.grad)[0]

    simulate(2, run)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (0, 2, 1)])
def test_a_view_as_another_is_no_copy(sizes):
    def run():
        s = st.distribute_tensor(
            X, make_mesh((3,)), [Shard(0)], src_data_rank=None, sizes={0: sizes}
        )
        for x in (X, s):
            with pytest.raises(RuntimeError, match="view size is not compatible"):
                x.transpose(0, 1).view_as(x.flatten())
            same(x.transpose(0, 1).reshape_as(x.flatten()), X.transpose(0, 1).flatten(), "copied")

    simulate(3, run)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (0, 2, 1)])
def test_what_is_pickled_keeps_the_order_of_its_dims(sizes):
    def run():
        s = st.distribute_tensor(
            X, make_mesh((3,)), [Shard(0)], src_data_rank=None, sizes={0: sizes}
        )
        for way in (lambda x: x.permute(3, 0, 2, 1), image, lambda x: x.mT[1:]):
            got, want = pickle.loads(pickle.dumps(way(s))), way(X).clone()
            assert seen(got) == seen(want)
            same(got, want, "pickled")

    simulate(3, run)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (0, 2, 1)])
def test_what_torch_gives_as_it_is_is_no_copy(sizes):
    x = X[:, :1]
    ways = {
        "last": lambda x: x.contiguous(memory_format=LAST),
        "to": lambda x: x.to(memory_format=LAST),
        "rows": lambda x: x.contiguous(),
        "turned": lambda x: x.transpose(0, 1).contiguous(),
    }
    x = x.contiguous()

    def run():
        s = st.distribute_tensor(
            x, make_mesh((3,)), [Shard(0)], src_data_rank=None, sizes={0: sizes}
        )
        for way in ways.values():
            plain, own = x.clone(), s.clone()
            want, got = way(plain), way(own)
            assert (got is own) == (want is plain)
            same(got.add_(1), want.add_(1), "written")
            same(own, plain, "the tensor itself")

    simulate(3, run)


def test_what_only_moves_keeps_its_strides():
    def run():
        s = st.distribute_tensor(X, make_mesh((2,)), [Shard(1)], src_data_rank=None)
        y = s.transpose(0, 1).redistribute(placements=[Shard(2)])
        assert seen(y) == seen(X.transpose(0, 1))
        same(y.reshape(4, -1), X.transpose(0, 1).reshape(4, -1), "reshaped")
        last = X.contiguous(memory_format=LAST)
        s = st.distribute_tensor(last, make_mesh((2,)), [Shard(2)])
        assert seen(s) == seen(last) and seen(s * 2) == seen(last)

    simulate(2, run)


@pytest.mark.parametrize("change", [lambda x: x.transpose_(0, 1), lambda x: x.unsqueeze_(0)])
def test_a_leaf_that_is_refused_lies_as_before(change):
    def run():
        s = st.distribute_tensor(X, make_mesh((3,)), [Shard(0)]).requires_grad_()
        with pytest.raises(RuntimeError, match="leaf Variable"):
            change(s)
        assert s.stride() == X.stride() and s.is_contiguous()

    simulate(3, run)


@pytest.mark.parametrize("sizes", [(0, 3), (2, 1), (0, 1, 2)])
def test_writes_to_expanded_rows_raise_alike(sizes):
    def fail(x):
        y = x[..., None].expand(*x.shape, 2)
        for index in (0, slice(1), (slice(None), 1), [1, 0]):
            with pytest.raises(RuntimeError, match=r"single memory|share memory"):
                y[index] = 0.5

    def run():
        x = X[:, :, 0, 0].clone()
        fail(
            st.distribute_tensor(
                x, make_mesh((len(sizes),)), [Shard(0)], src_data_rank=None, sizes={0: sizes}
            )
        )

    simulate(len(sizes), run)


def squeezed_in_place(x):
    y = x[:1]
    y.squeeze_(0)
    y.add_(1)
    return x, y


def turned_before_a_row_is_written(x):
    rows = x.unbind(0)
    x.t_()
    rows[1].zero_()
    return x


@pytest.mark.parametrize("fn", [squeezed_in_place, turned_before_a_row_is_written])
@pytest.mark.parametrize("sizes", [(2, 2), (4, 0), (1, 3)])
def test_rows_are_written_back_to_what_was_turned_in_place(fn, sizes):
    square = X.reshape(-1)[:16].reshape(4, 4)
    want = fn(square.clone())

    def run():
        s = st.distribute_tensor(
            square, make_mesh((2,)), [Shard(0)], src_data_rank=None, sizes={0: sizes}
        )
        try:
            got = fn(s)
            wanted = want if isinstance(want, tuple) else (want,)
            for g, w in zip(got if isinstance(got, tuple) else (got,), wanted, strict=True):
                same(g, w, fn.__name__)
        except st.UnsupportedOpError as e:
            assert fn is squeezed_in_place and "read after" in str(e), e

    simulate(2, run)


# what is a part of more on some rank, or was made with another dim first
PARTS = {
    "resized": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "resized by half": lambda x: F.interpolate(x, scale_factor=0.5, mode="bicubic"),
    "summed": lambda x: x.cumsum(2),
    "in logs": lambda x: x.logcumsumexp(2),
    "largest": lambda x: x.cummax(2)[0],
    "unpooled": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "selected": lambda x: x.index_select(2, torch.arange(0, 24, 3)),
    "indexed": lambda x: x[:, :, torch.arange(0, 24, 3)],
    "gathered": lambda x: x.gather(2, torch.zeros(x.shape, dtype=torch.long)),
    "added": lambda x: x.index_add(2, torch.tensor([0, 1]), torch.ones(2, 4, 2, 8)),
    "scattered": lambda x: x.scatter(2, torch.zeros(2, 4, 1, 8, dtype=torch.long), 1.0),
    "by rows": lambda x: x.scatter_add(2, torch.zeros(2, 4, 1, 8).long(), torch.ones(2, 4, 1, 8)),
    "filled": lambda x: x.index_fill(2, torch.tensor([0, 5]), 1.0),
    "padded": lambda x: F.pad(x.mT.contiguous().mT, (0, 0, 1, 1)),
    "powers": lambda x: torch.pow(2.0, x.mT.contiguous().mT),
    "powers by the operator": lambda x: 2.0 ** x.mT.contiguous().mT,
    "powers by name": lambda x: torch.float_power(self=2.0, exponent=x.mT.contiguous().mT),
    "divided": lambda x: x.contiguous(memory_format=LAST).div(2, rounding_mode="floor")[:, 0],
}


@pytest.mark.parametrize("sizes", [(8, 8, 8), (4, 0, 20), (10, 14), (1, 12, 11)], ids=str)
@pytest.mark.parametrize("name", PARTS)
def test_results_lie_alike_on_all_ranks_and_are_viewed_as_plain_ones(name, sizes):
    whole = torch.randn(2, 4, 24, 8, generator=torch.Generator().manual_seed(0))
    want = PARTS[name](whole)

    def run():
        mesh = make_mesh((len(sizes),))
        x = st.distribute_tensor(whole, mesh, [Shard(2)], src_data_rank=None, sizes={2: sizes})
        y = PARTS[name](x)
        same(y.view(-1), want.view(-1), name)
        same(y.view(2, 4, -1), want.view(2, 4, -1), name)
        return y.stride()

    assert set(st.simulate(len(sizes), run)) == {want.stride()}


@pytest.mark.parametrize("sizes", [(1, 0), (0, 1), (0, 1, 0)], ids=str)
def test_one_channel_is_joined_as_it_lies(sizes):
    """It is dense with the channels last, too."""
    whole = torch.randn(2, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    want = torch.cat([whole] * 6, 1)

    def run():
        x = st.distribute_tensor(
            whole, make_mesh((len(sizes),)), [Shard(1)], src_data_rank=None, sizes={1: sizes}
        )
        y = torch.cat([x] * 6, 1)
        same(y.view(2, -1), want.view(2, -1), sizes)
        return y.stride()

    assert set(st.simulate(len(sizes), run)) == {want.stride()}


# views and new tensors; how far into its memory each begins on one device
BEGIN = {
    "new": lambda x: x * 2,
    "itself": lambda x: x,
    "turned": lambda x: x.t(),
    "joined": lambda x: x.reshape(-1),
    "reshaped": lambda x: x.reshape(4, 12),
    "after a slice of it": lambda x: (x[2:], x.t())[1],
    "of a slice": lambda x: x[2:] * 1,
    "a slice": lambda x: x[2:],
    "columns": lambda x: x[:, 3:],
    "a row": lambda x: x.select(0, 4),
    "a part": lambda x: x.split(3)[1],
    "one of all": lambda x: x.unbind(1)[2],
    "a diagonal": lambda x: x.diagonal(1),
    "a diagonal, by names": lambda x: torch.diagonal(offset=1, input=x),
    "a part, by names": lambda x: torch.chunk(chunks=2, input=x)[1],
    "a turned slice": lambda x: x[:, 3:].t(),
    "a slice joined": lambda x: x[2:].reshape(-1),
    "a slice of what was reshaped": lambda x: x.reshape(4, 12)[1:],
    "a slice without history": lambda x: x[3:].detach(),
    "an expanded row": lambda x: x[3:4].expand(6, 8),
    "imaginary parts": lambda x: torch.complex(x, x).imag,
    "a copy of all memory": lambda x: copy.deepcopy(x * 1),
    "a copy of a slice and its memory": lambda x: copy.deepcopy(x[2:]),
    "a copy of columns and their memory": lambda x: copy.deepcopy(x.chunk(2, 1)[1]),
    "a copy of what was reshaped and sliced": lambda x: copy.deepcopy(x.reshape(4, 12)[1:]),
    "a copy beside its slice": lambda x: copy.deepcopy((x, x[2:]))[1],
    "a row of a transform": lambda x: torch.fft.fft2(x)[2:],
    "a row of a transform without history": lambda x: torch.fft.fft2(x)[2:].detach(),
    "a copy of a row of a transform": lambda x: copy.copy(torch.fft.rfft(x, dim=0)[1:]),
}


@pytest.mark.parametrize("name", BEGIN)
def test_where_a_tensor_begins_is_known_or_refused(name):
    whole = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    want = BEGIN[name](whole)

    def run(sizes):
        x = st.distribute_tensor(
            whole, make_mesh((len(sizes),)), [Shard(0)], src_data_rank=None, sizes={0: sizes}
        )
        y = BEGIN[name](x)
        try:
            known = y.storage_offset()
        except st.UnsupportedOpError:
            known = None
        try:
            begin = y.as_strided((2,), (1,), 0).full_tensor()
        except st.UnsupportedOpError:
            begin = None
        if begin is not None:
            torch.testing.assert_close(begin, want.as_strided((2,), (1,), 0))
        return known

    for sizes in ((3, 3), (2, 0, 4), (6, 0)):
        known = 0 if want.storage_offset() == 0 else None
        assert set(st.simulate(len(sizes), run, sizes)) == {known}
