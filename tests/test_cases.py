"""Every case of every rule on every layout of the hard list, against plain PyTorch."""

import pytest
from cases import CASES


# "some", every sixth layout, is what `make quick` takes
@pytest.mark.parametrize("share", ["some", pytest.param("rest", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_hard_list(name, share):
    CASES[name].meet(share)


def test_no_case_is_without_layouts():
    assert not [name for name in CASES if not CASES[name].layouts()]
