"""What a trace tells: ops, lines, times, waiting, memory; and what it costs when it is off."""

import json
import pickle
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import shardtensor as st
from shardtensor import _torch
from shardtensor._torch import probe
from shardtensor.comm import clock, counters
from shardtensor.comm.counters import Sent
from shardtensor.observe.hangs import here
from shardtensor.observe.timeline import Part, Timeline
from shardtensor.ranks.measure import peak_bytes
from shardtensor.ranks.testing import make_mesh, run_workers


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 5, padding=2), nn.GroupNorm(2, 8), nn.Conv2d(8, 1, 3, padding=1)
    )


def rows(sizes=None, n=24):
    mesh = make_mesh((dist.get_world_size(),))
    x = torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(0))
    return st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None, sizes=sizes and {2: sizes})


def traced():
    model, x = net(), rows()
    with st.trace() as t:
        out = model(x)  # the line of the forward
        loss = out.square().mean()
        loss.backward()
    return t


def line_of(text):
    source = Path(__file__).read_text().splitlines()
    (number,) = [i for i, s in enumerate(source, 1) if s.strip() == text]
    return f"{__file__}:{number}"


def facts_of_a_trace():
    t = traced()
    return [(s.collective, s.op, s.rule, s.line, s.backward) for s in t.sent], t.ops, [
        (c.begin, c.end) for c in t.calls
    ], [(s.begin, s.end, s.seconds) for s in t.sent], t.table(), t.table("line")  # fmt: skip


@pytest.mark.gloo
@pytest.mark.parametrize("run", [run_workers, st.simulate])
def test_ops_lines_and_times(run):
    for sent, ops, calls, times, table, lines in run(2, facts_of_a_trace):
        forward = line_of("out = model(x)  # the line of the forward")
        assert ("conv2d", "window") in {(op, name) for name, op, *_ in sent}
        of_model = [s for s in sent if s[1] in ("conv2d", "group_norm")]
        # also those of the backward pass, which know the call that they belong to
        assert {b for *_, b in of_model} == {True, False}
        assert {line for _, _, _, line, _ in of_model} == {forward}
        assert all(rule for _, _, rule, _, _ in of_model)
        assert line_of("loss = out.square().mean()") in {s[3] for s in sent}
        assert [op for op, _ in ops][:3] == ["conv2d", "group_norm", "conv2d"]
        assert all(a <= b for a, b in calls) and calls == sorted(calls)
        assert all(a <= b and seconds <= b - a + 1e-6 for a, b, seconds in times)
        assert "conv2d" in table and "backward" in table and "ms" in table
        assert "test_trace.py" in lines


def late(rank):
    x, store = rows(), _torch.default_store()
    me, main = dist.get_rank(), threading.get_ident()
    others = [f"waits/{r}" for r in range(dist.get_world_size()) if r != rank]

    def tell():
        while not here(main)["collective"]:
            time.sleep(0.01)
        store.set(f"waits/{me}", "")

    teller = threading.Thread(target=tell)
    with st.trace() as t:
        if me == rank:
            # all others wait: what they wait from here on, no load of the machine shortens
            store.wait(others)
            time.sleep(0.5)
        else:
            teller.start()
        total = x.sum()  # where the others wait
        total = total + x.mean()
    if me != rank:
        teller.join()
    found = t.gather()
    return found.late(), found.waits(), found.waits("line"), found.waits("op"), found.table()


@pytest.mark.gloo
@pytest.mark.parametrize("rank", [0, 2])
def test_who_waits_for_whom(rank):
    for late_by, by_rank, by_line, by_op, table in run_workers(3, late, rank):
        assert late_by.pop(rank)[0] == 0
        assert all(first > 0 for first, *_ in late_by.values())
        assert all(by_rank[r] > by_rank[rank] for r in late_by)
        line = line_of("total = x.sum()  # where the others wait")
        assert max(by_line, key=by_line.get) == line and max(by_op, key=by_op.get) == "sum"
        assert len(table.splitlines()) == 4


def test_waiting_by_hand():
    def sent(begin, seconds, peers=(0, 1)):
        return Sent("swap", 8, 1, 2, "op", seconds, begin=begin, end=begin + seconds, peers=peers)

    # rank 1's clock is 10 s ahead; its second collective is with rank 2, who came first
    parts = [
        Part(0, 0.0, 0.0, 9.0, [], [sent(1.0, 4.0)], []),
        Part(1, 10.0, 10.0, 19.0, [], [sent(14.0, 1.0), sent(17.0, 0.5, (1, 2))], []),
        Part(2, 0.0, 0.0, 9.0, [], [sent(5.0, 0.1, (1, 2))], []),
    ]
    found = Timeline(parts[::-1])
    assert found.late() == {0: [3.0], 1: [0.0, 0.0], 2: [2.0]}
    # rank 2 was not in the call for longer
    assert found.waits() == {0: 3.0, 1: 0.0, 2: pytest.approx(0.1)}
    with pytest.raises(ValueError, match="by"):
        found.waits("day")


def saved(path):
    model, x = net(), rows([128, 16, 48], 192)
    model(x).square().mean().backward()
    with st.trace(memory=True) as t:
        model(x).square().mean().backward()
    found = t.gather()
    if dist.get_rank() == 0:
        found.save(f"{path}/all.json")
        found.picture(f"{path}/all.png")
    t.save(f"{path}/{dist.get_rank()}.json")
    model.zero_grad(set_to_none=True)
    most = max(b for _, b in t.memory)

    def step():
        model(x).square().mean().backward()

    return most, peak_bytes(step), found.table()


@pytest.mark.gloo
def test_saved_events_and_memory(tmp_path):
    found = run_workers(3, saved, str(tmp_path))
    for most, peak, table in found:
        # buffers of messages come and go as the ranks' timing has it
        assert abs(most - peak) < 0.1 * found[0][1] and "peak" in table
    # the first rank has two thirds of the rows
    assert found[0][0] > 2 * found[2][0]
    events = json.loads((tmp_path / "all.json").read_text())["traceEvents"]
    assert {e["pid"] for e in events} == {0, 1, 2} and {e["ph"] for e in events} == {"X", "M", "C"}
    for pid in range(3):
        of_rank = [e for e in events if e["pid"] == pid]
        assert any(e["name"] == "window" and e["args"]["bytes"] > 0 for e in of_rank)
        for tid in {e["tid"] for e in of_rank if e["ph"] == "X"}:
            track = [e for e in of_rank if e["ph"] == "X" and e["tid"] == tid]
            ends = [e["ts"] + e["dur"] for e in track]
            assert all(a <= b["ts"] + 0.01 for a, b in zip(ends, track[1:], strict=False))
        counter = [e["ts"] for e in of_rank if e["ph"] == "C"]
        assert counter == sorted(counter) and len(counter) > 10
    assert all((tmp_path / f"{r}.json").exists() for r in range(3))
    assert (tmp_path / "all.png").stat().st_size > 5_000


def test_allocations_keep_their_order(monkeypatch):
    """50 ns apart, which are one number as seconds since 1970."""

    class Move:
        def __init__(self, ns, at, nbytes):
            self.name, self.children = "[memory]", []
            self.start_time_ns = 1_800_000_000_000_000_000 + ns
            self.extra_fields = SimpleNamespace(ptr=at, alloc_size=nbytes)

    class Profiler:
        def __init__(self, **_):
            self.profiler = self.kineto_results = self
            self.start = self.stop = lambda: None

        def experimental_event_tree(self):
            return [Move(100, 64, -8), Move(0, 64, 8), Move(50, 72, 8)]

    monkeypatch.setattr(probe, "profile", Profiler)
    assert probe.allocations(lambda: None) == [8, 8, -8]
    assert peak_bytes(lambda: None) == 16


def profiled():
    model, x = net(), rows()
    with profile(activities=[ProfilerActivity.CPU]) as p:
        model(x).square().mean().backward()
    return {e.key for e in p.key_averages()}


@pytest.mark.gloo
def test_names_in_the_profiler():
    for names in run_workers(2, profiled):
        assert {"shardtensor::conv2d", "shardtensor::group_norm", "shardtensor::mean"} <= names
        assert "shardtensor::send window" in names


def surroundings():
    x = rows()
    conv = nn.Conv2d(2, 4, 3, padding=1)
    with st.trace() as outer:
        with st.guard(), st.trace() as inner:
            checkpoint(conv, x, use_reentrant=False).sum().backward()
        conv(x)
    return [s.collective for s in inner.sent], [s.collective for s in outer.sent], inner.bytes


@pytest.mark.gloo
def test_inside_checkpoint_guard_and_another_trace():
    for inner, outer, nbytes in run_workers(2, surroundings):
        # forward and recomputed; the outer trace has one more
        assert inner.count("window") == 2 and nbytes > 0
        assert outer[: len(inner)] == inner and outer.count("window") == 3


def test_memory_of_simulated_ranks_is_refused():
    def run():
        with st.trace(memory=True):
            pass

    with pytest.raises(st.RankError, match="run ranks as processes"):
        st.simulate(2, run)
    with pytest.raises(ValueError, match="by"):
        st.simulate(1, traced)[0].table("day")


def test_gather_of_simulated_ranks():
    def run():
        x = rows()
        with st.trace() as t:
            x.sum()
        return sorted(t.gather().waits())

    assert st.simulate(3, run) == [[0, 1, 2]] * 3


class Device:
    """A GPU as `torch.cuda` shows it, which comes to each event a second after the one before."""

    def __init__(self):
        self.events, self.waits, self.capturing = 0, [], False
        self.cuda, device = self, self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                device.events += 1
                self.at = device.events

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        self.Event = Event

    def current_device(self):
        return 0

    def is_current_stream_capturing(self):
        return self.capturing

    def synchronize(self, device):
        self.waits.append(self.events)


@pytest.fixture
def gpu(monkeypatch):
    found = Device()
    monkeypatch.setattr(clock, "torch", found)
    monkeypatch.setattr(counters, "devices", lambda group: ["cuda"])
    monkeypatch.setattr(counters, "_on_gpu", lambda args: True)
    return found


def in_order(t):
    """(op, begin, end, seconds inside) by the device's clock, from the first."""
    items = [(c.op, c.begin, c.end, c.end - c.begin) for c in t.calls]
    items += [(s.collective, s.begin, s.end, s.seconds) for s in t.sent]
    start = min(begin for _, begin, _, _ in items)
    return [(op, round(a - start), round(b - start), round(s)) for op, a, b, s in items]


def test_times_of_a_device(gpu):
    """Marks when a collective begins, is started, is waited for, is over; one wait, at the end."""

    def run():
        x = rows()
        with st.trace() as t:
            x.sum()
            inside = len(gpu.waits)
        return in_order(t), inside, len(gpu.waits), t.table(), t.timeline().table(), t.end

    ((found, inside, waits, table, lines, end),) = st.simulate(1, run)
    assert found == [("sum", 0, 1, 1)] and (inside, waits) == (0, 1) and end > 0
    (found, inside, waits, table, lines, _), _ = st.simulate(2, run)
    (_, a, b, _), (name, begin, over, seconds) = found
    # the other rank, in the same process, has the same device
    assert name == "all_reduce" and a < begin < over < b and 2 <= seconds < over - begin
    assert inside == 0 or waits > inside
    assert table.splitlines()[0].endswith("clock") and table.splitlines()[1].endswith("device")
    assert lines.splitlines()[1].endswith("device")


def test_times_of_a_device_in_nested_traces(gpu):
    def run():
        x = rows()
        with st.trace() as outer:
            x.sum()
            with st.trace() as inner:
                x.mean()
            x.amax()
        parts = pickle.loads(pickle.dumps(outer.part()))
        return in_order(outer), in_order(inner), [c.clock for c in parts.calls]

    ((outer, inner, clocks),) = st.simulate(1, run)
    # the end of the inner one is a mark, too
    assert outer == [("sum", 0, 1, 1), ("mean", 2, 3, 1), ("amax", 5, 6, 1)]
    assert inner == [("mean", 0, 1, 1)] and clocks == ["device"] * 3


def test_what_is_captured_has_the_clock_of_the_host(gpu):
    def run():
        x = rows()
        with st.trace() as t:
            gpu.capturing = True
            x.sum()
            gpu.capturing = False
        return [c.clock for c in t.calls], t.timeline().table()

    ((clocks, table),) = st.simulate(1, run)
    assert clocks == ["host"] and table.endswith("host") and not gpu.waits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_nothing_waits_in_a_trace_of_a_gpu():
    def run():
        mesh = make_mesh((2,), device="cuda")
        x = torch.zeros(1, 2, 24, 16, device="cuda")
        x = st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None)
        model = net().cuda()
        model(x).sum().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with st.trace() as t:
                model(x).sum().backward()
                # the end may wait
                torch.cuda.set_sync_debug_mode("default")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {c.clock for c in t.calls} | {s.clock for s in t.sent}

    assert st.simulate(2, run) == [{"device"}] * 2


def test_what_other_threads_release_is_gone():
    """As gloo's do, which the profiler does not follow: where a tensor is made no other is left."""
    moves = [(0, 64, 8), (1, 72, 8), (2, 96, 16), (3, 68, 8), (4, 104, 4), (5, 68, -8), (6, 64, 8)]
    found = [n for _, n in probe._released(moves)]
    # both that lay there, then the one that began before
    assert found == [8, 8, 16, -8, -8, 8, -16, 4, -8, 8]
