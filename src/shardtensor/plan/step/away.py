"""What `offload` keeps in host memory, of which a plan has the sizes only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._torch import probe
from .kinds import Work
from .ledger import Ledger


class Kept:
    """The form of a tensor that waits in host memory, which it leaves when nobody needs it."""

    def __init__(self, x: Tensor, ledger: Ledger) -> None:
        # as empty_like gives it in host memory
        self.form = torch.empty_like(x, device="meta")
        self.device, self.ledger = x.device, ledger
        self.nbytes = x.numel() * x.element_size()
        ledger.away += self.nbytes
        ledger.most_away = max(ledger.most_away, ledger.away)

    def __del__(self) -> None:
        self.ledger.away -= self.nbytes


class Away(torch.autograd.graph.saved_tensors_hooks):
    """Inside, what autograd keeps leaves the device, and comes back for backward: as
    `train.offload.offloaded` does it on a GPU."""

    def __init__(self, ledger: Ledger) -> None:
        def away(x: Tensor) -> Any:
            if not probe.is_fake(x) or x.layout is not torch.strided:
                return x
            kept = Kept(x, ledger)
            ledger.does(Work(0, kept.nbytes, x.dtype, "host"))
            return kept

        def back(kept: Any) -> Tensor:
            if not isinstance(kept, Kept):
                return kept
            ledger.does(Work(0, kept.nbytes, kept.form.dtype, "host"))
            return torch.empty_like(kept.form, device=kept.device)

        super().__init__(away, back)
