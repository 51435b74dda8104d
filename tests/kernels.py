"""How many kernels an op launches: ops of torch that make or write memory."""

import torch
from torch.utils import _pytree as pytree

from shardtensor.comm.define import Looking


class Counted(Looking):
    """Kernels of torch, inside collectives too, and the bytes of memory that they give."""

    def __init__(self):
        super().__init__()
        self.kernels = self.bytes = 0

    def op(self, func, args, kwargs):
        out = func(*args, **kwargs)
        had = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        made = [x for x in tensors(out) if x.untyped_storage().data_ptr() not in had]
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and "empty" not in name and (made or func._schema.is_mutable):
            self.kernels += 1
            self.bytes += sum(x.numel() * x.element_size() for x in made)
        return out


def tensors(tree):
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]
