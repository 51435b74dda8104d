"""Pages of plan, check and trace, in a browser where there is one; notebooks' without scripts."""

import json
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import browser
import pytest
import torch
from plotly import graph_objects
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.comm.counters import Sent
from shardtensor.observe.timeline import Part, Timeline
from shardtensor.page.blocks import Row, answer, heading, slider, table, text
from shardtensor.page.document import Page
from shardtensor.plan.estimate import Device
from shardtensor.ranks.testing import make_mesh

SMALL = Device("small", 0.8 * 2**20, 1e12, {64: 1e13, 32: 1e13, 16: 1e14})
in_browser = pytest.mark.skipif(browser.FOUND is None, reason="no Chromium here")


def net():
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 2, 3, padding=1))


class Reader(HTMLParser):
    """Whether tags close in turn; what is loaded; the data of the page."""

    VOID = ("meta", "input", "br", "line", "rect")

    def __init__(self, page):
        super().__init__()
        self.open, self.loaded, self.data = [], [], ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.loaded += [v for k, v in attrs if k in ("src", "href", "data", "action")]
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][1].get("id") == "data":
            self.data += data


def figures(page):
    """The figures of a page, each of which plotly knows."""
    read = Reader(page)
    assert not read.loaded
    found = json.loads(read.data)["figures"]
    for figure in found.values():
        graph_objects.Figure(figure)
    return found


@pytest.fixture(scope="module")
def plans():
    return st.plan(net, [(1, 2, 64, 32)], 2, SMALL, precisions=[None])


@pytest.fixture(scope="module")
def page_of_plans(plans, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "plan.html"
    plans.html(path, factors=(1, 2, 4), devices=(1, 2))
    return path


@pytest.fixture(scope="module")
def timeline():
    def step():
        mesh = make_mesh((2,))
        torch.manual_seed(0)
        model = st.parallelize(net(), mesh)
        x = st.distribute_tensor(torch.randn(1, 2, 16, 8), mesh, [Shard(2)])
        with st.trace(model=model) as t:
            model(x).square().mean().backward()
        return t, t.gather()

    return st.simulate(2, step)[0]


def test_what_is_held_over_the_step_has_the_peak(plans):
    for e in plans:
        course = e.course
        assert max(map(sum, course.held)) == e.peak and len(course.at) == len(course.held)
        assert list(course.at) == sorted(course.at) and course.at[-1] <= e.compute * (1 + 1e-9)
        assert [name for name, _ in course.phases] == ["forward", "backward", "optimizer"]
        begins = [at for _, at in course.phases]
        assert 0 == begins[0] < begins[1] < begins[2] < e.compute


def test_plans_are_a_list_with_a_page(plans, page_of_plans):
    assert isinstance(plans, list) and plans[0] == next(iter(plans))
    found = figures(page_of_plans.read_text())
    assert {"layouts", "times", "course/0", "tree/0/held/icicle", "sent/0", "fit/0"} <= set(found)
    bars = {t["name"]: t["x"] for t in found["layouts"]["data"]}
    for i, e in enumerate(plans):
        assert sum(x[i] for x in bars.values()) == pytest.approx(e.peak / 2**20)
    sent = sum(sum(t["x"]) for t in found["sent/0"]["data"])
    assert sent * 1e6 == pytest.approx(sum(s.bytes for s in plans[0].sent))
    tree = found["tree/0/held/icicle"]["data"][0]
    values = dict(zip(tree["ids"], tree["values"], strict=True))
    for parent in set(tree["parents"]) - {""}:
        inside = sum(v for p, v in zip(tree["parents"], tree["values"], strict=True) if p == parent)
        assert inside <= values[parent]


def test_the_page_of_a_check():
    class Centred(nn.Module):
        def forward(self, x):
            if isinstance(x, st.ShardTensor):
                local = x.to_local() - x.to_local().mean(2, keepdim=True)
                places = x.device_mesh, x.placements
                return st.ShardTensor.from_local(local, *places, sizes=x.spec.sizes)
            return x - x.mean(2, keepdim=True)

    torch.manual_seed(0)
    x = torch.randn(1, 2, 12, 4)
    right = st.check(net(), x, [Shard(2)], [(2,)])
    assert right.rtol == 1e-8 and all(0 <= f.errors["output"] < 1e-12 for f in right.findings)
    assert all(max(f.errors.values()) == f.error for f in right.findings)
    names = {k for k, _ in net().named_parameters()}
    assert {f"gradient {k}" for k in names} <= set(right.findings[0].errors)
    page = right.to_html()
    assert "RIGHT on 2 layouts" in page and 'class="verdict good"' in page
    drawn = figures(page)["errors"]["data"][0]
    assert max(drawn["x"]) == max(e for f in right.findings for e in f.errors.values())
    wrong = st.check(nn.Sequential(*net(), Centred()), x, [Shard(2)], [(2,)])
    page = wrong.to_html()
    (spread,) = figures(page)["activations"]["data"]
    errors = dict(zip(spread["y"], spread["x"], strict=True))
    # what comes before the fault is right
    before = [e for name, e in errors.items() if name.endswith((" 0", " 1", " 2"))]
    assert len(before) == 3 and max(before) < 1e-12 and errors["4. 3"] > 1e-3
    largest = max(wrong.findings[0].errors.values())
    assert f'data-v="{largest}">{largest:.1e}</td>' in page
    assert 'class="verdict bad"' in page and "What to do" in page and "Not right: 3" in page
    assert max(wrong.findings[0].errors.values()) > 1e-3
    assert "NOT RIGHT" in wrong._repr_html_() and "<script" not in wrong._repr_html_()


def test_a_check_without_tensors_in_common_has_a_page():
    class Other(nn.Module):
        def forward(self, x):
            return x[:, :, :3] if isinstance(x, st.ShardTensor) else x

    report = st.check(Other(), torch.randn(1, 1, 8, 4), [Shard(2)], [(2,)])
    assert not report.ok
    figures(report.to_html())


def test_the_page_of_a_trace(timeline):
    t, every = timeline
    found = figures(every.to_html())
    sent = sum(sum(bar["x"]) for bar in found["sent/op"]["data"]) * 1e6
    assert sent == pytest.approx(sum(s.bytes for p in every.parts for s in p.sent))
    assert found["sent/line"] and found["lanes"]["data"][0]["name"] == "ops"
    page = every.to_html()
    assert "simulated ranks mean little" in page and "on 2 ranks" in page
    own = t.to_html()
    assert "What ran whole" in own and "on rank 0" in own
    assert "pairs" not in figures(own)


def test_who_waited_for_whom():
    def sent(begin, seconds, peers=(0, 1)):
        return Sent("swap", 8, 1, 2, "op", seconds, begin=begin, end=begin + seconds, peers=peers)

    # rank 1's clock is 10 s ahead; its second collective is with rank 2, who came first
    found = Timeline(
        [
            Part(0, 0.0, 0.0, 9.0, [], [sent(1.0, 4.0)], [(1.0, 2**20), (2.0, 2**21)]),
            Part(1, 10.0, 10.0, 19.0, [], [sent(14.0, 1.0), sent(17.0, 0.5, (1, 2))], []),
            Part(2, 0.0, 0.0, 9.0, [], [sent(5.0, 0.1, (1, 2))], []),
        ]
    )
    assert found.waited_for() == {(0, 1): 3.0, (2, 1): pytest.approx(0.1)}
    drawn = figures(found.to_html())
    (matrix,) = drawn["pairs"]["data"]
    assert matrix["z"] == [[0.0, 3000.0, 0.0], [0.0, 0.0, 0.0], [0.0, pytest.approx(100.0), 0.0]]
    assert drawn["memory/0"]["data"][0]["y"] == [1.0, 2.0]


def test_of_many_ranks_those_that_waited_most():
    def part(rank):
        # the later a rank comes, the less it waits
        came = 1.0 + 0.01 * rank
        sent = Sent("swap", 8, 1, 40, "op", 2 - came, begin=came, end=2.0, peers=tuple(range(40)))
        return Part(rank, 0.0, 0.0, 2.0, [], [sent], [(i / 5000, i) for i in range(5001)])

    found = Timeline([part(r) for r in range(40)])
    page = found.to_html()
    drawn = figures(page)
    assert "Of 40 ranks the 32 that waited most." in page
    assert drawn["pairs"]["data"][0]["y"] == [f"rank {r}" for r in range(32)]
    memory = drawn["memory/3"]["data"][0]["y"]
    assert len(memory) <= 1000 and max(memory) * 2**20 == 5000


@pytest.mark.parametrize("kind", ["refused", "no mesh", "inference", "nothing sent"])
def test_pages_of_plans_that_have_little_to_show(kind):
    class Broken(nn.Module):
        def forward(self, x):
            raise st.UnsupportedOpError("not <this>")

    more = dict(precisions=[None], dims=(2,))
    if kind == "refused":
        plans = st.plan(Broken, [(1, 2, 8, 8)], 2, train=False, **more)
    elif kind == "no mesh":
        plans = st.plan(net, [(1, 2, 2, 8)], 3, **more)
    elif kind == "inference":
        plans = st.plan(net, [(1, 2, 8, 8)], 2, train=False, **more)
    else:
        plans = st.plan(lambda: nn.GELU(), [(1, 2, 8, 8)], 1, train=False, **more)
    page = plans.to_html((1,), (1, 2))
    says = {"refused": "not &lt;this&gt;", "no mesh": "There is no mesh of so many devices."}
    assert says.get(kind, "It fits") in page
    drawn = figures(page)
    assert bool(drawn) == bool([e for e in plans if not e.refused])
    ElementTree.fromstring(plans._repr_html_().replace("<br>", "<br/>"))


def test_a_trace_of_nothing_has_a_page():
    with st.trace() as t:
        pass
    figures(t.to_html())
    assert "Ranks" in t._repr_html_()


def test_names_are_no_markup():
    evil = '</script><script>alert("x")</script><img src=http://x/y>'
    page = Page(evil, evil, True, evil)
    page.add(
        heading(evil),
        text(evil),
        table([evil], [Row([evil], evil, [evil])], variable="row", only={evil: evil}),
        answer("told", {"told": evil}),
        slider("n", [evil], 0, evil),
    )
    read = Reader(page.text())
    assert not read.loaded and json.loads(read.data)["texts"]["told"] == evil
    assert page.text().count("</script>") == 2
    ElementTree.fromstring(page.still().replace("<br>", "<br/>"))


def test_notebooks_show_tables_and_pictures(plans, timeline):
    for shown, drawings in ((plans, 1), (timeline[0], 1), (timeline[1], 1)):
        made = shown._repr_html_()
        assert "<script" not in made and made.count("<svg") == drawings
        ElementTree.fromstring(made.replace("<br>", "<br/>"))
    assert re.search(r"dim2 2|dim3 2", plans._repr_html_())


def test_without_plotly_the_page_says_what_to_install(plans, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"pip install shardtensor\[html\]"):
        plans.page().text()
    assert "<table" in plans._repr_html_()


def test_the_commands_write_pages(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(
        "from torch import nn\n\n\ndef Net():\n    return nn.Conv2d(1, 2, 3, padding=1)\n"
    )
    for name, more in (("plan", ["--devices", 2]), ("check", ["--mesh", 2])):
        asked = [
            name,
            "model.py:Net",
            "--input",
            "1x1x16x8",
            "--shard",
            2,
            "--html",
            "page.html",
            *more,
        ]
        code, _, said = command(*asked)
        assert not code, said
        page = (tmp_path / "page.html").read_text()
        assert figures(page) and (name == "check" or "Net on 2 x h100" in page)


@in_browser
def test_the_page_of_plans_in_a_browser(page_of_plans, plans):
    layouts = "document.querySelector('table[data-variable]')"
    column = f"[...{layouts}.rows].slice(1).filter(r => !r.hidden).map(r => r.cells[2].dataset.v)"
    with browser.Browser() as b:
        b.open(page_of_plans)
        # what is drawn is seen
        assert b.js("[...document.querySelectorAll('.chart')].every(c => c.querySelector('svg'))")
        # sorted both ways by a click on "peak"
        for order in (1, -1):
            b.js(f"{layouts}.querySelectorAll('th button')[2].click()")
            peaks = [float(v) for v in b.js(column)]
            assert peaks == sorted(peaks)[::order] and len(set(peaks)) > 1
        b.js("{const f = document.querySelector('input[type=search]'); f.value = 'dim3';"
             "f.dispatchEvent(new Event('input'))}")  # fmt: skip
        assert len(b.js(column)) == sum("dim3" in str(e.layout) for e in plans) < len(plans)
        # a row that is chosen is that of the charts
        memory = "document.querySelector('[data-figure^=course]').data[0].y.length"
        before = b.js(memory)
        assert before and b.js(f"{layouts}.querySelector('tr[data-key=\"1\"]').click() || 1")
        assert b.js("document.querySelector('tr.chosen').dataset.key") == "1"
        shown = "[...document.querySelectorAll('p[data-when]')].filter(p => !p.hidden)"
        assert b.js(f"{shown}[0].textContent") == str(plans[1].layout)
        # the sliders
        told = set()
        for value in (0, 7, 24):
            b.js(f"{{const s = document.querySelector('[name=size]'); s.value = {value};"
                 "s.dispatchEvent(new Event('input'))}")  # fmt: skip
            told.add(b.js("document.querySelector('[data-text^=fit]').textContent"))
        assert len(told) == 3 and any("interpolated)" in t for t in told)
        assert all("stops fitting above" in t for t in told)
        place = "document.querySelector('[data-figure^=fit]').layout.shapes[0].x0"
        assert b.js(place) == 256 * 128
        # nothing is loaded, nothing raised
        assert b.asked == [page_of_plans.as_uri()] and not b.errors


@in_browser
def test_pages_fit_wide_narrow_dark_and_print(page_of_plans, timeline, tmp_path):
    trace = tmp_path / "trace.html"
    timeline[1].html(trace)
    inside = "document.documentElement.scrollWidth <= window.innerWidth"
    charts = "[...document.querySelectorAll('.chart')].filter(c => !c.hidden)"
    # no chart lies over what follows it
    apart = (
        f"{charts}.every(c => {{const s = c.querySelector('svg').getBoundingClientRect();"
        "const r = c.getBoundingClientRect();"
        "return r.height > 90 && s.height <= r.height + 1 && s.width <= r.width + 1})"
    )
    # the first three numbers of a colour
    rgb = ".match(/\\d+/g).slice(0, 3).map(Number)"
    back = f"getComputedStyle(document.body).backgroundColor{rgb}"
    words = f"document.querySelector('.chart text').style.fill{rgb}"
    with browser.Browser() as b:
        for path in (page_of_plans, trace):
            b.size(1200)
            b.open(path)
            b.until(f"{inside} && {apart}")
            b.size(380)
            b.until(f"{inside} && {apart}")
            b.media(dark=True)
            b.until(f"Math.max(...{back}) < 60 && Math.min(...{words}) > 150")
            # on paper always dark on white
            b.media("print", dark=True)
            b.until(f"Math.min(...{back}) === 255 && Math.max(...{words}) < 60")
            assert b.js("document.querySelector('.controls, .slider').offsetHeight") == 0
            b.media()
            assert not b.errors
        b.paper(tmp_path / "page.pdf")
        assert (tmp_path / "page.pdf").stat().st_size > 20_000
