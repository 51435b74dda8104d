"""Values that must come out as on one device."""

import copy
import io
import pickle

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st

from .table import ROWS, image, right, whole


def bad_numbers():
    x = image()
    x[0, 0, 2, 3], x[1, 2, 5, 1], x[0, 1, 6, 0] = float("nan"), float("inf"), -float("inf")
    return x


@right
def nan_and_inf_go_where_they_go_on_one_device(r):
    x = bad_numbers()
    s = r.shard(x, 2)
    kernel = torch.randn(
        2, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    ops = [
        lambda t: F.conv2d(t, kernel, padding=1), lambda t: t.mean(), lambda t: t.amax((2, 3)),
        lambda t: t.softmax(2), lambda t: F.layer_norm(t, (6,)), lambda t: F.max_pool2d(t, 2),
        lambda t: t.sort(2).values, lambda t: F.gelu(t), lambda t: t.cumsum(2), lambda t: t.nansum(),
        lambda t: t.argmax(2), lambda t: torch.isfinite(t), lambda t: nn.BatchNorm2d(3).double()(t),
        lambda t: F.interpolate(t, scale_factor=2, mode="bilinear"), lambda t: t.nan_to_num(),
    ]  # fmt: skip
    return [(op(s), op(x)) for op in ops]


@right
def nan_in_gradients(r):
    x, s = bad_numbers().requires_grad_(), r.shard(bad_numbers(), 2).requires_grad_()
    for t in (x, s):
        (t.softmax(2).sum() + (t * t).mean()).backward()
    return [(s.grad, x.grad)]


@right
def a_batch_of_none(r):
    x = image()[:0]
    s = r.shard(x, 2)
    kernel = torch.ones(2, 3, 3, 3, dtype=torch.float64)
    ops = [
        lambda t: F.conv2d(t, kernel, padding=1), lambda t: t.mean(), lambda t: t.sum((2, 3)),
        lambda t: F.max_pool2d(t, 2), lambda t: F.group_norm(t, 3), lambda t: t.softmax(2),
        lambda t: torch.cat([t, t]), lambda t: t.flatten(1), lambda t: t.roll(1, 2),
    ]  # fmt: skip
    return [(op(s), op(x)) for op in ops]


@right
def a_sharded_batch_of_none(r):
    x = image()[:0]
    s = r.shard(x)
    return [
        (s.relu(), x.relu()),
        (s.sum(), x.sum()),
        (s @ torch.ones(6, 2).double(), x @ torch.ones(6, 2).double()),
    ]


@right
def dtypes_that_are_not_float(r):
    found = []
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.int16,
        torch.int64,
        torch.complex64,
        torch.float16,
        torch.bfloat16,
    ):
        x = (whole() * 3).to(dtype)
        s = r.shard(x)
        found += [
            (s, x),
            (s.flip(0), x.flip(0)),
            (s == s, x == x),
            (torch.cat([s, s]), torch.cat([x, x])),
        ]
    return found


@right
def odd_memory(r):
    x = image()
    forms = {
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3),
        "strided": x[..., ::2],
        "expanded": x[:, :, :1].expand(2, 3, 8, 6),
    }
    found = []
    for v in forms.values():
        s = r.shard(v, 2)
        found += [(s, v), (s.roll(1, 2), v.roll(1, 2)), (s.sum(2), v.sum(2)), (s.amax(), v.amax())]
    return found


@right
def local_tensors_of_odd_memory(r):
    base = torch.arange(12.0, dtype=torch.float64).reshape(3, 4) + 100 * r.me
    parts = torch.cat(
        [torch.arange(12.0, dtype=torch.float64).reshape(3, 4) + 100 * i for i in range(r.n)]
    )
    c = torch.complex(base, base + 1)
    found = []
    for form in (
        lambda t: t.T.contiguous().T,
        lambda t: t[:, ::2],
        lambda t: t[:, :1].expand(-1, 4),
    ):
        s = st.ShardTensor.from_local(form(base), r.mesh, [Shard(0)])
        found += [(s, form(parts)), (s.roll(1, 0), form(parts).roll(1, 0))]
    whole_c = torch.complex(parts, parts + 1)
    for form in (
        lambda t: t.conj(),
        lambda t: t.conj().imag,
        lambda t: torch.view_as_real(t)[..., 0],
    ):
        s = st.ShardTensor.from_local(form(c), r.mesh, [Shard(0)])
        found += [(s, form(whole_c)), (s.flip(0), form(whole_c).flip(0))]
    return found


@right
def copies_and_files(r):
    s, x = r.shard(whole()), whole()
    file = io.BytesIO()
    torch.save({"x": s}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["x"]
    return [
        (copy.deepcopy(s), x),
        (copy.copy(s), x),
        (pickle.loads(pickle.dumps(s)), x),
        (loaded, x),
        (s.clone(), x),
    ]


@right
def a_subclass_of_tensor(r):
    class Field(torch.Tensor):
        pass

    s = r.shard(whole().as_subclass(Field))
    return [(s * 2, whole() * 2), (s + whole().as_subclass(Field), whole() * 2)]


@right
def a_parameter_as_input(r):
    w = nn.Parameter(whole())
    s = r.shard(w)
    (s * 2).sum().backward()
    return [(s.grad, torch.full((ROWS, 4), 2.0).double()), (s.requires_grad, True)]


@right
def printing(r):
    s = r.shard(whole())
    return [("ShardTensor" in repr(s), True), (f"{s.sum():.3f}", f"{whole().sum():.3f}")]


@right
def workers_that_load(r):
    data = torch.utils.data.TensorDataset(whole())
    loader = torch.utils.data.DataLoader(data, batch_size=ROWS, num_workers=1 if r.me == 0 else 0)
    return [(r.shard(batch).sum(0), whole().sum(0)) for (batch,) in loader]
