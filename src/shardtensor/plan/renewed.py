"""How much of the memory that ops make and give back is new each time, as pages are counted."""

from __future__ import annotations

import resource
from itertools import pairwise

import torch
from torch import nn

from .step.kinds import LARGE

# steps that are counted, of each chain after its first ones; channels of the chains
STEPS, FIRST = 6, 2
CHAINS = (2, 16, 16, 16, 16), (4, 12, 12, 8)


def share(ranks: int) -> float:
    """Of columns that convolutions make in steps of training what is new memory, to one of ranks.

    The allocator gives back the end of its memory, where columns often are: in some steps none, in
    others all, by what else lies there. Ranks wait for each other, and so if any of them has to.
    Called before the process has made much.
    """
    found = [_of(widths) for widths in CHAINS]
    begin = _faults()
    block = torch.empty(LARGE // 4).zero_()
    page = block.nbytes / max(1, _faults() - begin)
    return 1.0 - (1.0 - min(1.0, page * sum(found) / len(found))) ** ranks


def _of(widths: tuple[int, ...]) -> float:
    """Pages for each byte of columns."""
    chain = nn.Sequential()
    for a, b in pairwise(widths):
        chain += nn.Sequential(nn.Conv3d(a, b, 3, padding=1), nn.GroupNorm(2, b), nn.SiLU())
    x = torch.rand(1, widths[0], 4, 32, 32)
    # for what a layer gives, for its weight's gradient and, but for the first, its input's
    columns = 27 * x[0, 0].nbytes * (3 * sum(widths[:-1]) - widths[0])
    begin, optimizer = 0, torch.optim.AdamW(chain.parameters())
    for i in range(FIRST + STEPS):
        begin = _faults() if i == FIRST else begin
        chain(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return (_faults() - begin) / STEPS / columns


def _faults() -> int:
    """How often the system has provided memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
