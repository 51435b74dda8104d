"""Weights & Biases, offline, and TensorBoard take sharded losses and models as they are, logged once."""

import json
from importlib.util import find_spec

import pytest
from forked import torchrun

SCRIPT = """
import json, sys, torch, wandb
from pathlib import Path
from torch import nn
from torch.distributed.tensor import Shard
from torch.utils.tensorboard import SummaryWriter
import shardtensor as st

folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
mesh, _ = st.init()
first = torch.distributed.get_rank() == 0
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 1, 3, padding=1))
model = st.parallelize(model.double(), mesh)
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
run = wandb.init(mode="offline" if first else "disabled", dir=folder)
run.watch(model, log="gradients", log_freq=1)
writer = SummaryWriter(folder) if first else None
kept = []
if first:
    log = run.log
    run.log = lambda d, *a, **k: (kept.append(d), log(d, *a, **k))
for step in range(3):
    x = st.distribute_tensor(torch.randn(2, 1, 9, 8, dtype=torch.float64), mesh, [Shard(2)])
    loss = (model(x) - x).square().mean()
    loss.backward()
    run.log({"loss": loss})
    if writer is not None:
        writer.add_histogram("gradient", model[0].weight.grad, step)
    optimizer.step()
    optimizer.zero_grad()
if first:
    grads = run.summary["gradients/0.weight"]
    found = {"loss": run.summary["loss"], "bins": list(grads["bins"]), "times": len(kept)}
    (folder / "found.json").write_text(json.dumps(found))
run.finish()
"""


@pytest.mark.gloo
@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_logged_once_and_as_on_one_device(tmp_path):
    script, found = tmp_path / "job.py", []
    script.write_text(SCRIPT)
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        code, text = torchrun(tmp_path, ranks, script, folder, WANDB_SILENT="true")
        assert code == 0, text[-3000:]
        assert len(list(folder.glob("wandb/offline-run-*"))) == 1
        assert len(list(folder.glob("events*"))) == 1
        found.append(json.loads((folder / "found.json").read_text()))
    one, two = found
    assert two["times"] == one["times"] == 3
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-9)
    # gradients of one device, not this rank's part
    assert two["bins"] == pytest.approx(one["bins"], rel=1e-6, abs=1e-12)
