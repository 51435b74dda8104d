"""Programs on a spectrum: slices, shifts, zeros with modes, inverses, writes, in any order."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

import shardtensor as st

D, C = torch.float64, torch.complex128
SHAPE = (2, 3, 18, 14)
KINDS = (
    "slice", "slice", "narrow", "use", "use", "shift", "zeros", "zeros", "set", "set", "set", "fill",
    "inverse", "inverse", "scale", "add", "unrecorded", "detach", "join",
)  # fmt: skip
# the mesh, and for one axis the dim and the sizes
CUTS: tuple[tuple[tuple[int, ...], int, tuple[int, ...]], ...] = (
    ((2,), 2, (10, 8)), ((3,), 2, (11, 0, 7)), ((2,), 3, (7, 7)), ((3,), 3, (0, 9, 5)),
    ((2, 2), 2, ()),
)  # fmt: skip


def _rows(rng: random.Random, n: int) -> slice:
    k = rng.choice((1, 2, 3, n // 2))
    a = rng.randrange(n - 1) if n > 1 else 0
    return rng.choice(
        (slice(None, k), slice(None, k), slice(-k, None), slice(-k, None), slice(None),
         slice(n // 2 - k, n // 2 + k), slice(1, None, 2), slice(a, a + k))
    )  # fmt: skip


def _program(x: Tensor, w: Tensor, half: bool, norm: str | None, seed: int) -> Tensor:
    rng = random.Random(seed)
    inverse = torch.fft.irfft2 if half else torch.fft.ifft2
    found = [torch.fft.rfft2(x, norm=norm) if half else torch.fft.fft2(x.to(C), norm=norm)]
    out: list[Tensor] = []

    def at(t: Tensor) -> tuple[Any, ...]:
        return ..., _rows(rng, t.shape[-2]), _rows(rng, t.shape[-1])

    def join(t: Tensor) -> None:
        found.append(torch.cat([t[..., :1, :], t[..., -1:, :]], -2))

    def put(t: Tensor) -> None:
        target, index = rng.choice(found), at(t)
        target[index] = t[index] * w

    def invert(t: Tensor) -> None:
        if t.shape == found[0].shape:
            out.append(inverse(t, s=SHAPE[-2:] if rng.random() < 0.8 else None, norm=norm))

    def narrow(t: Tensor) -> None:
        d = rng.choice((-1, -2))
        a = rng.randrange(t.shape[d]) if t.shape[d] else 0
        found.append(t.narrow(d, a, min(3, t.shape[d] - a)))

    def shift(t: Tensor) -> None:
        fn = rng.choice((torch.fft.fftshift, torch.fft.ifftshift))
        found.append(fn(t, dim=rng.choice(((-2,), (-2,), (-2, -1)))))

    def zeros(t: Tensor) -> None:
        make = rng.choice((torch.zeros_like, lambda t: t.new_zeros(t.shape)))
        found.append(make(t))

    def fill(t: Tensor) -> None:
        t[at(t)] = w * 3

    def unrecorded(t: Tensor) -> None:
        with torch.no_grad():
            found.append(t[at(t)] * 2)

    def add(t: Tensor) -> None:
        other = rng.choice(found)
        found.append(t + other if other.shape == t.shape else t + 1)

    steps: dict[str, Callable[[Tensor], Any]] = {
        "slice": lambda t: found.append(t[at(t)]), "narrow": narrow, "shift": shift, "set": put,
        "use": lambda t: found.append(t * rng.choice((2, w))), "zeros": zeros, "fill": fill,
        "inverse": invert, "scale": lambda t: t.mul_(rng.choice((2, w))), "add": add, "join": join,
        "unrecorded": unrecorded, "detach": lambda t: found.append(t.detach()),
    }  # fmt: skip
    for _ in range(rng.randrange(3, 9)):
        steps[rng.choice(KINDS)](rng.choice(found))
    total = sum(torch.view_as_real(t).square().sum() for t in found if t.numel())
    for t in out:
        total = total + 7 * (torch.view_as_real(t) if t.is_complex() else t).square().sum()
    return total


@dataclass
class Case:
    cut: int
    half: bool
    norm: str | None
    learned: bool
    seed: int

    @property
    def mesh(self) -> tuple[int, ...]:
        return CUTS[self.cut][0]

    def _run(self, place: Callable[[Tensor], Tensor]) -> Any:
        x = torch.randn(SHAPE, dtype=D, generator=torch.Generator().manual_seed(1))
        x = place(x).requires_grad_()
        w = torch.tensor(1.3 + 0.2j, dtype=C).requires_grad_(self.learned)
        loss = _program(x, w, self.half, self.norm, self.seed)
        loss.backward()
        return loss.detach(), x.grad, w.grad

    def serial(self) -> Any:
        return self._run(lambda x: x)

    def sharded(self, mesh: DeviceMesh) -> Any:
        _, d, sizes = CUTS[self.cut]

        def place(x: Tensor) -> Tensor:
            if not sizes:
                return st.distribute_tensor(x, mesh, [Shard(2), Shard(3)], src_data_rank=None)
            own = x.split(sizes, d)[mesh.get_local_rank()].clone()
            return st.ShardTensor.from_local(own, mesh, [Shard(d)], sizes={d: sizes})

        return self._run(place)


def draw(rng: random.Random) -> Case:
    norm = rng.choice((None, "ortho", "forward"))
    learned = rng.random() < 0.3
    return Case(rng.randrange(len(CUTS)), rng.random() < 0.7, norm, learned, rng.randrange(10**6))
