"""Specs: sizes, offsets, nesting, equality, refusals."""

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard

from shardtensor import Spec, simulate
from shardtensor.ranks.testing import make_mesh
from shardtensor.spec import chunk_sizes, nested_chunk_sizes


def test_chunk_sizes_are_torchs():
    for n in range(12):
        for parts in range(1, 6):
            chunks = [c.numel() for c in torch.arange(n).chunk(parts)] if n else []
            assert chunk_sizes(n, parts) == tuple(chunks + [0] * (parts - len(chunks)))


def test_nested_sizes():
    assert nested_chunk_sizes(7, [2, 2]) == (2, 2, 2, 1)
    assert nested_chunk_sizes(3, [2, 2]) == (1, 1, 1, 0)


def on_mesh():
    mesh = make_mesh((2, 2))
    nested = Spec.of(mesh, [Shard(1), Shard(1)], (3, 7), {1: (4, 0, 1, 2)})
    crossed = Spec.of(mesh, [Shard(-1), Shard(0)], [3, 7])
    partial = Spec.of(mesh, [Partial(), Shard(0)], (3, 7))
    assert nested.dims[1].axes == (0, 1) and nested.shape == (3, 7)
    assert crossed.placements == (Shard(1), Shard(0)) and crossed.sizes == {0: (2, 1), 1: (4, 3)}
    assert partial.placements == (Partial(), Shard(0))
    assert partial.cotangent.placements == (Replicate(), Shard(0))
    assert crossed.varying == (0, 1) and partial.varying == (1,)
    twin = Spec.of(mesh, (Shard(1), Shard(1)), torch.Size((3, 7)), {1: [4, 0, 1, 2]})
    assert twin == nested and hash(twin) == hash(nested) and twin != crossed
    assert "[4, 0, 1, 2]" in repr(nested)
    with pytest.raises(AttributeError):
        nested.dims = ()
    for bad, message in [
        (([Shard(0)], (3, 7)), "2 axes"),
        (([Shard(2), Replicate()], (3, 7)), "2 dims"),
        (([Shard(0), Replicate()], (3, 7), {0: (1, 1)}), "add up to 3"),
        (([Shard(0), Replicate()], (3, 7), {0: (1, 1, 1)}), "2 sizes"),
        (([Shard(0), Replicate()], (3, 7), {0: (4, -1)}), "add up"),
        (([Shard(0), Replicate()], (3, 7), {1: (4, 3)}), "no mesh axis"),
        ((["row", Replicate()], (3, 7)), "placement"),
    ]:
        with pytest.raises(ValueError, match=message):
            Spec.of(mesh, *bad)
    return nested.offset, nested.local_shape, crossed.offset, crossed.local_shape


def test_each_rank_knows_its_block():
    assert simulate(4, on_mesh) == [
        ((0, 0), (3, 4), (0, 0), (2, 4)),
        ((0, 4), (3, 0), (2, 0), (1, 4)),
        ((0, 4), (3, 1), (0, 4), (2, 3)),
        ((0, 5), (3, 2), (2, 4), (1, 3)),
    ]
