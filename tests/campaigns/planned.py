"""Ops of several operands whose dims meet: products, solvers, losses, tables, searching, layers, at any places."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from placing import Placed, placed
from torch import Tensor

D = torch.float64
Drawn = tuple[Callable[..., Any], list[Tensor], dict[str, Any]]


def draw(rng: random.Random) -> Placed:
    name = rng.choice(list(KINDS))
    fn, tensors, options = KINDS[name](rng)
    return placed(rng, name, fn, tensors, **options)


def _grads(rng: random.Random, *tensors: Tensor) -> list[Tensor]:
    return [x.requires_grad_(x.is_floating_point() and rng.random() < 0.7) for x in tensors]


def _some(rng: random.Random, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=D)


def _size(rng: random.Random) -> int:
    return rng.choice((1, 2, 3, 5, 6))


def _lead(rng: random.Random) -> tuple[int, ...]:
    return rng.choice(((), (3,), (5,), (2, 3), (4, 1)))


def _shared(rng: random.Random, lead: tuple[int, ...]) -> tuple[int, ...]:
    """What broadcasts against lead."""
    kept = lead[rng.randint(0, len(lead)) :]
    return tuple(1 if rng.random() < 0.3 else n for n in kept)


# products -----------------------------------------------------------------------------------------


def _einsum(rng: random.Random) -> Drawn:
    sizes = {c: _size(rng) for c in "abcde"}
    terms = ["".join(rng.sample("abcde", rng.randint(1, 3))) for _ in range(rng.randint(2, 3))]
    every = sorted(set("".join(terms)))
    out = "".join(rng.sample(every, rng.randint(0, min(3, len(every)))))
    text = f"{','.join(terms)}->{out}"
    given = [_some(rng, *(sizes[c] for c in t)) for t in terms]
    return lambda *x: torch.einsum(text, *x), _grads(rng, *given), {}


def _matmul(rng: random.Random) -> Drawn:
    lead, (i, k, j) = _lead(rng), (_size(rng) for _ in range(3))
    a, b = _some(rng, *lead, i, k), _some(rng, *_shared(rng, lead), k, j)
    return torch.matmul, _grads(rng, a, b), {}


def _linear(rng: random.Random) -> Drawn:
    k, n = _size(rng), _size(rng)
    given = _grads(rng, _some(rng, *_lead(rng), 4, k), _some(rng, n, k), _some(rng, n))
    return F.linear, given[: rng.randint(2, 3)], {}


def _cdist(rng: random.Random) -> Drawn:
    lead, m = _lead(rng), _size(rng)
    a = _some(rng, *lead, _size(rng), m)
    b = _some(rng, *_shared(rng, lead), _size(rng), m)
    return torch.cdist, _grads(rng, a, b), {"p": rng.choice((1.0, 2.0))}


# linear algebra -----------------------------------------------------------------------------------


def _regular(rng: random.Random, lead: tuple[int, ...], n: int) -> Tensor:
    return _some(rng, *lead, n, n) + 4 * torch.eye(n, dtype=D)


SOLVERS: dict[str, Callable[..., Any]] = {
    "solve": torch.linalg.solve,
    "lu_solve": lambda A, B: torch.linalg.lu_solve(*torch.linalg.lu_factor(A), B),
    "cholesky_solve": lambda A, B: torch.cholesky_solve(B, torch.linalg.cholesky(A @ A.mT)),
    "triangular": lambda A, B: torch.linalg.solve_triangular(A, B, upper=True),
    "lstsq": lambda A, B: torch.linalg.lstsq(A, B).solution,
}
FACTORS: dict[str, Callable[..., Any]] = {
    "inv": torch.linalg.inv, "det": torch.linalg.det, "slogdet": torch.linalg.slogdet,
    "cholesky": lambda A: torch.linalg.cholesky(A @ A.mT), "qr": torch.linalg.qr,
    "svdvals": torch.linalg.svdvals, "eigvalsh": lambda A: torch.linalg.eigvalsh(A + A.mT),
    "lu": torch.linalg.lu, "pinv": torch.linalg.pinv, "matrix_exp": torch.linalg.matrix_exp,
    "lu_factor": torch.linalg.lu_factor,
}  # fmt: skip


def _solve(rng: random.Random) -> Drawn:
    lead, n = _lead(rng), rng.choice((1, 2, 4))
    A = _regular(rng, lead, n)
    B = _some(rng, *lead, n, _size(rng))
    return SOLVERS[rng.choice(list(SOLVERS))], _grads(rng, A, B), {}


def _factor(rng: random.Random) -> Drawn:
    A = _regular(rng, _lead(rng), rng.choice((1, 2, 4)))
    return FACTORS[rng.choice(list(FACTORS))], _grads(rng, A), {}


def _cross(rng: random.Random) -> Drawn:
    shape = [_size(rng) for _ in range(rng.randint(1, 3))]
    d = rng.randrange(len(shape))
    shape[d] = 3 if rng.random() < 0.9 else 4
    other = [1 if i != d and rng.random() < 0.2 else n for i, n in enumerate(shape)]
    return torch.linalg.cross, _grads(rng, _some(rng, *shape), _some(rng, *other)), {"dim": d}


# losses and tables --------------------------------------------------------------------------------


def _classes(rng: random.Random) -> Drawn:
    n, c = _size(rng), rng.choice((2, 3, 5))
    places = rng.choice(((), (), (4,), (2, 3)))
    alone = not places and rng.random() < 0.2
    x = _some(rng, c) if alone else _some(rng, n, c, *places)
    t = torch.randint(0, c, () if alone else (n, *places))
    if rng.random() < 0.3:
        t = t.masked_fill(torch.rand(t.shape) < 0.4, -100)
    given = [*_grads(rng, x), t]
    options: dict[str, Any] = {"reduction": rng.choice(("none", "mean", "sum"))}
    if rng.random() < 0.4:
        given.append(torch.rand(c, dtype=D) + 0.1)
    if rng.random() < 0.3:
        options["label_smoothing"] = 0.2
    return F.cross_entropy, given, options


def _margin(rng: random.Random) -> Drawn:
    n, c = _size(rng), rng.choice((2, 3, 5))
    reduction = rng.choice(("none", "mean", "sum"))
    if rng.random() < 0.5:
        fn, t = F.multi_margin_loss, torch.randint(0, c, (n,))
    else:
        fn, t = F.multilabel_margin_loss, torch.randint(-1, c, (n, c))
    return fn, [*_grads(rng, _some(rng, n, c)), t], {"reduction": reduction}


def _embedding(rng: random.Random) -> Drawn:
    table = _some(rng, rng.choice((3, 5, 7)), _size(rng))
    at = torch.randint(0, len(table), _lead(rng))
    options = {"padding_idx": rng.randrange(len(table))} if rng.random() < 0.4 else {}
    return F.embedding, [at, *_grads(rng, table)], options


# searching and masks ------------------------------------------------------------------------------


def _search(rng: random.Random) -> Drawn:
    lead = rng.choice(((), (), (3,), (2, 3)))
    known = torch.randn(*lead, _size(rng), dtype=D).sort(-1)[0]
    shape = (*lead, _size(rng)) if lead else rng.choice(((), (4,), (3, 5)))
    return torch.searchsorted, [known, torch.randn(shape, dtype=D)], {"right": rng.random() < 0.5}


def _isin(rng: random.Random) -> Drawn:
    x, tests = (torch.randint(0, 9, rng.choice(((), (5,), (3, 4), (0,)))) for _ in range(2))
    return torch.isin, [x, tests], {"invert": rng.random() < 0.5}


def _repeats(rng: random.Random) -> Drawn:
    x = _some(rng, *(_size(rng) for _ in range(rng.randint(1, 3))))
    d = rng.randrange(x.ndim)
    times = torch.randint(0, 3, (x.shape[d],))
    return lambda x, t: x.repeat_interleave(t, d), [*_grads(rng, x), times], {}


def _mask(rng: random.Random) -> Drawn:
    x = _some(rng, *(_size(rng) for _ in range(rng.randint(1, 3))))
    d = rng.randrange(x.ndim)
    mask = torch.rand(x.shape[d:][: rng.randint(1, 2)]) < 0.5
    return lambda x, m: x[(slice(None),) * d + (m,)], [*_grads(rng, x), mask], {}


# layers -------------------------------------------------------------------------------------------


def _recurrent(rng: random.Random) -> Drawn:
    kind = rng.choice(("gru", "lstm", "rnn_tanh"))
    steps, n, width, hidden = _size(rng), _size(rng), 3, 2
    first = rng.random() < 0.5
    gates = {"gru": 3, "lstm": 4, "rnn_tanh": 1}[kind] * hidden
    x = _some(rng, *((n, steps) if first else (steps, n)), width)
    states = [_some(rng, 1, n, hidden) for _ in range(2 if kind == "lstm" else 1)]
    weights = [_some(rng, gates, width), _some(rng, gates, hidden)]

    def run(x: Tensor, *rest: Tensor) -> Any:
        *states, a, b = rest
        hx = states if kind == "lstm" else states[0]
        return getattr(torch, kind)(x, hx, [a, b], False, 1, 0.0, False, False, first)

    return run, _grads(rng, x, *states, *weights), {}


def _cell(rng: random.Random) -> Drawn:
    kind = rng.choice(("gru_cell", "lstm_cell", "rnn_tanh_cell"))
    n, width, hidden = _size(rng), 3, 2
    gates = {"gru_cell": 3, "lstm_cell": 4, "rnn_tanh_cell": 1}[kind] * hidden
    states = [_some(rng, n, hidden) for _ in range(2 if kind == "lstm_cell" else 1)]
    weights = [_some(rng, gates, width), _some(rng, gates, hidden)]

    def run(x: Tensor, *rest: Tensor) -> Any:
        *states, a, b = rest
        return getattr(torch, kind)(x, states if kind == "lstm_cell" else states[0], a, b)

    return run, _grads(rng, _some(rng, n, width), *states, *weights), {}


def _grid_sample(rng: random.Random) -> Drawn:
    n, rows = _size(rng), [rng.choice((1, 2, 5)) for _ in range(2)]
    x = _some(rng, n, _size(rng), *rows)
    at = torch.rand(n, *(rng.choice((1, 3, 4)) for _ in range(2)), 2, dtype=D) * 2.4 - 1.2
    return F.grid_sample, _grads(rng, x, at), {"align_corners": rng.random() < 0.5}


KINDS: dict[str, Callable[[random.Random], Drawn]] = {
    "einsum": _einsum, "matmul": _matmul, "linear": _linear, "cdist": _cdist, "solve": _solve,
    "factor": _factor, "cross": _cross, "classes": _classes, "margin": _margin,
    "embedding": _embedding, "search": _search, "isin": _isin, "repeats": _repeats, "mask": _mask,
    "recurrent": _recurrent, "cell": _cell, "grid_sample": _grid_sample,
}  # fmt: skip
