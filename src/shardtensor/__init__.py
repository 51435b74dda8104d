"""Domain parallelism: unmodified models on samples sharded over a device mesh."""

# imported for what they register
from . import bridge as _bridge  # noqa: F401
from . import dispatch as _dispatch  # noqa: F401
from . import points, random, testing
from . import rules as _rules  # noqa: F401
from .compile import compile
from .construct import distribute_tensor
from .errors import UnsupportedOpError
from .fallback import FallbackWarning, fallback
from .override import rule
from .parallel import parallelize
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
    "parallelize",
    "points",
    "random",
    "rule",
    "simulate",
    "testing",
    "trace",
]
