"""PyTorch's operator database on two ranks: right or refused, never wrong.

`python tests/test_operators.py [NAME ...]` prints the verdict on each op.
"""

import sys

import pytest
import torch
from operators import ops, run_all

# values that are random or undefined by their meaning cannot be compared
UNDEFINED = {
    "bernoulli", "cauchy", "empty_like", "exponential", "geometric", "log_normal", "new_empty",
    "new_empty_strided", "nn.functional.alpha_dropout", "nn.functional.dropout",
    "nn.functional.dropout2d", "nn.functional.dropout3d", "nn.functional.multi_head_attention_forward",
    "nn.functional.feature_alpha_dropout.with_train", "nn.functional.scaled_dot_product_attention",
    "normal.in_place", "rand_like", "randint_like", "randn_like", "uniform",
}  # fmt: skip
NAMES = sorted(ops())
PARTS = 6


def verdicts(names, most):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run_all(names, torch.float32, 2, most)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_never_wrong(part):
    found = verdicts([n for n in NAMES[part::PARTS] if n not in UNDEFINED], 4)
    wrong = {v.name: v.messages["wrong"] for v in found if v.wrong}
    assert not wrong
    ran = [v for v in found if v.right or v.gathered or v.refused]
    right = [v for v in ran if not v.refused]
    assert len(ran) > 80 and len(right) >= 0.95 * len(ran)


@pytest.mark.parametrize("name", ["unique", "unique_consecutive", "einsum"])
def test_every_sample(name):
    """Python composites that choose between private helpers, and repeated indices."""
    (found,) = verdicts([name], 40)
    assert not found.wrong and found.gathered + found.right > 3


def main():
    for v in verdicts(sys.argv[1:] or NAMES, 40):
        kind = next((k for k in ("wrong", "refused", "gathered", "right") if getattr(v, k)), "none")
        print(f"{kind:9} {v.name:50} {v.messages.get(kind, '')[:200]}")


if __name__ == "__main__":
    main()
