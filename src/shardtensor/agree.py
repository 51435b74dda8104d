"""What ranks bring to a collective, compared: pure functions of their records."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]
# of the sum of magnitudes: devices may differ in the last bits
_CLOSE = 1e-3


def position(record: Record) -> str:
    """ "`sum` (all_reduce of float32 [8]) at train.py:12"."""
    line = f" at {record['line']}" if record.get("line") else ""
    op = record.get("op")
    return (f"`{op}` ({_brings(record)})" if op else _brings(record)) + line


def _brings(record: Record) -> str:
    facts = record.get("facts", {})
    what = str(record["collective"]).replace("_", "-")
    if "lengths" in facts:
        return f"{what} of {_short(facts['dtype'])} {facts['lengths']}"
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
        lines = any(x.get("line") for x in records.values())
        hint = "" if lines else "; SHARDTENSOR_DEBUG=1 names the lines"
        return (
            f"ranks part: {said}{_before(records)}. Every rank must call the same ops alike{hint}"
        )
    return _sizes(records) or _operands(records)


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
    trails = {r: x.get("ops", []) for r, x in records.items()}
    for i in range(max(map(len, trails.values()), default=0)):
        here = {r: _op(t[i]) if i < len(t) else "" for r, t in trails.items()}
        sides = _sides(here)
        if len(sides) > 1:
            said = ", ".join(f"{_ranks(s)} {here[s[0]] or 'nothing more'}" for s in sides)
            return f". The first op that differs: {said}"
    return ""


def _op(op: Record) -> str:
    return f"`{op['op']}` of {op['what']} at {op['line']}"


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


def _operands(records: Mapping[int, Record]) -> str:
    """Where an op had other operands on some rank."""
    trails = [x.get("ops", []) for x in records.values()]
    for ops in zip(*trails, strict=False):
        if len({(o["op"], os.path.basename(o["line"])) for o in ops}) > 1:
            # ranks went different ways without sending anything: no positions to compare
            return ""
        for i, (a, x) in enumerate(zip(records, ops, strict=True)):
            for b, y in list(zip(records, ops, strict=True))[i + 1 :]:
                if x["ranks"] == y["ranks"] and not _alike(x, y):
                    return (
                        f"rank {a} and rank {b} gave `{x['op']}` at {x['line']} operands that "
                        f"differ ({x['what']} and {y['what']}). Specs, numbers and plain tensors "
                        "must be the same on every rank: seed the ranks alike, broadcast what "
                        "differs (a model: shardtensor.parallelize), or shard it with "
                        "distribute_tensor"
                    )
    return ""


def _alike(x: Record, y: Record) -> bool:
    if x["what"] != y["what"] or len(x["values"]) != len(y["values"]):
        return False
    return all(
        kind == other and abs(m - n) <= _CLOSE * m and abs(s - t) <= _CLOSE * m
        for (kind, m, s), (other, n, t) in zip(x["values"], y["values"], strict=True)
    )
