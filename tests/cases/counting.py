"""Counts and lookups."""

import torch

from .table import D, case, cases, integers, normal

EDGES = torch.tensor([-1.0, 0.0, 0.3, 2.0], dtype=D)
OPS = {
    "histc": lambda x: torch.histc(x, 5),
    "histc within": lambda x: torch.histc(x, 4, -1, 1),
    "histogram": lambda x: torch.histogram(x, 5),
    "histogram of 100": lambda x: x.histogram(),
    "edges": lambda x: torch.histogram(x, EDGES),
    "density": lambda x: torch.histogram(x, 4, range=(-1.0, 1.0), density=True),
    "bucketize": lambda x: torch.bucketize(x, EDGES, right=True),
    "searchsorted": lambda x: torch.searchsorted(EDGES, x),
    "isin": lambda x: torch.isin((x * 2).long(), torch.tensor([0, 1])),
}
INTEGERS = {
    "bincount": lambda x: torch.bincount(x),
    "minlength": lambda x: torch.bincount(x, minlength=9),
    "weights": lambda x: torch.bincount(x, torch.linspace(0, 1, 19)),
    "unique": lambda x: torch.unique(x, return_inverse=True, return_counts=True),
    "unique of bools": lambda x: torch.unique(x > 2, return_counts=True),
    "consecutive": lambda x: torch.unique_consecutive(x.sort().values, return_counts=True),
    "isin": lambda x: torch.isin(x, 3),
    "invert": lambda x: torch.isin(x, torch.tensor([1, 3]), invert=True),
}

cases("count", OPS, normal(3, 7), grad=False)
cases("count integers", INTEGERS, integers(0, 6, 19), grad=False, gather=True)


@case("searchsorted", torch.sort(integers(0, 9, 9)).values, integers(-1, 11, 3, 4), grad=False)
def sequence(s, v):
    return torch.searchsorted(s, v), torch.searchsorted(s, v, right=True)


case(
    "searchsorted", normal(3, 7).sort(1).values, normal(3, 4), dims=(0, 0), grad=False, name="rows"
)(torch.searchsorted)


@case(
    "histogramdd", normal(7, 2), EDGES, EDGES.tanh(), dims=[(0, 1), 0, 0], grad=False, gather=True
)
def edges_of_columns(x, a, b):
    return torch.histogramdd(x, [a, b]).hist
