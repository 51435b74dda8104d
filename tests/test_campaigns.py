"""No case of a campaign is wrong, parts the ranks or crashes; CASES sets how many are tried."""

import os

import campaigns
import pytest

CASES = int(os.environ.get("CASES", "60"))


@pytest.mark.slow
@pytest.mark.parametrize("name", campaigns.names())
def test_campaign(name, record_property):
    tally = campaigns.run(name, range(CASES // campaigns.cost(name)))
    record_property("campaign", str(tally))
    # a campaign in which nothing runs shows nothing
    assert tally.counts["right"] >= tally.counts.total() // 10, str(tally)
    assert not tally.bad, "\n".join([str(tally), *tally.bad])


def test_a_case_is_reproducible():
    for name in campaigns.names():
        module = campaigns.importlib.import_module(f"campaigns.{name}")
        assert repr(campaigns.drawn(module, 3)) == repr(campaigns.drawn(module, 3))


class _Fixed:
    mesh = (2,)

    def __init__(self, serial, sharded):
        self.serial, self.sharded = serial, lambda mesh: sharded(mesh.get_local_rank())


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("serial", "sharded", "kind"),
    [
        (lambda: 1, lambda rank: 1, "right"),
        (lambda: 1, lambda rank: 2, "wrong"),
        (lambda: 1, lambda rank: 1 + rank, "wrong"),
        (lambda: 1, lambda rank: _raise(KeyError("k")), "crashed"),
        (lambda: 1, lambda rank: _raise(campaigns.st.UnsupportedOpError("no")), "refused"),
        (lambda: 1, lambda rank: _raise(ValueError("v")) if rank else 1, "parted"),
        (lambda: _raise(ValueError("v")), lambda rank: _raise(ValueError("w")), "both raise"),
        (lambda: _raise(ValueError("v")), lambda rank: 1, "wrong"),
        (lambda: _raise(ValueError("v")), lambda rank: _raise(KeyError("k")), "crashed"),
    ],
)
def test_verdicts(serial, sharded, kind):
    assert campaigns.judge(_Fixed(serial, sharded)).kind == kind
