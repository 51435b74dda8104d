"""Everything that needs a GPU, in one command of at most 8 minutes: `make gpu`.

    python benchmarks/gpu.py [--out out/gpu] [--limit 480] [--parts cases vit ...]

One GPU runs simulated ranks, one rank of a silent world and a world of one rank over NCCL; several
run the same steps over NCCL, too. Every part is a process with its own share of the time; after
each, gpu.json, gpu.md and gpu.png are written anew, so a part that fails or runs out of time leaves
the others. On a pretended GPU (benchmarks/pretended) it is a rehearsal: what is raised counts, and
times and values mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_models import MODELS
from launches import PRETENDED, as_pretended, inferred, part, rank_of, trained, vit127
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.attention import merge_kernel, neighborhood
from shardtensor.attention.merge import Merge
from shardtensor.attention.strategy import strategy

HERE = Path(__file__).parent
# seconds that the parts may take of 480, in the order in which they run
PARTS = {
    "cases": 100, "vit": 90, "launches": 50, "graphs": 35, "nccl": 40, "compiled": 50,
    "natten": 15, "tiled": 55, "merge": 10, "dispatch": 25, "doctor": 10,
}  # fmt: skip
# of arXiv 2605.11111, for one H100: seconds of a training step and GB of its memory
PAPER = {"1024 s": 7.96, "2048 s": 31.4, "GB": 51.4}


def milliseconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Of the device, the median."""
    run()
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found)


def peak(run: Callable[[], Any]) -> float:
    """GB beyond nothing."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e9


def vit() -> list[dict[str, Any]]:
    """The paper's ViT on one device, and as a rank of 2, 4 and 8 whose collectives move nothing."""
    rows = []
    for side, dtype, train in (
        (1024, torch.bfloat16, False), (1024, torch.bfloat16, True), (2048, torch.bfloat16, True),
        (1024, torch.float32, True), (2048, torch.float32, True),
    ):  # fmt: skip
        make, shape = trained if train else inferred, (1, 3, side, side)
        runs = [(1, "plain"), *((n, way) for n in (2, 4, 8) for way in ("all_to_all", "ring"))]
        for n, way in runs:
            job = {"side": side, "dtype": str(dtype)[6:], "training": train, "ranks": n, "way": way}
            try:
                if n == 1:
                    whole = torch.zeros(shape, device="cuda", dtype=dtype)
                    step = make(vit127(side, dtype), whole)
                    found = milliseconds(step, 3), peak(step)
                else:
                    with rank_of(n) as mesh, strategy(way):
                        x = part(shape, 2, mesh, [side // n] * n, dtype)
                        step = make(st.parallelize(vit127(side, dtype), mesh), x)
                        found = milliseconds(step, 3), peak(step)
                rows.append({**job, "ms": found[0], "GB": found[1]})
            except torch.cuda.OutOfMemoryError as e:
                rows.append({**job, "error": str(e)[:200]})
            tell(rows)
    return rows


def graphs() -> list[dict[str, Any]]:
    """A step captured by torch.cuda.graph: as one rank of 4, eager and replayed."""
    rows = []
    for name in ("U-Net", "ViT"):
        build, shape = MODELS[name]
        torch.manual_seed(0)
        with rank_of(4) as mesh:
            model = st.parallelize(build(256).cuda(), mesh)
            x = part(shape(256), 2, mesh, [64] * 4, torch.float32)
            # of zeros some gradients would be zero, whatever was captured
            x.to_local().normal_()

            def step(model: Any = model, x: Any = x) -> None:
                for p in model.parameters():
                    p.grad = None
                model(x).square().mean().backward()

            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    step()
            torch.cuda.synchronize()
            eager = [p.grad.clone() for p in model.parameters()]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            graph.replay()
            torch.cuda.synchronize()
            pairs = zip(model.parameters(), eager, strict=True)
            error = max(float((p.grad - e).norm() / e.norm().clamp(min=1e-6)) for p, e in pairs)
            times = milliseconds(step), milliseconds(graph.replay)
        rows.append({"model": name, "eager ms": times[0], "replayed ms": times[1], "error": error})
        tell(rows)
    return rows


def nccl() -> list[dict[str, Any]]:
    """Steps over NCCL on every GPU, against one device."""
    warnings.simplefilter("ignore")
    mesh, device = st.init()
    rows = []
    for name, (build, shape) in MODELS.items():
        torch.manual_seed(0)
        plain = build(256).to(device)
        model = st.parallelize(build(256).to(device), mesh)
        model.load_state_dict(plain.state_dict())
        whole = torch.randn(shape(256), device=device)
        x = st.distribute_tensor(whole, mesh, [Shard(2)])
        for m, given in ((plain, whole), (model, x)):
            m(given).square().mean().backward()
        pairs = zip(plain.parameters(), model.parameters(), strict=True)
        error = max(float((a.grad - b.grad).abs().max() / a.grad.abs().max()) for a, b in pairs)
        times = milliseconds(trained(plain, whole)), milliseconds(trained(model, x))
        rows.append({
            "model": name, "ranks": mesh.size(), "gradients differ by": error,
            "one device ms": times[0], "sharded ms": times[1],
        })  # fmt: skip
        if dist.get_rank() == 0:
            tell(rows)
    dist.destroy_process_group()
    return rows


def compiled() -> list[dict[str, Any]]:
    """As one rank of 4: eager, compiled, compiled with CUDA graphs."""
    rows = []
    for name in ("ViT", "U-Net"):
        build, shape = MODELS[name]
        row: dict[str, Any] = {"model": name}
        for way, options in (
            ("eager", None),
            ("compiled", {}),
            ("graphs", {"mode": "reduce-overhead"}),
        ):
            with rank_of(4) as mesh:
                model = st.parallelize(build(256).cuda(), mesh)
                call = model if options is None else st.compile(model, **options)
                x = part(shape(256), 2, mesh, [64] * 4, torch.float32)
                try:
                    row[f"{way} ms"] = milliseconds(trained(call, x))
                except Exception as e:
                    row[f"{way} ms"] = f"{type(e).__name__}: {e}"[:200]
        rows.append(row)
        tell(rows)
    return rows


def natten() -> list[dict[str, Any]]:
    """Neighbourhood attention by NATTEN's kernels and by ours, where NATTEN is installed."""
    rows = []
    q, k, v = (torch.randn(1, 64, 64, 4, 32, device="cuda") for _ in range(3))
    found = neighborhood.installed(q, v)
    if found is None:
        return [{"natten": "not installed"}]
    devices = neighborhood.NATTEN_DEVICES
    for kernel in (3, 7, 13):
        theirs = st.neighborhood_attention(q, k, v, kernel)
        neighborhood.NATTEN_DEVICES = ()
        ours = st.neighborhood_attention(q, k, v, kernel)
        neighborhood.NATTEN_DEVICES = devices
        rows.append({"kernel": kernel, "differ by": float((ours - theirs).abs().max())})
    return rows


def merge() -> list[dict[str, Any]]:
    """Three blocks of a ring merged by the Triton kernel and by torch's ops."""
    if PRETENDED:
        return [{"merge": "Triton launches nothing on a pretended GPU"}]
    kernel, rows = merge_kernel._kernel, []
    for dtype in (torch.float32, torch.bfloat16):
        made: dict[str, Any] = {"device": "cuda", "dtype": dtype}
        q = torch.randn(1, 16384, 16, 48, **made).transpose(1, 2)
        found = [(torch.randn_like(q), torch.randn(q.shape[:3], device="cuda")) for _ in range(3)]

        def whole(q: Any = q, found: Any = found) -> Any:
            total = Merge(q, q)
            for i, block in enumerate(found):
                total.add((0, q.shape[2]), *block, last=i == 2)
            return total.result()

        row: dict[str, Any] = {"dtype": str(dtype)}
        results = []
        for name, one in (("torch", None), ("triton", kernel)):
            merge_kernel._kernel = one
            row[f"{name} ms"] = milliseconds(whole)
            results.append(whole())
        pairs = zip(*results, strict=True)
        row["differ by"] = max(float((a - b).abs().max()) for a, b in pairs)
        rows.append(row)
    return rows


OWN = {f.__name__: f for f in (vit, graphs, nccl, compiled, natten, merge)}


def tell(rows: list[dict[str, Any]]) -> None:
    """What there is so far, where the parent reads it."""
    Path(os.environ["GPU_ROWS"]).write_text(json.dumps(rows))


def command(name: str, rows: Path) -> list[str]:
    python = sys.executable
    if name == "cases":
        return [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "cuda", "-n",
                str(min(8, os.cpu_count() or 1)), "-k", "some", "tests/test_cases.py"]  # fmt: skip
    if name == "launches":
        return [python, "benchmarks/launches.py", "--large", "--json", str(rows)]
    if name == "tiled":
        return [python, "benchmarks/gpu_tiled.py", "--json", str(rows)]
    if name == "dispatch":
        return [python, "benchmarks/dispatch.py"]
    if name == "doctor":
        return [python, "-m", "shardtensor", "doctor", "--quick", "--json"]
    if name == "nccl":
        ranks = str(torch.cuda.device_count())
        torchrun = [
            python,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            ranks,
        ]
        return [*torchrun, "benchmarks/gpu.py", "--part", name]
    return [python, "benchmarks/gpu.py", "--part", name]


def run(name: str, seconds: float, out: Path) -> dict[str, Any]:
    """One part: how it ended, how long it took, its rows and the end of what it said."""
    rows = out / f"{name}.rows.json"
    rows.unlink(missing_ok=True)
    paths = [HERE.parent / "src", HERE, HERE.parent / "tests", HERE.parent / "examples"]
    env = {
        **os.environ, "GPU_ROWS": str(rows), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": ":".join(map(str, paths)),
    }  # fmt: skip
    if name == "merge":
        env["SHARDTENSOR_MERGE"] = "triton"
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command(name, rows), cwd=HERE.parent, env=env, timeout=seconds, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        ended, said = str(done.returncode), done.stdout
    except subprocess.TimeoutExpired as e:
        ended = f"stopped after {seconds:.0f} s"
        said = (e.stdout or b"").decode(errors="replace") if isinstance(e.stdout, bytes) else ""
    found = json.loads(rows.read_text()) if rows.exists() else []
    rows.unlink(missing_ok=True)
    found = found.get("rows", found) if isinstance(found, dict) else found
    took = round(time.monotonic() - begin, 1)
    return {"ended": ended, "seconds": took, "rows": found, "said": said[-6000:]}


def page(told: dict[str, Any]) -> str:
    """All parts as one page of tables."""
    lines = [f"# {told['card']}", "", f"torch {told['torch']}, CUDA {told['cuda']}, {told['date']}"]
    if told["pretended"]:
        lines += ["", "**A rehearsal on a pretended GPU: times and values mean nothing.**"]
    for name, found in told["parts"].items():
        lines += ["", f"## {name}: ended with {found['ended']} after {found['seconds']} s", ""]
        if found["rows"]:
            keys = list(dict.fromkeys(k for row in found["rows"] for k in row))
            lines += ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
            for row in found["rows"]:
                cells = (row.get(k, "") for k in keys)
                lines.append("| " + " | ".join(
                    f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells
                ) + " |")  # fmt: skip
        if found["ended"] != "0" or not found["rows"]:
            lines += ["```", *found["said"].splitlines()[-25:], "```"]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Time and memory of the ViT over the number of ranks; dashed: as the first device's over n."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    kinds = sorted({(r["side"], r["dtype"], r["training"]) for r in rows if "ms" in r})
    for color, kind in enumerate(kinds):
        mine = [r for r in rows if (r["side"], r["dtype"], r["training"]) == kind and "ms" in r]
        for way, style in (("all_to_all", "o-"), ("ring", "s:")):
            line = sorted(
                (r["ranks"], r["ms"], r["GB"]) for r in mine if r["way"] in ("plain", way)
            )
            label = f"{kind[0]}² {kind[1]} {'training' if kind[2] else 'inference'}, {way}"
            for axis, values in zip(
                axes, ([x[1] for x in line], [x[2] for x in line]), strict=True
            ):
                axis.loglog([x[0] for x in line], values, style, color=f"C{color}", label=label)
    axes[0].set_ylabel("ms a step, rehearsed")
    axes[1].set_ylabel("peak GB")
    for axis in axes:
        axis.set_xlabel("ranks")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--limit", type=float, default=480, help="seconds for all parts")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--part", choices=list(OWN), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if PRETENDED:
        as_pretended()
    if options.part:
        warnings.simplefilter("ignore")
        rows = OWN[options.part]()
        if int(os.environ.get("RANK", 0)) == 0:
            tell(rows)
        return
    if not torch.cuda.is_available():
        sys.exit("no GPU here: torch.cuda.is_available() is false")
    options.out.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {
        "card": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}",
        "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"), "pretended": bool(PRETENDED), "paper": PAPER,
        "parts": {},
    }  # fmt: skip
    begin = time.monotonic()
    for name in options.parts:
        left = options.limit - (time.monotonic() - begin)
        if left < 5:
            told["parts"][name] = {"ended": "no time left", "seconds": 0, "rows": [], "said": ""}
            continue
        found = run(name, min(left, PARTS[name] * options.limit / sum(PARTS.values())), options.out)
        told["parts"][name] = found
        print(f"{name:10} ended with {found['ended']}, {found['seconds']} s", flush=True)
        (options.out / "gpu.json").write_text(json.dumps(told, indent=1))
        (options.out / "gpu.md").write_text(page(told))
        if name == "vit" and found["rows"]:
            draw(found["rows"], options.out / "gpu.png", f"ViT, 127 M, on {told['card']}")
    print(f"{options.out}/gpu.md, gpu.json, gpu.png: {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
