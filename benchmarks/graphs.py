"""What a step of a graph forecaster sends, on simulated ranks.

    python benchmarks/graphs.py [--ranks 4] [--grid 4608] [--width 64]

The models of tests/graph_models.py, and anemoi's encoder, processor and decoder where
`anemoi-models` is installed, on a random grid and a mesh of a quarter of its nodes, in float64: the
most that a rank sends in a forward pass, of rows and of all else, beside its share of one hidden
state; and how far the result is from one device's.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.testing import make_mesh

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from graph_models import Forecaster, LimitedArea, nearest, places

Edges = dict[tuple[str, str], list[str]]


def links(prefix: str, kinds: tuple[str, str, str], grid: str, hidden: str) -> Edges:
    ends = ((grid, hidden), (hidden, hidden), (hidden, grid))
    return {
        e: [f"{prefix}{k}.edge_index", f"{prefix}{k}.edge_attr"]
        for e, k in zip(ends, kinds, strict=True)
    }


def attention(grid: int, width: int) -> tuple[nn.Module, Any, Any, Any, int]:
    model = Forecaster(grid, grid // 4, width=width)
    edges = links("", ("encoder_links", "processor_links", "decoder_links"), "grid", "hidden")
    nodes = {"grid": "latlons_grid", "hidden": "latlons_hidden"}
    return model, nodes, edges, torch.randn(1, 2, 1, grid, 3), 3


def interaction(grid: int, width: int) -> tuple[nn.Module, Any, Any, Any, int]:
    model = LimitedArea(grid, grid // 4, width=width)
    edges = links("links.", ("g2m", "m2m", "m2g"), "grid", "hidden")
    edges["grid", "hidden"].append("g2m.edge_index")
    edges["hidden", "grid"].append("m2g.edge_index")
    edges["hidden", "hidden"] += ["m2m.0.edge_index", "m2m.1.edge_index"]
    return model, {"hidden": "mesh_features"}, edges, torch.randn(1, grid, 3), 1


class OneDataset(nn.Module):
    """anemoi's model of a dictionary of datasets, of one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model({"data": x})["data"]


def anemoi(grid: int, width: int) -> tuple[nn.Module, Any, Any, Any, int]:
    """AnemoiModelEncProcDec with graph transformers, as its package has it."""
    from anemoi.models.data_indices.collection import IndexCollection
    from anemoi.models.models.encoder_processor_decoder import AnemoiModelEncProcDec
    from anemoi.utils.config import DotDict
    from omegaconf import OmegaConf
    from torch_geometric.data import HeteroData

    graph, at = HeteroData(), {"data": places(grid, 1), "hidden": places(grid // 4, 2)}
    for kind, x in at.items():
        graph[kind].x, graph[kind].num_nodes = x, len(x)
    for a, b, k in (("data", "hidden", 4), ("hidden", "hidden", 3), ("hidden", "data", 3)):
        index = nearest(at[a], at[b], k)
        graph[a, "to", b].edge_index = index
        graph[a, "to", b].away = at[a][index[0]] - at[b][index[1]]
    layers = "anemoi.models.layers."
    common = {
        "num_channels": width, "num_heads": 4, "mlp_hidden_ratio": 4, "num_chunks": 1,
        "trainable_size": 0, "sub_graph_edge_attributes": ["away"], "layer_kernels": None,
    }  # fmt: skip

    def part(name: str, **more: Any) -> dict[str, Any]:
        return {"_target_": layers + name, **common, **more}

    mapper = "mapper.GraphTransformer"
    config = {
        "model": {"hidden_nodes_name": "hidden", "latent_skip": True},
        "node_trainable_parameters": {"data": 0, "hidden": 0},
        "encoders": {"e": {"source_datasets": ["data"], "dataset_fusing_strategy": "not_supported",
                           "mapper": part(mapper + "ForwardMapper")}},
        "decoders": {"d": {"target_datasets": ["data"], "target_node_features": ["coordinates"],
                           "mapper": part(mapper + "BackwardMapper")}},
        "processor": part("processor.GraphTransformerProcessor", num_layers=2),
        "latent_aggregator": {"_target_": layers + "aggregator.SumAggregator"},
        "residual": {"datasets": {"data": {"_target_": layers + "residual.SkipConnection",
                                           "step": -1}}},
        "bounding": {"datasets": {"data": []}},
    }  # fmt: skip
    sets = OmegaConf.create({"forcing": ["f"], "diagnostic": ["d"], "target": []})
    indices = IndexCollection(sets, {"a": 0, "b": 1, "f": 2, "d": 3})
    torch.manual_seed(0)
    model = AnemoiModelEncProcDec(
        model_config=DotDict({"model": config}), data_indices={"data": indices},
        statistics={"data": {}}, n_step_input=2, n_step_output=1, graph_data=graph,
    )  # fmt: skip
    edges = {
        ("data", "hidden"): "encoder_graph_provider.data",
        ("hidden", "hidden"): "processor_graph_provider",
        ("hidden", "data"): "decoder_graph_provider.data",
    }
    named = {k: [f"model.{p}.edge_index_base", f"model.{p}.edge_attr"] for k, p in edges.items()}
    nodes = {k: f"model.node_attributes.latlons_{k}" for k in at}
    return OneDataset(model), nodes, named, torch.randn(1, 2, 1, grid, 3), 3


MODELS: dict[str, Callable[[int, int], Any]] = {
    "Forecaster": attention, "LimitedArea": interaction,
    **({"anemoi-models": anemoi} if importlib.util.find_spec("anemoi") else {}),
}  # fmt: skip


def run(name: str, ranks: int, grid: int, width: int) -> tuple[int, int, Tensor]:
    """(bytes of rows, bytes of all else that this rank sends in the second step, the result)."""
    torch.manual_seed(1)
    model, nodes, edges, x, dim = MODELS[name](grid, width)
    model, x = model.double(), x.double()
    x = st.distribute_tensor(x, make_mesh((ranks,)), [Shard(dim)], src_data_rank=None)
    buffers = dict(model.named_buffers())
    first = next(iter(edges))[0]
    graph = st.graph.cut(
        {first: x.movedim(dim, 0), "hidden": grid // 4},
        {k: buffers[names[0]] for k, names in edges.items()},
    )
    graph.place(model, nodes, edges)
    with torch.no_grad(), st.fallback("error"):
        model(x)
        with st.trace() as t:
            y = model(x)
    rows = sum(c.bytes for c in t.sent if c.collective == "take" and c.bytes >= 8 * width // 4)
    return rows, sum(c.bytes for c in t.sent) - rows, y.full_tensor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--grid", type=int, default=4608)
    parser.add_argument("--width", type=int, default=64)
    options = parser.parse_args()
    print(f"{options.ranks} ranks, {options.grid} nodes of the grid, width {options.width}")
    for name, make in MODELS.items():
        found = st.simulate(options.ranks, run, name, *vars(options).values())
        torch.manual_seed(1)
        model, _, _, x, _ = make(options.grid, options.width)
        with torch.no_grad():
            want = model.double()(x.double())
        off = float((found[0][2] - want).abs().max() / want.abs().max())
        state = options.grid // 4 // options.ranks * options.width * 8
        rows, rest = (max(f[i] for f in found) for i in (0, 1))
        print(
            f"{name:14} rows {rows:>10,} B  else {rest:>10,} B  state {state:>10,} B  off {off:.0e}"
        )


if __name__ == "__main__":
    main()
