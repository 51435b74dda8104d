"""Models and transforms."""

import torch
import torch.nn.functional as F
from torch import nn

import shardtensor as st

from .table import image, refused, right, whole


def net():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1)
    ).double()


def gradients(model, x):
    model(x).square().mean().backward()
    return [p.grad for p in model.parameters()]


@right
def parallelize_twice(r):
    model = st.parallelize(st.parallelize(net(), r.mesh), r.mesh)
    return list(zip(gradients(model, r.shard(image(), 2)), gradients(net(), image()), strict=True))


@right
def a_frozen_model(r):
    model = net().requires_grad_(False)
    model = st.parallelize(model, r.mesh)
    s, x = r.shard(image(), 2).requires_grad_(), image().requires_grad_()
    model(s).sum().backward()
    net()(x).sum().backward()
    return [(s.grad, x.grad), (all(p.grad is None for p in model.parameters()), True)]


@right
def other_weights_before_parallelize(r):
    model = net()
    with torch.no_grad():
        model[0].weight += r.me
    model = st.parallelize(model, r.mesh)
    return [(model(r.shard(image(), 2)), net()(image()))]


@right
def another_seed_for_dropout(r):
    torch.manual_seed(r.me)
    y = F.dropout(r.shard(torch.ones(64, 4)), 0.5).full_tensor()
    return [(set(y.unique().tolist()), {0.0, 2.0})]


@refused(ValueError, "different models")
def parallelize_other_models(r):
    st.parallelize(nn.Linear(4, 2 + r.me), r.mesh)


@refused((TypeError, ValueError), "bucket")
def parallelize_with_a_wrong_option(r):
    st.parallelize(net(), r.mesh, buckets=3)


@refused(ValueError, "data axis")
def parallelize_over_an_axis_that_is_not_there(r):
    st.parallelize(net(), r.mesh, data="batch")


@refused(RuntimeError, "size mismatch")
def load_another_models_state(r):
    st.parallelize(net(), r.mesh).load_state_dict(
        {k: v[..., :1] for k, v in net().state_dict().items()}
    )


@refused(RuntimeError, "Missing key")
def load_a_part_of_a_state(r):
    st.parallelize(net(), r.mesh).load_state_dict({})


@refused(st.UnsupportedOpError, "vmap")
def vmap_over_shards(r):
    torch.func.vmap(lambda t: t * 2)(r.shard(whole()))


@right
def func_grad_of_shards(r):
    square = lambda t: t.square().sum()  # noqa: E731
    return [(torch.func.grad(square)(r.shard(whole())), 2 * whole())]


@refused(ValueError, "replicate")
def a_fallback_that_does_not_exist(r):
    st.fallback("gather").__enter__()


@refused(st.UnsupportedOpError, "max_bytes")
def a_gather_past_the_budget(r):
    with st.fallback(max_bytes=10):
        torch.linalg.det(r.shard(torch.eye(4)))


@right
def sparse_beside_shards(r):
    sparse = whole().T.to_sparse()
    return [(torch.sparse.mm(sparse, r.shard(whole())), whole().T @ whole())]


@refused(st.UnsupportedOpError, "(?i)sparse")
def a_sparse_batch_beside_shards(r):
    torch.bmm(torch.stack([whole().T] * 2).to_sparse(), r.shard(torch.stack([whole()] * 2), 1))
