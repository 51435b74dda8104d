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
def test_killed_and_resumed_on_fewer_ranks_and_on_more(tmp_path):
    """Killed on 4 ranks, on with 3, killed again, on with 4: one device's losses but for rounding."""
    script, whole, some = EXAMPLES / "resume.py", tmp_path / "whole", tmp_path / "some"
    code, text = torchrun(tmp_path, 1, script, "--double", "--folder", whole)
    assert code == 0, text
    # a save waits for the one before: that of three steps earlier is there
    for ranks, kill in ((4, 7), (3, 10), (4, None)):
        (some / "killed").unlink(missing_ok=True)
        killing = [] if kill is None else ["--kill-at", kill]
        code, text = torchrun(tmp_path, ranks, script, "--double", "--folder", some, *killing)
        assert (code == 0) == (kill is None), text
        if ranks == 3 or kill is None:
            assert re.search(r"resumed at step [369] from", text), text
    want = losses(whole)
    entries = [json.loads(line) for line in (some / "losses.jsonl").read_text().splitlines()]
    assert {e["step"] for e in entries} == set(range(12)) and len(entries) > 12
    assert all(e["loss"] == pytest.approx(want[e["step"]], rel=1e-11) for e in entries)


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
