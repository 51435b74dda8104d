"""Models whose functions close over them: what runs in `check` is a copy, of which they are."""

import weakref

import pytest
import torch
from torch import nn

import shardtensor as st
from shardtensor.plan.check.copies import copied


class Hooked(nn.Module):
    """What a hook kept of one layer goes through another."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)
        self.kept, self.calls = {}, 0
        getattr(self, kind)()

    def keep(self, name, out):
        self.kept[name] = out
        self.calls += 1

    def over_self(self):
        self.first.register_forward_hook(lambda m, given, out: self.keep("x", out))

    def over_its_dict(self):
        kept = self.kept
        self.first.register_forward_hook(lambda m, given, out: kept.update(x=out))

    def made(self):
        def hook(name):
            return lambda m, given, out: self.keep(name, out)

        self.first.register_forward_hook(hook("x"))

    def default(self):
        self.first.register_forward_hook(lambda m, given, out, me=self: me.keep("x", out))

    def weakly(self):
        me = weakref.ref(self)
        self.first.register_forward_hook(lambda m, given, out: me().keep("x", out))

    def before(self):
        self.over_self()
        self.first.register_forward_pre_hook(lambda m, given: (given[0] * self.last.bias.sum(),))

    def replaced(self):
        forward = self.first.forward

        def scaled(x):
            return forward(x) * self.last.weight.mean()

        self.first.forward = lambda x: scaled(x)
        self.over_self()

    def forward(self, x):
        self.first(x)
        return self.last(self.kept["x"])


KINDS = "over_self", "over_its_dict", "made", "default", "weakly", "before", "replaced"


@pytest.mark.parametrize("kind", KINDS)
def test_right(kind):
    torch.manual_seed(0)
    model = Hooked(kind)
    st.testing.assert_parallel(model, torch.randn(1, 2, 6, 4), mesh_shapes=[(2,)])
    assert not model.kept and not model.calls


def test_what_functions_share_they_share_in_the_copy():
    model, turns = nn.Identity(), 0

    def count(*_):
        nonlocal turns
        turns += 1

    def again(n):
        return n and again(n - 1)

    model.register_forward_hook(count)
    model.tell, model.again, model.plain = [lambda: turns], again, copied
    twin = copied(model)
    twin(torch.ones(1))
    assert (twin.tell[0](), model.tell[0](), turns) == (1, 0, 0)
    assert twin.again is not again and twin.again(3) == 0 and twin.plain is copied
