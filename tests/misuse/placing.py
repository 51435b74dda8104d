"""Placing tensors on a mesh."""

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import shardtensor as st
from shardtensor import testing as T

from .table import ROWS, refused, right, whole


@refused(ValueError, "2 placements for a mesh of 1 axes")
def too_many_placements(r):
    st.distribute_tensor(whole(), r.mesh, [Shard(0), Shard(1)])


@refused(ValueError, "one for each mesh axis, in a list")
def a_placement_alone(r):
    st.distribute_tensor(whole(), r.mesh, Shard(0))


@refused(TypeError, "call it for each tensor, with the dims that each has")
def a_batch_of_tensors(r):
    st.distribute_tensor({"x": whole(), "y": whole()}, r.mesh, [Shard(0)])


@refused(ValueError, "for a tensor of 2 dims")
def dim_out_of_range(r):
    st.distribute_tensor(whole(), r.mesh, [Shard(2)])


@refused(ValueError, "for a tensor of 0 dims")
def shard_of_a_scalar(r):
    st.distribute_tensor(torch.tensor(1.0), r.mesh, [Shard(0)])


@refused(ValueError, "use Shard, Replicate or Partial")
def placement_by_name(r):
    st.distribute_tensor(whole(), r.mesh, ["rows"])


@refused(ValueError, "add up to 7")
def sizes_that_do_not_add_up(r):
    r.shard(whole(), sizes={0: [1] * r.n})


@refused(ValueError, "add up to 7")
def negative_sizes(r):
    r.shard(whole(), sizes={0: [ROWS + 1, -1] + [0] * (r.n - 2)})


@refused(ValueError, r"expected \d sizes")
def wrong_number_of_sizes(r):
    r.shard(whole(), sizes={0: [ROWS] + [0] * r.n})


@refused(ValueError, "which no mesh axis shards")
def sizes_of_a_whole_dim(r):
    r.shard(whole(), sizes={1: [4] + [0] * (r.n - 1)})


@refused(ValueError, "dim 5")
def sizes_of_a_dim_that_is_not_there(r):
    r.shard(whole(), sizes={5: [ROWS] + [0] * (r.n - 1)})


@refused(ValueError, r"use x\.redistribute")
def distribute_twice(r):
    st.distribute_tensor(r.shard(whole()), r.mesh, [Shard(1)])


@refused(ValueError, "from_local")
def distribute_to_partial(r):
    st.distribute_tensor(whole(), r.mesh, [Partial()])


@refused(TypeError, "torch.Tensor")
def distribute_an_array(r):
    st.distribute_tensor(whole().numpy(), r.mesh, [Shard(0)])


@refused(TypeError, "DeviceMesh")
def a_number_of_ranks_for_a_mesh(r):
    st.distribute_tensor(whole(), r.n, [Shard(0)])


@refused(ValueError, "src_data_rank")
def source_rank_out_of_range(r):
    st.distribute_tensor(whole(), r.mesh, [Shard(0)], src_data_rank=r.n)


@refused(ValueError, "meta")
def distribute_a_meta_tensor(r):
    st.distribute_tensor(whole().to("meta"), r.mesh, [Shard(0)], src_data_rank=None)


@refused(ValueError, "sparse")
def distribute_a_sparse_tensor(r):
    st.distribute_tensor(whole().to_sparse(), r.mesh, [Shard(0)], src_data_rank=None)


@refused(ValueError, "plain local tensor")
def from_local_of_a_shardtensor(r):
    st.ShardTensor.from_local(r.shard(whole()), r.mesh, [Shard(0)])


@refused(ValueError, "sizes")
def from_local_with_other_sizes(r):
    st.ShardTensor.from_local(torch.ones(2, 4), r.mesh, [Shard(0)], sizes={0: [3] * r.n})


@refused(ValueError, "sizes must name every sharded dim")
def from_local_with_sizes_of_another_dim(r):
    st.ShardTensor.from_local(torch.ones(2, 4), r.mesh, [Shard(0)], sizes={1: [4] * r.n})


@refused(ValueError, "different dims or dtypes")
def from_local_of_other_dtypes(r):
    st.ShardTensor.from_local(
        torch.ones(2, 4).to(torch.float64 if r.me else torch.float32), r.mesh, [Shard(0)]
    )


@refused(ValueError, "different dims or dtypes")
def from_local_of_other_ndims(r):
    st.ShardTensor.from_local(torch.ones(*[2] * (2 + r.me)), r.mesh, [Shard(0)])


@refused(ValueError, "differ in its size")
def from_local_of_other_columns(r):
    st.ShardTensor.from_local(torch.ones(2, 3 + r.me), r.mesh, [Shard(0)])


@refused(ValueError, "differ in its size")
def from_local_replicated_of_other_sizes(r):
    st.ShardTensor.from_local(torch.ones(2 + r.me), r.mesh, [Replicate()])


@refused(ValueError, "2 placements")
def redistribute_with_too_many_placements(r):
    r.shard(whole()).redistribute(placements=[Shard(0), Replicate()])


@refused(ValueError, "for a tensor of 2 dims")
def redistribute_to_a_dim_out_of_range(r):
    r.shard(whole()).redistribute(placements=[Shard(-3)])


@refused(ValueError, "another mesh")
def redistribute_to_another_mesh(r):
    r.shard(whole()).redistribute(T.make_mesh((r.n, 1)), [Shard(0), Replicate()])


@refused(st.UnsupportedOpError, "different meshes")
def tensors_of_two_meshes(r):
    other = st.distribute_tensor(
        whole(), T.make_mesh((1, r.n)), [Replicate(), Shard(0)], src_data_rank=None
    )
    r.shard(whole()) + other


@refused(st.UnsupportedOpError, "torch.chunk")
def uneven_shards_as_dtensor(r):
    r.shard(whole(), sizes={0: [1] * (r.n - 1) + [ROWS - r.n + 1]}).to_dtensor()


@right
def beside_a_dtensor(r):
    ones = torch.ones(ROWS, 4, dtype=whole().dtype)
    return [(r.shard(whole()) + DTensor.from_local(ones, r.mesh, [Replicate()]), whole() + 1)]


@refused((RuntimeError, AssertionError), "(?i)cuda|nvidia|gpu|accelerator")
def to_a_device_that_is_not_there(r):
    r.shard(whole()).to("cuda:0")


@refused((RuntimeError, ValueError, st.UnsupportedOpError), "(?i)device|meta")
def beside_a_tensor_on_another_device(r):
    r.shard(whole()) + torch.ones(ROWS, 4, device="meta")
