"""Functions of torch.nn.functional that are answered without their body: what that would do."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.dispatch.direct import DIRECT
from shardtensor.ranks.testing import hold, make_mesh, shard, simulate

X = torch.randn(2, 4, 5, 3, dtype=torch.float64)
ONES = torch.ones(4, dtype=torch.float64)
CALLS = {
    F.relu: [lambda x: F.relu(x), lambda x: F.relu(x, False)],
    F.dropout: [lambda x: F.dropout(x, 0.0), lambda x: F.dropout(x, 0.3, False)],
    F.layer_norm: [
        lambda x: F.layer_norm(x, (5, 3)),
        lambda x: F.layer_norm(x, (3,), ONES[:3] * 2, ONES[:3], 0.1),
    ],
    F.batch_norm: [
        lambda x: F.batch_norm(x, ONES * 0.5, ONES * 3, bias=ONES),
        lambda x: F.batch_norm(x, None, None, ONES * 2, None, True, 0.3, 0.1),
    ],
}


@pytest.mark.parametrize("func", CALLS, ids=lambda f: f.__name__)
def test_direct_calls_give_what_plain_ones_do(func):
    assert CALLS.keys() == DIRECT.keys()
    for call in CALLS[func]:
        hold(call, [X], [shard(2, (1, 4))], (2,))


def test_in_place():
    def run():
        x = st.distribute_tensor(X.clone(), make_mesh((2,)), [Shard(2)])
        assert F.relu(x, inplace=True) is x and F.dropout(x, 0.0, inplace=True) is x
        assert torch.equal(x.full_tensor(), X.relu())

    simulate(2, run)


REFUSED = {
    "dropout of 1.5": lambda x: F.dropout(x, 1.5),
    "training None": lambda x: F.dropout(x, 0.0, None),
    "one value a channel": lambda x: F.batch_norm(x[:1, :, :1, :1], None, None, training=True),
    "negative eps": lambda x: F.batch_norm(x, ONES, ONES, eps=-1.0),
    "no momentum": lambda x: F.batch_norm(x, ONES, ONES, training=True, momentum=None),
    "training 1": lambda x: F.batch_norm(x, ONES, ONES, training=1),
    "shape 3": lambda x: F.layer_norm(x, 3),
    "shape 3.0": lambda x: F.layer_norm(x, (3.0,)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_torch_refuses_is_refused_as_it_does(case):
    def refused(x):
        with pytest.raises((ValueError, TypeError)) as e:
            REFUSED[case](x)
        return e.type, str(e.value)

    def run():
        return refused(st.distribute_tensor(X, make_mesh((2,)), [Shard(2)]))

    assert simulate(2, run) == [refused(X)] * 2


def test_a_rule_of_a_user_for_the_op_serves_the_function():
    seen = []

    @st.rule(torch.relu)
    def _(x):
        seen.append(x.shape)
        return x * 2

    def run():
        x = st.distribute_tensor(X, make_mesh((2,)), [Shard(2)])
        assert torch.equal(F.relu(x).full_tensor(), X * 2)

    try:
        simulate(2, run)
    finally:
        del st.registry.rules[torch.relu]
        st.registry.handlers.clear()
    assert seen
