"""`shardtensor run`: the mesh of the script, one log, the first error only."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from forked import Program

import shardtensor as st
from shardtensor import cli
from shardtensor.cli.run import _count, _is_of_an_end, run
from shardtensor.train.launch import _asked

MAIN = "from shardtensor.cli import main; main()"
SCRIPT = """
import logging, sys, warnings
import torch.distributed as dist
import shardtensor as st

mesh, device = st.init()
print("mesh", mesh.mesh_dim_names, tuple(mesh.shape), sys.argv[1:], flush=True)
warnings.warn(f"of rank {dist.get_rank()}")
# what fails ends the others, which are to have warned
dist.barrier()
if sys.argv[1] == "go":
    logging.getLogger().error("got over it", exc_info=KeyError("of a step"))
if sys.argv[1] == "fail" and dist.get_rank() == 1:
    raise KeyError("of rank one")
"""


def started(tmp_path, *args):
    (tmp_path / "main.py").write_text(MAIN)
    (tmp_path / "job.py").write_text(SCRIPT)
    return Program(tmp_path / "main.py", "run", *args).ended()


@pytest.mark.gloo
def test_ranks_of_a_script(tmp_path):
    log = tmp_path / "log"
    code, text = started(
        tmp_path, "--data", 1, "--domain", 2, "--log", log, tmp_path / "job.py", "go", "--lr", "3"
    )
    assert code == 0, text
    line = "mesh ('data', 'domain') (1, 2) ['go', '--lr', '3']\n"
    assert text.count(line) == 1
    # of the first rank its warnings, too
    assert text.count("UserWarning: of rank 0") == 1 and "of rank 1" not in text
    assert text.count("KeyError: 'of a step'") == 1
    assert f"[0] {line}" in log.read_text() and f"[1] {line}" in log.read_text()


@pytest.mark.gloo
def test_the_first_error_alone(tmp_path):
    code, text = started(tmp_path, "--data", 2, "--domain", 1, tmp_path / "job.py", "fail")
    assert code == 1
    assert text.count("rank 1 of 2 failed") == text.count("KeyError: 'of rank one'") == 1
    assert "rank 0 of 2" not in text and text.count("UserWarning: of rank 0") == 1


ASLEEP = """
import os, sys, time
print("rank", os.environ["RANK"], os.getpid())
time.sleep(60)
"""


def test_no_rank_outlives_it(tmp_path):
    """A scheduler ends what it has started, and nothing else."""
    (tmp_path / "main.py").write_text(MAIN)
    (tmp_path / "job.py").write_text(ASLEEP)
    program = Program(tmp_path / "main.py", "run", "--domain", 2, "--all", tmp_path / "job.py")
    program.until("rank 0")
    program.until("rank 1")
    program.process.terminate()
    code, text = program.ended(20)
    assert code == 128 + signal.SIGTERM
    for number in re.findall(r"rank \d (\d+)", text):
        with pytest.raises(ProcessLookupError):
            os.kill(int(number), 0)
    assert text.count("rank") == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_the_start_of_a_rank_and_the_next(tmp_path, monkeypatch, number):
    (tmp_path / "job.py").write_text(ASLEEP)
    begin, processes = subprocess.Popen, []

    def interrupted(*args, **kwargs):
        processes.append(begin(*args, **kwargs))
        os.kill(os.getpid(), number)
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    # where tests run in a shell's background, Ctrl-C is ignored, and run leaves it so
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as end:
            run(str(tmp_path / "job.py"), domain=2)
        (process,) = processes
        assert end.value.code == 128 + number and process.poll() == -signal.SIGTERM
    finally:
        after = signal.signal(number, before)
        for process in processes:
            process.kill()
    assert after is signal.default_int_handler


@pytest.mark.parametrize("option", ["--nproc-per-node", "-m"])
def test_options_of_other_launchers(tmp_path, option):
    code, text = started(tmp_path, option, 2, tmp_path / "job.py")
    assert code != 0 and f"{option} is no option of run: it takes --data" in text


@pytest.mark.parametrize("before", ["", "[rank0]: "])
def test_lines_that_begin_an_error(before):
    """Torch's hook for exceptions begins each line with the rank, once there is a group."""
    assert _is_of_an_end(f"{before}Traceback (most recent call last):\n")
    assert not _is_of_an_end(f"{before}epoch 3: Traceback is a word\n")


def test_sizes_that_do_not_fit(monkeypatch):
    assert _count(2, 4, 0) == 8 and _count(2, -1, 6) == 6
    for sizes in ((2, 4, 6), (3, -1, 4), (0, 1, 0), (1, 0, 0)):
        with pytest.raises(ValueError, match="--data"):
            _count(*sizes)
    monkeypatch.setenv("SHARDTENSOR_MESH", "data=2, domain=4")
    assert _asked() == {"data": 2, "domain": 4}
    monkeypatch.setenv("SHARDTENSOR_MESH", "2x4")
    with pytest.raises(ValueError, match="data=2,domain=4"):
        st.init()


def test_scripts_of_the_docs_parse():
    folder = Path(__file__).parent.parent / "docs" / "launch"
    page = (folder.parent / "launch.md").read_text()
    for name in ("slurm.sh", "pytorchjob.yaml"):
        assert (folder / name).read_text() in page
    job = yaml.safe_load((folder / "pytorchjob.yaml").read_text())
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 3
    (node,) = yaml.safe_load((folder / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
    pods = node["template"]["spec"]
    (container,) = pods["template"]["spec"]["containers"]
    env = {e["name"]: e["value"] for e in container["env"]}
    mesh = dict(part.split("=") for part in env["SHARDTENSOR_MESH"].split(","))
    assert int(mesh["data"]) * int(mesh["domain"]) == 8 * pods["completions"]
    subprocess.run(["bash", "-n", folder / "slurm.sh"], check=True)


def test_a_command_that_is_interrupted_while_it_is_imported(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
