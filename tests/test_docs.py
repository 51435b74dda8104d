"""The code in the docs runs."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch
import yaml
from cases import CASES, table
from forked import Program
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import registry
from shardtensor import testing as T

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    "index.md",
    "api.md",
    "balance.md",
    "decode.md",
    "errors.md",
    "migrate.md",
    "pages.md",
    "plan.md",
    "questions.md",
    "trace.md",
    *(f"tutorials/{p.name}" for p in (DOCS / "tutorials").glob("*")),
]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page(page):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)
    assert blocks or page == "errors.md"
    exec(compile("\n".join(blocks), page, "exec"), {})


def _script_of_fsdp():
    """What its ranks return, and one device's losses."""
    page = (DOCS / "tutorials" / "fsdp.md").read_text()
    # what a process draws that nobody has told a seed
    torch.seed()
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.S)), names := {})
    return *names["main"](), names["serial"], sum(p.numel() for p in names["make"]().parameters())


@pytest.mark.gloo
def test_the_script_of_fsdp():
    groups, numbers, serial, total = zip(*T.run_workers(4, _script_of_fsdp), strict=True)
    assert serial[0] == serial[3] and sum(numbers) == total[0]
    for of_groups, want in zip(zip(*groups, strict=True), serial[0], strict=True):
        assert sum(of_groups) / 4 == pytest.approx(want, rel=1e-5)


def test_the_example_of_the_readme():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    st.simulate(2, lambda: exec(block, {}))


def _on_the_page_of_errors():
    """What its quoted messages say, without the names and numbers that stand for others."""
    quoted = re.findall(r"^`.*`$", (DOCS / "errors.md").read_text(), re.M)
    pieces = [p for line in quoted for text in re.findall("`(.*?)`", line)
              for p in re.split(r"\b(?:NAME|SPEC|N|FILE|LINE)\b|rank \d( in)?|\.\.\.", text) if p]  # fmt: skip
    return [p for piece in pieces if len(p := piece.strip(" :;()")) > 3]


def test_error_messages_are_those_of_the_code():
    source = "".join(p.read_text() for p in (ROOT / "src").rglob("*.py"))
    # pieces of a message stand on lines of their own
    source = re.sub(r'"\s+f?"', "", source)
    pieces = _on_the_page_of_errors()
    assert len(pieces) > 20 and not [p for p in pieces if p not in source]


def _refusals():
    """(file, message) of each UnsupportedOpError that is raised with one, "..." for what it puts in."""
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Raise(exc=ast.Call(func=ast.Name("UnsupportedOpError"), args=[said, *_])):
                    parts = said.values if isinstance(said, ast.JoinedStr) else [said]
                    words = (
                        str(getattr(p, "value", "")) if isinstance(p, ast.Constant) else "..."
                        for p in parts
                    )
                    yield path.name, "".join(words)


def test_every_refusal_is_on_the_page_of_errors():
    pieces = [p for p in _on_the_page_of_errors() if len(p) > 6]
    found = [r for r in _refusals() if re.search(r"\w", r[1])]
    assert len(found) > 100
    assert not [r for r in found if not any(p in r[1] for p in pieces)]


@pytest.mark.parametrize("name, to", [("layers", "md"), ("costs", "md"), ("llms", "txt")])
def test_pages_are_what_their_scripts_make(name, to):
    """`python docs/NAME.py > docs/NAME.TO` makes them."""
    made = subprocess.run(
        [sys.executable, "-W", "ignore", DOCS / f"{name}.py"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert made.stdout == (DOCS / f"{name}.{to}").read_text()


NAMED = re.compile(r"`(?:python )?((?:tests|examples|benchmarks)/[\w/.]+)(?:::(\w+))?[^`]*`")


def test_tests_that_pages_name_are_there():
    """Their files, and in these the test that is named."""
    named = [
        (page.name, *named)
        for page in DOCS.rglob("*.md")
        for named in NAMED.findall(page.read_text())
    ]
    lost = [n for n in named if not (ROOT / n[1]).exists()]
    lost += [n for n in named if n[2] and f"\ndef {n[2]}(" not in (ROOT / n[1]).read_text()]
    assert len(named) > 100 and len([n for n in named if n[2]]) > 20 and not lost


CLAIM = re.compile(
    r"\b(never|always|exact|exactly|bit-equal|bit by bit|nothing of|no hang)\b", re.I
)


def test_a_page_that_claims_names_what_holds_it():
    """A test, or the benchmark that measured it. Pages that scripts make of the code claim nothing."""
    made = {"layers.md", "operators.md", "zoo.md"}
    claiming = [
        (page.name, text)
        for page in DOCS.rglob("*.md")
        if page.name not in made
        and CLAIM.search(text := re.sub(r"```.*?```", "", page.read_text(), flags=re.S))
    ]
    assert len(claiming) > 15 and not [name for name, text in claiming if not NAMED.search(text)]


def _anchors(page):
    """What its headings are linked by, as mkdocs makes it of them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    words = (re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", t)) for t in titles)
    return {re.sub(r"[-\s]+", "-", w.strip().lower()) for w in words}


def test_links_lead_somewhere():
    """Those within the repository, and to headings of pages."""
    pages, found, lost = [*DOCS.rglob("*.md"), *ROOT.glob("*.md")], 0, []
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            if re.match(r"\w+:", link):
                continue
            to = (page.parent / path) if path else page
            found += 1
            if not to.exists() or (anchor and to.suffix == ".md" and anchor not in _anchors(to)):
                lost.append(f"{page.name}: {link}")
    assert found > 150 and not lost


def test_the_rules_of_the_page_on_rules():
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "rules.md").read_text(), re.S)
    module = types.ModuleType("example_of_a_rule")
    sys.modules[module.__name__] = module
    try:
        exec("\n".join(blocks), module.__dict__)
        _hold_the_rules_of_the_page(module)
        _hold_the_rules_by_hand(module)
    finally:
        del sys.modules[module.__name__]
    assert callable(module.mean3.__wrapped__) and module.st is st


def _hold_the_rules_of_the_page(module):
    g = torch.Generator().manual_seed(0)
    image, a, b, w = (
        torch.randn(*s, dtype=torch.float64, generator=g)
        for s in ((2, 3, 7, 6), (2, 7, 3), (5, 3), (3,))
    )
    ways = torch.randint(7, (4, 3), generator=g)
    for cut in T.cuts(7):
        mesh, rows = (len(cut),), T.shard(1, cut)
        T.hold(module.smooth, [image], [T.shard(2, cut)], mesh)
        T.hold(module.similarity, [a, b, w], [rows, None, None], mesh)
        T.hold(module.similarity, [a, b, w], [T.shard(2), T.replicated(), None], mesh)
        T.hold(module.unit, [a], [rows], mesh)
        T.hold(module.means, [image[0, 0], ways], [T.shard(0, cut), None], mesh)
        T.hold(module.means, [image[0, 0], ways], [T.shard(0, cut), T.shard(0)], mesh)
    two = T.On([Shard(2), Shard(3)])
    T.hold(module.smooth, [image], [two], (2, 2))
    T.hold(module.similarity, [a, b, w], [T.On([Shard(1), Shard(2)]), None, None], (2, 2))
    T.hold(module.unit, [a], [T.On([Shard(0), Shard(1)])], (2, 2))


def _hold_the_rules_by_hand(module):
    g = torch.Generator().manual_seed(1)
    a, b, q = (torch.randn(*s, dtype=torch.float64, generator=g) for s in ((7, 3), (6, 3), (6,)))
    ways = [
        ("potential", "by_hand", "with_labels"),
        ("mean3", "by_hand", "with_a_stencil"),
        ("ordered", "by_hand", "with_labels"),
    ]
    for name, *rules in ways:
        for rule in rules:
            st.rule(getattr(module, name))(getattr(module, f"{name}_{rule}"))
            op, cut = getattr(module, name), (3, 0, 4)
            if name == "potential":
                T.hold(op, [a, b, q], [T.shard(0, cut), None, None], (3,))
                T.hold(op, [a, b, q], [T.shard(1), T.shard(0), None], (3,))
                T.hold(op, [a, b, q], [None, T.replicated(), T.shard(0, (1, 5))], (2,))
                T.hold(
                    op,
                    [a, b, q],
                    [T.On([Shard(0), Replicate()]), T.On([Shard(1), Shard(0)]), None],
                    (2, 2),
                )
            else:
                T.hold(op, [a], [T.shard(0, cut)], (3,))
                T.hold(op, [a], [T.shard(1)], (2,))
                T.hold(op, [a], [T.On([Shard(0), Shard(1)])], (2, 2))


def test_the_rule_of_contributing(monkeypatch):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rule, entry, test = re.findall(r"```python\n(.*?)```", text, re.S)
    # outside the library: absolute imports
    rule = re.sub(r"from \.\.(\w+)", r"from shardtensor.\1", rule)
    rule = re.sub(r"from \.(\w+)", r"from shardtensor.rules.\1", rule)
    module = {"__name__": "example_of_contributing"}
    # undone by monkeypatch: the library has a rule of its own
    monkeypatch.setitem(registry.rules, "diff", None)
    try:
        exec(rule + test, module)
        for cut in T.cuts(7):
            for n in (1, 3, 8):
                module["test_diff"](cut, n)
        module["test_diff_refuses_prepend"]()
        exec(entry, vars(table))
        for name in ("diff: once", "diff: thrice"):
            CASES.pop(name).meet()
    finally:
        monkeypatch.undo()
        registry.handlers.clear()


def test_the_examples_of_attention():
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "attention.md").read_text(), re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, {})


def test_the_examples_of_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "data.md").read_text(), re.S)
    names: dict = {}
    st.simulate(1, lambda: exec("".join(blocks), names))
    assert names["x"].shape == (64, 96) and names["told"].amplification == 1.0


def test_the_example_of_tiled(tmp_path):
    block, *_ = re.findall(r"```python\n(.*?)```", (DOCS / "tiled.md").read_text(), re.S)
    exec(block.replace('"/scratch"', "str(folder)"), names := {"folder": tmp_path})
    before = (names["y"] - names["target"]).square().mean()
    torch.testing.assert_close(names["loss"].detach(), before)
    assert all(p.grad is not None for p in names["model"].parameters())


def test_the_example_of_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "checkpoints.md").read_text(), re.S)
    names: dict = {}
    exec(block, names)
    assert names["path"].name == "step3" and names["state"]["step"] == 3


def test_the_example_of_graphs():
    page = (DOCS / "graphs.md").read_text()
    block, forecaster, product = re.findall(r"```python\n(.*?)```", page, re.S)
    for code, size in ((forecaster, 50), (product, 25)):
        exec(code, names := {})
        assert names["sizes"] == (size,) * 4
    exec(block, names := {})
    x, (source, target) = names["nodes"], names["edges"]
    messages = (x[source] - x[target]).relu()
    mean = torch.zeros_like(x).index_reduce(0, target, messages, "mean", include_self=False)
    assert names["sharded"] == [pytest.approx(mean.square().sum().item(), rel=1e-5)] * 4


def test_the_example_of_forward_mode():
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "forward.md").read_text(), re.S)
    exec(block, names := {})
    net, x, v = (names[k] for k in ("net", "state", "direction"))
    torch.testing.assert_close(names["sharded"], torch.func.jvp(net, (x,), (v,))[1])


def test_the_example_of_point_clouds():
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "points.md").read_text(), re.S)
    names: dict = {}
    exec(block, names)
    points, values, grid = (names[k] for k in ("points", "values", "grid"))
    neighbours = (
        torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
        .topk(8, largest=False)
        .indices
    )
    smooth = values[neighbours].mean(1)
    d, at = torch.cdist(grid, points, compute_mode="donot_use_mm_for_euclid_dist").topk(
        3, largest=False
    )
    w = d**-2
    want = (w[..., None] * smooth[at]).sum(1) / w.sum(1, keepdim=True)
    for found in names["found"]:
        assert torch.allclose(found, want, rtol=1e-4)


def test_the_example_of_launching(tmp_path):
    """In a process of its own, which has no launcher."""
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "launch.md").read_text(), re.S)
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    script = tmp_path / "launch.py"
    script.write_text(block)
    code, text = Program(script, env=env).ended()
    assert code == 0, text
    (options,) = re.findall(r"```yaml\n(data.*?)```", (DOCS / "launch.md").read_text(), re.S)
    assert st.Options.from_dict(yaml.safe_load(options)).fsdp == "all"


def test_the_drawing_of_the_architecture_has_every_package():
    tree = ast.parse((DOCS / "drawings" / "draw.py").read_text())
    drawn = next(
        ast.literal_eval(n.value)
        for n in tree.body
        if isinstance(n, ast.Assign) and n.targets[0].id == "PACKAGES"
    )
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    packages = next(c for c in layers["contracts"] if c["containers"] == ["shardtensor"])
    assert set(drawn) == {n for line in packages["layers"] for n in line.split(" | ")}
    svg = (DOCS / "drawings" / "architecture.svg").read_text()
    assert all(f"<!-- {name} -->" in svg for name in drawn)
