"""Modules under the names of 0.1, and those that `shardtensor` has at its top."""

import importlib
import sys
import warnings

import pytest

import shardtensor as st
from shardtensor import _moved


@pytest.mark.parametrize("old", _moved.DOORS)
def test_doors_are_the_modules_themselves(old):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        door = importlib.import_module(f"shardtensor.{old}")
        inner = importlib.import_module("shardtensor.points.search")
    assert door is getattr(st, old) is sys.modules[f"shardtensor.{_moved.DOORS[old]}"]
    assert inner is sys.modules["shardtensor.ops.points.search"]


@pytest.mark.parametrize("old", _moved.BEFORE)
def test_names_of_before_warn_and_name_the_new(old):
    new = f"shardtensor.{_moved.BEFORE[old]}"
    public = getattr(st, old)
    module = importlib.import_module(f"shardtensor.{old}")
    name = next(n for n in vars(importlib.import_module(new)) if not n.startswith("_"))
    with pytest.warns(DeprecationWarning, match=f"shardtensor.{old} is {new}") as seen:
        assert getattr(module, name) is getattr(sys.modules[new], name)
    assert seen[0].filename == __file__
    # the function of the same name is what it was
    assert getattr(st, old) is public


def test_an_import_of_before():
    with pytest.warns(DeprecationWarning, match="tensor.redistribute"):
        from shardtensor.redistribute import reduced
    assert reduced is st.tensor.redistribute.reduced
    assert callable(st.guard) and callable(st.trace)
