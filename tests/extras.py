"""What each extra is for, as a small program on one rank that needs nothing else."""

# after the start, which makes `mesh` of one rank and `x`, four rows of three on it
START = """
import sys
import numpy as np, torch, shardtensor as st
from shardtensor import io
from torch.distributed.tensor import Shard
sys.path.insert(0, {examples!r})
mesh, _ = st.init(domain=-1)
x = st.distribute_tensor(torch.arange(12.0).reshape(4, 3), mesh, [Shard(0)])
"""
PROGRAMS = {
    "io": """
io.write_zarr(x, "a.zarr", "t")
assert io.read(io.open_array("a.zarr", "t"), mesh, [Shard(0)]).full_tensor().equal(x.full_tensor())
import h5py, netCDF4
with h5py.File("a.h5", "w") as f:
    f["t"] = x.full_tensor().numpy()
assert io.open_array("a.h5", "t").shape == (4, 3)
with netCDF4.Dataset("a.nc", "w") as f:
    f.createDimension("y", 4)
    f.createVariable("v", "f4", ("y",))[:] = [1, 2, 3, 4]
assert io.open_array("a.nc", "v").shape == (4,)
""",
    "mesh": """
open("a.ply", "w").write("ply\\nformat ascii 1.0\\nelement vertex 3\\nproperty float x\\n"
    "property float y\\nproperty float z\\nelement face 1\\nproperty list uchar int vertex_index\\n"
    "end_header\\n0 0 0\\n1 0 0\\n0 1 0\\n3 0 1 2\\n")
assert io.read_mesh("a.ply").points.shape == (3, 3)
""",
    "demo": """
import models, vit, panels, navier_stokes, shallow_water
""",
    "graphs": """
from torch_geometric.nn import GCNConv
layer, edges = GCNConv(3, 2), torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
assert layer(x, edges).full_tensor().allclose(layer(x.full_tensor(), edges))
""",
    "yaml": """
open("a.yaml", "w").write("checkpoint: true\\n")
assert st.Options.from_yaml("a.yaml").checkpoint
""",
    "html": """
with st.trace() as t:
    x.square().sum().item()
assert t.to_html().startswith("<!doctype html>")
""",
    "cli": """
from shardtensor import cli
sys.argv = ["shardtensor", "plan", "--help"]
try:
    cli.main()
except SystemExit as e:
    assert not e.code
""",
    "lightning": """
import lightning as L

class Task(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Conv2d(1, 1, 3, padding=1)

    def training_step(self, batch, i):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

task = Task()
before = task.net.weight.detach().clone()
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = L.Trainer(
    strategy=st.lightning.DomainParallel(domain=1), accelerator="cpu", devices=1, max_steps=2, **quiet
)
trainer.fit(task, torch.utils.data.DataLoader(torch.ones(4, 1, 8, 8), batch_size=2))
assert trainer.global_step == 2 and not task.net.weight.equal(before)
""",
    "transformers": """
import transformers

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        return {"loss": self.net(x).square().mean()}

args = transformers.TrainingArguments(
    "out", max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
)
data = [{"x": torch.ones(1, 8, 8)}] * 32
assert st.transformers.Trainer(Net(), args, train_dataset=data).train().global_step == 2
""",
    "accelerate": """
accelerator = st.accelerate.Accelerator(cpu=True)
net = torch.nn.Conv2d(1, 1, 3, padding=1)
net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1))
before = [p.detach().clone() for p in net.parameters()]
accelerator.backward(net(torch.ones(1, 1, 8, 8)).square().mean())
optimizer.step()
assert not before[0].equal(next(net.parameters()))
""",
}
