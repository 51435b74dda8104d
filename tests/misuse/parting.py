"""Ranks that part: the guard ends them."""

import contextlib
import pickle
import tempfile

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st

from .models import net
from .table import image, parted, refused, whole


@parted("rank 0 in `(sum|mean)`")
def print_on_rank_0(r):
    x = r.shard(whole())
    if r.me == 0:
        print(f"{x.sum():.3f}"[:0], end="")
    x.mean().item()


@parted("rank 0 in `full_tensor`|rank 0 in `numpy`")
def save_on_rank_0(r):
    x = r.shard(whole())
    if r.me == 0:
        x.numpy()
    x.mean().item()


@parted("rank 0 in `__reduce_ex__`")
def pickle_on_rank_0(r):
    x = r.shard(whole())
    if r.me == 0:
        pickle.dumps(x)
    x.mean().item()


@parted("rank 0 in")
def evaluate_on_rank_0(r):
    model, x = net(), r.shard(image(), 2)
    if r.me == 0:
        model(x)
    model(x).sum().backward()


@parted("ranks? (part|0)")
def another_branch_by_a_local_value(r):
    x = r.shard(whole())
    (x.sum() if x.to_local().sum() > -100 + 200 * r.me else x.amax()).item()


@parted("ValueError: no such file|returned")
def a_loader_that_raises_on_one_rank(r):
    if r.me == 1:
        raise ValueError("no such file")
    r.shard(whole()).mean().item()


@parted("ZeroDivisionError|returned|rank 1 raised")
def a_forward_that_raises_on_one_rank(r):
    model = net()
    if r.me == 1:
        model[1].register_forward_hook(lambda *_: 1 / 0)
    model(r.shard(image(), 2)).sum().backward()


@parted("ZeroDivisionError|rank 1 raised")
def a_backward_hook_that_raises_on_one_rank(r):
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    y = r.shard(whole()) * w
    if r.me == 1:
        y.register_hook(lambda g: 1 / 0)
    y.sum().backward()


@parted("IndexError")
def an_index_out_of_range_on_one_rank(r):
    index = r.shard(torch.tensor([0] * 6 + [9]))
    F.embedding(index, torch.ones(4, 2)).sum().item()


@parted("operands that differ")
def weights_that_differ(r):
    torch.manual_seed(r.me)
    nn.Linear(4, 2).double()(r.shard(whole())).sum().item()


@parted("operands that differ")
def inputs_that_differ(r):
    torch.manual_seed(r.me)
    r.shard(torch.randn(7)).sum().item()


@parted("operands that differ")
def noise_that_differs(r):
    torch.manual_seed(r.me)
    (r.shard(whole()) + torch.randn(4)).sum().item()


@parted("operands that differ")
def a_replicated_tensor_that_differs(r):
    t = st.ShardTensor.from_local(torch.full((4,), float(r.me)), r.mesh, [Replicate()])
    (r.shard(whole()) + t).sum().item()


@parted("operands that differ")
def sizes_that_differ(r):
    local = torch.ones(2 + r.me, 4)
    x = st.ShardTensor.from_local(local, r.mesh, [Shard(0)], sizes={0: [2 + r.me] * r.n})
    x.roll(1, 0).sum().item()


@parted("ranks part")
def a_loop_of_other_length(r):
    x = r.shard(whole())
    for _ in range(2 + r.me):
        x.sum().item()
    x.amax().item()


@parted("operands that differ")
def a_number_that_differs(r):
    (r.shard(whole()) * (1.0 + r.me)).sum().item()


@parted("float32")
def a_dtype_on_one_rank(r):
    x = r.shard(whole())
    (x.float() if r.me else x).sum().item()


@refused(ValueError, "different tensors")
def distribute_other_shapes(r):
    st.distribute_tensor(torch.ones(5 + r.me, 2), r.mesh, [Shard(0)])


@refused(ValueError, "different tensors")
def distribute_other_dtypes(r):
    st.distribute_tensor(
        torch.ones(5, dtype=torch.float64 if r.me else torch.float32), r.mesh, [Shard(0)]
    )


@parted("rank 0 in `save`")
def a_checkpoint_of_one_rank(r):
    x = r.shard(whole())
    if r.me == 0:
        st.checkpoint.save({"x": x}, tempfile.mkdtemp(), "step")
    x.sum().item()


@parted("the first op that differs: .*`flip`")
def a_local_op_of_one_rank(r):
    x = r.shard(whole())
    if r.me == 1:
        x = x.flip(1)
    x.sum().item()


@parted("the first op that differs: .*`mul_`")
def a_write_of_one_rank_that_nothing_follows(r):
    x = r.shard(whole())
    if r.me == 1:
        x.mul_(2)


@parted("rank 0 in `backward`")
def a_backward_of_one_rank(r):
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    loss = (r.shard(whole()) * w).sum()
    if r.me == 0:
        loss.backward()
    r.shard(whole()).sum().item()


@parted("rank 1")
def a_batch_more_on_one_rank(r):
    for batch in whole().split(4 - 2 * (r.me == 1)):
        r.shard(batch).sum().item()


@parted("the same sample")
def samples_of_a_sampler_over_all_ranks(r):
    sampler = torch.utils.data.DistributedSampler(range(8), r.n, r.me, shuffle=False)
    rows = torch.arange(16.0).reshape(8, 2)
    st.distribute_tensor(rows[list(sampler)], r.mesh, [Shard(0)])


@parted("`matmul` raised RuntimeError|`matmul`")
def an_error_that_one_rank_catches(r):
    x = r.shard(whole())
    if r.me == 1:
        with contextlib.suppress(RuntimeError):
            x.matmul(torch.ones(3, 3).double())
    x.sum().item()
