"""An Accelerator under which ranks share samples: loaders, weights, metrics, checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..containers import each, leaves
from ..later import dt
from ..tensor import ShardTensor
from ..train import whole
from ..train.batch import Shard, check_dealt, cut_batch
from ..train.launch import domains
from ..train.options import Options
from ..train.parallelize import parallelize

try:
    import accelerate
    from accelerate.data_loader import prepare_data_loader, skip_first_batches
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler
    from accelerate.utils import MODEL_NAME, SAFE_MODEL_NAME, DistributedType, DynamoBackend
    from safetensors.torch import load_file, load_model
except ImportError as e:
    raise ImportError(
        "shardtensor.accelerate needs Accelerate: pip install shardtensor[accelerate]"
    ) from e

_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Accelerator(accelerate.Accelerator):
    """Accelerate's own, with `domain` ranks for each sample: Accelerator(domain=4, shard=-2).

    domain: ranks that share a sample, -1 for all; the others have samples of their own, and their
    gradients are averaged. shard: the dim along which plain tensors of a batch are cut, where they
    have it, or a function of the batch and the mesh of the domain; None where the dataset gives
    ShardTensors. options: those of `parallelize`, `fsdp` among them. The rest is Accelerate's.

    `prepare` cuts batches and applies `parallelize` in place of DDP; model and optimizer go in
    together under fsdp. Ranks of a domain draw the same samples; `gather`, `gather_for_metrics`
    and `reduce` count each sample once and give plain tensors; `num_processes` is how many samples
    are worked on at a time. `save_state` writes what one device would. Raises ValueError where
    the ranks do not make up whole domains, and for DeepSpeed, Megatron and Accelerate's own FSDP.
    """

    options: Options

    def __init__(
        self,
        *args: Any,
        domain: int = -1,
        shard: Shard = None,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # what is wrong in them shows now
        self.options = Options.of({"data": "data"}, dict(options or {}))
        self.mesh: DeviceMesh | None = None
        if not torch.accelerator.is_available():
            # else Accelerate takes each rank for the only process
            kwargs.setdefault("cpu", True)
        super().__init__(*args, **kwargs)
        if self.distributed_type not in _PLAIN or self.parallelism_config is not None:
            raise ValueError(
                "shardtensor.accelerate under DeepSpeed, Megatron, FSDP or a ParallelismConfig of "
                "Accelerate: leave them out, and give options={'fsdp': 'all'} for sharded weights"
            )
        if self.state.dynamo_plugin.backend != DynamoBackend.NO:
            raise ValueError(
                "shardtensor.accelerate: torch.compile cannot see through shards; give "
                "options={'compile': {}}, which compiles the local program"
            )
        if not dist.is_initialized():
            raise ValueError("shardtensor.accelerate: start with torchrun or accelerate launch")
        if self.state.num_processes != dist.get_world_size():
            raise ValueError(
                f"Accelerate takes each of {dist.get_world_size()} ranks for the only process, as "
                "on CPUs without cpu=True (use_cpu=True of TrainingArguments): give it at first"
            )
        self.mesh = domains(self.device.type, domain, dist.get_world_size())
        self.shard = shard
        self.register_load_state_pre_hook(self._load_sharded)

    @property
    def _data(self) -> DeviceMesh:
        assert self.mesh is not None
        return self.mesh["data"]

    @property
    def num_processes(self) -> int:
        """How many samples are worked on at a time: of each domain one."""
        return super().num_processes if self.mesh is None else self._data.size()

    # loaders

    def prepare_data_loader(
        self, data_loader: Any, device_placement: Any = None, slice_fn_for_dispatch: Any = None
    ) -> Any:
        if getattr(data_loader, "_is_accelerate_prepared", False):
            return data_loader
        if self.dispatch_batches:
            raise ValueError("dispatch_batches: each rank reads its samples; leave it unset")
        check_dealt(data_loader, self._data.size())
        mine = hasattr(data_loader.sampler, "num_replicas")
        prepared = prepare_data_loader(
            data_loader,
            self.device,
            # a sampler that deals samples out has done it
            num_processes=1 if mine else self._data.size(),
            process_index=0 if mine else self._data.get_local_rank(),
            split_batches=self.split_batches,
            put_on_device=self.device_placement if device_placement is None else device_placement,
            rng_types=self.rng_types.copy(),
            dispatch_batches=False,
            even_batches=self.even_batches,
            use_seedable_sampler=self.use_seedable_sampler,
            data_seed=self.dataloader_config.data_seed,
            non_blocking=self.non_blocking,
            use_stateful_dataloader=self.use_stateful_dataloader,
        )
        self._dataloaders.append(prepared)
        return self._cut(prepared, _filled(data_loader) if mine else None)

    def skip_first_batches(self, dataloader: Any, num_batches: int = 0) -> Any:
        inner = dataloader.loader if isinstance(dataloader, Cut) else dataloader
        filled = getattr(inner, "filled", None)
        return self._cut(super().skip_first_batches(inner, num_batches), filled)

    def _cut(self, loader: Any, filled: int | None) -> Any:
        """A loader whose batches are cut. filled: see `_filled`."""
        # on the one that Accelerate says is at work
        loader.filled = filled
        if self.shard is None:
            loader._is_accelerate_prepared = True
            return loader
        return Cut(loader, self)

    # models and optimizers

    def prepare(self, *args: Any, device_placement: Any = None) -> Any:
        before = {
            p: (model, name)
            for model in args
            if isinstance(model, nn.Module)
            for name, p in model.named_parameters()
        }
        inner = [getattr(x, "optimizer", x) for x in args]
        states = {x: x.state_dict() for x in inner if isinstance(x, Optimizer)}
        prepared = super().prepare(*args, device_placement=device_placement)
        made: dict[Any, nn.Parameter] = {
            p: model.get_parameter(name) for p, (model, name) in before.items()
        }
        for optimizer, state in states.items():
            for group in optimizer.param_groups:
                group["params"] = [made.get(p, p) for p in group["params"]]
            if any(made.get(p, p) is not p for p in optimizer.state):
                # moments of parameters that are now in shards
                optimizer.state.clear()
                own = next(o for o in self._optimizers if o.optimizer is optimizer)
                own.load_state_dict(state)
        return prepared

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        # without DDP
        model = super().prepare_model(model, device_placement, evaluation_mode=True)
        # one that was prepared for evaluation only may be trained now
        if evaluation_mode or getattr(model, "_trains_on_shards", False):
            return model
        assert self.mesh is not None
        model = parallelize(model, self.mesh, self.options)
        vars(model).update(_trains_on_shards=True, no_sync=_no_sync)
        return model

    @contextmanager
    def no_sync(self, model: Any) -> Iterator[None]:
        # each backward averages what it adds: accumulated, that is the mean of all
        yield

    def prepare_optimizer(self, optimizer: Any, device_placement: bool | None = None) -> Any:
        if getattr(optimizer, "_is_accelerate_prepared", False) or self.options.fsdp is None:
            return super().prepare_optimizer(optimizer, device_placement)
        prepared = Whole(optimizer, device_placement=False, scaler=self.scaler)
        prepared.models, prepared.here = self._models, self._state_here
        self._optimizers.append(prepared)
        return prepared

    def prepare_scheduler(self, scheduler: Any) -> Any:
        if getattr(scheduler, "_is_accelerate_prepared", False):
            return super().prepare_scheduler(scheduler)
        of = [o for o in self._optimizers if o.optimizer is getattr(scheduler, "optimizer", None)]
        prepared = Scheduler(
            scheduler, of or self._optimizers, self.step_scheduler_with_optimizer, True
        )
        prepared.times = 1 if self.split_batches else self._data.size()
        self._schedulers.append(prepared)
        return prepared

    # metrics: each sample once, whole

    def gather(self, tensor: Any) -> Any:
        return each(self._gathered, full(tensor))

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        data = full(input_data)
        objects = use_gather_object or not all(isinstance(x, Tensor) for _, x in leaves(data))
        if objects:
            found: list[Any] = [None] * self._data.size()
            dist.all_gather_object(found, data, group=self._data.get_group())
            data = [x for part in found for x in part]
        else:
            data = self.gather(data)
        if not self.gradient_state.end_of_dataloader:
            return data
        return self._once(data) if objects else each(self._once, data)

    def _once(self, rows: Any) -> Any:
        """The rows of a last batch without those of samples that fill it up."""
        filled = getattr(self.gradient_state.active_dataloader, "filled", None)
        if filled is None:
            rest = self.gradient_state.remainder
            return rows[:rest] if rest > 0 else rows
        # samples dealt out one by one: the last groups' last rows
        groups = self._data.size()
        each = len(rows) // groups
        kept = [i for i in range(len(rows)) if i // each < groups - filled or i % each < each - 1]
        return rows[kept] if isinstance(rows, Tensor) else [rows[i] for i in kept]

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        def reduced(x: Any) -> Any:
            if not isinstance(x, Tensor) or reduction == "none":
                return x
            x = x.clone()
            op = dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM
            dist.all_reduce(x, op, group=self._data.get_group())
            return x / self._data.size() if reduction == "mean" else x

        return each(reduced, full(tensor))

    def pad_across_processes(
        self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False
    ) -> Any:
        return super().pad_across_processes(full(tensor), dim, pad_index, pad_first)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        return full(super().clip_grad_norm_(parameters, max_norm, norm_type))

    def _gathered(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.contiguous() if x.ndim else x.clone()[None]
        out = x.new_empty((self._data.size(), *x.shape))
        dist.all_gather(list(out.unbind(0)), x, group=self._data.get_group())
        return out.flatten(0, 1)

    # checkpoints: as of one device

    def _state_here(self) -> bool | None:
        """Whether this rank gets the whole states; None: the first one alone."""
        each_node = self.project_configuration.save_on_each_node
        return bool(self.is_local_main_process) if each_node else None

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> Any:
        model = self.unwrap_model(model) if unwrap else model
        if not whole.is_sharded(model):
            return model.state_dict()
        return whole.model_state(model, self._state_here())

    def _load_sharded(self, models: Any, folder: str) -> None:
        if not any(map(whole.is_sharded, models)):
            return
        # all of them: what is left would be counted anew, and get the weights of others
        for i, model in enumerate(models):
            load_weights(model, Path(folder), f"_{i}" if i else "")
        models.clear()


class Cut:
    """A prepared DataLoader whose batches are cut for the ranks of a domain."""

    _is_accelerate_prepared = True

    def __init__(self, loader: Any, accelerator: Accelerator) -> None:
        self.loader, self._accelerator = loader, accelerator

    def __iter__(self) -> Iterator[Any]:
        assert self._accelerator.mesh is not None
        domain = self._accelerator.mesh["domain"]
        for batch in self.loader:
            yield cut_batch(batch, self._accelerator.shard, domain)

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            # of a copy in the making
            raise AttributeError(name)
        if sys._getframe(1).f_code is skip_first_batches.__code__:
            raise ValueError(
                "accelerate.skip_first_batches of a loader whose batches are cut would give whole "
                "ones: call accelerator.skip_first_batches"
            )
        return getattr(self.loader, name)


class Whole(AcceleratedOptimizer):
    """An optimizer of FSDP2's parameters whose state_dict is that of one device."""

    models: list[nn.Module]
    here: Callable[[], bool | None]
    _whole: dict[str, Any] | None = None

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it, after all ranks have entered, a single one may ask for the state_dict."""
        self._whole = self.state_dict()
        try:
            yield
        finally:
            self._whole = None

    def _model(self) -> nn.Module:
        own = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return next(m for m in self.models if own <= {id(p) for p in m.parameters()})

    def state_dict(self) -> dict[str, Any]:
        if self._whole is not None:
            return self._whole
        return whole.optimizer_state(self._model(), self.optimizer, self.here())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        whole.load_optimizer(self._model(), self.optimizer, state_dict)


class Scheduler(AcceleratedScheduler):
    """As Accelerate's: steps once for each sample's worth of a batch, which ranks share."""

    times: int

    def step(self, *args: Any, **kwargs: Any) -> None:
        steps = self.step_with_optimizer and self.gradient_state.sync_gradients
        for _ in range(self.times if steps else 1):
            # OneCycle raises beyond its end
            most = getattr(self.scheduler, "total_steps", None)
            if most is None or self.scheduler._step_count <= most:
                super().step(*args, **kwargs)


def _no_sync() -> None:
    raise ValueError(
        "no_sync: gradients are averaged as backward makes them, and accumulate() needs none. In "
        "place of LocalSGD parallelize over the domain alone, and average weights over the data "
        "axis by torch's PostLocalSGDOptimizer"
    )


def full(tree: Any) -> Any:
    """ShardTensors and DTensors of a tree whole on every rank."""

    def plain(x: Any) -> Any:
        if isinstance(x, ShardTensor | dt.DTensor):
            with torch.no_grad():
                return x.full_tensor().detach()
        return x

    return each(plain, tree)


def _filled(loader: DataLoader[Any]) -> int:
    """How many samples a sampler that deals them out repeats in the last batches, to fill up."""
    sampler: Any = loader.sampler
    if loader.drop_last and len(sampler) % (loader.batch_size or 1):
        return 0
    return max(0, getattr(sampler, "total_size", 0) - len(getattr(sampler, "dataset", ())))


def load_weights(model: nn.Module, folder: Path, ending: str = "") -> None:
    """The weights that `save_state` or a Trainer wrote, in either format."""
    safe = folder / f"{SAFE_MODEL_NAME}{ending}.safetensors"
    if safe.exists() and not whole.is_sharded(model):
        # which knows of tied weights
        load_model(model, safe)
        return
    file = folder / f"{MODEL_NAME}{ending}.bin"
    found = load_file(safe) if safe.exists() else torch.load(file, "cpu", weights_only=True)
    whole.load_model(model, found)
