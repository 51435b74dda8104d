"""PhysicsNeMo's `domain_parallel`, by its names and signatures, on this library.

    from shardtensor.compat import physicsnemo as domain_parallel

    domain_parallel.DistributedManager.initialize()
    dm = domain_parallel.DistributedManager()
    mesh = dm.initialize_mesh((-1,), ("domain",))
    x = domain_parallel.scatter_tensor(x, 0, mesh, (Shard(2),), requires_grad=True)

`shard_utils.halo` and `shard_utils.ring` are there too. Tensors are this library's ShardTensors, so
the two kinds of names go together. Importing this gives them PhysicsNeMo's methods `offsets` and
`_spec.sharding_shapes`.
"""

from . import shard_utils
from .manager import DistributedManager
from .sync import sync_module_over_mesh
from .tensors import ShardTensor, ShardTensorSpec, TensorPromotionMode, scatter_tensor

__all__ = [
    "DistributedManager",
    "ShardTensor",
    "ShardTensorSpec",
    "TensorPromotionMode",
    "register_custom_ops",
    "scatter_tensor",
    "shard_utils",
    "sync_module_over_mesh",
]


def register_custom_ops() -> None:
    """Nothing: rules are always registered."""
