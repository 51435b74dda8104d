"""What a call costs on one rank, in calls of Python functions, which no other program disturbs."""

import growth
import pytest
import torch
import torch.nn.functional as F

KERNEL, SCALE = torch.randn(4, 4, 3, 3), torch.randn(8)
NORM = torch.nn.BatchNorm2d(4)
WEIGHTS = [torch.randn(s) for s in ((16, 8), (8, 16)) * 2]


def mlp(x):
    """Two blocks of linear, gelu, linear, forward and backward."""
    leaves = [w.detach().requires_grad_() for w in WEIGHTS]
    for first, second in zip(leaves[::2], leaves[1::2], strict=True):
        x = x + F.linear(F.gelu(F.linear(x, first)), second)
    x.sum().backward()


def batch_norm(x):
    """A batch norm that learns, forward and backward."""
    NORM(x).sum().backward()


# of an image (1, 4, rows, 8) that is cut along its rows: name -> (call, the most calls of Python)
VIEW = 12
CALLS = {
    "x + x": (lambda x: x + x, 6),
    "F.relu": (lambda x: F.relu(x), 10),
    "F.dropout": (lambda x: F.dropout(x, 0.0), 10),
    "x.relu_()": (lambda x: x.relu_(), 10),
    "x.add_(x)": (lambda x: x.add_(x), 10),
    "linear": (lambda x: F.linear(x, WEIGHTS[0]), 9),
    "layer norm": (lambda x: F.layer_norm(x, (8,), SCALE), 18),
    "softmax": (lambda x: x.softmax(-1), 9),
    "sum": (lambda x: x.sum(), 24),
    "mean": (lambda x: x.mean(), 25),
    "sum of a dim": (lambda x: x.sum(2), 24),
    "mean of a dim": (lambda x: x.mean(2), 25),
    "conv": (lambda x: F.conv2d(x, KERNEL, padding=1), 42),
    "softmax along the cut": (lambda x: x.softmax(2), 44),
    "view": (lambda x: x.view(1, 2, 2, -1, 8), VIEW),
    "reshape": (lambda x: x.reshape(1, 2, 2, -1, 8), VIEW + 1),
    "flatten": (lambda x: x.flatten(0, 1), VIEW),
    "transpose": (lambda x: x.transpose(1, 2), VIEW),
    "swapaxes": (lambda x: x.swapaxes(1, 2), VIEW),
    "permute": (lambda x: x.permute(0, 2, 3, 1), VIEW),
    "movedim": (lambda x: x.movedim(1, 3), VIEW),
    "mT": (lambda x: x.mT, VIEW),
    "squeeze": (lambda x: x.squeeze(0), VIEW),
    "unsqueeze": (lambda x: x.unsqueeze(0), VIEW),
    "expand": (lambda x: x.expand(3, 4, -1, 8), VIEW),
    "select": (lambda x: x.select(1, 0), VIEW),
    "narrow": (lambda x: x.narrow(1, 0, 3), VIEW + 1),
    "chunk": (lambda x: x.chunk(2, 1), VIEW + 2),
    "unbind": (lambda x: x.unbind(1), VIEW + 6),
    "x[:]": (lambda x: x[:], VIEW),
    "x[:, 0]": (lambda x: x[:, 0], VIEW + 1),
    "x[:, 1:3]": (lambda x: x[:, 1:3], VIEW + 2),
    "x[..., None]": (lambda x: x[..., None], VIEW + 1),
    "an MLP, both ways": (mlp, 189),
    # one of them asks whether CUDA's own kernels serve, which tests of those kernels replace, and
    # one, of a gradient that does not lie as the input does, how it lies
    "batch norm, both ways": (batch_norm, 135),
}


@pytest.fixture
def count(monkeypatch, nothing_before, plain_transport):
    """The Python calls of a warm call on one of so many ranks, on which nothing is received."""

    def run(call, ranks):
        monkeypatch.setitem(growth.OPS, "counted", growth.on_image(call))
        with growth.prepared("counted", ranks) as op:
            for _ in range(3):
                op()
            # less the lambdas
            return growth.python_calls(op, ("call",)) - 2

    return run


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_few_calls_of_python_on_any_number_of_ranks(name, count, request):
    if "both ways" in name and request.config.getoption("--backward-apart"):
        pytest.skip("calls of one thread are counted, and here backward has its own")
    call, most = CALLS[name]
    found = [count(call, ranks) for ranks in (8, 64)]
    assert max(found) <= most, found
