"""What ops take on a CPU: measured, fitted, kept, refused of a busy machine, used by a plan."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shardtensor.observe.network import DGX_H100, Link, Measured, Network
from shardtensor.plan import rates as timing
from shardtensor.plan.calibrate import SHAPE, Found, calibrated, chain, launch_of
from shardtensor.plan.device import Rate, Rates, class_of, device_of, measured_here
from shardtensor.plan.estimate import Layout, Task, estimate
from shardtensor.plan.ledger import Ledger

cli = importlib.import_module("shardtensor.cli.doctor")
FLAT = Rate(((0.0, 1e-6), (1e9, 1.0)))


def planted(ranks=1, **classes):
    found = {"pointwise": FLAT, "gemm": FLAT, **classes}
    return Rates("here", ranks, torch.get_num_threads(), found, 2e-6, 5e-6)


def test_what_was_planted_is_fitted():
    rows = [
        (f, b, 3e-6 + f / 2e10 + b / 5e9) for f, b in itertools.product((1e5, 1e7, 1e9), (1e4, 1e7))
    ]
    found = timing.fitted(rows)
    assert all(found.seconds(f, b) == pytest.approx(s, rel=1e-6) for f, b, s in rows)
    assert found.flop == pytest.approx(1 / 2e10)
    # nothing takes less than no time
    faster = timing.fitted([(1e6, 1e3, 1e-3), (1e6, 1e6, 5e-4), (1e8, 1e7, 1e-2)])
    assert faster.flop >= 0 and faster.points[0][1] >= 0 and faster.seconds(0, 1e9) >= 0


def test_too_short_is_as_far_off_as_too_long():
    """Four alike, but for one that takes ten times as long: their geometric mean."""
    found = timing.fitted([(1e6, 1e6, s) for s in (1e-3, 1e-3, 1e-3, 1e-2)])
    assert found.seconds(1e6, 1e6) == pytest.approx(10**0.25 * 1e-3, rel=1e-6)


def test_between_points():
    found = timing.between([(0, 1e6, 4e-3), (0, 1e3, 1e-6), (0, 1e4, 5e-6), (0, 1e4, 7e-6)])
    assert found.seconds(0, 10) == 1e-6 and found.seconds(0, 1e4) == pytest.approx(6e-6)
    assert found.seconds(0, 5.5e3) == pytest.approx(3.5e-6)
    # beyond the last as from the one before it
    assert found.seconds(0, 1.99e6) == pytest.approx(4e-3 + 1e6 * (4e-3 - 6e-6) / 1e6)
    # a larger one that took less has the time of the smaller
    assert timing.between([(0, 1.0, 2.0), (0, 2.0, 1.0)]).seconds(0, 2.0) == 2.0


def test_a_busy_machine_is_told():
    assert timing.busy([1e-3] * 9 + [5e-3], 1.0, 0.99) == ""
    assert "usually" in timing.busy([1e-3] + [2e-3] * 9, 1.0, 1.0)
    assert "33%" in timing.busy([1e-3] * 9, 1.5, 1.0)
    # several threads take more than the clock's time
    assert timing.busy([1e-3] * 9, 1.0, 2.0) == ""


def test_steady_takes_the_shortest(monkeypatch):
    now = [0.0]
    times = itertools.cycle([3.0, 1.0, 1.01, 1.02, 1.4])

    def run():
        now[0] += next(times)

    monkeypatch.setattr(timing, "clock", lambda: now[0])
    assert timing.steady(run) == (pytest.approx(1.0), True)


def classes_of(fn):
    """Of the ops that it runs, in order."""
    ledger = Ledger()
    with ledger.fake, ledger:
        fn()
    return [w[3] for w in ledger.work]


def test_classes():
    conv = nn.functional.conv2d
    assert classes_of(lambda: conv(torch.rand(1, 4, 8, 8), torch.rand(4, 4, 3, 3)))[-1] == "conv"
    several = classes_of(lambda: conv(torch.rand(1, 4, 8, 8), torch.rand(4, 1, 3, 3), groups=4))
    assert several[-1] == "conv, groups"
    deep = classes_of(lambda: F.conv3d(torch.rand(1, 2, 4, 4, 4), torch.rand(2, 2, 3, 3, 3)))
    assert deep[-1] == "conv, 3-D"
    modes = classes_of(lambda: torch.bmm(*torch.rand(2, 3, 4, 4, dtype=torch.cfloat)))
    assert modes[-1] == "gemm, complex"
    assert class_of(torch.ops.aten.add.Tensor, ()) == "pointwise"
    # every class of the samples is one that ops have
    kinds = {kind for kind, _ in timing._samples()}
    assert kinds >= {"gemm", "conv backward, 3-D", "norm backward", "attention backward", "fft"}


def test_groups_are_counted_once():
    def step():
        x = torch.rand(1, 8, 8, 8, requires_grad=True)
        w = torch.rand(8, 1, 3, 3, requires_grad=True)
        F.conv2d(x, w, padding=1, groups=8).sum().backward()

    ledger = Ledger()
    with ledger.fake, ledger:
        step()
    forward, backward = (w[0] for w in ledger.work if w[3].startswith("conv"))
    assert forward == 2 * 8 * 64 * 9 and backward == 2 * forward


def test_kept_and_read(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDTENSOR_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="doctor --ranks 2"):
        measured_here(2)
    one = planted(2, gemm=Rate(((0.0, 0.0), (1e9, 0.1)), 1e-11))
    one.save()
    assert Rates.saved(2) == one and Rates.saved(1) is None
    assert Rates.saved(2, 1 + torch.get_num_threads()) is None
    assert measured_here(2).launch == 5e-6 and not measured_here(2).hides


def test_a_plan_takes_what_was_measured():
    """All is pointwise and takes its bytes; each op costs its launch on top."""
    rates = planted()
    device = device_of(rates)
    task = Task(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()), [(4, 8)], dims=(0,))
    found = estimate(task, Layout(1, (0,), (1,)), device)
    kernels = found.tree()[""].kernels
    assert found.compute == pytest.approx(sum(p.total for p in found.modules.values()))
    assert found.compute > kernels * 2e-6
    assert found.seconds == pytest.approx(found.compute + found.communication)
    # the step of the chain that would take 10 us a kernel more
    bare = planted()
    base = launch_of(bare, 2e-2, DGX_H100)
    assert launch_of(bare, 4e-2, DGX_H100) > base > 1e-6


def test_a_network_has_links_of_its_own():
    links = {
        "exchange": Link(1e-3, 1e9),
        "all_reduce": Link(2e-3, 2e9),
        "all_gather": Link(3e-3, 1e9),
    }
    found = Measured("h", "gloo", 2, {}, links, 5e-4).network()

    class Sent:
        collective, bytes, messages, ranks = "all_reduce", 4_000_000, 2, 2

    assert found.seconds(Sent) == pytest.approx(5e-4 + 2e-3 + 2e-3)
    Sent.collective = "gather"
    assert found.seconds(Sent) == pytest.approx(5e-4 + 3e-3 + 4e-3)
    Sent.collective = "window"
    assert found.seconds(Sent) == pytest.approx(5e-4 + 1e-3 + 4e-3)
    assert isinstance(found, Network) and DGX_H100.links is None


@pytest.mark.parametrize(
    "why, keep, kept", [("", (), 2), ("slow", (), 0), ("slow", ("--keep",), 2)]
)
def test_figures_of_a_busy_machine_are_not_kept(why, keep, kept, tmp_path, monkeypatch, command):
    monkeypatch.setenv("SHARDTENSOR_HOME", str(tmp_path))
    link = {"exchange": Link(1e-3, 1e9)}
    seconds = {"exchange": {1024: 1e-3}}
    monkeypatch.setattr(cli, "_here", lambda n, _: Measured("h", "gloo", n, seconds, link))
    monkeypatch.setattr(cli, "is_busy", lambda: why)
    one = planted(2)
    monkeypatch.setattr(cli, "calibrated", lambda n, _: Found(one, ()))
    code, out, err = command("doctor", "--ranks", "2", *keep)
    assert code == 0, err
    assert len(list(tmp_path.glob("*.json"))) == kept
    assert ("this machine is busy: slow" in out) == bool(why)
    assert ("nothing is saved" in out) == (not kept)


def test_measured_by_class(monkeypatch):
    few = [(kind, work) for kind, work in timing._samples() if kind in ("gemm", "reduce")][3:9]
    monkeypatch.setattr(timing, "_samples", lambda: few)
    found, why = timing.measure()
    assert set(found) == {"gemm", "reduce"} and all(isinstance(w, str) for w in why)
    # a hundred times the arithmetic takes longer
    assert found["gemm"].seconds(1e11, 1e6) > 3 * found["gemm"].seconds(1e9, 1e6)


def test_what_python_adds_is_what_is_left_of_a_step(monkeypatch):
    class Pool:
        def __init__(self, ranks):
            self.ranks, self.closed = ranks, False

        def run(self, _):
            return [((planted().classes, ["slow"]), 5e-2)] * self.ranks

        def close(self):
            self.closed = True

    for ranks in (1, 2):
        pool = Pool(ranks)
        found = calibrated(ranks, DGX_H100, pool)
        assert found.why == ("slow",) and not pool.closed and found.rates.ranks == ranks
        device = device_of(found.rates)
        one = estimate(Task(chain, [SHAPE], dims=(1,)), Layout(1, (1,), (ranks,)), device)
        sent = one.communication if ranks > 1 else 0.0
        assert one.compute + sent == pytest.approx(5e-2, rel=0.01)
