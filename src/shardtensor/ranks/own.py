"""What a process has once and each simulated rank of its own: random states, torch's switches."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch.backends import cuda, cudnn

from .._torch.attention import sdp_priority, set_sdp_priority
from .._torch.modules import cache_weights, cached_weights

# what a `with` or a call switches for the whole process: how it is read, and set
_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda x: torch.autograd.set_detect_anomaly(*x),
    ),
    (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda x: torch.use_deterministic_algorithms(x[0], warn_only=x[1]),
    ),
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.math_sdp_enabled, cuda.enable_math_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    (sdp_priority, set_sdp_priority),
    (
        lambda: (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        lambda x: cudnn.set_flags(x[0], x[1], _deterministic=x[2]),
    ),
)


def switches() -> tuple[Any, ...]:
    """How this process has them."""
    return tuple(read() for read, _ in _SWITCHES)


def switch(wanted: tuple[Any, ...]) -> None:
    """Set those that are otherwise."""
    for (read, put), x in zip(_SWITCHES, wanted, strict=True):
        if read() != x:
            put(x)


def random_states() -> tuple[Any, ...]:
    """Of all generators that a program draws from unless it says another; no device is asked."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), random.getstate(), numpy.random.get_state(), gpus


def restore(states: tuple[Any, ...]) -> None:
    """Let all of them go on from there."""
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    numpy.random.set_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state_all(states[3])


def held() -> tuple[Any, ...]:
    """All that another rank may change."""
    return random_states(), cached_weights(), switches()


def take_up(own: tuple[Any, ...]) -> None:
    """Go on with what was held."""
    restore(own[0])
    cache_weights(*own[1])
    switch(own[2])
