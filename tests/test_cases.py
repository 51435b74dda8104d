"""Every case of every rule on every layout of the hard list, against plain PyTorch."""

import pytest
from cases import CASES

# the first part, every fourth layout, is what `make quick` takes
PARTS = [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3))]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", CASES)
def test_hard_list(name, part):
    CASES[name].meet(part, len(PARTS))


def test_no_case_is_without_layouts():
    assert not [name for name in CASES if not CASES[name].layouts()]
