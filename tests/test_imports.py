"""What an import of the library brings with it: little beside torch, the rest when it is used."""

import copy
import math
import pickle
import subprocess
import sys
import zipfile

import pytest

import shardtensor as st
from shardtensor.later import Later

# what takes long to import, and what is optional
LATER = (
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.fx.experimental.symbolic_shapes",
    "torch._dynamo",
    "torch._inductor",
    "torch.nn.attention.flex_attention",
    "torch.utils.flop_counter",
    "sympy",
    "triton",
    "numpy.random",
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
    "transformers",
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


def test_a_module_that_another_thread_imports_is_waited_for():
    program = (
        "import sys, threading, time, torch\n"
        "halfway = threading.Event()\n"
        "class Slow:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path, target=None):\n"
        "        if name.startswith('torch.distributed.fsdp.'):\n"
        "            halfway.set(); time.sleep(.05)\n"
        "sys.meta_path.insert(0, Slow)\n"
        "other = threading.Thread(target=lambda: __import__('torch.distributed.fsdp'))\n"
        "other.start(); halfway.wait()\n"
        "import shardtensor\n"
        "from shardtensor import later\n"
        "other.join()\n"
        "print(later.fsdp_classes == sys.modules['torch.distributed.fsdp'].FSDPModule.__subclasses__)"
    )
    assert run(program) == ["True"]


def test_finders_that_ask_all_others_do_not_ask_one_another_in_a_circle():
    program = (
        "import importlib, shardtensor.later as later\n"
        "importlib.reload(later)\n"
        "import torch.distributed.fsdp as fsdp\n"
        "print(later.fsdp_classes == fsdp.FSDPModule.__subclasses__)"
    )
    assert run(program) == ["True"]


def test_a_rule_waits_for_one_module_of_a_zip_file(tmp_path):
    """All modules of a zip file share a loader."""
    with zipfile.ZipFile(tmp_path / "both.zip", "w") as made:
        for name in ("meant", "other"):
            made.writestr(f"{name}.py", "def double(x):\n    return x + x\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'both.zip')!r})\n"
        "import shardtensor as st\n"
        "st.rule('meant.double')(lambda x: x)\n"
        "import meant, other\n"
        "print(*(hasattr(m.double, '_asks_shardtensor') for m in (meant, other)))"
    )
    assert run(program) == ["True", "False"]


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_names_that_come_later_are_copied_and_pickled(way):
    assert way(Later("math")).pi == math.pi


def test_every_public_name_is_there():
    assert all(getattr(st, name) is not None for name in st.__all__)
    for name in ("checkpoint", "compat", "lightning"):
        assert getattr(st, name).__name__ == f"shardtensor.{name}"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = st.nothing
