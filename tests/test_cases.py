"""Every case of every rule on every kind of layout of the hard list, against plain PyTorch."""

import layouts
import pytest
from cases import CASES


def pytest_generate_tests(metafunc):
    """`make quick` takes "some", every sixth layout; `make test` also one of each other kind; --whole all."""
    if "share" in metafunc.fixturenames:
        slow = ("kinds", "rest") if metafunc.config.getoption("--whole") else ("kinds",)
        shares = ["some", *(pytest.param(s, marks=pytest.mark.slow) for s in slow)]
        metafunc.parametrize("name", CASES)
        metafunc.parametrize("share", shares)


def test_hard_list(name, share):
    CASES[name].meet(share)


def test_every_case_meets_each_kind_of_layout_and_cuts_each_dim():
    for case in CASES.values():
        every, met = case.layouts(), [on for s in ("some", "kinds") for on in case.layouts(s)]
        assert {*map(layouts.kind, met)} == {*map(layouts.kind, every)}, case
        assert set().union(*map(layouts.cut, met)) == set().union(*map(layouts.cut, every)), case
        assert len(every) == len(met) + len(case.layouts("rest"))


def test_no_case_is_without_layouts():
    assert not [name for name in CASES if not CASES[name].layouts()]
