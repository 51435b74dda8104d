"""A rank that waits long says for what; ranks that wait for each other for ever end. No flag is set."""

import signal

import forked
import pytest

from shardtensor.observe.hangs import apart, doomed, late, told

SCRIPT = """
import os, signal, sys, time, torch, shardtensor as st
from torch.distributed.tensor import Shard
mesh, device = st.init()
x = st.distribute_tensor(torch.arange(6.0), mesh, [Shard(0)], src_data_rank=None)
me, case = mesh.get_rank(), sys.argv[1]
x.sum().item()
if case == "save" and me == 0:
    st.checkpoint.save({"x": x}, sys.argv[2], "step")  # save
if case == "caught":
    w = torch.ones(6, requires_grad=True)
    y = x * w
    if me == 1:
        y.register_hook(lambda g: 1 / 0)
    try:
        y.sum().backward()  # backward
    except ZeroDivisionError:
        x.roll(1, 0)  # caught
if case == "stop":
    if me == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
if case == "slow" and me == 1:
    while not os.path.exists(sys.argv[2]):
        time.sleep(0.1)  # slow
x.mean().item()  # mean
os.write(1, b"finished\\n")
"""

# on the same lines, in a process group of the program's own
OWN = SCRIPT.replace(
    "mesh, device = st.init()",
    "torch.distributed.init_process_group('gloo'); "
    "mesh = torch.distributed.init_device_mesh('cpu', (2,))",
)


def state(line, collective="", group=None, counts=(), left=False, op="", seconds=12.0):
    if left:
        return {"left": True}
    return {
        "line": line, "op": op, "collective": collective, "group": group, "counts": dict(counts),
        "seconds": seconds,
    }  # fmt: skip


WORLD, PAIR = "0,1,2/0", "1,2/7"


def test_who_is_waited_for():
    states = {
        0: state("a.py:1", "barrier", WORLD, {WORLD: 5}, op="save"),
        1: state("a.py:2", "all-reduce", WORLD, {WORLD: 5, PAIR: 2}, op="sum"),
        2: state("a.py:3", counts={WORLD: 4, PAIR: 2}),
    }
    assert late(0, states[0], states) == [1, 2]
    # rank 1 comes to another collective at the same time: neither can go on
    assert doomed(states) == [0, 1]
    assert told(0, states, 4) == (
        "rank 0 waits for 12 s in `save` (barrier) at a.py:1, to which ranks 1, 2 did not come: "
        "rank 1 waits in `sum` (all-reduce) at a.py:2; rank 2 runs a.py:3, after 4 of 5 collectives "
        "of this group; rank 3 does not answer (stopped, or in code that holds Python's lock). "
        "Every rank must call the same ops: look for a branch on the rank, or an error that one "
        "rank caught; SHARDTENSOR_DEBUG=1 names the first op that differs"
    )


def test_who_can_go_on_is_not_ended():
    # 0 waits for 1, which waits for 2, which computes
    chain = {
        0: state("a", "barrier", WORLD, {WORLD: 5}),
        1: state("b", "all-reduce", PAIR, {WORLD: 4, PAIR: 3}),
        2: state("c", counts={WORLD: 4, PAIR: 2}),
    }
    assert doomed(chain) == []
    # all are in the same one: a transfer that takes long
    assert doomed({r: state("a", "all-gather", WORLD, {WORLD: 5}) for r in range(3)}) == []
    assert doomed(chain | {2: state("c", "barrier", WORLD, {WORLD: 5, PAIR: 2})}) == [0, 1, 2]
    assert doomed(chain | {2: {"left": True}}) == [0, 1]
    # whose group is not seen may wait for anything
    assert doomed(chain | {2: state("c", "wait", None, {WORLD: 5, PAIR: 2})}) == []


def test_who_came_but_waits_elsewhere_is_told():
    # rank 0's own asynchronous collective met rank 1's of another size; 0 waits in C++
    states = {
        0: state("a.py:1", counts={WORLD: 5}),
        1: state("b.py:2", "all-reduce", WORLD, {WORLD: 5}, op="mean"),
        2: state("b.py:2", "all-reduce", WORLD, {WORLD: 5}, op="mean"),
    }
    assert not any(late(r, states[r], states) for r in states) and not doomed(states)
    assert [apart(states[r], states) for r in states] == [False, True, True]
    assert told(1, states, 3).startswith(
        "rank 1 waits for 12 s in `mean` (all-reduce) at b.py:2, to which all came, maybe with other "
        "sizes: rank 0 runs a.py:1, after 5 of 5 collectives of this group; rank 2 waits in "
    )
    # all in the same one: a transfer that takes long
    states[0] = states[1]
    assert not any(apart(states[r], states) for r in states)


def ran(script, ranks, args, until="", then=lambda programs: None):
    """The code and text of each process; then() is called once rank 0 has printed `until`."""
    # the strict transport counts its own collectives, and finds other sizes itself
    given = {"SHARDTENSOR_DEBUG": "0", "SHARDTENSOR_WAIT": "2", "SHARDTENSOR_INIT_TIMEOUT": "120",
             "SHARDTENSOR_TRANSPORT": "plain"}  # fmt: skip
    programs = forked.ranks(script, ranks, *args, **given)
    if until:
        programs[0].until(until)
        then(programs)
    return [p.ended() for p in programs]


def place(mark):
    (found,) = [i for i, t in enumerate(SCRIPT.splitlines(), 1) if t.endswith(f"# {mark}")]
    return f"job.py:{found}"


@pytest.mark.gloo
def test_ranks_that_wait_for_ever_end_with_both_lines(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    found = ran(script, 2, ["save", str(tmp_path / "checkpoints")])
    text = "".join(t for _, t in found)
    assert "finished" not in text and all(code == 1 for code, _ in found), text
    assert "ranks wait for each other for ever: rank" in text, text
    assert "`save` (" in text and place("save") in text, text
    assert "`mean` (all-reduce) at " in text and place("mean") in text, text


@pytest.mark.gloo
def test_collectives_of_other_sizes_end_with_a_line(tmp_path):
    """gloo ends the process that gets more bytes than it expects."""
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    found = ran(script, 2, ["caught"])
    text = "".join(t for _, t in found)
    assert "finished" not in text and all(code for code, _ in found), text
    assert "died without a word" in text and "SHARDTENSOR_DEBUG=1 names" in text, text
    number = place("caught").partition(":")[2]
    assert f'job.py", line {number} in <module>' in text or place("caught") in text, text


@pytest.mark.gloo
@pytest.mark.parametrize("program", [SCRIPT, OWN], ids=["init", "own"])
def test_a_slow_rank_is_told_and_waited_for(tmp_path, program):
    script = tmp_path / "job.py"
    script.write_text(program)
    go = tmp_path / "go"
    said = "to which rank 1 did not come: rank 1 runs "
    found = ran(script, 2, ["slow", str(go)], said, lambda _: go.touch())
    assert [code for code, _ in found] == [0, 0], found
    assert all("finished" in t and "for ever" not in t for _, t in found), found
    text = found[0][1]
    assert "rank 0 waits for " in text and "`mean` (all-reduce) at " in text, text
    assert place("mean") in text and place("slow") in text and "after 1 of 2 collectives" in text


@pytest.mark.gloo
def test_a_rank_that_does_not_answer_is_told(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    said = "rank 1 does not answer (stopped"
    found = ran(script, 2, ["stop"], said, lambda ps: ps[1].signal(signal.SIGCONT))
    assert [code for code, _ in found] == [0, 0], found
    assert all("finished" in t and "for ever" not in t for _, t in found), found
