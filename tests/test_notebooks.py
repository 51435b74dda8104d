"""What a notebook shows: pictures of cuts, results of ranks that have ended, under its event loop."""

import ast
import asyncio
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard

import shardtensor as st

D = torch.float64
NOTEBOOKS = Path(__file__).parent.parent / "docs" / "notebooks"


@pytest.mark.parametrize(
    "mesh, placements, sizes",
    [
        ((3,), [Shard(0)], {0: [4, 0, 3]}),
        ((2, 2), [Shard(1), Shard(0)], None),
        ((2, 2), [Shard(1), Shard(1)], None),
        ((2, 2), [Partial(), Shard(0)], None),
        ((2, 2), [Shard(0), Partial("avg")], None),
        ((2,), [Partial("max")], None),
        ((2, 2), [Replicate(), Shard(1)], None),
        ((1,), [Shard(0)], None),
    ],
)
def test_results_can_be_read_when_the_ranks_have_ended(mesh, placements, sizes):
    def run():
        on = init_device_mesh("cpu", mesh)
        spec = st.Spec.of(on, placements, (7, 5), sizes)
        g = torch.Generator().manual_seed(sum(a * 3**i for i, a in enumerate(spec.coordinate)))
        if not spec.partial:
            g.manual_seed(spec.index[0] + 3 * spec.index[1])
        local = torch.randn(spec.local_shape, dtype=D, generator=g)
        x = st.ShardTensor.from_local(local, on, placements, dict(spec.sizes)).requires_grad_()
        if not spec.partial:
            (x * x).sum().backward()
        return {"x": x, "n": 3}, x.full_tensor().detach(), x.sum() if not spec.partial else x

    for found, whole, total in st.simulate(torch.tensor(mesh).prod().item(), run):
        torch.testing.assert_close(found["x"].full_tensor(), whole, rtol=1e-12, atol=0)
        assert found["x"].tolist() == found["x"].full_tensor().tolist()
        assert isinstance(found["x"], st.ShardTensor)
        if found["x"].grad is not None:
            torch.testing.assert_close(found["x"].grad.full_tensor(), 2 * whole)
            assert total.item() == pytest.approx(whole.sum().item(), abs=1e-9)


def test_results_that_are_not_those_of_all_ranks():
    def run():
        on = init_device_mesh("cpu", (2,))
        x = st.distribute_tensor(torch.arange(5.0), on, [Shard(0)])
        return x if torch.distributed.get_rank() else None

    with pytest.raises(st.UnsupportedOpError, match="not all have returned it"):
        st.simulate(2, run)[1].full_tensor()


@pytest.mark.parametrize(
    "mesh, placements, boxes",
    [((3,), [Shard(0)], 3), ((2, 2), [Shard(2), Shard(0)], 4), ((2, 2), [Replicate(), Shard(1)], 2),
     ((2,), [Replicate()], 1), ((4,), [Partial()], 1)],
)  # fmt: skip
def test_the_picture_of_a_cut(mesh, placements, boxes):
    def run():
        on = init_device_mesh("cpu", mesh)
        spec = st.Spec.of(on, placements, (7, 5, 4))
        x = st.ShardTensor.from_local(
            torch.zeros(spec.local_shape), on, placements, dict(spec.sizes)
        )
        return spec._repr_html_(), x._repr_html_()

    for spec, x in st.simulate(torch.tensor(mesh).prod().item(), run):
        assert "ShardTensor, torch.float32" in x
        drawing = ElementTree.fromstring(spec[spec.index("<svg") : spec.index("</svg>") + 6])
        tag = "{http://www.w3.org/2000/svg}rect"
        assert len(drawing.findall(tag)) == boxes
        thick = [r for r in drawing.findall(tag) if r.get("stroke-width") == "2.5"]
        assert len(thick) == 1
        ElementTree.fromstring(x.replace("<br>", "<br/>"))


def test_a_number_has_a_picture():
    def run():
        on = init_device_mesh("cpu", (2,))
        return st.distribute_tensor(torch.tensor(1.0), on)._repr_html_()

    assert "rank 0, 1" in st.simulate(2, run)[0]


def test_under_a_running_event_loop():
    async def cell():
        model = nn.Conv2d(1, 1, 3, padding=1)
        report = st.check(model, torch.randn(1, 1, 8, 4), [Shard(2)], [(2,)])
        return report.ok, st.simulate(2, lambda: torch.distributed.get_rank())

    assert asyncio.run(cell()) == (True, [0, 1])


def shown(source, names):
    """The value of a cell's last line, where that is an expression."""
    tree = ast.parse(source)
    if isinstance(last := tree.body[-1], ast.Expr):
        tree.body[-1] = ast.Assign([ast.Name("shown", ast.Store())], last.value)
    exec(compile(ast.fix_missing_locations(tree), "cell", "exec"), names)
    return names.pop("shown", None)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem)
def test_the_notebooks_of_the_docs(path, tmp_path, monkeypatch, capsys):
    """They run, and show what they say they do; nothing of a run is kept in them."""
    monkeypatch.chdir(tmp_path)
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    assert not any(c.outputs or c.execution_count for c in cells)
    names = {"__name__": "__main__"}

    async def kernel():
        return [shown(c.source, names) for c in cells]

    results = asyncio.run(kernel())
    made = [r._repr_html_() for r in results if hasattr(r, "_repr_html_")]
    texts = capsys.readouterr().out
    if path.stem == "first_model":
        assert len(made) == 4 and all("<svg" in m for m in made)
        assert "[30, 20, 4, 10]" in made[1] and "conv2d" in made[3]
    elif path.stem == "is_my_model_right":
        right, wrong, fixed = made
        assert "RIGHT on 4 layouts" in right and "RIGHT on 4 layouts" in fixed
        assert "NOT RIGHT" in wrong and "What to do" in wrong and "has no rule" in texts
    else:
        plan, frame = made
        assert "<svg" in plan and "fits: False" in texts and "fits: True" in texts
        assert "report.html" in frame and (tmp_path / "report.html").stat().st_size > 4e6
