"""Checkpoints: saved from n ranks, loaded on m, however cut; never half of one."""

import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import checkpoint
from shardtensor.ranks.testing import make_mesh, run_workers

X = torch.arange(9 * 5, dtype=torch.float64).reshape(9, 5)
CUTS = {
    1: ((1,), [Shard(0)], None), 2: ((2,), [Shard(1)], {1: [4, 1]}), 3: ((3,), [Shard(0)], {0: [4, 0, 5]}),
    4: ((2, 2), [Shard(0), Shard(1)], None), "nested": ((2, 2), [Shard(0), Shard(0)], {0: [1, 3, 0, 5]}),
    "replicated": ((2, 2), [Replicate(), Shard(1)], None),
}  # fmt: skip


def spread(x, cut):
    mesh_shape, placements, sizes = CUTS[cut]
    mesh = make_mesh(mesh_shape)
    return st.distribute_tensor(x, mesh, placements, sizes=sizes, src_data_rank=None)


def write(folder, cut):
    with st.trace() as t:
        checkpoint.save({"x": spread(X, cut), "step": 3}, folder, f"from {cut}")
    assert not t.sent


def read(folder, source, cut):
    x = spread(torch.zeros_like(X), cut)
    state = checkpoint.load({"x": x, "step": 0}, folder / f"from {source}")
    assert state["step"] == 3
    return x.full_tensor()


def world(cut):
    return torch.Size(CUTS[cut][0]).numel()


def test_any_cut_to_any_other(tmp_path):
    for cut in CUTS:
        st.simulate(world(cut), write, tmp_path, cut)
        if len(list(tmp_path.glob("from*"))) > 2:
            raise AssertionError("only the newest two stay")
        for other in CUTS:
            assert all(x.equal(X) for x in st.simulate(world(other), read, tmp_path, cut, other))


def test_without_ranks(tmp_path):
    """What sharded ranks wrote, read by a script that knows nothing of them."""
    st.simulate(3, write, tmp_path, 3)
    state = {"x": torch.zeros_like(X)}
    dcp.load(state, checkpoint_id=tmp_path / "from 3", no_dist=True)
    assert state["x"].equal(X)


def training(folder, ranks, steps, stop=None):
    """Losses of a run that begins at the latest checkpoint, and saves each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.GELU(), nn.Conv2d(3, 1, 3, padding=1))
    mesh = make_mesh((ranks,))
    st.parallelize(model.double(), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    batches = [torch.randn(1, 1, 8, 6, dtype=torch.float64) for _ in range(steps)]
    first, found = 0, checkpoint.latest(folder)
    if found:
        weights, moments = get_state_dict(model, optimizer)
        state = checkpoint.load({"model": weights, "optimizer": moments, "step": 0}, found)
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        first = state["step"]
    losses = []
    for i in range(first, steps):
        x = st.distribute_tensor(batches[i], mesh, [Shard(2)], src_data_rank=None)
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        weights, moments = get_state_dict(model, optimizer)
        checkpoint.save({"model": weights, "optimizer": moments, "step": i + 1}, folder, f"{i + 1}")
        if i + 1 == stop:
            break
    return losses, {k: v.clone() for k, v in model.state_dict().items()}


def test_resumes_on_other_ranks(tmp_path):
    want, weights = st.simulate(1, training, tmp_path / "a", 1, 4)[0]
    first, _ = st.simulate(2, training, tmp_path / "b", 2, 4, 2)[0]
    for rest, got in st.simulate(3, training, tmp_path / "b", 3, 4):
        assert torch.allclose(torch.tensor(first + rest), torch.tensor(want), rtol=1e-9)
        assert all(torch.allclose(got[k], w, rtol=1e-9) for k, w in weights.items())
    # a plain state_dict of a sharded run loads in a plain script
    nn.Sequential(nn.Conv2d(1, 3, 3), nn.GELU(), nn.Conv2d(3, 1, 3)).load_state_dict(got)


def test_a_killed_save_leaves_the_last_good_one(tmp_path, monkeypatch):
    st.simulate(2, write, tmp_path, 2)

    def killed(*args, **kwargs):
        plain(*args, **kwargs)
        raise KeyboardInterrupt

    plain = dcp.save
    monkeypatch.setattr(dcp, "save", killed)
    with pytest.raises(st.RankError):
        st.simulate(3, write, tmp_path, 3)
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path).name == "from 2"
    st.simulate(3, write, tmp_path, 3)
    assert checkpoint.latest(tmp_path).name == "from 3"
    with pytest.raises(st.RankError, match="FileExistsError"):
        st.simulate(3, write, tmp_path, 3)


def asynchronous(folder):
    x = spread(X, 2)
    dcp.async_save({"x": x}, checkpoint_id=folder).result()
    target = spread(torch.zeros_like(X), 2)
    dcp.load({"x": target}, checkpoint_id=folder)
    return target.full_tensor()


@pytest.mark.gloo
def test_asynchronous_save(tmp_path):
    assert all(x.equal(X) for x in run_workers(2, asynchronous, tmp_path / "c"))


def test_partial_sums_are_refused():
    def run():
        x = spread(X, 2).sum(1)
        partial = st.ShardTensor.from_local(
            x.to_local(), x.device_mesh, [torch.distributed.tensor.Partial()], sizes={}
        )
        with pytest.raises(st.UnsupportedOpError, match="redistribute"):
            partial.__create_chunk_list__()

    st.simulate(2, run)


class Missing(Exception):
    def __init__(self, what, where):
        super().__init__(f"no {what} in {where}")


class Broken:
    """It has no state on the second rank."""

    def state_dict(self):
        if dist.get_rank() == 1:
            raise Missing("moments", "it")
        return {"all": 1}

    def load_state_dict(self, state):
        raise NotImplementedError


def test_a_state_that_one_rank_cannot_give(tmp_path):
    def run():
        x = st.distribute_tensor(torch.ones(2), make_mesh((2,)), [Shard(0)], src_data_rank=None)
        state = {"x": x, "s": Broken()}
        with pytest.raises(RuntimeError, match="saved: rank 1: Missing: no moments in it") as e:
            checkpoint.save(state, tmp_path, "a")
        # as processes send it
        assert "no moments" in str(pickle.loads(pickle.dumps(e.value.__cause__)))
        with pytest.raises(RuntimeError, match="was not saved") as e:
            checkpoint.save_async(state, tmp_path, "a").wait()
        assert "rank 1: Missing" in str(e.value.__cause__)
        checkpoint.save({"x": x}, tmp_path, "a")
        return x.sum().item()

    assert st.simulate(2, run) == [2.0, 2.0]
