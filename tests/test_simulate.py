"""Simulated ranks: as under torchrun, deterministic, and never hanging. Worker processes likewise."""

import copy
import os
import random
import signal
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.backends as B
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard
from torch.nn.attention import SDPBackend, sdpa_kernel

import shardtensor as st
from shardtensor import testing as T
from shardtensor.dispatch.fallback import _warned
from shardtensor.ranks import measure, workers


def collectives():
    n, me = dist.get_world_size(), dist.get_rank()
    x = torch.full((2,), float(me))
    dist.all_reduce(x)
    parts = [torch.empty(1) for _ in range(n)]
    dist.all_gather(parts, torch.tensor([float(me)]))
    dist.barrier()
    return x.tolist(), torch.cat(parts).tolist()


def test_torch_distributed_inside():
    assert st.simulate(3, collectives) == [([3.0, 3.0], [0.0, 1.0, 2.0])] * 3


@pytest.mark.parametrize("threads", [True, False])
def test_backward_runs_on_threads_after_as_it_did_before(threads):
    with torch.autograd.set_multithreading_enabled(threads):
        st.simulate(2, dist.get_rank)
        assert torch.autograd.is_multithreading_enabled() == threads


def test_sixteen_ranks():
    conv = nn.Conv2d(2, 3, 5, padding=2, dtype=torch.float64)
    x = torch.randn(1, 2, 33, 4, dtype=torch.float64)
    T.hold(conv, [x], [T.shard(2)], (16,))
    T.hold(conv, [x], [T.On([Shard(2), Shard(3)])], (4, 4))


def seeded():
    torch.manual_seed(dist.get_rank())
    first = torch.rand(1).item()
    dist.barrier()
    return first, torch.rand(1).item()


def test_every_rank_has_its_own_random_state():
    torch.manual_seed(5)
    outside = torch.get_rng_state()
    found = st.simulate(3, seeded)
    assert torch.equal(torch.get_rng_state(), outside)
    for rank, numbers in enumerate(found):
        torch.manual_seed(rank)
        assert numbers == (torch.rand(1).item(), torch.rand(1).item())


def apart():
    if dist.get_rank() == 1:
        return
    dist.barrier()


def test_ranks_that_never_meet_raise():
    with pytest.raises(
        st.RankError,
        match=r"rank 0 in barrier at .*test_simulate.py:\d+.*ranks \[1\] have returned",
    ):
        st.simulate(3, apart)


def saves_alone(folder):
    mesh = T.make_mesh((2,))
    x = st.distribute_tensor(torch.ones(6), mesh, [Shard(0)], src_data_rank=None)
    if dist.get_rank() == 0:
        st.checkpoint.save({"x": x}, folder, "step")
    return x.sum().item()


def torchs_own():
    found = [None] * 2
    if dist.get_rank() == 0:
        dist.all_gather_object(found, 1)
    dist.barrier()


def test_what_parts_is_named_with_op_and_line(tmp_path):
    with pytest.raises(
        st.DivergenceError,
        match=r"rank 0 in `save` \([\w -]+\) at .*test_simulate.py:\d+; rank 1 in `sum` \(all-reduce.*simulate.py:\d",
    ):
        st.simulate(2, saves_alone, tmp_path)
    # torch 2.15 gathers objects by all_gather_single
    with pytest.raises(
        st.DivergenceError, match=r"rank 0 in all-gather(-single)? at .*; rank 1 in barrier at "
    ):
        st.simulate(2, torchs_own)


def one_fails():
    if dist.get_rank() == 1:
        raise KeyError("lost")
    dist.barrier()


def test_the_first_error_counts():
    with pytest.raises(
        st.RankError, match=r"rank 1: KeyError: 'lost' \(.*test_simulate.py:\d+\)"
    ) as e:
        st.simulate(3, one_fails)
    assert isinstance(e.value.__cause__, KeyError)
    assert st.simulate(2, dist.get_rank) == [0, 1]


@pytest.mark.gloo
def test_a_worker_that_fails_ends_the_others():
    T.run_workers(2, dist.get_rank)
    both = workers._pools[2].processes
    with pytest.raises(RuntimeError, match=r"(?s)rank 1: .*KeyError: 'lost'"):
        T.run_workers(2, one_fails)
    # nobody waits for the barrier of the other to end by itself
    assert not any(p.is_alive() for p in both)
    assert T.run_workers(2, dist.get_rank) == [0, 1]


def told():
    return os.environ["SHARDTENSOR_TOLD"]


@pytest.mark.gloo
def test_workers_have_the_environment_of_their_start(monkeypatch):
    for value in ("a", "b"):
        monkeypatch.setenv("SHARDTENSOR_TOLD", value)
        for other in list(workers._pools.values()):
            other.close()
        assert T.run_workers(2, told) == [value] * 2


def refused():
    mesh = T.make_mesh((2,))
    x = st.distribute_tensor(torch.randn(6, 6), mesh, [Shard(0)], src_data_rank=None)
    with st.fallback(max_bytes=143), st.trace() as t:
        with pytest.raises(st.UnsupportedOpError, match=r"144 bytes.*redistribute"):
            torch.linalg.det(x)
        with st.fallback("error"), pytest.raises(st.UnsupportedOpError, match="det"):
            torch.linalg.det(x)
        with pytest.raises(st.UnsupportedOpError, match="drawing"):
            torch.poisson(x.abs())
    assert not t.sent
    with pytest.raises(ValueError, match="replicate"):
        st.fallback("never").__enter__()


def test_past_the_budget_nothing_is_sent():
    st.simulate(2, refused)


def gathered():
    mesh = T.make_mesh((2,))
    whole = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    x = st.distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
    T.same(torch.linalg.det(x), torch.linalg.det(whole), "gathered")


def test_fallback_warns_once_with_op_bytes_and_line():
    _warned.clear()
    with pytest.warns(st.FallbackWarning) as seen:
        st.simulate(2, gathered)
    (message,) = (str(w.message) for w in seen if w.category is st.FallbackWarning)
    assert "det" in message and "144 bytes" in message and "test_simulate.py:" in message


def traced():
    mesh = T.make_mesh((2,))
    x = st.distribute_tensor(torch.randn(6, 4), mesh, [Shard(0)], src_data_rank=None)
    with st.trace() as t:
        y = x.sin().roll(1, 0)
        y.sum()
    assert [op for op, _ in t.ops] == ["sin", "roll", "sum"]
    assert [(s.op, s.collective) for s in t.sent] == [("roll", "window"), ("sum", "all_reduce")]
    assert "roll" in t.table() and t.messages >= 2
    with st.trace() as quiet:
        pass
    x.sum()
    assert not quiet.sent


def test_trace():
    st.simulate(2, traced)


def test_memory_of_a_step():
    x = torch.randn(1000, requires_grad=True)
    kept = measure.saved_bytes(lambda: (x * 2).exp().sum())
    assert kept == 4000
    assert measure.peak_bytes(lambda: torch.zeros(10**6).sum()) >= 4 * 10**6


def backward_of(model):
    x = st.distribute_tensor(torch.ones(4, 3), T.make_mesh((dist.get_world_size(),)), [Shard(0)])
    model(x).sum().backward()


@pytest.mark.parametrize("how", ["argument", "closure", "parallelize", "tied"])
def test_ranks_that_share_a_model_would_add_up_gradients(how):
    model = torch.nn.Linear(3, 3)
    programs = {
        "argument": backward_of,
        "closure": lambda _: backward_of(model),
        "parallelize": lambda m: st.parallelize(m, T.make_mesh((dist.get_world_size(),))),
        "tied": lambda m: backward_of(lambda x: torch.nn.functional.linear(x, m.weight.t())),
    }
    with pytest.raises(st.RankError, match=r"share a parameter of shape.* copy.deepcopy\(model\)"):
        st.simulate(2, programs[how], model)
    st.simulate(2, lambda m: backward_of(copy.deepcopy(m)), model)
    st.simulate(1, programs[how], model)


def test_ranks_may_share_what_gets_no_gradient():
    model = torch.nn.Linear(3, 3)

    def run():
        x = st.distribute_tensor(
            torch.ones(4, 3), T.make_mesh((dist.get_world_size(),)), [Shard(0)]
        )
        return torch.autograd.grad(model(x).sum(), list(model.parameters()))

    for got in st.simulate(2, run):
        assert torch.equal(got[1], torch.full((3,), 4.0))


def test_ranks_begin_with_the_random_states_of_their_program():
    """Those of Python and numpy, too; the program goes on from where it was."""
    random.seed(3)
    np.random.seed(3)
    before = random.getstate()
    found = st.simulate(3, lambda: (random.random(), float(np.random.rand())))
    assert random.getstate() == before
    assert found == [(random.random(), float(np.random.rand()))] * 3


def draws(rank, meet):
    """Numbers of a rank's own seed; of two normal ones the generator keeps the second."""
    for _ in range(rank):
        np.random.rand(), random.random()
    found = [np.random.randn(), random.gauss(0, 1)]
    states = np.random.get_state(legacy=False), random.getstate()
    for _ in range(2):
        meet()
        found += [np.random.randn(), random.gauss(0, 1)]
        meet()
        np.random.set_state(states[0]), random.setstate(states[1])
    meet()
    return [*found, *np.random.randn(3), random.gauss(0, 1), random.random()]


@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.PCG64])
def test_ranks_draw_from_states_of_their_own(kind):
    before = np.random.mtrand._rand._bit_generator
    random.seed(5)
    np.random.set_bit_generator(kind(5))
    try:
        begin = np.random.get_state(legacy=False), random.getstate()
        want = []
        for rank in range(3):
            want.append(draws(rank, lambda: None))
            np.random.set_state(begin[0]), random.setstate(begin[1])
        assert st.simulate(3, lambda: draws(dist.get_rank(), dist.barrier)) == want
        assert draws(0, lambda: None) == want[0]
    finally:
        np.random.set_bit_generator(before)


@contextmanager
def wide():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def reproducible():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def of_value(module, name, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def matmuls():
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("within", "asked"),
    [
        (lambda: sdpa_kernel(SDPBackend.MATH), torch.backends.cuda.flash_sdp_enabled),
        (lambda: torch.autograd.set_detect_anomaly(True), torch.is_anomaly_enabled),
        (wide, torch.get_default_dtype),
        (reproducible, torch.are_deterministic_algorithms_enabled),
        (matmuls, torch.get_float32_matmul_precision),
        (lambda: B.mkldnn.flags(enabled=False), lambda: B.mkldnn.enabled),
        (lambda: B.cudnn.flags(enabled=True, allow_tf32=False), lambda: B.cudnn.allow_tf32),
        (
            lambda: of_value(B.mkldnn.conv, "fp32_precision", "bf16"),
            lambda: B.mkldnn.conv.fp32_precision,
        ),
        (
            lambda: of_value(B.cuda.matmul, "allow_fp16_accumulation", True),
            lambda: B.cuda.matmul.allow_fp16_accumulation,
        ),
    ],
    ids=[
        "kernels",
        "anomalies",
        "dtype",
        "determinism",
        "products",
        "mkldnn",
        "tf32",
        "bf16",
        "fp16",
    ],
)
def test_each_rank_has_switches_of_its_own(within, asked):
    """What a `with` switches for a process ends with it, in whatever order ranks come to its end."""

    def run():
        rank, found = dist.get_rank(), []
        for longer in (0, 1):
            with within():
                dist.barrier()
                found.append(asked())
                if rank == longer:
                    dist.barrier()
            if rank != longer:
                found.append(asked())
                dist.barrier()
            found.append(asked())
        return found

    before = asked()
    with within():
        inside = asked()
    for found in st.simulate(2, run):
        assert found.count(inside) == 2 and set(found) == {before, inside}
    assert asked() == before != inside


def endless(how):
    while dist.get_world_size():
        if how == "all wait" or (how == "one waits" and dist.get_rank()):
            dist.barrier()


@pytest.mark.parametrize("how", ["all wait", "one waits", "none waits"])
def test_an_interrupt_ends_all_ranks(how):
    threads, hook, state = threading.active_count(), sys.excepthook, torch.get_rng_state()
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            st.simulate(2, endless, how)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert threading.active_count() == threads
    assert sys.excepthook is hook and torch.equal(torch.get_rng_state(), state)
    assert st.simulate(2, collectives)[0] == ([1.0, 1.0], [0.0, 1.0])
