"""Domain parallelism: unmodified models on samples sharded over a device mesh."""

# imported for what they register
from . import attention, checkpoint, graph, points, random, sparse, spectral, sphere, testing
from . import bridge as _bridge  # noqa: F401
from . import dispatch as _dispatch  # noqa: F401
from . import natten as _natten  # noqa: F401
from . import rules as _rules  # noqa: F401
from . import tracers as _tracers  # noqa: F401
from .attention.neighborhood import neighborhood_attention
from .check import check
from .compile import compile
from .construct import distribute_tensor
from .errors import DivergenceError, RankError, UnsupportedOpError
from .fallback import FallbackWarning, fallback
from .guard import guard, start_from_environment
from .launch import init
from .options import Options
from .override import rule
from .parallel import parallelize
from .plan import plan
from .rehearse import rehearse
from .simulate import simulate
from .spec import Dim, Spec
from .tensor import ShardTensor
from .tensor_parallel import tensor_parallel
from .trace import trace

__version__ = "0.1.0"
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
    "simulate",
    "sparse",
    "spectral",
    "sphere",
    "tensor_parallel",
    "testing",
    "trace",
]

start_from_environment()
