"""PyTorch's module database, the input cut on a random dim.

Forward, gradients of the input and of the parameters, training and evaluation, and the state that a
module keeps, on meshes of 1 to 4 ranks and of 2 x 2, with uneven and empty shards.
"""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.common_modules import module_db
from torch.utils import _pytree as pytree

from campaigns.operands import _place, _placed, _total

MESHES = [(1,), (2,), (2,), (3,), (4,), (2, 2)]
# modules that draw random numbers on one device draw others on shards
RANDOM = (nn.Dropout, nn.RReLU, nn.AlphaDropout, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


@cache
def _modules() -> list[Any]:
    return [m for m in module_db if not issubclass(m.module_cls, RANDOM)]


def _without_dropout(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        elif isinstance(getattr(m, "dropout", None), float):
            m.dropout = 0.0
    return model


class Case:
    """A module, its input and where that lies."""

    rtol, atol = 1e-9, 1e-11

    def __init__(self, rng: random.Random) -> None:
        self.mesh = rng.choice(MESHES)
        self.training = rng.random() < 0.6
        self.steps = rng.choice([1, 1, 2])
        samples: list[Any] = []
        while not samples:
            info = rng.choice(_modules())
            samples = list(info.module_inputs_func(info, "cpu", torch.float64, True, self.training))
        self.one = rng.choice(samples)
        self.name = info.module_cls.__name__
        made = self.one.constructor_input
        kwargs = dict(made.kwargs)
        try:
            self.model = info.module_cls(*made.args, **kwargs).double()
        except TypeError:
            self.model = info.module_cls(*made.args, **{**kwargs, "dtype": torch.float64})
        self.model = _without_dropout(self.model).train(self.training)
        given = self.one.forward_input
        self.leaves, self.tree = pytree.tree_flatten(
            (given.args, given.kwargs) if given else ((), {})
        )
        self.places = {
            i: _place(rng, x, self.mesh, i > 0)
            for i, x in enumerate(self.leaves)
            if isinstance(x, Tensor)
        }

    def __repr__(self) -> str:
        given = [
            f"{x.dtype} {list(x.shape)} {self.places[i] or 'plain'}"
            if i in self.places
            else repr(x)
            for i, x in enumerate(self.leaves)
        ]
        mode = "train" if self.training else "eval"
        return f"{self.model!r} ({mode}, {self.steps}) on {self.mesh}: {', '.join(given)}"[:1500]

    def _run(self, make: Any) -> Any:
        model = copy.deepcopy(self.model)
        found = []
        for step in range(self.steps):
            leaves = [make(i, x) if i in self.places else x for i, x in enumerate(self.leaves)]
            args, kwargs = pytree.tree_unflatten(leaves, self.tree)
            outs = pytree.tree_leaves(model(*args, **kwargs))
            total = _total(outs, 0.5 + step)
            wrt = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
            grads: tuple[Any, ...] = ()
            if total is not None:
                total.backward()
                grads = tuple(0 if x.grad is None else x.grad for x in wrt)
            found.append((outs, grads))
        state = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
        params = [0 if p.grad is None else p.grad for p in model.parameters()]
        return found, state, params

    def serial(self) -> Any:
        return self._run(lambda i, x: x.detach().clone().requires_grad_(x.requires_grad))

    def sharded(self, mesh: DeviceMesh) -> Any:
        return self._run(lambda i, x: _placed(x, self.places[i], mesh))


def draw(rng: random.Random) -> Case:
    """A module of the database and its input, placed at random."""
    return Case(rng)
