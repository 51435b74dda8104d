"""Launchers' environments, and processes that they start."""

import itertools
import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch.distributed as dist
from forked import Program, free_port

import shardtensor as st
from shardtensor.comm.launcher import flag, seconds
from shardtensor.train import rendezvous
from shardtensor.train.launch import Place, first_host, place, sizes_of

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
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


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
    "env, change, told",
    [
        (TORCHRUN, {"WORLD_SIZE": "two"}, "WORLD_SIZE='two': a whole number from 1"),
        (TORCHRUN, {"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        (TORCHRUN, {"WORLD_SIZE": "4.0"}, "WORLD_SIZE='4.0'"),
        (TORCHRUN, {"WORLD_SIZE": ""}, "WORLD_SIZE=''"),
        (TORCHRUN, {"RANK": "4"}, "RANK='4': a whole number from 0 to 3"),
        (TORCHRUN, {"RANK": "-1"}, "RANK='-1'"),
        (TORCHRUN, {"LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        (TORCHRUN, {"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
        (
            TORCHRUN,
            {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"},
            "LOCAL_RANK=2 of LOCAL_WORLD_SIZE=2",
        ),
        (TORCHRUN, {"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE='8'"),
        (TORCHRUN, {"MASTER_PORT": "0"}, "MASTER_PORT='0'"),
        (TORCHRUN, {"MASTER_PORT": "70000"}, "MASTER_PORT='70000'"),
        (TORCHRUN, {"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        (SLURM, {"SLURM_PROCID": "8"}, "SLURM_PROCID='8': a whole number from 0 to 7"),
        (SLURM, {"SLURM_NTASKS": "8(x2)"}, r"SLURM_NTASKS='8\(x2\)'"),
        (SLURM, {"SLURM_LOCALID": ""}, "SLURM_LOCALID=''"),
        (SLURM, {"SLURM_JOB_ID": "a"}, "SLURM_JOB_ID='a'"),
        (SLURM, {"SLURM_STEP_NODELIST": "gpu[03-"}, "SLURM_STEP_NODELIST='gpu.03-' is no list"),
        (SLURM, {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST='' is no list"),
        (OPEN_MPI, {"OMPI_COMM_WORLD_SIZE": "-2"}, "OMPI_COMM_WORLD_SIZE='-2'"),
        ({"PMI_RANK": "1"}, {"PMI_SIZE": "1"}, "PMI_RANK='1'"),
        # half of a launcher: each process would run alone
        ({}, {"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK is not set"),
        ({}, {"RANK": "0"}, "RANK=0, but WORLD_SIZE is not set"),
        ({}, {"PMI_RANK": "0"}, "PMI_RANK=0, but PMI_SIZE is not set"),
        ({}, {"OMPI_COMM_WORLD_RANK": "1"}, "but OMPI_COMM_WORLD_SIZE is not set"),
        ({}, {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}, "but SLURM_NTASKS is not set"),
        (TORCHRUN, {"WORLD_SIZE": "9" * 20}, "WORLD_SIZE='9*': a whole number from 1 to 1048576"),
    ],
)
def test_odd_variables_are_named(env, change, told):
    with pytest.raises(ValueError, match=told):
        place(env | change)


@pytest.mark.parametrize("text", ["ten", "-1", "0", "nan"])
def test_odd_seconds_are_named(monkeypatch, text):
    monkeypatch.setenv("SHARDTENSOR_WAIT", text)
    with pytest.raises(ValueError, match=f"SHARDTENSOR_WAIT='{text}': a number of seconds"):
        seconds("SHARDTENSOR_WAIT", 10.0)
    monkeypatch.setenv("SHARDTENSOR_WAIT", "")
    assert seconds("SHARDTENSOR_WAIT", 10.0) == 10.0


@pytest.mark.parametrize(
    "text, on", [("1", 1), ("True", 1), ("on", 1), ("", 0), ("0", 0), ("false", 0), ("No", 0)]
)
def test_flags(monkeypatch, text, on):
    monkeypatch.setenv("SHARDTENSOR_DEBUG", text)
    assert flag("SHARDTENSOR_DEBUG") == bool(on)
    monkeypatch.setenv("SHARDTENSOR_DEBUG", "2x")
    with pytest.raises(ValueError, match="SHARDTENSOR_DEBUG='2x': 1 or 0 is expected"):
        flag("SHARDTENSOR_DEBUG")


def meet(ranks, said, monkeypatch, port=None, seconds="60"):
    """What each of these ranks, threads here, gets from `met`; said: how many each says they are."""
    monkeypatch.setenv("SHARDTENSOR_INIT_TIMEOUT", seconds)
    monkeypatch.setattr(rendezvous, "_starts", itertools.repeat(0))
    port = port or free_port()
    found = {}

    def run(i, rank, n):
        try:
            found[i] = rendezvous.met(Place("torchrun", rank, n, 0, "localhost", port))
        except (RuntimeError, ValueError) as e:
            found[i] = f"{type(e).__name__}: {e}"

    threads = [
        threading.Thread(target=run, args=(i, r, n))
        for i, (r, n) in enumerate(zip(ranks, said, strict=True))
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return [found[i] for i in range(len(ranks))]


def test_ranks_that_do_not_come_are_named(monkeypatch):
    for text in meet([0, 2], [4, 4], monkeypatch, seconds="5"):
        assert "waits in st.init for ranks 1, 3" in text and "SHARDTENSOR_INIT_TIMEOUT" in text
    (text,) = meet([1], [2], monkeypatch, seconds="2")
    assert "rank 1 of 2 (torchrun) waits in st.init for rank 0 at localhost:" in text
    assert not any(isinstance(s, str) for s in meet([0, 1], [2, 2], monkeypatch))


@contextmanager
def kept():
    """A port whose store outlives rank 0: also a rank that comes late reads what is wrong."""
    port = free_port()
    store = dist.TCPStore(
        "localhost", port, is_master=True, wait_for_workers=False, multi_tenant=True
    )
    yield port
    del store


def test_ranks_that_are_told_other_things(monkeypatch):
    with kept() as port:
        for text in meet([0, 1, 1], [3, 3, 3], monkeypatch, port):
            assert text.startswith("ValueError: two processes say that they are rank 1 of 3")
    with kept() as port:
        for text in meet([0, 1, 2], [3, 2, 3], monkeypatch, port):
            assert "one of 3" in text and "one of 2" in text and "the same number" in text
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        (text,) = meet([0], [2], monkeypatch, taken.getsockname()[1])
    assert "rank 0 cannot open localhost:" in text and "MASTER_PORT" in text
    here = Place("torchrun", 1, 2, 0, "no.such.host.invalid", free_port())
    with pytest.raises(RuntimeError, match=r"MASTER_ADDR='no\.such\.host\.invalid': no such host"):
        rendezvous.met(here)


@pytest.mark.parametrize("closes", [True, False])
def test_another_program_at_the_port_is_named(monkeypatch, closes):
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        other.settimeout(0.1)
        ended, connections = threading.Event(), []

        def serve():
            while not ended.is_set():
                with suppress(TimeoutError):
                    connections.append(other.accept()[0])
                    if closes:
                        connections.pop().close()

        thread = threading.Thread(target=serve)
        thread.start()
        (text,) = meet([1], [2], monkeypatch, other.getsockname()[1], seconds="2")
        ended.set()
        thread.join()
    for c in connections:
        c.close()
    assert "finds no store of rank 0 at localhost:" in text and "MASTER_PORT" in text, text


class Lost:
    """A store whose process ends at the n-th call."""

    def __init__(self, n):
        self.left = n

    def __getattr__(self, name):
        def call(*args):
            self.left -= 1
            if self.left < 0:
                raise dist.DistNetworkError("Failed to recv, got 0 bytes.\nframe #0")
            return {"add": 1, "compare_set": b"2 0", "check": False}.get(name)

        return call


@pytest.mark.parametrize("calls", [0, 2, 6])
def test_a_store_that_goes_is_named(monkeypatch, calls):
    monkeypatch.setattr(rendezvous, "_opened", lambda here, end: None)
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, store: Lost(calls))
    with pytest.raises(RuntimeError) as e:
        rendezvous.met(Place("torchrun", 1, 2, 0, "localhost", 7))
    assert re.fullmatch(
        r"rank 1 of 2 \(torchrun\) lost localhost:7 \(MASTER_ADDR, MASTER_PORT\) in st.init: the "
        r"process that keeps the store there \(rank 0 or the launcher\) ended, and its output says "
        r"why \(Failed to recv, got 0 bytes.\)",
        str(e.value),
    )


def test_odd_axes_are_named_before_ranks_meet(monkeypatch):
    for axes, told in [
        ({"data": "2"}, "data"), ({"data": 2.0}, "data"), ({"data": True}, "data"), ({"domain": 3}, "3"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"mesh axes.*{told}"):
            st.init(**axes)


@pytest.mark.parametrize(
    "nodes, first",
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[03-05,9]", "gpu03"), ("a[7]-ib,b", "a7-ib")],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_sizes():
    assert sizes_of({"data": 2, "domain": -1}, 8) == (2, 4)
    assert sizes_of({"h": 2, "w": 3}, 6) == (2, 3)
    for axes in ({"a": 3}, {"a": 3, "b": -1}, {"a": -1, "b": -1}, {"a": 0}, {"a": 2, "b": 2}):
        with pytest.raises(ValueError, match="mesh axes"):
            sizes_of(axes, 8)


SCRIPT = """
import os, torch, shardtensor as st
from torch.distributed.tensor import Shard
mesh, device = st.init(data=1, domain=-1)
x = st.distribute_tensor(torch.arange(6.0, device=device), mesh["domain"], [Shard(0)])
found = f"found {x.sum().item()} {tuple(mesh.shape)} {x.to_local().numel()} {mesh.mesh_dim_names}"
os.write(1, f"{found}\\n".encode())  # ranks share the stream
torch.distributed.destroy_process_group()
"""


def clean():
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "PMI"))}
    return kept | {"OMP_NUM_THREADS": "1"}


@pytest.mark.gloo
@pytest.mark.parametrize("launcher", ["none", "torchrun", "slurm"])
def test_started(launcher, tmp_path: Path):
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    if launcher == "none":
        code, text = Program(script, env=clean()).ended()
        assert code == 0 and "found 15.0 (1, 1) 6" in text
        return
    if launcher == "torchrun":
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", str(script)]  # fmt: skip
        done = subprocess.run(run, env=clean(), capture_output=True, text=True, timeout=120)
        text = done.stdout + done.stderr
    else:
        given = clean() | {
            "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost",
            "MASTER_PORT": str(free_port()),
        }  # fmt: skip
        programs = [
            Program(script, env=given | {"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)})
            for r in range(2)
        ]
        text = "".join(p.ended()[1] for p in programs)
    assert text.count("found 15.0 (1, 2) 3 ('data', 'domain')") == 2, text
