"""Which samples a loader reads: few, of other samplers, after a resume; and what it refuses."""

from itertools import chain

import pytest
import torch
from samples import Numbers, mesh_of
from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler

import shardtensor as st
from shardtensor.io import DomainSampler, Loader


def epochs(n, shape, batch_size, **options):
    mesh = mesh_of(shape)
    if options:
        options = {"sampler": DomainSampler(n, mesh, **options)}
    loader = Loader(Numbers(n), mesh, batch_size=batch_size, **options)
    found = [b.tolist() for b in loader]
    assert len(found) == len(loader)
    return found


@pytest.mark.parametrize("n, shape, sizes", [(3, (1, 1), [3]), (5, (2, 1), [3]), (1, (3, 1), [1])])
def test_a_dataset_smaller_than_a_round(n, shape, sizes):
    ranks = st.simulate(shape[0], epochs, n, shape, 4)
    assert all([len(b) for b in found] == sizes for found in ranks)
    assert {i for found in ranks for b in found for i in b} == set(range(n))


def test_the_last_batch():
    def run(drop_last):
        return st.simulate(2, lambda: epochs(11, (2, 1), 4, drop_last=drop_last))

    keep, drop = run(False), run(True)
    assert [[len(b) for b in found] for found in keep] == [[4, 2]] * 2
    assert {i for found in keep for b in found for i in b} == set(range(11))
    assert [[len(b) for b in found] for found in drop] == [[4]] * 2

    def refused():
        with pytest.raises(ValueError, match="5 samples of a domain group make no batch of 6"):
            epochs(11, (2, 1), 6, drop_last=True)

    st.simulate(2, refused)


def test_rounds_are_the_same_for_any_number_of_groups():
    rounds = []
    for groups in (1, 2, 4):
        ranks = st.simulate(groups, epochs, 24, (groups, 1), 4 // groups)
        rounds.append([sorted(chain(*parts)) for parts in zip(*ranks, strict=True)])
    assert rounds[0] == rounds[1] == rounds[2] and len(rounds[0]) == 6


def with_sampler(make, shape):
    mesh = mesh_of(shape)
    rank = mesh.get_coordinate()[0] * shape[1] + mesh.get_coordinate()[1]
    try:
        return [b.tolist() for b in Loader(Numbers(8), mesh, batch_size=2, sampler=make(rank))]
    except ValueError as e:
        return str(e)


def test_samplers_that_part_the_ranks_of_a_sample():
    def distributed(rank):
        return DistributedSampler(range(8), num_replicas=2, rank=rank, shuffle=False)

    def shuffled(rank):
        return RandomSampler(range(8), generator=torch.Generator().manual_seed(rank))

    def longer(rank):
        return SequentialSampler(range(4 + 4 * rank))

    for make, kind in [(distributed, "DistributedSampler"), (shuffled, "RandomSampler")]:
        told = st.simulate(2, with_sampler, make, (1, 2))
        assert told[0] == told[1] and "ranks 0 and 1 hold parts of one sample" in told[0]
        assert kind in told[0] and "io.DomainSampler" in told[0]
    # of ranks of their own each may read what it likes, but as often as the others
    assert st.simulate(2, with_sampler, distributed, (2, 1)) == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]
    told = st.simulate(2, with_sampler, longer, (2, 1))
    assert told[0] == told[1] and "2 batches from 0, 4 batches from 0" in told[0]
    same = st.simulate(2, with_sampler, lambda rank: SequentialSampler(range(8)), (1, 2))
    assert same == [[[0, 1], [2, 3], [4, 5], [6, 7]]] * 2


def test_resumes_on_other_numbers_of_groups():
    def start(shape, batch_size, state=None, **options):
        mesh = mesh_of(shape)
        loader = Loader(
            Numbers(24), mesh, batch_size=batch_size, sampler=DomainSampler(24, mesh, **options)
        )
        if state is not None:
            loader.load_state_dict(state)
            return [b.tolist() for b in loader]
        for i, _ in enumerate(loader):
            if i == 2:
                return loader.state_dict()

    state = st.simulate(2, start, (2, 1), 2)[0]  # 12 samples
    straight = st.simulate(1, start, (1, 1), 4, {"epoch": 0, "done": 0})[0]
    assert st.simulate(1, start, (1, 1), 4, state)[0] == straight[3:]
    parts = st.simulate(3, start, (3, 1), 2, state)
    assert sorted(chain(*chain(*parts))) == sorted(chain(*straight[3:]))

    def refused():
        with pytest.raises(ValueError, match="resume after 12 samples of an epoch, 5 a round"):
            start((1, 1), 5, state)
        with pytest.raises(ValueError, match="resume: seed was 0, this sampler has 1"):
            start((1, 1), 4, state, seed=1)

    st.simulate(1, refused)


class Odd:
    """A sampler whose length is not how many it gives."""

    def __init__(self, length, n):
        self.length, self.n = length, n

    def __len__(self):
        return self.length

    def __iter__(self):
        return iter(range(self.n))


@pytest.mark.parametrize("length, n", [(6, 4), (2, 4), (1, 10**12), (3, 0)])
def test_samplers_that_give_others_than_they_say(length, n):
    told = st.simulate(2, with_sampler, lambda rank: Odd(length, n), (1, 2))
    assert told[0] == told[1] and f"says that it has {length} samples" in told[0]
    # a sampler that is odd on one rank only
    told = st.simulate(2, with_sampler, lambda rank: Odd(length, n if rank else length), (1, 2))
    assert told[0] == told[1] and f"says that it has {length} samples" in told[0]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_one_iterator_at_a_time(prefetch):
    def run():
        mesh = mesh_of((1, 2))
        loader = Loader(Numbers(6), mesh, prefetch=prefetch)
        with pytest.raises(RuntimeError, match="another iterator of it began"):
            for _ in zip(loader, loader, strict=False):
                pass
        first = iter(loader)
        next(first)
        del first
        return len(list(loader))

    assert st.simulate(2, run) == [3, 3]


def test_states_of_something_else():
    def run():
        loader = Loader(Numbers(6), mesh_of((1, 1)))
        good = loader.state_dict()
        for key, value in [
            ("epoch", -1), ("epoch", "a"), ("epoch", None), ("done", -1), ("done", 1.5),
            ("done", torch.tensor(1)), ("round", 0),
        ]:  # fmt: skip
            with pytest.raises(ValueError, match=f"resume: {key} is"):
                loader.load_state_dict({**good, key: value})
        with pytest.raises(ValueError, match="resume: epoch is None"):
            loader.load_state_dict({})
        loader.load_state_dict(good)
        return len(list(loader))

    assert st.simulate(1, run) == [6]


def test_weights_draw_as_often_and_the_same_for_any_number_of_groups():
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0, 4.0])
    weights = weights.repeat(100)

    def drawn(groups):
        def run():
            sampler = DomainSampler(500, mesh_of((groups, 1)), weights=weights, seed=3)
            sampler.set_epoch(2)
            return list(sampler)

        ranks = st.simulate(groups, run)
        return [i for turn in zip(*ranks, strict=True) for i in turn]

    one = drawn(1)
    assert one == drawn(2) == drawn(4) and len(one) == 500
    often = torch.bincount(torch.tensor(one) % 5, minlength=5) / 500
    assert torch.allclose(often, torch.tensor([0, 1, 3, 0, 4]) / 8, atol=0.08)
    assert often[0] == often[3] == 0


def test_weights_may_have_a_history():
    def run():
        weights = torch.tensor([0.0, 1.0, 0.0], requires_grad=True)
        return list(DomainSampler(3, mesh_of((1, 1)), weights=weights.exp() - 1))

    assert st.simulate(1, run) == [[1, 1, 1]]


def test_weights_that_are_none():
    def run():
        for weights in ([1.0] * 4, [1.0, -1.0, 1.0], [0.0] * 3, [float("nan"), 1.0, 1.0]):
            with pytest.raises(ValueError, match="of 3 samples: one number of 0 or more"):
                DomainSampler(3, mesh_of((1, 1)), weights=weights)
        loader = Loader(Numbers(4), mesh_of((1, 1)))
        state = loader.state_dict()
        other = DomainSampler(4, mesh_of((1, 1)), weights=[1, 2, 3, 4])
        with pytest.raises(ValueError, match="resume: weighted was 0"):
            Loader(Numbers(4), mesh_of((1, 1)), sampler=other).load_state_dict(state)

    st.simulate(1, run)
