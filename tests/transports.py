"""Ranks under the strict transport, and what they start there."""

from functools import partial

import torch
import torch.distributed as dist

import shardtensor as st
from shardtensor import comm
from shardtensor import testing as T
from shardtensor.comm import wire

strict = partial(st.simulate, transport="strict")


def group(n=3):
    return comm.group(T.make_mesh((n,)), (0,))


def sent_early(x):
    other = 1 - dist.get_rank()
    return wire.start_exchange({other: [x]}, {other: [x.shape]}, x, group(2), "halo")


def swap(send, received):
    nbytes = [send.nbytes * (r != dist.get_rank()) for r in range(2)]
    return wire.start_all_to_all(received, send, nbytes, nbytes, group(2), "swap")


def sums_without_a_wait():
    wire.start_all_reduce(torch.ones(3), "sum", group(2), [3])
