"""What one rank could not do, told on all ranks."""

from __future__ import annotations

import numpy as np
import torch

from ..comm import wire

_MOST = 512


def reason(said: str, device: torch.device | str, group: str) -> str:
    """What the first of the ranks says that has failed; "" on those that have not. All call it."""
    row = np.frombuffer(said.encode()[:_MOST].ljust(_MOST, b"\0"), np.int64)
    rows = wire.all_gather_table(row.tolist(), device, group)
    texts = (np.asarray(r, np.int64).tobytes().rstrip(b"\0") for r in rows)
    return next((t.decode(errors="ignore") for t in texts if t), "")
