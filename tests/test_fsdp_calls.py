"""Calls of a model under FSDP2 with no backward after them: the weights are those of one device."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, simulate

F64 = torch.float64


def losses(model, x, quiet, change):
    """A step, with a call of the model between backward and step or a change of its weights after."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(3):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        with quiet:
            found += [loss, model(x).mean()]
        optimizer.step()
        if change:
            with torch.no_grad():
                found.append(model(x).mean())
                for p in model.parameters():
                    p.mul_(1.5)
    return torch.stack(found)


def made():
    torch.manual_seed(0)
    return nn.Linear(3, 3).double(), torch.randn(2, 5, 3, dtype=F64)


@pytest.mark.parametrize("change", [False, True])
@pytest.mark.parametrize("quiet", [nullcontext(), torch.no_grad()], ids=["grad", "no_grad"])
def test_a_call_without_backward_keeps_no_weights(quiet, change):
    want = losses(*made(), quiet, change)

    def on_rank():
        model, x = made()
        mesh = make_mesh((2,))
        st.parallelize(model, mesh, fsdp="all")
        found = losses(model, st.distribute_tensor(x, mesh, [Shard(1)]), quiet, change)
        torch.testing.assert_close(found.full_tensor(), want, rtol=1e-9, atol=1e-12)

    simulate(2, on_rank)


def hooks_are_told_of(hook):
    model, x = made()
    mesh = make_mesh((2,))
    x = st.distribute_tensor(x, mesh, [Shard(1)])
    handle = getattr(model.weight, hook)(lambda x: None)
    with pytest.raises(ValueError, match="register them after parallelize"):
        st.parallelize(model, mesh, fsdp="all")
    handle.remove()
    st.parallelize(model, mesh, fsdp="all")
    seen = []
    getattr(model.weight, hook)(lambda p: seen.append(p.grad.shape))
    if hook == "register_hook":
        with pytest.raises(st.UnsupportedOpError, match="use register_post_accumulate_grad_hook"):
            model(x)
    else:
        model(x).sum().backward()
        assert seen == [(3, 3)]


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_run_or_are_refused(hook):
    simulate(2, hooks_are_told_of, hook)


def test_a_call_without_gradients_leaves_shards():
    """Of which an optimizer or an average of weights can be made."""

    def on_rank():
        model, x = made()
        mesh = make_mesh((2,))
        st.parallelize(model, mesh, fsdp="all")
        with torch.no_grad():
            model(st.distribute_tensor(x, mesh, [Shard(1)]))
        assert all(isinstance(p, DTensor) for p in model.parameters())

    simulate(2, on_rank)
