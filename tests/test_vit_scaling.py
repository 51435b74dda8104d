"""The recipe of ViT scaling: its model on shards, and the rows and the picture it promises."""

import csv
from pathlib import Path
from statistics import median

import pytest
import torch
import vit_scaling
from torch.distributed.tensor import Shard
from vit import ViT

import shardtensor as st
from shardtensor import testing as T
from shardtensor.comm import transport


@pytest.mark.parametrize("shape", [(24, 16), (16, 8, 8)])
def test_the_model_on_shards(shape):
    torch.manual_seed(0)
    model = ViT(shape, patch=4, width=16, depth=2).double()
    x = torch.randn(1, 1, *shape, dtype=torch.float64)
    assert model(x).shape == x.shape
    for cut in ((8, shape[0] - 8), (shape[0] - 7, 0, 7)):
        T.hold(model, [x], [T.shard(2, cut)], (len(cut),), rtol=1e-10)
    T.hold(model, [x], [T.On([Shard(2), Shard(3)])], (2, 2), rtol=1e-10)


@pytest.mark.slow
def test_the_program(tmp_path, monkeypatch):
    args = ["--scale", "0.25", "--ranks", "1", "2", "--rehearse", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["vit_scaling.py", *args])
    vit_scaling.main()
    rows = [vit_scaling.Row(**r) for r in csv.DictReader((tmp_path / "vit_scaling.csv").open())]
    of = {(r.what, r.mode, int(r.size), int(r.ranks), r.how[:8]): r for r in rows}
    every = {j for jobs in vit_scaling.jobs(0.25).values() for j in jobs}
    ratios = []
    for job in every:
        mode = "training" if job.train else "inference"
        here = [of[job.what, mode, job.size, n, "measured"] for n in (1, 2)]
        alone = of[job.what, mode, job.size, 2, "rehearse"]
        assert float(here[0].sent) == 0 < float(here[1].sent) == float(alone.sent)
        # the strict transport holds copies of what is under way
        if job.dims and not transport.is_strict():
            ratios.append(float(alone.peak) / float(here[1].peak))
        assert all(float(r.ms) > 0 for r in here)
    # when a rank gets the other's buffers, and drops them, is a matter of timing
    assert transport.is_strict() or median(ratios) == pytest.approx(1, rel=0.1)
    assert (tmp_path / "vit_scaling.png").stat().st_size > 10_000


def test_what_is_too_small_is_not_rehearsed():
    jobs = {j for of in vit_scaling.jobs(1.0).values() for j in of}
    assert any(vit_scaling.rows_of(j) < 64 for j in jobs) and any(
        vit_scaling.rows_of(j) >= 64 for j in jobs
    )
    with pytest.raises(KeyError):
        ViT((4, 4, 4, 4))


def test_nothing_of_ours_in_the_models():
    import gallery_models
    import models
    import vit

    for module in (gallery_models, models, vit):
        assert "import shardtensor" not in Path(module.__file__).read_text()
        assert not any(v is st for v in vars(module).values())
