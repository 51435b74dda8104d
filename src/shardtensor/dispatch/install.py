"""The one place that patches torch: what import of the library changes in it."""

from __future__ import annotations

from .. import _torch, caller, settings
from .._torch import checkpoint, dtensor, script
from ..tensor import ShardTensor, nodes, wrap
from ..tensor.anomaly import watching
from ..tensor.lazy import Lazy, engine_input
from ..tensor.redistribute import local_of
from . import functions
from .resolve import handler_of_shards

# what Dynamo runs as it is where it meets it: what is below a program's own calls. It looks through
# what stands around torch's own functions, and at `ShardTensor.__torch_function__`
_ALONE = (
    *("_torch.autograd", "_torch.world", "cache", "caller", "checkpoint", "comm", "containers"),
    *("cuts", "io", "observe", "paged", "plan", "ranks", "registry", "settings", "shares", "spec"),
    *("tensor.construct", "tensor.convert", "tensor.random", "tensor.recut", "tensor.redistribute"),
    "train",
)


def install() -> None:
    """Lead to the library what does not ask for `__torch_function__` by itself.

    Nothing changes for programs without ShardTensors.
    """
    _torch.hide_from_dynamo(ShardTensor.__torch_function__)
    _torch.hide_from_dynamo(Lazy.__torch_function__)
    _torch.leave_alone([f"shardtensor.{name}" for name in _ALONE])
    # C++ that looks at wrappers, which have neither versions nor history
    _torch.install_function_hook(functions.around_apply)
    _torch.install_engine_hook(
        functions.engine_roots,
        engine_input,
        functions.engine_results,
        watching,
        caller.backwards,
    )
    _torch.install_node_hooks(lambda x: isinstance(x, ShardTensor), nodes.accumulator, nodes.raw)
    _torch.install_ddp_hook(local_of)
    _torch.install_gradcheck_hook(lambda x: isinstance(x, ShardTensor))
    _torch.lift_transforms(
        lambda x: isinstance(x, ShardTensor),
        functions.inside,
        functions.tangent_of,
        functions.batch,
        functions.unbatch,
        functions.refuse_tangent,
    )
    script.install_script_hook(handler_of_shards)
    checkpoint.install(settings.bringing)
    checkpoint.install_inputs(
        lambda x: (x._local, (x._spec, x._strides)) if isinstance(x, ShardTensor) else (x, None),
        lambda x, seen: x if seen is None else wrap(x, *seen),
    )
    checkpoint.install_recomputed(functions.recomputed_from)
    dtensor.let_styles_pass(ShardTensor)
    dtensor.agree_on_overflow()
    dtensor.plan_by_rank()
    dtensor.let_norms_meet_no_rows()
