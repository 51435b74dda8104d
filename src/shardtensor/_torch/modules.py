# mypy: disable-error-code="assignment"
"""Private torch APIs of modules: calls with other tensors in the place of their parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn.utils import stateless

from .dispatcher import hide_from_dynamo


def install(given: Callable[[Any, Any], Any]) -> None:
    """Map the tensors of torch.func.functional_call: given(module, tensors by name)."""
    call = stateless._functional_call

    def run(module: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        return call(module, given(module, tensors), *args, **kwargs)

    hide_from_dynamo(run)
    stateless._functional_call = run
