"""What a model changes beside its outputs, in parts: generators, objects, its inputs."""

import copy
import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.errors import RankError


class Call(nn.Module):
    """A convolution, and what a test does with its result."""

    def __init__(self, then):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.then = nn.Conv2d(1, 2, 3, padding=1).double(), then

    def forward(self, x, *rest):
        return self.then(self, self.conv(x), x, *rest)


def pair(then, tmp_path):
    model = Call(then)
    return model, st.tiled(copy.deepcopy(model), 2, 2, memory=2**20, spill=tmp_path)


X = torch.randn(1, 1, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_generators_draw_on_as_in_the_plain_call(tmp_path):
    """Given, and the model's own: all parts draw the same, and the next call others."""

    def noisy(self, y, x, generator):
        a, b = (torch.randn(x.shape, generator=g, dtype=x.dtype) for g in (generator, self.own))
        return y + a + 2 * b

    model, run = pair(noisy, tmp_path)
    model.own, run.model.own = (torch.Generator().manual_seed(1) for _ in "ab")
    given = [torch.Generator().manual_seed(2) for _ in "ab"]
    for _ in range(2):
        torch.testing.assert_close(run(X, given[0]), model(X, given[1]), rtol=0, atol=1e-12)
    assert torch.equal(*(g.get_state() for g in given))


def test_what_a_part_changes_is_its_own(tmp_path):
    @dataclass
    class Counter:
        n: int = 0

    def counts(self, y, x, counter):
        counter.n += 1
        return y * counter.n

    model, run = pair(counts, tmp_path)
    torch.testing.assert_close(run(X, Counter()), model(X, Counter()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("grad", [False, True])
def test_a_buffer_that_becomes_a_result_is_whole(tmp_path, grad):
    def keeps(self, y, x):
        self.last = (y + self.last).detach()
        return y * self.last

    model, run = pair(keeps, tmp_path)
    for m in (model, run.model):
        m.register_buffer("last", torch.ones(1, 2, 7, 4, dtype=torch.float64))
    run.memory = 2**7
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            torch.testing.assert_close(run(X), model(X), rtol=0, atol=1e-12)
    torch.testing.assert_close(run.model.last, model.last, rtol=0, atol=1e-12)


def test_an_input_that_is_written_to_is_written_to(tmp_path):
    model, run = pair(lambda self, y, x: y + x.add_(1).sum(), tmp_path)
    given = [X.clone(), X.clone()]
    torch.testing.assert_close(run(given[0]), model(given[1]), rtol=0, atol=1e-12)
    torch.testing.assert_close(*given, rtol=0, atol=0)


def test_what_raises_changes_nothing(tmp_path):
    """Of the caller's, also what ranks have written that had ended before another raised."""

    def writes(self, y, x, generator, fails):
        self.last += x.add_(torch.rand(x.shape, generator=generator)).mean()
        if fails:
            raise KeyError("late")
        return y

    def late(model, mesh):
        x = st.distribute_tensor(X.clone(), mesh, [Shard(2)])
        model(x, torch.Generator().manual_seed(1), False).sum().backward()
        if mesh.get_rank() == 1:
            raise KeyError("late")

    _, run = pair(writes, tmp_path)
    run.model.register_buffer("last", torch.zeros((), dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    given, states = X.clone(), [generator.get_state(), torch.get_rng_state()]
    for call in (lambda: run(given, generator, True), lambda: run.run(late)):
        with pytest.raises(RankError, match="late"):
            call()
    assert given.equal(X) and run.model.last == 0 and run.model.conv.weight.grad is None
    assert all(map(torch.equal, states, [generator.get_state(), torch.get_rng_state()]))
    run(given, generator, False)
    assert not given.equal(X) and run.model.last != 0


@pytest.mark.parametrize("made", [False, True])
def test_what_is_written_to_in_inference_mode(tmp_path, made):
    """An input is as after the plain call; what each part has whole is refused."""
    model, run = pair(lambda self, y, x, z: y + x.add_(1).sum(), tmp_path)
    with torch.inference_mode(made):
        given, z = [X.clone(), X.clone()], torch.ones(1, dtype=X.dtype)
    with torch.inference_mode():
        torch.testing.assert_close(run(given[0], z), model(given[1], z), rtol=0, atol=1e-12)
        torch.testing.assert_close(*given, rtol=0, atol=0)
        _, run = pair(lambda self, y, x, z: y * z.mul_(2), tmp_path)
        with pytest.raises(RankError, match="that each part has whole"):
            run(given[0], z)


def test_what_parts_cannot_have_alone_is_refused(tmp_path):
    class Box:
        def __init__(self, y):
            self.y = y

    def raises(match, then, *rest, prepare=lambda model: None):
        _, run = pair(then, tmp_path)
        prepare(run.model)
        with pytest.raises(RankError, match=match):
            run(X, *rest)

    def clipped(self, y, x):
        with torch.no_grad():
            self.conv.weight.clamp_(max=0.1)
        return y

    learnt = torch.ones(1, dtype=torch.float64, requires_grad=True)
    raises("each part has whole", lambda self, y, x, n: y * n.add_(1), torch.ones(1).double())
    raises("in another argument", lambda self, y, x, view: y + x.add_(1), X)
    raises("its parameter conv.weight", clipped)
    raises("use up a generator", lambda self, y, x, it: y * sum(it), (i for i in range(3)))
    raises("tensors in a Box", lambda self, y, x: Box(y))
    raises("is no parameter", lambda self, y, x, box: y * box.y, Box(learnt))
    raises(
        "is no parameter", lambda self, y, x: y * self.w, prepare=lambda m: setattr(m, "w", learnt)
    )


def test_calls_of_several_threads_take_turns(tmp_path):
    model, run = pair(lambda self, y, x: y.mean(), tmp_path)
    found = {}
    calls = [
        threading.Thread(target=lambda i=i: found.update({i: run(X + i).item()})) for i in range(3)
    ]
    for c in calls:
        c.start()
    for c in calls:
        c.join()
    assert found == {i: pytest.approx(model(X + i).item(), abs=1e-12) for i in range(3)}
