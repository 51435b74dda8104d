"""Wrong and odd use that a scientist may try: each is refused alike on every rank, or right.

A case is a function of one rank. `torchs` cases are held against torch itself on the whole tensor:
the same value, or an error of the same kind. `refused` cases raise the named error with a message
that says what to do. `parted` cases go different ways on different ranks: the guard ends them.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

ROWS = 7


@dataclass
class Rank:
    """What a case gets: this rank's mesh, and the same tensors sharded and whole."""

    mesh: object
    me: int
    n: int

    def shard(self, whole, dim=0, **kwargs):
        return st.distribute_tensor(whole, self.mesh, [Shard(dim)], src_data_rank=None, **kwargs)


@dataclass(frozen=True)
class Case:
    fn: object
    kind: str
    error: tuple = ()
    match: str = ""


CASES: dict[str, Case] = {}


def add(fn, kind, error=(), match=""):
    name = fn.__name__
    assert name not in CASES, name
    CASES[name] = Case(fn, kind, error, match)
    return fn


def torchs(fn):
    """fn(a, x): a gives a plain tensor its form, x is a (7, 4) tensor; plain and sharded alike."""
    return add(fn, "torchs")


def refused(error, match):
    return lambda fn: add(fn, "refused", error, match)


def right(fn):
    """fn(r) returns pairs of what came out and what single-device torch gives."""
    return add(fn, "right")


def parted(match):
    return lambda fn: add(fn, "parted", (st.RankError,), match)


def whole(dtype=torch.float64):
    return torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        dtype
    )


def image():
    return torch.randn(
        2, 3, ROWS, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def outcome(name):
    """What one rank finds: ("value", ...) or ("error", names of its classes, message)."""
    case = CASES[name]
    n, me = dist.get_world_size(), dist.get_rank()
    rank = Rank(T.make_mesh((n,)), me, n)
    x = rank.shard(whole())
    try:
        if case.kind == "torchs":
            expected, found = _torchs(case.fn, rank)
            result = _compare(expected, found)
        else:
            result = ("value", case.fn(rank))
    except Exception as e:
        if case.kind == "parted":
            raise
        result = ("error", [c.__name__ for c in type(e).__mro__], f"{e}")
    if result[0] == "value" and case.kind == "right":
        for i, (got, want) in enumerate(result[1]):
            T.same(got, want, f"{name} {i}") if isinstance(want, torch.Tensor) else _equal(
                got, want
            )
        result = ("value", "right")
    if case.kind != "parted":
        # whatever happened, the ranks are still together
        assert abs(x.sum().item() - whole().sum().item()) < 1e-9
    return result


def guarded(name):
    """The same under the guard."""
    with st.guard(5.0):
        return outcome(name)


def _equal(got, want):
    assert got == want, f"{got!r}, not {want!r}"


def _attempt(fn, *args):
    try:
        return fn(*args), None
    except Exception as e:
        return None, e


def _torchs(fn, rank):
    return _attempt(fn, lambda t, dim=0: t, whole()), _attempt(fn, rank.shard, rank.shard(whole()))


def _compare(expected, found):
    (want, wrong), (got, error) = expected, found
    if wrong is not None:
        assert error is not None, f"no error, where torch raises {wrong!r}; got {got!r}"
        kinds = (type(wrong), ValueError, st.UnsupportedOpError)
        assert isinstance(error, kinds), f"{error!r}, where torch raises {wrong!r}"
        assert str(error), "an error without a message"
        return ("error", [c.__name__ for c in type(error).__mro__], f"{error}")
    if error is not None:
        assert isinstance(error, st.UnsupportedOpError), f"{error!r}, where torch gives a value"
        return ("error", [c.__name__ for c in type(error).__mro__], f"{error}")
    wants = want if isinstance(want, tuple) else (want,)
    gots = got if isinstance(got, tuple) else (got,)
    for g, w in zip(gots, wants, strict=True):
        T.same(g, w, "value") if isinstance(w, torch.Tensor) else _equal(g, w)
    return ("value", "as torch's")
