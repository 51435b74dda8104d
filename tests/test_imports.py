"""What an import of the library brings with it: little beside torch, the rest when it is used."""

import subprocess
import sys

import pytest

import shardtensor as st

# what takes long to import, and what is optional
LATER = (
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.fx.experimental.symbolic_shapes",
    "torch._dynamo",
    "torch._inductor",
    "sympy",
    "h5py",
    "zarr",
    "fsspec",
    "xarray",
    "matplotlib",
    "pyvista",
    "rich",
    "typer",
    "lightning",
    "accelerate",
    "torch_geometric",
    "torch_harmonics",
    "shardtensor.io",
    "shardtensor.checkpoint",
    "shardtensor.lightning",
)


def run(program):
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", program],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_an_import_brings_few_modules_beside_torch():
    found = run(
        "import sys, torch; before = set(sys.modules); import shardtensor;"
        "print(*(set(sys.modules) - before))"
    )
    foreign = [m for m in found if m.split(".")[0] != "shardtensor"]
    assert len(found) > 100 and len(foreign) <= 20, foreign
    assert not set(found) & set(LATER)


@pytest.mark.parametrize("first", ["torch", "shardtensor"])
def test_what_comes_later_finds_the_library_at_work(first):
    """Styles, DTensors and checkpoints are mended whichever is imported first."""
    later = (
        "import torch.distributed.tensor.parallel.style as style, torch.distributed.tensor as dt\n"
    )
    here = "import shardtensor as st\n"
    seen = (
        "print(style.ColwiseParallel._prepare_input_fn.__code__.co_filename.endswith('dtensor.py'))\n"
        "op = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default\n"
        "run = dt.DTensor._op_dispatcher._custom_op_handlers[op]\n"
        "print(run.__module__ == 'shardtensor._torch.dtensor')\n"
        "import torch.distributed.tensor._api as api\n"
        "from shardtensor.registry import rules\n"
        "print(any(k is api._FromTorchTensor or getattr(k, '__self__', None) is"
        " api._FromTorchTensor for k in rules))\n"
    )
    ways = {"torch": later + here, "shardtensor": here + later}
    assert run("import torch\n" + ways[first] + seen) == ["True"] * 3


def test_torch_saves_shards_without_our_checkpoints_asked_for():
    program = (
        "import sys, torch, shardtensor as st\n"
        "def main():\n"
        "    mesh, _ = st.init()\n"
        "    x = st.distribute_tensor(torch.ones(4, 2), mesh, [dt.Shard(0)])\n"
        "    return len(x.__create_chunk_list__())\n"
        "from torch.distributed import tensor as dt\n"
        "print('shardtensor.checkpoint' in sys.modules, *st.simulate(2, main))\n"
    )
    assert run(program) == ["False", "1", "1"]


def test_every_public_name_is_there():
    assert all(getattr(st, name) is not None for name in st.__all__)
    for name in ("checkpoint", "compat", "lightning"):
        assert getattr(st, name).__name__ == f"shardtensor.{name}"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = st.nothing
