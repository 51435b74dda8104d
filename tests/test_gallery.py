"""The gallery's families train on uneven shards as on one device, and gather nothing."""

import csv

import gallery
import pytest
import torch
import torch.distributed as dist

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, run_workers

D = torch.float64
STEPS = 6


def sharded(name):
    with st.fallback("error"):
        return gallery.train(name, STEPS, D, make_mesh((dist.get_world_size(),)))


@pytest.mark.gloo
@pytest.mark.parametrize("name", gallery.FAMILIES)
def test_trains_as_one_device(name):
    want = gallery.train(name, STEPS, D)
    assert want[-1] != want[0]
    for n in (2, 3):
        for losses in run_workers(n, sharded, name):
            assert gallery.difference(losses, want) < 1e-9


def parts(name):
    mesh = make_mesh((3,))
    inputs, target = gallery.FAMILIES[name].batch(torch.Generator().manual_seed(0))
    return [gallery.put(p, mesh, D) for p in (*inputs, target)]


@pytest.mark.parametrize("name", gallery.FAMILIES)
def test_shards_are_uneven(name):
    for xs in st.simulate(3, parts, name):
        cut = [x for x in xs if isinstance(x, st.ShardTensor)]
        assert len(cut) >= 2
        for x in cut:
            (dim,) = (d for d in x.spec.dims if d.axes)
            assert dim.sizes[0] > dim.size / 2 > dim.sizes[1]


def test_learning():
    """More steps help: the data have something to learn."""
    losses = gallery.train("fno2d", 60, torch.float32)
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])


@pytest.mark.slow
def test_the_program(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sys.argv",
        ["gallery.py", "--families", "graph", "sparse", "--steps", "25", "--out", str(tmp_path)],
    )
    threads = torch.get_num_threads()
    try:
        gallery.main()
    finally:
        torch.set_num_threads(threads)
    rows = list(csv.DictReader((tmp_path / "gallery.csv").open()))
    assert len(rows) == 50 and {r["family"] for r in rows} == {"graph", "sparse"}
    assert all(abs(float(r["2 ranks"]) / float(r["one device"]) - 1) < 1e-3 for r in rows)
    assert (tmp_path / "gallery.png").stat().st_size > 10_000
