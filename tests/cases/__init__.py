"""The cases of every rule: a function and its operands, registered once, held on the whole hard list.

One module for each family of ops; `layouts.py` has the list, `test_cases.py` is the test.
"""

import importlib
import pkgutil

import torch

from .table import CASES

for _module in pkgutil.iter_modules(__path__):
    # operands and weights are drawn as the module is read, and are the same in every run
    with torch.random.fork_rng():
        torch.manual_seed(0)
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["CASES"]
