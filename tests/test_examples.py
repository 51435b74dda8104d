"""The examples run as their first lines say, under torchrun, and give one device's numbers."""

import json
import re
from pathlib import Path

import pytest
from forked import torchrun

EXAMPLES = Path(__file__).parent.parent / "examples"


def losses(folder):
    """The loss of every step; a step that was computed twice gave the same."""
    found = {}
    for line in (folder / "losses.jsonl").read_text().splitlines():
        entry = json.loads(line)
        assert found.setdefault(entry["step"], entry["loss"]) == entry["loss"]
    return [found[i] for i in sorted(found)]


@pytest.mark.gloo
def test_killed_and_resumed(tmp_path):
    """SIGKILL to rank 1 in step 7: the losses are those of a run that nobody killed, bit by bit."""
    code, text = torchrun(tmp_path, 2, EXAMPLES / "resume.py", "--folder", tmp_path / "whole")
    assert code == 0, text
    killed = ["--folder", tmp_path / "killed", "--kill-at", "7"]
    code, out = torchrun(tmp_path, 2, EXAMPLES / "resume.py", *killed, restarts=2)
    assert code == 0, out
    assert re.search(r"resumed at step [36] from", out)
    assert (tmp_path / "killed" / "killed").exists()
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 12


@pytest.mark.gloo
@pytest.mark.parametrize("package", ["fabric", "accelerate"])
def test_with_a_trainer(package, tmp_path):
    name = "lightning" if package == "fabric" else package
    pytest.importorskip(name)
    code, out = torchrun(tmp_path, 2, EXAMPLES / f"with_{package}.py", loads=f"import {name}")
    assert code == 0, out[-3000:]
    apart = float(re.search(r"difference from one device: (\S+)", out)[1])
    first, last = map(float, re.search(r"losses (\S+) to (\S+)", out).groups())
    assert apart < 1e-5 and last < 0.9 * first
