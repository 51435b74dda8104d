"""What a traced program draws: made anew, in the program's order, before each run of it.

A graph with random ops in it would draw other numbers than the eager program, and might draw them
again in backward. So the graph takes what is drawn as inputs, and the eager draws make them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.library import Library

from .. import _torch
from ..errors import UnsupportedOpError
from ..settings import bringing, current, setting

_library = Library("shardtensor", "FRAGMENT")
_library.define(
    "drawn(int number, int[] size, int[] stride, ScalarType dtype, Device device) -> Tensor"
)
# stands for a draw until the graph is made: not an op to run
DRAWN = torch.ops.shardtensor.drawn.default


@torch.library.register_fake("shardtensor::drawn", lib=_library)
def _drawn(
    number: int,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


class Tape:
    """The draws of one traced program, and the generators that it may draw from."""

    def __init__(self) -> None:
        self.draws: list[Callable[[], Tensor]] = []
        # generator, its state before, and the one that it has while the program is traced
        self.taken: dict[int, tuple[torch.Generator, Tensor, Tensor]] = {}
        self.take(torch.default_generator)

    def take(self, generator: torch.Generator) -> None:
        """Let the program draw from a generator, which was there before it."""
        if id(generator) not in self.taken:
            with _torch.outside_modes():
                before = generator.get_state()
                # a state that no seed of the program's gives
                generator.seed()
                self.taken[id(generator)] = generator, before, generator.get_state()

    def knows(self, generator: torch.Generator) -> bool:
        """Whether a generator is one of those taken, maybe under another Python object."""
        for known, *_ in self.taken.values():
            before = known.get_state()
            known.seed()
            same = torch.equal(known.get_state(), generator.get_state())
            known.set_state(before)
            if same:
                return True
        return False

    def check(self) -> None:
        """Raise UnsupportedOpError if the program has set the state of a generator."""
        with _torch.outside_modes():
            for generator, _, mark in self.taken.values():
                if not torch.equal(generator.get_state(), mark):
                    raise UnsupportedOpError(
                        "a compiled program that sets the state of a random generator: seed before "
                        "the call, or leave this part out of st.compile"
                    )

    def close(self) -> None:
        """Give the generators the states that they had."""
        with _torch.outside_modes():
            for generator, before, _ in self.taken.values():
                generator.set_state(before)

    def add(
        self,
        draw: Callable[[], Tensor],
        size: Sequence[int],
        stride: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """A tensor of the graph for what draw() makes before each run."""
        self.check()
        with setting("tape", None):
            self.draws.append(bringing(draw))
        return DRAWN(len(self.draws) - 1, size, stride, dtype, device)


def tape() -> Tape | None:
    """What notes the draws of this thread, while a program is traced."""
    found: Tape | None = current("tape", None)
    return found
