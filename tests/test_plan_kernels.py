"""The kernels of a plan: those that its device would run, no more."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from growth import kernels
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import cache
from shardtensor._torch.world import silent_world
from shardtensor.comm import groups, together
from shardtensor.plan.estimate import H100, Layout, Task, estimate
from shardtensor.ranks.measure import peak_bytes


def weighty():
    return nn.Sequential(*(nn.Conv2d(3 if i == 0 else 64, 64, 3, padding=1) for i in range(6)))


def test_an_optimizer_s_step_is_that_of_the_device():
    """On GPUs torch works on lists of weights: few kernels, and temporaries as large as all."""
    torch.manual_seed(0)
    model, x = weighty(), torch.randn(1, 3, 8, 8)
    peaks, layout = {}, Layout(1, (2,), (1,))
    for foreach in (True, False):
        optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)

        def step(optimizer=optimizer):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()
        peaks[foreach] = peak_bytes(step) + x.nbytes + 3 * sum(p.nbytes for p in model.parameters())
    task = Task(weighty, [(1, 3, 8, 8)])
    gpu, cpu = (estimate(task, layout, device) for device in (H100, replace(H100, name="cpu")))
    assert gpu.peak == pytest.approx(peaks[True], rel=0.05)
    assert cpu.peak == pytest.approx(peaks[False], rel=0.05) and cpu.peak < 0.9 * gpu.peak
    kernels = [e.tree()["(optimizer)"].kernels for e in (gpu, cpu)]
    assert kernels[0] < 20 < 12 * 5 < kernels[1]
    chosen = replace(task, optimizer=partial(torch.optim.AdamW, foreach=False))
    assert estimate(chosen, layout).tree()["(optimizer)"].kernels == kernels[1]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.LayerNorm([256, 256])])
def test_a_norm_has_the_kernels_that_it_runs(norm, plain_transport):
    """Numbers between its kernels are numpy's, of fake tensors too."""
    shape, plain = (2, 8, 256, 256), torch.randn(2, 8, 256, 256)
    task = Task(lambda: copy.deepcopy(norm), [shape], dims=(2,))
    tree = estimate(task, Layout(1, (2,), (2,))).tree()
    planned = tree[""].kernels - tree["(optimizer)"].kernels
    with silent_world(1, 2):
        mesh = init_device_mesh("cpu", (2,))
        model = st.parallelize(copy.deepcopy(norm), mesh)
        x = st.distribute_tensor(plain, mesh, [Shard(2)])

        def step():
            model(x).square().mean().backward()

        step()
        real = kernels(step)
    cache.clear()
    groups.forget()
    together.forget()
    assert real <= planned <= real + 8
