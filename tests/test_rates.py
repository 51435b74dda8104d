"""What ops take on a CPU: measured, fitted, kept, refused of a busy machine, used by a plan."""

import importlib
import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shardtensor.observe.network import DGX_H100, Link, Measured, Network
from shardtensor.plan import device as devices
from shardtensor.plan import rates as timing
from shardtensor.plan import renewed
from shardtensor.plan.calibrate import SHAPE, Found, calibrated, chain, launch_of
from shardtensor.plan.device import Rate, Rates, device_of, measured_here
from shardtensor.plan.estimate import H100, Layout, Task, estimate
from shardtensor.plan.search import fewest, plan
from shardtensor.plan.step.ledger import Ledger
from shardtensor.plan.sweep import sweep

cli = importlib.import_module("shardtensor.cli.doctor")
FLAT = Rate(((0.0, 1e-6), (1e9, 1.0)))


def planted(ranks=1, **classes):
    found = {"pointwise": FLAT, "gemm": FLAT, **classes}
    return Rates("here", ranks, torch.get_num_threads(), found, 2e-6)


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
    return [w.kind for w in ledger.work]


def test_classes():
    conv, rand = F.conv2d, torch.rand
    image, small, deep = (2, 16, 32, 32), (1, 16, 8, 8), (2, 16, 1, 32, 32)
    found = {
        "conv": lambda: conv(rand(image), rand(16, 16, 3, 3)),
        "conv, few channels": lambda: conv(rand(2, 4, 32, 32), rand(16, 4, 3, 3)),
        "conv, pointwise": lambda: conv(rand(image), rand(16, 16, 1, 1)),
        "conv, groups": lambda: conv(rand(image), rand(16, 1, 3, 3), groups=16),
        # what MKL-DNN has no use for
        "conv, columns": lambda: conv(rand(small), rand(16, 16, 3, 3)),
        "conv, 3-D, columns": lambda: F.conv3d(rand(1, *deep[1:]), rand(16, 16, 1, 3, 3)),
        "conv, 3-D": lambda: F.conv3d(rand(deep), rand(16, 16, 1, 3, 3)),
        "gemm": lambda: rand(4, 6) @ rand(4, 6).t(),
        "gemm, added": lambda: F.linear(rand(4, 6), rand(5, 6), rand(5)),
        "gemm, complex": lambda: torch.bmm(*rand(2, 3, 4, 4, dtype=torch.cfloat)),
        "norm, batch": lambda: F.batch_norm(rand(image), None, None, training=True),
        "fft, inverse": lambda: torch.fft.irfft(rand(4, dtype=torch.cfloat)),
        "copy": lambda: rand(4, 6).clone(),
        "copy, strided": lambda: rand(4, 6).t().contiguous(),
        "pointwise": lambda: rand(4, 6) + 1,
    }
    for kind, fn in found.items():
        assert classes_of(fn)[-1] == kind
    # rows stay rows: heads in front of tokens
    heads = classes_of(lambda: torch.rand(2, 3, 4, 5).transpose(1, 2).contiguous())
    assert heads[-1] == "copy"
    # every class of the samples is one that ops have, and the other way round
    kinds = {kind for kind, _ in timing._samples()}
    assert kinds >= {*found, "conv backward, 3-D", "norm backward", "attention backward"}


def works_of(fn):
    ledger = Ledger()
    with ledger.fake, ledger:
        fn()
    return ledger.work


def test_what_an_op_makes_inside():
    def step():
        x = torch.rand(1, 2, 6, 6, 6, requires_grad=True)
        w = torch.rand(3, 2, 3, 3, 3, requires_grad=True)
        F.conv3d(x, w, stride=2, padding=1).sum().backward()

    found = [w.inside for w in works_of(step) if w.kind.startswith("conv")]
    assert found == [4 * 3**3 * 2 * 27] * 2
    attend = F.scaled_dot_product_attention
    turned = works_of(
        lambda: F.conv_transpose2d(torch.rand(1, 2, 5, 4), torch.rand(2, 3, 2, 2), stride=2)
    )
    assert turned[-1].kind == "conv, columns" and turned[-1].inside == 4 * 20 * 3 * 4
    scores = works_of(lambda: attend(torch.rand(2, 3, 5, 8), *torch.rand(2, 2, 3, 7, 8)))
    assert [w.inside for w in scores if w.kind == "attention"] == [4 * 2 * 3 * 5 * 7]


def test_memory_that_is_new():
    """Blocks of 32 MiB and more, which the allocator does not keep; columns of each product."""
    new = [w.fresh for w in works_of(lambda: (torch.ones(2**23), torch.ones(2**22)))]
    assert new == [2**25, 0]

    def step():
        volume = torch.rand(1, 8, 32, 32, 40)
        w = torch.rand(1, 8, 3, 3, 3, requires_grad=True)
        F.conv3d(volume, w, padding=1).sum().backward()

    forward, backward = (w for w in works_of(step) if w.kind.startswith("conv"))
    assert forward.fresh == forward.inside and backward.fresh == 2 * backward.inside > 2**26
    held = works_of(lambda: torch.ones(2**23).add_(1))
    assert held[-1].fresh == 0


def test_columns_that_are_new_now_and_then():
    """Those below 32 MiB, by the share that was measured; no other op's."""

    def step():
        w = torch.rand(1, 8, 3, 3, 3, requires_grad=True)
        F.conv3d(torch.rand(1, 8, 8, 8, 8), w, padding=1).sum().backward()

    found = works_of(step)
    forward, backward = (w for w in found if w.kind.startswith("conv"))
    assert forward.renewed == forward.inside > 0 and backward.renewed == 2 * backward.inside
    assert sum(w.renewed for w in found) == 3 * forward.inside
    kept, new = (replace(planted(), fresh=1e-9, renewed=r) for r in (0.0, 0.5))
    more = device_of(new).seconds(forward) - device_of(kept).seconds(forward)
    assert more == pytest.approx(0.5e-9 * forward.inside)


def test_ranks_wait_if_any_of_them_has_to(monkeypatch):
    monkeypatch.setattr(renewed, "_of", lambda _: 0.25 * 2**25)
    pages = itertools.count()
    monkeypatch.setattr(renewed, "_faults", lambda: next(pages))
    # a page is what each of the last block's is
    assert renewed.share(1) == 1.0
    monkeypatch.setattr(renewed, "_of", lambda _: 0.25 / 2**25)
    assert renewed.share(1) == pytest.approx(0.25) and renewed.share(2) == pytest.approx(0.4375)


def test_products_of_fp32_are_of_tf32_where_torch_lets_them():
    square = partial(torch.rand, 4096, 4096)
    conv = works_of(lambda: F.conv2d(torch.rand(8, 64, 256, 256), torch.rand(64, 64, 3, 3)))[-1]
    product = works_of(lambda: square() @ square())[-1]
    half = works_of(lambda: square().bfloat16() @ square().bfloat16())[-1]
    peaks = [2 * w.flop / H100.seconds(w) for w in (conv, product, half)]
    assert peaks == pytest.approx([494.5e12, 67e12, 989e12])
    torch.set_float32_matmul_precision("high")
    try:
        with torch.backends.cudnn.flags(allow_tf32=False):
            peaks = [2 * w.flop / H100.seconds(w) for w in (conv, product)]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert peaks == pytest.approx([67e12, 494.5e12])
    # with no table of its own for TF32
    assert replace(H100, flops={32: 1e12}).seconds(product) == pytest.approx(
        2 * product.flop / 1e12
    )


def test_operands_that_are_copied_first():
    norm = lambda x: F.layer_norm(x, x.shape[-1:])  # noqa: E731
    plain = works_of(lambda: norm(torch.rand(4, 6, 8)))[-1]
    turned = works_of(lambda: norm(torch.rand(4, 8, 6).transpose(1, 2)))[-1]
    assert plain.copied == 0 and turned.copied == 4 * 4 * 6 * 8
    rates = planted()
    rates.classes["copy, strided"] = Rate(((0.0, 1e-3), (1e9, 1e-3)))
    device = device_of(rates)
    assert device.seconds(turned) == pytest.approx(device.seconds(plain) + 1e-3)


def test_groups_are_counted_once():
    def step():
        x = torch.rand(1, 8, 8, 8, requires_grad=True)
        w = torch.rand(8, 1, 3, 3, requires_grad=True)
        F.conv2d(x, w, padding=1, groups=8).sum().backward()

    ledger = Ledger()
    with ledger.fake, ledger:
        step()
    forward, backward = (w.flop for w in ledger.work if w.kind.startswith("conv"))
    assert forward == 2 * 8 * 64 * 9 and backward == 2 * forward


def test_kept_and_read(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDTENSOR_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="doctor --ranks 2"):
        measured_here(2)
    one = planted(2, gemm=Rate(((0.0, 0.0), (1e9, 0.1)), 1e-11))
    one.save()
    assert Rates.saved(2) == one and Rates.saved(1) is None
    assert Rates.saved(2, 1 + torch.get_num_threads()) is None
    assert measured_here(2).launch == 2e-6 and not measured_here(2).hides
    # what another version wrote is not read
    path = one.save()
    path.write_text(path.read_text().replace('"launch"', '"start"'))
    assert Rates.saved(2) is None
    with pytest.raises(ValueError, match="nothing was measured here for ranks of"):
        measured_here()


def saved(tmp_path, monkeypatch, memory=64e6, counts=(1, 2)):
    """A host with so much memory, measured for one and two ranks: two take twice the time."""
    monkeypatch.setenv("SHARDTENSOR_HOME", str(tmp_path))
    monkeypatch.setattr(devices, "_memory", lambda: memory)
    for n in counts:
        planted(n, pointwise=Rate(((0.0, n * 1e-6), (1e9, float(n))))).save()


def test_ranks_of_a_host_share_its_memory(tmp_path, monkeypatch):
    saved(tmp_path, monkeypatch)
    host = measured_here()
    for n, near in ((1, 1), (2, 2), (4, 2)):
        part = host.among(n)
        assert part.memory == 64e6 / n and part.rates.ranks == near
        assert part.among(3) is part
    assert H100.among(8) is H100 and H100.assumes(8) == ""
    assert host.assumes(2).endswith("with 2 at work")
    assert "with 2 at work (more were not)" in host.assumes(4)
    # a step that fits in whole, but not in half of the memory, on one rank and not on two
    make = lambda: nn.Linear(1024, 2048)  # noqa: E731
    task = Task(make, [(4, 1024)], dims=(0,))
    one, two = (estimate(task, Layout(1, (0,), (n,)), host) for n in (1, 2))
    assert one.fits(host) and not two.fits(host) and two.peak > 32e6
    same = estimate(task, Layout(1, (0,), (2,)), host.among(2))
    assert two.compute == same.compute > one.compute
    n, best = fewest(make, [(4, 1024)], host, dims=(0,), precisions=(None,), most=2)
    assert n == 1 and best.layout.ranks == 1
    swept = sweep(task, one, host, DGX_H100, (1,), (1, 2))
    assert swept.least((4,), host) == 1 and swept.last(2, host) is None
    page = plan(make, [(4, 1024)], 2, host, dims=(0,), precisions=(None,)).to_html((1,), (1, 2))
    assert "2 ranks on this host share its 0.1 GiB" in page and "It does not fit" in page


def test_plan_of_this_host(tmp_path, monkeypatch, command):
    source = tmp_path / "net.py"
    source.write_text("from torch import nn\ndef net():\n    return nn.Linear(1024, 2048)\n")
    ask = "plan", f"{source}:net", "--input", "4x1024", "--shard", "0", "--device", "cpu"
    saved(tmp_path, monkeypatch)
    code, out, err = command(*ask)
    assert code == 0, err
    assert "1 ranks on this host share its 0.1 GiB; times are as measured with 1" in out
    code, out, err = command(*ask, "--devices", "2")
    assert code == 0 and "one device: fits: needs 0.0469 GiB" in out, err
    assert "2 ranks on this host share its 0.1 GiB; times are as measured with 2" in out
    # half of it for each of two, a quarter for each of four
    saved(tmp_path, monkeypatch, 32e6)
    code, _, err = command(*ask)
    assert code and "up to 2 ranks share its 0.0 GiB" in err
    code, _, err = command(*ask, "--devices", "4")
    assert code and "nothing was measured here for 4 ranks" in err


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
    few = [s for s in timing._samples() if s[0] == "gemm"][2:8:2]
    few += [s for s in timing._samples() if s[0] == "reduce"][1:3]
    monkeypatch.setattr(timing, "_samples", lambda: few)
    found, new, why = timing.measure()
    assert set(found) == {"gemm", "reduce"} and all(isinstance(w, str) for w in why)
    assert new.seconds >= 0 and 0 <= new.share <= 1
    # a hundred times the arithmetic takes longer
    assert found["gemm"].seconds(1e11, 1e6) > 3 * found["gemm"].seconds(1e9, 1e6)


def test_what_python_adds_is_what_is_left_of_a_step(monkeypatch):
    class Pool:
        def __init__(self, ranks):
            self.ranks, self.closed = ranks, False

        def run(self, _, timeout):
            return [((planted().classes, timing.New(2e-10, 0.25), ["slow"]), 5e-2)] * self.ranks

        def close(self):
            self.closed = True

    for ranks in (1, 2):
        pool = Pool(ranks)
        found = calibrated(ranks, DGX_H100, pool)
        assert (found.rates.fresh, found.rates.renewed) == (2e-10, 0.25)
        assert found.why == ("slow",) and not pool.closed and found.rates.ranks == ranks
        device = device_of(found.rates)
        one = estimate(Task(chain, [SHAPE], dims=(1,)), Layout(1, (1,), (ranks,)), device)
        sent = one.communication if ranks > 1 else 0.0
        assert one.compute + sent == pytest.approx(5e-2, rel=0.01)
