"""A Lightning strategy under which ranks share samples: sampler, weights, logs, checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..tensor import ShardTensor
from ..train import whole
from ..train.batch import Shard, check_dealt, cut_batch
from ..train.launch import domains
from ..train.metrics import once
from ..train.options import Options
from ..train.parallelize import parallelize

try:
    from lightning.fabric.utilities.seed import pl_worker_init_function
    from lightning.pytorch.strategies import DDPStrategy
    from lightning.pytorch.trainer.states import TrainerFn
except ImportError as e:
    raise ImportError(
        "shardtensor.lightning needs Lightning: pip install shardtensor[lightning]"
    ) from e


class DomainParallel(DDPStrategy):
    """Trainer(strategy=DomainParallel(domain=4, shard=-2, fsdp="all")): 4 ranks share each sample.

    domain: ranks that share a sample, -1 for all; the others have samples of their own, and their
    gradients are averaged. shard: the dim along which plain tensors of a batch are cut, where they
    have it, or a function of the batch and the mesh of the domain; None where the dataset gives
    ShardTensors. options: those of `parallelize`, `fsdp` among them. Data parallelism, sampling,
    seeds and precision are then Lightning's own, as under DDP.

    Ranks of a domain get the same samples, so random transforms of a dataset must draw the same on
    them. `self.log` takes sharded losses; a reduction over ranks is one over samples. Checkpoints
    are those of one device, with FSDP2 too: weights and moments are gathered on the first rank.
    Raises ValueError where the ranks do not make up whole domains, for a sampler that deals samples
    to single ranks of one, and for callbacks that average weights under fsdp.
    """

    domain: int
    shard: Shard
    options: Options

    def __init__(
        self,
        domain: int = -1,
        *,
        shard: Shard = None,
        process_group_backend: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend)
        # what is wrong in them shows now
        self.options = Options.of({"data": "data"}, options)
        self.domain, self.shard = domain, shard
        self.mesh: DeviceMesh | None = None

    def setup_distributed(self) -> None:
        super().setup_distributed()
        ranks = self.num_nodes * self.num_processes
        self.mesh = domains(self.root_device.type, self.domain, ranks)

    @property
    def _mesh(self) -> DeviceMesh:
        assert self.mesh is not None
        return self.mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Ranks of a domain draw the same samples."""
        place = self._mesh.get_local_rank("data")
        return {"num_replicas": self._mesh["data"].size(), "rank": place}

    def setup(self, trainer: Any) -> None:
        assert self.accelerator is not None and self.model is not None
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        module = self._module
        if self.options.fsdp is not None:
            _check_averages(trainer.callbacks)
        if not self._sharded:
            parallelize(module, self._mesh, self.options)
        once(module, self._mesh)
        module.__dict__["log"] = partial(_log, module.log)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def teardown(self) -> None:
        if self.lightning_module is not None:
            self.lightning_module.__dict__.pop("log", None)
        super().teardown()

    @property
    def _module(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _sharded(self) -> bool:
        return whole.is_sharded(self._module)

    def process_dataloader(self, dataloader: Any) -> Any:
        check_dealt(dataloader, self._mesh["data"].size())
        seeds = int(os.environ.get("PL_SEED_WORKERS", 0))
        if seeds and getattr(dataloader, "worker_init_fn", True) is None:
            # as Lightning would, but alike on ranks that share samples
            group = self._mesh.get_local_rank("data")
            dataloader.worker_init_fn = partial(pl_worker_init_function, rank=group)
        return super().process_dataloader(dataloader)

    def batch_to_device(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        batch = super().batch_to_device(batch, device, dataloader_idx)
        return cut_batch(batch, self.shard, self._mesh["domain"])

    # steps run inside of the module's call, whose hooks gather weights of FSDP2

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.train_step_context():
            return _called(self._module, "training_step", args, kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.val_step_context():
            return _called(self._module, "validation_step", args, kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.test_step_context():
            return _called(self._module, "test_step", args, kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.predict_step_context():
            return _called(self._module, "predict_step", args, kwargs)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Over the ranks that have samples of their own, unless a group is given."""
        if isinstance(tensor, ShardTensor):
            tensor = tensor.full_tensor()
        return super().reduce(tensor, group or self._mesh.get_group("data"), reduce_op)

    def all_gather(self, tensor: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """As `reduce`: (groups, ...), each sample once and whole; the module asks for the world."""
        if isinstance(tensor, ShardTensor):
            tensor = tensor.full_tensor()
        if group is None or group is dist.group.WORLD:
            group = self._mesh.get_group("data")
        return super().all_gather(tensor, group, sync_grads)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Of all ranks, which Lightning counts beside `world_size`, and not of the groups."""
        told = torch.tensor(int(decision), device=self.root_device)
        agreed = int(super().reduce(told, reduce_op="sum"))
        return agreed == self.world_size if all else agreed > 0

    # checkpoints: as of one device

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if not self._sharded:
            return super().lightning_module_state_dict()
        return whole.model_state(self._module)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if not self._sharded:
            return super().load_model_state_dict(checkpoint, strict)
        whole.load_model(self._module, checkpoint["state_dict"], strict)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        if not self._sharded:
            return super().optimizer_state(optimizer)
        return whole.optimizer_state(self._module, getattr(optimizer, "optimizer", optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if not self._sharded:
            return super().load_optimizer_state_dict(checkpoint)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            whole.load_optimizer(self._module, optimizer, state)


def _check_averages(callbacks: Sequence[Any]) -> None:
    """Raise ValueError for a callback that copied the model before its weights are in shards."""
    for callback in callbacks:
        for base in type(callback).__mro__:
            if base.__name__ in ("WeightAveraging", "StochasticWeightAveraging"):
                raise ValueError(
                    f"{type(callback).__name__} under fsdp: it averages whole weights beside "
                    "those in shards. Leave fsdp out, or average checkpoints afterwards"
                )


def _called(module: Any, method: str, args: Any, kwargs: Any) -> Any:
    """What a method of a module gives inside of the module's hooks, which a call of it runs."""
    own = module.__dict__
    # of a module whose forward is compiled
    before = {k: own[k] for k in ("forward",) if k in own}

    def forward(*args: Any, **kwargs: Any) -> Any:
        # the method itself may call the module
        own.pop("forward")
        own.update(before)
        return getattr(module, method)(*args, **kwargs)

    own["forward"] = forward
    try:
        return module(*args, **kwargs)
    finally:
        # a hook may have raised before it was called
        if own.get("forward") is forward:
            own.pop("forward")
            own.update(before)


def _log(log: Callable[..., None], name: str, value: Any, *args: Any, **kwargs: Any) -> None:
    """`LightningModule.log`; what the first rank alone reads later must not communicate."""
    if isinstance(value, ShardTensor):
        value = value.detach().full_tensor()
    log(name, value, *args, **kwargs)
