"""Results of PyTorch's operators lie in memory as on one device: images with the channels last."""

from itertools import islice

import pytest
import torch
from operators import ops
from torch.distributed.tensor import Shard
from torch.utils import _pytree as pytree

import shardtensor as st
from shardtensor.ranks.testing import make_mesh

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
SHAPES = {4: (2, 4, 6, 3), 5: (2, 4, 3, 3, 2)}
# what libraries lay out as they like, on each device in another way
FREE = ("fft.", "linalg.", "svd", "pca", "geqrf", "triangular_solve", "qr", "lu", "cholesky",
        "nn.functional.scaled_dot", "nn.functional.max_unpool", "kron")  # fmt: skip
# whose kernels for CPUs lay out otherwise than those for tensors without memory, or than CUDA's
OTHER = {
    "__rpow__": "1 ** x is a fill of rows first",
    "fft.fftshift": "a roll that has not been made",
    "gradient": "stacked of slices",
    "isin": "of sorted elements",
    "nn.functional.logsigmoid": "rows first on CPUs alone",
    "nn.functional.rrelu": "rows first on CPUs alone",
    "normal": "rows first for tensors of means",
    "normal.number_mean": "rows first for tensors of means",
    "nn.functional.conv3d": "a volume without a batch is taken for images",
    "nn.functional.conv2d": "weights of another format than an image without a batch",
    "nn.functional.conv_transpose2d": "weights of another format than an image without a batch",
    "nn.functional.conv_transpose3d": "a volume without a batch is taken for images",
    "__getitem__": "a row is sent as it is read",
    "unbind": "a row is sent as it is read",
}
SKIPPED = {"empty_like", "new_empty", "new_empty_strided", "resize_", "resize_as_"}
NAMES = sorted(n for n in ops() if not n.startswith(FREE) and n not in OTHER and n not in SKIPPED)


def image(ndim, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(SHAPES[ndim], generator=g).add(0.1).contiguous(memory_format=LAST[ndim])


def calls(op, most):
    """Arguments: of an image, of two, of an image and a dim; the database's own."""
    for ndim in SHAPES:
        x, y = image(ndim, 0), image(ndim, 1)
        yield from ((x, rest, {}) for rest in ((), (y,), (1,), (2,)))
    found = 0
    torch.default_generator.manual_seed(0)
    for s in islice(op.sample_inputs("cpu", torch.float32), 40):
        xs = [x for x in pytree.tree_leaves((s.input, s.args)) if isinstance(x, torch.Tensor)]
        if found < most and any(x.ndim in LAST and x.numel() > 8 for x in xs):
            found += 1
            yield s.input, s.args, s.kwargs


def last(x):
    known = isinstance(x, torch.Tensor) and x.ndim in LAST
    return x.contiguous(memory_format=LAST[x.ndim]) if known else x


def run(op, leaves, tree):
    """Results and gradients of the operands."""
    given = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in leaves]
    learnt = [x for x in given if isinstance(x, torch.Tensor) and x.is_floating_point()]
    for x in learnt:
        x.requires_grad_()
    first, args, kwargs = pytree.tree_unflatten(given, tree)
    outs = pytree.tree_leaves(op(first, *args, **kwargs))
    total = sum(y.abs().sum() for y in outs if isinstance(y, torch.Tensor) and y.requires_grad)
    if isinstance(total, torch.Tensor):
        total.backward()
    return outs, [x.grad for x in learnt]


def problem(got, want):
    """Why a result lies otherwise, as a whole or on this rank."""
    if not isinstance(got, st.ShardTensor) or got.shape != want.shape or want.ndim < 3:
        return ""
    long = [d for d, n in enumerate(want.shape) if n > 1]
    if [got.stride(d) for d in long] != [want.stride(d) for d in long]:
        return f"strides {got.stride()} for {want.stride()}"
    own = got._local
    order = sorted((d for d in long if own.shape[d] > 1), key=lambda d: (-want.stride(d), d))
    steps = [own.stride(d) for d in order]
    dense = own.numel() and 0 not in steps and 0 not in want.stride() and own.ndim in LAST
    if dense and steps != sorted(steps, reverse=True):
        return f"a shard {tuple(own.shape)} of strides {own.stride()} for {want.stride()}"
    return ""


def sweep(names, most):
    mesh, found, known, tried = make_mesh((2,)), [], ops(), 0
    for name in names:
        op = known[name]
        for first, args, kwargs in calls(op, most):
            leaves, tree = pytree.tree_flatten((first, args, kwargs))
            leaves = [last(x) for x in leaves]
            try:
                wants = run(op, leaves, tree)
            except Exception:
                continue
            where = next(
                i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.ndim in LAST
            )
            x = leaves[where]
            for dim, n in enumerate(x.shape):
                if n < 2:
                    continue
                mixed = list(leaves)
                sizes = ([n - n // 2, n // 2], [n, 0], [0, n])[(dim + len(name)) % 3]
                mixed[where] = st.distribute_tensor(
                    x, mesh, [Shard(dim)], src_data_rank=None, sizes={dim: sizes}
                )
                try:
                    gots = run(op, mixed, tree)
                except st.UnsupportedOpError:
                    continue
                tried += 1
                pairs = zip([*gots[0], *gots[1]], [*wants[0], *wants[1]], strict=True)
                said = [problem(g, w) for g, w in pairs if isinstance(w, torch.Tensor)]
                if any(said):
                    case = [tuple(v.shape) if isinstance(v, torch.Tensor) else v for v in leaves]
                    found.append(f"{name} of {case} {kwargs} cut at {dim} {sizes}: {max(said)}")
    return found, tried


# which have rules that move rows of images
IMAGES = (
    "nn.functional.interpolate", "nn.functional.max_pool2d", "nn.functional.avg_pool2d",
    "nn.functional.adaptive_max_pool2d", "nn.functional.channel_shuffle", "softmax", "rot90",
    "nn.functional.instance_norm", "nn.functional.pad.re", "nn.functional.local_response_norm",
    "randn_like", "squeeze_copy", "nn.functional.rms_norm", "renorm", "nn.functional.batch_norm",
)  # fmt: skip


@pytest.mark.slow
def test_results_and_gradients_lie_as_on_one_device(pytestconfig, recwarn):
    """Of the gate some operators, of the whole all."""
    whole = pytestconfig.getoption("--whole")
    some = dict.fromkeys([n for n in NAMES if n.startswith(IMAGES)] + NAMES[::9])
    for found, tried in st.simulate(2, sweep, NAMES if whole else list(some), 4 if whole else 1):
        assert not found
        assert tried > 500
