"""`check` and `plan` of models that take dicts, whose fields have the cut dims at other places."""

import re
from collections import namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

import shardtensor as st
from shardtensor.plan.estimate import Layout, Task, estimate
from shardtensor.plan.sweep import sweep

SHAPES = {"surface": (1, 2, 24, 16), "upper": (1, 3, 5, 24, 16), "land": (24, 16), "hour": (1,)}
SEEN = []


class Weather(nn.Module):
    """One dict in, a dict out."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(18, 17, 3, padding=1)

    def forward(self, batch):
        SEEN.append({k for k, x in batch.items() if isinstance(x, st.ShardTensor)})
        surface, upper = batch["surface"], batch["upper"]
        land = (batch["land"] + batch["hour"]).expand(1, 1, *batch["land"].shape)
        y = self.mix(torch.cat([surface, upper.flatten(1, 2), land], 1))
        return {"surface": y[:, :2], "upper": y[:, 2:].unflatten(1, (3, 5)) + upper}


class ByName(Weather):
    def forward(self, surface, upper, land, hour):
        return super().forward({"surface": surface, "upper": upper, "land": land, "hour": hour})


@dataclass(frozen=True)
class Record:
    surface: Any
    upper: Any
    land: Any
    hour: Any
    source: str = "here"


Row = namedtuple("Row", list(SHAPES))


class OfRecord(Weather):
    """What a batch holds by name, and what it has no tensors in."""

    def forward(self, batch):
        return super().forward({k: getattr(batch, k) for k in SHAPES})


class InTwo(Weather):
    def forward(self, surface, upper, rest):
        return super().forward({"surface": surface, "upper": upper, **rest})


def sample():
    torch.manual_seed(0)
    return {k: torch.randn(s) for k, s in SHAPES.items()}


@pytest.mark.parametrize("model", [Weather, ByName])
def test_fields_are_cut_wherever_they_have_the_dim(model):
    SEEN.clear()
    report = st.check(model(), sample())
    assert report.ok and not report.notes, report
    assert {"surface", "upper", "land"} in SEEN
    assert all(s in (set(), {"surface", "upper", "land"}) for s in SEEN)


def test_what_is_whole_on_every_rank_is_told():
    inputs = sample() | {"upper": torch.randn(1, 3, 5, 24, 16), "far": torch.randn(1, 2, 23, 17)}
    report = st.check(Weather(), inputs)
    assert report.ok
    assert any("inputs['far'] (1, 2, 23, 17) is whole on every rank" in n for n in report.notes)


def test_forward_that_takes_neither_raises_as_torch_does():
    with pytest.raises(TypeError, match="unexpected keyword"):
        st.check(ByName(), {"surface": torch.randn(1, 2, 8, 8)} | {"other": torch.randn(1)})


def test_a_plan_of_a_dict_is_that_of_the_arguments():
    layout = Layout(1, (2,), (2,))
    one = estimate(Task(Weather, SHAPES, dims=(2,)), layout)
    nested = estimate(Task(Weather, [SHAPES], dims=(2,)), layout)
    named = estimate(Task(ByName, list(SHAPES.values()), dims=(2,)), layout)
    values = estimate(Task(Weather, sample(), dims=(2,)), layout)
    assert one.memory == nested.memory == named.memory == values.memory and not one.refused
    whole = sum(torch.Size(s).numel() for s in SHAPES.values()) - 1
    assert one.memory["inputs"] == 4 * (whole // 2 + 1)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("make", [Record, Row])
def test_a_plan_follows_what_a_check_follows(make, values):
    fields = sample() if values else SHAPES
    layout = Layout(1, (2,), (2,))
    want = estimate(Task(Weather, SHAPES, dims=(2,)), layout)
    batch = make(**fields)
    assert st.check(OfRecord(), make(**sample())).ok
    for given in (batch, [batch]):
        found = estimate(Task(OfRecord, given, dims=(2,)), layout)
        assert found.memory == want.memory and not found.refused
    rest = MappingProxyType({k: fields[k] for k in ("land", "hour")})
    found = estimate(Task(InTwo, [fields["surface"], fields["upper"], rest], dims=(2,)), layout)
    assert found.memory == want.memory and not found.refused


def test_a_check_of_a_mapping_that_cannot_be_written_to():
    assert st.check(Weather(), MappingProxyType(sample())).ok


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, mask):
        return self.mix(x) * mask


@pytest.mark.parametrize("samples", [4, 8])
@pytest.mark.parametrize("data", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_of_a_mask_are_no_samples(samples, data, ranks):
    """However many samples there are."""
    task = Task(Masked, [(samples, 3, 4, 8), (4, 8)], dims=(2,))
    found = estimate(task, Layout(data, (2,), (ranks,)))
    assert not found.refused
    assert found.memory["inputs"] == 4 * (samples * 3 * 4 * 8 // data + 4 * 8) // ranks


def test_inputs_alike_are_several():
    pair = ((1, 2, 8, 8), (1, 2, 8, 8))
    task = Task(nn.Identity, [pair, pair], dtypes=[torch.float32] * 4, train=False)
    assert len(task.shapes) == 4


def test_other_sizes_are_of_all_fields():
    task = Task(Weather, SHAPES, dims=(2,))
    best = estimate(task, Layout(1, (2,), (2,)))
    found = sweep(task, best, st.plan(Weather, SHAPES, 2).device, st.plan(Weather, SHAPES, 2).network,
                  (1, 2), (2,))  # fmt: skip
    once, twice = (found.computed[2, (rows,)] for rows in (24, 48))
    assert not twice.refused and twice.memory["inputs"] == 2 * once.memory["inputs"] - 4


def test_plans_print_as_a_table():
    plans = st.plan(Weather, SHAPES, 2, precisions=[None])
    lines = str(plans).splitlines()
    assert re.match(r"2 x h100 of 74.5 GiB: \w+ of a rank at its peak", lines[0])
    assert lines[1].split()[:3] == ["configuration", "fits", "peak"]
    assert {line.split("  ")[0] for line in lines[2:4]} == {"dim2 2", "dim3 2"}
    assert "not tried, data 2" in lines[4] and repr(plans) == str(plans) and len(lines) == 5
    assert "Sent(" not in repr(plans[0])
    refused = st.plan(ByName, SHAPES | {"more": (1,)}, 2, precisions=[None])
    assert "refused, dim2 2: TypeError" in str(refused) and "configuration" not in str(refused)


def test_points_are_cut_along_dim_0():
    plans = st.plan(lambda: nn.Linear(3, 8), [(64, 3)], 2, precisions=[None])
    assert [p.layout.dims for p in plans] == [(0,)]


@pytest.mark.parametrize("shapes", [[], {}])
def test_shapes_are_those_of_inputs(shapes):
    with pytest.raises(ValueError, match=r"that of each input, as \[\(1, 3, 64, 64\)\] or by name"):
        st.plan(nn.Identity, shapes, 2)


def test_commands_take_names(tmp_path, command, monkeypatch):
    monkeypatch.setenv("SHARDTENSOR_HOME", str(tmp_path))
    named = []
    for name, shape in SHAPES.items():
        named += ["--input", f"{name}={'x'.join(map(str, shape))}"]
    model = f"{__file__}:Weather"
    status, out, _ = command("check", model, *named)
    assert status == 0 and "RIGHT on 4 layouts" in out
    status, out, _ = command("plan", model, *named, "--devices", "2", "--shard", "2")
    assert status == 0 and "dim2 2" in out and "refused" not in out
    status, _, err = command("plan", model, *named[:-1], "1", "--devices", "2")
    assert status == 2 and "give all inputs names, or none" in err
    status, out, _ = command("plan", model, "--input", "1x2x8x8", "--devices", "2")
    assert status == 0 and "All are refused" in out and "None fits" not in out
