"""What ranks bring to a collective, compared: pure functions of their records."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

Record = Mapping[str, Any]
# of the sum of magnitudes: devices may differ in the last bits
_CLOSE = 1e-3


def position(record: Record) -> str:
    """ "`sum` (all_reduce of float32 [8]) at train.py:12"."""
    # at: told, but not compared
    at = record.get("line") or record.get("at")
    line = f" at {at}" if at else ""
    op = record.get("op")
    return (f"`{op}` ({_brings(record)})" if op else _brings(record)) + line


def _brings(record: Record) -> str:
    facts = record.get("facts", {})
    what = str(record["collective"]).replace("_", "-")
    if "lengths" in facts:
        source = f" from rank {facts['source']}" if "source" in facts else ""
        return f"{what} of {_short(facts['dtype'])} {facts['lengths']}{source}"
    if "gives" in facts:
        return f"{what} of {_short(facts['dtype'])}, {sum(facts['gives'])} bytes to others"
    return what


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def difference(records: Mapping[int, Record]) -> str:
    """Where the ranks' records (by rank, in the group's order) part; "" where they agree."""
    sides = _sides({r: _same(x) for r, x in records.items()})
    if len(sides) > 1:
        said = "; ".join(f"{_ranks(s)} in {position(records[s[0]])}" for s in sides)
        lines = any(x.get("line") or x.get("at") for x in records.values())
        hint = "" if lines else "; SHARDTENSOR_DEBUG=1 names the lines"
        return (
            f"ranks part: {said}{_before(records)}. Every rank must call the same ops alike{hint}"
        )
    return _sizes(records) or _trails(records)


def _same(record: Record) -> Any:
    """What all ranks must have alike. Paths of files may differ between hosts."""
    facts = {k: v for k, v in record.get("facts", {}).items() if k not in ("gives", "gets")}
    line = os.path.basename(record.get("line", ""))
    return (record["collective"], record.get("op"), line, str(sorted(facts.items(), key=str)))


def _sides(values: Mapping[int, Any]) -> list[list[int]]:
    """The ranks, those with equal values together; the smaller groups first."""
    sides: dict[Any, list[int]] = {}
    for r, v in values.items():
        sides.setdefault(v, []).append(r)
    return sorted(sides.values(), key=lambda s: (len(s), s))


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _before(records: Mapping[int, Record]) -> str:
    """The first op since the last agreement that was not the same everywhere."""
    for trails in _by_mesh(records).values():
        for here in _aligned(trails):
            told = {r: _op(o) for r, o in here.items()}
            if len(set(told.values())) > 1:
                return f". The first op that differs: {_told(told)}"
    return ""


def _told(told: Mapping[int, str]) -> str:
    return ", ".join(f"{_ranks(s)} {told[s[0]] or 'nothing more'}" for s in _sides(told))


def _op(op: Record | None) -> str:
    return "" if op is None else f"`{op['op']}` of {op['what']} at {op['line']}"


def _sizes(records: Mapping[int, Record]) -> str:
    """Where one rank gives another a number of bytes that this one does not expect."""
    ranks = list(records)
    first = records[ranks[0]].get("facts", {})
    if "gives" not in first:
        return ""
    for i, a in enumerate(ranks):
        for j, b in enumerate(ranks):
            given = records[a]["facts"]["gives"][j]
            taken = records[b]["facts"]["gets"][i]
            if given != taken:
                return (
                    f"sizes differ at {position(records[a])}: rank {a} gives rank {b} {given} "
                    f"bytes, where rank {b} expects {taken}{_before(records)}. Give every rank the "
                    "same shapes and shard sizes"
                )
    return ""


def _by_mesh(records: Mapping[int, Record]) -> dict[str, dict[int, Record]]:
    """For each mesh (its ranks as text): the trails of those of the ranks that it has."""
    meshes = dict.fromkeys(k for x in records.values() for k in x.get("trails", {}))
    found = {}
    for mesh in meshes:
        members = [r for r in map(int, mesh.split(",")) if r in records]
        if len(members) > 1:
            found[mesh] = {r: records[r].get("trails", {}).get(mesh, {}) for r in members}
    return found


def _aligned(trails: Mapping[int, Record]) -> Iterator[dict[int, Record | None]]:
    """The ranks' ops of one mesh, number by number; None for a rank that ran no more."""
    first = {r: t.get("count", 0) - len(t.get("ops", ())) for r, t in trails.items()}
    for i in range(max(first.values()), max(t.get("count", 0) for t in trails.values())):
        here = {}
        for r, t in trails.items():
            ops, at = t.get("ops", ()), i - first[r]
            here[r] = ops[at] if at < len(ops) else None
        yield here


def _trails(records: Mapping[int, Record]) -> str:
    """Where ranks ran other ops that sent nothing, or gave an op other operands."""
    for trails in _by_mesh(records).values():
        for here in _aligned(trails):
            ran = {r: o and (o["op"], os.path.basename(o["line"])) for r, o in here.items()}
            if len(set(ran.values())) > 1:
                said = _told({r: _op(o) for r, o in here.items()})
                return _parted(records, f"the first op that differs: {said}")
            found = _operands({r: o for r, o in here.items() if o is not None})
            if found:
                return found
        if len({(t.get("count", 0), t.get("sum", 0)) for t in trails.values()}) > 1:
            return _parted(records, "the ops that differ are too long ago to be told")
    return ""


def _parted(records: Mapping[int, Record], what: str) -> str:
    at = position(next(iter(records.values())))
    return (
        f"ranks part before {at}: {what}. Every rank must call the same ops alike, also those that "
        "send nothing"
    )


def _operands(ops: Mapping[int, Record]) -> str:
    """Where the same op had other operands on some rank."""
    ranks = list(ops)
    for i, a in enumerate(ranks):
        for b in ranks[i + 1 :]:
            x, y = ops[a], ops[b]
            if not _alike(x, y):
                shown = f"{x['what']} and {y['what']}"
                if x["what"] == y["what"]:
                    shown = f"{x['what']}, of other values"
                return (
                    f"rank {a} and rank {b} gave `{x['op']}` at {x['line']} operands that "
                    f"differ ({shown}). {_ADVICE.get(x['op'], _ALIKE)}"
                )
    return ""


_ALIKE = (
    "Specs, numbers and plain tensors must be the same on every rank: seed the ranks alike, "
    "broadcast what differs (a model: shardtensor.parallelize), or shard it with distribute_tensor"
)
_ADVICE = {
    "distribute_tensor": (
        "One rank's values would count and the others' be lost: give every rank of the mesh the "
        "same sample (a sampler by the rank of the data axis, not of the world), or a tensor of "
        "one value, such as torch.zeros, on ranks that have none"
    )
}


def _alike(x: Record, y: Record) -> bool:
    if x["what"] != y["what"] or len(x["values"]) != len(y["values"]):
        return False
    return all(
        None in (one, other) or _close(one, other)
        for one, other in zip(x["values"], y["values"], strict=True)
    )


def _close(one: Any, other: Any) -> bool:
    (kind, m, s), (k, n, t) = one, other
    return bool(kind == k and abs(m - n) <= _CLOSE * m and abs(s - t) <= _CLOSE * m)
