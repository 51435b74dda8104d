"""Forward mode over PyTorch's operator database: as on one device and as the vjp, or refused."""

import warnings
from itertools import islice
from zlib import crc32

import pytest
import torch
from operators import differ, largest, ops, shardable
from test_operators import UNDEFINED
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.utils import _pytree as pytree

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, simulate

D = torch.float64
# a view that reads memory beyond its tensor, which shards have not
UNSEEN = {"as_strided.partial_views"}
NAMES = sorted(
    n for n, o in ops(D).items() if o.supports_forward_ad and n not in UNDEFINED | UNSEEN
)


def _linear_map(op, sample):
    """(function of the sample's numbers, the numbers): a function of tensors, to tensors alone."""
    leaves, tree = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
    where = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dtype is D]

    def f(*numbers):
        given = list(leaves)
        for i, x in zip(where, numbers, strict=True):
            given[i] = x
        first, args, kwargs = pytree.tree_unflatten(given, tree)
        out = op(first, *args, **kwargs)
        found = pytree.tree_leaves(out, is_leaf=lambda x: isinstance(x, Tensor))
        return tuple(x for x in found if isinstance(x, Tensor) and x.is_floating_point())

    return f, where, [leaves[i].detach() for i in where]


def _directions(xs, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(x.shape, generator=g, dtype=D) + 0.5 for x in xs]


def _product(xs, ys):
    """The inner product; what is not there is zero."""
    both = [(x, y) for x, y in zip(xs, ys, strict=True) if x is not None and y is not None]
    total = sum(((x * y).sum() for x, y in both), torch.zeros((), dtype=D))
    return total.full_tensor() if isinstance(total, st.ShardTensor) else total


def _verdicts(names, most):
    """(name, verdict, why) of each sample on this rank."""
    found, mesh = [], make_mesh((2,))
    for name in names:
        op = ops(D)[name]
        torch.default_generator.manual_seed(0)
        for sample in islice(op.sample_inputs("cpu", D), most):
            f, where, numbers = _linear_map(op, sample)
            tangents = _directions(numbers, 0)
            try:
                wanted = torch.func.jvp(f, tuple(numbers), tuple(tangents))
            except Exception:
                continue
            for leaf, dim in shardable(sample):
                if leaf not in where:
                    continue
                at = where.index(leaf)
                given, along = list(numbers), list(tangents)
                for xs in (given, along):
                    xs[at] = st.distribute_tensor(xs[at], mesh, [Shard(dim)], src_data_rank=None)
                found.append((name, *_held(f, numbers, tangents, given, along, wanted)))
    return found


def _balance(f, numbers, tangents, along):
    """(<w, Jv>, <J'w, v>) of a function whose jvp is known, or None where it has no vjp."""
    try:
        out, back = torch.func.vjp(f, *numbers)
        cotangents = _directions(out, 1)
        return _product(cotangents, tangents), _product(back(tuple(cotangents)), along)
    except RuntimeError:
        return None


def _held(f, numbers, tangents, given, along, wanted):
    try:
        got = torch.func.jvp(f, tuple(given), tuple(along))
    except st.UnsupportedOpError as e:
        return "refused", str(e)
    except Exception as e:
        return "wrong", f"{type(e).__name__}: {e}"
    if [len(x) for x in got] != [len(x) for x in wanted]:
        return "wrong", "another number of results"
    for what, xs, ys in zip(("value", "tangent"), got, wanted, strict=True):
        for x, y in zip(xs, ys, strict=True):
            why = differ(x, y, 1e3 * largest(list(ys)), lambda: None, what)
            if why:
                return "wrong", why
    plain = _balance(f, numbers, wanted[1], tangents)
    # torch's gradients of factorizations are those of symmetric matrices
    if plain is not None and torch.isclose(*plain, rtol=1e-8, atol=1e-8):
        ours = _balance(f, given, got[1], along)
        if ours is None or not torch.isclose(*ours, rtol=1e-8, atol=1e-8):
            return "wrong", f"<w, Jv> and <J'w, v> are {ours}"
    return "right", ""


def _held_all(names, most):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranks = simulate(2, _verdicts, names, most)
    assert [v[:2] for v in ranks[0]] == [v[:2] for v in ranks[1]]
    return ranks[0]


# of several operands a plain one has a tangent, too, and torch takes them apart in C++
COMPOSITE = [
    "hstack", "kron", "nn.functional.mse_loss", "nn.functional.cosine_similarity", "trapezoid",
    "nn.functional.nll_loss", "broadcast_tensors", "linalg.multi_dot",
]  # fmt: skip


@pytest.mark.parametrize("part", range(2))
def test_jvp_is_that_of_one_device_and_of_the_vjp(part, pytestconfig):
    """A sample of all ops, two samples of each where the whole is asked for."""
    whole = pytestconfig.getoption("--whole")
    # by its name, so that one more op in a later torch leaves the others where they are
    some = [n for n in NAMES if crc32(n.encode()) % 16 == 3]
    names = NAMES if whole else [*COMPOSITE, *some]
    found = _held_all(names[part::2], 2 if whole else 1)
    assert not [v for v in found if v[1] == "wrong"]
    assert sum(v[1] == "right" for v in found) > 20
