"""Domain parallelism: unmodified models on samples sharded over a device mesh."""

from typing import TYPE_CHECKING

from . import _moved, attention, testing

# imported for what they register
from . import rules as _rules  # noqa: F401
from .attention.neighborhood import neighborhood_attention
from .compile.program import compile
from .dispatch.fallback import FallbackWarning, fallback
from .dispatch.install import install as _install
from .dispatch.rule import rule
from .errors import DivergenceError, RankError, UnsupportedOpError
from .observe.guard import guard, start_from_environment
from .observe.trace import trace
from .ops import graph, points, sparse, spectral, sphere
from .ops import harmonics as _harmonics  # noqa: F401
from .ops import mambapy as _mambapy  # noqa: F401
from .ops import natten as _natten  # noqa: F401
from .ops import physicsnemo as _physicsnemo  # noqa: F401
from .ops import torch_geometric as _torch_geometric  # noqa: F401
from .ops import torch_scatter as _torch_scatter  # noqa: F401
from .ops import tracers as _tracers  # noqa: F401
from .paged.tiled import tiled
from .plan.check.check import check
from .plan.search import plan
from .ranks.rehearse import rehearse
from .ranks.simulate import simulate
from .spec import Dim, Spec
from .tensor import ShardTensor, random
from .tensor.construct import distribute_tensor
from .train import balance
from .train.buffers import shard_buffers
from .train.launch import init
from .train.options import Options
from .train.parallelize import parallelize
from .train.tensor_parallel import tensor_parallel

__version__ = "0.2.0"
__all__ = [
    "Dim",
    "DivergenceError",
    "FallbackWarning",
    "Options",
    "RankError",
    "ShardTensor",
    "Spec",
    "UnsupportedOpError",
    "attention",
    "balance",
    "check",
    "checkpoint",
    "compile",
    "distribute_tensor",
    "fallback",
    "graph",
    "guard",
    "init",
    "neighborhood_attention",
    "parallelize",
    "plan",
    "points",
    "random",
    "rehearse",
    "rule",
    "shard_buffers",
    "simulate",
    "sparse",
    "spectral",
    "sphere",
    "tensor_parallel",
    "testing",
    "tiled",
    "trace",
]

if TYPE_CHECKING:
    from . import accelerate, checkpoint, compat, lightning, transformers  # noqa: F401
else:
    __getattr__ = _moved.later
_install()
_moved.install(__name__)
start_from_environment()
