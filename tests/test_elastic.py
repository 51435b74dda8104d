"""A host is lost, and a run goes on with those that are left, from its last checkpoint."""

import json
import re
import signal
from pathlib import Path

import pytest
from forked import Program, free_port, ranks, torchrun

RESUME = Path(__file__).parent.parent / "examples" / "resume.py"
# one host of `torchrun --nnodes 3:4 --nproc-per-node 1 --rdzv-backend c10d`
AGENT = """
import sys
from forked import _rank
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

config = LaunchConfig(
    3, 4, 1, run_id="elastic", max_restarts=3, start_method="fork", rdzv_backend="c10d",
    rdzv_endpoint=f"localhost:{sys.argv[1]}", monitor_interval=0.1,
    rdzv_configs={"last_call_timeout": 2, "keep_alive_interval": 1},
)
elastic_launch(config, _rank)(sys.argv[2:])
"""
# the kill of the example takes the host, too
JOB = f"""
import os, runpy
kill = os.kill
os.kill = lambda pid, number: (kill(os.getppid(), number), kill(pid, number))
runpy.run_path({str(RESUME)!r}, run_name="__main__")
"""


def held(whole, some):
    """Each step's loss, also of steps that ran twice, is that of one device but for rounding."""
    read = ((f / "losses.jsonl").read_text().splitlines() for f in (whole, some))
    want, entries = ([json.loads(line) for line in lines] for lines in read)
    assert {e["step"] for e in entries} == set(range(12)) and len(entries) > 12
    assert all(e["loss"] == pytest.approx(want[e["step"]]["loss"], rel=1e-11) for e in entries)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    code, text = torchrun(folder, 1, RESUME, "--double", "--folder", folder)
    assert code == 0, text
    return folder


@pytest.mark.gloo
def test_torchrun_goes_on_with_three_hosts_of_four(tmp_path, whole):
    """torchrun starts the ranks of the hosts that are left: 3 in place of 4."""
    agent, job, port = tmp_path / "agent.py", tmp_path / "job.py", free_port()
    agent.write_text(AGENT)
    job.write_text(JOB)
    given = [port, job, "--double", "--folder", tmp_path, "--kill-at", "7"]
    hosts = [Program(agent, *given)]
    # the first one keeps the store, and its rank is 0: rank 1 is killed
    hosts[0].until("no such words", seconds=1)
    hosts += [Program(agent, *given) for _ in range(3)]
    found = [h.ended() for h in hosts]
    assert found[0][0] == 0 and [code for code, _ in found].count(0) == 3, found
    assert any(re.search(r"resumed at step [36] from", text) for _, text in found)
    held(whole, tmp_path)


@pytest.mark.gloo
def test_shardtensor_run_with_fewer_ranks(tmp_path, whole):
    """`shardtensor run` ends with the rank that was killed; called again with one less it goes on."""
    main, some = tmp_path / "main.py", tmp_path / "some"
    main.write_text("from shardtensor.cli import main; main()")
    given = [RESUME, "--double", "--folder", some]
    code, text = Program(main, "run", "--domain", 2, *given, "--kill-at", 7).ended()
    assert code and "rank 1 of 2 failed" in text and "Traceback" not in text, text
    code, text = Program(main, "run", "--domain", 1, *given).ended()
    assert code == 0 and re.search(r"resumed at step [36] from", text), text
    held(whole, some)


@pytest.mark.gloo
def test_six_ranks_go_on_where_eight_were(tmp_path, whole):
    """Shards of 4 rows become those of 6 rows on five ranks and of 2 on the last."""
    given = [RESUME, "--double", "--folder", tmp_path]

    def run(count, *more):
        return [p.ended() for p in [*ranks(given[0], count, *given[1:], *more)]]

    found = run(8, "--kill-at", "7")
    # the one that was killed, and those that were told of it
    assert found[1][0] == -signal.SIGKILL and all(code for code, _ in found), found
    assert not (tmp_path / "step9").exists()
    found = run(6)
    assert [code for code, _ in found] == [0] * 6, found
    assert re.search(r"resumed at step [36] from", found[0][1])
    held(whole, tmp_path)
