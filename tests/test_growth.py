"""The cost of an op on one rank of 4096 is that on one of 64, by counts: `benchmarks/growth.py`."""

import growth
import pytest

# what every rank has something for all others in: an all-to-all, an all-gather, an all-reduce
TO_ALL = {
    "conv both ways", "cumsum", "from_local", "full_tensor", "mean", "reduce_scatter", "select", "softmax", "sum", "swap",
    *growth.NORMS, *(f"{name}, both" for name in growth.NORMS),
}  # fmt: skip
# steps of a ring are as many as ranks
RING = {"ring attention"}


@pytest.mark.parametrize("name", sorted(growth.OPS.keys() - RING))
def test_counts_of_a_call_do_not_know_the_ranks(name):
    few, many = growth.cost(name, 64, 1), growth.cost(name, 4096, 1)
    assert many.calls == few.calls and many.kernels == few.kernels, (few, many)
    if name in TO_ALL:
        assert 64 <= many.messages / few.messages <= 66, (few, many)
    else:
        assert (many.messages, many.bytes) == (few.messages, few.bytes)


@pytest.mark.parametrize("name", sorted(RING))
def test_counts_of_a_hop_do_not_know_the_ranks(name):
    hops = 24, 96
    few, many = (growth.cost(name, n + 1, 1) for n in hops)
    for count in ("calls", "kernels", "messages", "bytes"):
        a, b = (getattr(c, count) / n for c, n in zip((few, many), hops, strict=True))
        assert b <= a, (count, few, many)


def test_plans_of_many_ranks_are_made_in_few_calls():
    """A first call may look at every rank, but not at every pair of ranks."""
    for name in ("conv", "roll", "swap"):
        assert growth.first_calls(name, 4096) < 4 * 4096, name
