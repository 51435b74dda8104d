"""FSDP2's weights stay whole from a backward that makes a graph of gradients to the next one.

FSDP2 (torch 2.11 to 2.15) frees them at the end of each backward, those that a graph of gradients
is to read, too.
"""

from __future__ import annotations

from typing import Any

import torch


class Held:
    """A group of FSDP2's parameters that is gathered and freed together.

    state: of the module whose group it is.
    """

    def __init__(self, group: Any, state: Any) -> None:
        self.group, self.state = group, state
        self._after, self._free = group.post_backward, group.reshard
        group.post_backward, group.reshard = self._post_backward, self._reshard
        group._shardtensor_held = self
        # while they are whole
        self.hooks: list[Any] | None = None
        self.written: list[tuple[int, int]] = []
        self.task = -1

    def _post_backward(self, *_: Any) -> None:
        """At the end of the group's part of a backward."""
        params = [p for p in self.group.fsdp_params if hasattr(p, "_unsharded_param")]
        if torch.is_grad_enabled():
            # gradients that are there go to the shards, where they have no graph
            if self.hooks is None and all(p._unsharded_param.grad is None for p in params):
                self.written = writes(self.group)
                # in a backward that comes by no output of a module they go there, too
                self.hooks = [
                    p._unsharded_param.register_post_accumulate_grad_hook(self._arrived)
                    for p in params
                    if p._unsharded_param.requires_grad
                ]
        elif self.hooks is not None and self.task != (task := torch._C._current_graph_task_id()):
            # what is left of the graph comes after this
            self.task = task
            torch.autograd.Variable._execution_engine.queue_callback(self.drop)
        self._after()

    def _arrived(self, _: Any) -> None:
        self.state._register_root_post_backward_final_callback()

    def _reshard(self) -> None:
        if self.hooks is None:
            self._free()

    def release(self) -> None:
        """Let the parameters be freed again."""
        for hook in self.hooks or ():
            hook.remove()
        self.hooks = None

    def drop(self) -> None:
        """Free them, which no graph reads any more."""
        self.release()
        if self.group.reshard_after_backward:
            self._free()


def writes(group: Any) -> list[tuple[int, int]]:
    """How often each shard of a group was written to."""
    shards = [p.sharded_param for p in group.fsdp_params]
    # ops on a DTensor do not count as writes to its local tensor
    return [(p._version, p._local_tensor._version) for p in shards]
