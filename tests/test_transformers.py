"""The Trainer of transformers with ranks that share samples: one device's weights, metrics and checkpoints."""

from importlib.util import find_spec

import pytest
from forked import torchrun

SCRIPT = """
import dataclasses, os, sys, warnings, torch, transformers
from torch import nn
from loop_models import Net
from shardtensor.transformers import Trainer
warnings.filterwarnings("ignore")
D, ranks, folder = torch.float64, int(os.environ["WORLD_SIZE"]), sys.argv[1]


class Data(torch.utils.data.Dataset):
    def __init__(self, n, noisy=False):
        self.n, self.noisy = n, noisy

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        x = torch.randn(1, 7, 4, dtype=D, generator=torch.Generator().manual_seed(i))
        return {"x": x + torch.rand(1) * self.noisy, "labels": x.roll(1, 1)}


class Told(Net):
    def forward(self, x, labels):
        x = super().forward(x)
        return {"loss": (x - labels).square().mean(), "logits": x}


def made():
    torch.manual_seed(0)
    return Told().double()


def batches(n, size):
    data = Data(n)
    for i in range(0, n, size):
        yield torch.utils.data.default_collate([data[j] for j in range(i, min(i + size, n))])


def alone():
    # four samples a step: two batches of two
    net, losses = made(), []
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.0)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, 20)
    for _ in range(4):
        for batch in batches(20, 4):
            optimizer.zero_grad()
            loss = net(**batch)["loss"]
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    with torch.no_grad():
        (batch,) = batches(5, 5)
        return net, losses, net(**batch)["logits"]


def metrics(found):
    predictions, labels = map(torch.as_tensor, found)
    return {"n": len(labels), "error": float((predictions - labels).square().mean())}


known = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
ordered = "train_sampling_strategy" in known


class InOrder(Trainer):
    # what the argument says since version 5
    def _get_train_sampler(self, *args):
        return super()._get_train_sampler(*args) if ordered else torch.utils.data.SequentialSampler(self.train_dataset)


def new(way, kind=InOrder, **more):
    options = dict(
        output_dir=f"{folder}/{way}", per_device_train_batch_size=2 // groups,
        per_device_eval_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=4,
        learning_rate=0.01, max_grad_norm=0.5, train_sampling_strategy="sequential", seed=3,
        eval_strategy="epoch", save_steps=7, logging_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, average_tokens_across_devices=False,
    ) | more
    args = transformers.TrainingArguments(**{k: v for k, v in options.items() if k in known})
    return kind(
        made(), args, train_dataset=Data(20), eval_dataset=Data(5), compute_metrics=metrics,
        domain=domain, shard=-2, options=ways[way],
    )


def weights(trainer):
    return trainer.accelerator.get_state_dict(trainer.model)


ways = {"plain": {}, "all": {"fsdp": "all"}, "data": {"fsdp": "data"}}
domain = int(sys.argv[2])
groups = ranks // domain
want, losses, logits = alone()
for way in sys.argv[3:]:
    trainer = new(way)
    assert trainer.evaluate()["eval_n"] == 5
    trainer.train()
    log = trainer.state.log_history
    # before 5 they are rounded
    losses = losses if ordered else [round(x, 4) for x in losses]
    off = max(abs(a - b) for a, b in zip([x["loss"] for x in log if "loss" in x], losses, strict=True))
    assert [x["eval_n"] for x in log if "eval_n" in x] == [5] * 4
    found = trainer.predict(Data(5))
    assert found.predictions.shape == (5, 1, 7, 4)
    off = max(off, float((torch.as_tensor(found.predictions) - logits).abs().max()))
    assert abs(found.metrics["test_error"] - log[-2]["eval_error"]) < 1e-12
    again = new(way)
    # within an epoch; those before 5 read no optimizer's state on the CPU of several ranks
    again.train(**({"resume_from_checkpoint": f"{folder}/{way}/checkpoint-14"} if ordered else {}))
    for state in (weights(trainer), weights(again)):
        for k, v in state.items():
            off = max(off, float((v - want.state_dict()[k]).abs().max()))
    best = new(way, load_best_model_at_end=True, save_strategy="epoch", metric_for_best_model="eval_error",
               greater_is_better=True, num_train_epochs=2)
    best.train()
    assert best.state.best_model_checkpoint.endswith("checkpoint-5"), best.state.best_model_checkpoint
    kept = weights(best)
    if trainer.is_world_process_zero():
        from safetensors.torch import load_file
        at = load_file(f"{folder}/{way}/checkpoint-5/model.safetensors")
        assert at.keys() == kept.keys() and all(torch.equal(at[k], kept[k]) for k in at)
        state = torch.load(f"{folder}/{way}/checkpoint-5/optimizer.pt", weights_only=True)
        assert {float(s["step"]) for s in state["state"].values()} == {5.0}
        assert not any(hasattr(v, "placements") for s in state["state"].values() for v in s.values())
    # others would write what they have, nothing
    written = []
    best._save = lambda *args, **state: written.append(args)
    best.save_model()
    assert way == "plain" or bool(written) == best.args.should_save
    assert trainer.get_total_train_batch_size(trainer.args) == 4
    os.write(1, f"{way} {off < 1e-6}\\n".encode())

# random transforms in processes draw alike where ranks share samples
trainer = new("plain", Trainer, dataloader_num_workers=1, train_sampling_strategy="random")
trainer.train_dataset = Data(8, noisy=True)
drawn = torch.cat([b["x"] for b in trainer.get_train_dataloader()])
everyone = [torch.empty_like(drawn) for _ in range(ranks)]
torch.distributed.all_gather(everyone, drawn)
for rank, other in enumerate(everyone):
    assert torch.equal(other, everyone[rank // domain * domain])
assert groups == 1 or not torch.equal(everyone[0], everyone[-1])
try:
    new("plain", train_sampling_strategy="batch_rebalance")
    assert not ordered
except ValueError as e:
    assert "batch_rebalance" in str(e)
os.write(1, b"done\\n")
"""


@pytest.mark.gloo
@pytest.mark.parametrize(
    "ranks, domain, ways", [(2, 2, ["plain", "all"]), (4, 2, ["plain", "data"])]
)
def test_twenty_steps_are_those_of_one_device(tmp_path, ranks, domain, ways):
    if not find_spec("transformers") or not find_spec("accelerate"):
        pytest.skip("transformers is not installed")
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    code, text = torchrun(
        tmp_path,
        ranks,
        script,
        tmp_path,
        str(domain),
        *ways,
        loads="import transformers, accelerate",
    )
    assert code == 0, text[-9000:]
    for way in ways:
        assert text.count(f"{way} True") == ranks, text[-2000:]
    assert text.count("done") == ranks
