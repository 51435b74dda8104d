"""Graph forecasters as their packages write them: the graph cut by one call, nothing replicated."""

import pytest
import torch
from graph_models import D, Forecaster, LimitedArea
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

GRID, HIDDEN, WIDTH = 24, 11, 8
CUTS = [(24,), (13, 11), (15, 0, 9), (7, 1, 12, 4)]
ATTENTION = {
    "nodes": {"grid": "latlons_grid", "hidden": "latlons_hidden"},
    "edges": {
        ("grid", "hidden"): ["encoder_links.edge_index", "encoder_links.edge_attr"],
        ("hidden", "hidden"): ["processor_links.edge_index", "processor_links.edge_attr"],
        ("hidden", "grid"): ["decoder_links.edge_index", "decoder_links.edge_attr"],
    },
}
LAM = {
    "nodes": {"hidden": "mesh_features"},
    "edges": {
        ("grid", "hidden"): ["links.g2m.edge_index", "links.g2m.edge_attr", "g2m.edge_index"],
        ("hidden", "hidden"): [
            "links.m2m.edge_index", "links.m2m.edge_attr", "m2m.0.edge_index", "m2m.1.edge_index"
        ],
        ("hidden", "grid"): ["links.m2g.edge_index", "links.m2g.edge_attr", "m2g.edge_index"],
    },
}  # fmt: skip
# model, its buffers, shape of a state, dim of the grid
MODELS = {
    "anemoi": (Forecaster, ATTENTION, (1, 2, 1, GRID, 3), 3),
    "neural-lam": (LimitedArea, LAM, (2, GRID, 3), 1),
}


def lists(model, names):
    buffers = dict(model.named_buffers())
    return {kinds: buffers[first] for kinds, (first, *_) in names["edges"].items()}


def placed(name, cut, folder=None):
    """(model whose graph is cut, graph, a state)."""
    make, names, shape, dim = MODELS[name]
    model, mesh = make().double(), T.make_mesh((len(cut),))
    torch.manual_seed(3)
    x = st.distribute_tensor(
        torch.randn(shape, dtype=D), mesh, [Shard(dim)], src_data_rank=None, sizes={dim: cut}
    )
    grid = x.movedim(dim, 0)
    graph = st.graph.cut({"grid": grid, "hidden": HIDDEN}, lists(model, names), folder=folder)
    graph.place(model, **names)
    return model, graph, x


def advance(model, x, name, steps=3):
    """A rollout: what the model gives is what it takes next."""
    for _ in range(steps):
        y = model(x)
        x = torch.cat([x[:, 1:], y], 1) if name == "anemoi" else y
    return y


def results(name, cut=None):
    if cut is None:
        make, _, shape, _ = MODELS[name]
        model = make().double()
        torch.manual_seed(3)
        x = torch.randn(shape, dtype=D)
    else:
        model, _, x = placed(name, cut)
    x.requires_grad_()
    y = advance(model, x, name)
    (y**2).sum().backward()
    if cut is not None:
        assert y.spec.sizes == x.spec.sizes
    return y.detach(), x.grad, {k: p.grad for k, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_rollouts(name):
    y, dx, grads = results(name)
    for cut in CUTS:
        for got in st.simulate(len(cut), results, name, cut):
            T.same(got[0], y, "state")
            T.same(got[1], dx, "gradient of the state")
            for k, g in grads.items():
                # a bias in front of a softmax has no gradient but for rounding
                T.same(got[2][k], g, k, atol=1e-12)


def halos(graph, edges, me):
    """Rows of this rank that other ranks' edges name, each rank's once."""
    found = {}
    for (a, b), e in edges.items():
        owner = [
            torch.bucketize(
                graph.nodes[k].inverse, torch.tensor(graph.nodes[k].sizes).cumsum(0), right=True
            )
            for k in (a, b)
        ]
        pairs = {(int(s), int(owner[1][t])) for s, t in e.T.tolist() if owner[0][s] != owner[1][t]}
        found[a, b] = sum(int(owner[0][s]) == me for s, _ in pairs)
    return found


def sent(name, cut):
    """(bytes of rows sent in a step and in its backward, rows in halos, all that is not sharded)."""
    _, names, *_ = MODELS[name]
    edges = lists(MODELS[name][0]().double(), names)
    model, graph, x = placed(name, cut)
    whole = []
    for k, m in model.named_modules():
        m.register_forward_hook(
            lambda m, i, out, k=k: whole.extend(
                k for o in (out if isinstance(out, tuple) else (out,)) if not o.spec.varying
            )
        )
    x.requires_grad_()
    for _ in range(2):
        with st.trace() as t:
            y = model(x)
        with st.trace() as back:
            y.sum().backward()
    assert not t.gathered and not back.gathered and not whole
    rows = [c.bytes for c in t.sent if c.collective == "take" and c.bytes >= WIDTH * 8]
    others = [c.bytes for c in t.sent if c.collective != "take"]
    returned = [c.bytes for c in back.sent if c.collective == "put"]
    return (
        sum(rows),
        max(others),
        sum(returned),
        halos(graph, edges, x.device_mesh.get_local_rank()),
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_step_sends_halos_only(name):
    """Of each layer the rows in halos: keys and values of attention, features of an interaction."""
    layers = {("grid", "hidden"): 1, ("hidden", "hidden"): 2, ("hidden", "grid"): 1}
    found = T.simulate(4, sent, name, (7, 5, 8, 4))
    for forth, others, _, rows in found:
        # keys and values of attention; a batch of two of features
        assert forth == sum(rows[k] * n for k, n in layers.items()) * 2 * WIDTH * 8
        # agreements of a few numbers
        assert others <= 24
    # their gradients go back
    assert sum(f for f, *_ in found) == sum(back for _, _, back, _ in found) > 0
