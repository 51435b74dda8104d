"""Steps that a Balancer measures, and when its ranks tell each other."""

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import balance
from shardtensor.ranks.testing import make_mesh, simulate


def test_the_time_of_a_rank_is_what_it_does_not_wait():
    sent = [SimpleNamespace(seconds=s) for s in (1.0, 2.5)]
    assert balance.busy(SimpleNamespace(begin=3.0, end=13.0, sent=sent)) == 6.5


def test_steps_that_are_measured():
    def on_rank():
        mesh = make_mesh((2,))
        x = st.distribute_tensor(torch.ones(8), mesh, [Shard(0)], src_data_rank=None)
        b = balance.Balancer(8, mesh, steps=2, every=5, gain=0.99)
        known = []
        with st.trace() as t:
            for _ in range(10):
                with b.step():
                    (x * x).sum().item()
                known.append(len(b._busy))
                assert all(s > 0 for s in b._busy)
        assert known == [0, 1, 2, 0, 0, 0, 1, 2, 0, 0]
        return len(t.sent)

    # two decisions beside what the steps themselves send
    assert simulate(2, on_rank) == [12, 12]


@pytest.mark.parametrize("raising", [0, 1, 2, 3, 4, 7, 8])
def test_a_step_that_raised_on_one_rank_parts_none(raising):
    def on_rank():
        mesh = make_mesh((2,))
        mine = mesh.get_local_rank()
        b, sizes = balance.Balancer(8, mesh, steps=2, every=5, gain=0.0), []
        for k in range(12):
            with suppress(ZeroDivisionError), b.step():
                1 / (k != raising or not mine)
            # what is measured is left out of it
            b._busy[:] = [1.0 + 2 * mine for _ in b._busy]
            sizes.append((b.sizes, b.changed))
        return sizes

    one, other = simulate(2, on_rank)
    assert one == other and any(changed for _, changed in one)


def test_a_rank_that_measured_nothing_changes_no_sizes():
    def on_rank():
        b = balance.Balancer(8, make_mesh((2,)), steps=1, every=3, gain=0.0)
        for k in range(3):
            with suppress(ZeroDivisionError), b.step():
                1 / (k != 1 or not b.mesh.get_local_rank())
        return b.sizes, b.changed

    assert simulate(2, on_rank) == [((4, 4), False)] * 2


def test_a_decision_is_one_gather_of_a_number():
    def on_rank():
        b = balance.Balancer(8, make_mesh((3,)), steps=2, every=5)
        with st.trace() as t:
            for _ in range(4):
                b.note(1.0)
        return [(s.collective, s.bytes) for s in t.sent]

    assert simulate(3, on_rank) == [[("all_gather", 16)] * 2] * 3
