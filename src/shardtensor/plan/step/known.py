"""Values that a plan knows: of fake tensors that depend neither on inputs nor on large weights.

Constants, tables of positions, schedules, masks of windows: a small tensor whose operands are known
is computed for real beside its fake, so that code may read it. What depends on an input has no
value; where code asks for one that only bounds a size (masks, unique) or scales (a float), the
bound or a stand-in is taken, and the line is told in `assumed`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor

from ... import _torch
from ..._torch import probe
from ...caller import file_within, line_of_step, loop_of_user, op_of
from ...errors import UnsupportedOpError
from .ops import leaves, mapped
from .replay import Call

aten = torch.ops.aten
# below autograd, as in a collective, the second is not taken apart
_READS = (aten._local_scalar_dense.default, aten.item.default)
# elements of a tensor up to which its values are computed; of random ones and of empty memory,
# which weights are made from
MOST, MOST_DRAWN, MOST_EMPTY = 2**20, 2**12, 2**16
# what reads values for the code that calls it, or sizes; and who tells what is taken for a number
_ASKS = (
    "plan/", "_torch/", "tensor/", "dispatch/", "rules/norm/numbers.py",
    "rules/ordering/counting.py", "rules/gather/embedding.py",
)  # fmt: skip
_TELL = (
    "comm/rows.py",
    "rules/rows.py",
    "rules/extents.py",
    "rules/ordering/sort.py",
    "rules/images/unpool.py",
)
# what takes floats of one dtype alone, on CPUs and GPUs, under autocast too once it has cast
_ALIKE = {aten.mm.default, aten.addmm.default, aten.index_add.default, aten.index_add_.default}
_EMPTY = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}


class Known:
    """Runs ops on fake tensors and keeps the values that are known, by their memory.

    assumed: what was taken for a value that nobody knows, with the line of the user's code.
    """

    def __init__(self, mode: Any) -> None:
        self.convert = mode.from_tensor
        self.fakes = probe.Fakes(mode)
        # a tensor over the whole memory of each
        self.storages: dict[int, Tensor] = {}
        self._ends: dict[int, Any] = {}
        self.assumed: dict[str, None] = {}
        # memory of conditions that were taken to be so, and of what was made of them
        self._guessed = set[int]()

    def run(self, call: Call) -> Any:
        """What the call gives, on fake tensors."""
        op, func, args, kwargs = call.op, call.func, call.args, call.kwargs
        if call.key is None and call.given and not all(map(probe.is_fake, call.given)):
            if op.lifts:
                return self._lifted(args[0])
            call = Call(func, *mapped((args, kwargs), self.fake))
            args, kwargs = call.args, call.kwargs
        if func in _ALIKE:
            _check_dtypes(call)
        known = all(map(self.has, call.given))
        if call.key is not None or not op.depends:
            out = call.run(self.fakes)
        elif known:
            if self._guessed and func in _READS and id_of(args[0]) in self._guessed:
                _refuse_loop()
            return mapped(self._real(func, args, kwargs), self.fake)
        else:
            return self._bounded(func, args, kwargs)
        if not known:
            if op.mutable:
                self._forget(call)
            elif op.name in _GUESSES and out.numel() == 1:
                guess = _GUESSES[op.name]
                self._note(f"{op.name} is taken to be {guess}")
                with probe.outside_fake():
                    self._like(out, torch.full(out.shape, guess, dtype=out.dtype))
                self._guessed.add(id_of(out))
        elif not op.view:
            self._follow(call, out)
            if self._guessed and any(id_of(x) in self._guessed for x in call.given):
                self._guessed |= {*map(id_of, leaves(out))}
        return out

    def has(self, x: Tensor) -> bool:
        """Whether the values of a fake tensor are known."""
        return x.untyped_storage()._cdata in self.storages

    def forget(self, x: Tensor) -> None:
        """Let nobody know the values of a fake tensor."""
        self.storages.pop(x.untyped_storage()._cdata, None)

    @contextmanager
    def kept(self, xs: Iterable[Tensor]) -> Iterator[None]:
        """Afterwards the values of these are known as before, whatever was written to them."""
        found = {x.untyped_storage()._cdata for x in xs}
        before = {at: s for at, s in self.storages.items() if at in found}
        yield
        self.storages |= before

    def value(self, x: Tensor) -> Tensor:
        """The values of a fake tensor, in memory that its other views share."""
        real = self.storages[x.untyped_storage()._cdata]
        if _form(real) == _form(x):
            return real
        memory = real.untyped_storage()
        with probe.outside_fake():
            found = torch.empty(0, dtype=x.dtype).set_(
                memory, x.storage_offset(), x.shape, x.stride()
            )
            found = found.conj() if x.is_conj() else found
            return _torch.neg_view(found) if x.is_neg() else found

    def fake(self, x: Tensor, most: int | None = None) -> Tensor:
        """A fake of a real tensor, whose values are known if it is small; a fake as it is."""
        if probe.is_fake(x):
            return x
        # the same for the same tensor
        found = self.convert(x)
        small = x.numel() <= (most or MOST) and x.layout is torch.strided
        if small and not hasattr(found, "_real"):
            vars(found)["_real"] = True
            with probe.outside_fake():
                self._like(found, x.detach().clone(memory_format=torch.preserve_format))
        return found

    def _lifted(self, x: Tensor) -> Tensor:
        """A fake of numbers that have just become a tensor, which nobody else has."""
        if type(x) is not Tensor or x.numel() > MOST or not x.is_contiguous():
            return self.fake(x)
        form = tuple(x.shape), x.stride(), 0, x.dtype, x.device
        found = self.fakes.make(*form, of=None)
        with probe.outside_fake():
            self._like(found, x.detach().clone())
        return found

    def _follow(self, call: Call, out: Any) -> None:
        """Compute the values of what an op of known tensors made, unless that is much."""
        op, made = call.op, [*leaves(out)]
        size = max([x.numel() for x in made], default=0)
        empty = op.name in _EMPTY
        most = MOST_DRAWN if op.drawn else MOST_EMPTY if empty and not call.given else MOST
        if size > most or any(x.layout is not torch.strided for x in made):
            self._forget(call)
            return
        try:
            real = [*leaves(self._real(call.func, call.args, call.kwargs))]
        except Exception:
            # whatever it is, the fake tells it where it matters
            self._forget(call)
            return
        if [x.shape for x in real] != [x.shape for x in made]:
            # a kernel gives less than its fake: gradients that nobody asked for
            self._forget(call)
            return
        for fake, x in zip(made, real, strict=True):
            if not self.has(fake):
                if empty:
                    with probe.outside_fake():
                        x.zero_()
                self._like(fake, x)

    def _like(self, fake: Tensor, x: Tensor) -> None:
        """Enter the values of a new fake tensor."""
        if x.stride() != fake.stride() or fake.storage_offset() or x.storage_offset():
            with probe.outside_fake():
                span = sum((n - 1) * s for n, s in zip(fake.shape, fake.stride(), strict=True))
                room = torch.empty(
                    fake.storage_offset() + (span + 1 if fake.numel() else 0), dtype=x.dtype
                )
                x = room.as_strided(fake.shape, fake.stride(), fake.storage_offset()).copy_(x)
        memory = fake.untyped_storage()
        at = memory._cdata
        self.storages[at] = x
        self._guessed.discard(at)
        # it is called when the memory is released
        self._ends[at] = weakref.ref(memory, lambda _: self._released(at))

    def _released(self, at: int) -> None:
        self.storages.pop(at, None)
        self._ends.pop(at, None)

    def _real(self, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = mapped((args, kwargs), self.value)
        with probe.outside_fake():
            return func(*args, **kwargs)

    def _forget(self, call: Call) -> None:
        """What an op writes to has no known values any more."""
        for i, name in call.op.written:
            for x in leaves(call.args[i] if i < len(call.args) else call.kwargs.get(name)):
                self.forget(x)

    def _bounded(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an op can give at most, or a stand-in for a number that it reads."""
        if func in _READS:
            return self._number(args[0])
        if func is aten.equal.default:
            self._note("equal is taken to be True")
            return True
        if func is aten.index.Tensor:
            return self._indexed(func, *args)
        if func is aten.masked_select.default and self.has(args[1]):
            x, mask = torch.broadcast_tensors(*args)
            return self._indexed(aten.index.Tensor, x, [mask])
        bound = _BOUNDS.get(func)
        if bound is None:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__.strip("_2")
        op = op_of(sys._getframe(1)) or name
        # of the distinct rows that an index names its rule tells
        if name != "bincount" and (name != "unique" or name in op):
            self._note(f"{name} is taken to find all")
        return bound(*args, **kwargs)

    def _indexed(self, func: Any, x: Tensor, index: list[Tensor | None]) -> Any:
        """Boolean masks whose values nobody knows pick every element."""
        found: list[Tensor | None] = []
        for i in index:
            if i is None or i.dtype not in (torch.bool, torch.uint8):
                found.append(i)
                continue
            if self.has(i):
                with probe.outside_fake():
                    places = [p.contiguous() for p in self.value(i).nonzero().unbind(1)]
                found += map(self.fake, places)
                continue
            self._note("a mask is taken to pick all")
            n = prod(i.shape)
            found += [torch.empty(n, dtype=torch.int64, device=i.device) for _ in i.shape]
        return func(x, found)

    def _number(self, x: Tensor) -> Any:
        if x.dtype is torch.bool:
            _refuse_loop()
            self._note("a condition is taken to be False")
            return False
        if x.dtype.is_floating_point:
            self._note("a number that is read is taken to be 1")
            return 1.0
        if file := file_within(_ASKS):
            if file not in _TELL:
                self._note("a number that is read is taken to be 0")
            return 0
        return aten._local_scalar_dense.default(x)

    def _note(self, what: str) -> None:
        op = op_of(sys._getframe(1))
        if op and op not in what:
            what = f"{op}: {what}"
        self.assumed[f"{what} ({line_of_step() or 'in backward'})"] = None


def id_of(x: Tensor) -> int:
    """The number of a tensor's memory."""
    return x.untyped_storage()._cdata


def _check_dtypes(call: Call) -> None:
    """Raise as kernels do, and fakes of them do not."""
    found = sorted({str(x.dtype) for x in call.given if x.dtype.is_floating_point})
    if len(found) > 1:
        raise RuntimeError(f"{call.op.name}: operands of {' and '.join(found)}; cast one of them")


def _refuse_loop() -> None:
    """A loop that values end takes no turn, or all there are: a plan of neither is one."""
    if line := loop_of_user():
        raise UnsupportedOpError(
            f"how many turns a loop takes depends on values ({line}): bound it by a number, "
            "as in `for _ in range(turns)`, to plan so many"
        )


def _form(x: Tensor) -> Any:
    """What of a tensor its memory does not say."""
    return x.shape, x.stride(), x.storage_offset(), x.dtype, x.is_conj(), x.is_neg()


def _unique2(x: Tensor, _: bool = True, inverse: bool = False, counts: bool = False) -> Any:
    return _distinct(x.new_empty(x.numel()), x.shape, x.numel(), inverse, counts)


def _consecutive(
    x: Tensor, inverse: bool = False, counts: bool = False, dim: int | None = None
) -> Any:
    if dim is None:
        return _unique2(x, True, inverse, counts)
    return _unique_dim(x, dim, True, inverse, counts)


def _unique_dim(
    x: Tensor, dim: int, _: bool = True, inverse: bool = False, counts: bool = False
) -> Any:
    return _distinct(torch.empty_like(x), [x.shape[dim]], x.shape[dim], inverse, counts)


def _distinct(values: Tensor, shape: Any, n: int, inverse: bool, counts: bool) -> Any:
    ints: dict[str, Any] = dict(dtype=torch.int64, device=values.device)
    places = torch.empty(tuple(shape) if inverse else (0,), **ints)
    return values, places, torch.empty(n if counts else 0, **ints)


def _nonzero(x: Tensor) -> Tensor:
    return torch.empty((x.numel(), x.ndim), dtype=torch.int64, device=x.device)


def _masked_select(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty(prod(torch.broadcast_shapes(x.shape, mask.shape)))


def _bincount(x: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    if not minlength:
        return aten.bincount.default(x, weights, minlength)
    dtype = torch.int64 if weights is None else torch.float64
    return torch.empty(minlength, dtype=dtype, device=x.device)


# what an op of unknown values gives at most
_BOUNDS: dict[Any, Callable[..., Any]] = {
    aten.nonzero.default: _nonzero,
    aten.masked_select.default: _masked_select,
    aten._unique2.default: _unique2,
    aten.unique_consecutive.default: _consecutive,
    aten.unique_dim.default: _unique_dim,
    aten.bincount.default: _bincount,
}
# conditions of unknown values, as checks of inputs expect them
_GUESSES = {"all": True, "any": False}
