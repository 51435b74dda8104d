"""The code in the docs runs."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml

import shardtensor as st

DOCS = Path(__file__).parent.parent / "docs"


def test_the_worked_example_of_a_rule():
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "rules.md").read_text(), re.S)
    module = types.ModuleType("example_of_a_rule")
    sys.modules[module.__name__] = module
    try:
        exec(blocks[0] + blocks[1], module.__dict__)
    finally:
        del sys.modules[module.__name__]
    assert callable(module.mean3.__wrapped__) and module.st is st


def test_the_example_of_attention():
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "attention.md").read_text(), re.S)
    exec(block, {})


def test_the_examples_of_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "data.md").read_text(), re.S)
    names: dict = {}
    st.simulate(1, lambda: exec("".join(blocks), names))
    assert names["x"].shape == (64, 96) and names["told"].amplification == 1.0


def test_the_example_of_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "checkpoints.md").read_text(), re.S)
    names: dict = {}
    exec(block, names)
    assert names["path"].name == "step3" and names["state"]["step"] == 3


def test_the_example_of_graphs():
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "graphs.md").read_text(), re.S)
    names = {}
    exec(block, names)
    x, (source, target) = names["nodes"], names["edges"]
    messages = (x[source] - x[target]).relu()
    mean = torch.zeros_like(x).index_reduce(0, target, messages, "mean", include_self=False)
    assert names["sharded"] == [pytest.approx(mean.square().sum().item(), rel=1e-5)] * 4


def test_the_example_of_point_clouds():
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "points.md").read_text(), re.S)
    names: dict = {}
    exec(block, names)
    points, values, grid = (names[k] for k in ("points", "values", "grid"))
    neighbours = (
        torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
        .topk(8, largest=False)
        .indices
    )
    smooth = values[neighbours].mean(1)
    d, at = torch.cdist(grid, points, compute_mode="donot_use_mm_for_euclid_dist").topk(
        3, largest=False
    )
    w = d**-2
    want = (w[..., None] * smooth[at]).sum(1) / w.sum(1, keepdim=True)
    for found in names["found"]:
        assert torch.allclose(found, want, rtol=1e-4)


def test_the_example_of_launching():
    """In a process of its own, which has no launcher."""
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "launch.md").read_text(), re.S)
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    subprocess.run([sys.executable, "-c", block], check=True, env=env, timeout=120)
    (options,) = re.findall(r"```yaml\n(data.*?)```", (DOCS / "launch.md").read_text(), re.S)
    assert st.Options.from_dict(yaml.safe_load(options)).fsdp == "all"
