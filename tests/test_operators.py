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


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_never_wrong(part):
    found = run_all([n for n in NAMES[part::PARTS] if n not in UNDEFINED], Setting(), 4)
    wrong = {v.name: v.messages["wrong"] for v in found if v.wrong}
    assert not wrong
    ran = [v for v in found if v.kind != "none"]
    assert len(ran) > 80 and sum(v.kind != "refused" for v in ran) >= 0.95 * len(ran)


@pytest.mark.parametrize("name", ["unique", "unique_consecutive", "einsum"])
def test_every_sample(name):
    """Python composites that choose between private helpers, and repeated indices."""
    (found,) = run_all([name], Setting(), 40)
    assert not found.wrong and found.gathered + found.right > 3


SETTINGS = {
    "": Setting(), "uneven": Setting(ranks=3, uneven=True), "complex64": Setting(torch.complex64),
    "bfloat16": Setting(torch.bfloat16), "int64": Setting(torch.int64),
}  # fmt: skip


def main():
    setting = SETTINGS[next((a for a in sys.argv[1:] if a in SETTINGS), "")]
    for v in run_all(
        [a for a in sys.argv[1:] if a not in SETTINGS] or sorted(ops(setting.dtype)), setting, 40
    ):
        print(f"{v.kind:9} {v.name:50} {v.messages.get(v.kind, '')[:200]}", flush=True)


if __name__ == "__main__":
    main()
