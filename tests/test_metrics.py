"""Metrics of torchmetrics on shards: what one device finds, each sample counted once."""

import copy

import pytest
import torch
from samples import mesh_of
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.train.metrics import once

tm = pytest.importorskip("torchmetrics")
D = torch.float64


def classes(y):
    return (y[:, 0] > 0.5).long()


def plain(x, y):
    return x, y


def flat(x, y):
    return x.flatten(), y.flatten()


def alone(x, y):
    return (x,)


def labels(x, y):
    return x, classes(y)


def scores(x, y):
    return x[:, 0].flatten(), classes(y).flatten()


MULTI = dict(task="multiclass", num_classes=2)
METRICS = {
    "mse": (lambda: tm.MeanSquaredError(), plain),
    "r2": (lambda: tm.R2Score().set_dtype(D), flat),
    "pearson": (lambda: tm.PearsonCorrCoef().set_dtype(D), flat),
    "ssim": (lambda: tm.image.StructuralSimilarityIndexMeasure(data_range=1.0, kernel_size=3, sigma=0.3), plain),
    "sum": (lambda: tm.SumMetric().set_dtype(D), alone),
    "max": (lambda: tm.MaxMetric().set_dtype(D), alone),
    "accuracy": (lambda: tm.Accuracy(**MULTI), labels),
    "confusion": (lambda: tm.ConfusionMatrix(**MULTI), labels),
    "auroc": (lambda: tm.AUROC(task="binary"), scores),
    "collection": (lambda: tm.MetricCollection([tm.ConfusionMatrix(**MULTI), tm.Accuracy(**MULTI)]), labels),
}  # fmt: skip


def samples(i):
    draw = torch.Generator().manual_seed(i)
    return (torch.rand(2, 2, 9, 7, dtype=D, generator=draw) for _ in range(2))


def found(metric, of, batches):
    for x, y in batches:
        metric.update(*of(x, y))
    value = metric.compute()
    values = list(value.values()) if isinstance(value, dict) else [value]
    return [v.full_tensor() if isinstance(v, st.ShardTensor) else v for v in values]


@pytest.mark.parametrize("shape", [(1, 3), (2, 2)])
@pytest.mark.parametrize("name", METRICS)
def test_each_sample_counts_once(name, shape):
    make, of = METRICS[name]
    n = shape[1]
    sizes = {2: [8, 1] if n == 2 else [5, 0, 4]}

    def run():
        mesh = mesh_of(shape)
        mine = range(mesh.get_local_rank("data"), 4, shape[0])
        batches = [
            [st.distribute_tensor(v, mesh["domain"], [Shard(2)], sizes=sizes) for v in samples(i)]
            for i in mine
        ]
        # as collections copy them
        return found(copy.deepcopy(once(make(), mesh)), of, batches)

    want = found(make(), of, [list(samples(i)) for i in range(4)])
    for values in st.simulate(shape[0] * n, run):
        for a, b in zip(values, want, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-6 if a.dtype == torch.float32 else 1e-9, atol=0
            )
