"""Domain parallelism: unmodified models on samples sharded over a device mesh."""

from . import bridge as _bridge
from . import dispatch as _dispatch
from . import rules as _rules
from .compile import compile
from .construct import distribute_tensor
from .errors import UnsupportedOpError
from .fallback import FallbackWarning, fallback
from .registry import rule
from .simulate import RankError, simulate
from .spec import Dim, Spec
from .tensor import ShardTensor
from .trace import trace

__version__ = "0.1.0"
__all__ = [
    "Dim",
    "FallbackWarning",
    "RankError",
    "ShardTensor",
    "Spec",
    "UnsupportedOpError",
    "compile",
    "distribute_tensor",
    "fallback",
    "rule",
    "simulate",
    "trace",
]
