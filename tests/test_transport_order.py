"""Ranks that start other collectives, or groups in another order: found by the strict transport."""

import pytest
import torch
import torch.distributed as dist
from test_transport import group, strict, swap

import shardtensor as st
from shardtensor import comm
from shardtensor import testing as T
from shardtensor.comm import wire


def sends_from_itself():
    wire.broadcast(torch.ones(3), group(2), dist.get_rank())


def adds_up_otherwise():
    wire.start_all_reduce(torch.ones(3), "max" if dist.get_rank() else "sum", group(2), [3])()


def sends_other_numbers():
    dtype = torch.int32 if dist.get_rank() else torch.float32
    swap(torch.ones(4, dtype=dtype), torch.empty(4, dtype=dtype))()


@pytest.mark.parametrize(
    "parts, what",
    [
        (sends_from_itself, "from rank 0.*from rank 1"),
        (adds_up_otherwise, "all-reduce.*all-reduce"),
        (sends_other_numbers, "float32.*int32"),
    ],
)
def test_ranks_that_part_are_found(parts, what):
    with pytest.raises(st.DivergenceError, match=what):
        strict(2, parts)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("apart", [(), (0, 3), (1,)], ids=str)
def test_groups_in_another_order_are_found(apart, waits):
    """On one stream each would wait for what the other has behind it; some orders end all the same."""

    def run():
        mesh = T.make_mesh((2, 2))
        names = [comm.group(mesh, (axis,)) for axis in (0, 1)]
        ends = []
        for name in names[:: -1 if dist.get_rank() in apart else 1]:
            ends.append(wire.start_all_reduce(torch.ones(3), "sum", name, [3]))
            if waits:
                ends.pop()()
        for end in ends:
            end()

    if apart == (0, 3):
        with pytest.raises(st.DivergenceError, match="ranks wait for each other for ever"):
            strict(4, run)
    else:
        strict(4, run)
