"""What `parallelize` does to a model: one value, also from a YAML file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any

SHARDING = (None, "data", "all")
PRECISION = (None, "bf16", "fp16")


@dataclass(frozen=True)
class Options:
    """Options of `parallelize`.

    data: the name of the mesh axis along which samples differ; None: all ranks share each sample.
    sync: weights and buffers become those of the mesh's first rank.
    bucket_mb: MiB of gradients that travel in one message, without fsdp.
    fsdp: FSDP2 shards parameters, gradients and optimizer state over the "data" axis, or over "all"
        ranks of the mesh.
    blocks: class names of the modules that are units of fsdp and of checkpoint; empty: the elements
        of every outermost nn.ModuleList.
    checkpoint: blocks keep their inputs only and are computed again in the backward pass.
    offload: what is kept for the backward pass waits in host memory.
    precision: forward under autocast to "bf16" or "fp16"; with fsdp parameters are gathered in it,
        and blocks are given their inputs in it, the model its own as they are.
    made_mb: MiB from which on a tensor that the model makes of sizes, indices and coordinates alone
        (a bias of each pair of tokens, a mask, zeros for modes) is made sharded; None: such a
        tensor is whole on every rank. For eager models: 1 to 2 us an op.
    compile: arguments of `model.compile`; None: eager. With fsdp its units are compiled, one
        program for all that are equal; what lies outside of the innermost units runs eagerly.

    Raises ValueError for a value of another type and for values that do not fit together.
    """

    data: str | None = None
    sync: bool = True
    bucket_mb: float = 8.0
    fsdp: str | None = None
    blocks: tuple[str, ...] = ()
    checkpoint: bool = False
    offload: bool = False
    precision: str | None = None
    made_mb: float | None = None
    compile: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, (fits, what) in _TYPES.items():
            value = getattr(self, name)
            if not fits(value):
                raise ValueError(f"{name} is {value!r}; expected {what}")
        if self.fsdp not in SHARDING:
            raise ValueError(f"fsdp is {self.fsdp!r}; one of {SHARDING}")
        if self.precision not in PRECISION:
            raise ValueError(f"precision is {self.precision!r}; one of {PRECISION}")
        if self.fsdp == "data" and self.data is None:
            raise ValueError("fsdp over 'data' needs the name of the data axis: data=...")
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if self.compile is not None:
            object.__setattr__(self, "compile", dict(self.compile))

    @classmethod
    def of(cls, options: Options | Mapping[str, Any] | None, values: Mapping[str, Any]) -> Options:
        """Options, or a mapping of their names, some of them replaced by values.

        Raises ValueError for another type, a name that is no option and a value that does not fit.
        """
        if isinstance(options, cls):
            return replace(options, **cls._known(values))
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(
                f"options is {options!r}; expected Options, or a mapping of their names"
            )
        return cls.from_dict({**(options or {}), **values})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Options:
        """From any mapping (a DictConfig, too). Raises ValueError for a name that is no option."""
        return cls(**cls._known(values))

    @classmethod
    def _known(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        known = {f.name for f in fields(cls)}
        unknown = sorted(map(str, set(values) - known))
        if unknown:
            raise ValueError(f"no options: {', '.join(unknown)}; there are {', '.join(known)}")
        return dict(values)

    @classmethod
    def from_yaml(cls, file: str | Path) -> Options:
        """From a YAML mapping of names to values (extra `yaml`). It is data: no code is run.

        Raises ValueError that names the file for another text, ImportError without the extra.
        """
        try:
            import yaml
        except ImportError as e:
            raise ImportError(f"{e}: pip install shardtensor[yaml]") from e
        try:
            found = yaml.safe_load(Path(file).read_text())
            if not isinstance(found, dict):
                raise ValueError(f"expected names and values, not {type(found).__name__}")
            return cls.from_dict(found)
        except (yaml.YAMLError, ValueError) as e:
            raise ValueError(f"{file}: {e}") from e


def _number(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool) and 0 < float(x) < math.inf


def _names(x: Any) -> bool:
    return isinstance(x, Iterable) and not isinstance(x, str | Mapping) and all(map(_name, x))


def _name(x: Any) -> bool:
    return isinstance(x, str)


def _flag(x: Any) -> bool:
    return isinstance(x, bool)


_FLAG = (_flag, "True or False, in YAML without quotes")
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "data": (lambda x: x is None or _name(x), "the name of a mesh axis"),
    "sync": _FLAG,
    "bucket_mb": (_number, "a positive number, in YAML with a point, as in 1.0e+3"),
    "made_mb": (lambda x: x is None or _number(x), "a positive number of MiB, or None"),
    "blocks": (_names, "a list of class names"),
    "checkpoint": _FLAG,
    "offload": _FLAG,
    "compile": (
        lambda x: x is None or (isinstance(x, Mapping) and all(map(_name, x))),
        "the arguments of model.compile by name; {} for none",
    ),
}
