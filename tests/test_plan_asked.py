"""What a plan is asked with: one input, inputs with values, and what is none."""

import sys

import pytest
import torch
from torch import nn

from shardtensor.plan.search import plan
from shardtensor.plan.step.ledger import Ledger

aten = torch.ops.aten


def net():
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.BatchNorm2d(4))


def peaks(shapes, **options):
    found = plan(net, shapes, 2, precisions=(None,), **options)
    return {str(e.layout): e.refused or e.peak for e in found}


def test_the_only_input():
    """As it is, a shape or a tensor, which has values: what it needs is the same."""
    want = peaks([(2, 2, 8, 6)])
    assert all(isinstance(n, int) for n in want.values()) and len(want) == 3
    for given in ((2, 2, 8, 6), [2, 2, 8, 6], torch.rand(2, 2, 8, 6), [torch.rand(2, 2, 8, 6)]):
        assert peaks(given) == want


@pytest.mark.parametrize("given", [(), [], 3, [(2, 2, -8, 6)], [(2.0, 2, 8, 6)]])
def test_no_shapes(given):
    with pytest.raises(ValueError, match="that of each input"):
        peaks(given)


def test_what_is_no_task():
    with pytest.raises(ValueError, match=r"make is a model: give what makes it"):
        plan(net(), (2, 2, 8, 6), 2)
    with pytest.raises(TypeError, match="make gives a NoneType"):
        plan(lambda: None, (2, 2, 8, 6), 2)
    with pytest.raises(ValueError, match="0 devices"):
        plan(net, (2, 2, 8, 6), 0)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mask", [(True, True, True), (False, True, True), (True, False, False)])
def test_gradients_that_nobody_asks_for(form, mask):
    """A fake gives them all the same, of values that are known, too."""
    given = torch.rand(2, 4, 8, 8).to(memory_format=form)

    def step(x):
        ones = torch.ones(4)
        args = x, x, ones, None, None, ones, ones, True, 0.0, mask
        return [r is not None for r in aten.native_batch_norm_backward(*args)]

    ledger = Ledger()
    with ledger.fake, ledger:
        assert step(ledger.known.fake(given)) == list(mask)
        made = [n for _, n in ledger.moves if n == given.nbytes]
        # the input is booked by who makes it
        assert len(made) == mask[0]


@pytest.mark.parametrize(
    "line, told",
    [
        ("plan NET:net --input 1x3x8x8", "refused on one device, too: "),
        ("check NET:net --input 1x2x8x8 --mesh 0", "one size from 1 each"),
        ("check NET:net --input 1x2x8x8 --mesh 2 --html /no/such/page.html", "No such file"),
        ("run --log /no/such/log NET", "No such file"),
    ],
)
def test_mistakes_of_a_command_are_one_line(tmp_path, monkeypatch, capsys, line, told):
    pytest.importorskip("typer")
    from shardtensor.cli import main

    file = tmp_path / "asked_net.py"
    file.write_text("from torch import nn\n\ndef net(): return nn.Conv2d(2, 1, 1)\n")
    monkeypatch.setattr(sys, "argv", ["shardtensor", *line.replace("NET", str(file)).split()])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("shardtensor: ") and told in error
