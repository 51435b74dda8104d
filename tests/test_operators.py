"""PyTorch's operator database on two ranks: right or refused, never wrong.

`python tests/test_operators.py [NAME ...]` prints the verdict on each op.
"""

import sys

import pytest
import torch
from operators import Setting, ops, run_all

# values that are random or undefined by their meaning cannot be compared
UNDEFINED = {
    "bernoulli", "multinomial", "normal", "normal.number_mean", "nn.functional.rrelu", "cauchy", "empty_like", "exponential", "geometric", "log_normal", "new_empty",
    "new_empty_strided", "nn.functional.alpha_dropout", "nn.functional.dropout",
    "nn.functional.dropout2d", "nn.functional.dropout3d", "nn.functional.multi_head_attention_forward",
    "nn.functional.feature_alpha_dropout.with_train", "nn.functional.scaled_dot_product_attention",
    "normal.in_place", "rand_like", "randint_like", "randn_like", "uniform",
}  # fmt: skip
NAMES = sorted(ops())
PARTS = 6


# a list that can only shrink: an op that leaves it must be taken out here
REFUSED = {
    "resize_": "changes a tensor's shape under its views; make a new tensor",
    "resize_as_": "changes a tensor's shape under its views; make a new tensor",
    "to_sparse": "a ShardTensor is dense",
    "sparse.mm.reduce": "a sparse operand; use index_add or scatter_reduce",
    "sparse.sampled_addmm": "a sparse operand; use index_select and products",
}
SETTINGS = {
    "": Setting(), "uneven": Setting(ranks=3, uneven=True), "complex64": Setting(torch.complex64),
    "bfloat16": Setting(torch.bfloat16), "int64": Setting(torch.int64),
}  # fmt: skip


# bfloat16 numbers and integers repeat, and the order of equal ones is undefined
TIES = dict.fromkeys(["sort", "argsort", "topk"], "the order of equal numbers is undefined")
# where torch's own result is not what it should be
TORCH = {"renorm": "torch's own gradient is NaN for complex numbers and p=inf, this is finite"}


def held(setting, names, most):
    """Verdicts; none is wrong, and only what the list names is refused."""
    ties = set(TIES) if setting.dtype in (torch.bfloat16, torch.int64) else set()
    undefined = UNDEFINED | ties
    found = run_all([n for n in names if n not in undefined], setting, most)
    assert not {v.name: v.messages["wrong"] for v in found if v.wrong}
    refused = {v.name: v.messages["refused"] for v in found if v.refused}
    assert not {n: m for n, m in refused.items() if n not in REFUSED}
    return [v for v in found if v.kind != "none"]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_never_wrong(part):
    assert len(held(Setting(), NAMES[part::PARTS], 4)) > 80


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uneven", "complex64", "bfloat16", "int64"])
def test_uneven_ranks_and_other_dtypes(kind, pytestconfig):
    """One sample of each op, two where the whole is asked for."""
    most = 2 if pytestconfig.getoption("--whole") else 1
    assert len(held(SETTINGS[kind], sorted(ops(SETTINGS[kind].dtype)), most)) > 250


@pytest.mark.parametrize("name", REFUSED)
def test_still_refused(name):
    (found,) = run_all([name], Setting(), 40)
    assert found.refused, f"{name} works: take it out of REFUSED"


@pytest.mark.parametrize("name", ["unique", "unique_consecutive", "einsum"])
def test_every_sample(name):
    """Python composites that choose between private helpers, and repeated indices."""
    (found,) = run_all([name], Setting(), 40)
    assert not found.wrong and found.gathered + found.right > 3


def page(found):
    """The verdicts of several settings as a table: a line for each op."""
    rows = {}
    for verdicts in found.values():
        for v in verdicts:
            if v.kind != "none":
                rows.setdefault(v.name, []).append(v)
    lines, counts = [], dict.fromkeys(["right", "gathered", "refused", "random", "wrong"], 0)
    notes = TIES | TORCH
    for name in sorted(rows):
        seen = rows[name]
        right, gathered = sum(v.right for v in seen), sum(v.gathered for v in seen)
        kind = next(
            k for k in ("wrong", "refused", "gathered", "right") if any(v.kind == k for v in seen)
        )
        text = {"right": "right", "refused": f"refused: {REFUSED.get(name)}", "wrong": "WRONG"}.get(
            kind
        )
        if name in UNDEFINED:
            kind = text = "random"
        elif name in notes and kind == "wrong":
            kind, text = "right", f"right; {notes[name]}"
        elif kind == "gathered":
            text = (
                "gathers"
                if not right
                else f"right; gathers in {100 * gathered / (right + gathered):.0f} % of the samples"
            )
        counts[kind] += 1
        sends = [
            " ".join(sorted(set().union(*(getattr(v, d) for v in seen))))
            for d in ("forward", "backward")
        ]
        lines.append(f"| {name} | {text} | {sends[0]} | {sends[1]} |")
    total = sum(counts.values())
    assert not counts["wrong"], "\n".join(lines)
    return (
        f"""# Operators

PyTorch's own operator database, each op with its samples, the first tensor sharded along its first
and along its last dim: value, dtype, shape and gradients against the plain call. float32 on 2 ranks
and on 3 ranks with uneven and empty shards; complex64, bfloat16 and int64 on 2 ranks.

Of {total} ops {counts["right"]} are right by a rule on every sample, {counts["gathered"]} gather in some or all
samples (right too, within the byte budget of `shardtensor.fallback`, with a warning),
{counts["refused"]} are refused, none is wrong, and {counts["random"]} draw random or undefined numbers, which cannot be
compared. Many samples are too small to do otherwise: a (5,) vector has no other dim to move its
shards to.

The columns name the collectives that any of the samples sent; see `shardtensor.comm`. Made by
`make operators`.

| op | result | forward sends | backward sends |
|---|---|---|---|
"""
        + "\n".join(lines)
        + "\n"
    )


def main():
    if sys.argv[1:2] == ["--docs"]:
        found = {k: run_all(sorted(ops(s.dtype)), s, 20 if k else 40) for k, s in SETTINGS.items()}
        print(page(found), end="")
        return
    setting = SETTINGS[next((a for a in sys.argv[1:] if a in SETTINGS), "")]
    names = [a for a in sys.argv[1:] if a not in SETTINGS] or sorted(ops(setting.dtype))
    for name in names:
        (v,) = run_all([name], setting, 40)
        print(f"{v.kind:9} {v.name:50} {v.messages.get(v.kind, '')[:200]}", flush=True)


if __name__ == "__main__":
    main()
