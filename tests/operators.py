"""PyTorch's operator database run on sharded inputs: which ops are right, which are refused."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

import shardtensor as st
from shardtensor.ranks.testing import full, make_mesh


@dataclass
class Verdict:
    """What became of one op: counts of samples, the first message of each kind, what was sent."""

    name: str
    right: int = 0
    gathered: int = 0
    refused: int = 0
    wrong: int = 0
    messages: dict[str, str] = field(default_factory=dict)
    forward: set[str] = field(default_factory=set)
    backward: set[str] = field(default_factory=set)

    def note(self, kind: str, message: str = "") -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        if message:
            self.messages.setdefault(kind, message)

    @property
    def kind(self) -> str:
        """The worst that became of a sample."""
        kinds = ("wrong", "refused", "gathered", "right")
        return next((k for k in kinds if getattr(self, k)), "none")


@dataclass(frozen=True)
class Setting:
    """How the database is run: the dtype, how many ranks, shards of torch.chunk's or uneven sizes."""

    dtype: torch.dtype = torch.float32
    ranks: int = 2
    uneven: bool = False

    def sizes(self, n: int, first: bool) -> list[int] | None:
        """Shard sizes of a dim; uneven: nearly all on the first rank, or an empty shard inside."""
        if not self.uneven:
            return None
        tail = [0] * (self.ranks - 2)
        return [n - 1, 1, *tail] if first else [n - n // 2, *tail, n // 2]


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


def _call(op: Any, leaves: list[Any], tree: Any) -> list[Any]:
    first, args, kwargs = pytree.tree_unflatten(leaves, tree)
    out = op(first, *args, **kwargs)
    return pytree.tree_leaves(out, is_leaf=lambda x: isinstance(x, st.ShardTensor))


def _total(outs: list[Any]) -> Tensor | None:
    """A number that depends on every element of every output differently."""
    total = None
    for o in outs:
        if isinstance(o, Tensor) and o.requires_grad:
            weight = torch.linspace(0.5, 1.5, o.numel(), dtype=torch.float64).reshape(o.shape)
            value = (o * weight.to(o.dtype)).sum()
            value = value.real if value.is_complex() else value
            total = value if total is None else total + value
    return total


_TOLERANCE = {torch.float32: 1e-5, torch.complex64: 1e-5, torch.float64: 1e-12}


def largest(xs: list[Any]) -> float:
    """The largest finite absolute value; at least 0.1, since inputs and cotangents are about 1."""
    numbers = [x for x in xs if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())]
    known = [x[torch.isfinite(x)].abs().double() for x in numbers]
    return max([0.1, *(float(k.max()) for k in known if k.numel())])


def differ(got: Any, want: Any, scale: float, exact: Any, what: str) -> str:
    """Why two results differ by more than rounding of numbers of size `scale`, or nothing.

    exact: gives the same in double precision. A result may be further from torch's where torch's own
    is as far from the exact one: where numbers cancel, another order of the same sums gives other
    digits.
    """
    if not isinstance(want, Tensor):
        return "" if got == want else f"{what}: {got} for {want}"
    if not isinstance(got, Tensor):
        # torch.cat gives its empty operands gradients without elements
        return "" if not want.numel() else f"{what}: {type(got).__name__} for a tensor"
    if isinstance(got, st.ShardTensor) and got._local.shape != got._spec.local_shape:
        return f"{what}: local shape {tuple(got._local.shape)} for {got._spec}"
    got = full(got)
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{what}: {got.dtype} {tuple(got.shape)} for {want.dtype} {tuple(want.shape)}"
    if not (want.is_floating_point() or want.is_complex()) or not want.numel():
        return "" if torch.equal(got, want) else f"{what}: values differ"
    bound = _TOLERANCE.get(want.dtype, 2e-2) * scale
    if torch.isclose(got, want, rtol=0, atol=bound, equal_nan=True).all():
        return ""
    worst = float((got - want).abs().double().nan_to_num(float("inf")).max())
    best = exact()
    if isinstance(best, Tensor) and best.shape == want.shape:
        wide = torch.complex128 if want.is_complex() else torch.float64
        own = float((want.to(wide) - best).abs().double().max())
        if float((got.to(wide) - best).abs().double().max()) <= 4 * own:
            return ""
    return f"{what}: relative error {worst / scale:.1e}"


def _exact(op: Any, leaves: list[Any], tree: Any) -> tuple[list[Any], list[Any]]:
    """Outputs and gradients of the plain call in double precision."""
    wide = {torch.complex64: torch.complex128, torch.float32: torch.float64}
    wide[torch.bfloat16] = torch.float64
    doubled = [
        x.detach().to(wide.get(x.dtype, x.dtype)).requires_grad_(x.requires_grad)
        if isinstance(x, Tensor)
        else wide.get(x, x)
        if isinstance(x, torch.dtype)
        else x
        for x in leaves
    ]
    outs = _call(op, doubled, tree)
    total = _total(outs)
    if total is not None:
        total.backward()
    grads = [x.grad if isinstance(x, Tensor) else None for x in doubled]
    return [o.detach() if isinstance(o, Tensor) else o for o in outs], grads


def run(name: str, op: Any, setting: Setting, most: int) -> Verdict:
    """All samples of one op on this rank."""
    verdict, dtype = Verdict(name), setting.dtype
    grad = op.supports_autograd and (dtype.is_floating_point or dtype.is_complex)
    mesh = make_mesh((setting.ranks,))
    torch.default_generator.manual_seed(0)
    samples = list(islice(op.sample_inputs("cpu", dtype, requires_grad=grad), most))
    for sample in samples:
        leaves, tree = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        for nth, (where, dim) in enumerate(shardable(sample)):
            plain = [_copy(x) for x in leaves]
            try:
                wants = _call(op, plain, tree)
                total = _total(wants)
                if total is not None:
                    total.backward()
            except Exception:
                continue
            case = f"{[tuple(x.shape) if isinstance(x, Tensor) else x for x in leaves]}"
            case = f"{case[:120]} {str(sample.kwargs)[:60]} leaf {where} dim {dim}"
            mixed = [_copy(x) for x in leaves]
            sizes = setting.sizes(leaves[where].shape[dim], nth == 0)
            mixed[where] = st.distribute_tensor(
                mixed[where],
                mesh,
                [Shard(dim)],
                src_data_rank=None,
                sizes=None if sizes is None else {dim: sizes},
            )
            try:
                with st.trace() as forward:
                    gots = _call(op, mixed, tree)
                total = _total(gots)
                with st.trace() as backward:
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
            verdict.forward.update(s.collective for s in forward.sent)
            verdict.backward.update(s.collective for s in backward.sent)
            exact = cache(lambda leaves=leaves, tree=tree: _exact(op, leaves, tree))
            size = largest(wants)
            problems = [
                differ(g, w, size, lambda i=i, exact=exact: exact()[0][i], "value")
                for i, (g, w) in enumerate(zip(gots, wants, strict=False))
            ]
            if len(gots) != len(wants):
                problems.append(f"{len(gots)} results for {len(wants)}")
            size = largest([p.grad for p in plain if isinstance(p, Tensor)])
            problems += [
                differ(
                    m.grad, p.grad, size, lambda j=j, exact=exact: exact()[1][j], f"gradient {j}"
                )
                for j, (m, p) in enumerate(zip(mixed, plain, strict=True))
                if isinstance(p, Tensor) and p.grad is not None
            ]
            bad = next((p for p in problems if p), "")
            if bad:
                verdict.note("wrong", f"{bad} | {case}")
            elif forward.gathered:
                verdict.note("gathered")
            else:
                verdict.note("right")
    return verdict


def run_all(names: list[str], setting: Setting, most: int = 40) -> list[Verdict]:
    """Verdicts of several ops; one simulated world each, so that one cannot spoil another."""
    known, found = ops(setting.dtype), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in names:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    world = st.simulate(setting.ranks, run, name, known[name], setting, most)
                found.append(world[0])
            except Exception as e:
                found.append(Verdict(name, wrong=1, messages={"wrong": str(e)}))
    finally:
        torch.set_num_threads(threads)
    return found
