"""Ops on fake tensors, each run once: of the same op on tensors alike it is known what comes out.

Torch finds the sizes of each result anew, or in a cache whose key takes as long as a kernel. A step
of a model has the same op in every block, every layout and every plan; here such an op costs a
dictionary's look-up and the tensors it gives.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._torch import probe
from .forms import forms
from .ops import facts, leaves, mapped

MOST = 2**17
# a number equals another of another type; what is not listed cannot be part of a key
_PLAIN = (torch.dtype, torch.device, torch.layout, torch.memory_format, str, type(None))
_NUMBERS = {int, float, bool, complex}
_SEQUENCES = {list, tuple, torch.Size}
_FAKE, _STRIDED = probe.FakeTensor, torch.strided
# of these the kernels for "meta" give what a fake mode gives, in a hundredth of its time
_NAMES = """
    view _unsafe_view reshape unflatten movedim slice select narrow transpose t permute expand
    unsqueeze squeeze unbind split split_with_sizes as_strided detach alias clone copy_ cat
    new_empty new_full new_ones new_zeros zeros_like empty_like ones_like fill_ zero_
    add sub mul div add_ sub_ mul_ div_ neg sqrt rsqrt pow addcmul addcmul_ addcdiv addcdiv_ lerp
    lerp_ relu relu_ gelu silu sigmoid tanh threshold_backward gelu_backward silu_backward
    sigmoid_backward tanh_backward sum mean mm addmm bmm native_layer_norm
    native_layer_norm_backward native_batch_norm_backward select_backward slice_backward
"""
_DIRECT = set(_NAMES.split())
_SET = torch.ops.aten.set_.source_Storage_storage_offset


@dataclass
class Entry:
    """What an op gives: how to make each result, and whether they come as a list or a tuple.

    results: (place of the argument that it is or is a view of, or -1; shape, stride, offset, dtype,
    device, or None where it is the argument itself), or None for none. cost: as the ledger has it.
    """

    results: list[Any]
    kind: type | None
    cost: Any = None


class Unknown(Exception):
    """An argument that no key can have."""


_entries: dict[Any, Entry | None] = {}


class Call:
    """One op's call: its tensors and its key, None where it is to be run as it is."""

    __slots__ = ("args", "entry", "func", "given", "key", "kwargs", "op")

    def __init__(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.given: list[Tensor] = []
        self.entry: Entry | None = None
        op = self.op = facts(func)
        try:
            parts = [self._part(a) for a in args]
            if kwargs:
                parts += [(k, self._part(v)) for k, v in kwargs.items()]
            likes = (torch.get_default_dtype(), torch.is_inference_mode_enabled())
            # an op lives as long as its number is known
            self.key: Any = (id(op), *likes, *parts) if op.kept else None
        except Unknown:
            self.key = None
            self.given = [*leaves((args, kwargs))]

    def _part(self, a: Any) -> Any:
        kind = type(a)
        if kind is _FAKE:
            self.given.append(a)
            if a.layout is not _STRIDED or a.is_conj() or a.is_neg():
                raise Unknown
            return a.shape, a.stride(), a.storage_offset(), a.dtype, a.fake_device
        if kind in _NUMBERS:
            return kind, a
        if kind in _SEQUENCES:
            return tuple([self._part(x) for x in a])
        if isinstance(a, Tensor):
            # a weight is a fake of another class
            self.given.append(a)
            if not probe.is_fake(a) or a.layout is not _STRIDED or a.is_conj() or a.is_neg():
                raise Unknown
            return a.shape, a.stride(), a.storage_offset(), a.dtype, a.fake_device  # type: ignore[attr-defined]
        if isinstance(a, _PLAIN):
            return a
        raise Unknown

    def run(self, fakes: probe.Fakes) -> Any:
        """The op's results, by what is known of it, or by running it."""
        if self.key is None:
            if self.func is _SET and probe.is_fake(self.args[0]):
                return fakes.moved(*self.args)
            return self.func(*self.args, **self.kwargs)
        self.entry = _entries.get(self.key)
        if self.entry is not None:
            return self._made(self.entry, fakes)
        direct = self._direct(fakes)
        if direct is not None:
            self._keep(direct)
            return self._made(direct, fakes)
        out = self.func(*self.args, **self.kwargs)
        # closures of the fake mode refer to themselves, and hold what the op took
        gc.collect(0)
        if self.key not in _entries:
            self._keep(self._entry(out, self.given))
        return out

    def _keep(self, entry: Entry | None) -> None:
        if entry is not None and self.op.resizes:
            # it may have given its result another size
            again = Call(self.func, self.args, self.kwargs).key
            entry = entry if again == self.key else None
        if len(_entries) >= MOST:
            _entries.clear()
        _entries[self.key] = self.entry = entry

    def _direct(self, fakes: probe.Fakes) -> Entry | None:
        """What a rule or a kernel for "meta" says; None where a fake mode might say otherwise."""
        if not self.given:
            return None
        device, asked = self.given[0].fake_device, self.kwargs.get("device")  # type: ignore[attr-defined]
        if asked is not None and asked != device:
            return None
        if any(x.fake_device != device for x in self.given):  # type: ignore[attr-defined]
            return None
        ruled = forms(self.op.name, self.given, self.args, self.kwargs)
        if ruled is not None:
            return self._ruled(ruled, device)
        if self.op.name not in _DIRECT or asked is not None:
            return None
        metas = {id(x): fakes.apart(x) for x in self.given}
        args, kwargs = mapped((self.args, self.kwargs), lambda x: metas[id(x)])
        try:
            out = fakes.asked(self.func, args, kwargs)
        except Exception:
            # the fake mode tells it as torch does
            return None
        return self._entry(out, [metas[id(x)] for x in self.given], device)

    def _ruled(self, ruled: Sequence[Any], device: torch.device) -> Entry:
        results: list[Any] = []
        for r in ruled:
            if isinstance(r, Tensor):
                results.append((next(i for i, g in enumerate(self.given) if g is r), None))
            else:
                results.append(None if r is None else (-1, *r, device))
        return Entry(results, None if self.op.single else tuple)

    def _made(self, entry: Entry, fakes: probe.Fakes) -> Any:
        out: list[Any] = []
        for r in entry.results:
            if r is None:
                out.append(None)
            elif r[1] is None:
                out.append(self.given[r[0]])
            else:
                at, *form = r
                out.append(fakes.make(*form, of=None if at < 0 else self.given[at]))
        return out[0] if entry.kind is None else entry.kind(out)

    def _entry(self, out: Any, given: list[Tensor], device: Any = None) -> Entry | None:
        """How to make these results again; None where that is not known.

        given: of what they were made; device: what fakes in their place say of theirs.
        """
        expected = probe.FakeTensor if device is None else Tensor
        kind = type(out) if type(out) in (list, tuple) else None
        results: list[Any] = []
        seen = {x.untyped_storage()._cdata: i for i, x in enumerate(given)}
        own = set[int]()
        for x in out if kind else [out]:
            if x is None:
                results.append(None)
                continue
            if type(x) is not expected and not any(x is g for g in given):
                return None
            at = next((i for i, g in enumerate(given) if g is x), -1)
            if at >= 0:
                results.append((at, None))
                continue
            if x.layout is not torch.strided or x.is_conj() or x.is_neg() or x.requires_grad:
                return None
            memory = x.untyped_storage()
            at = seen.get(memory._cdata, -1)
            form = (
                tuple(x.shape),
                x.stride(),
                x.storage_offset(),
                x.dtype,
                device or x.fake_device,
            )
            if at < 0 and (memory._cdata in own or memory.nbytes() != _span(x)):
                return None
            own.add(memory._cdata)
            results.append((at, *form))
        return Entry(results, kind)


def _span(x: Tensor) -> int:
    """Bytes that a new tensor of this form has."""
    if x.storage_offset():
        return -1
    if not x.numel():
        return 0
    span = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
    return span * x.element_size()
