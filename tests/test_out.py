"""`out=` of another dtype than the result: what torch casts, adds up in that dtype, or refuses."""

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, same

OPS = {
    "sum": lambda x, o: torch.sum(x, 0, out=o), "prod": lambda x, o: torch.prod(x, 0, out=o),
    "cumsum": lambda x, o: torch.cumsum(x, 0, out=o), "cumprod": lambda x, o: torch.cumprod(x, 1, out=o),
    "mean": lambda x, o: torch.mean(x, 0, out=o), "nansum": lambda x, o: torch.nansum(x, 0, out=o),
    "any": lambda x, o: torch.any(x, 0, out=o), "amax": lambda x, o: torch.amax(x, 0, out=o),
    "var": lambda x, o: torch.var(x, 0, out=o), "neg": lambda x, o: torch.neg(x, out=o),
    "add": lambda x, o: torch.add(x, 1, out=o), "eq": lambda x, o: torch.eq(x, 1, out=o),
    "mm": lambda x, o: torch.mm(x, x.mT, out=o), "kron": lambda x, o: torch.kron(x, x, out=o),
    "diff": lambda x, o: torch.diff(x, out=o), "outer": lambda x, o: torch.outer(x[0], x[1], out=o),
    "cat": lambda x, o: torch.cat([x, x], out=o), "norm": lambda x, o: torch.linalg.vector_norm(x, 2, 0, out=o),
    "argmax": lambda x, o: torch.argmax(x, 0, out=o), "floor_divide": lambda x, o: torch.floor_divide(x, 2, out=o),
}  # fmt: skip
SHAPES = {"cat": (8, 3), "mm": (4, 4), "kron": (16, 9), "diff": (4, 2), "outer": (3, 3)}
ALONG = ("cumsum", "cumprod", "neg", "add", "eq", "floor_divide")


def _tried(fn, x, out):
    try:
        return fn(x, out)
    except (RuntimeError, TypeError) as e:
        return e


@pytest.mark.parametrize("name", OPS)
def test_dtypes_of_out(name):
    shape = SHAPES.get(name, (4, 3) if name in ALONG else (3,))

    def run():
        mesh = make_mesh((2,))
        for dtype in (torch.float64, torch.int64):
            x = (torch.arange(12).reshape(4, 3) * 1.7 - 5).to(dtype)
            s = st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None, sizes={0: (3, 1)})
            for kind in (torch.int32, torch.float32, torch.float64, torch.bool, torch.complex128):
                want = _tried(OPS[name], x, torch.ones(shape, dtype=kind))
                out = st.distribute_tensor(
                    torch.ones(shape, dtype=kind), mesh, [Replicate()], src_data_rank=None
                )
                got = _tried(OPS[name], s, out)
                if isinstance(want, Exception):
                    assert isinstance(got, Exception), (dtype, kind, want)
                else:
                    assert isinstance(got, torch.Tensor), (dtype, kind, got)
                    same(out.full_tensor(), want, f"{dtype} into {kind}", 1e-6)

    st.simulate(2, run)


@pytest.mark.parametrize(
    ("fn", "match"),
    [
        (lambda x: torch.nansum(x, 0, dtype=torch.complex128), "not implemented for"),
        (lambda x: torch.linalg.vector_norm(x, 2, 0, dtype=torch.float32), "dtype of the input"),
        (lambda x: torch.linalg.vector_norm(x.long(), 2, 0, dtype=x.dtype), "floating point"),
    ],
)
def test_dtypes_that_torch_refuses(fn, match):
    x = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)

    def run():
        s = st.distribute_tensor(x, make_mesh((2,)), [Shard(0)], src_data_rank=None)
        for each in (x, s):
            with pytest.raises((RuntimeError, TypeError), match=match):
                fn(each)

    st.simulate(2, run)
