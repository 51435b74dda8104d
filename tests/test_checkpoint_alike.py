"""Of values that ranks have otherwise under one key a checkpoint has the first rank's, and says so."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import checkpoint
from shardtensor.checkpoint import planner
from shardtensor.checkpoint.alike import digest
from shardtensor.ranks.testing import make_mesh


def own_values(folder, save):
    rank, mesh = dist.get_rank(), make_mesh((3,))
    state = {
        "x": st.distribute_tensor(torch.ones(2), mesh, [Shard(0)], src_data_rank=None),
        "big": torch.full((5,), 0.0 if rank < 2 else -0.0),
        "s": {"loss": 0.5 + rank, "seen": {"b", "a"}, "same": (1, torch.ones(3).bfloat16())},
        f"rank{rank}": rank,
    }
    save(state, folder, "a")
    checkpoint.finish()
    loaded = {"big": torch.ones(5), "s": {"loss": 0, "seen": 0, "same": 0}, f"rank{rank}": None}
    checkpoint.load(loaded, folder / "a")
    assert loaded[f"rank{rank}"] == rank and not loaded["big"].signbit().any()
    return loaded["s"]["loss"]


@pytest.mark.parametrize("save", [checkpoint.save, checkpoint.save_async])
def test_values_that_differ_are_those_of_the_first_rank(tmp_path, save):
    with pytest.warns(UserWarning, match="ranks have other values") as told:
        assert st.simulate(3, own_values, tmp_path, save) == [0.5] * 3
    (said,) = (str(w.message) for w in told if "other values" in str(w.message))
    assert "big (ranks 0 and 2), s.loss (ranks 0 and 1); that of the first" in said


def parts_of_ranks(folder):
    mesh = make_mesh((2, 2))
    sizes = {0: (3, 1), 1: (0, 3)}
    state = {
        name: st.distribute_tensor(torch.ones(4, 3), mesh, places, src_data_rank=None, sizes=cut)
        for name, places, cut in (
            ("own", [Shard(0), Shard(1)], sizes),
            ("shared", [Shard(0), Replicate()], None),
        )
    }
    checkpoint.save(state, folder, "a")


def test_only_rows_that_others_have_are_read_to_compare(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(planner, "digest", lambda x: read.append(tuple(x.shape)) or 0)
    st.simulate(4, parts_of_ranks, tmp_path)
    assert read == [(2, 3)] * 4
    back = checkpoint.load({"own": torch.zeros(4, 3)}, tmp_path / "a")
    assert back["own"].equal(torch.ones(4, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.complex64])
def test_digests_tell_every_bit(dtype):
    for n in (1, 7, 8, 9, 100):
        x = torch.arange(n).to(dtype)
        within = torch.cat([x[:1], x])[1:]
        same = [x.clone(), within, torch.stack([x, x], 1)[:, 0]]
        assert {digest(y) for y in same} == {digest(x)}
        seen = {digest(x)}
        for i in range(x.nbytes):
            y = x.clone()
            y.view(torch.uint8)[i] ^= 1 << i % 8
            seen.add(digest(y))
        assert len(seen) == x.nbytes + 1
    assert digest(torch.tensor([0, 1])) != digest(torch.tensor([3, 0]))


def test_what_has_no_rows_is_saved_on_ranks_as_on_one(tmp_path):
    state = {"pair": (torch.eye(2).to_sparse(), 1), "none": torch.zeros(0, 3)}
    st.simulate(2, checkpoint.save, state, tmp_path, "a")
    back = checkpoint.load({"pair": 0, "none": torch.ones(0, 3)}, tmp_path / "a")
    assert back["pair"][0].to_dense().equal(torch.eye(2))
