"""Lightning's Trainer with ranks that share samples: one device's weights, logs and checkpoints."""

from importlib.util import find_spec

import pytest
from forked import torchrun

SCRIPT = """
import os, sys, warnings, logging, torch, lightning as L, torchmetrics, shardtensor as st
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
D, ranks, folder = torch.float64, int(os.environ["WORLD_SIZE"]), sys.argv[1]


class Data(torch.utils.data.Dataset):
    def __init__(self, first, n):
        self.first, self.n = first, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(self.first + i)
        x = torch.randn(1, 7, 4, dtype=D, generator=g)
        return {"x": x, "y": x.roll(1, 1), "label": i}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x).tanh()


class Task(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.samples = torchmetrics.SumMetric()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.last = nn.Conv2d(4, 1, 1)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.seen = []

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x) * self.scale

    def training_step(self, batch, i):
        loss = (self(batch["x"]) - batch["y"]).square().mean()
        self.log("loss", loss, prog_bar=True, on_step=True, sync_dist=True)
        return {"loss": loss, "aside": batch["label"]}

    def validation_step(self, batch, i):
        error = (self(batch["x"]) - batch["y"]).abs().mean()
        self.log_dict({"error": error}, sync_dist=True)
        self.samples.update(torch.ones(len(batch["x"])))
        self.log("samples", self.samples)

    def predict_step(self, batch, i):
        return self(batch["x"]).full_tensor()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)]


def made():
    torch.manual_seed(0)
    return Task().double()


def loaders():
    return DataLoader(Data(0, 10), 2), DataLoader(Data(50, 4), 2)


def alone():
    task = made()
    (optimizer,), (scheduler,) = task.configure_optimizers()
    # Lightning shuffles what is trained on, where there are several ranks
    order = DistributedSampler(Data(0, 10), 1, 0, shuffle=True, seed=0)
    for epoch in range(4):
        losses = []
        order.set_epoch(epoch)
        for batch in DataLoader(Data(0, 10), 2, sampler=order):
            optimizer.zero_grad()
            loss = (task(batch["x"]) - batch["y"]).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(task.parameters(), 0.5)
            optimizer.step()
            losses.append(loss.item())
        scheduler.step()
        with torch.no_grad():
            errors = [float((task(b["x"]) - b["y"]).abs().mean()) for b in loaders()[1]]
    return task, losses[-1], sum(errors) / 2


def fit(name, epochs, strategy, resume=None):
    task = made()
    torch.manual_seed(0)
    saved = ModelCheckpoint(
        f"{folder}/{name}", "{epoch}", monitor="error", save_top_k=-1, save_on_train_epoch_end=True
    )
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy, max_epochs=epochs,
        logger=CSVLogger(folder, name, f"{epochs}"), log_every_n_steps=1,
        callbacks=[saved, EarlyStopping("error", patience=9)],
        gradient_clip_val=0.5, enable_progress_bar=name == "all", enable_model_summary=False,
    )
    if name.startswith("data"):
        # two ranks have samples of their own: half a batch each
        train, check = (DataLoader(x.dataset, 1) for x in loaders())
    else:
        train, check = loaders()
    trainer.fit(task, train, check, ckpt_path=resume)
    return task, trainer, saved


def apart(name, task, want):
    state = task.state_dict()
    pairs = [(getattr(state[k], "full_tensor", lambda x=state[k]: x)(), v) for k, v in want.state_dict().items()]
    return max(float((a - b).abs().max()) for a, b in pairs)


want, loss, error = alone()
ways = {
    "plain": dict(domain=-1, shard=-2), "all": dict(domain=2, shard=-2, fsdp="all"),
    "cut": dict(domain=2, shard=lambda b, mesh: {**b, **{k: st.distribute_tensor(
        b[k], mesh, [torch.distributed.tensor.Shard(2)], src_data_rank=None) for k in "xy"}}),
    "data": dict(domain=1, shard=-2, fsdp="data"),
}
for name in sys.argv[2:]:
    strategy = lambda: st.lightning.DomainParallel(**ways[name])
    fit(name, 2, strategy())
    task, trainer, saved = fit(name, 4, strategy(), f"{folder}/{name}/epoch=1.ckpt")
    off = apart(name, task, want)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    assert metrics["samples"] == 4, metrics
    logged = abs(metrics["loss_step" if "loss_step" in metrics else "loss"] - loss), abs(metrics["error"] - error)
    file = torch.load(f"{folder}/{name}/epoch=3.ckpt", weights_only=False)
    one = made()
    one.load_state_dict(file["state_dict"])
    off = max(off, apart(name, one, want))
    optimizer = one.configure_optimizers()[0][0]
    optimizer.load_state_dict(file["optimizer_states"][0])
    assert all(type(s["exp_avg"]) is torch.Tensor and s["exp_avg"].shape == p.shape
               for p, s in optimizer.state.items())
    steps = open(f"{folder}/{name}/4/metrics.csv").read().count("\\n")
    os.write(1, f"{name} {off < 1e-9} {max(logged) < 1e-9} {off:.1e} {logged} {trainer.global_step} {steps}\\n".encode())
    if name == "all":
        outs = trainer.predict(task, loaders()[1])
        ok = all(torch.allclose(o, want(b["x"]), rtol=1e-9) for o, b in zip(outs, loaders()[1]))
        os.write(1, f"predicted {ok}\\n".encode())
        data = loaders()[1].dataset
        os.environ["PL_SEED_WORKERS"] = "1"
        drawing = trainer.strategy.process_dataloader(DataLoader(data, 1, num_workers=1))
        os.write(1, f"alike {drawing.worker_init_fn.keywords['rank'] == 0}\\n".encode())
        dealt = torch.utils.data.DistributedSampler(data, 2, trainer.global_rank)
        try:
            trainer.validate(task, DataLoader(data, 1, sampler=dealt))
        except ValueError as e:
            os.write(1, f"refused {'DomainSampler' in str(e)}\\n".encode())
        average = StochasticWeightAveraging(swa_lrs=0.01)
        try:
            L.Trainer(
                accelerator="cpu", devices=ranks, strategy=strategy(), max_epochs=2, callbacks=[average],
                logger=False, enable_model_summary=False, enable_checkpointing=False,
            ).fit(made(), *loaders())
        except ValueError as e:
            os.write(1, f"averaged {'Leave fsdp out' in str(e)}\\n".encode())


def stop(*_):
    raise RuntimeError("a hook's")


task, called = made(), st.lightning.strategy._called
task.forward = own = lambda *_: None
called(task, "eval", (), {})
task.register_forward_pre_hook(stop)
try:
    called(task, "eval", (), {})
except RuntimeError:
    os.write(1, f"kept {vars(task)['forward'] is own}\\n".encode())
"""


AGREED = (
    SCRIPT.partition("def alone")[0]
    + """
class Gathers(Task):
    def validation_step(self, batch, i):
        super().validation_step(batch, i)
        error = (self(batch["x"]) - batch["y"]).square().mean()
        self.log("square", error)
        self.log("gathered", self.all_gather(error).sum())
        self.log("labels", self.all_gather(batch["label"].sum().double()).sum())


torch.manual_seed(0)
task = Gathers().double()
# the best one alone: what ranks agree on at the end of each epoch
saved = ModelCheckpoint(folder, "{epoch}", monitor="error", save_top_k=1)
trainer = L.Trainer(
    accelerator="cpu", devices=ranks, strategy=st.lightning.DomainParallel(shard=-2), max_epochs=3,
    callbacks=[saved], logger=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(task, *(DataLoader(Data(*n), batch_size=2) for n in ((0, 10), (50, 4))))
m = {k: float(v) for k, v in trainer.callback_metrics.items()}
assert m["gathered"] == m["square"] and m["labels"] == ((0 + 1) + (2 + 3)) / 2, m
# errors fall: the last epoch is the best
assert float(saved.best_model_score) == m["error"], (saved.best_model_score, m)
assert os.path.basename(saved.best_model_path) == "epoch=2.ckpt"
# the first rank writes them
assert trainer.global_rank or os.listdir(folder) == ["epoch=2.ckpt"]
os.write(1, b"agreed\\n")
"""
)


@pytest.mark.gloo
def test_the_best_checkpoint_and_what_is_gathered(tmp_path):
    if not find_spec("lightning"):
        pytest.skip("lightning is not installed")
    script, folder = tmp_path / "job.py", tmp_path / "best"
    script.write_text(AGREED)
    code, text = torchrun(tmp_path, 2, script, folder, loads="import lightning")
    assert code == 0 and text.count("agreed") == 2, text[-4000:]


@pytest.mark.gloo
def test_twenty_steps_of_a_trainer(tmp_path):
    if not find_spec("lightning"):
        pytest.skip("lightning is not installed")
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    ways = ("plain", "all", "cut", "data")
    code, text = torchrun(tmp_path, 2, script, tmp_path, *ways, loads="import lightning")
    assert code == 0, text[-4000:]
    for way in ways:
        # two epochs of five steps, resumed: as many rows as steps and validations, and a head
        assert text.count(f"{way} True True") == 2, text[-3000:]
    assert text.count("predicted True") == 2, text[-3000:]
    assert text.count("refused True") == text.count("alike True") == 2, text[-3000:]
    assert text.count("averaged True") == text.count("kept True") == 2, text[-3000:]
