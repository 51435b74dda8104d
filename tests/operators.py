"""PyTorch's operator database run on sharded inputs: which ops are right, which are refused."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

import shardtensor as st
from shardtensor.fallback import _warned as warned
from shardtensor.testing import full, make_mesh


@dataclass
class Verdict:
    """What became of one op: counts of samples, and the first message of each kind."""

    name: str
    right: int = 0
    gathered: int = 0
    refused: int = 0
    wrong: int = 0
    messages: dict[str, str] = field(default_factory=dict)

    def note(self, kind: str, message: str = "") -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        if message:
            self.messages.setdefault(kind, message)


def ops(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Name -> OpInfo of every entry that supports the dtype on CPU."""
    return {
        o.name + (f".{o.variant_test_name}" if o.variant_test_name else ""): o
        for o in op_db
        if dtype in o.supported_dtypes("cpu")
    }


def shardable(sample: Any) -> list[tuple[int, int]]:
    """(which leaf, which dim) to shard: first and last dim of 2 or more of the first tensor."""
    leaves = pytree.tree_leaves((sample.input, sample.args, sample.kwargs))
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor) and x.layout is torch.strided:
            dims = [d for d, n in enumerate(x.shape) if n >= 2]
            if dims:
                return [(i, d) for d in dict.fromkeys((dims[0], dims[-1]))]
    return []


def _copy(x: Any) -> Any:
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def _call(op: Any, leaves: list[Any], tree: Any) -> tuple[list[Any], Tensor | None]:
    first, args, kwargs = pytree.tree_unflatten(leaves, tree)
    out = op(first, *args, **kwargs)
    outs = pytree.tree_leaves(out, is_leaf=lambda x: isinstance(x, st.ShardTensor))
    total = None
    for o in outs:
        if isinstance(o, Tensor) and o.requires_grad:
            weight = torch.linspace(0.5, 1.5, o.numel(), dtype=torch.float64).reshape(o.shape)
            value = (o * weight.to(o.dtype)).sum()
            value = value.real if value.is_complex() else value
            total = value if total is None else total + value
    return outs, total


def differ(got: Any, want: Any, what: str) -> str:
    """Why two results differ, or nothing."""
    if not isinstance(want, Tensor):
        return "" if got == want else f"{what}: {got} for {want}"
    if not isinstance(got, Tensor):
        return f"{what}: {type(got).__name__} for a tensor"
    if isinstance(got, st.ShardTensor) and got._local.shape != got._spec.local_shape:
        return f"{what}: local shape {tuple(got._local.shape)} for {got._spec}"
    got = full(got)
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{what}: {got.dtype} {tuple(got.shape)} for {want.dtype} {tuple(want.shape)}"
    tol = {torch.float32: 1e-4, torch.complex64: 1e-4, torch.float64: 1e-9}.get(want.dtype, 2e-2)
    same = torch.allclose(got, want, rtol=tol, atol=tol, equal_nan=True)
    return "" if same else f"{what}: values differ by {(got - want).abs().max()}"


def run(name: str, op: Any, dtype: torch.dtype, ranks: int, most: int) -> Verdict:
    """All samples of one op on this rank."""
    verdict = Verdict(name)
    grad = op.supports_autograd and (dtype.is_floating_point or dtype.is_complex)
    mesh = make_mesh((ranks,))
    torch.manual_seed(0)
    samples = list(op.sample_inputs("cpu", dtype, requires_grad=grad))[:most]
    for sample in samples:
        leaves, tree = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        for where, dim in shardable(sample):
            plain = [_copy(x) for x in leaves]
            try:
                wants, total = _call(op, plain, tree)
                if total is not None:
                    total.backward()
            except Exception:
                continue
            case = f"{[tuple(x.shape) if isinstance(x, Tensor) else x for x in leaves]}"
            case = f"{case[:120]} {str(sample.kwargs)[:60]} leaf {where} dim {dim}"
            mixed = [_copy(x) for x in leaves]
            mixed[where] = st.distribute_tensor(
                mixed[where], mesh, [Shard(dim)], src_data_rank=None
            )
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                warned.clear()
                try:
                    gots, total = _call(op, mixed, tree)
                    if total is not None:
                        total.backward()
                except st.UnsupportedOpError as e:
                    verdict.note("refused", f"{e} | {case}")
                    continue
                except st.RankError:
                    raise
                except Exception as e:
                    verdict.note("wrong", f"{type(e).__name__}: {e} | {case}")
                    continue
            problems = [differ(g, w, "value") for g, w in zip(gots, wants, strict=False)]
            if len(gots) != len(wants):
                problems.append(f"{len(gots)} results for {len(wants)}")
            problems += [
                differ(m.grad, p.grad, f"gradient of leaf {i}")
                for i, (m, p) in enumerate(zip(mixed, plain, strict=True))
                if isinstance(p, Tensor) and p.grad is not None
            ]
            bad = next((p for p in problems if p), "")
            if bad:
                verdict.note("wrong", f"{bad} | {case}")
            elif any(issubclass(w.category, st.FallbackWarning) for w in seen):
                verdict.note("gathered")
            else:
                verdict.note("right")
    return verdict


def run_all(names: list[str], dtype: torch.dtype, ranks: int, most: int = 40) -> list[Verdict]:
    """Verdicts of several ops; one simulated world each, so that one cannot spoil another."""
    known, found = ops(dtype), []
    for name in names:
        try:
            found.append(st.simulate(ranks, run, name, known[name], dtype, ranks, most)[0])
        except Exception as e:
            found.append(Verdict(name, wrong=1, messages={"wrong": str(e)}))
    return found
