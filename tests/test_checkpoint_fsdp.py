"""Checkpoints of FSDP2 over data and domain: from one mesh to another, and to a plain script."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import checkpoint
from shardtensor.ranks.testing import make_mesh, run_workers

D = torch.float64
STEPS = 4


def build():
    torch.manual_seed(0)
    layers = nn.ModuleList(
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.GELU()) for _ in range(2)
    )
    return nn.Sequential(nn.Conv2d(1, 3, 1), *layers, nn.Conv2d(3, 1, 3, padding=1)).to(D)


def batch(step):
    return torch.randn(2, 1, 9, 6, generator=torch.Generator().manual_seed(step), dtype=D)


def train(folder, data, first, last):
    """Losses of steps first to last of a run that begins at the latest checkpoint."""
    n = dist.get_world_size()
    model, group = build(), 0
    if n > 1:
        mesh = make_mesh((data, n // data), names=("data", "domain"))
        st.parallelize(model, mesh, data="data", fsdp="all", blocks=["Sequential"])
        group = mesh.get_local_rank("data")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    found = checkpoint.latest(folder)
    if found is not None:
        weights, moments = get_state_dict(model, optimizer)
        state = checkpoint.load({"model": weights, "optimizer": moments}, found)
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
    losses = []
    for step in range(first, last):
        x = batch(step)
        if n > 1:
            each = 2 // data
            x = x[group * each : (group + 1) * each]
            x = st.distribute_tensor(x, mesh["domain"], [Shard(2)], src_data_rank=None)
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if n > 1 and data > 1:
            # each group's is of its own sample
            total = (
                loss.detach().full_tensor() if isinstance(loss, st.ShardTensor) else loss.detach()
            )
            total = total.clone()
            dist.all_reduce(total)
            losses.append(total.item() / n)
        else:
            losses.append(loss.item())
    weights, moments = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": moments}, folder, f"step{last}")
    whole = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if dist.get_rank() == 0:
        torch.save(whole, f"{folder}/whole.pt")
    return losses


@pytest.mark.gloo
@pytest.mark.parametrize(
    "way", [[(2, 1), (4, 2)], [(4, 2), (3, 1)], [(3, 1), (1, 1)], [(1, 1), (2, 2)]]
)
def test_goes_on_with_another_mesh(tmp_path, way):
    want = run_workers(1, train, str(tmp_path / "one"), 1, 0, STEPS)[0]
    losses = []
    for i, (ranks, data) in enumerate(way):
        first, last = (0, 2) if i == 0 else (2, STEPS)
        found = run_workers(ranks, train, str(tmp_path / "more"), data, first, last)
        assert all(f == pytest.approx(found[0], rel=1e-12) for f in found)
        losses += found[0]
    assert losses == pytest.approx(want, rel=1e-9)
    # the whole state is a plain file
    alone, got = build(), torch.load(tmp_path / "more" / "whole.pt", weights_only=True)
    alone.load_state_dict(got)
    expected = torch.load(tmp_path / "one" / "whole.pt", weights_only=True)
    for k, v in expected.items():
        torch.testing.assert_close(got[k], v, rtol=1e-9, atol=1e-12)
