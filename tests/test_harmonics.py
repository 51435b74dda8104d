"""The kernels of torch-harmonics 0.9 on shards: tables in parts, latitudes by halo.

Where the package is not installed, its kernels are those of harmonics_kernels.
"""

import harmonics_kernels as kernels
import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ops.harmonics import attention, convolution
from shardtensor.ranks.testing import make_mesh, simulate

kernels.define()
convolution._register(None)
attention._register(None)
DISCO, ATTENTION = torch.ops.disco_kernels, torch.ops.attention_kernels
D = torch.float64
# (mesh, dims that its axes cut, sizes of the latitudes)
LAYOUTS = {
    "even": ((2,), (0,), None),
    "uneven": ((3,), (0,), lambda n: (n - 3, 1, 2)),
    "empty": ((4,), (0,), lambda n: (2, 0, n - 2, 0)),
    "longitudes": ((3,), (1,), None),
    "both": ((2, 2), (0, 1), lambda n: (n - 3, 3)),
    "nested": ((2, 2), (0, 0), None),
}


def seen(lat_out, lat_in, lon_in, filters, generator, skip=()):
    """Tables of a filter on a sphere: some latitudes beside, circles that get wide at the poles."""
    entries = []
    for k in range(filters):
        for h in range(lat_out):
            middle = h * lat_in // lat_out
            near = range(max(0, middle - 1), min(lat_in, middle + 2)) if h not in skip else ()
            for i in near:
                wide = lon_in if i in (0, lat_in - 1) else 2 + k
                turn = int(torch.randint(lon_in, (), generator=generator))
                entries += sorted((k, h, i * lon_in + (w + turn) % lon_in) for w in range(wide))
    ker, row, col = torch.tensor(entries).T.contiguous()
    _, counts = torch.unique_consecutive(ker * lat_out + row, return_counts=True)
    roff = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return (
        roff,
        ker.contiguous(),
        row.contiguous(),
        col.contiguous(),
        torch.rand(len(col), dtype=D, generator=generator),
    )


def arcs(roff, col, width):
    """The columns of each row as (latitude, first longitude, how many)."""
    found, ends = [], [0]
    for a, b in zip(roff[:-1].tolist(), roff[1:].tolist(), strict=True):
        rows = {}
        for c in col[a:b].tolist():
            rows.setdefault(c // width, set()).add(c % width)
        for h, on in sorted(rows.items()):
            starts = [w for w in on if (w - 1) % width not in on] or [0]
            for w in sorted(starts):
                n = next(n for n in range(1, width + 1) if n == width or (w + n) % width not in on)
                found.append((h, w, n))
        ends.append(len(found))
    return torch.tensor(found, dtype=torch.int32).reshape(-1, 3), torch.tensor(
        ends, dtype=torch.int32
    )


def on_ranks(op, xs, lat, layout, *rest):
    """Outputs and gradients of the operands, whole; no op gathers behind the scenes."""
    shape, cut, sizes = layout
    mesh = make_mesh(shape)
    own = []
    for x in xs:
        at = None if sizes is None else {lat: sizes(x.shape[lat])}
        placements = [Shard(lat + c) for c in cut]
        own.append(st.distribute_tensor(x, mesh, placements, sizes=at, src_data_rank=None))
        own[-1].requires_grad_()
    with st.fallback("error"):
        y = op(*own, *rest)
    assert isinstance(y, st.ShardTensor) and all(p.is_shard() for p in y.placements)
    whole = y.full_tensor()
    (whole * weights(whole)).sum().backward()
    return [whole.detach(), *[x.grad.full_tensor() for x in own]]


def weights(y):
    return torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)


def same_as_plain(op, xs, lat, layout, *rest):
    plain = [x.clone().requires_grad_() for x in xs]
    y = op(*plain, *rest)
    (y * weights(y)).sum().backward()
    want = [y.detach(), *[x.grad for x in plain]]
    shape = layout[0]
    for got in simulate(int(torch.tensor(shape).prod()), on_ranks, op, xs, lat, layout, *rest):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out", [(9, 8), (5, 4)])
def test_convolution(layout, out, generator):
    tables = seen(out[0], 9, 8, 2, generator)
    x = torch.randn(2, 3, 9, 8, dtype=D, generator=generator)
    op = DISCO._disco_s2_contraction_optimized
    same_as_plain(op, [x], 2, LAYOUTS[layout], *tables, 2, *out)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("into", [(9, 8), (5, 4)])
def test_adjoint(layout, into, generator):
    tables = seen(into[0], 9, 8, 2, generator)
    x = torch.randn(2, 3, 2, *into, dtype=D, generator=generator)
    op = DISCO._disco_s2_transpose_contraction_optimized
    same_as_plain(op, [x], 3, LAYOUTS[layout], *tables, 2, 9, 8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_latitudes_that_see_nothing(layout, generator):
    tables = seen(9, 9, 8, 2, generator, skip=range(5))
    x = torch.randn(1, 2, 9, 8, dtype=D, generator=generator)
    op = DISCO._disco_s2_contraction_optimized
    same_as_plain(op, [x], 2, LAYOUTS[layout], *tables, 2, 9, 8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grids", [((9, 8), (9, 8)), ((9, 8), (5, 4)), ((5, 4), (9, 8))])
def test_attention(layout, grids, generator):
    """Of a grid to itself, to a coarser one, and to a finer one, whose table is turned."""
    into, out = grids
    few, many = sorted(grids)
    roff, _, _, col, _ = seen(few[0], many[0], many[1], 1, generator)
    table = (col, roff, *arcs(roff, col, many[1]))
    k, v, q = (
        torch.randn(2, *g, c, dtype=D, generator=generator)
        for g, c in ((into, 4), (into, 6), (out, 4))
    )
    quadrature = torch.rand(into[0], dtype=D, generator=generator) + 0.1
    op = ATTENTION._neighborhood_s2_attention_optimized
    same_as_plain(op, [k, v, q], 1, LAYOUTS[layout], quadrature, *table, 2, into[1], *out)


def with_graph(op, xs, lat, layout, *rest):
    """Whether gradients that are to be differentiated again have a graph."""
    shape, cut, sizes = layout
    placements = [Shard(lat + c) for c in cut]
    own = []
    for x in xs:
        at = None if sizes is None else {lat: sizes(x.shape[lat])}
        x = st.distribute_tensor(x, make_mesh(shape), placements, sizes=at, src_data_rank=None)
        own.append(x.requires_grad_())
    y = op(*own, *rest)
    grads = torch.autograd.grad(y.square().sum(), own, create_graph=True)
    if all(g.requires_grad for g in grads):
        sum(g.square().sum() for g in grads).backward()
    return [g.requires_grad for g in grads]


@pytest.mark.parametrize("kind", ["convolution", "adjoint", "attention"])
def test_ranks_without_latitudes_record_what_others_do(kind, generator):
    roff, ker, row, col, vals = seen(9, 9, 8, 1, generator)
    tables = roff, ker, row, col, vals, 1, 9, 8
    if kind == "convolution":
        xs, lat, rest = [torch.randn(1, 2, 9, 8, dtype=D)], 2, tables
        op = DISCO._disco_s2_contraction_optimized
    elif kind == "adjoint":
        xs, lat, rest = [torch.randn(1, 2, 1, 9, 8, dtype=D)], 3, tables
        op = DISCO._disco_s2_transpose_contraction_optimized
    else:
        xs, lat = [torch.randn(1, 9, 8, 4, dtype=D) for _ in range(3)], 1
        rest = (torch.ones(9, dtype=D), col, roff, *arcs(roff, col, 8), 2, 8, 9, 8)
        op = ATTENTION._neighborhood_s2_attention_optimized
    found = simulate(4, with_graph, op, xs, lat, LAYOUTS["empty"], *rest)
    assert all(f == found[0] for f in found)


def learned(x, weight, *rest):
    return DISCO._disco_s2_fused_conv_optimized(x, weight, *rest)


def fused(layout, x, weight, *rest):
    shape, cut, sizes = layout
    mesh = make_mesh(shape)
    at = None if sizes is None else {2: sizes(x.shape[2])}
    own = st.distribute_tensor(x, mesh, [Shard(2 + c) for c in cut], sizes=at, src_data_rank=None)
    own, weight = own.requires_grad_(), weight.clone().requires_grad_()
    with st.fallback("error"):
        y = learned(own, weight, *rest).full_tensor()
        (y * weights(y)).sum().backward()
    return y.detach(), own.grad.full_tensor(), weight.grad


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_with_its_weights(layout, generator):
    tables = seen(9, 9, 8, 2, generator)
    none = [torch.zeros(0, dtype=torch.int64)] * 5 + [torch.zeros(0, dtype=D)]
    x = torch.randn(2, 6, 9, 8, dtype=D, generator=generator)
    weight = torch.randn(3, 2, 2, 2, dtype=D, generator=generator)
    rest = (*tables, *none, 2, 9, 8, 3, 2)
    plain, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = kernels.fused(plain, w, *rest)
    (y * weights(y)).sum().backward()
    ranks = int(torch.tensor(LAYOUTS[layout][0]).prod())
    for got in simulate(ranks, fused, LAYOUTS[layout], x, weight, *rest):
        for g, want in zip(got, (y.detach(), plain.grad, w.grad), strict=True):
            torch.testing.assert_close(g, want, rtol=1e-9, atol=1e-9)


def packed(layout, x, *rest):
    shape, cut, sizes = layout
    at = None if sizes is None else {2: sizes(x.shape[2])}
    placements = [Shard(2 + c) for c in cut]
    own = st.distribute_tensor(x, make_mesh(shape), placements, sizes=at, src_data_rank=None)
    with st.fallback("error"):
        return DISCO.forward_kpacked(own, *rest).full_tensor()


@pytest.mark.skipif(not kernels.LIBRARY, reason="the package's own runs on GPUs only")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_entries_with_all_filters(layout, generator):
    roff, _, _, col, _ = seen(9, 9, 8, 1, generator)
    at = torch.stack([col // 8, col % 8], 1)
    vals = torch.rand(len(col), 3, dtype=D, generator=generator)
    x = torch.randn(2, 3, 9, 8, dtype=D, generator=generator)
    rest = at, vals, roff, 3, 9, 8
    want = kernels.of_packed(x, *rest)
    ranks = int(torch.tensor(LAYOUTS[layout][0]).prod())
    for got in simulate(ranks, packed, LAYOUTS[layout], x, *rest):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def sent(x, *rest):
    own = st.distribute_tensor(x, make_mesh((4,)), [Shard(2)], src_data_rank=None)
    op = DISCO._disco_s2_contraction_optimized
    op(own, *rest)
    with st.trace() as record:
        op(own, *rest)
    return [(e.op, e.bytes) for e in record.sent]


def test_latitudes_beside_are_sent_and_no_more(generator):
    """The tables are looked through once; a rank between two others sends a latitude to each."""
    tables = seen(12, 12, 8, 2, generator)
    x = torch.randn(2, 3, 12, 8, dtype=D, generator=generator)
    rows = 2 * 3 * 8 * 8
    found = simulate(4, sent, x, *tables, 2, 12, 8)
    assert [sum(n for _, n in r) for r in found] == [rows, 2 * rows, 2 * rows, rows]
    assert all(len(r) == 1 for r in found)


def refused(x, *rest):
    mesh = make_mesh((2,))
    tables = [st.distribute_tensor(rest[0], mesh, [Shard(0)], src_data_rank=None), *rest[1:]]
    with pytest.raises(st.UnsupportedOpError, match="leave its buffers plain"):
        DISCO._disco_s2_contraction_optimized(x, *tables)


def test_tables_are_plain(generator):
    x = torch.randn(1, 2, 9, 8, dtype=D, generator=generator)
    simulate(2, refused, x, *seen(9, 9, 8, 2, generator), 2, 9, 8)
