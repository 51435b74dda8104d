"""Accelerate, Fabric and Lightning put DDP around or inside of `parallelize`: one device's weights."""

from importlib.util import find_spec

import pytest
from forked import torchrun

SCRIPT = """
import os, sys, warnings, torch, shardtensor as st
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard
warnings.filterwarnings("ignore")
D, ranks = torch.float64, int(os.environ["WORLD_SIZE"])
tools = {}


def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, [torch.randn(4, 7, 3, dtype=D) for _ in range(3)]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(model, batches, optimizer, backward):
    for x in batches:
        optimizer.zero_grad()
        backward(model(x).square().mean())
        optimizer.step()


def fit(net, batches):
    import lightning as L

    class Task(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, _, i):
            return self.net(batches[i]).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.net.parameters(), lr=0.05)

    return Task(), L.Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )


model, batches = made()
train(model, batches, torch.optim.AdamW(model.parameters(), lr=0.05), torch.Tensor.backward)
want = weights(model)
if "accelerate" in sys.argv:
    from accelerate import Accelerator
    tools["accelerate"] = Accelerator(cpu=True)
if "lightning" in sys.argv:
    from lightning.fabric import Fabric
    tools["fabric"] = Fabric(accelerator="cpu", devices=ranks, strategy="ddp")
    tools["fabric"].launch()
    tools["lightning"] = None
for trainer, way in [(t, w) for t in tools for w in ("inside", "outside", "domain")]:
    tool = tools[trainer]
    model, batches = made()
    if ranks == 4:
        mesh, _ = st.init(data=2, domain=2)
        mine = mesh.get_local_rank("data")
        batches = [x.chunk(2)[mine] for x in batches]
    else:
        mesh, _ = st.init(domain=-1)
    batches = [
        st.distribute_tensor(x, mesh["domain"], [Shard(1)], src_data_rank=None) for x in batches
    ]
    on = mesh["domain"] if way == "domain" else mesh
    named = {"data": "data"} if ranks == 4 and way != "domain" else {}
    if way != "outside":
        st.parallelize(model, on, **named)
    if trainer == "lightning":
        task, tool = fit(model, batches)
        if way == "outside":
            st.parallelize(task, on, **named)
        tool.fit(task, torch.utils.data.DataLoader(torch.arange(3), batch_size=1))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        set_up = tool.prepare if trainer == "accelerate" else tool.setup
        wrapped, optimizer = set_up(model, optimizer)
        if way == "outside":
            wrapped = st.parallelize(wrapped, on, **named)
        train(wrapped, batches, optimizer, tool.backward)
    error = float((weights(model) - want).abs().max())
    os.write(1, f"{trainer} {way} {error < 1e-12}\\n".encode())
"""


@pytest.mark.gloo
def test_ddp_of_trainers(tmp_path):
    found = [name for name in ("accelerate", "lightning") if find_spec(name)]
    if not found:
        pytest.skip("neither accelerate nor lightning is installed")
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    loads = "import " + ", ".join(found)
    code, text = torchrun(tmp_path, 4, script, *found, loads=loads)
    assert code == 0, text[-4000:]
    trainers = ("accelerate",) * ("accelerate" in found)
    trainers += ("fabric", "lightning") * ("lightning" in found)
    for trainer in trainers:
        for way in ("inside", "outside", "domain"):
            assert text.count(f"{trainer} {way} True") == 4, text + text[-2000:]
