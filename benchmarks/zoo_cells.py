"""What each column of the matrix tries with a model of the zoo: name -> a row, in this process."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from apart import said
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from zoo import CLOSE, Case, error, gradients, prepared, sample, spread, step
from zoo_models import MODELS

import shardtensor as st
from shardtensor.ranks.testing import full, make_mesh

Row = dict[str, Any]
SETTINGS = {"2": (2, False), "uneven": (2, True), "3": (3, False)}
LR = 1e-3
# of a batch norm that cannot train on one sample, as torch says
ONE = "Expected more than 1 value per channel when training"


def runs(name: str, how: str | None) -> Row:
    """On 2 ranks, 2 with uneven shards, 3: value, gradients, in the strictest way right on all."""
    first: Row | None = None
    raised: Exception | None = None
    for other in CLOSE:
        try:
            row = _on_ranks(Case(name, other))
        except Exception as e:
            raised = raised or e
            continue
        if row["result"] == "right":
            return row
        first = first or row
    if first is None:
        assert raised is not None
        raise raised
    return first


def _on_ranks(case: Case) -> Row:
    found = {}
    for key, (ranks, cut) in SETTINGS.items():
        try:
            found[key] = case.sharded(ranks, cut)
        except Exception as e:
            found[key] = {"result": said(e)}
    bad = [r["result"] for r in found.values() if r["result"] != "right"]
    gathers = sorted({g for r in found.values() for g in r.get("gathers", ())})
    return {"result": bad[0] if bad else "right", "how": case.how, **found, "gathers": gathers}


def trains(name: str, how: str | None) -> Row:
    """Three steps of AdamW in training mode: losses, and all weights, against one device."""
    row: Row = {}
    for other in list(CLOSE)[list(CLOSE).index(how or "") :]:
        try:
            now = _steps(Case(name, other))
        except Exception as e:
            now = {"result": said(e)}
        row = row or now
        if now["result"] == "right":
            return now
    return row


def _steps(case: Case) -> Row:
    try:
        want, weights = _trained(case, None)
    except ValueError as e:
        if ONE not in str(e):
            raise
        case.x, case.value = (torch.cat([x, x.flip(-1)]) for x in (case.x, case.value))
        want, weights = _trained(case, None)
    shaken, moved = _trained(case, None, 1e-15)
    (got, found), _ = st.simulate(2, _trained, case, 2)
    off = max(abs(a - b) / abs(b) for a, b in zip(got, want, strict=True))
    scale = max(1e-9, 1e3 * max(abs(a - b) / abs(b) for a, b in zip(shaken, want, strict=True)))
    far = {k: float((found[k] - w).abs().max()) / LR for k, w in weights.items()}
    near = {k: float((moved[k] - w).abs().max()) / LR for k, w in weights.items()}
    over = {k: far[k] / max(1e-6, 1e3 * near[k]) for k in far}
    worst = max(over, key=lambda k: over[k])
    result = "right"
    if case.how == "in fp32":
        # of what is rounding alone AdamW makes whole steps
        whole = sum(float((found[k] - w).norm()) ** 2 for k, w in weights.items()) ** 0.5
        steps = 3 * LR * sum(w.numel() for w in weights.values()) ** 0.5
        if not (off < 1e-3 and whole < 0.1 * steps):
            result = f"WRONG: a loss by {off:.0e}, weights by {whole / steps:.0e} of their steps"
    elif not off < scale:
        result = f"WRONG: a loss by {off:.0e}"
    elif not over[worst] < 1:
        result = f"WRONG: {worst} by {far[worst]:.0e} of a step"
    rounding = off >= 1e-9 or max(far.values()) >= 1e-6
    how = ", ".join(filter(None, (case.how, "to its own rounding" if rounding else "")))
    return {"result": result, "how": how, "loss": off, "weight": far[worst]}


def _trained(case: Case, ranks: int | None, shake: float = 0.0) -> tuple[list[float], Any]:
    """The losses of three steps, and the weights after them."""
    model, x = copy.deepcopy(case.model).train(), case.x
    torch.manual_seed(5)
    y = torch.randn(case.value.shape, dtype=case.value.dtype)
    if shake:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
        x = x * (1 + max(shake, torch.finfo(x.dtype).eps) * noise)
    if ranks is not None:
        st.parallelize(model, make_mesh((ranks,)), sync=False)
        x = spread(case.name, x, ranks)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    losses = []
    torch.manual_seed(7)
    with st.random.match_single_device(), case.asked():
        for _ in range(3):
            out = model(x)
            loss = (out - _like(y, out)).abs().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.item()))
    return losses, {k: full(p.detach()) for k, p in model.named_parameters()}


def _like(y: Tensor, out: Tensor) -> Tensor:
    if not isinstance(out, st.ShardTensor):
        return y
    mesh, on = out.device_mesh, out.placements
    if any(p.is_partial() for p in on):
        return y
    return st.distribute_tensor(y, mesh, on, src_data_rank=None, sizes=dict(out.spec.sizes))


def bf16(name: str, how: str | None) -> Row:
    """Under autocast on 2 ranks, as far from float64 as one device under autocast is."""
    truth = Case(name, how or "")

    def run(ranks: int | None) -> tuple[Tensor, Tensor]:
        model, x = prepared(name, False), sample(name, False)
        for m in model.modules():
            if hasattr(m, "amp_mode"):
                # physicsnemo's modules ask for this where autocast is on
                m.amp_mode = True
        if ranks is not None:
            st.parallelize(model, make_mesh((ranks,)), sync=False, precision="bf16")
            x = spread(name, x, ranks)
        x.requires_grad_()
        if ranks is not None:
            out = step(model, x)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x)
            (out**2).mean().backward()
        return full(out.detach()).double(), _flat(gradients(model, x))

    wide = truth.value, _flat(truth.wanted)
    try:
        alone = [error(a, w) for a, w in zip(run(None), wide, strict=True)]
    except Exception as e:
        return {"result": "one device: " + said(e)}
    rows = st.simulate(2, run, 2)
    off = [max(error(r[i], wide[i]) for r in rows) for i in range(2)]
    result = "right"
    for what, mine, theirs in zip(("value", "gradient"), off, alone, strict=True):
        if not mine <= 3 * theirs + 1e-6:
            result = f"WRONG: its {what} by {mine:.0e}, one device's by {theirs:.0e}"
    return {"result": result, "value": off[0], "gradient": off[1], "alone": alone}


def _flat(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([torch.view_as_real(g).flatten().double() if g.is_complex()
                      else g.flatten().double() for g in found.values()])  # fmt: skip


def plan(name: str, how: str | None) -> Row:
    """Whether st.plan has a row that is not refused, on 4 devices."""
    make, shape, dim = MODELS[name]
    for batch in (1, 2):
        shapes = [(batch * shape[0], *shape[1:])]
        found = st.plan(make, shapes, 4, dims=(dim,), precisions=(None,))
        several = [e for e in found if e.layout.ranks > 1]
        if not any(ONE in e.refused for e in several):
            break
    good = [e for e in several if not e.refused]
    why = next((e.refused for e in several if e.refused), "")
    return {"result": "planned" if good else f"refused: {why}", "rows": len(good)}


def check(name: str, how: str | None) -> Row:
    """What st.check says of a model that is right."""
    report = st.check(prepared(name, False), sample(name, False), [Shard(MODELS[name][2])])
    row = {"result": report.verdict, "notes": report.notes}
    return row if report.ok else {**row, "result": f"{report.verdict}: {report}"[:600]}


def compiled(name: str, how: str | None, backend: str = "aot_eager") -> Row:
    """Whole by st.compile, or by blocks, on 2 ranks, against one device."""
    case = Case(name, how or "")

    def on_rank(names: tuple[str, ...] | None) -> Row:
        model, x = copy.deepcopy(case.model), spread(name, case.x, 2).requires_grad_()
        call = st.compile(model, blocks=names, backend=backend, fullgraph=True)  # type: ignore[call-overload]
        with case.asked():
            # the first call may fill caches, and runs eagerly where it does; what is loaded to
            # compile the second, such as tqdm's lock, may be of what it had read
            for _ in range(3):
                call(x)
            made = _made(call)
            got = step(call, x)
        if not made or _made(call) > made:
            return {"result": "it makes a graph at each call" if made else "it runs eagerly"}
        return {**case.errors(full(got), gradients(model, x)), "graphs": made}

    why = ""
    for how, names in (("whole", None), ("blocks", repeated(case.model))):
        if how == "blocks" and not names:
            continue
        try:
            rows = st.simulate(2, on_rank, names)
        except Exception as e:
            why = why or said(e)
            continue
        bad = [r["result"] for r in rows if r["result"] != "right"]
        return {"result": bad[0] if bad else how, "why": why, "graphs": rows[0].get("graphs")}
    return {"result": why}


def _made(call: Any) -> int:
    """How many graphs were made of what was called, or of blocks of it."""
    if isinstance(call, nn.Module):
        return sum(getattr(m.__dict__.get("forward"), "traces", 0) for m in call.modules())
    return int(call.traces)


def inductor(name: str, how: str | None) -> Row:
    """The same by Inductor, which makes C++ of it."""
    return compiled(name, how, "inductor")


def repeated(model: nn.Module) -> tuple[str, ...]:
    """The classes of the elements of outermost lists, which are blocks by themselves."""
    lists = (nn.ModuleList, nn.Sequential)
    found: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, lists):
            for m in module.children():
                if not isinstance(m, (*lists, nn.Identity)) and len(list(m.children())) > 1:
                    found[type(m).__name__] = found.get(type(m).__name__, 0) + 1
    return tuple(k for k, n in found.items() if n > 1)


def rehearse(name: str, how: str | None) -> Row:
    """One rank of 2, alone: its messages are those of the rank among others."""

    def prepare(real: bool) -> Callable[[], Any]:
        mesh = make_mesh((2,)) if real else init_device_mesh("cpu", (2,))
        model, x, dim = prepared(name, False), sample(name, False), MODELS[name][2]
        x = st.distribute_tensor(x, mesh, [Shard(dim)], src_data_rank=None)

        def run() -> None:
            # some models keep tables between calls, with the graph that made them
            (copy.deepcopy(model)(x) ** 2).mean().backward()

        return run

    def sent() -> Any:
        run = prepare(True)
        with st.trace() as t:
            run()
        return [(s.collective, s.bytes) for s in t.sent]

    want = st.simulate(2, sent)[1]
    found = st.rehearse(lambda: prepare(False), 2, 1, repeats=1)
    got = [(s.collective, s.bytes) for s in found.sent]
    same = got == want
    result = (
        "right" if same else f"WRONG: {sum(b for _, b in got)} bytes, not {sum(b for _, b in want)}"
    )
    return {"result": result, "bytes": sum(b for _, b in got), "messages": len(got)}


CELLS: dict[str, Callable[[str, str | None], Row]] = {
    f.__name__: f for f in (runs, trains, check, compiled, plan, rehearse, bf16, inductor)
}


def timed(tool: str, name: str, how: str | None) -> Row:
    """A cell, with its seconds of the processor; what it raises is its result.

    how: a model is judged, if `runs` found that.
    """
    begin = time.process_time()
    try:
        row = CELLS[tool](name, how)
    except Exception as e:
        row = {"result": said(e)}
    return {**row, "seconds": round(time.process_time() - begin, 1)}
