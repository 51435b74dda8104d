"""A training step for real: the bytes that a rank holds at its peak, and what it sends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import shardtensor as st
from shardtensor.attention import assume
from shardtensor.ranks.measure import peak_bytes


def held_and_sent(model: nn.Module, x: Tensor, limits: Any) -> tuple[int, list[Any]]:
    """(bytes at the peak, (collective, bytes, messages) of each) of a step of AdamW on this rank.

    limits: what attention is to take its device for (`plan.estimate.attention_rates`).
    """
    # as torch does by default on GPUs
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)

    def step() -> None:
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with assume(limits):
        for _ in range(2):
            step()
        with st.trace() as t:
            step()
        # other threads of the process allocate, too
        peak = sorted(peak_bytes(step) for _ in range(3))[1]
    states = [v for s in optimizer.state.values() for v in s.values()]
    alive = held([*model.parameters(), *model.buffers(), *states, x])
    return alive + peak, [(s.collective, s.bytes, s.messages) for s in t.sent]


def held(tensors: list[Tensor]) -> int:
    """Bytes of tensors on this rank."""
    sharded = (DTensor, st.ShardTensor)
    return sum((t.to_local() if isinstance(t, sharded) else t).nbytes for t in tensors)
