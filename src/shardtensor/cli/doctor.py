"""`shardtensor doctor`: the installation, the environment and the links between ranks."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch.distributed.device_mesh import init_device_mesh

from ..observe.network import DGX_H100, Measured, save
from ..plan import doctor as doctors
from ..plan.calibrate import calibrated, is_busy
from ..plan.device import Rates
from ..ranks.testing import make_mesh
from ..ranks.workers import Pool
from ..train.launch import init, place

QUICK = (1 << 10, 1 << 18)


def doctor(
    ranks: Annotated[int, typer.Option(help="start so many here; under torchrun: its own")] = 2,
    quick: Annotated[bool, typer.Option(help="two sizes of messages only")] = False,
    keep: Annotated[
        bool | None,
        typer.Option(help="save what was measured; default: of a quiet machine"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Versions, devices, likely mistakes; latency and bandwidth of each collective.

    What is measured is saved for `shardtensor plan` and for the choice of an attention strategy
    by programs of as many ranks that start with `init`. Without GPUs what ops take is measured,
    too, by class, of one rank and of all at work. The figures of a busy machine are not kept.
    """
    sizes = QUICK if quick else doctors.SIZES
    if place().ranks > 1:
        mesh, _ = init()
        ranks = mesh.size()
        measured: Measured | None = doctors.measure(mesh, sizes)
        if dist.get_rank():
            return
    else:
        measured = _here(ranks, sizes) if ranks > 1 else None
    rates: list[Rates] = []
    why = [is_busy()]
    if not torch.cuda.device_count() and not quick and place().ranks == 1:
        for n in sorted({1, ranks}):
            network = measured.network() if measured is not None and n > 1 else DGX_H100
            one = calibrated(n, network)
            rates += [] if one.rates is None else [one.rates]
            why += one.why
    why = list(dict.fromkeys(filter(None, why)))
    path = None
    if keep or (keep is None and not why):
        path = None if measured is None else save(measured)
        for r in rates:
            r.save()
    known, found = doctors.facts(), doctors.suspects(ranks)
    if as_json:
        links = None if measured is None else asdict(measured)
        facts = {"measured": links, "rates": [asdict(r) for r in rates], "busy": why}
        print(json.dumps({**known, "suspects": found, **facts}, indent=1))
    else:
        _print(known, found, measured)
        for r in rates:
            _print_rates(r)
        for reason in why:
            print(f"this machine is busy: {reason}")
        if path is not None:
            print(f"saved: {path}")
        elif why and keep is None:
            print("nothing is saved: run it again when the machine is quiet, or with --keep")


def _print_rates(rates: Rates) -> None:
    """What ops take by class: of few bytes, of many, and of arithmetic."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{rates.ranks} ranks of {rates.threads} threads: an op's time; Python adds "
        f"{1e6 * rates.launch:.0f} us",
        title_justify="left",
    )
    for text in ("class", "least us", "GB/s", "GFLOP/s"):
        table.add_column(text, justify="left" if text == "class" else "right")
    for kind, rate in rates.classes.items():
        (a, s), (b, t) = rate.points[0], rate.points[-1]
        across = f"{(b - a) / (t - s) / 1e9:.1f}" if t > s else "-"
        arithmetic = f"{1e-9 / rate.flop:.1f}" if rate.flop else "-"
        table.add_row(kind, f"{1e6 * s:.1f}", across, arithmetic)
    Console(highlight=False).print(table)


def _here(ranks: int, sizes: tuple[int, ...]) -> Measured:
    backend = "nccl" if torch.cuda.device_count() >= ranks else "gloo"
    pool = Pool(ranks, backend)
    try:
        return pool.run(_measure, sizes, backend)[0]
    finally:
        pool.close()


def _measure(sizes: tuple[int, ...], backend: str) -> Measured:
    if backend == "nccl":
        torch.cuda.set_device(dist.get_rank())
        mesh = init_device_mesh("cuda", (dist.get_world_size(),))
        return doctors.measure(mesh, sizes)
    return doctors.measure(make_mesh((dist.get_world_size(),)), sizes)


def _print(known: dict[str, Any], found: list[str], measured: Measured | None) -> None:
    """Facts, suspects and a table of collectives by size."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    libraries = ", ".join(f"{k} {v}" for k, v in known["libraries"].items() if v)
    backends = ", ".join(k for k, v in known["backends"].items() if v)
    rows = {
        "shardtensor": f"{known['shardtensor']}, Python {known['python']}, torch {known['torch']}",
        "libraries": libraries,
        "backends": backends,
        "host": f"{known['host']}, {known['cores']} cores",
        "devices": ", ".join(known["devices"]) or "none but the CPU",
        "environment": ", ".join(f"{k}={v}" for k, v in known["environment"].items()) or "-",
    }
    for k, v in rows.items():
        console.print(f"{k:12} {v}")
    for text in found:
        console.print(f"[bold]look:[/bold] {text}")
    if measured is None:
        return
    sizes = list(next(iter(measured.seconds.values())))
    table = Table(
        title=f"{measured.ranks} ranks, {measured.backend}: microseconds by KiB of a rank",
        title_justify="left",
    )
    table.add_column("collective")
    for text in (*(f"{n >> 10}" for n in sizes), "latency us", "GB/s sent"):
        table.add_column(text, justify="right")
    for kind, times in measured.seconds.items():
        link = measured.links[kind]
        table.add_row(
            kind,
            *(f"{1e6 * t:.0f}" for t in times.values()),
            f"{1e6 * link.latency:.0f}",
            f"{link.bandwidth / 1e9:.2f}",
        )
    console.print(table)
