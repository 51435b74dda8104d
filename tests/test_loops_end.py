"""A rank that raises in somebody else's loop ends the others, which say why."""

from importlib.util import find_spec

import pytest
from forked import torchrun

DATA = """
import sys, torch, warnings
from torch import nn
from torch.utils.data import DataLoader
warnings.filterwarnings("ignore")


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        x = torch.randint(0, 5, (12,))
        if i == 2 and "index" in sys.argv:
            # on the second rank
            x[-1] = 99
        return {"x": x, "y": torch.randn(12, 3)}


torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 3))
loader = DataLoader(Data(), 1)


def loss_of(batch):
    out = model(batch["x"])
    if "nan" in sys.argv:
        # on the first rank
        out = (out.square() * (torch.arange(12) > 0)[:, None]).sqrt()
    return (out - batch["y"]).square().mean()
"""
LOOPS = {
    "lightning": """
import lightning as L, shardtensor as st


class Task(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = model

    def training_step(self, batch, i):
        return loss_of(batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


L.Trainer(
    accelerator="cpu", devices=2, strategy=st.lightning.DomainParallel(domain=2, shard=1), max_epochs=1,
    logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    detect_anomaly="nan" in sys.argv,
).fit(Task(), loader)
print("ended in order")
""",
    "accelerate": """
from accelerate import PartialState
from shardtensor.accelerate import Accelerator

if "alone" in sys.argv:
    PartialState()
accelerator = Accelerator(domain=2, shard=1)
assert accelerator.is_main_process == (torch.distributed.get_rank() == 0)
optimizer = torch.optim.Adam(model.parameters())
loader, model, optimizer = accelerator.prepare(loader, model, optimizer)
for batch in loader:
    accelerator.backward(loss_of(batch))
    optimizer.step()
    optimizer.zero_grad()
    assert not accelerator.reduce(loss_of(batch), "mean").requires_grad
print("ended in order")
""",
}


@pytest.mark.gloo
@pytest.mark.parametrize(
    "loop, case, why",
    [
        ("lightning", "index", "rank 1 raised IndexError: index out of range in self"),
        ("lightning", "nan", "'MulBackward0' returned nan values in its 0th output, on rank 0"),
        ("accelerate", "index", "rank 1 raised IndexError: index out of range in self"),
        ("accelerate", "alone", "takes each of 2 ranks for the only process"),
        ("accelerate", "well", ""),
    ],
)
def test_others_end_with_the_first_error(tmp_path, loop, case, why):
    if not find_spec(loop):
        pytest.skip(f"{loop} is not installed")
    script = tmp_path / "job.py"
    script.write_text(DATA + LOOPS[loop])
    code, text = torchrun(tmp_path, 2, script, case, loads=f"import {loop}")
    assert (code == 0) == (text.count("ended in order") == 2) == (not why), text[-5000:]
    assert why in text
