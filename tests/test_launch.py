"""Launchers' environments, and processes that they start."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shardtensor.launch import Place, _sizes, first_host, place

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "7",
}
SLURM = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "41234", "SLURM_STEP_NODELIST": "gpu[03-05,9],login1",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip


def test_places():
    assert place({}) == Place("none", 0, 1, 0, "localhost", 0)
    assert place(TORCHRUN) == Place("torchrun", 3, 4, 1, "a", 7)
    assert place(SLURM) == Place("Slurm", 5, 8, 1, "gpu03", 21234)
    assert place(SLURM | {"MASTER_ADDR": "b", "MASTER_PORT": "9"})[-2:] == ("b", 9)
    # torchrun under Slurm: the inner launcher counts
    assert place(SLURM | TORCHRUN).launcher == "torchrun"
    # a shell of a Slurm allocation is no task
    assert place({k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}).launcher == "none"
    assert place(OPEN_MPI) == Place("Open MPI", 1, 2, 1, "localhost", 29500)
    assert place({"PMI_RANK": "0", "PMI_SIZE": "1"}) == Place("MPI", 0, 1, 0, "localhost", 0)
    with pytest.raises(RuntimeError, match="MASTER_ADDR"):
        place({"PMI_RANK": "0", "PMI_SIZE": "4"})
    with pytest.raises(RuntimeError, match="MASTER_ADDR"):
        place({k: v for k, v in TORCHRUN.items() if not k.startswith("MASTER")})


@pytest.mark.parametrize(
    "nodes, first",
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[03-05,9]", "gpu03"), ("a[7]-ib,b", "a7-ib")],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_sizes():
    assert _sizes({"data": 2, "domain": -1}, 8) == (2, 4)
    assert _sizes({"h": 2, "w": 3}, 6) == (2, 3)
    for axes in ({"a": 3}, {"a": 3, "b": -1}, {"a": -1, "b": -1}, {"a": 0}, {"a": 2, "b": 2}):
        with pytest.raises(ValueError, match="mesh axes"):
            _sizes(axes, 8)


SCRIPT = """
import os, torch, shardtensor as st
from torch.distributed.tensor import Shard
mesh, device = st.init(data=1, domain=-1)
x = st.distribute_tensor(torch.arange(6.0, device=device), mesh["domain"], [Shard(0)])
found = f"found {x.sum().item()} {tuple(mesh.shape)} {x.to_local().numel()} {mesh.mesh_dim_names}"
os.write(1, f"{found}\\n".encode())  # ranks share the stream
torch.distributed.destroy_process_group()
"""


def ran(processes):
    return [p.communicate(timeout=120)[0] for p in processes]


def start(command, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "PMI"))}
    return subprocess.Popen(
        command, env={**clean, "OMP_NUM_THREADS": "1", **env}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.gloo
@pytest.mark.parametrize("launcher", ["none", "torchrun", "slurm"])
def test_started(launcher, tmp_path: Path):
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    if launcher == "none":
        texts = ran([start([sys.executable, str(script)])])
        assert "found 15.0 (1, 1) 6" in texts[0]
        return
    if launcher == "torchrun":
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", str(script)]  # fmt: skip
        texts = ran([start(run)])
    else:
        port = str(free_port())
        texts = ran([
            start([sys.executable, str(script)], SLURM_PROCID=str(r), SLURM_NTASKS="2",
                  SLURM_LOCALID=str(r), SLURM_STEP_ID="0", MASTER_PORT=port,
                  SLURM_STEP_NODELIST="localhost")
            for r in range(2)
        ])  # fmt: skip
    text = "".join(texts)
    assert text.count("found 15.0 (1, 2) 3 ('data', 'domain')") == 2, text
