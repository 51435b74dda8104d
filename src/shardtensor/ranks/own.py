"""What a process has once and each simulated rank of its own: random states, torch's switches."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import backends
from torch.backends import cuda, cudnn, mkldnn

from .._torch.attention import sdp_priority, set_sdp_priority
from .._torch.modules import cache_weights, cached_weights
from .._torch.transforms import dual_level, set_dual_level


def _older(read: Callable[[], Any], put: Callable[[Any], Any]) -> Any:
    """A switch of which torch says nothing where a newer one for the same was set otherwise."""

    def found() -> Any:
        try:
            return read()
        except RuntimeError:
            return None

    def back(x: Any) -> None:
        if x is not None:
            put(x)

    return found, back


def _attribute(of: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return lambda: getattr(of, name), lambda x: setattr(of, name, x)


_has: Any = backends
# those that others follow first
_PRECISIONS = (
    *(_has, _has.cudnn, _has.mkldnn, _has.cuda.matmul, _has.cudnn.conv, _has.cudnn.rnn),
    *(_has.mkldnn.matmul, _has.mkldnn.conv, _has.mkldnn.rnn),
)
# what a `with` or a call switches for the whole process: how it is read, and set
_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (dual_level, set_dual_level),
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
        lambda x: cudnn.set_flags(x[0], x[1], _deterministic=x[2], _fp32_precision=None),
    ),
    (
        lambda: (mkldnn.enabled, mkldnn.deterministic),
        lambda x: mkldnn.set_flags(x[0], x[1], _fp32_precision=None),
    ),
    # these set precisions, too
    _older(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    _older(
        lambda: cudnn.allow_tf32,
        lambda x: cudnn.set_flags(_allow_tf32=x, _fp32_precision=None),
    ),
    *(_attribute(of, "fp32_precision") for of in _PRECISIONS),
    _attribute(cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    _attribute(cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    _attribute(cuda.matmul, "allow_fp16_accumulation"),
)


def switches() -> tuple[Any, ...]:
    """How this process has them."""
    return tuple(read() for read, _ in _SWITCHES)


def switch(wanted: tuple[Any, ...]) -> None:
    """Set those that are otherwise."""
    for (read, put), x in zip(_SWITCHES, wanted, strict=True):
        if read() != x:
            put(x)


def _fields(x: object) -> bytes:
    """What lies in the memory of an object, but for how often it is referred to."""
    head = object.__basicsize__
    return ctypes.string_at(id(x) + head, x.__sizeof__() - head)


def _of_python() -> object:
    return _fields(random._inst), *vars(random._inst).values()


def _of_numpy() -> object:
    own = numpy.random.mtrand._rand
    numbers = own._bit_generator
    if type(numbers) is not numpy.random.MT19937:
        return None
    # 624 words and a position; the object has the other half of a normal draw
    return _fields(own), ctypes.string_at(numbers.ctypes.state_address, 2500)


class _Kept:
    """A generator's state, read and set only where its memory is not as before: these take long.

    memory: what changes with it, None where that is not known.
    """

    def __init__(
        self, memory: Callable[[], object], read: Callable[[], Any], put: Callable[[Any], None]
    ) -> None:
        self.memory, self.read, self.put = memory, read, put
        self.seen: object = None
        self.state: Any = None

    def get(self) -> Any:
        now = self.memory()
        if now is None or now != self.seen:
            self.state, self.seen = self.read(), now
        return self.state

    def set(self, state: Any) -> None:
        now = self.memory()
        if now is None or now != self.seen or state is not self.state:
            self.put(state)
            self.state, self.seen = state, self.memory()


_PYTHON = _Kept(_of_python, random.getstate, random.setstate)
# numpy imports its generators when they are asked for, which takes 13 ms
_NUMPY = _Kept(
    _of_numpy, lambda: numpy.random.get_state(legacy=False), lambda x: numpy.random.set_state(x)
)


def random_states() -> tuple[Any, ...]:
    """Of all generators that a program draws from unless it says another; no device is asked."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), _PYTHON.get(), _NUMPY.get(), gpus


def restore(states: tuple[Any, ...]) -> None:
    """Let all of them go on from there."""
    torch.set_rng_state(states[0])
    _PYTHON.set(states[1])
    _NUMPY.set(states[2])
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
