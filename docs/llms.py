"""The page docs/llms.txt: every page with its first sentence, for readers that are programs."""

import re
from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).parent
HEAD = """# shardtensor

> Domain parallelism for PyTorch: a ShardTensor is a global view of one tensor whose shards, of any
> sizes, lie on the ranks of a DeviceMesh. Unmodified modules run on it, forward and backward, with
> the numbers of one device; an op that cannot do so raises UnsupportedOpError.

Install: `pip install shardtensor`. Start: `mesh, device = st.init()`, then
`x = st.distribute_tensor(x, mesh, [Shard(2)])`, `model = st.parallelize(model, mesh)`, `model(x)`.
Without GPUs or a launcher: `st.simulate(4, fn)` runs ranks in one process; `st.check(model, x)`
says whether a model is right on shards, `shardtensor plan` what it takes. `x.full_tensor()` is the
whole, `x.to_local()` this rank's part, `x.redistribute(placements=...)` another cut."""


def first_sentence(path: Path) -> str:
    """Of the first paragraph of prose after the title, without markup."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    for block in re.split(r"\n\s*\n", text):
        block = block.strip("\n")
        if block.strip() and block[0] not in "#|!:< -" and not block.startswith("```"):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(block.split()))
            return re.split(r"(?<=[.!?:])\s", plain, maxsplit=1)[0].rstrip(":.")
    return ""


def entries(nav: list[Any]) -> list[str]:
    """The lines of a part of the navigation."""
    found: list[str] = []
    # pages of no section before the sections
    for entry in sorted(nav, key=lambda e: isinstance(*e.values(), list)):
        ((title, where),) = entry.items()
        if isinstance(where, list):
            found += ["", f"## {title}", "", *entries(where)]
        elif where.endswith(".md"):
            told = first_sentence(DOCS / where)
            found.append(f"- [{title}]({where})" + (f": {told}" if told else ""))
    return found


class _Loader(yaml.SafeLoader):
    """Settings of mkdocs; what they name of Python is of no interest here."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
_Loader.add_multi_constructor("!", lambda *_: None)


def page() -> str:
    """The page, as text."""
    settings = yaml.load((DOCS.parent / "mkdocs.yml").read_text(), Loader=_Loader)
    return "\n".join([HEAD, "", "## Pages", "", *entries(settings["nav"])])


if __name__ == "__main__":
    print(page())
