"""What a message of gradients is about, written at its head: the sum over ranks shows a difference.

Ranks with other samples may take other ways through a model, and a sum over gradients of different
parameters would look like any other. The head has four digits of a checksum, each as a one among
sixteen; where all ranks have the same, the sum there is their number.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..errors import UnsupportedOpError

DIGITS, BASE = 4, 16
LENGTH = DIGITS * BASE


class Heads:
    """The heads of messages between n ranks, and what is still to be read of those that came.

    known: whether ranks get each other's values, as they do not in a rehearsal.
    """

    def __init__(self, n: int, known: bool = True) -> None:
        self.n, self.known = n, known
        self.made: dict[Any, Tensor] = {}
        self.arrived: list[tuple[Tensor, Any, Sequence[Any]]] = []
        self.task = -1

    def begin(self) -> None:
        """Before a message: in another backward than the last, read what that one has brought.

        So all ranks raise at the same place, and no device waits.
        """
        task = _torch.graph_task()
        if task != self.task:
            self.task = task
            while self.arrived:
                same, event, shapes = self.arrived.pop(0)
                event.synchronize()
                _raise_unless(bool(same), shapes)

    def of(self, key: Any, like: Tensor) -> Tensor:
        """The head of a message about a key."""
        found = self.made.get((key, like.dtype, like.device))
        if found is None:
            check = zlib.crc32(repr(key).encode())
            ones = {digit * BASE + (check >> 4 * digit) % BASE for digit in range(DIGITS)}
            head = [float(i in ones) for i in range(LENGTH)]
            found = torch.tensor(head, dtype=like.dtype, device=like.device)
            self.made[key, like.dtype, like.device] = found
        return found

    def read(self, key: Any, total: Tensor, shapes: Sequence[Any]) -> None:
        """Raise UnsupportedOpError, off the CPU at the next backward, unless all had this key.

        total: the sum of the heads; shapes: of what this rank has sent.
        """
        real = total.real if total.is_complex() else total
        if not self.known or self.n * torch.finfo(real.dtype).eps > 2:
            # nothing came, or a sum of so many ones is rounded
            return
        same = (total * self.of(key, total)).real.float().sum() == DIGITS * self.n
        if total.device.type == "cpu":
            _raise_unless(bool(same), shapes)
            return
        host = same.to("cpu", non_blocking=True)
        event = torch.get_device_module(total.device).Event()
        event.record()
        self.arrived.append((host, event, shapes))


def _raise_unless(same: bool, shapes: Sequence[Any]) -> None:
    if not same:
        raise UnsupportedOpError(
            "parallelize: ranks with other samples have gradients of other parameters, or in "
            f"another order (here of shapes {', '.join(str(list(s)) for s in shapes[:4])}), which "
            "cannot be averaged: let all ranks use the same ones in each backward, by a choice "
            "that is the same on all, or with the outputs of the others times 0"
        )
