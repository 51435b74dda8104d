"""The strict transport: what NCCL would do to careless code is found on any machine."""

import threading
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Shard
from transports import group, sent_early, strict, sums_without_a_wait, swap

import shardtensor as st
from shardtensor import testing as T
from shardtensor.comm import flights, groups, transport, wire
from shardtensor.errors import TransportError

N = 3


# planted races -----------------------------------------------------------------------------------


def reuses_what_it_sends():
    x = torch.ones(4)
    arrived = sent_early(x)
    # not even a view's version tells
    x.data.zero_()
    arrived()


def writes_where_it_receives():
    x, received = torch.ones(4), torch.empty(4)
    nbytes = [16 * (r != dist.get_rank()) for r in range(2)]
    end = wire.start_all_to_all(received, x, nbytes, nbytes, group(2), "swap")
    received.zero_()
    end()


def writes_to_a_sum_under_way():
    flat = torch.ones(3)
    end = wire.start_all_reduce(flat, "sum", group(2), [3])
    flat.mul_(0.5).zero_()
    end()


def forgets_to_wait(found):
    x, received = torch.ones(4), torch.empty(4)
    nbytes = [16 * (r != dist.get_rank()) for r in range(2)]
    wire.start_all_to_all(received, x, nbytes, nbytes, group(2), "swap")
    found.append(received)
    return T.make_mesh((2,))


def forgets_and_goes_on(found):
    forgets_to_wait(found)
    wire.all_reduce([torch.ones(2)], "sum", group(2))


def every_second_of_a_buffer():
    wire.start_all_reduce(torch.ones(6)[::2], "sum", group(2), [3])()


def askew():
    numbers = torch.zeros(9, dtype=torch.uint8).numpy()
    odd = torch.from_numpy(numbers[1:].view("float32"))
    wire.start_all_reduce(odd, "sum", group(2), [2])()


def a_dtype_of_its_own():
    transport.all_reduce(torch.ones(2, dtype=torch.int16), "sum", group(2))


def writes_through_a_view():
    memory = torch.ones(8)
    end = swap(memory[2:6], torch.empty(4))
    memory.view(4, 2)[1].zero_()
    end()


def fills_a_pool_again():
    """With what it held: a rank may have read what was there in between."""
    pool = torch.ones(4)
    end = swap(pool, torch.empty(4))
    pool.zero_()
    pool.fill_(1.0)
    end()


def receives_into_a_pool_twice():
    pool = torch.empty(4)
    ends = [swap(torch.ones(4), pool), swap(torch.ones(4), pool)]
    for end in ends:
        end()


def sends_on_what_has_not_arrived():
    received = torch.empty(4)
    ends = [swap(torch.ones(4), received), swap(received, torch.empty(4))]
    for end in ends:
        end()


def receives_where_it_sends():
    memory = torch.ones(6)
    swap(memory[:4], memory[2:])()


def writes_to_what_nobody_waits_for():
    x = torch.ones(4)
    swap(x, torch.empty(4))
    x.zero_()
    wire.all_reduce([torch.ones(1)], "sum", group(2))


def receives_another_dtype():
    swap(torch.ones(4), torch.empty(2, dtype=torch.float64))()


RACES = {
    reuses_what_it_sends: r"`?halo.*at .*transports.py:\d+: what is sent was written to",
    writes_where_it_receives: r"swap of float32.*test_transport.py:\d+: what is received was written",
    writes_to_a_sum_under_way: r"all-reduce of float32.*: what is received was written to",
    every_second_of_a_buffer: r"all-reduce.*strides \(2,\), which is not contiguous",
    askew: r"all-reduce.*not aligned to its torch.float32",
    writes_through_a_view: r"swap of float32.*: what is sent was written to",
    fills_a_pool_again: r"swap of float32.*: what is sent was written to",
    receives_into_a_pool_twice: r"swap of float32.*: what is received was written to",
    sends_on_what_has_not_arrived: r"swap of float32.*: what is sent was written to",
    receives_where_it_sends: r"swap of float32.*: what is sent was written to",
    writes_to_what_nobody_waits_for: r"swap.*never waited for, and what it sends was written to",
    receives_another_dtype: r"swap of float32.*: what is received is taken for torch.float64",
    a_dtype_of_its_own: r"NCCL does not reduce torch.int16",
}


@pytest.mark.parametrize("race", RACES, ids=lambda f: f.__name__)
def test_a_race_is_found(race):
    with pytest.raises(st.RankError, match=RACES[race]) as error:
        strict(2, race)
    assert isinstance(error.value.__cause__, TransportError)


def raised(race):
    with pytest.raises(TransportError, match=RACES[race]):
        race()


@pytest.mark.gloo
def test_races_over_gloo(monkeypatch):
    with _processes(monkeypatch, "strict") as run:
        for race in RACES:
            run(2, raised, race)
        with pytest.raises(RuntimeError, match="nobody waited for it"):
            run(2, sums_without_a_wait)
        run(2, parts_over_gloo)
        run(2, library_over_gloo)


def copies_of_what_it_sends():
    """What is not contiguous is copied at the start: the memory behind it is free."""
    memory, received = torch.arange(8.0), torch.empty(4)
    end = swap(memory[::2], received)
    memory.zero_()
    end()
    return received.tolist()


def waits_on_another_thread():
    received, found = torch.empty(4), []
    end = swap(torch.ones(4), received)
    go_on = threading.Event()
    other = threading.Thread(target=lambda: (go_on.wait(), end()))
    other.start()
    # before the other thread waits, and after
    found.append(received.isnan().all().item())
    go_on.set()
    other.join()
    return [*found, received.tolist()]


def test_what_is_right_is_not_found():
    assert strict(2, copies_of_what_it_sends) == [[0, 2, 4, 6]] * 2
    assert strict(2, waits_on_another_thread) == [[True, [1, 1, 1, 1]]] * 2


class _processes:
    """Worker processes with a transport, which no other test uses."""

    def __init__(self, monkeypatch, kind):
        monkeypatch.setenv("SHARDTENSOR_TRANSPORT", kind)

    def __enter__(self):
        self.pools = dict(T.run_workers.__globals__["_pools"])
        T.run_workers.__globals__["_close_all"]()
        return T.run_workers

    def __exit__(self, *_):
        T.run_workers.__globals__["_close_all"]()


@pytest.mark.parametrize("forgets", [forgets_to_wait, forgets_and_goes_on])
def test_a_wait_that_is_forgotten_is_found(forgets):
    found = []
    with pytest.raises(
        st.RankError, match=r"swap of float32.*: never waited for, and what it received is in use"
    ):
        strict(2, forgets, found)
    assert all(x.isnan().all() for x in found)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.float8_e4m3fn]
)
def test_poison_is_not_a_number(dtype):
    x = torch.zeros(3).to(dtype)
    flights.poison(x)
    assert x.to(torch.complex64 if dtype.is_complex else torch.float32).isnan().all()


def test_poison_of_integers_is_no_index():
    for dtype in (torch.int16, torch.int32, torch.int64):
        x = torch.zeros(3, dtype=dtype)
        flights.poison(x)
        assert (x > 1000).all()


def swapped(other):
    x = st.distribute_tensor(torch.ones(4), T.make_mesh((2,)), [Shard(0)], src_data_rank=None)
    # the same dtype, sizes and kind of message
    calls = [lambda: x.sum().full_tensor(), lambda: x.mul(2).mean().full_tensor()]
    for call in calls[:: -1 if dist.get_rank() == 1 and other else 1]:
        call()


def test_another_order_on_a_rank_is_found():
    st.simulate(2, swapped, True, transport="plain")
    strict(2, swapped, False)
    with pytest.raises(
        st.DivergenceError, match=r"`sum` \(all-reduce.*test_transport.py:\d+.*`mean` \(all-reduce"
    ):
        strict(2, swapped, True)


def parts_over_gloo():
    with pytest.raises(st.DivergenceError, match=r"`sum` \(all-reduce.*`mean` \(all-reduce"):
        swapped(True)


def library_over_gloo():
    x = st.distribute_tensor(torch.arange(8.0), T.make_mesh((2,)), [Shard(0)], src_data_rank=None)
    x.requires_grad_()
    y = F.conv1d(x.view(1, 1, 8), torch.ones(1, 1, 3), padding=1)
    y.square().sum().backward()
    plain = torch.arange(8.0).requires_grad_()
    want = F.conv1d(plain.view(1, 1, 8), torch.ones(1, 1, 3), padding=1)
    want.square().sum().backward()
    assert torch.equal(y.full_tensor(), want) and torch.equal(x.grad.full_tensor(), plain.grad)


def on_a_mesh_of_gpus():
    name = group(2)
    groups._devices[name] = {"cuda"}
    wire.all_reduce([torch.ones(2)], "sum", name)


def test_tensors_of_a_cpu_are_refused_on_a_mesh_of_gpus():
    with pytest.raises(st.RankError, match=r"all-reduce.*a cpu tensor on a mesh of cuda"):
        strict(2, on_a_mesh_of_gpus)


def agrees_on_the_host():
    name = group(2)
    groups._devices[name] = {"cuda"}
    mine = torch.tensor([dist.get_rank() + 2**40])
    return wire.agreed_number(mine, torch.device("cuda"), name).tolist()


def test_a_number_of_the_host_is_agreed_on_there():
    """A seed on its way through a GPU would wait for it twice."""
    assert strict(2, agrees_on_the_host) == [[2**40 + 1]] * 2


def test_waits_are_delayed_alike_at_every_run():
    def order(kind):
        found = []

        def run():
            for i in range(30):
                wire.all_reduce([torch.ones(2)], "sum", group(N))
                found.append((dist.get_rank(), i))

        st.simulate(N, run, transport=kind)
        return found

    assert order("strict") == order("strict") != order("plain")


def test_a_transport_that_is_not_known(monkeypatch):
    with pytest.raises(ValueError, match='"plain" or "strict" is expected'):
        st.simulate(2, group, 2, transport="nccl")
    monkeypatch.setenv("SHARDTENSOR_TRANSPORT", "nccl")
    with pytest.raises(ValueError, match="SHARDTENSOR_TRANSPORT='nccl'"):
        st.simulate(2, swapped, False)
    with pytest.raises(ValueError, match="SHARDTENSOR_TRANSPORT='nccl'"):
        st.init()
    assert not dist.is_initialized()


# the library -------------------------------------------------------------------------------------

ATTENTION = partial(F.scaled_dot_product_attention, is_causal=True)
LIBRARY = {
    "conv": (nn.Conv2d(2, 3, 5, padding=2, dtype=torch.float64), [(1, 2, 13, 4)], 2, (5, 0, 8)),
    "attention": (ATTENTION, [(1, 4, 13, 4)] * 3, 2, (4, 4, 5)),
    "norm": (lambda x: F.layer_norm(x, x.shape[1:]), [(2, 13, 4)], 1, (2, 3, 8)),
    "fft": (lambda x: torch.fft.rfft2(x).abs(), [(2, 12, 8)], 1, (4, 4, 4)),
    "sort": (lambda x: x.sort(0).values, [(13, 2)], 0, (5, 3, 5)),
    "index": (lambda x: x[torch.tensor([3, 12, 0, 3])], [(13, 2)], 0, (5, 3, 5)),
    "matmul": (torch.matmul, [(13, 13)] * 2, 0, (5, 3, 5)),
    "cumsum": (lambda x: x.cumsum(0), [(13, 2)], 0, (5, 3, 5)),
}


def held(name, run):
    fn, shapes, dim, cut = LIBRARY[name]
    g = torch.Generator().manual_seed(0)
    args = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    T.hold(fn, args, [T.shard(dim, cut)] * len(args), (len(cut),), run=run)


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_waits_and_leaves_what_it_sends(name):
    held(name, strict)


@pytest.mark.parametrize("name", ["conv", "attention", "fft"])
def test_a_library_that_does_not_wait_is_found(name, monkeypatch):
    monkeypatch.setattr(wire, "_end", lambda *args: None)
    # as it would on CPUs, where all is there at once
    held(name, partial(st.simulate, transport="plain"))
    with pytest.raises((AssertionError, st.RankError)):
        held(name, strict)
