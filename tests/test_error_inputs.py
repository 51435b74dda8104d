"""What is wrong for torch is wrong on shards: each mistake raises on all ranks alike, and says what."""

import pytest
import torch
import torch.distributed as dist
from cases.grid_sample import CUBIC_VOLUMES
from raising import raised
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.nn import functional as F

import shardtensor as st
from shardtensor import testing as T

KINDS = (RuntimeError, IndexError, ValueError, TypeError)
# what of the message is held; the call, of a matrix (4, 6), a vector (8) and images (2, 3, 8, 6)
MISTAKES = {
    "output_size must be 2|output with size 2": lambda m, v, i: F.adaptive_avg_pool2d(i, (2, 3, 4)),
    "at least 2-D": lambda m, v, i: F.scaled_dot_product_attention(v, v, v),
    "implicitly created only for scalar outputs": lambda m, v, i: torch.autograd.grad((m * 2).requires_grad_(), m),
    "padding='same' is not supported for strided": lambda m, v, i: F.conv2d(i, torch.ones(4, 3, 3, 3), stride=2, padding="same"),
    "output padding": lambda m, v, i: F.conv_transpose2d(i, torch.ones(3, 4, 3, 3), output_padding=1),
    "boundaries tensor should be 1 dimension": lambda m, v, i: torch.searchsorted(m.sort(1)[0], i),
    "boundaries tensor must be 1 dimension": lambda m, v, i: torch.bucketize(v, m),
    "boundary and sorter must have the same size": lambda m, v, i: torch.searchsorted(v, 1.0, sorter=torch.arange(3)),
    "must have at least 2 dimensions": lambda m, v, i: torch.tril(v),
    "diagonal dimensions cannot be identical": lambda m, v, i: torch.diagonal(m, 0, 1, 1),
    r"diag\(\): Supports 1D or 2D": lambda m, v, i: torch.diag(i),
    "expected a matrix": lambda m, v, i: torch.trace(v),
    "2 or fewer dimensions": lambda m, v, i: torch.block_diag(i, m),
    "last dimension of size 2": lambda m, v, i: torch.view_as_complex(m),
    "total rotation dims == 2": lambda m, v, i: torch.rot90(i, 1, (0, 1, 2)),
    "total dims >= 2": lambda m, v, i: torch.rot90(v, 1, (0, 1)),
    "dim0 = dim1": lambda m, v, i: torch.rot90(m, 1, (1, 1)),
    r"grid_sampler\(\): expected": lambda m, v, i: F.grid_sample(i, torch.zeros(2, 4, 4, 3), align_corners=False),
    "bicubic interpolation only supports 4D": lambda m, v, i: F.grid_sample(
        i.unsqueeze(2), torch.zeros(2, 1, 4, 4, 3), mode="bicubic", align_corners=False
    ),
    "Index is supposed to be a vector": lambda m, v, i: m.index_select(1, torch.zeros(2, 2, dtype=torch.long)),
    r"Expected dtype int32(/| or )int64 for index": lambda m, v, i: m.index_select(1, torch.zeros(2)),
    "Expected reduce to be one of": lambda m, v, i: m.index_reduce(0, torch.tensor([0]), m[:1], "sum"),
    "source and index to have the same number": lambda m, v, i: v.clone().put_(torch.tensor([0, 1]), torch.ones(3)),
    "self and source expected to have the same dtype": lambda m, v, i: v.clone().put_(
        torch.tensor([0]), torch.ones(1, dtype=torch.float64)
    ),
    "0-dimensional value": lambda m, v, i: v.index_fill(0, torch.tensor([0]), torch.ones(2)),
    "expected BoolTensor for mask": lambda m, v, i: torch.masked_select(v, torch.ones(8)),
    "only supports boolean masks": lambda m, v, i: v.clone().masked_scatter_(torch.ones(8), torch.ones(8)),
    "same dtypes": lambda m, v, i: v.masked_scatter(v > 0, torch.ones(8, dtype=torch.float64)),
    "non-negative integer": lambda m, v, i: torch.nonzero_static(v, size=-1),
    "repeats must have the same size": lambda m, v, i: torch.repeat_interleave(v, torch.ones(3, dtype=torch.long)),
    "does not match required size": lambda m, v, i: torch.repeat_interleave(v, torch.ones(8, dtype=torch.long), output_size=3),
    "both arguments": lambda m, v, i: torch.matmul(v, v.sum()),
    "operands": lambda m, v, i: torch.einsum("ab,bc->ac", m),
    "out of range for dimension": lambda m, v, i: torch.kthvalue(v, 9),
    "Halving dimension must be even": lambda m, v, i: F.glu(i, 1),
    "at most half of": lambda m, v, i: F.max_pool2d(i, 2, padding=2),
    "between 0 and 1": lambda m, v, i: F.dropout(v, 1.5),
    "either add or multiply": lambda m, v, i: v.clone().scatter_(0, torch.tensor([0]), torch.ones(1), reduce="max"),
    "same number of dimensions": lambda m, v, i: torch.gather(m, 0, torch.tensor([0])),
    r"Expected self.dtype to be equal to src.dtype": lambda m, v, i: v.scatter(
        0, torch.tensor([0]), torch.ones(1, dtype=torch.float64)
    ),
    "start_dim cannot come after end_dim": lambda m, v, i: i.flatten(2, 1),
    "expand": lambda m, v, i: i.expand(3, 8),
    "is invalid for input of size": lambda m, v, i: m.reshape(5, -1),
    "exceeds": lambda m, v, i: m.narrow(1, 4, 5),
    "out of bounds for dimension|out of range": lambda m, v, i: m[9],
    "stft": lambda m, v, i: torch.stft(v, 64, center=False, return_complex=True),
    "shape of indices|indices": lambda m, v, i: F.max_unpool2d(i, torch.zeros(2, 3, 8, 5, dtype=torch.long), 2),
    "same number of dimensions|inputs": lambda m, v, i: torch.linalg.cross(m, i),
    "Expected 3D .unbatched. or 4D": lambda m, v, i: F.conv2d(v, torch.ones(4, 3, 3, 3)),
    "Kernel size": lambda m, v, i: F.conv2d(i, torch.ones(4, 3, 9, 9)),
    "1-d non-negative": lambda m, v, i: torch.bincount(m.long()),
    "expected a matrix, but got": lambda m, v, i: torch.trace(i),
    "batch of 2D affine": lambda m, v, i: F.affine_grid(m[:, :3], [4, 3, 2, 2], align_corners=False),
    "too many indices": lambda m, v, i: m[0, 0, 0],
    "tensors used as indices": lambda m, v, i: v[torch.ones(2)],
    "source and destination dtypes match": lambda m, v, i: v.clone().index_put_(
        (torch.tensor([0]),), torch.ones(1, dtype=torch.float64)
    ),
    "label_smoothing must be between": lambda m, v, i: F.cross_entropy(m, torch.zeros(4, dtype=torch.long), label_smoothing=2.0),
    "class indices|Long": lambda m, v, i: F.cross_entropy(m, torch.zeros(4, dtype=torch.float32)),
    "as many elements as mask|number of": lambda m, v, i: v.masked_scatter(v == v, torch.ones(3)),
    "expanded size|broadcast a dim": lambda m, v, i: torch.addmm(torch.ones(5, 5), m, m.t()),
    "cannot be divided into|divisible": lambda m, v, i: F.group_norm(i, 2),
    "doesn't match the broadcast shape": lambda m, v, i: v.clone().add_(torch.ones(2, 8)),
    "too small": lambda m, v, i: F.max_pool2d(i, 20),
    "could not infer output dtype": lambda m, v, i: m.long().mean(),
    "restricted to bilinear and bicubic": lambda m, v, i: F.interpolate(i, 3, mode="nearest", antialias=True),
    "either size or scale_factor|one of size": lambda m, v, i: F.interpolate(i),
    "greater than 0": lambda m, v, i: F.interpolate(i, 0),
    "not meaningful with": lambda m, v, i: F.interpolate(i, 3, recompute_scale_factor=True),
    "cannot be 0 to view": lambda m, v, i: v.sum().view(torch.int16),
    "to view": lambda m, v, i: i[..., :5].clone().view(torch.float64),
    "positive upscale_factor": lambda m, v, i: F.pixel_shuffle(i, 0),
    "positive downscale_factor": lambda m, v, i: F.pixel_unshuffle(i, 0),
    "length must be non-negative": lambda m, v, i: m.narrow(1, 0, -1),
    "larger than 0": lambda m, v, i: m.tensor_split(0),
    "only support floating point": lambda m, v, i: m.long().var(),
    "must have length 3": lambda m, v, i: torch.linalg.cross(m, m),
    "greater than zero": lambda m, v, i: F.max_pool2d(i, 2, dilation=0),
    "negative padding": lambda m, v, i: F.conv2d(i, torch.ones(4, 3, 3, 3), padding=-1),
    "len.. of a 0-d": lambda m, v, i: len(v.sum()),
    "invalid max index|max_unpool": lambda m, v, i: F.max_unpool2d(i, torch.full((2, 3, 8, 6), 999), 2),
    "no dimension of size 3": lambda m, v, i: torch.cross(m, m),
}  # fmt: skip
if CUBIC_VOLUMES:
    del MISTAKES["bicubic interpolation only supports 4D"]


def tensors(place):
    torch.manual_seed(0)
    m, v, i = torch.randn(4, 6), torch.randn(8), torch.randn(2, 3, 8, 6)
    return [place(x.contiguous(), d).requires_grad_(False) for x, d in ((m, 0), (v, 0), (i, 2))]


@torch.enable_grad()
def tried(call, given):
    """The error, or None; a mistake that needs a gradient makes it."""
    return raised(call, *given)


def of_rank():
    mesh = T.make_mesh((dist.get_world_size(),))
    given = tensors(lambda x, d: st.distribute_tensor(x, mesh, [Shard(d)], src_data_rank=None))
    return {k: tried(call, given) for k, call in MISTAKES.items()}


@pytest.fixture(scope="module")
def errors():
    return st.simulate(3, of_rank)


@pytest.mark.parametrize("said", MISTAKES)
def test_mistakes(said, errors):
    plain = tried(MISTAKES[said], tensors(lambda x, d: x))
    assert isinstance(plain, KINDS), f"torch does it: {plain}"
    found = [e[said] for e in errors]
    assert len({(type(e), str(e)) for e in found}) == 1, found
    with pytest.raises(KINDS, match=said):
        raise found[0]


def refusals():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))

    def on(mesh, d=0, *shape, n=1):
        x = torch.ones(shape or (4, 4))
        return st.distribute_tensor(x, mesh, [Shard(d)] * mesh.ndim, src_data_rank=None)

    x, a = on(mesh), on(mesh["a"])
    other = init_device_mesh("cpu", (4,))
    y, q = on(other), on(mesh["a"], 2, 1, 2, 4, 4)
    plain = torch.ones(4, 4)
    table = torch.ones(4, 4, dtype=torch.long)

    def batched():
        w = a.detach().requires_grad_()
        torch.autograd.grad(w * 2, w, torch.ones(2, 4, 4), is_grads_batched=True)

    calls = {
        "is_grads_batched: call it once per gradient": batched,
        "different meshes": lambda: x + y,
        "different meshes|meshes:": lambda: x @ y,
        "a mask with more dims than query": lambda: F.scaled_dot_product_attention(
            q[0], q[0], q[0], torch.ones(1, 1, 2, 4, 4)
        ),
        "a mask of shape": lambda: F.scaled_dot_product_attention(q, q, q, torch.ones(4)),
        "from_dtensor": lambda: st.distribute_tensor(
            torch.distributed.tensor.DTensor.from_local(plain, mesh["a"], [Replicate()]),
            mesh["a"], [Shard(0)],
        ),
        "only sum and avg": lambda: a.redistribute(placements=[torch.distributed.tensor.Partial("max")]),
        "sizes for dim": lambda: st.ShardTensor.from_local(plain, mesh["a"], [Shard(0)], sizes={5: [2, 2]}),
        "floats only": lambda: F.adaptive_avg_pool2d(
            st.distribute_tensor(table[None, None], mesh["a"], [Shard(2)], src_data_rank=None), 2
        ),
    }  # fmt: skip
    return {k: tried(call, ()) for k, call in calls.items()}


def test_refusals():
    """Each names what to do, or both layouts, on all ranks alike."""
    found = st.simulate(4, refusals)
    for said, error in found[0].items():
        assert all((type(e[said]), str(e[said])) == (type(error), str(error)) for e in found), said
        with pytest.raises((st.UnsupportedOpError, ValueError, RuntimeError), match=said):
            raise error or AssertionError(f"nothing raised: {said}")
