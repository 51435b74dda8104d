"""`shardtensor check`: whether a model is right when sharded, on simulated ranks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..later import dt
from ..plan.check.check import check as checked
from .subject import factory, given, numbers


def check(
    model: Annotated[str, typer.Argument(help="package.module:name or folder/file.py:name")],
    input: Annotated[
        list[str], typer.Option(help="1x3x64x64:int64, or name=1x3x64x64; small will do")
    ],
    arg: Annotated[list[str], typer.Option(help="an argument of the model: width=64")] = [],  # noqa: B006
    shard: Annotated[str, typer.Option(help="dims, one for each mesh axis: 2 or 2,3")] = "2",
    mesh: Annotated[list[str], typer.Option(help="ranks along the axes: 3 or 2x2")] = [],  # noqa: B006
    train: Annotated[bool, typer.Option(help="train() or eval()")] = True,
    single: Annotated[bool, typer.Option(help="compare in float32")] = False,
    at: Annotated[str, typer.Option(help="the input's shape in your runs: 1x3x4096x4096")] = "",
    as_json: Annotated[bool, typer.Option("--json")] = False,
    html: Annotated[Path | None, typer.Option(help="write a page here")] = None,
) -> None:
    """Hold a model, sharded, against itself on one device. Status 1: it is not right."""
    torch.manual_seed(0)
    made = factory(model, arg)().train(train)
    named = given(input)
    inputs = (
        {k: i.make() for k, i in named.items()}
        if isinstance(named, dict)
        else [i.make() for i in named]
    )
    shapes = [numbers(text, "x", "--mesh 2x2") for text in mesh] or None
    placements = [dt.Shard(d) for d in numbers(shard, ",", "--shard 2,3")]
    size = numbers(at, "x", "--at 1x3x4096x4096") if at else None
    report = checked(made, inputs, placements, shapes, double=not single, at=size)
    if as_json:
        found = {"ok": report.ok, "findings": list(map(asdict, report.findings))}
        print(json.dumps({**found, "notes": report.notes}, indent=1))
    else:
        print(report)
    if html is not None:
        report.html(html)
    if not report.ok:
        raise typer.Exit(1)
