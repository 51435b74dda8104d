"""st.init in a process group that is there: again, after its end, with other axes."""

import pytest
import torch
import torch.distributed as dist
from forked import torchrun
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import run_workers
from shardtensor.train import rendezvous


def total(mesh):
    x = torch.arange(30.0).view(5, 6)
    placements = [Shard(d) for d in range(mesh.ndim)]
    return st.distribute_tensor(x, mesh, placements, src_data_rank=None).sum().item()


def again():
    found = []
    for axes in ({"domain": -1}, {"domain": -1}, {"data": 2, "domain": 2}, {"data": 1, "tp": -1}):
        mesh, device = st.init(**axes)
        assert mesh.mesh_dim_names == tuple(axes) and device.type == "cpu"
        found.append(total(mesh))
    return found


@pytest.mark.gloo
def test_again():
    """The workers' process group is one that `st.init` has not made."""
    for found in run_workers(4, again):
        assert found == [435.0] * 4


def apart(when):
    if when == "later":
        st.init()
    mine = {"data": 2, "domain": 2} if dist.get_rank() == 2 else {"data": 4, "domain": 1}
    with pytest.raises(ValueError) as error:
        st.init(**mine)
    mesh, _ = st.init(domain=-1)
    return str(error.value), total(mesh)


@pytest.mark.gloo
@pytest.mark.parametrize("when", ["first", "later"])
def test_ranks_that_ask_for_other_axes(when):
    found = run_workers(4, apart, when)
    assert len({text for text, _ in found}) == 1
    text, value = found[0]
    assert "{'data': 2, 'domain': 2}" in text and "{'data': 4, 'domain': 1}" in text
    assert "all ranks must ask for the same axes" in text and value == 435.0


def alone():
    if dist.get_rank() == 1:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError) as error:
            patch.setenv("SHARDTENSOR_INIT_TIMEOUT", "0.2")
            patch.setattr(rendezvous, "_HOSTS", 0.2)
            st.init()
    else:
        next(rendezvous._asked)
    dist.barrier()
    return None if dist.get_rank() == 0 else str(error.value)


@pytest.mark.gloo
def test_a_rank_that_calls_it_alone():
    _, text = run_workers(2, alone)
    assert "rank 1 of 2" in text and "waits in st.init for rank 0: does every rank call it" in text


ANEW = """
import torch.distributed as dist, shardtensor as st
from test_launch_again import total
found = []
for axes in ({"domain": 2}, {"domain": 2}, {"data": 2, "domain": 1}):
    mesh, _ = st.init(**axes)
    found.append(total(mesh))
    dist.destroy_process_group()
dist.init_process_group("gloo")
mesh, _ = st.init(domain=-1)
print(found + [total(mesh)], flush=True)
dist.destroy_process_group()
"""


@pytest.mark.gloo
def test_anew_after_the_end_of_a_process_group(tmp_path):
    script = tmp_path / "anew.py"
    script.write_text(ANEW)
    code, text = torchrun(tmp_path, 2, script)
    assert code == 0, text[-3000:]
    assert text.count("[435.0, 435.0, 435.0, 435.0]") == 2
