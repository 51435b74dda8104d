"""Every dtype through every function of the wire, as NCCL takes it: in numbers, and in what is sent."""

import inspect

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Partial, Shard

import shardtensor as st
from shardtensor import comm
from shardtensor import testing as T
from shardtensor.comm import transport, wire
from shardtensor.comm.parcels import of_rows
from shardtensor.ranks.measure import peak_bytes

N = 3


def group():
    return comm.group(T.make_mesh((N,)), (0,))


def values(rank, n, dtype):
    """n small numbers of a rank; bytes where a dtype has no numbers."""
    g = torch.Generator().manual_seed(rank)
    bits = torch.randint(1, 4, (n * dtype.itemsize,), generator=g, dtype=torch.uint8)
    numbers = bits[:n].to(torch.float32)
    return numbers.to(dtype) if dtype in NUMBERS else bits.view(dtype)


def equal(got, want):
    return torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


def _holds(make):
    try:
        make()
    except (RuntimeError, NotImplementedError):
        return False
    return True


EVERY = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
# quantized ones have no plain memory, of those below a byte torch copies none
DTYPES = [d for d in EVERY if _holds(lambda d=d: torch.zeros(8, dtype=torch.uint8).view(d).clone())]
NUMBERS = [d for d in DTYPES if _holds(lambda d=d: torch.zeros(2).to(d))]
# ProcessGroupNCCL's table of dtypes; the functions without numbers send bytes
NCCL = {torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
        torch.float64}  # fmt: skip
REDUCTIONS = {
    "sum": lambda xs: xs.sum(0),
    "product": lambda xs: xs.prod(0),
    "max": lambda xs: xs.amax(0),
    "min": lambda xs: xs.amin(0),
}


def others():
    return [r for r in range(N) if r != dist.get_rank()]


def exchange(dtype):
    me, name = dist.get_rank(), group()
    sends = {r: [values(10 * me + r, r + 1, dtype)] for r in others()}
    found = wire.exchange(
        sends, {r: [[me + 1]] for r in others()}, sends[others()[0]][0], name, "x"
    )
    assert all(equal(found[r][0], values(10 * r + me, me + 1, dtype)) for r in others())


def start_exchange(dtype):
    me, name = dist.get_rank(), group()
    x = values(me, 4, dtype)
    before, after = (me - 1) % N, (me + 1) % N
    arrived = wire.start_exchange({after: [x]}, {before: [[2, 2]]}, x, name, "x")
    assert equal(arrived()[before][0], values(before, 4, dtype).view(2, 2))


def start_parcels(dtype):
    """Rows along a dim, sent on and kept as a plan of sizes has them."""
    me, name = dist.get_rank(), group()
    x = values(me, 6, dtype).view(2, 3)
    before, after = (me - 1) % N, (me + 1) % N
    p = of_rows({after: [1, 1]}, {before: [1, 1]}, x.shape, 1, dtype.itemsize)
    assert p.nbytes == 4 * dtype.itemsize and p.messages == 1
    parts = [x.narrow(1, i, 1) for i in (0, 2)]
    first, last = wire.start_parcels(parts, p, x, name, "x")()
    there = values(before, 6, dtype).view(2, 3)
    assert equal(first, there[:, :1]) and equal(last, there[:, 2:])


def start_all_to_all(dtype):
    me, item = dist.get_rank(), dtype.itemsize
    send = torch.cat([values(10 * me + r, 2, dtype) for r in others()])
    received = torch.empty_like(send)
    nbytes = [0 if r == me else 2 * item for r in range(N)]
    wire.start_all_to_all(received, send, nbytes, nbytes, group(), "x")()
    assert equal(received, torch.cat([values(10 * r + me, 2, dtype) for r in others()]))


def all_gather(dtype):
    mine = values(dist.get_rank(), dist.get_rank() + 1, dtype)
    found = wire.all_gather(mine, [[r + 1] for r in range(N)], group())
    assert all(equal(x, values(r, r + 1, dtype)) for r, x in enumerate(found))


def all_gather_rows(dtype):
    mine = values(dist.get_rank(), dist.get_rank() + 1, dtype)
    rows = wire.all_gather_rows(mine, [1, 2, 3], 3, group())
    assert all(equal(rows[r, : r + 1], values(r, r + 1, dtype)) for r in range(N))


def broadcast(dtype):
    x = values(dist.get_rank(), 5, dtype)
    wire.broadcast(x, group())
    assert equal(x, values(0, 5, dtype))


def reduced(op, dtype):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    every = torch.stack([values(r, 4, dtype).to(wide) for r in range(N)])
    return REDUCTIONS[op](every).to(dtype)


def each_reduction(reduce, dtype):
    """Hold reduce(op) to the definition; what has no order has no greatest."""
    for op in REDUCTIONS:
        if dtype not in NUMBERS or (dtype.is_complex and op != "sum"):
            with pytest.raises(ValueError, match="all_reduce"):
                reduce(op)
        else:
            assert equal(reduce(op), reduced(op, dtype)), op


def all_reduce(dtype):
    x, name = values(dist.get_rank(), 4, dtype), group()
    each_reduction(lambda op: wire.all_reduce([x.view(2, 2)], op, name)[0].view(-1), dtype)
    each_reduction(lambda op: torch.cat(wire.all_reduce([x[:1], x[1:]], op, name)), dtype)


def start_all_reduce(dtype):
    def reduce(op):
        x = values(dist.get_rank(), 4, dtype)
        wire.start_all_reduce(x, op, group(), [4])()
        return x

    each_reduction(reduce, dtype)


def addends(dtype):
    if dtype in NUMBERS and dtype is not torch.bool:
        found = wire.addends(values(dist.get_rank(), 4, dtype), group())
        wide = torch.complex128 if dtype.is_complex else torch.float64
        assert equal(sum(x.to(wide) for x in found).to(dtype), reduced("sum", dtype))


def of_all(dtype):
    for n in (4, 5000):  # straight to each other; gathered
        found = wire.of_all(values(dist.get_rank(), n, dtype), group())
        assert all(equal(x, values(r, n, dtype)) for r, x in enumerate(found))


def whole_and_cut_sums(dtype):
    """Addends of a dtype that torch itself may not add up, made whole and cut."""
    if dtype in NUMBERS:
        x = st.ShardTensor.from_local(
            values(dist.get_rank(), 4, dtype), T.make_mesh((N,)), [Partial("sum")]
        )
        want = reduced("sum", dtype)
        assert equal(x.full_tensor(), want)
        assert equal(x.redistribute(placements=[Shard(0)]).full_tensor(), want)


FUNCTIONS = [exchange, start_exchange, start_parcels, start_all_to_all, all_gather, all_gather_rows,
             broadcast, all_reduce, start_all_reduce, addends, of_all, whole_and_cut_sums]  # fmt: skip


def every_function(dtype):
    for function in FUNCTIONS:
        function(dtype)


SENDERS = [(dist, "all_to_all_single"), (dist, "all_reduce"), (dist, "broadcast"),
           (transport, "all_gather_flat")]  # fmt: skip


def _noting(function, sent):
    def note(*args, **kwargs):
        sent.update(a.dtype for a in args if isinstance(a, torch.Tensor))
        return function(*args, **kwargs)

    return note


@pytest.mark.parametrize("kind", ["plain", "strict"])
def test_every_dtype_through_every_function_as_nccl_takes_it(kind, monkeypatch):
    assert len(NUMBERS) >= 18 and torch.int16 in NUMBERS and torch.uint16 in NUMBERS
    sent = set()
    for owner, name in SENDERS:
        monkeypatch.setattr(owner, name, _noting(getattr(owner, name), sent))
    for dtype in DTYPES:
        st.simulate(N, every_function, dtype, transport=kind)
    assert sent <= NCCL


def test_no_function_is_left_out():
    public = {
        k for k, f in vars(wire).items() if inspect.isfunction(f) and f.__module__ == wire.__name__
    }
    tested = {f.__name__ for f in FUNCTIONS} - {"whole_and_cut_sums"}
    # of whole numbers; of no data
    assert {k for k in public if k[0] != "_"} == tested | {
        "agreed_number",
        "all_gather_numbers",
        "all_gather_table",
        "direct",
    }
    assert transport.REDUCED == NCCL


def sums_that_wrap():
    x = torch.tensor([30000, -30000], dtype=torch.int16)
    top = torch.tensor([2**64 - 1, 1], dtype=torch.uint64)
    mine = top.view(torch.int64).mul(dist.get_rank() + 1).view(torch.uint64)
    for got, want in (
        (wire.all_reduce([x], "sum", group())[0], (x.long() * N).to(torch.int16)),
        (
            wire.all_reduce([top], "sum", group())[0],
            torch.tensor([2**64 - 3, 3], dtype=torch.uint64),
        ),
        (
            wire.all_reduce([mine], "max", group())[0],
            torch.tensor([2**64 - 1, 3], dtype=torch.uint64),
        ),
        (
            wire.all_reduce([mine], "min", group())[0],
            torch.tensor([2**64 - 3, 1], dtype=torch.uint64),
        ),
    ):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("kind", ["plain", "strict"])
def test_integers_wrap_as_torch_s_do(kind):
    st.simulate(N, sums_that_wrap, transport=kind)


def large_gathers():
    """The bytes that a gather holds over those that it gives, of rows that parts do not divide."""
    n, found = dist.get_world_size(), []
    mine = torch.arange(transport.COPIED // 4 + 5, dtype=torch.int32) + dist.get_rank()
    sizes = [len(mine)] * n
    sizes[-1] -= 3
    mine = mine[: sizes[dist.get_rank()]]
    at = comm.group(T.make_mesh((n,)), (0,))
    whole = comm.gather(mine, 0, sizes, at)
    for r, part in enumerate(whole.split(sizes)):
        assert torch.equal(part, torch.arange(sizes[r], dtype=torch.int32) + r)
    for _ in range(3):
        found.append(peak_bytes(lambda: comm.gather(mine, 0, sizes, at)) / whole.nbytes)
    return min(found)


@pytest.mark.gloo
def test_a_large_gather_has_no_second_whole_on_its_way():
    """Of gloo, which copies what it gathers: it was 2."""
    for ratio in T.run_workers(2, large_gathers):
        assert 1 <= ratio < 1.7
