"""Samples of any structure as one batch, as torch's DataLoader has it."""

from collections import UserDict, deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pytest
import torch
from test_containers import MAKE
from torch.distributed.tensor import Shard
from torch.utils.data import default_collate

import shardtensor as st
from shardtensor import containers
from shardtensor import testing as T
from shardtensor.io.collate import collate, moved


def test_collate():
    two = [{"a": torch.ones(2), "b": (1.5, "x")}, {"a": torch.zeros(3), "b": (2.5, "y")}]
    found = collate(two)
    assert [t.shape for t in found["a"]] == [(2,), (3,)]
    assert found["b"][0].tolist() == [1.5, 2.5] and found["b"][1] == ["x", "y"]

    def run():
        mesh = T.make_mesh((2,))
        made = [
            st.distribute_tensor(torch.full((n,), float(n)), mesh, [Shard(0)]) for n in (3, 3, 4)
        ]
        with st.trace() as t:
            batch, kept = collate(made[:2]), collate(made[1:])
        assert not t.sent and isinstance(kept, list)
        return batch.full_tensor()

    assert torch.equal(st.simulate(2, run)[0], torch.full((2, 3), 3.0))


class Pair(NamedTuple):
    a: int
    b: str


@dataclass(frozen=True)
class Sample:
    x: np.ndarray
    weight: float = field(init=False, default=0.5)

    def __post_init__(self):
        assert isinstance(self.x, np.ndarray)


def test_batches_are_those_of_torch():
    samples = [
        {
            "pair": Pair(i, f"n{i}"),
            "array": np.arange(3, dtype=np.float32) + i,
            "big": np.arange(2, dtype=">i4"),
            "scalar": np.float64(i),
            "float": 1.6e9 + i / 4,
            "flag": bool(i),
            "list": [i, torch.tensor(i)],
        }
        for i in range(2)
    ]
    found = collate(samples)
    for s in samples:
        s["big"] = s["big"].astype("i4")
    wanted = default_collate(samples)
    assert type(found["pair"]) is Pair and found["pair"].b == ["n0", "n1"]
    for key in ("array", "big", "scalar", "float", "flag"):
        assert found[key].dtype == wanted[key].dtype and torch.equal(found[key], wanted[key]), key
    assert torch.equal(found["pair"].a, wanted["pair"][0])
    assert all(torch.equal(a, b) for a, b in zip(found["list"], wanted["list"], strict=True))
    batch = moved(collate([Sample(np.ones(2)), Sample(np.zeros(2))]), torch.device("cpu"))
    assert type(batch) is Sample and batch.x.shape == (2, 2) and batch.weight.tolist() == [0.5, 0.5]
    assert collate([None, None]) == [None, None] and collate([np.array("a")] * 2)[1] == "a"
    with pytest.raises(ValueError, match=r"differ in structure: dict of \['a'\], dict of \['b'\]"):
        collate([{"a": 1}, {"b": 1}])


class KeysOnly(dict):
    """As a TensorDict of one sample: a mapping that nobody iterates over."""

    def __iter__(self):
        raise TypeError("iteration over a 0-d tensordict")

    def keys(self):
        return list(super().keys())


def test_mappings_that_have_keys_only():
    samples = [KeysOnly(a=torch.full((2,), i), b=KeysOnly(c=i)) for i in range(3)]
    batch = collate(samples)
    assert type(batch) is KeysOnly and batch["a"].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert batch["b"]["c"].tolist() == [0, 1, 2]
    assert moved(batch, torch.device("cpu"))["a"].equal(batch["a"])
    assert type(moved(samples[0], torch.device("cpu"))) is KeysOnly


def test_containers_stay_what_they_are():
    x, y = torch.ones(2), torch.zeros(2)
    for make in MAKE.values():
        batch = collate([make(x, y), make(y, x)])
        assert type(batch) in (type(make(x, y)), dict)
        assert torch.equal(containers.tensors(batch)[0], torch.stack([x, y]))
        again = moved(batch, torch.device("cpu"))
        assert containers.Form(again) == containers.Form(batch)
    kept = UserDict(x=x)
    kept.of = "here"
    assert collate([kept, kept]).of == "here"
    with pytest.raises(ValueError, match=r"deque of \[0\], \[1\], deque of \[0\]"):
        collate([deque([1, 2]), deque([1])])


def test_masked_numbers_are_refused():
    """As tensors they would be numbers like others."""
    one = np.ma.masked_array([1.0, 2.0], [True, False])
    with pytest.raises(ValueError, match="give x"):
        collate([one, one])
    assert collate([one[1:], one[1:]]).tolist() == [[2.0], [2.0]]
