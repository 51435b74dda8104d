"""What a CUDA graph of a step cannot have: work of the host that depends on the device, or feeds it."""

import pytest
import torch
from models import UNet, ViT
from torch.distributed.tensor import Shard
from torch.utils import _pytree as pytree

import shardtensor as st
from shardtensor.comm.define import Looking
from shardtensor.ranks.testing import make_mesh
from shardtensor.tensor.random import generator_for

MODELS = {"U-Net": lambda: UNet(4, 4, width=16), "ViT": lambda: ViT((256, 128), 8, 4, 4)}


class OnHost(Looking):
    """The ops that read or make tensors of the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def op(self, func, args, kwargs):
        out = func(*args, **kwargs)
        leaves = pytree.tree_leaves((args, kwargs, out))
        if any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in leaves):
            self.found.append(str(func))
        return out


def on_host(run):
    """What OnHost finds in the fourth call of a step."""
    for _ in range(3):
        run()
    with OnHost() as mode:
        run()
    return mode.found


def test_work_of_the_host_is_found():
    assert on_host(lambda: torch.ones(2) + 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("sizes", [(128, 128), (96, 160)])
@pytest.mark.parametrize("name", MODELS)
def test_a_warm_step_can_be_captured(name, sizes):
    """No wait, no stream or event of ours, no memory that is not there yet, no tensor of the host."""

    def run():
        mesh = make_mesh((2,), device="cuda")
        model = st.parallelize(MODELS[name]().cuda(), mesh)
        whole = torch.zeros(2, 4, 256, 128, device="cuda")
        x = st.distribute_tensor(whole, mesh, [Shard(2)], src_data_rank=None, sizes={2: sizes})

        def step():
            model.zero_grad()
            model(x).square().mean().backward()

        assert on_host(step) == []

    # one at a time: modes, counts and the debug mode are those of the process
    st.simulate(2, run)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", MODELS)
def test_a_warm_step_waits_for_nothing(name, monkeypatch):
    def run():
        mesh = make_mesh((1,), device="cuda")
        model = st.parallelize(MODELS[name]().cuda(), mesh)
        whole = torch.zeros(2, 4, 256, 128, device="cuda")
        x = st.distribute_tensor(whole, mesh, [Shard(2)], src_data_rank=None)

        def step():
            model.zero_grad()
            model(x).square().mean().backward()

        for _ in range(3):
            step()
        blocks = torch.cuda.memory_stats()["num_device_alloc"]
        torch.cuda.set_sync_debug_mode("error")
        for kind in ("Stream", "Event"):
            monkeypatch.setattr(torch.cuda, kind, None)
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["num_device_alloc"] == blocks

    st.simulate(1, run)


def test_draws_are_refused_while_a_graph_is_captured(monkeypatch):
    """Replays would draw the same: seeds are numbers of the host."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    def run():
        x = st.distribute_tensor(torch.ones(4, 3), make_mesh((2,)), [Shard(0)], src_data_rank=None)
        before = torch.get_rng_state()
        with pytest.raises(st.UnsupportedOpError, match="CUDA graph is captured"):
            generator_for(x.spec, torch.device("cuda"))
        assert torch.equal(before, torch.get_rng_state())
        generator_for(x.spec, x.device)

    st.simulate(2, run)
