"""RNN, GRU, LSTM and their cells on shards of the batch, against plain PyTorch."""

import copy

import pytest
import torch
from cases.recurrent import MODULES
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import hold, make_mesh, shard


@pytest.mark.parametrize("name", MODULES)
def test_batch_stays_sharded(name):
    module, sizes = MODULES[name], (4, 0, 2)
    batch = 0 if module.batch_first else 1
    x = torch.randn(6, 6, 5, dtype=torch.float64)
    outs = hold(module, [x], [shard(batch, sizes)], (3,))
    assert outs[0].dims[batch].sizes == sizes
    assert all(s.dims[1].sizes == sizes for s in outs[1:])


def test_sends_weight_gradients_only():
    def run():
        x = st.distribute_tensor(torch.randn(4, 3, 5), make_mesh((2,)), [Shard(0)])
        module = nn.LSTM(5, 7, batch_first=True)
        with st.trace() as t:
            out, _ = module(x)
            assert t.messages == 0
            out.sum().backward()
        return t.bytes, sum(p.numel() for p in module.parameters())

    for sent, numel in st.simulate(2, run):
        assert sent == 4 * numel + 4  # two ranks: each sends what it has once; and the sum


def test_dropout_between_layers():
    """Each rank draws for itself, the expected value stays, and no layer is left out."""

    def run():
        torch.manual_seed(1)
        module = nn.GRU(4, 4, 2, dropout=0.5)
        x = st.distribute_tensor(torch.ones(1, 64, 4), make_mesh((2,)), [Shard(1)])
        out, state = module(x)
        assert state.shape == (2, 64, 4)
        return out.to_local()

    a, b = st.simulate(2, run)
    assert not torch.equal(a, b)
    assert a.var(1).sum() > 0


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_what_cannot_move_to_the_batch(name):
    """One sequence, or a batch that another mesh axis cuts."""
    torch.manual_seed(0)
    module = MODULES[name]
    hold(module, [torch.randn(1, 6, 5, dtype=torch.float64)], [shard(1, (4, 0, 2))], (3,))
    both = st.testing.On([Shard(0), Shard(1)])
    hold(module, [torch.randn(3, 6, 5, dtype=torch.float64)], [both], (2, 2))
    cell = nn.GRUCell(5, 7).double()
    hold(cell, [torch.randn(1, 5, dtype=torch.float64)], [shard(1)], (2,))


def test_packed_sequences_move_rows_and_not_wholes():
    """Those that other ranks hold, once each way; dropout between layers is refused."""
    lengths = torch.tensor([6, 5, 4, 4, 2, 1])

    def run():
        mesh = make_mesh((3,))
        x = st.distribute_tensor(torch.randn(6, 6, 5), mesh, [Shard(0)])
        rows = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        with st.trace() as t, torch.no_grad():
            nn.GRU(5, 7)(rows)
        with pytest.raises(st.UnsupportedOpError, match="layers one by one"):
            nn.GRU(5, 7, 2, dropout=0.5)(rows)
        return t.bytes

    # rows of 5 and of 7 numbers, and which they are
    assert 0 < sum(st.simulate(3, run)) <= (4 * (5 + 7) + 2 * 8) * int(lengths.sum())


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_compiles_whole(name):
    """Its lists of weights are those that the program is given: no state that the call changes."""

    def run(compiled):
        mesh, module = make_mesh((2,)), copy.deepcopy(MODULES[name])
        call = st.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
        kept = module._flat_weight_refs
        x = torch.randn(4, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        found = []
        for _ in range(3):
            out, _ = call(st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None))
            out.square().sum().backward()
            found += [out.detach().full_tensor(), *(p.grad.clone() for p in module.parameters())]
            with torch.no_grad():
                module.weight_hh_l0.mul_(0.5)
        assert not compiled or call.traces == 1
        assert kept is module._flat_weight_refs
        weights = [getattr(module, n) for n in module._flat_weights_names]
        assert all(ref() is w for ref, w in zip(kept, weights, strict=True))
        return found

    for rank in range(2):
        got, want = (st.simulate(2, run, c)[rank] for c in (True, False))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
