"""CPU seconds that a plan takes: all layouts of 8 devices, of two models of torchvision.

    OMP_NUM_THREADS=1 python benchmarks/plan_cost.py [--devices 8] [NAME ...]

Needs the extra `zoo`. Each plan is a process of its own, a fork of one that has the libraries
loaded, so that nothing is kept from another.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from apart import apart
from zoo_models import torchvision

import shardtensor as st

MODELS = {"resnet50": (8, 3, 224, 224), "vit_b_16": (8, 3, 224, 224), "swin_t": (8, 3, 224, 224)}


def cost(name: str, devices: int) -> dict[str, float]:
    """CPU seconds, and how many configurations there are."""
    began = time.process_time()
    plans = st.plan(partial(torchvision, name), [MODELS[name]], devices)
    return {"cpu s": time.process_time() - began, "rows": len(plans)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="NAME")
    parser.add_argument("--devices", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in MODELS:
        torchvision(name)  # its import is not the plan's
    for name in args.names:
        row = apart(partial(cost, name, args.devices), limit=300)
        print(name, *(f"{k} {v:.4g}" if k != "result" else v for k, v in row.items()), sep=", ")


if __name__ == "__main__":
    main()
