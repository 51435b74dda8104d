"""Graph forecasters in the way their packages write them; none knows that it runs sharded.

`Forecaster` is anemoi's encoder, processor and decoder (graph transformer mappers, a residual on
the prognostic variables), `LimitedArea` is neural-lam's GraphLAM (interaction networks, which number
the sources after the targets). Buffers hold the graph, as in both packages.
"""

from itertools import pairwise

import torch
import torch.nn as nn
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import softmax

D = torch.float64


def nearest(sources, targets, k):
    """Edges (2, E) from each target's k nearest sources, sorted by target."""
    near = torch.cdist(targets, sources).topk(k, largest=False).indices
    return torch.stack([near.reshape(-1), torch.arange(len(targets)).repeat_interleave(k)])


def places(n, seed):
    """n points of the plane, numbered along its first axis."""
    points = torch.rand(n, 2, dtype=D, generator=torch.Generator().manual_seed(seed))
    return points[points[:, 0].argsort()]


def mlp(*widths):
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class Conv(MessagePassing):
    """Attention of a node to the sources of its edges."""

    def __init__(self):
        super().__init__(node_dim=0, aggr="add")

    def forward(self, query, key, value, edges, edge_index, size):
        return self.propagate(edge_index, size=size, query=query, key=key, value=value, edges=edges)

    def message(self, query_i, key_j, value_j, edges, index, ptr, size_i):
        scores = (query_i * (key_j + edges)).sum(-1) / query_i.shape[-1] ** 0.5
        return (value_j + edges) * softmax(scores, index, ptr, size_i).unsqueeze(-1)


class Block(nn.Module):
    def __init__(self, width, edge_width, heads=2):
        super().__init__()
        self.heads = heads
        self.norm_source, self.norm_target = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.own, self.edge = nn.Linear(width, width), nn.Linear(edge_width, width)
        self.project, self.conv = nn.Linear(width, width), Conv()
        self.norm, self.mlp = nn.LayerNorm(width), mlp(width, 2 * width, width)

    def forward(self, x, edges, edge_index):
        sources, targets = self.norm_source(x[0]), self.norm_target(x[1])
        q, k, v, e = (
            t.reshape(t.shape[0], self.heads, -1)
            for t in (self.query(targets), self.key(sources), self.value(sources), self.edge(edges))
        )
        out = self.conv(q, k, v, e, edge_index, (k.shape[0], q.shape[0]))
        out = self.project(out.flatten(1) + self.own(targets)) + x[1]
        return self.mlp(self.norm(out)) + out


class Links(nn.Module):
    """The edges from nodes to nodes, with values of their own."""

    def __init__(self, sources, targets, k):
        super().__init__()
        index = nearest(sources, targets, k)
        self.register_buffer("edge_index", index)
        self.register_buffer("edge_attr", sources[index[0]] - targets[index[1]])


class Forecaster(nn.Module):
    def __init__(self, grid=24, hidden=11, variables=3, steps=2, width=8, layers=2):
        super().__init__()
        torch.manual_seed(0)
        on_grid, on_mesh = places(grid, 1), places(hidden, 2)
        self.register_buffer("latlons_grid", torch.cat([on_grid.sin(), on_grid.cos()], -1))
        self.register_buffer("latlons_hidden", torch.cat([on_mesh.sin(), on_mesh.cos()], -1))
        self.encoder_links = Links(on_grid, on_mesh, 4)
        self.processor_links = Links(on_mesh, on_mesh, 3)
        self.decoder_links = Links(on_mesh, on_grid, 3)
        self.embed_grid = nn.Linear(variables * steps + 4, width)
        self.embed_hidden, self.embed_target = nn.Linear(4, width), nn.Linear(4, width)
        self.encoder, self.decoder = Block(width, 2), Block(width, 2)
        self.processor = nn.ModuleList(Block(width, 2) for _ in range(layers))
        self.extract = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, variables))

    def forward(self, x):
        """(batch, time, ensemble, grid, variables) to one more time."""
        b, t, e, n, v = x.shape
        flat = x.permute(0, 2, 3, 1, 4).reshape(b * e * n, t * v)
        grid = self.embed_grid(torch.cat([flat, self.latlons_grid.repeat(b * e, 1)], -1))
        hidden = self.embed_hidden(self.latlons_hidden.repeat(b * e, 1))
        links = self.encoder_links
        encoded = hidden = self.encoder((grid, hidden), links.edge_attr, links.edge_index)
        links = self.processor_links
        for block in self.processor:
            hidden = block((hidden, hidden), links.edge_attr, links.edge_index)
        links = self.decoder_links
        target = self.embed_target(self.latlons_grid)
        out = self.decoder((hidden + encoded, target), links.edge_attr, links.edge_index)
        out = self.extract(out).reshape(b, e, n, 1, v).permute(0, 3, 1, 2, 4).clone()
        prognostic = torch.tensor([0, 2])
        out[..., prognostic] += x[:, -1:][..., prognostic]
        return out


class Interaction(MessagePassing):
    """Sources and targets as one table of nodes, the sources after the targets."""

    def __init__(self, edge_index, targets, width):
        super().__init__(aggr="add")
        self.targets = targets
        index = torch.stack([edge_index[0] + targets, edge_index[1]])
        self.register_buffer("edge_index", index)
        self.edge_mlp, self.node_mlp = mlp(3 * width, width, width), mlp(2 * width, width, width)

    def forward(self, sources, targets, edges):
        nodes = torch.cat([targets, sources], -2)
        summed, new = self.propagate(self.edge_index, x=nodes, edges=edges)
        return targets + self.node_mlp(torch.cat([targets, summed], -1)), edges + new

    def message(self, x_i, x_j, edges):
        return self.edge_mlp(torch.cat([edges, x_j, x_i], -1))

    def aggregate(self, inputs, index, ptr, dim_size):
        return super().aggregate(inputs, index, ptr, self.targets), inputs


class LimitedArea(nn.Module):
    def __init__(self, grid=24, hidden=11, variables=3, width=8, layers=2):
        super().__init__()
        torch.manual_seed(0)
        on_grid, on_mesh = places(grid, 1), places(hidden, 2)
        self.register_buffer("mesh_features", on_mesh)
        self.embed_grid, self.embed_mesh = mlp(variables, width, width), mlp(2, width, width)
        ends = {
            "g2m": (on_grid, on_mesh, 4),
            "m2m": (on_mesh, on_mesh, 3),
            "m2g": (on_mesh, on_grid, 3),
        }
        self.links = nn.ModuleDict({k: Links(*v) for k, v in ends.items()})
        self.embed = nn.ModuleDict({k: mlp(2, width, width) for k in ends})

        def net(kind, targets):
            return Interaction(self.links[kind].edge_index, targets, width)

        self.g2m, self.m2g = net("g2m", hidden), net("m2g", grid)
        self.m2m = nn.ModuleList(net("m2m", hidden) for _ in range(layers))
        self.map = mlp(width, width, variables)

    def forward(self, x):
        """(batch, grid, variables) to the next."""
        edges = {
            k: self.embed[k](self.links[k].edge_attr).unsqueeze(0).expand(x.shape[0], -1, -1)
            for k in self.embed
        }
        grid = self.embed_grid(x)
        mesh = self.embed_mesh(self.mesh_features).unsqueeze(0).expand(x.shape[0], -1, -1)
        mesh, _ = self.g2m(grid, mesh, edges["g2m"])
        linked = edges["m2m"]
        for net in self.m2m:
            mesh, linked = net(mesh, mesh, linked)
        grid, _ = self.m2g(mesh, grid, edges["m2g"])
        return x + self.map(grid)
