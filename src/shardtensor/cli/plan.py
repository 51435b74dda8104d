"""`shardtensor plan`: the configurations of a model as a table, JSON or a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..observe.network import DGX_H100, Network, folder, parsed, saved
from ..plan import store
from ..plan.device import CPU, measured_here
from ..plan.estimate import DEVICES, Device, Estimate, Layout, Task, estimate
from ..plan.parts import InParts, in_parts
from ..plan.plans import Plans
from ..plan.search import fewest, missing
from ..plan.search import plan as planned
from ..plan.step.ledger import KINDS
from .subject import factory, given, numbers, styled

GIB = 2**30
MOST_ROWS = 12
OPTIONS = ("fsdp", "checkpoint", "offload", "precision")


def plan(
    model: Annotated[str, typer.Argument(help="package.module:name or folder/file.py:name")],
    input: Annotated[list[str], typer.Option(help="1x3x512x512:bfloat16, or name=1x3x512x512")],
    arg: Annotated[list[str], typer.Option(help="an argument of the model: width=64")] = [],  # noqa: B006
    devices: Annotated[int, typer.Option(help="0: the fewest on which it fits")] = 0,
    device: Annotated[str, typer.Option(help=" | ".join([*DEVICES, "cpu"]))] = "h100",
    memory: Annotated[float, typer.Option(help="GiB of the device (cpu: host), not its own")] = 0,
    shard: Annotated[str, typer.Option(help="dims of the first input: 2,3; default: from 2")] = "",
    inference: Annotated[bool, typer.Option(help="a forward pass only")] = False,
    thorough: Annotated[bool, typer.Option(help="all options, also where not needed")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    links: Annotated[Path | None, typer.Option(help="a file that `doctor` saved")] = None,
    blocks: Annotated[str, typer.Option(help="classes of fsdp's units: Block,Layer")] = "",
    speeds: Annotated[str, typer.Option(help="of the devices: 1,1,0.5; sizes that fit them")] = "",
    multiple: Annotated[int, typer.Option(help="of which those sizes are: of a patch")] = 1,
    offload: Annotated[bool, typer.Option(help="also: backward's tensors in host memory")] = False,
    tensor: Annotated[str, typer.Option(help="weights on a tensor axis: *.fc1=col,*.fc2=row")] = "",
    tree: Annotated[bool, typer.Option(help="memory and time by module, of the best")] = False,
    picture: Annotated[Path | None, typer.Option(help="write a picture here")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page here")] = None,
    fresh: Annotated[bool, typer.Option(help="plan again what is known from before")] = False,
) -> None:
    """What a model needs on so many devices: memory, messages and time; no device is used.

    Answers are kept for the same question, while no source file that was loaded has changed.
    """
    inputs = given(input)
    each = list(inputs.values() if isinstance(inputs, dict) else inputs)
    try:
        rates = [float(s) for s in speeds.split(",") if s]
    except ValueError:
        raise ValueError(f"--speeds {speeds}: numbers, as 1,1,0.5") from None
    devices = devices or len(rates)
    hardware = _device(device, memory, devices)
    task = dict(
        make=factory(model, arg),
        shapes={k: i.shape for k, i in inputs.items()}
        if isinstance(inputs, dict)
        else [i.shape for i in inputs],
        dtypes=[i.dtype for i in each],
        dims=numbers(shard, ",", "--shard 2,3"),
        train=not inference,
        tensor=styled(tensor),
    )
    asked = {
        **{k: repr(v) for k, v in task.items() if k not in ("make", "tensor")},
        "model": [model, arg, str(Path.cwd())],
        "device": asdict(hardware),
        "devices": devices,
        "links": [links and links.read_text(), sorted(_state(folder().glob("links-*")))],
        "options": [thorough, blocks, rates, multiple, offload, tensor],
    }
    path = store.file_of(asked)
    known = None if fresh else store.load(path)
    if known is None:
        names = [name for name in blocks.split(",") if name]
        how = dict(blocks=names, thorough=thorough, speeds=rates, multiple=multiple)
        known = _searched(task, devices, hardware, links, device, offload=offload, **how)
        store.save(path, known[0], **known[1])
    (one, *plans), said = known
    devices = said["devices"]
    network = _network(links, devices, device)
    asks = Task(**task)  # type: ignore[arg-type]
    found = Plans(plans, asks, devices, hardware, network, missing(asks, devices))
    _progress()
    if as_json:
        print(json.dumps([facts(e, hardware) for e in found], indent=1))
    else:
        print(f"one device: {_said(one, hardware)}")
        if said["parts"] is not None:
            print(f"or {InParts(**said['parts'])}")
        if terms := hardware.assumes(devices):
            print(terms)
        for reason in found.missing:
            print(f"not tried, {reason}")
        _print(found, hardware, devices, thorough, network.node)
        if tree and not found[0].refused:
            print(f"{found[0].layout}:", found[0].tree(), sep="\n")
    if picture is not None:
        draw(found, hardware, picture)
    if html is not None:
        found.html(html)


def _searched(
    task: dict[str, Any],
    devices: int,
    hardware: Device,
    links: Path | None,
    device: str,
    **how: Any,
) -> tuple[list[Estimate], dict[str, Any]]:
    """One device, then all configurations; and on how many devices."""
    if not devices:
        most = max(hardware.hosted, default=512)
        least = fewest(device=hardware, network=_network(links, 0, device), most=most, **task)
        one = estimate(Task(**task), alone(task), hardware, _network(links, 0, device))
        if least is None and one.refused:
            raise ValueError(f"refused on one device, too: {one.refused}")
        if least is None and hardware.hosted:
            raise ValueError(
                f"it does not fit this host: up to {most} ranks share its "
                f"{hardware.memory / GIB:.1f} GiB; plan for GPUs, with --device, or one device in "
                "parts, with --devices 1"
            )
        if least is None:
            raise ValueError(f"it fits no number of {hardware.name} up to 512: shard more dims")
        devices = least[0]
    network = _network(links, devices, device)
    asked = {**task, **how}
    found = planned(devices=devices, device=hardware, network=network, told=_progress, **asked)
    one = estimate(Task(**task), alone(task), hardware, network)
    parts = None
    if not one.fits(hardware) and hardware.name == CPU:
        parts = asdict(in_parts(Task(**task), hardware, network))
    return [one, *found], {"devices": devices, "parts": parts}


def _state(paths: Iterable[Path]) -> Iterator[tuple[str, int]]:
    for path in paths:
        yield path.name, path.stat().st_mtime_ns


def _progress(done: int = 0, of: int = 0, name: str = "") -> None:
    """A line on a terminal: how far the search is; without arguments it goes away."""
    if sys.stderr.isatty():
        bar = "#" * (20 * done // of) if of else ""
        line = f"[{bar:20}] {done}/{of} {name}"[:78] if of else ""
        print(f"\r{line:78}\r" if not line else f"\r{line:78}", end="", file=sys.stderr, flush=True)


def alone(task: dict[str, Any]) -> Layout:
    """One device, whatever dims may be cut."""
    dims = tuple(Task(**task).dims)
    return Layout(1, dims, (1,) * len(dims))


def _said(e: Estimate, device: Device) -> str:
    if e.refused:
        return f"refused: {e.refused}"
    fits = "fits" if e.fits(device) else "does not fit"
    memory = device.among(e.layout.ranks).memory
    return f"{fits}: needs {e.peak / GIB:.3g} GiB of {memory / GIB:.0f}"


def facts(e: Estimate, device: Device) -> dict[str, Any]:
    """An estimate as plain values."""
    return {
        "layout": str(e.layout),
        "mesh": e.layout.mesh,
        "near": e.layout.near,
        "sizes": {f"dim{d}": n for d, n in zip(e.layout.dims, e.layout.sizes, strict=False)},
        "options": {k: getattr(e.layout.options, k) for k in OPTIONS},
        "fits": e.fits(device),
        "refused": e.refused,
        "memory": e.memory,
        "host": e.host,
        "peak": e.peak,
        "seconds": e.seconds,
        "compute": e.compute,
        "communication": e.communication,
        "flop": e.flop,
        "gathered": list(e.gathered),
        "assumed": list(e.assumed),
        "collectives": {
            k: dict(zip(("calls", "messages", "bytes"), v, strict=True))
            for k, v in e.collectives().items()
        },
    }


def _network(links: Path | None, devices: int, device: str) -> Network:
    """Of the file, else what was measured on this host between so many, else NVLink."""
    if links is not None:
        return parsed(links.read_text()).network()
    known = saved("gloo" if device == "cpu" else "nccl", devices)
    return DGX_H100 if known is None else known.network()


def _device(name: str, memory: float, devices: int) -> Device:
    if name not in (*DEVICES, "cpu"):
        raise ValueError(f"no device {name!r}; there are {', '.join(DEVICES)}, cpu")
    found = measured_here(devices) if name == "cpu" else DEVICES[name]
    return replace(found, memory=memory * GIB) if memory else found


def _print(found: list[Estimate], device: Device, devices: int, thorough: bool, node: int) -> None:
    """A table of the configurations, then what was left out and why."""
    from rich.console import Console
    from rich.table import Table

    most = max(e.peak for e in found)
    kinds = [k for k in KINDS if any(e.memory.get(k, 0) > most / 500 for e in found)]
    size, unit = (GIB, "GiB") if most > GIB else (2**20, "MiB")
    part = device.among(devices)
    table = Table(
        title=f"{devices} x {part.name} of {part.memory / GIB:.0f} GiB: {unit} of a rank at "
        "its peak, and a step",
        title_justify="left",
    )
    table.add_column("configuration", no_wrap=True)
    for name in ("peak", *kinds, "MB sent", "compute ms", "wire ms"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = [e for e in found if not e.refused][: None if thorough else MOST_ROWS]
    for e in shown:
        numbers = [e.peak / size, *(e.memory[k] / size for k in kinds)]
        numbers += [sum(s.bytes for s in e.sent) / 1e6, 1e3 * e.compute, 1e3 * e.communication]
        style = "" if e.fits(device) else "red"
        table.add_row(str(e.layout), *(f"{n:.2f}" for n in numbers), style=style)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)
    if devices > node:
        for e in shown:
            axes = ", ".join(e.layout.across(node)) or "none"
            console.print(f"across nodes, {e.layout}: {axes}", style="dim", highlight=False)
    if len(found) > len(shown):
        console.print(f"{len(found) - len(shown)} more with --thorough or --json.")
    for e in found:
        if e.refused:
            console.print(f"refused, {e.layout}: {e.refused}", style="dim", highlight=False)
    gathered = sorted({op for e in found for op in e.gathered})
    if gathered:
        console.print(f"These ops have no rule and gather their operands: {', '.join(gathered)}")
    for told in sorted({a for e in found for a in e.assumed}):
        console.print(f"Depends on the input: {told}", style="dim", highlight=False)
    if all(e.refused for e in found):
        console.print("All are refused: see the reasons above.")
    elif not any(e.fits(device) for e in found):
        console.print("None fits: take more devices, or let more dims be cut (--shard).")


def draw(found: list[Estimate], device: Device, path: Path) -> None:
    """Memory by kind and time of every configuration, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [e for e in found if not e.refused][:MOST_ROWS]
    device = device.among(found[0].layout.ranks) if found else device
    if not found:
        raise ValueError("every configuration is refused: nothing to draw")
    names = [str(e.layout) for e in found]
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.2 + 0.42 * len(found)), sharey=True, layout="constrained"
    )
    start = [0.0] * len(found)
    for kind in KINDS:
        width = [e.memory[kind] / GIB for e in found]
        if any(width):
            left.barh(names, width, left=start, label=kind)
            start = [a + b for a, b in zip(start, width, strict=True)]
    if max(start) > device.memory / GIB / 20:
        left.axvline(device.memory / GIB, color="black", ls="--", label=f"memory of {device.name}")
    left.set_xlabel("peak of a rank (GiB)")
    left.invert_yaxis()
    right.barh(names, [1e3 * e.compute for e in found], height=0.35, align="edge", label="compute")
    right.barh(
        names,
        [1e3 * e.communication for e in found],
        height=-0.35,
        align="edge",
        label="communication",
    )
    right.set_xlabel("step, estimated (ms)")
    for ax in (left, right):
        ax.legend(fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)
