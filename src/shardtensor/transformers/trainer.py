"""The Trainer of transformers with ranks that share samples: batches, weights, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

# before ours, which would ask for Accelerate alone
try:
    import transformers
    import transformers.trainer as base
except ImportError as e:
    raise ImportError(
        "shardtensor.transformers needs transformers: pip install shardtensor[transformers]"
    ) from e

from ..accelerate.accelerator import Accelerator, full, load_weights
from ..train import whole
from ..train.batch import Shard, cut_batch


class Trainer(transformers.Trainer):
    """Transformers' own, with `domain` ranks for each sample: Trainer(..., domain=4, shard=-2).

    domain, shard, options: those of `shardtensor.accelerate.Accelerator`; the rest is Trainer's.
    A batch size of its arguments is that of the ranks which share samples. Batches are cut after
    they are collated; losses, metrics and predictions are of whole samples. Checkpoints are those
    of one device, also under `options={"fsdp": "all"}`. Random transforms in workers draw alike on
    ranks that share samples. Raises ValueError for what `Accelerator` refuses, and for the sampling
    strategy "batch_rebalance", which deals samples to single ranks.
    """

    def __init__(
        self,
        *args: Any,
        domain: int = -1,
        shard: Shard = None,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._shard = shard
        self._make = partial(Accelerator, domain=domain, options=options)
        super().__init__(*args, **kwargs)
        if getattr(self.args, "train_sampling_strategy", None) == "batch_rebalance":
            raise ValueError(
                'shardtensor.transformers: train_sampling_strategy "batch_rebalance" deals samples '
                "to single ranks, of which some share samples here; take another"
            )

    def create_accelerator_and_postprocess(self) -> None:
        # the class by the name under which the Trainer makes one
        own = base.Accelerator
        base.Accelerator = self._make
        try:
            super().create_accelerator_and_postprocess()
        finally:
            base.Accelerator = own
        # which ranks get the whole state
        self.accelerator.project_configuration.save_on_each_node = self.args.save_on_each_node

    @property
    def _domain(self) -> Any:
        return self.accelerator.mesh["domain"]

    def get_total_train_batch_size(self, args: Any) -> int:
        each = self._train_batch_size * args.gradient_accumulation_steps
        return int(each * self.accelerator.num_processes)

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        # what Accelerate's loader has inside
        inner = getattr(loader, "base_dataloader", loader)
        seed = inner.worker_init_fn
        if isinstance(seed, partial) and "rank" in seed.keywords:
            # ranks that share samples draw the same
            rank = self.accelerator.mesh.get_local_rank("data")
            inner.worker_init_fn = partial(seed, rank=rank)
        return loader

    def _prepare_inputs(self, inputs: Any) -> Any:
        return cut_batch(super()._prepare_inputs(inputs), self._shard, self._domain)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = full(super().training_step(*args, **kwargs))
        return found

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        return full(super().prediction_step(*args, **kwargs))

    # checkpoints: as of one device

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not whole.is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        state = self.accelerator.get_state_dict(self.model)
        # before version 5 whoever calls it writes
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not whole.is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        with self.optimizer.gathered():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        model = self.model if model is None else model
        if whole.is_sharded(model):
            load_weights(model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if whole.is_sharded(self.model):
            load_weights(self.model, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()
