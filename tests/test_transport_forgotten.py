"""The strict transport: collectives that nobody ever waits for are found when ranks end."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from transports import group, sent_early, strict, sums_without_a_wait, swap

import shardtensor as st
from shardtensor.comm import wire
from shardtensor.errors import TransportError


def drops_what_it_receives():
    sent_early(torch.ones(4))
    wire.all_reduce([torch.ones(1)], "sum", group(2))


def keeps_a_wait_that_it_never_calls(kept=[]):  # noqa: B006
    kept.append(sent_early(torch.ones(4)))


class Sends(torch.autograd.Function):
    """Sends its gradient, and waits in the backward of another, or never."""

    @staticmethod
    def forward(ctx, x, ends):
        ctx.ends = ends
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        ctx.ends.append(swap(g.contiguous(), torch.empty_like(g)))
        return g, None


class Waits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ends, does):
        ctx.rest = ends, does
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        ends, does = ctx.rest
        if does == "raises":
            raise ValueError("on the way")
        if does == "waits":
            ends.pop()()
        ends.clear()
        return g, None, None


def backward_that(does):
    ends = []
    x = torch.ones(4, requires_grad=True)
    y = Sends.apply(Waits.apply(x, ends, does), ends)
    if does == "raises":
        with pytest.raises(ValueError, match="on the way"):
            y.sum().backward()
    else:
        y.sum().backward()


FORGOTTEN = {
    drops_what_it_receives: r"halo of float32, 16 bytes.*transports.py:\d+: nobody waited for it",
    keeps_a_wait_that_it_never_calls: r"halo of float32.*: nobody waited for it",
    sums_without_a_wait: r"all-reduce of float32 \[3\].*: nobody waited for it",
    partial(backward_that, "drops"): r"`backward` \(swap of float32.*: nobody waited for it",
}


@pytest.mark.parametrize("forgets", FORGOTTEN)
def test_what_nobody_waits_for_is_found_at_the_end(forgets):
    st.simulate(2, forgets, transport="plain")
    with pytest.raises(st.RankError, match=FORGOTTEN[forgets]) as error:
        strict(2, forgets)
    assert isinstance(error.value.__cause__, TransportError)


@pytest.mark.parametrize("does", ["waits", "raises"])
def test_a_backward_that_waits_or_breaks_off_forgets_nothing(does):
    strict(2, backward_that, does)


def raises_after_a_start():
    sent_early(torch.ones(4))
    raise ValueError("of its own")


def test_an_error_is_told_before_what_it_left_behind():
    with pytest.raises(st.RankError, match="of its own"):
        strict(2, raises_after_a_start)
    # another world has forgotten it
    strict(2, group, 2)


ALONE = """
import torch, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from shardtensor.comm import groups, transport
groups._groups[groups.ALONE] = world = dist.group.WORLD
works = transport.all_reduce(torch.ones(3), "sum", groups.ALONE)
if {waits}:
    works[0].wait()
print("all is done", flush=True)
"""


@pytest.mark.slow
def test_what_nobody_waits_for_is_found_when_a_process_ends():
    environment = os.environ | {"SHARDTENSOR_TRANSPORT": "strict"}
    for waits in (True, False):
        found = subprocess.run(
            [sys.executable, "-c", ALONE.format(waits=waits)],
            capture_output=True, text=True, env=environment, timeout=100,
        )  # fmt: skip
        assert "all is done" in found.stdout
        assert found.returncode == (not waits), found.stderr
        assert ("all-reduce of float32 [3]" in found.stderr) == (not waits)
