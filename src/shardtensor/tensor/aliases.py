"""Memory that is one in torch and lies in several places here.

Where torch gives a view, a rule that had to communicate gives a copy. Base and copies are a family:
once one of them is written to, the others are stale, and their versions move, so that autograd sees
a saved tensor changed as it does in torch. A stale tensor may not be read. Families come from
rules and writes from ops, which are the same on all ranks; so all ranks refuse alike.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..errors import UnsupportedOpError

# by the storages that are stale; empty most of the time, so that reads cost one look
stale: dict[int, _Stale] = {}
_room = 64
# (geometry of the base, {dim: (start, stop)}): which rows of its base a copy is
Part = tuple[Any, dict[int, tuple[int, int]]]


_ARRAY = "numpy"
# views of all elements of a base, from its first on; "" of a base whose partial sums were added up
_OF_ALL = {
    "", "view", "reshape", "_unsafe_view", "_reshape_alias", "view_as", "reshape_as", "flatten",
    "ravel", "unflatten",
}  # fmt: skip


class Piece:
    """One storage of a family, by weak references only."""

    def __init__(self, x: Tensor, made_by: str = "", base: Tensor | None = None) -> None:
        self.storage = _torch.storage_ref(x)
        self.made_by = made_by
        self.roots = [weakref.ref(_root(x))]
        self.base = None if base is None else weakref.ref(_root(base))
        self.tracked = torch.is_grad_enabled()
        self.part: Part | None = None
        self.begins = made_by in _OF_ALL and (base is None or begins(_torch.storage(base)))

    def of_copy(self, x: Tensor) -> Piece:
        """What a copy of all of this storage is among copies of its family."""
        made = Piece(x, self.made_by)
        made.part, made.begins = self.part, self.begins
        return made

    def follow(self, view: Tensor) -> None:
        """Let the version of a view move too, which autograd does not know as one."""
        if not self.tracked:
            self.roots.append(weakref.ref(view))

    def move_version(self) -> None:
        """Let autograd see a write."""
        for ref in self.roots:
            root = ref()
            if root is not None and not root.is_inference():
                torch.autograd.graph.increment_version(root)

    def refuse_leaf(self, operands: bool) -> None:
        """Raise as torch does for a write to a view that autograd could not follow.

        operands: whether an operand of the write requires a gradient.
        """
        base = None if self.base is None else self.base()
        if base is None or not torch.is_grad_enabled():
            return
        if base.requires_grad and base.is_leaf and (self.tracked or operands):
            raise RuntimeError(
                "a view of a leaf Variable that requires grad is being used in an in-place "
                "operation."
            )
        if operands and not self.tracked and base.requires_grad:
            raise RuntimeError(
                "A view was created in no_grad mode and is being modified inplace with grad mode "
                "enabled."
            )


class Family:
    """The storages that are one in torch."""

    def __init__(self) -> None:
        self.pieces: dict[int, Piece] = {}
        self.room = 8

    def add(self, piece: Piece) -> None:
        if len(self.pieces) >= self.room:
            self.pieces = {k: p for k, p in self.pieces.items() if not p.storage.expired()}
            self.room = 2 * len(self.pieces) + 8
        self.pieces[piece.storage.cdata] = piece

    def wrote(self, fresh: set[int], op: str, part: Part | None) -> None:
        """Make all pieces stale but the fresh ones and those of other parts."""
        writer = next((self.pieces[c] for c in fresh if c in self.pieces), None)
        for cdata, piece in list(self.pieces.items()):
            if cdata in fresh or piece.storage.expired():
                continue
            # of rows that keep their values too, as the views of a base have one version in torch
            piece.move_version()
            if not _disjoint(piece.part, part):
                stale[cdata] = _Stale(piece, writer, op)
        forget_dead()
        _sweep()

    def refuse_arrays(self, op: str) -> None:
        """Raise UnsupportedOpError for a write that an array which is still there would miss."""
        if any(p.made_by == _ARRAY and not p.storage.expired() for p in self.pieces.values()):
            raise UnsupportedOpError(
                f"{op} of a tensor whose array (.numpy()) is still in use: the array of a sharded "
                "tensor is a copy, which would miss the write; drop it first, or .copy() it"
            )

    def reshaped(self, fresh: set[int], op: str, tracked: bool) -> None:
        """As after a write that changes no value.

        tracked: whether autograd follows it. Then torch lets nobody read views made without it.
        """
        for cdata, piece in list(self.pieces.items()):
            if cdata not in fresh and not piece.storage.expired():
                piece.move_version()
                if tracked and piece.base is not None and not piece.tracked:
                    stale[cdata] = _Stale(piece, None, op)


class _Stale:
    """Why a storage may not be read; its reference keeps the number of the storage its own."""

    def __init__(self, piece: Piece, writer: Piece | None, op: str) -> None:
        self.piece, self.op = piece, op
        self.writer = writer.made_by if writer is not None else ""

    def __str__(self) -> str:
        if not self.piece.made_by and not self.writer:
            return (
                "partial sums are read, which were added up for another name of the same memory "
                f"and then written to ({self.op}): redistribute to Replicate or Shard first"
            )
        if self.piece.made_by:
            return (
                f"the result of {self.piece.made_by}, which torch gives as a view, but which was "
                "moved between ranks here, is read after the tensor behind it was written to "
                f"({self.op}): take it anew after the write, or .clone() it before"
            )
        return (
            f"a tensor is read after a view of it ({self.writer}), which was moved between "
            f"ranks here, was written to ({self.op}): .clone() the view before the write, "
            "or use the op that returns a new tensor"
        )


def forget_dead() -> None:
    """Drop what is stale and gone, so that reads are fast again."""
    for cdata, entry in list(stale.items()):
        if not entry.piece.storage.expired():
            return
        stale.pop(cdata, None)


def _sweep() -> None:
    """Drop what is gone behind a stale tensor that lives on, now and then."""
    global _room
    if len(stale) >= _room:
        for cdata, entry in list(stale.items()):
            if entry.piece.storage.expired():
                stale.pop(cdata, None)
        _room = 2 * len(stale) + 64


def refuse_stale(local: Tensor) -> None:
    """Raise UnsupportedOpError if the memory of a local tensor is stale."""
    # sparse tensors have no storage of their own, and no views here
    strided = local.layout is torch.strided
    entry = stale.get(_torch.storage(local)._cdata) if strided else None
    if entry is not None:
        raise UnsupportedOpError(str(entry))


def refuse_copy(local: Tensor) -> None:
    """Raise UnsupportedOpError for what a Function changed in place, if its base would miss the
    gradient."""
    if hasattr(_torch.storage(local), "_shardtensor_back"):
        raise UnsupportedOpError(
            "an autograd.Function changes a view in place that was gathered from another tensor: "
            "give it a .clone(), and assign the result"
        )


def family_of(local: Tensor) -> Family | None:
    """The family of a local tensor's storage."""
    return getattr(_torch.storage(local), "_shardtensor_family", None)


def relate(copy: Tensor, base: Tensor, op: str = "") -> Piece | None:
    """Make `copy`, which stands for what torch's `op` gives as a view of `base`, of one family.

    op: "" where the copy is the base with its partial sums added up.
    """
    untracked = torch.is_inference_mode_enabled() or _torch.functorch_level() is not None
    if base.requires_grad and not (copy.requires_grad or untracked):
        # as of a view that was made without gradients
        copy.requires_grad_()
    own, other = _torch.storage(copy), _torch.storage(base)
    # not by address, which traced tensors have not
    if own._cdata == other._cdata:
        return None
    family = getattr(other, "_shardtensor_family", None)
    if family is None:
        family = other._shardtensor_family = Family()  # type: ignore[attr-defined]
        family.add(Piece(base))
    own._shardtensor_family = family  # type: ignore[attr-defined]
    piece = Piece(copy, op, base)
    family.add(piece)
    return piece


def relate_copies(local: Tensor, copied: Tensor, memo: dict[int, Any]) -> None:
    """Let deep copies with one memo be of one family if what they are copies of is."""
    family = family_of(local)
    if family is None:
        return
    if id(family) not in memo:
        memo[id(family)] = Family()
        # as `copy` does, so that its id stays its own
        memo.setdefault(id(memo), []).append(family)
    own, copies = _torch.storage(copied), memo[id(family)]
    own._shardtensor_family = copies  # type: ignore[attr-defined]
    if own._cdata not in copies.pieces:
        copies.add(family.pieces[_torch.storage(local)._cdata].of_copy(copied))


def begins(memory: torch.UntypedStorage, whole: tuple[int, torch.dtype] | None = None) -> bool:
    """Whether the tensor of some memory is, on one device, all of it or begins it, so far as known.

    whole: how many elements of what dtype it has; None: said only of memory without slices.
    """
    family = getattr(memory, "_shardtensor_family", None)
    if family is not None and not family.pieces[memory._cdata].begins:
        return False
    # a view of as many elements has all of them
    return getattr(memory, "_shardtensor_whole", whole) == whole


def as_array(whole: Tensor, array: Any, base: Tensor) -> Any:
    """The array of a gathered tensor, which neither sees nor makes writes to its base.

    So it is read-only, and while it is there the base is not written to.
    """
    if _torch.storage(whole)._cdata != _torch.storage(base)._cdata:
        array.flags.writeable = False
        if array.base is not None:
            relate(whole.detach(), base.detach(), _ARRAY)
    return array


def _root(x: Tensor) -> Tensor:
    """The tensor whose object lives as long as any view of it that autograd knows."""
    return x if x._base is None else x._base


def _disjoint(a: Part | None, b: Part | None) -> bool:
    if a is None or b is None or a[0] != b[0]:
        return False
    return any(a[1][d][1] <= b[1][d][0] or b[1][d][1] <= a[1][d][0] for d in a[1].keys() & b[1])
