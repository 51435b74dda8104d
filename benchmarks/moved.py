"""Bytes that the kernels of one rank read and write, over those of its share of the plain op.

    OMP_NUM_THREADS=1 python benchmarks/moved.py [NAME ...] [--ranks 8] [--by-op]

One rank in the middle of a silent world. What a kernel reads and writes are its operands and its
results as the dispatcher sees them; views move nothing, and what a transport copies is not seen.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard

from shardtensor import cache
from shardtensor._torch.dispatcher import not_tracing
from shardtensor._torch.world import silent_world
from shardtensor.comm import groups
from shardtensor.comm.define import Looking
from shardtensor.ranks.testing import tensors
from shardtensor.spec import Spec
from shardtensor.tensor import wrap


class Moved(Looking):
    """While active, adds up by op the bytes that kernels read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.by_op: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.by_op.total()

    def op(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not (func.is_view or name in NOTHING):
            read = [] if name in WRITES else tensors([args, kwargs])
            if name == "copy_":
                read = tensors(args[1])
            found = [*read, *tensors(out)]
            self.by_op[name] += sum(size(x) for x in found if x.device.type != "meta")
        return out


NOTHING = {"empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "detach",
           "_unsafe_view", "_reshape_alias", "lift_fresh"}  # fmt: skip
WRITES = {"zero_", "fill_", "zeros", "zeros_like", "new_zeros", "full"}


def size(x: Tensor) -> int:
    """The bytes of x that lie in memory: of what was expanded, once."""
    n = x.element_size()
    for count, stride in zip(x.shape, x.stride(), strict=True):
        n *= count if stride else min(count, 1)
    return n


def moved(run: Callable[[], Any]) -> Moved:
    """What a warm call of run moves."""
    run()
    with Moved() as found, not_tracing():
        run()
    return found


class Case:
    """An op of an image that is cut along a dim."""

    def __init__(self, op: Callable[[Any], Any], shape: Sequence[int], dim: int) -> None:
        self.op, self.shape, self.dim = op, tuple(shape), dim

    def plain(self, backward: bool) -> Moved:
        return moved(self._step(torch.randn(self.shape), backward))

    def sharded(self, mesh: DeviceMesh, backward: bool) -> Moved:
        spec = Spec.of(mesh, [Shard(self.dim)], self.shape)
        local = torch.randn(spec.local_shape)
        return moved(self._step(wrap(local, spec), backward))

    def _step(self, x: Any, backward: bool) -> Callable[[], Any]:
        if not backward:
            return lambda: self.read(self.op(x))
        x.requires_grad_()
        y = self.read(self.op(x))
        g = torch.randn_like(y)

        def run() -> None:
            x.grad = None
            self.read(self.op(x)).backward(g)

        return run

    @staticmethod
    def read(y: Any) -> Tensor:
        return getattr(y, "_local", y)


W = torch.randn(16, 16, 3, 3)
CASES = {
    "irfft2(rfft2)": Case(lambda x: torch.fft.irfft2(torch.fft.rfft2(x)), (2, 8, 256, 256), 2),
    "ifft2(fft2)": Case(lambda x: torch.fft.ifft2(torch.fft.fft2(x)), (2, 8, 256, 256), 2),
    "irfft2(rfft2) by W": Case(lambda x: torch.fft.irfft2(torch.fft.rfft2(x)), (2, 8, 256, 256), 3),
    "rfft2 * 2": Case(lambda x: torch.fft.rfft2(x) * 2, (2, 8, 256, 256), 2),
    "rfftn 3-D": Case(
        lambda x: torch.fft.irfftn(torch.fft.rfftn(x, dim=(1, 2, 3)), dim=(1, 2, 3)),
        (2, 64, 64, 64), 1,
    ),
    "fft of the cut dim": Case(lambda x: torch.fft.fft(x, dim=2) * 2, (2, 8, 256, 256), 2),
    "conv": Case(lambda x: F.conv2d(x, W, padding=1), (2, 16, 256, 64), 2),
    "conv by 2": Case(lambda x: F.conv2d(x, W, stride=2, padding=1), (2, 16, 256, 64), 2),
    "conv large": Case(lambda x: F.conv2d(x, W, padding=1), (2, 16, 512, 256), 2),
    "conv by 2 large": Case(lambda x: F.conv2d(x, W, stride=2, padding=1), (2, 16, 512, 256), 2),
    "max_pool by 2 large": Case(lambda x: F.max_pool2d(x, 3, 2, 1), (2, 16, 512, 256), 2),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(CASES))
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--by-op", action="store_true")
    options = parser.parse_args()
    for name in options.names or CASES:
        for backward in (False, True):
            plain = CASES[name].plain(backward)
            cache.clear()
            with silent_world(options.ranks // 2, options.ranks):
                mesh = init_device_mesh("cpu", (options.ranks,))
                found = CASES[name].sharded(mesh, backward)
                cache.clear()
                groups.forget()
            share = plain.total / options.ranks
            way = "both ways" if backward else "forward"
            print(f"{name:20} {way:10} {found.total / share:6.2f}", flush=True)
            if options.by_op:
                for op, n in found.by_op.most_common():
                    before = plain.by_op[op] / options.ranks
                    print(f"    {op:28} {n / share:6.2f}  plain {before / share:6.2f}")


if __name__ == "__main__":
    main()
