"""The user's line that messages name, wherever the user's files lie."""

import sys
import sysconfig

import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.caller import call_of_user, is_library
from shardtensor.dispatch import fallback

PROGRAM = """

def run(x):
    return torch.linalg.det(x)  # here


def refuse(x):
    with st.fallback("error"):
        return torch.linalg.det(x)
"""


def program(folder):
    """A user's module in a file of this folder."""
    found = {"torch": torch, "st": st}
    exec(compile(PROGRAM, str(folder / "train.py"), "exec"), found)
    return found


@pytest.mark.parametrize("name", ["shardtensor", "torch", "torchinductor", "src/shardtensor/rules"])
def test_a_folder_that_is_called_as_a_library(name, tmp_path):
    folder = tmp_path / name
    user = program(folder)

    def on_rank():
        x = st.distribute_tensor(torch.ones(6, 6), T.make_mesh((2,)), [Shard(0)])
        user["run"](x)

    fallback._warned.clear()
    with pytest.warns(st.FallbackWarning, match="has no rule") as found:
        st.simulate(2, on_rank)
    (text,) = {str(w.message) for w in found}
    assert f"({folder / 'train.py'}:4)" in text, text

    def refused():
        x = st.distribute_tensor(torch.ones(6, 6), T.make_mesh((2,)), [Shard(0)])
        user["refuse"](x)

    with pytest.raises(st.RankError) as error:
        st.simulate(2, refused)
    assert f"({folder / 'train.py'}:9)" in str(error.value)


def test_what_is_no_line_of_the_user():
    assert (
        is_library(st.__file__) and is_library(torch.nn.__file__) and is_library(sysconfig.__file__)
    )
    assert is_library("<frozen runpy>") and not is_library(__file__)
    assert not is_library(pytest.__file__)
    assert call_of_user(sys._getframe())[0].startswith(__file__)
