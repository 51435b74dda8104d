"""Plans that are kept: what was found is read back, and made anew where code has changed."""

import importlib
import json
import os

import pytest
from torch import nn

from shardtensor.plan import store
from shardtensor.plan.search import plan

cli = importlib.import_module("shardtensor.cli.plan")
MODEL = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self, width=4):
        super().__init__(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 1))
"""


def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ModuleList([nn.ReLU()])[0])


def test_what_is_kept_is_read(tmp_path):
    found = plan(net, [(2, 1, 16, 16)], 2, dims=(2,), thorough=True)
    path = tmp_path / "plans" / "one.json"
    store.save(path, found, devices=2)
    again, said = store.load(path)
    assert said == {"devices": 2} and again == list(found)
    for a, b in zip(found, again, strict=True):
        assert a.modules == b.modules and a.course == b.course and str(a.layout) == str(b.layout)
        assert a.seconds == b.seconds and a.collectives() == b.collectives()
    json.loads(path.read_text())


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"files": {"/nowhere": [1, 2]}, "plans": []}'])
def test_what_cannot_be_read_is_not_known(text, tmp_path):
    path = tmp_path / "one.json"
    assert store.load(path) is None
    path.write_text(text)
    assert store.load(path) is None


def test_the_command_asks_again_when_code_changes(tmp_path, monkeypatch, command):
    monkeypatch.setenv("SHARDTENSOR_HOME", str(tmp_path / "home"))
    model = tmp_path / "kept_model.py"
    model.write_text(MODEL)
    made = []
    search = cli._searched
    monkeypatch.setattr(cli, "_searched", lambda *a, **how: made.append(a) or search(*a, **how))

    def rows(*more):
        args = ["plan", f"{model}:Net", "--input", "1x1x32x32", "--shard", "2", "--devices", "2"]
        code, out, err = command(*args, *more, "--json")
        assert code == 0, err
        return json.loads(out)

    first = rows()
    assert rows() == first and len(made) == 1
    assert rows("--arg", "width=8") != first and len(made) == 2
    assert [e["peak"] for e in rows("--fresh")] == [e["peak"] for e in first] and len(made) == 3
    os.utime(model, ns=(1, 1))
    rows()
    assert len(made) == 4
