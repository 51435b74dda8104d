"""For how many third-party models `st.plan` answers, and how long it takes.

    python benchmarks/zoo_plan.py [NAME ...] [--devices 4] [--limit 120] [--large] [--csv FILE]

Needs the extra `zoo`. Each model in a process of its own: its layouts on so many devices in fp32,
one dim sharded. Planned: a layout on several devices is not refused. Seconds: of the processor.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from tables import append

FIELDS = ["model", "result", "rows", "seconds", "why"]


def planned(name: str, devices: int, large: bool) -> dict[str, Any]:
    """A row of the table, in this process."""
    from zoo_models import LARGE, MODELS

    import shardtensor as st

    warnings.simplefilter("ignore")
    make, shape, dim = (LARGE if large else MODELS)[name]
    begin = time.process_time()
    found = st.plan(make, [shape], devices, dims=(dim,), precisions=(None,))
    several = [e for e in found if e.layout.ranks > 1]
    good = [e for e in several if not e.refused]
    why = [e.refused for e in several if e.refused]
    return {
        "model": name,
        "result": "planned" if good else "refused",
        "rows": len(good),
        "seconds": round(time.process_time() - begin, 1),
        "why": why[0] if why else "",
    }


def apart(name: str, devices: int, large: bool, limit: float) -> dict[str, Any]:
    """The same in a process of its own, which may end in any way."""
    code = [sys.executable, "-W", "ignore", __file__, "--one", name, "--devices", str(devices)]
    code += ["--large"] if large else []
    try:
        done = subprocess.run(code, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"model": name, "result": "no end", "why": f"after {limit:.0f} s"}
    lines = [x for x in done.stdout.splitlines() if x.startswith('{"model"')]
    if lines:
        return dict(json.loads(lines[-1]))
    last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    return {"model": name, "result": "crash", "why": last[:300]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one model")
    parser.add_argument("--large", action="store_true", help="at sizes that users have")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(planned(options.one, options.devices, options.large)), flush=True)
        os._exit(0)
    from zoo_models import MODELS

    names = [n for n in MODELS if not options.names or any(n.startswith(p) for p in options.names)]
    rows = []
    for name in names:
        rows.append(apart(name, options.devices, options.large, options.limit))
        r = rows[-1]
        print(f"{name:36} {r['result']:8} {r.get('seconds', 0):6.1f} s  {r['why']}", flush=True)
        if options.csv:
            append(options.csv, FIELDS, r)
    good = sum(r["result"] == "planned" for r in rows)
    print(f"{good} of {len(rows)} planned on {options.devices} devices")


if __name__ == "__main__":
    main()
