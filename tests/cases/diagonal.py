"""Triangles and diagonals, and what copies views."""

import torch

from .table import case, cases, integers, normal

OFFSETS = (-9, -2, 0, 1, 3)
MATRIX = {
    "tril": torch.tril,
    "triu": torch.triu,
    "diagonal": lambda x, k: x.diagonal(k, -2, -1),
    "turned": lambda x, k: x.diagonal(k, -1, -2),
    "linalg": lambda x, k: torch.linalg.diagonal(x, offset=k),
    "copy": lambda x, k: torch.diagonal_copy(x, k, 1, 2),
}
COPIES = {
    "view_copy": lambda x: torch.view_copy(x, (4, 6)),
    "expand_copy": lambda x: torch.expand_copy(x, (2, 4, 2, 3)),
    "permute_copy": lambda x: torch.permute_copy(x, (2, 0, 1)),
    "transpose_copy": lambda x: torch.transpose_copy(x, 0, 2),
    "squeeze_copy": lambda x: torch.squeeze_copy(torch.unsqueeze_copy(x, 1), 1),
    "unfold_copy": lambda x: torch.unfold_copy(x, 0, 3, 1),
    "alias_copy": lambda x: torch.alias_copy(x),
    "select_copy": lambda x: torch.select_copy(x, 0, 2),
    "complex_copy": lambda x: torch.view_as_complex_copy(x[..., :2].detach().contiguous()),
    "real_copy": lambda x: torch.view_as_real_copy(torch.complex(x, x + 1)),
    "slice_copy": lambda x: torch.slice_copy(x, 0, 1, 3),
    "unbind_copy": lambda x: torch.unbind_copy(x, 1),
    "split_copy": lambda x: torch.split_copy(x, 2),
    "split_with_sizes_copy": lambda x: torch.split_with_sizes_copy(x, (1, 3)),
    "t_copy": lambda x: torch.t_copy(x[:, 0]),
    "diagonal_copy": lambda x: torch.diagonal_copy(x),
    "fill": lambda x: x.fill_(2.0) if not x.requires_grad else torch.fill(x, 2.0),
}


def offsets(fn):
    return lambda x: [fn(x, k) for k in OFFSETS]


def embedded(x):
    dims = ((-2, -1), (0, 2), (2, 0), (1, 0))
    return [torch.diag_embed(x, k, *d) for k in OFFSETS for d in dims]


def filled(x):
    tall, cube = (x[:, 1].T * 1).contiguous(), x[:, :2, :2] * 1
    whole = [tall.clone().fill_diagonal_(2.5, wrap) for wrap in (False, True)]
    return *whole, tall.T.contiguous().fill_diagonal_(-1.0), cube.fill_diagonal_(3.0)


EMBED = {
    "diag_embed": embedded,
    "diag of a vector": offsets(lambda x, k: torch.diag(x[0], k)),
    "diag": offsets(torch.diag),
    "diagflat": offsets(torch.diagflat),
    "trace": torch.trace,
}

for shape in ((2, 7, 5), (2, 5, 7)):
    cases(f"diagonal of {shape}", {k: offsets(f) for k, f in MATRIX.items()}, normal(*shape))
cases("diagonal of bools", {k: offsets(MATRIX[k]) for k in ("tril", "triu", "diagonal")},
      normal(2, 7, 5) > 0, dims=[(1, 2)], grad=False)  # fmt: skip
cases("diagonal", EMBED, normal(3, 6))
case("fill_diagonal_", normal(2, 3, 7), name="tall, wide and a cube")(filled)
case("trace", integers(-9, 9, 6, 6), grad=False, name="integers")(torch.trace)
case("block_diag", normal(4, 3), normal(2, 5), normal(2, 2), normal(3), name="four")(
    torch.block_diag
)
cases("copy", COPIES, normal(4, 2, 3))
