"""The doctor: facts, suspects, measured links that are kept and that all ranks choose by."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from forked import torchrun

import shardtensor as st
from shardtensor.attention.cost import Way, Work
from shardtensor.observe import network
from shardtensor.observe.network import Link
from shardtensor.plan import doctor
from shardtensor.ranks.testing import make_mesh, run_workers

# the package has a function of this name
strategy = importlib.import_module("shardtensor.attention.strategy")
KINDS = {"exchange", "all_to_all", "all_gather", "all_reduce", "broadcast"}


def measured():
    return doctor.measure(make_mesh((dist.get_world_size(),)), (1 << 10, 1 << 16), repeats=3)


@pytest.mark.gloo
@pytest.mark.parametrize("n", [2, 3])
def test_measured_saved_and_read(n, tmp_path, monkeypatch):
    found = run_workers(n, measured)
    # the slowest rank's, so all have the same
    assert all(f == found[0] for f in found)
    one = found[0]
    assert set(one.links) == set(one.seconds) == KINDS and one.ranks == n and one.backend == "gloo"
    assert all(t > 0 for times in one.seconds.values() for t in times.values())
    assert all(v.latency > 0 and v.bandwidth > 1e5 for v in one.links.values())
    monkeypatch.setenv("SHARDTENSOR_HOME", str(tmp_path))
    assert network.saved("gloo", n) is None
    path = network.save(one)
    assert path.parent == tmp_path and network.saved("gloo", n) == one
    assert network.saved("gloo", n + 1) is None and network.saved("nccl", n) is None
    assert one.network().inner == one.links["exchange"]


def test_one_rank_has_no_links():
    def alone():
        doctor.measure(make_mesh((1,)))

    with pytest.raises(st.RankError, match="no links"):
        st.simulate(1, alone)


def test_facts_and_suspects(monkeypatch):
    known = doctor.facts()
    assert known["torch"] == torch.__version__ and known["backends"]["gloo"]
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert doctor.facts()["environment"]["NCCL_DEBUG"] == "INFO"
    cores = known["cores"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert not any("OMP_NUM_THREADS" in s for s in doctor.suspects(cores))
    monkeypatch.setenv("OMP_NUM_THREADS", str(2 * cores))
    assert any("OMP_NUM_THREADS" in s for s in doctor.suspects(1))
    assert any("share" in s for s in doctor.suspects(cores + 1))
    monkeypatch.setenv("MASTER_ADDR", "host")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert any("MASTER_PORT" in s for s in doctor.suspects(1))


def test_the_choice_follows_the_link(monkeypatch):
    monkeypatch.setattr(strategy, "_link", [])

    def taken(ranks, key_heads=8, tokens=16):
        work = Work((tokens,) * ranks, (tokens,) * ranks, 1, 8, key_heads, 8, 8, 4, False)
        ways = [Way("ring"), Way("all_to_all", ranks)]
        return strategy.cheapest(work, ways, strategy.rates("cpu", 4, ranks)).kind

    assert taken(4) == "all_to_all"
    # two ranks, the same bytes: the ring's are hidden
    assert taken(2) == "ring"
    strategy.assume_link(1.0, 1e9)
    # long latencies: two rounds for three
    assert taken(4) == "all_to_all" and taken(2) == "ring"
    # one key head for many of queries: the ring sends little
    strategy.assume_link(1e-9, 1.0)
    assert taken(4) == "all_to_all" and taken(4, key_heads=1) == "ring"


PROGRAM = """
import importlib, torch.distributed as dist, shardtensor as st
strategy = importlib.import_module("shardtensor.attention.strategy")
mesh, _ = st.init()
found = [None] * dist.get_world_size()
dist.all_gather_object(found, list(strategy._link))
if dist.get_rank() == 0:
    print(found)
"""


@pytest.mark.slow
def test_all_ranks_choose_by_what_the_first_knows(tmp_path, monkeypatch):
    """Only rank 0's folder has the file."""
    found = network.Measured(
        doctor.socket.gethostname(), "gloo", 2, {}, {"exchange": Link(0.25, 4e9)}
    )
    program = tmp_path / "program.py"
    program.write_text(
        f"import os\nos.environ['SHARDTENSOR_HOME'] = {str(tmp_path)!r} + os.environ['RANK']\n"
        + PROGRAM
    )
    monkeypatch.setenv("SHARDTENSOR_HOME", str(tmp_path) + "0")
    network.save(found)
    code, text = torchrun(tmp_path, 2, program)
    assert code == 0, text
    assert "[[0.25, 4000000000.0], [0.25, 4000000000.0]]" in text


@pytest.mark.slow
def test_command(tmp_path):
    env = os.environ | {"SHARDTENSOR_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "from shardtensor.cli import main; main()",
         "doctor", "--ranks", "2", "--quick", "--json", "--keep"],
        capture_output=True, text=True, env=env, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["measured"]["ranks"] == 2 and set(found["measured"]["links"]) == KINDS
    assert len(list(tmp_path.glob("links-*-gloo-2.json"))) == 1
