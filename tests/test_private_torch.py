"""Private torch APIs: each is used in one package, and in the versions for which it was checked."""

import ast
import importlib
from pathlib import Path

import pytest
import torch

from shardtensor import later

SOURCE = Path(__file__).parent.parent / "src/shardtensor"
OLDEST, NEWEST = "2.11", "2.15"
# (first, last version of torch that has been tried): what is used of them
USED = {
    (OLDEST, NEWEST): """
    torch.Tensor._make_wrapper_subclass
    torch.UntypedStorage._new_with_weak_ptr
    torch._C.DisableTorchFunction
    torch._C.DisableTorchFunctionSubclass
    torch._C.DispatchKey.CompositeImplicitAutograd
    torch._C.DispatchKey.PreDispatch
    torch._C._FunctionBase.saved_tensors
    torch._C._to_dlpack
    torch._C._to_dlpack_versioned
    torch._C.ScriptFunction
    torch._C.ScriptFunction.__call__
    torch._C.ScriptMethod
    torch._C.TensorBase.grad_fn.__get__
    torch._C._EnableTorchFunction
    torch._C._ForceDispatchKeyGuard
    torch._C._are_functorch_transforms_active
    torch._C._autograd._get_sequence_nr
    torch._C._autograd._profiler_enabled
    torch._C._autograd._top_saved_tensors_default_hooks
    torch._C._conv_determine_backend_memory_format
    torch._C._create_function_from_graph
    torch._C._functions.DelayedError
    torch._C._get_sdp_priority_order
    torch._C._increment_version
    torch._C._is_view_replay_enabled
    torch._C._current_autograd_node
    torch._C._current_graph_task_id
    torch._C._disabled_torch_function_impl
    torch._C._dispatch_get_all_op_names
    torch._C._dispatch_has_kernel
    torch._C._dispatch_has_kernel_for_dispatch_key
    torch._C._dispatch_keyset_full_after
    torch._C._dispatch_tls_is_dispatch_key_included
    torch._C._dispatch_tls_local_exclude_set
    torch._C._dispatch_tls_local_include_set
    torch._C._distributed_c10d._set_thread_isolation_mode
    torch._C._dynamo.eval_frame
    torch._C._TorchDispatchModeKey.FAKE
    torch._C._functorch.maybe_current_level
    torch._C._get_dispatch_mode
    torch._C._len_torch_dispatch_stack
    torch._C._nn
    torch._C._select_conv_backend
    torch._C._set_grad_enabled
    torch._C._set_sdp_priority_order
    torch._C._set_view_replay_enabled
    torch._C._storage_Use_Count
    torch._C._will_engine_execute_node
    torch._VF
    torch._dynamo.comptime.comptime
    torch._dynamo.graph_break
    torch._functorch.autograd_function
    torch._functorch.autograd_function.custom_function_call
    torch._functorch.eager_transforms
    torch._functorch.eager_transforms._wrap_for_grad
    torch._functorch.vmap
    torch._functorch.vmap._add_batch_dim
    torch.fx._symbolic_trace._create_wrapped_func
    torch._fused_sdp_choice
    torch._is_zerotensor
    torch._library.custom_ops.CustomOpDef
    torch._ops.OpOverload
    torch._ops.OpOverloadPacket
    torch._subclasses.fake_tensor.DataDependentOutputException
    torch._subclasses.fake_tensor.DynamicOutputShapeException
    torch._subclasses.fake_tensor.FakeTensor
    torch._subclasses.fake_tensor.FakeTensorMode
    torch._subclasses.fake_tensor.unset_fake_temporarily
    torch._unique2
    torch.autograd.Variable._execution_engine.queue_callback
    torch.autograd._engine_run_backward
    torch.autograd._get_sequence_nr
    torch.autograd.function._SingleLevelFunction
    torch.autograd.function._SingleLevelFunction.apply
    torch.autograd.graph._get_grad_fn_or_grad_acc
    torch.distributed._composable.checkpoint
    torch.distributed._composable.checkpoint_activation
    torch.distributed._composable.checkpoint_activation._no_hook
    torch.distributed._composable_state
    torch.distributed._composable_state._get_module_state
    torch.distributed._composable_state._module_state_mapping
    torch.distributed.distributed_c10d._get_default_store
    torch.distributed.distributed_c10d._world.pg_names
    torch.distributed.tensor.DTensor._op_dispatcher._custom_op_handlers
    torch.distributed.tensor._api._FromTorchTensor
    torch.nn.parallel.distributed._find_tensors
    torch.nn.utils.clip_grad._get_total_norm
    torch.nn.utils.parametrize._cache
    torch.nn.utils.parametrize._cache_enabled
    torch.nn.utils.stateless._functional_call
    torch.nn.utils.stateless._reparametrize_module
    torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default
    torch.ops.aten._scaled_dot_product_cudnn_attention
    torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    torch.ops.aten._scaled_dot_product_efficient_attention
    torch.ops.aten._scaled_dot_product_efficient_attention_backward
    torch.ops.aten._scaled_dot_product_flash_attention
    torch.ops.aten._scaled_dot_product_flash_attention_backward
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    torch.testing._internal.distributed.fake_pg.FakeStore
    torch.testing._internal.distributed.multi_threaded_pg
    torch.testing._internal.distributed.multi_threaded_pg.AllToAllBase
    torch.testing._internal.distributed.multi_threaded_pg.Collective
    torch.testing._internal.distributed.multi_threaded_pg.ProcessLocalGroup
    torch.testing._internal.distributed.multi_threaded_pg.ProcessLocalGroup.reset
    torch.testing._internal.distributed.multi_threaded_pg._install_threaded_pg
    torch.testing._internal.distributed.multi_threaded_pg._uninstall_threaded_pg
    torch.testing._internal.distributed.multi_threaded_pg.ret_work
    torch.utils._device.DeviceContext
    torch.utils._device.DeviceContext.__torch_function__.__code__
    torch.utils._python_dispatch
    torch.utils.checkpoint._CachedTorchDispatchMode
    torch.utils.checkpoint._CachingTorchDispatchMode
    torch.utils.checkpoint._CheckpointFrame
    torch.utils._python_dispatch._disable_current_modes
    torch.utils._python_dispatch._get_current_dispatch_mode_stack
    torch.utils._python_dispatch._pop_mode
    torch.utils._python_dispatch._push_mode
    torch._C._VariableFunctions._pack_padded_sequence
    torch._C._VariableFunctions._pad_packed_sequence
    torch._C._nn.pad_sequence
    torch._nested_tensor_from_mask_left_aligned
    torch.Tensor._make_subclass
    torch._C.DispatchKey.AutocastCPU
    torch._C.DispatchKey.AutocastCUDA
    torch._C.DispatchKey.FuncTorchDynamicLayerBackMode
    torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode
    torch._C.DispatchKeySet
    torch._C._DisableFuncTorch
    torch._C._DisableTorchDispatch
    torch._C._ExcludeDispatchKeyGuard
    torch._C._functorch
    torch._C._functorch.get_unwrapped
    torch._C._functorch.is_batchedtensor
    torch._C._functorch.is_functorch_wrapped_tensor
    torch._C._is_fwd_grad_enabled
    torch._C._set_throw_on_mutable_data_ptr
    torch._functorch.eager_transforms._unwrap_for_grad
    torch._functorch.eager_transforms.jvp_increment_nesting
    torch._functorch.vmap._remove_batch_dim
    torch._neg_view
    torch.autograd.forward_ad._current_level
    torch.nn.attention.flex_attention._LARGE_SPARSE_BLOCK_SIZE
    torch.nn.attention.flex_attention._ModificationType.SCORE_MOD
    torch.nn.attention.flex_attention._apply_kernel_options
    torch.nn.attention.flex_attention._get_mod_type
    torch.nn.attention.flex_attention._identity
    """,
    ("2.13", NEWEST): """
    torch.distributed.tensor._redistribute
    torch.distributed.tensor._redistribute._gen_transform_infos
    torch.distributed.tensor._redistribute._gen_transform_infos.cache_clear
    torch.distributed.tensor._redistribute._gen_transform_infos_non_cached
    torch.distributed.tensor._redistribute._planner_cache
    """,
    (OLDEST, "2.11"): """
    torch.utils.checkpoint._NoopSaveInputs
    """,
}
# used beside the package for private APIs: ops of the dispatcher, and what is read in every call
ELSEWHERE = [
    "torch.Tensor._typed_storage",
    "torch._assert_async",
    "torch._grouped_mm",
    "torch.ops.aten._adaptive_avg_pool2d",
    "torch.ops.aten._adaptive_avg_pool3d",
    "torch.ops.aten._linalg_check_errors",
    "torch.ops.aten._unsafe_view",
]
# which torch's own documentation uses
KNOWN = ("torch.utils._pytree", "torch.utils._python_dispatch.TorchDispatchMode")
RANGES = {name: span for span, names in USED.items() for name in names.split()}


def resolved(path):
    """What a dotted path names; raises AttributeError."""
    names = path.split(".")
    for n in range(len(names), 0, -1):
        try:
            found = importlib.import_module(".".join(names[:n]))
        except ModuleNotFoundError:
            continue
        for name in names[n:]:
            found = getattr(found, name)
        return found
    raise AttributeError(f"no module of {path}")


def exists(path):
    """Whether there is such a name, also of what is None now, as the default group before a start."""
    try:
        resolved(path)
    except AttributeError:
        return False
    return True


def imports(tree):
    """What each name of a module stands for, of torch: one thing or, in functions, several."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                path = a.name if a.asname else a.name.split(".")[0]
                found.setdefault(a.asname or path, []).append(path)
        elif isinstance(node, ast.ImportFrom) and node.module == "later":
            for a in node.names:
                at = getattr(getattr(later, a.name), "_module", None)
                found.setdefault(a.asname or a.name, []).append(at or "shardtensor")
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for a in node.names:
                found.setdefault(a.asname or a.name, []).append(f"{node.module}.{a.name}")
    return {k: v for k, v in found.items() if v[0].split(".")[0] == "torch"}


def is_private(path):
    return any(p.startswith("_") and not p.startswith("__") for p in path.split("."))


def used(path):
    """The private torch APIs that a file names, as dotted paths."""
    tree = ast.parse(path.read_text())
    known = imports(tree)
    found = {p for paths in known.values() for p in paths if is_private(p)}
    inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or id(node) in inner:
            continue
        names, at = [], node
        while isinstance(at, ast.Attribute):
            names.append(at.attr)
            at = at.value
        if isinstance(at, ast.Name) and at.id in known:
            wholes = [".".join([path, *reversed(names)]) for path in known[at.id]]
            whole = next((w for w in wholes if exists(w)), wholes[0])
            if is_private(whole):
                found.add(whole)
    return found


def everywhere():
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for name in used(path):
            found.setdefault(name, set()).add(str(path.relative_to(SOURCE)))
    return found


def version(text):
    return tuple(map(int, text.split(".")[:2]))


@pytest.mark.parametrize("name", [*RANGES, *ELSEWHERE])
def test_it_is_there(name):
    first, last = RANGES.get(name, (OLDEST, NEWEST))
    here = version(torch.__version__)
    tried = version(first) <= here and (last == NEWEST or here <= version(last))
    assert exists(name) or not tried, (
        f"used as in torch {first} to {last}, not in {torch.__version__}"
    )


def test_every_use_is_listed_and_in_its_place():
    found = {k: v for k, v in everywhere().items() if not k.startswith(KNOWN)}
    apart = {k for k, files in found.items() if not all(f.startswith("_torch/") for f in files)}
    assert sorted(apart) == sorted(ELSEWHERE), "move it into shardtensor._torch, or list it here"
    assert sorted(found) == sorted([*RANGES, *ELSEWHERE]), "list it with its versions"


def test_uses_are_found(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(
        "import torch\nfrom torch._C import _x\ny = torch._C._a.b(1).c + torch.ones(1)._d\n"
    )
    assert used(path) == {"torch._C._x", "torch._C._a.b"}


@pytest.mark.parametrize("n", [2, 3])
def test_backward_of_the_largest_passes_over_places_that_are_none(n):
    """As -1: pools of shards say so where the place is another rank's."""
    x, size = torch.randn(2, 3, *[6] * n), [[2] * n, [2] * n, [0] * n, [1] * n, False]
    for form in (torch.contiguous_format, (torch.channels_last, torch.channels_last_3d)[n - 2]):
        x = x.contiguous(memory_format=form)
        run = getattr(torch.ops.aten, f"max_pool{n}d_with_indices")
        y, at = run(x, *size)
        g = torch.randn_like(y)
        back = getattr(torch.ops.aten, f"max_pool{n}d_with_indices_backward")
        none = back(g, x, *size, at.index_fill(2, torch.tensor([0]), -1))
        assert torch.equal(none, back(g.index_fill(2, torch.tensor([0]), 0), x, *size, at))
