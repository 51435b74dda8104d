"""Drawing a program: some steps, one after the other."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as some

from .program import MAKERS, MESHES, MOST, Program, numbers, places


@some.composite
def programs(draw: Any) -> Program:
    """A program whose every intermediate is small and finite."""
    mesh = draw(some.sampled_from(MESHES))
    shape = tuple(draw(some.lists(some.integers(1, 6), min_size=1, max_size=4)))
    program = Program(mesh)
    program.args.append(numbers(shape, 7))
    program.places.append(draw(places(shape, mesh)))
    x = program.args[0]
    for _ in range(draw(some.integers(1, 6))):
        if not x.ndim:
            break
        make = MAKERS[draw(some.sampled_from(sorted(MAKERS)))]
        made = make(draw, x, program)
        if made is None:
            continue
        try:
            y = made[1](x, program.args)
        except RuntimeError:
            # what plain PyTorch refuses
            continue
        if y.numel() > MOST or (y.numel() and not y.abs().max() < 1e3):
            continue
        program.steps.append(made)
        x = y
    return program
