"""Specs: sizes, offsets, nesting, equality, refusals."""

import random
from itertools import chain, pairwise

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard

from shardtensor import Spec, comm, simulate
from shardtensor.cuts import chunk_sizes, nested_chunk_sizes
from shardtensor.ranks.testing import make_mesh
from shardtensor.spec import Dim, axes_in, whole_dims


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


# verbs -------------------------------------------------------------------------------------------


def _dims(count):
    """Dims that mesh axes cut: uneven, empty, of one shard, nested, whole."""
    rng = random.Random(count)
    for _ in range(count):
        n = rng.choice([1, 2, 3, 4, 6])
        sizes = tuple(rng.choice([0, 1, 2, 5]) for _ in range(n))
        yield Dim(sum(sizes), rng.choice([(0,), (1,), (0, 1)]), sizes)
    yield Dim(5)
    yield Dim(0)


@pytest.mark.parametrize("dim", _dims(40), ids=str)
def test_verbs_of_a_dim_say_where_rows_are(dim):
    rows = list(range(dim.size))
    parts = [rows[a:b] for a, b in dim.spans]
    assert list(chain(*parts)) == rows
    assert [len(p) for p in parts] == list(dim.sizes or (dim.size,))
    assert dim.whole == Dim(dim.size) and dim.is_cut == (len(parts) > 1)
    for start in range(dim.size + 1):
        for stop in range(start, dim.size + 1):
            kept = dim.clipped(start, stop)
            assert kept.axes == dim.axes and kept.size == stop - start
            found = [list(range(a + start, b + start)) for a, b in kept.spans]
            assert found == [[r for r in part if start <= r < stop] for part in parts]
    for times in range(4):
        grown = dim.scaled(times)
        each = [[r for r in part for _ in range(times)] for part in parts]
        assert [b - a for a, b in grown.spans] == [len(e) for e in each]
        assert grown.size == sum(map(len, each)) and grown.axes == dim.axes
        if times:
            assert grown.scaled(1, times) == dim
    edges = [0, *(min(r, 3) for r in dim.offsets[1:-1]), 7]
    assert dim.cut_at(edges) == (
        Dim(7, dim.axes, tuple(b - a for a, b in pairwise(edges))) if dim.axes else Dim(7)
    )


def verbs_of_a_spec():
    mesh = make_mesh((2, 2))
    a, b, c = Dim(5, (0,), (4, 1)), Dim(3), Dim(7, (1,), (0, 7))
    spec, new = Spec(mesh, (a, b, c)), Dim(2)
    assert Spec.whole(mesh, (5, 3)) == Spec.of(mesh, [Replicate(), Replicate()], (5, 3))
    assert Dim.chunked(7, (0, 1), mesh) == Spec.of(mesh, [Shard(0), Shard(0)], (7,)).dims[0]
    assert Dim.chunked(7, (), mesh) == Dim(7) and whole_dims((5, 3)) == (Dim(5), Dim(3))
    assert axes_in([c, b, a]) == (0, 1)
    assert spec.replace({1: new, -1: b}).dims == (a, new, b) and spec.replace({}) == spec
    assert [spec.insert(d, new).dims.index(new) for d in range(4)] == [0, 1, 2, 3]
    assert spec.drop([0, -1]).dims == (b,) and spec.drop([]) == spec
    assert spec.whole_in([0, 1]).dims == (a.whole, b, c)
    for verb in (lambda s: s.replace({0: new}), lambda s: s.insert(1, new), lambda s: s.drop([0])):
        assert verb(Spec(mesh, (b, a), ((1, "sum"),))).partial == ((1, "sum"),)
    for (start, stop), first, n in zip(spec.spans, spec.offset, spec.local_shape, strict=True):
        assert (start, stop - start) == (first, n)
    here = list(spec.coordinate)
    for axes in ((), (0,), (1,), (0, 1)):
        name = comm.group(mesh, axes)
        places = spec.places(axes)
        assert len(places) == comm.size(name) and list(places[comm.rank(name)]) == here
        assert [mesh.mesh[at].item() for at in places] == list(comm.groups.members(name))
        assert spec.spans_at(places[comm.rank(name)]) == spec.spans
    assert comm.along(spec, 0) == comm.group(mesh, (0,)) and comm.along(spec, 1) == "self"
    assert comm.along(spec, 0, 2) == comm.group(mesh, (0, 1))


def test_verbs_of_a_spec():
    simulate(4, verbs_of_a_spec)
