"""What tests of the loader share: samples that need no file, and their mesh."""

from shardtensor.ranks.testing import make_mesh


class Numbers:
    """Numbers, which nothing has to be read for."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return i


def mesh_of(shape):
    """A mesh of data and domain, or of domain alone."""
    return make_mesh(shape, names=("data", "domain")[-len(shape) :])
