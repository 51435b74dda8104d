"""A whole program under the guard, and the docs' example of it."""

import re
from pathlib import Path

import pytest
from forked import torchrun


def test_the_example_of_the_docs(tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "debugging.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    exec(compile(block, "train.py", "exec"), names)
    want = (
        "ranks part: rank 0 in `sum` (all-reduce of float32 [1]) at train.py:13; rank 1 in `mean`"
    )
    assert want in names["message"] and want in " ".join(text.split())


SCRIPT = """
import os, sys, time, torch, shardtensor as st
from torch.distributed.tensor import Replicate, Shard
mesh, device = st.init()
x = st.distribute_tensor(torch.arange(6.0, device=device), mesh, [Shard(0)], src_data_rank=None)
me, case = mesh.get_rank(), sys.argv[1]
if case == "print" and me == 0:
    print(x.sum().item())
elif case == "raise" and me == 1:
    raise KeyError("no such variable")
elif case == "late" and me == 0:
    time.sleep(5)
x.mean().item()
os.write(1, b"finished\\n")
"""


@pytest.mark.gloo
@pytest.mark.parametrize(
    "case, expected",
    [
        ("print", "rank 0 in `sum` (all-reduce of float32 [1])"),
        ("raise", "rank 1 raised KeyError: 'no such variable'"),
        ("late", "rank 0 did not come in 2 s"),
        ("good", "finished"),
    ],
)
def test_a_program_under_SHARDTENSOR_DEBUG(case, expected, tmp_path):
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    env = {"SHARDTENSOR_DEBUG": "1", "SHARDTENSOR_DEBUG_TIMEOUT": "2"}
    code, text = torchrun(tmp_path, 2, script, case, **env)
    assert expected in text, text
    assert (code == 0) == (case == "good") == (text.count("finished") == 2)
