"""What finding the best sizes takes: the least of several, on one core.

OMP_NUM_THREADS=1 python benchmarks/balance.py
"""

from __future__ import annotations

import random
import time

import numpy as np

import shardtensor as st


def main() -> None:
    rng = random.Random(0)
    weights = np.random.default_rng(0).random(10**6)
    print("| rows | weights | ranks | s |")
    print("|---|---|---|---|")
    for rows, given, ranks in ((10**6, weights, 1024), (10**9, None, 1024)):
        speeds = [rng.uniform(0.5, 1) for _ in range(ranks)]
        took = []
        for _ in range(5):
            begin = time.perf_counter()
            st.balance.sizes(rows, ranks, weights=given, speeds=speeds)
            took.append(time.perf_counter() - begin)
        told = "random" if given is not None else ""
        print(f"| {rows} | {told} | {ranks} | {min(took):.2f} |", flush=True)


if __name__ == "__main__":
    main()
