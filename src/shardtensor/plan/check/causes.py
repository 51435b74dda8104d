"""Why a sharded model is wrong: what its source gives away, and what its numbers look like."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from ... import registry
from ...caller import op_of
from ...ranks.tolerance import gap

PARTED = (
    "Ranks did not run the same ops: look for a branch on the rank, on a local size or on a value "
    "that differs between ranks (x.to_local(), x.to_local().shape)."
)
# in a module's source: what goes wrong on shards, and what to do
_SIGNS = {
    r"\.to_local\(": "to_local() gives this rank's part only: use the global tensor, or a rule "
    "(docs/rules.md) for what needs the local one",
    r"\.get_(local_)?rank\(|\.get_coordinate\(|\bRANK\b": "it asks for the rank: what ranks "
    "compute must not depend on it",
    r"torch\.distributed|\bdist\.\w+\(": "it communicates by itself, or asks for the rank: leave "
    "that to the ops",
    r"\.data_ptr\(": "it reads memory: register what launches the kernel with st.rule",
    r"\.numpy\(\)": "numpy() is the global value, copied and without gradient: use torch ops",
    r"\.data\b": ".data has no gradient and no checks: use detach()",
    r"torch\.autograd\.Function|\.apply\(": "a torch.autograd.Function runs on shards: if it mixes "
    "rows, or its backward does, give it a rule with st.rule (docs/rules.md)",
}


@dataclass
class Part:
    """Of one result what a rank has and should have. dims: along which it is sharded."""

    got: Tensor
    want: Tensor
    dims: tuple[int, ...]

    @property
    def wrong(self) -> bool:
        off, scale = gap(self.got, self.want)
        return off > 1e-6 * scale


def signs(model: nn.Module, name: str) -> list[str]:
    """What the source of the module's forward gives away."""
    module = model if name == "the model" else model.get_submodule(name)
    try:
        source = inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return []
    return [text for sign, text in _SIGNS.items() if re.search(sign, source)]


def rules_of_users(ops: Iterable[str]) -> dict[str, str]:
    """By op, where its rule is, for rules that are not the library's own."""
    found, asked = {}, set(ops)
    for key, rule in list(registry.rules.items()):
        theirs = inspect.unwrap(rule)
        own = (getattr(theirs, "__module__", "") or "").startswith("shardtensor.")
        name = key if isinstance(key, str) else getattr(key, "__name__", "")
        if not own and name in asked:
            code = getattr(theirs, "__code__", None)
            at = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
            found[name] = f"it runs the rule {theirs.__qualname__}{at}"
    return found


def lines(model: nn.Module, name: str) -> tuple[str, range]:
    """The file and the lines of a module's forward."""
    module = model if name == "the model" else model.get_submodule(name)
    try:
        source, first = inspect.getsourcelines(type(module).forward)
        return inspect.getfile(type(module).forward), range(first, first + len(source))
    except (OSError, TypeError):
        return "", range(0)


def looks(parts: Sequence[Part]) -> str:
    """What the wrong values of all ranks look like, "" where nothing does."""
    if any(p.got.shape != p.want.shape for p in parts):
        return (
            "it has the size of this rank's shard (of to_local(), or its shape): use the global "
            "tensor, and sizes from x.shape"
        )
    some = [p for p in parts if p.want.numel()]
    if not some or not any(p.wrong for p in some):
        return ""
    dims = some[0].dims
    if len(some) > 1 and not some[0].wrong and all(p.wrong for p in some[1:]):
        deep = [_depth(p, d) for d in dims for p in some[1:]]
        if not deep or not all(deep):
            return "right on the first rank only: a position or state of each rank's own"
    if not dims:
        total = torch.stack([p.got for p in some]).sum(0) if len(some) > 1 else some[0].got
        if len(some) > 1 and not Part(total, some[0].want, ()).wrong:
            return "each rank has one addend: their sum is missing (a rule must say so in its spec)"
        if any(not torch.equal(p.got, some[0].got) for p in some[1:]):
            return "ranks have different values where all should have one: of a rank's own rows"
    if factor := _factor(some):
        return (
            f"it is {factor:.3g} times what it should be: a sum is missing or made twice, or a "
            "size of this rank's shard"
        )
    if not dims:
        return ""
    deep = [_depth(p, d) for d in dims for p in some if p.wrong]
    if deep and all(deep):
        return (
            f"wrong in {max(deep)} rows at the edges of shards only: a halo is missing or shifted"
        )
    if all(p.wrong for p in some):
        return "wrong on all ranks: a sum, mean or norm of a rank's own rows, or state of a rank"
    return "wrong on some ranks: it depends on the rank"


def _factor(parts: Sequence[Part]) -> float:
    """By what all values are too large; 0.0 where it is no one number."""
    got = torch.cat([p.got.flatten() for p in parts])
    want = torch.cat([p.want.flatten() for p in parts])
    if not want.is_floating_point() or not want.any():
        return 0.0
    factor = float((got * want).sum() / (want * want).sum())
    return factor if factor and not Part(got, factor * want, ()).wrong else 0.0


def _depth(part: Part, dim: int) -> int:
    """How many rows from an edge of the shard values are wrong; 0 where all may be."""
    off = (part.got - part.want).abs().transpose(0, dim).flatten(1).amax(1)
    rows = (off > 1e-6 * gap(part.want, None)[0]).nonzero().flatten()
    n = len(off)
    if not len(rows):
        return 0
    deep = int(torch.minimum(rows, n - 1 - rows).max()) + 1
    return deep if 2 * deep < n else 0


def place(error: BaseException, model: nn.Module) -> tuple[str, str]:
    """(module, op) in which an exception was raised; "" if outside of all."""
    names = {id(m): k or "the model" for k, m in model.named_modules()}
    module = op = ""
    at: TracebackType | None = error.__traceback__
    while at is not None:
        me = at.tb_frame.f_locals.get("self")
        module = names.get(id(me), module)
        op = op_of(at.tb_frame) or op
        at = at.tb_next
    return module, op
