# mypy: disable-error-code="attr-defined, assignment"
"""Private torch APIs around DTensors: root meshes, FSDP2's parameters, parallel styles."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._composable_state import _get_module_state, _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.utils import clip_grad

from ..later import dt, styles, when_loaded
from .held import Held, writes


def when_made_from_local(then: Callable[[Any], object]) -> None:
    """Call then(the Function that DTensor.from_local applies), once there are DTensors."""
    when_loaded("torch.distributed.tensor", lambda _: then(dt._api._FromTorchTensor))


def root_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that this one is a slice of, or itself."""
    return mesh._get_root_mesh()


def _groups(state: Any) -> list[Any]:
    """The groups of parameters that FSDP2 gathers for a module, by its state."""
    # one group until torch 2.12
    groups = getattr(state, "_fsdp_param_groups", None)
    groups = groups if groups is not None else [getattr(state, "_fsdp_param_group", None)]
    return [g for g in groups if g is not None]


def hold_for_graphs(module: torch.nn.Module) -> None:
    """Let a unit of FSDP2 keep its weights whole as long as a graph of gradients reads them."""
    state: Any = _get_module_state(module)
    for group in _groups(state):
        Held(group, state)


def _held_of(root: Any) -> list[Held]:
    """The groups of a model, by its state, that are whole for a graph of gradients."""
    every = [g for state in root._state_ctx.all_states for g in _groups(state)]
    found = [getattr(g, "_shardtensor_held", None) for g in every]
    return [h for h in found if h is not None and h.hooks is not None]


def _params_of(root: Any) -> list[Any]:
    """FSDP2's parameters of a called model, by its state."""
    every = root._state_ctx.all_states
    return [p for each in every for group in _groups(each) for p in group.fsdp_params]


def _fsdp_params() -> Iterator[Any]:
    for module in list(_module_state_mapping):
        for group in _groups(_get_module_state(module)):
            yield from group.fsdp_params


def is_kept_by_fsdp(x: dt.DTensor) -> bool:
    """Whether x is a parameter in the shards that FSDP2 keeps of it outside of forward."""
    return any(p.sharded_param is x for p in _fsdp_params())


def whole_gradients(parameters: Iterable[torch.Tensor]) -> list[str]:
    """Names of parameters of FSDP2 whose gradient is at the whole one: none came to the shards."""
    own = {id(p) for p in parameters}
    return [
        p._param_fqn or "a parameter"
        for p in _fsdp_params()
        if id(p.sharded_param) in own
        and getattr(getattr(p, "_unsharded_param", None), "grad", None) is not None
    ]


def weights_of_units(xs: Iterable[Any], shards: bool) -> list[str]:
    """Names of those that are parameters of units of ours; shards: only in the form of shards."""
    wanted, found = set(map(id, xs)), []
    for module in list(_module_state_mapping):
        for group in _groups(_get_module_state(module)):
            for p in group.fsdp_params if hasattr(group, "_shardtensor_held") else ():
                whole = None if shards else getattr(p, "_unsharded_param", None)
                if not wanted.isdisjoint((id(p.sharded_param), id(whole))):
                    found.append(p._param_fqn or "a parameter")
    return found


def is_around_unit(function: type[torch.autograd.Function]) -> bool:
    """Whether a Function is the identity of FSDP2 that what a unit is called with passes."""
    return function.__name__ == "RegisterPostBackwardFunction"


def hooked_fsdp(root: torch.nn.Module) -> list[str]:
    """Names of parameters of a called FSDP2 model that have hooks of register_hook, which no
    backward calls: FSDP2 puts gradients to their shards by itself.
    """
    params = _params_of(_get_module_state(root))
    return [p._param_fqn or "a parameter" for p in params if p.sharded_param._backward_hooks]


def is_broken_fsdp(root: torch.nn.Module) -> bool:
    """Whether a forward or backward of an FSDP2 model broke off."""
    state: Any = _get_module_state(root)
    return torch._C._current_graph_task_id() == -1 and (
        state._state_ctx.post_backward_final_callback_queued
        or state._training_state is not type(state._training_state).IDLE
    )


def mend_fsdp(root: torch.nn.Module) -> None:
    """Put the parameters of FSDP2 back in place after a forward or backward that broke off.

    FSDP2 itself (2.11 to 2.13) goes on with the state of the pass that broke, so that it neither
    reduces nor shards. What that pass had made of gradients is dropped.
    """
    state: Any = _get_module_state(root)
    if not hasattr(state, "_reset_iter_state"):
        raise RuntimeError(
            "a forward or backward of this FSDP2 model broke off, and this torch can not mend it: "
            "make the model anew and load its weights, or use torch 2.13 or newer"
        )
    params = _params_of(state)
    # torch 2.15 drops what passes before the broken one left there
    kept = [(p.sharded_param, p.sharded_param.grad) for p in params]
    for held in _held_of(state):
        held.release()
    state._reset_iter_state()
    for shard, grad in kept:
        shard.grad = grad
    for p in params:
        # since torch 2.15 the gradient of the whole parameter, by another name
        if "unsharded_accumulated_grad" in vars(p):
            p.unsharded_accumulated_grad = None
        if hasattr(p, "_unsharded_param"):
            p._unsharded_param.grad = None


def drop_stale(root: torch.nn.Module) -> None:
    """Before forward: let FSDP2 gather the root's own parameters anew if their shards have changed.

    It keeps them whole after a forward for the backward to come (torch 2.11 to 2.14). If none came
    and an optimizer stepped, the next forward would take the old ones.
    """
    state: Any = _get_module_state(root)
    for held in _held_of(state):
        if held.written != writes(held.group):
            held.release()
            held.group.reshard()
    for group in _groups(state):
        written = writes(group)
        if group.is_unsharded and written != getattr(group, "_shardtensor_written", written):
            group.reshard()
        group._shardtensor_written = written


def drop_whole(root: torch.nn.Module) -> None:
    """After forward: put the shards of the root's own parameters in place if no backward will.

    What is written to `root.parameters()` otherwise would be lost with the whole ones.
    """
    if not torch.is_grad_enabled() and getattr(
        _get_module_state(root), "_auto_reshard_after_forward", True
    ):
        for group in _groups(_get_module_state(root)):
            group.reshard()


def let_styles_pass(ours: type[torch.Tensor]) -> None:
    """Let the hooks of parallelize_module's styles leave activations of this type as they are."""

    def through(prepare: Callable[..., Any]) -> Callable[..., Any]:
        # distribute_module counts its parameters
        @functools.wraps(prepare)
        def hook(*args: Any) -> Any:
            # the style's settings, then module, activation or activations, mesh
            seen = args[-2]
            first = seen[0] if isinstance(seen, tuple) and seen else seen
            return first if isinstance(first, ours) else prepare(*args)

        return hook

    def let_pass(_: Any) -> None:
        for style in (styles.ColwiseParallel, styles.RowwiseParallel):
            style._prepare_input_fn = staticmethod(through(style._prepare_input_fn))
            style._prepare_output_fn = staticmethod(through(style._prepare_output_fn))

    when_loaded("torch.distributed.tensor.parallel", let_pass)


class _ByRank(dict[Any, Any]):
    """What torch keeps for the process, kept for each of the ranks that are its threads."""

    def __contains__(self, key: Any) -> bool:
        return super().__contains__((_rank(), key))

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__((_rank(), key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__((_rank(), key), value)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def plan_by_rank() -> None:
    """Let each rank plan for itself how DTensors are cut anew, where ranks are threads.

    torch (2.13 to 2.15) keeps plans for the process; those of uneven shards depend on the rank.
    """

    def replace(_: Any) -> None:
        from torch.distributed.tensor import _redistribute as module

        if hasattr(module, "_planner_cache"):
            plans = functools.cache(
                lambda rank, *specs: module._gen_transform_infos_non_cached(*specs)
            )
            module._planner_cache = _ByRank()
            module._gen_transform_infos = lambda *specs: plans(_rank(), *specs)
            module._gen_transform_infos.cache_clear = plans.cache_clear

    when_loaded("torch.distributed.tensor", replace)


def agree_on_overflow() -> None:
    """Let GradScaler see an overflow in any shard of any gradient.

    torch (2.11 to 2.13) reduces what ranks found along the axes that shard the first gradient of
    the list only (found_inf_reduce_handler). So each placement is a list of its own.
    """
    when_loaded("torch.distributed.tensor", _check_alike)


def _check_alike(_: Any) -> None:
    handlers = dt.DTensor._op_dispatcher._custom_op_handlers
    op = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default
    check = handlers[op]

    def run(op_call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grads, *rest = args
        alike: dict[Any, list[Any]] = {}
        for g in grads:
            if not isinstance(g, dt.DTensor):
                # torch complains of the mixture
                return check(op_call, args, kwargs)
            alike.setdefault(g.placements, []).append(g)
        for found in alike.values():
            check(op_call, (found, *rest), kwargs)
        return None

    handlers[op] = run


def let_norms_meet_no_rows() -> None:
    """Let clip_grad_norm_ take shards without rows by an order that nothing has a norm of.

    torch (2.11 to 2.15) raises for inf and negative orders, on ranks without a row alone.
    """
    when_loaded("torch.distributed.tensor", _fill_before_norms)


def _fill_before_norms(_: Any) -> None:
    total = clip_grad._get_total_norm

    @functools.wraps(total)
    def run(tensors: Any, norm_type: float = 2.0, *args: Any, **kwargs: Any) -> Any:
        if (order := float(norm_type)) < 0 or order == torch.inf:
            every = [tensors] if isinstance(tensors, torch.Tensor) else tensors
            # what changes neither a largest nor a smallest element, nor a sum of inverse powers
            tensors = [_filled(x, torch.inf if order < 0 else 0) for x in every]
        return total(tensors, norm_type, *args, **kwargs)

    clip_grad._get_total_norm = torch.nn.utils.get_total_norm = run


def _filled(x: torch.Tensor, value: float) -> torch.Tensor:
    """A DTensor of which this rank has nothing, with one such element in its place."""
    if not isinstance(x, dt.DTensor) or x._local_tensor.numel() or not x.numel():
        return x
    local = x._local_tensor.new_full((1,) * x.ndim, value)
    return dt.DTensor.from_local(
        local, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
    )
