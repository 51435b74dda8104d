"""Accelerate with ranks that share samples: one device's weights, metrics and checkpoints."""

from importlib.util import find_spec

import pytest
from forked import torchrun

SCRIPT = """
import accelerate, copy, os, sys, warnings, torch, shardtensor as st
from torch import nn
from torch.utils.data import DataLoader
from accelerate.state import AcceleratorState
from loop_models import Net
from shardtensor import io
from shardtensor.accelerate import Accelerator
warnings.filterwarnings("ignore")
D, ranks, folder = torch.float64, int(os.environ["WORLD_SIZE"]), sys.argv[1]


class Data(torch.utils.data.Dataset):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        x = torch.randn(1, 7, 4, dtype=D, generator=torch.Generator().manual_seed(i))
        return {"x": x, "y": x.roll(1, 1), "label": i}


def made():
    torch.manual_seed(0)
    net = Net().double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    return net, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)


def alone():
    # one batch of 4 is two steps of accumulation of 2 samples, over as many ranks as there are
    net, optimizer, scheduler = made()
    losses, data = [], Data(80)
    for i in range(20):
        optimizer.zero_grad()
        batch = torch.utils.data.default_collate([data[j] for j in range(4 * i, 4 * i + 4)])
        loss = (net(batch["x"]) - batch["y"]).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        for _ in range(groups):
            scheduler.step()
        losses.append(loss.item())
    return net, losses


def fit(accelerator, loader, net, optimizer, scheduler, stop=20, skip=0):
    losses, seen, part = [], [], 0.0
    batches = accelerator.skip_first_batches(loader, skip) if skip else loader
    for batch in batches:
        seen += [int(i) for i in accelerator.gather_for_metrics(batch["label"])]
        with accelerator.accumulate(net):
            loss = (net(batch["x"]) - batch["y"]).square().mean()
            accelerator.backward(loss)
            part += float(accelerator.reduce(loss, "mean")) / 2
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(net.parameters(), 0.5)
                assert norm.ndim == 0 and type(norm) is torch.Tensor
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            losses.append(part)
            part = 0.0
        if len(losses) == stop:
            break
    return losses, seen


def new(way):
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=2, domain=domain, shard=-2, options=ways[way]
    )
    net, optimizer, scheduler = made()
    # as a Trainer does that evaluates before it trains
    net = accelerator.prepare_model(net, evaluation_mode=True)
    loader = DataLoader(Data(80), batch_size=2 // groups)
    return accelerator, *accelerator.prepare(loader, net, optimizer, scheduler)


ways = {"plain": {}, "all": {"fsdp": "all"}, "data": {"fsdp": "data"}}
domain = int(sys.argv[2])
groups = ranks // domain
want, losses = alone()
for way in sys.argv[3:]:
    accelerator, loader, net, optimizer, scheduler = new(way)
    first, seen = fit(accelerator, loader, net, optimizer, scheduler, stop=12)
    accelerator.save_state(f"{folder}/{way}")
    accelerator.wait_for_everyone()
    accelerator, loader, net, optimizer, scheduler = new(way)
    accelerator.load_state(f"{folder}/{way}")
    rest, more = fit(accelerator, loader, net, optimizer, scheduler, skip=24)
    off = max(abs(a - b) for a, b in zip(first + rest, losses, strict=True))
    assert seen + more == list(range(80)), (seen, more)
    assert accelerator.num_processes == groups
    whole = accelerator.get_state_dict(net)
    if accelerator.is_main_process:
        off = max(off, *(float((whole[k] - v).abs().max()) for k, v in want.state_dict().items()))
        one, optim, _ = made()
        from safetensors.torch import load_file
        one.load_state_dict(load_file(f"{folder}/{way}/model.safetensors"))
        optim.load_state_dict(torch.load(f"{folder}/{way}/optimizer.bin", weights_only=True))
        assert optim.state[one.scale]["step"] == 12
    os.write(1, f"{way} {off < 1e-9}\\n".encode())

# each rank a node, which has files of its own
from accelerate.utils import ProjectConfiguration
from safetensors.torch import load_file
accelerator = Accelerator(
    cpu=True, domain=domain, options={"fsdp": "all"},
    project_config=ProjectConfiguration(save_on_each_node=True),
)
accelerate.PartialState().local_process_index = 0
net, optimizer, _ = made()
for p in net.parameters():
    p.grad = torch.ones_like(p)
optimizer.step()
had = copy.deepcopy((net.state_dict(), optimizer.state_dict()["state"]))
net, prepared = accelerator.prepare(net, optimizer)
own = f"{folder}/node{accelerator.process_index}"
accelerator.save_state(own)
found = load_file(f"{own}/model.safetensors")
assert found.keys() == had[0].keys() and all(torch.equal(found[k], v) for k, v in had[0].items())
found = torch.load(f"{own}/optimizer.bin", weights_only=True)["state"]
assert all(torch.equal(found[i][k], v) for i, mine in had[1].items() for k, v in mine.items())
accelerate.PartialState().local_process_index = accelerator.process_index
# metrics: a last batch that is not full counts each sample once, whole
accelerator = Accelerator(cpu=True, domain=domain, shard=-2)
loader = accelerator.prepare(DataLoader(Data(7), batch_size=2))
try:
    accelerate.skip_first_batches(loader, 1)
    raise AssertionError
except ValueError as e:
    assert "accelerator.skip_first_batches" in str(e)
found = [accelerator.gather_for_metrics((b["x"] * 2, b["label"])) for b in loader]
wanted = torch.stack([Data(7)[i]["x"] * 2 for i in range(7)])
assert torch.equal(torch.cat([x for x, _ in found]), wanted)
found = [accelerator.gather_for_metrics([b["label"], b["x"]]) for b in copy.copy(loader)]
assert [int(i) for labels, _ in found for i in labels] == list(range(7))
assert sum(len(x) for _, x in found) == 7
names = [n for b in loader for n in accelerator.gather_for_metrics([str(int(i)) for i in b["label"]])]
assert names == [str(i) for i in range(7)], names

# loaders: each sample once, whoever deals them out and however ranks are seeded
def numbers(loader, **options):
    accelerator = Accelerator(cpu=True, domain=domain, **options)
    torch.manual_seed(accelerator.process_index)
    loader = accelerator.prepare(loader)
    return [int(i) for b in loader for i in accelerator.gather_for_metrics(b["label"])]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return map(Data(12).__getitem__, range(12))


every = list(range(12))
mesh = accelerator.mesh
assert sorted(numbers(DataLoader(Data(12), 2, shuffle=True))) == every
assert numbers(DataLoader(Stream(), 2)) == every
assert numbers(DataLoader(Data(12), 5)) == every
assert numbers(DataLoader(Data(12), 4), split_batches=True) == every
sampler = io.DomainSampler(12, mesh, shuffle=False)
assert numbers(DataLoader(Data(12), 1, sampler=sampler)) == every
for n, size, drop in ((9, 4, True), (10, 3, False), (9, 3, False)):
    sampler = io.DomainSampler(n, mesh, shuffle=False, drop_last=drop)
    known = list(range(n // groups * groups if drop else n))
    assert sorted(numbers(DataLoader(Data(n), size, sampler=sampler))) == known
dealt = torch.utils.data.DistributedSampler(Data(12), 3, 0)
try:
    accelerator.prepare(DataLoader(Data(12), 1, sampler=dealt))
    raise AssertionError
except ValueError as e:
    assert "DomainSampler" in str(e)
# a model in shards and one that is not get their own weights
accelerator = Accelerator(cpu=True, domain=domain, options={"fsdp": "all"})
net = accelerator.prepare(made()[0])
teacher = accelerator.prepare_model(nn.Sequential(made()[0].blocks), evaluation_mode=True)
same = Net().double()
torch.manual_seed(1)
for p in same.parameters():
    nn.init.normal_(p)
same = accelerator.prepare_model(same, evaluation_mode=True)
want = [p.detach().clone() for p in same.parameters()]
accelerator.save_state(f"{folder}/mixed")
accelerator.wait_for_everyone()
with torch.no_grad():
    for p in (*teacher.parameters(), *same.parameters()):
        p.zero_()
accelerator.load_state(f"{folder}/mixed")
assert all(map(torch.equal, want, same.parameters()))
assert all(map(torch.equal, made()[0].blocks.parameters(), teacher.parameters()))
for options in ({}, {"fsdp": "all"}):
    accelerator = Accelerator(cpu=True, domain=domain, options=options)
    net, optimizer, _ = made()
    net = accelerator.prepare(net)
    accelerator.save_model(net, f"{folder}/model{len(options)}")
    accelerator.wait_for_everyone()
    assert os.listdir(f"{folder}/model{len(options)}") == ["model.safetensors"]
# an optimizer that has moments keeps them
for options in ({}, {"fsdp": "all"}):
    net, optimizer, _ = made()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    had = [s["exp_avg"].clone() for s in optimizer.state.values()]
    accelerator = Accelerator(cpu=True, domain=domain, options=options)
    net, prepared = accelerator.prepare(net, optimizer)
    found = prepared.state_dict()
    if accelerator.is_main_process:
        state = found["state"]
        assert [s["step"] for s in state.values()] == [1] * len(had)
        assert all(torch.equal(s["exp_avg"], m) for s, m in zip(state.values(), had, strict=True))
from accelerate.local_sgd import LocalSGD
try:
    with LocalSGD(accelerator, net, 4):
        raise AssertionError
except ValueError as e:
    assert "accumulate() needs none" in str(e)
net, optimizer, _ = made()
accelerator.prepare(net)
# made before the parameters were replaced, and not prepared with them
optimizer = accelerator.prepare(optimizer)
try:
    optimizer.step()
    raise AssertionError
except ValueError as e:
    assert "has replaced" in str(e)
for wrong, why in (({"dynamo_backend": "eager"}, "local program"), ({"domain": 3}, "do not make up")):
    AcceleratorState._reset_state()
    try:
        Accelerator(cpu=True, **wrong)
        raise AssertionError
    except ValueError as e:
        assert why in str(e)
AcceleratorState._reset_state()
accelerator = Accelerator(cpu=True, domain=domain, shard=-2, mixed_precision="bf16")
net = accelerator.prepare(made()[0].float())
x = st.distribute_tensor(torch.ones(1, 1, 7, 4), accelerator.mesh["domain"], [torch.distributed.tensor.Shard(2)])
out = net(x)
assert out.dtype == torch.float32
with torch.autocast("cpu", torch.bfloat16):
    error = (made()[0].float()(torch.ones(1, 1, 7, 4)).float() - out.full_tensor()).abs().max()
assert float(error) < 0.02
os.write(1, b"metrics\\n")
"""


@pytest.mark.gloo
@pytest.mark.parametrize(
    "ranks, domain, ways", [(2, 2, ["plain", "all"]), (4, 2, ["plain", "all", "data"])]
)
def test_twenty_steps_are_those_of_one_device(tmp_path, ranks, domain, ways):
    if not find_spec("accelerate"):
        pytest.skip("accelerate is not installed")
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    code, text = torchrun(
        tmp_path, ranks, script, tmp_path, str(domain), *ways, loads="import accelerate"
    )
    assert code == 0, text[-9000:]
    for way in ways:
        assert text.count(f"{way} True") == ranks, text[-2000:]
    assert text.count("metrics") == ranks
