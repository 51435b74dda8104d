"""An estimate, no measurement: the paper's ViT on 8 H100s, from what a step launches and sends.

    python benchmarks/estimate.py [--nvlink 300e9] [--host 5e-6] ...

Counts are those of the table in docs/gpu.md (`launches.py`, pretended GPU); what a product or
attention takes and how fast links are is assumed: see the options. A step of one of 8 ranks takes
the longer of what its host and its GPU need. Nothing of what is sent is taken to be hidden, but for
the ring, whose hops travel while blocks are computed. Efficiency: of one device's time over 8.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs/gpu.md"
RANKS, WIDTH, DEPTH, PATCH = 8, 768, 16, 8
ROW = re.compile(r"^\| ViT 127 M (\d+)² (\w+), (\w+) \| (.*) \|$", re.M)


@dataclass
class Counts:
    """Of a step: kernels of one device and of a rank, collectives and bytes that it sends."""

    plain: int
    kernels: int
    collectives: int
    bytes: float


def counts() -> dict[tuple[int, str, str], Counts]:
    """Of the table, by side of the image, job and way of attention; in bf16."""
    found = {}
    for side, job, way, rest in ROW.findall(DOCS.read_text()):
        plain, _, now, _, _, _, sent, _, mb = (float(v) for v in rest.split(" | "))
        found[int(side), job, way] = Counts(int(plain), int(now), int(sent), 1e6 * mb)
    return found


def work(side: int, job: str) -> float:
    """Floating-point operations of the whole: products and attention; backward is two forwards,

    that of attention two and a half, as it computes the scores again.
    """
    tokens = (side // PATCH) ** 2
    products, attention = 24.0 * tokens * WIDTH**2, 4.0 * tokens**2 * WIDTH
    training = job == "training"
    return DEPTH * (products * (3 if training else 1) + attention * (3.5 if training else 1))


def seconds(c: Counts, flop: float, wide: int, way: str, of: argparse.Namespace) -> list[float]:
    """Of one device, and of a rank: host, computing, sending, packing, and in all."""
    rate = of.fp32 if wide == 4 else of.bf16
    nbytes = c.bytes * wide / 2
    one = max(flop / rate + c.plain * of.gap, c.plain * of.host)
    host = c.kernels * of.host + c.collectives * of.start
    compute = flop / rate / RANKS + c.kernels * of.gap
    send = nbytes / of.nvlink + c.collectives * of.latency
    # read and written once where it leaves and once where it arrives
    pack = 4 * nbytes / of.memory
    shown = max(0.0, send - compute) + c.collectives * of.latency if way == "ring" else send
    return [one, host, compute, send, pack, max(host, compute + shown + pack)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value, what in (
        ("fp32", 26e12, "operations/s in fp32: 7.96 s and 31.4 s of the paper at 2048^2"),
        ("bf16", 450e12, "operations/s in bf16"),
        ("nvlink", 300e9, "bytes/s that a GPU sends to all others at once"),
        ("latency", 20e-6, "s of a collective without bytes"),
        ("memory", 2.5e12, "bytes/s of the GPU's memory"),
        ("gap", 2e-6, "s between two kernels"),
        ("host", 6e-6, "s of the host for each kernel"),
        ("start", 40e-6, "s of the host for each collective"),
    ):
        parser.add_argument(f"--{name}", type=float, default=value, help=f"{what} ({value:g})")
    of = parser.parse_args()
    print("An estimate from counts and assumed rates. ms of a step, one device and a rank of 8:")
    print(f"{'':34}" + "".join(
        f"{k:>10}" for k in ("one", "host", "compute", "send", "pack", "a rank", "efficiency")
    ))  # fmt: skip
    for (side, job, way), c in counts().items():
        for kind, wide in (("fp32", 4), ("bf16", 2)):
            times = seconds(c, work(side, job), wide, way, of)
            share = times[0] / RANKS / times[-1]
            row = "".join(f"{1e3 * t:10.2f}" for t in times)
            print(f"{side}^2 {job}, {way}, {kind}".ljust(34) + row + f"{share:10.0%}")


if __name__ == "__main__":
    main()
