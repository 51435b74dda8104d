"""What `parallelize` does to a model: one value, also from a YAML file."""

from __future__ import annotations

from dataclasses import dataclass, fields
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
    precision: forward under autocast to "bf16" or "fp16"; with fsdp parameters are gathered in it.
    compile: arguments of `model.compile`; None: eager.

    Raises ValueError for values that do not fit together.
    """

    data: str | None = None
    sync: bool = True
    bucket_mb: float = 8.0
    fsdp: str | None = None
    blocks: tuple[str, ...] = ()
    checkpoint: bool = False
    offload: bool = False
    precision: str | None = None
    compile: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.fsdp not in SHARDING:
            raise ValueError(f"fsdp is {self.fsdp!r}; one of {SHARDING}")
        if self.precision not in PRECISION:
            raise ValueError(f"precision is {self.precision!r}; one of {PRECISION}")
        if self.fsdp == "data" and self.data is None:
            raise ValueError("fsdp over 'data' needs the name of the data axis: data=...")
        if self.fsdp is not None and self.compile is not None:
            raise ValueError("compile and fsdp: the compiled program takes whole parameters")
        if self.bucket_mb <= 0:
            raise ValueError(f"bucket_mb is {self.bucket_mb}; expected a positive number")
        if isinstance(self.blocks, str):
            raise ValueError("blocks is one name; expected a list of class names")
        object.__setattr__(self, "blocks", tuple(self.blocks))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Options:
        """Raises ValueError for a name that is no option."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"no options: {', '.join(unknown)}; there are {', '.join(known)}")
        return cls(**values)

    @classmethod
    def from_yaml(cls, file: str | Path) -> Options:
        """From a YAML mapping of names to values (extra `yaml`). It is data: no code is run."""
        import yaml

        found = yaml.safe_load(Path(file).read_text())
        if not isinstance(found, dict):
            raise ValueError(f"{file}: expected names and values, not {type(found).__name__}")
        return cls.from_dict(found)
