"""Shapes, dims, indices, dtypes, writes and gradients: torch's own errors."""

import torch
import torch.nn.functional as F
from torch import nn

from .table import image, torchs, whole

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
