"""Random numbers under match_single_device: any op, any layout, any cut, bit for bit those of one device."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.nn import functional as F

import shardtensor as st

LAST = torch.channels_last
LAYOUTS = {
    "as it is": lambda x: x,
    "transpose": lambda x: x.transpose(1, 2),
    "transpose, then an op": lambda x: x.transpose(0, 3) * 2,
    "permute": lambda x: x.permute(2, 0, 3, 1),
    "channels last": lambda x: x.contiguous(memory_format=LAST),
    "flip": lambda x: x.flip(2).mT,
    "steps": lambda x: x[..., ::2].transpose(1, 3),
    "expand": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "flatten": lambda x: x.flatten(1, 2).mT,
    "one dim": lambda x: x.reshape(-1),
    "columns": lambda x: x[:, :, 1:].transpose(1, 2),
    "columns, then an op": lambda x: x[..., 1:3].permute(1, 3, 0, 2).exp(),
    "one row": lambda x: x[:, -1:].transpose(0, 1),
    "select": lambda x: x.select(2, 0).mT,
    "split": lambda x: x.split(2, -1)[-1].permute(3, 2, 1, 0),
    "sum": lambda x: x.permute(1, 0, 3, 2).sum(0, keepdim=True),
    "two orders": lambda x: (
        x.transpose(0, 2) + x.permute(2, 1, 0, 3).contiguous().transpose(1, 2).mT.mT
    ),
    "product": lambda x: x.mT @ x,
    "columns first": lambda x: torch.einsum("abcd,abce->ecdab", x, x).squeeze(0),
    "cat": lambda x: torch.cat([x.transpose(1, 3), x.transpose(1, 3) * 2]),
    "conv": lambda x: torch.conv2d(
        x.contiguous(memory_format=LAST), x.new_ones(3, x.shape[1], 1, 1)
    ),
    "no dim of one": lambda x: (x.transpose(0, 3) + 1).squeeze(),
    "detached": lambda x: x.mT.detach().clone(),
    "picked": lambda x: x.transpose(1, 2)[:, [0, -1]],
    "in place": lambda x: x.clone().transpose_(0, 1).unsqueeze_(1),
    "softmax": lambda x: x.transpose(1, 2).softmax(-1),
    "reshape": lambda x: x.transpose(1, 2).flatten(0, 1),
    "heads": lambda x: x.flatten(2).unflatten(1, (-1, 1)).transpose(1, 2),
}
OPS = {
    "dropout": lambda x, p: F.dropout(x, p),
    "dropout_": lambda x, p: torch.dropout_(x.clone(), p, True),
    "alpha_dropout": lambda x, p: F.alpha_dropout(x, p, True),
    "feature_dropout": lambda x, p: torch.feature_dropout(x, p, True),
    "feature_alpha_dropout": lambda x, p: F.feature_alpha_dropout(x, p, True),
    "rand_like": lambda x, p: torch.rand_like(x),
    "rand_like, contiguous": lambda x, p: torch.rand_like(x, memory_format=torch.contiguous_format),
    "randn_like": lambda x, p: torch.randn_like(x),
    "randint_like": lambda x, p: torch.randint_like(x, 3, 90),
    "normal_": lambda x, p: x.clone().normal_(p, 2.0),
    "uniform_": lambda x, p: x.clone().uniform_(-p, 2.0),
    "exponential_": lambda x, p: x.clone().exponential_(p + 1),
    "cauchy_": lambda x, p: x.clone().cauchy_(p, 2.0),
    "log_normal_": lambda x, p: x.clone().log_normal_(p, 0.5),
    "geometric_": lambda x, p: x.clone().geometric_(0.3),
    "random_": lambda x, p: x.clone().random_(0, 40),
    "bernoulli_": lambda x, p: x.clone().bernoulli_(p),
    "bernoulli": lambda x, p: torch.bernoulli(x.sigmoid()),
    "normal": lambda x, p: torch.normal(x, 2.0) + torch.normal(p, x.abs() + 1),
    "rrelu": lambda x, p: F.rrelu(x, 0.1, 0.4, training=True),
    "multinomial": lambda x, p: torch.multinomial(x.reshape(x.shape[0], -1).abs() + 0.1, 2, True),
    "poisson": lambda x, p: torch.poisson(x.abs() * 3),
    "binomial": lambda x, p: torch.binomial((x.abs() * 9).round(), x.sigmoid()),
    "attention": lambda x, p: F.scaled_dot_product_attention(x, x * 2, x + 1, dropout_p=p),
    "fractional pool": lambda x, p: F.fractional_max_pool2d(x, 2, output_size=2),
}


@dataclass(frozen=True)
class Case:
    """Several draws, one after the other, of one tensor that is seen in several ways."""

    draws: tuple[tuple[str, str], ...]
    p: float
    shape: tuple[int, ...]
    dtype: torch.dtype
    mesh: tuple[int, ...]
    dims: tuple[int, ...]
    sizes: tuple[int, ...] | None

    def _run(self, x: Tensor) -> Any:
        torch.manual_seed(3)
        found = [OPS[op](LAYOUTS[layout](x), self.p) for op, layout in self.draws]
        # the generator is left as one device leaves it
        return [*found, torch.rand(3)]

    def _x(self) -> Tensor:
        n = torch.Size(self.shape).numel()
        return torch.linspace(-2, 2, n, dtype=self.dtype).reshape(self.shape)

    def serial(self) -> Any:
        return self._run(self._x())

    def sharded(self, mesh: DeviceMesh) -> Any:
        places = [Replicate() if d < 0 else Shard(d) for d in self.dims]
        sizes = None if self.sizes is None else {self.dims[0]: self.sizes}
        x = st.distribute_tensor(self._x(), mesh, places, sizes=sizes, src_data_rank=None)
        with st.random.match_single_device():
            return self._run(x)


def draw(rng: random.Random) -> Case:
    mesh = rng.choice([(1,), (2,), (2,), (3,), (4,), (2, 2)])
    shape = [rng.choice([1, 2, 3, 4, 5, 7]) for _ in range(4)]
    dims = tuple(rng.choice([-1, 0, 1, 2, 3, 1, 2]) for _ in mesh)
    sizes = None
    if len(mesh) == 1 and dims[0] >= 0 and rng.random() < 0.7:
        cuts = sorted(rng.randint(0, shape[dims[0]]) for _ in range(mesh[0] - 1))
        sizes = tuple(b - a for a, b in zip([0, *cuts], [*cuts, shape[dims[0]]], strict=True))
    ops = tuple((rng.choice([*OPS]), rng.choice([*LAYOUTS])) for _ in range(rng.randint(1, 3)))
    dtype = rng.choice([torch.float64, torch.float64, torch.float32])
    return Case(ops, rng.choice([0.2, 0.5, 0.7]), tuple(shape), dtype, mesh, dims, sizes)
