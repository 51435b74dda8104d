"""A rank that raises, dies or leaves ends the others, in time and with its message."""

import os
import signal

import pytest
from forked import Program, free_port, torchrun

SCRIPT = """
import os, signal, sys, time, torch, shardtensor as st
from torch.distributed.tensor import Shard
mesh, device = st.init()
x = st.distribute_tensor(torch.arange(6.0, device=device), mesh, [Shard(0)], src_data_rank=None)
me, (case, who, others) = mesh.get_rank(), sys.argv[1:]
x.sum().item()
os.write(1, b"started\\n")
if me == int(who):
    if case == "raise":
        raise KeyError("no such variable")
    if case == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "leave":
        sys.exit(0)
if others == "busy":
    time.sleep(140)
    os.write(1, b"slept\\n")
x.mean().item()
os.write(1, b"finished\\n")
"""
SAID = {
    "raise": "rank {} raised KeyError: 'no such variable'",
    "kill": "rank {} died without a word",
    "leave": "ranks [{}] have ended their programs",
}


def launched(script, ranks, agent, args):
    """(exit code, output) of each process, or of the agent and all of its ranks."""
    if agent:
        return [torchrun(script.parent, ranks, script, *args, SHARDTENSOR_DEBUG="0")]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "PMI"))}
    clean |= {"OMP_NUM_THREADS": "1", "SHARDTENSOR_DEBUG": "0"}
    clean |= {"SLURM_NTASKS": str(ranks), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost"}
    clean |= {"MASTER_PORT": str(free_port())}
    programs = [
        Program(script, *args, env=clean | {"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)})
        for r in range(ranks)
    ]
    return [p.ended(250) for p in programs]


@pytest.mark.gloo
@pytest.mark.parametrize(
    "case, who, others, ranks, agent",
    [
        ("raise", 1, "waiting", 2, True),
        ("raise", 0, "busy", 3, True),
        ("kill", 1, "waiting", 3, True),
        # without an agent that ends the others
        ("raise", 1, "busy", 3, False),
        ("kill", 1, "busy", 3, False),
        ("kill", 1, "waiting", 2, False),
        # rank 0 keeps the store
        ("kill", 0, "busy", 3, False),
        ("leave", 1, "waiting", 2, False),
        ("leave", 0, "waiting", 2, False),
    ],
)
def test_others_end_with_its_message(case, who, others, ranks, agent, tmp_path):
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    found = launched(script, ranks, agent, [case, str(who), others])
    message = SAID[case].format(who)
    for rank, (code, text) in enumerate(found):
        # a rank that is busy is not left to its work
        assert "started" in text and "slept" not in text and "finished" not in text, text
        if agent:
            # the agent may end ranks before they have read it, but not all of them
            assert code != 0 and message in text, text
        elif rank != who:
            # who sees the store end before the process that kept it says so
            kept = who == 0 and "died" in text
            assert code == 1 and (message in text or kept), text
        elif case != "leave":
            assert code == (-signal.SIGKILL if case == "kill" else 1)


@pytest.mark.gloo
def test_ranks_that_end_in_order_are_left_alone(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        SCRIPT.replace(
            'if others == "busy":',
            "if me == 1: time.sleep(8); print('ready'); sys.exit(0)\nif False:",
        )
    )
    ready = False
    # rank 0, which keeps the store, is gone before rank 1 has finished its own work
    for code, text in launched(script, 2, False, ["leave", "0", "waiting"]):
        assert code == 0 and "shardtensor:" not in text, text
        ready |= "ready" in text
    assert ready
