"""Sparse, nested and quantized operands beside ShardTensors: torch's value, or a refusal that says what to do."""

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.nn import functional as F

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, simulate

F64 = torch.float64
LAYOUTS = {
    "coo": lambda s: s.to_sparse(),
    "csr": lambda s: s.to_sparse_csr(),
    "csc": lambda s: s.to_sparse_csc(),
    "bsr": lambda s: s.to_sparse_bsr((2, 2)),
}
OPS = {
    "matmul": lambda s, x: s @ x,
    "mm": lambda s, x: torch.mm(s, x),
    "sparse.mm": lambda s, x: torch.sparse.mm(s, x),
    "mv": lambda s, x: torch.mv(s, x[:, 0]),
    "addmm": lambda s, x: torch.addmm(x, s, x),
    "linear": lambda s, x: F.linear(x.T, s),
    "linear, bias": lambda s, x: F.linear(x, s, torch.ones(6, dtype=F64)),
    "linear of 3 dims, bias": lambda s, x: F.linear(x[None], s, torch.ones(6, dtype=F64)),
    "addmv": lambda s, x: torch.addmv(x[0], s, x[1]),
    "addmm, sparse last": lambda s, x: torch.addmm(x, x, s),
    "addr": lambda s, x: torch.addr(s, x[0], x[1]),
    "mul": lambda s, x: x * s,
    "reflected": lambda s, x: s * x,
    "add": lambda s, x: x + s,
    "add_": lambda s, x: x.clone().add_(s),
    "multi_dot": lambda s, x: torch.linalg.multi_dot([s, x, x]),
    "embedding": lambda s, x: F.embedding(x.long().abs(), s),
    "solve": lambda s, x: torch.triangular_solve(x, s)[0],
    "cat": lambda s, x: torch.cat([x, s]),
    "foreach": lambda s, x: torch._foreach_add([x], [s])[0],
    "setitem": lambda s, x: x.clone().__setitem__(slice(None), s),
}


def tried(fn, *args):
    try:
        return fn(*args), None
    except Exception as e:
        return None, e.with_traceback(None)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("place", [Shard(0), Shard(1), Replicate(), Partial()], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_beside_a_sharded_tensor(layout, place):
    """The same matrix: torch's value, or UnsupportedOpError on every rank with what to do."""
    x = torch.linspace(-1, 1, 36, dtype=F64).reshape(6, 6)
    s = LAYOUTS[layout](torch.eye(6, dtype=F64) * 2)

    def on_rank():
        mesh = make_mesh((3,))
        first = torch.distributed.get_rank() == 0
        found = {}
        for name, op in OPS.items():
            ours = (
                st.ShardTensor.from_local(x if first else x * 0, mesh, [place])
                if place == Partial()
                else st.distribute_tensor(x.clone(), mesh, [place])
            )
            got, error = tried(op, s, ours)
            got = got.full_tensor() if isinstance(got, st.ShardTensor) else got
            found[name] = got, error
        return found

    ranks = simulate(3, on_rank)
    for name, op in OPS.items():
        want, wrong = tried(op, s, x.clone())
        for found in ranks:
            got, error = found[name]
            assert wrong is None or error is not None, name
            if wrong is None and error is None:
                if want is not None:
                    torch.testing.assert_close(got.to_dense(), want.to_dense())
            elif error is not None:
                assert isinstance(error, (st.UnsupportedOpError, type(wrong))), (name, error)
                if wrong is None:
                    assert "to_dense()" in str(error) or "returns a new" in str(error), name
        assert len({type(found[name][1]) for found in ranks}) == 1, name


def test_a_sparse_weight_with_a_gradient_is_refused_before_backward():
    def on_rank():
        mesh = make_mesh((2,))
        x = st.distribute_tensor(torch.ones(6, 4, dtype=F64), mesh, [Shard(1)])
        s = torch.eye(6, dtype=F64).to_sparse().requires_grad_()
        with pytest.raises(st.UnsupportedOpError, match=r"torch.sparse.mm"):
            s @ x

    simulate(2, on_rank)


@pytest.mark.parametrize("kind", ["quantized", "mkldnn", "nested"])
def test_other_operands_that_are_not_dense(kind):
    other = {
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(6, 4), 0.1, 0, torch.quint8),
        "mkldnn": lambda: torch.ones(6, 4).to_mkldnn(),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(4)] * 6),
    }[kind]()

    def on_rank():
        x = st.distribute_tensor(torch.ones(6, 4), make_mesh((2,)), [Shard(0)])
        with pytest.raises(st.UnsupportedOpError, match=f"{kind}.*to_dense"):
            x + other

    simulate(2, on_rank)


def read_beside_a_stale_copy():
    mesh = make_mesh((2,))
    x = st.distribute_tensor(torch.arange(6.0).reshape(3, 2), mesh, [Shard(0)])
    row = x[-1]
    x.add_(1)
    whole = st.distribute_tensor(torch.arange(9.0).reshape(3, 3), mesh, [Replicate()])
    # a product by elements stays sparse
    product = torch.eye(3).to_sparse() * whole
    with pytest.raises(st.UnsupportedOpError, match="written to"):
        row.to_local()
    return product.full_tensor().to_dense()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_sparse_result_is_read_while_another_tensor_is_stale():
    want = torch.arange(9.0).reshape(3, 3).diag().diag()
    for got in simulate(2, read_beside_a_stale_copy):
        assert torch.equal(got, want)
