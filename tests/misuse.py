"""Wrong and odd use that a scientist may try: each is refused alike on every rank, or right.

A case is a function of one rank. `torchs` cases are held against torch itself on the whole tensor:
the same value, or an error of the same kind. `refused` cases raise the named error with a message
that says what to do. `parted` cases go different ways on different ranks: the guard ends them.
"""

import copy
import io
import pickle
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import shardtensor as st
from shardtensor import testing as T

ROWS = 7


@dataclass
class Rank:
    """What a case gets: this rank's mesh, and the same tensors sharded and whole."""

    mesh: object
    me: int
    n: int

    def shard(self, whole, dim=0, **kwargs):
        return st.distribute_tensor(whole, self.mesh, [Shard(dim)], src_data_rank=None, **kwargs)


@dataclass(frozen=True)
class Case:
    fn: object
    kind: str
    error: tuple = ()
    match: str = ""


CASES: dict[str, Case] = {}


def add(fn, kind, error=(), match=""):
    name = fn.__name__
    assert name not in CASES, name
    CASES[name] = Case(fn, kind, error, match)
    return fn


def torchs(fn):
    """fn(a, x): a gives a plain tensor its form, x is a (7, 4) tensor; plain and sharded alike."""
    return add(fn, "torchs")


def refused(error, match):
    return lambda fn: add(fn, "refused", error, match)


def right(fn):
    """fn(r) returns pairs of what came out and what single-device torch gives."""
    return add(fn, "right")


def parted(match):
    return lambda fn: add(fn, "parted", (st.RankError,), match)


def whole(dtype=torch.float64):
    return torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        dtype
    )


def image():
    return torch.randn(
        2, 3, ROWS, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def outcome(name):
    """What one rank finds: ("value", ...) or ("error", names of its classes, message)."""
    case = CASES[name]
    n, me = dist.get_world_size(), dist.get_rank()
    rank = Rank(T.make_mesh((n,)), me, n)
    x = rank.shard(whole())
    try:
        if case.kind == "torchs":
            expected, found = _torchs(case.fn, rank)
            result = _compare(expected, found)
        else:
            result = ("value", case.fn(rank))
    except Exception as e:
        if case.kind == "parted":
            raise
        result = ("error", [c.__name__ for c in type(e).__mro__], f"{e}")
    if result[0] == "value" and case.kind == "right":
        for i, (got, want) in enumerate(result[1]):
            T.same(got, want, f"{name} {i}") if isinstance(want, torch.Tensor) else _equal(
                got, want
            )
        result = ("value", "right")
    if case.kind != "parted":
        # whatever happened, the ranks are still together
        assert abs(x.sum().item() - whole().sum().item()) < 1e-9
    return result


def guarded(name):
    """The same under the guard."""
    with st.guard(5.0):
        return outcome(name)


def _equal(got, want):
    assert got == want, f"{got!r}, not {want!r}"


def _attempt(fn, *args):
    try:
        return fn(*args), None
    except Exception as e:
        return None, e


def _torchs(fn, rank):
    return _attempt(fn, lambda t, dim=0: t, whole()), _attempt(fn, rank.shard, rank.shard(whole()))


def _compare(expected, found):
    (want, wrong), (got, error) = expected, found
    if wrong is not None:
        assert error is not None, f"no error, where torch raises {wrong!r}; got {got!r}"
        kinds = (type(wrong), ValueError, st.UnsupportedOpError)
        assert isinstance(error, kinds), f"{error!r}, where torch raises {wrong!r}"
        assert str(error), "an error without a message"
        return ("error", [c.__name__ for c in type(error).__mro__], f"{error}")
    if error is not None:
        assert isinstance(error, st.UnsupportedOpError), f"{error!r}, where torch gives a value"
        return ("error", [c.__name__ for c in type(error).__mro__], f"{error}")
    wants = want if isinstance(want, tuple) else (want,)
    gots = got if isinstance(got, tuple) else (got,)
    for g, w in zip(gots, wants, strict=True):
        T.same(g, w, "value") if isinstance(w, torch.Tensor) else _equal(g, w)
    return ("value", "as torch's")


# placing tensors -----------------------------------------------------------------------------------


@refused(ValueError, "2 placements for a mesh of 1 axes")
def too_many_placements(r):
    st.distribute_tensor(whole(), r.mesh, [Shard(0), Shard(1)])


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


# shapes, dims and indices: torch's own errors ------------------------------------------------------

OF_SHAPES = {
    "add_of_other_shape": lambda a, x: x + torch.ones(3),
    "add_of_two_shards_of_other_shape": lambda a, x: x + a(torch.ones(4, 7)),
    "matmul_of_other_shape": lambda a, x: x @ torch.ones(5, 2).double(),
    "matmul_of_two_shards_of_other_shape": lambda a, x: x @ a(whole()),
    "matmul_of_other_dtype": lambda a, x: x @ torch.ones(4, 2),
    "linear_of_other_features": lambda a, x: nn.Linear(5, 2).double()(x),
    "linear_of_other_dtype": lambda a, x: nn.Linear(4, 2)(x),
    "conv_of_other_channels": lambda a, x: F.conv2d(a(image(), 2), torch.ones(4, 2, 3, 3).double()),
    "conv_of_too_large_a_kernel": lambda a, x: F.conv2d(
        a(image(), 2), torch.ones(4, 3, 9, 9).double()
    ),
    "conv_of_two_dims": lambda a, x: F.conv2d(x, torch.ones(1, 1, 1, 1).double()),
    "conv_with_stride_0": lambda a, x: F.conv2d(
        a(image(), 2), torch.ones(4, 3, 3, 3).double(), stride=0
    ),
    "pool_of_too_large_a_kernel": lambda a, x: F.max_pool2d(a(image(), 2), 9),
    "cat_of_other_columns": lambda a, x: torch.cat([x, a(torch.ones(3, 5).double())]),
    "cat_of_nothing": lambda a, x: torch.cat([x[:0]], 3),
    "stack_of_other_shapes": lambda a, x: torch.stack([x, a(torch.ones(6, 4).double())]),
    "view_of_other_size": lambda a, x: x.view(5, 5),
    "view_of_two_unknowns": lambda a, x: x.reshape(-1, -1),
    "unflatten_of_other_size": lambda a, x: x.unflatten(1, (3, 2)),
    "permute_of_too_few": lambda a, x: x.permute(0),
    "transpose_out_of_range": lambda a, x: x.transpose(0, 2),
    "expand_of_a_full_dim": lambda a, x: x.expand(8, 4),
    "repeat_of_too_few": lambda a, x: x.repeat(2),
    "sum_out_of_range": lambda a, x: x.sum(2),
    "sum_of_a_dim_twice": lambda a, x: x.sum((0, 0)),
    "softmax_out_of_range": lambda a, x: x.softmax(-3),
    "cumsum_out_of_range": lambda a, x: x.cumsum(2),
    "flip_out_of_range": lambda a, x: x.flip(2),
    "roll_of_too_few": lambda a, x: x.roll((1, 2), 0),
    "sort_out_of_range": lambda a, x: x.sort(2),
    "topk_of_too_many": lambda a, x: x.topk(8, 0),
    "kthvalue_of_too_many": lambda a, x: x.kthvalue(8, 0),
    "split_of_other_sizes": lambda a, x: x.split([3, 3]),
    "chunk_into_none": lambda a, x: x.chunk(0),
    "einsum_of_other_sizes": lambda a, x: torch.einsum("ij,jk->ik", x, torch.ones(5, 2).double()),
    "einsum_of_too_few": lambda a, x: torch.einsum("ijk->i", x),
    "where_of_other_shape": lambda a, x: torch.where(x > 0, x, torch.ones(3, 3).double()),
    "layer_norm_of_other_shape": lambda a, x: F.layer_norm(x, (5,)),
    "batch_norm_of_other_channels": lambda a, x: nn.BatchNorm2d(4).double()(a(image(), 2)),
    "group_norm_of_other_groups": lambda a, x: F.group_norm(a(image(), 2), 2),
    "interpolate_of_size_and_scale": lambda a, x: F.interpolate(
        a(image(), 2), size=(3, 3), scale_factor=2
    ),
    "interpolate_to_nothing": lambda a, x: F.interpolate(a(image(), 2), size=(0, 3)),
    "pad_by_too_much": lambda a, x: F.pad(x, (0, 0, -4, -4)),
    "reflect_by_too_much": lambda a, x: F.pad(a(image(), 2), (0, 0, 7, 7), mode="reflect"),
    "cross_entropy_of_other_targets": lambda a, x: F.cross_entropy(
        x, torch.zeros(6, dtype=torch.long)
    ),
    "mse_of_other_shape": lambda a, x: F.mse_loss(x, a(torch.ones(6, 4).double())),
    "attention_of_other_heads": lambda a, x: F.scaled_dot_product_attention(
        a(torch.ones(1, 2, 6, 4), 2), a(torch.ones(1, 3, 6, 4), 2), a(torch.ones(1, 3, 6, 4), 2)
    ),
    "index_out_of_range": lambda a, x: x[7],
    "index_of_too_many_dims": lambda a, x: x[0, 0, 0],
    "index_by_a_float": lambda a, x: x[1.5],
    "index_by_float_tensor": lambda a, x: x[torch.tensor([0.0])],
    "list_out_of_range": lambda a, x: x[[0, 9]],
    "mask_of_other_shape": lambda a, x: x[torch.ones(5, dtype=torch.bool)],
    "slice_backwards": lambda a, x: x[::-1],
    "slice_past_the_end": lambda a, x: x[5:100],
    "index_select_out_of_range": lambda a, x: x.index_select(0, torch.tensor([7])),
    "gather_out_of_range": lambda a, x: x.gather(0, torch.full((1, 4), 7)),
    "scatter_of_a_float_index": lambda a, x: x.scatter(0, torch.zeros(1, 4), 1.0),
}
OF_VALUES = {
    "item_of_many": lambda a, x: x.item(),
    "truth_of_many": lambda a, x: bool(x),
    "float_of_many": lambda a, x: float(x),
    "len_of_a_scalar": lambda a, x: len(x.sum()),
    "no_such_attribute": lambda a, x: x.foo,
    "no_such_argument": lambda a, x: x.sum(dims=0),
    "mean_of_integers": lambda a, x: x.long().mean(),
    "sum_of_booleans": lambda a, x: (x > 0).sum(),
    "minus_of_booleans": lambda a, x: (x > 0) - (x > 1),
    "order_of_complex": lambda a, x: x.cfloat() < 1,
    "max_of_complex": lambda a, x: x.cfloat().max(),
    "division_of_integers": lambda a, x: a(torch.arange(7)) // 2,
    "division_by_zero": lambda a, x: a(torch.arange(7)) // 0,
    "softmax_of_integers": lambda a, x: x.long().softmax(1),
    "shift_of_floats": lambda a, x: x << 1,
    "clamp_without_bounds": lambda a, x: x.clamp(),
    "dropout_of_two": lambda a, x: F.dropout(x, 2.0),
    "norm_of_integers": lambda a, x: x.long().norm(),
    "inverse_of_a_singular_matrix": lambda a, x: torch.linalg.inv(a(torch.zeros(3, 3))),
    "overflow_of_int8": lambda a, x: a(torch.full((7,), 100, dtype=torch.int8)) + 100,
    "max_of_nothing": lambda a, x: x[:0].max(),
    "mean_of_nothing": lambda a, x: x[:0].mean(),
    "sum_of_nothing": lambda a, x: x[:0].sum(),
    "argmax_of_nothing": lambda a, x: x[:0].argmax(0),
    "set_out_of_range": lambda a, x: x.__setitem__(9, 0.0),
    "set_of_other_shape": lambda a, x: x.__setitem__(slice(0, 2), torch.ones(3, 4).double()),
    "add_in_place_of_a_larger_shape": lambda a, x: x.add_(torch.ones(2, 7, 4)),
    "add_in_place_to_integers": lambda a, x: x.long().add_(0.5),
    "add_in_place_to_an_expanded_view": lambda a, x: x[:, :1].expand(7, 4).add_(1),
    "write_to_an_expanded_view": lambda a, x: x[:, :1].expand(7, 4).__setitem__((0, 0), 1.0),
}
OF_GRADIENTS = {
    "backward_of_many": lambda a, x: (x.requires_grad_() * 2).backward(),
    "backward_without_a_graph": lambda a, x: x.sum().backward(),
    "backward_twice": lambda a, x: (lambda y: (y.backward(), y.backward()))(
        (x.requires_grad_() ** 2).sum()
    ),
    "gradient_of_integers": lambda a, x: x.long().requires_grad_(),
    "gradient_of_what_was_not_used": lambda a, x: torch.autograd.grad(
        (x.requires_grad_() * 1).sum(), [a(whole()).requires_grad_()]
    ),
    "second_gradient_without_a_graph": lambda a, x: torch.autograd.grad(
        torch.autograd.grad((x.requires_grad_() ** 3).sum(), [x])[0].sum(), [x]
    ),
    "no_gradient_of_a_result": lambda a, x: (x.requires_grad_() * 2).requires_grad_(False),
    "numpy_of_what_requires_grad": lambda a, x: x.requires_grad_().numpy(),
    "write_to_a_leaf": lambda a, x: x.requires_grad_().mul_(2),
    "write_to_what_backward_needs": lambda a, x: (
        lambda y: (y.exp_(), y.mul_(2))[1].sum().backward()
    )(x.requires_grad_() * 1),
    "cotangent_of_other_shape": lambda a, x: (x.requires_grad_() * 2).backward(torch.ones(3)),
    "gradient_of_other_shape": lambda a, x: setattr(x, "grad", torch.ones(3).double()),
}
for _name, _fn in {**OF_SHAPES, **OF_VALUES, **OF_GRADIENTS}.items():
    _fn.__name__ = _name
    torchs(_fn)


# values that must come out as on one device --------------------------------------------------------


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
        "channels_last": x.to(memory_format=torch.channels_last), "transposed": x.transpose(2, 3),
        "strided": x[..., ::2], "expanded": x[:, :, :1].expand(2, 3, 8, 6),
    }  # fmt: skip
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
        lambda t: t.T.contiguous().T, lambda t: t[:, ::2], lambda t: t[:, :1].expand(-1, 4),
    ):  # fmt: skip
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


# models and transforms -----------------------------------------------------------------------------


def net():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1)
    ).double()


def gradients(model, x):
    model(x).square().mean().backward()
    return [p.grad for p in model.parameters()]


@right
def parallelize_twice(r):
    model = st.parallelize(st.parallelize(net(), r.mesh), r.mesh)
    return list(zip(gradients(model, r.shard(image(), 2)), gradients(net(), image()), strict=True))


@right
def a_frozen_model(r):
    model = net().requires_grad_(False)
    model = st.parallelize(model, r.mesh)
    s, x = r.shard(image(), 2).requires_grad_(), image().requires_grad_()
    model(s).sum().backward()
    net()(x).sum().backward()
    return [(s.grad, x.grad), (all(p.grad is None for p in model.parameters()), True)]


@right
def other_weights_before_parallelize(r):
    model = net()
    with torch.no_grad():
        model[0].weight += r.me
    model = st.parallelize(model, r.mesh)
    return [(model(r.shard(image(), 2)), net()(image()))]


@right
def another_seed_for_dropout(r):
    torch.manual_seed(r.me)
    y = F.dropout(r.shard(torch.ones(64, 4)), 0.5).full_tensor()
    return [(set(y.unique().tolist()), {0.0, 2.0})]


@refused(ValueError, "different models")
def parallelize_other_models(r):
    st.parallelize(nn.Linear(4, 2 + r.me), r.mesh)


@refused((TypeError, ValueError), "bucket")
def parallelize_with_a_wrong_option(r):
    st.parallelize(net(), r.mesh, buckets=3)


@refused(ValueError, "data axis")
def parallelize_over_an_axis_that_is_not_there(r):
    st.parallelize(net(), r.mesh, data="batch")


@refused(RuntimeError, "size mismatch")
def load_another_models_state(r):
    st.parallelize(net(), r.mesh).load_state_dict(
        {k: v[..., :1] for k, v in net().state_dict().items()}
    )


@refused(RuntimeError, "Missing key")
def load_a_part_of_a_state(r):
    st.parallelize(net(), r.mesh).load_state_dict({})


@refused(st.UnsupportedOpError, "vmap")
def vmap_over_shards(r):
    torch.func.vmap(lambda t: t * 2)(r.shard(whole()))


@refused(st.UnsupportedOpError, "vmap|autograd")
def func_grad_of_shards(r):
    torch.func.grad(lambda t: t.sum())(r.shard(whole()))


@refused(ValueError, "replicate")
def a_fallback_that_does_not_exist(r):
    st.fallback("gather").__enter__()


@refused(st.UnsupportedOpError, "max_bytes")
def a_gather_past_the_budget(r):
    with st.fallback(max_bytes=10):
        torch.linalg.det(r.shard(torch.eye(4)))


@refused(st.UnsupportedOpError, "(?i)sparse")
def sparse_beside_shards(r):
    torch.sparse.mm(whole().T.to_sparse(), r.shard(whole()))


# ranks that part -----------------------------------------------------------------------------------


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
