"""Wheel and sdist of a tag, looked through and tried.

    make release TAG=v0.2.0
    python release/package.py TAG [--out DIR] [--pip="ARGUMENTS"]
    python release/package.py --tree [--out DIR]

Both are built from what the tag holds, not from the working tree; links of the README become those
of the repository that [project.urls] names. Their contents and metadata are checked, and the wheel
runs the example of the README on one and two ranks, in an environment of its own. --tree: of the
working tree, without the last, and with the README as it is.
"""

import argparse
import ast
import base64
import csv
import hashlib
import io
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

from environments import PINS, ROOT, environment, pip, run
from packaging.metadata import Metadata

# what tools leave behind
LEFT = re.compile(r"(^|/)(__pycache__|\.\w+_cache|\.venv|site|out|dist|\.git)(/|$)|\.pyc$|\.so$")


def version_of(source):
    tree = ast.parse((source / "src" / "shardtensor" / "__init__.py").read_text())
    values = (
        n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__version__"
    )
    return ast.literal_eval(next(values))


def files_of(tag, folder):
    """The files of a tag, whose version is that of the tag and has its day in the changelog."""
    packed = subprocess.run(["git", "archive", tag], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as files:
        files.extractall(folder, filter="data")
    version = version_of(folder)
    if tag != f"v{version}":
        sys.exit(f"the tag is {tag}, the version of its files {version}: they must be the same")
    day = re.search(
        rf"^## \[{re.escape(version)}\] - (.*)$", (folder / "CHANGELOG.md").read_text(), re.M
    )
    if day is None or not re.fullmatch(r"\d{4}-\d\d-\d\d", day[1]):
        print(f"warning: CHANGELOG.md of {tag} has no day for {version}: {day and day[1]}")
    describe(folder, tag)
    return folder


LINK = re.compile(r"(!?)(\[[^\]]*\])\((?!\w+:|#)([^)\s]+)\)")


def absolute(text, source, tag):
    """A README whose links into the repository lead there from an index, too."""
    return LINK.sub(
        lambda m: f"{m[1]}{m[2]}({source.rstrip('/')}/{'raw' if m[1] else 'blob'}/{tag}/{m[3]})",
        text,
    )


def describe(folder, tag):
    """Write the README of a tag for an index, by the repository that [project.urls] names."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    source, readme = project.get("urls", {}).get("Source"), folder / "README.md"
    if source is None:
        print(
            f"warning: {len(LINK.findall(readme.read_text()))} links of README.md lead nowhere on "
            'an index: name the repository in pyproject.toml, [project.urls] Source = "https://..."'
        )
        return
    readme.write_text(absolute(readme.read_text(), source, tag))


def build(source, out):
    """(wheel, sdist); the wheel is made from the sdist, so that this holds all it needs."""
    run(sys.executable, "-m", "build", "--outdir", out, source)
    version = version_of(source)
    return out / f"shardtensor-{version}-py3-none-any.whl", out / f"shardtensor-{version}.tar.gz"


def faults(wheel, sdist, source):
    """What is wrong with the two, in words."""
    package = source / "src" / "shardtensor"
    kept = {f"shardtensor/{p.relative_to(package)}" for p in package.rglob("*") if p.is_file()}
    kept = {name for name in kept if not LEFT.search(name)}
    with zipfile.ZipFile(wheel) as z:
        packed = {name: z.read(name) for name in z.namelist()}
    info = next(name.partition("/")[0] for name in packed if name.endswith(".dist-info/METADATA"))
    yield from (f"the wheel lacks {n}" for n in sorted({*kept, "shardtensor/py.typed"} - {*packed}))
    yield from (
        f"the wheel has {n}, which is not of the package"
        for n in sorted(packed)
        if n not in kept and not n.startswith(f"{info}/")
    )
    yield from record_faults(packed, f"{info}/RECORD")
    yield from metadata_faults(packed[f"{info}/METADATA"], version_of(source))
    if f"{info}/licenses/LICENSE" not in packed:
        yield "the wheel has no LICENSE"
    with tarfile.open(sdist) as t:
        names = {m.name.partition("/")[2]: m for m in t.getmembers() if not m.isdir()}
    needed = {"LICENSE", "README.md", "pyproject.toml", "PKG-INFO", *(f"src/{n}" for n in kept)}
    yield from (f"the sdist lacks {n}" for n in sorted(needed - {*names}))
    yield from (f"the sdist has {n}" for n in sorted(names) if LEFT.search(n))
    yield from (f"the sdist has the link {n}" for n, m in sorted(names.items()) if not m.isfile())


def record_faults(packed, record):
    """RECORD names each file with its hash."""
    rows = {row[0]: row[1] for row in csv.reader(packed[record].decode().splitlines())}
    yield from (f"RECORD and the wheel differ: {n}" for n in sorted({*rows} ^ {*packed}))
    for name, told in rows.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(packed.get(name, b"")).digest())
        if name != record and told != f"sha256={digest.rstrip(b'=').decode()}":
            yield f"RECORD has another hash of {name}"


def metadata_faults(data, version):
    """Valid for an index, with a description that it can show."""
    metadata = Metadata.from_email(data)  # raises where a field is not valid
    if str(metadata.version) != version:
        yield f"the wheel is of version {metadata.version}, not {version}"
    if not (metadata.description or "").strip():
        yield "there is no long description"
    if metadata.description_content_type != "text/markdown":
        yield f"the description is {metadata.description_content_type}, not text/markdown"
    for field in ("summary", "license_expression", "requires_python"):
        if not getattr(metadata, field):
            yield f"there is no {field}"


def tried(wheel, source, folder, more):
    """The example of the README on one rank and on two, from the wheel alone."""
    python = environment(folder / "environment")
    pip(python, "install", "-q", *PINS, *more, wheel)
    pip(python, "check")
    (example,) = re.findall(r"```python\n(.*?)```", (source / "README.md").read_text(), re.S)
    script = folder / "example.py"
    script.write_text(example)
    launch = [python, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    losses = {
        n: [
            float(line.split()[0])
            for line in run(*launch, "--nproc-per-node", n, script, cwd=folder).splitlines()
            if "Spec(" in line
        ]
        for n in (1, 2)
    }
    one, two = losses[1], losses[2]
    if len(one) != 1 or len(two) != 2 or any(abs(v - one[0]) > 1e-5 * one[0] for v in two):
        sys.exit(f"the example of the README gave {losses}")
    return one[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tag", nargs="?")
    parser.add_argument("--tree", action="store_true", help="of the working tree")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--pip", default="", help="more arguments of pip install")
    args = parser.parse_args()
    if bool(args.tag) == args.tree:
        parser.error("give a tag, or --tree")
    out = args.out.absolute()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = ROOT if args.tree else files_of(args.tag, folder / "source")
        wheel, sdist = build(source, out)
        if found := [*faults(wheel, sdist, source)]:
            sys.exit("\n".join(found))
        if args.tag:
            loss = tried(wheel, source, folder, shlex.split(args.pip))
            print(f"the example of the README, from the wheel, on 1 and 2 ranks: loss {loss:.6f}")
    for path in (wheel, sdist):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"{path}  {path.stat().st_size} bytes  sha256 {digest}")


if __name__ == "__main__":
    main()
