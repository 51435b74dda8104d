"""Checkpoints of other versions: 0.1's load, later ones of the same major format do, others say so."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import checkpoint
from shardtensor.checkpoint import storage
from shardtensor.ranks.testing import make_mesh

# written by version 0.1.0 on three ranks: a in rows (4, 0, 5), b in columns (3, 3, 1)
OLD = Path(__file__).parent / "fixtures/checkpoint_0.1"
X = torch.arange(63, dtype=torch.float32).reshape(9, 7)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_checkpoint_of_version_0_1(ranks):
    def run():
        mesh = make_mesh((ranks,))
        a, b = (
            st.distribute_tensor(torch.zeros(9, 7), mesh, [Shard(d)], src_data_rank=None)
            for d in (1, 0)
        )
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
        state = {"a": a, "b": b, "model": model.state_dict(), "optimizer": optimizer}
        found = checkpoint.load(state | {"step": 0, "name": ""}, OLD)
        assert found["step"] == 3 and found["name"] == "of 0.1"
        return a.full_tensor(), b.full_tensor(), model, optimizer

    # what it was made of
    torch.manual_seed(0)
    want = torch.nn.Linear(3, 2)
    steps = torch.optim.AdamW(want.parameters(), lr=0.5)
    want(torch.ones(1, 3)).sum().backward()
    steps.step()
    for a, b, model, optimizer in st.simulate(ranks, run):
        assert a.equal(X) and b.equal(2 * X)
        for p, q in zip(model.parameters(), want.parameters(), strict=True):
            assert torch.equal(p, q)
            assert torch.equal(optimizer.state[p]["exp_avg"], steps.state[q]["exp_avg"])


def test_0_1_is_found_as_the_latest(tmp_path):
    shutil.copytree(OLD, tmp_path / "step3")
    assert checkpoint.latest(tmp_path) == tmp_path / "step3"


def rewritten(path, format):
    """The file that says the format, as another version would have it."""
    file = path / storage.CHECKSUMS
    found = json.loads(file.read_text())
    found = found | {"format": format, "more": "that is not known"}
    file.write_text(json.dumps(storage._told(found)))


def test_formats_of_later_versions(tmp_path):
    major, minor = storage.FORMAT
    checkpoint.save({"x": X}, tmp_path, "a")
    rewritten(tmp_path / "a", [major, minor + 7])
    state = {"x": torch.zeros_like(X)}
    checkpoint.load(state, tmp_path / "a")
    assert state["x"].equal(X)
    rewritten(tmp_path / "a", [major + 1, 0])
    with pytest.raises(RuntimeError, match=rf"it is of format {major + 1}\.0, and this version"):
        checkpoint.load(state, tmp_path / "a")
    with pytest.warns(UserWarning, match="a newer one does"):
        assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize("format", ["1", [1], [1, None], [1.5, 0], {}])
def test_formats_that_are_none(tmp_path, format):
    checkpoint.save({"x": X}, tmp_path, "a")
    rewritten(tmp_path / "a", format)
    with pytest.raises(RuntimeError, match=r"checksums\.json is damaged"):
        checkpoint.load({"x": torch.zeros_like(X)}, tmp_path / "a")
