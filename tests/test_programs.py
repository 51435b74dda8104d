"""Random programs on random specs equal plain PyTorch, in value and gradient.

`make fuzz` tries thousands; CASES sets how many.
"""

import os
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from programs import programs

import shardtensor as st
from shardtensor.ranks.testing import hold

CASES = int(os.environ.get("CASES", "300"))


@pytest.mark.slow
@settings(
    max_examples=CASES, deadline=None, print_blob=True, derandomize="CASES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(programs())
def test_programs(program):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", st.FallbackWarning)
        # atol: a gradient may cancel to nothing but rounding
        hold(program, program.args, program.places, program.mesh, rtol=1e-9, atol=1e-9, gather=True)
