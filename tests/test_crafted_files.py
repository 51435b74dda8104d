"""Checkpoints that were made to harm, or that broke: nothing is executed, one error says what is wrong."""

import io
import os
import pickle
import shutil
import zipfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as of_dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import checkpoint
from shardtensor.checkpoint.metadata import parsed
from shardtensor.ranks.testing import make_mesh, run_workers

X = torch.arange(8 * 3, dtype=torch.float64).reshape(8, 3)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state(x):
    return {"x": x, "model": {"w": torch.ones(2, 2)}, "step": 3}


def write(folder, name="a"):
    mesh = make_mesh((dist.get_world_size(),))
    x = st.distribute_tensor(X, mesh, [Shard(0)], src_data_rank=None)
    checkpoint.save(state(x), folder, name, keep=0)


def said_on_every_rank(path, keys=("x", "model", "step")):
    mesh = make_mesh((dist.get_world_size(),))
    x = st.distribute_tensor(torch.zeros_like(X), mesh, [Shard(0)], src_data_rank=None)
    try:
        checkpoint.load({k: v for k, v in state(x).items() if k in keys}, path)
    except RuntimeError as e:
        return str(e)


def refused(path, *words):
    """The one message of all ranks."""
    said = st.simulate(2, said_on_every_rank, path)
    assert said[0] == said[1] and said[0] is not None
    assert all(w in said[0] for w in (path.name, *words)), said[0]
    return said[0]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    st.simulate(2, write, folder)
    return folder / "a"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """As DCP and earlier versions write it: no checksums."""
    folder = tmp_path_factory.mktemp("plain") / "a"
    dcp.save(state(X), checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def copy(tmp_path, good):
    return shutil.copytree(good, tmp_path / "a")


@pytest.fixture
def bare(tmp_path, plain):
    return shutil.copytree(plain, tmp_path / "a")


# pickles in place of metadata ---------------------------------------------------------------------


class Calls:
    def __init__(self, what, *args):
        self.what = what, args

    def __reduce__(self):
        return self.what


def named(module, name):
    """Protocol 4's opcodes for an object by its name."""
    return b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name)) + b"\x93"


DCP = "torch.distributed.checkpoint.metadata"
HEAD = b"\x80\x04"
# GLOBAL, then TUPLE of one text, REDUCE, STOP
CALL = b"\x8c\x04true\x85R."
PROGRAMS = {
    "a function": HEAD + named("os", "system") + CALL,
    "by builtins": HEAD + named("builtins", "exec") + CALL,
    "a module of the module": HEAD + named(DCP, "os") + CALL,
    "its builtins": HEAD + named(DCP, "__builtins__") + CALL,
    "dots": HEAD + named(DCP, "os.system") + CALL,
    "deeper dots": HEAD + named(DCP, "Metadata.__init__.__globals__") + CALL,
    "torch": HEAD + named("torch", "load") + CALL,
    "torch's modules": HEAD + named("torch", "os") + CALL,
    "pathlib's": HEAD + named("pathlib", "os") + CALL,
    "copyreg": HEAD + named("copyreg", "_reconstructor") + CALL,
    "protocol 0": b"cposix\nsystem\n(S'true'\ntR.",
    "protocol 1": b"(cposix\nsystem\nq\x00oq\x01.",
    "an instance": b"(S'true'\niposix\nsystem\n.",
    "an id": HEAD + b"\x8c\x04trueQ.",
    "an id in text": b"Ptrue\n.",
    "an extension": HEAD + b"\x82\x01.",
    "a buffer": b"\x80\x05\x97.",
    "an attribute of a class": HEAD + named(DCP, "Metadata") + b"N}\x8c\x01aK\x01s\x86b.",
    "a huge memo": HEAD + b"Nr\xff\xff\xff\xff.",
    "huge bytes": HEAD + b"\x8e" + (2**40).to_bytes(8, "little") + b".",
    "huge text": HEAD + b"X\xff\xff\xff\xff.",
    "a huge number": HEAD + b"\x8b\xff\xff\xff\x7f1.",
    "keys that hash for ever": HEAD + b"})" + b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(60)) + b"Ns.",
    "no metadata": HEAD + b"}.",
    "a class alone": HEAD + named(DCP, "Metadata") + b".",
    "nothing": b"",
    "text": b"not a pickle at all",
    "no end": HEAD + b"}",
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_pickle_is_executed(name):
    """In a process of the test, where what is called would be seen."""
    before = {k: dict(vars(getattr(of_dcp, k))) for k in of_dcp.__all__}
    with pytest.raises(ValueError):
        parsed(PROGRAMS[name])
    assert before == {k: dict(vars(getattr(of_dcp, k))) for k in of_dcp.__all__}


def test_nothing_is_called_by_a_checkpoint(copy, tmp_path):
    proof = tmp_path / "executed"
    evil = Calls(os.system, f"touch {proof}")
    found = pickle.loads((copy / ".metadata").read_bytes())
    (copy / "checksums.json").unlink()
    for place in ("planner_data", "storage_meta", "state_dict_metadata", "version"):
        crafted = of_dcp.Metadata(
            found.state_dict_metadata, found.planner_data, found.storage_data, None, None
        )
        value = {**getattr(found, place), "more": evil} if "data" in place else evil
        setattr(crafted, place, value)
        (copy / ".metadata").write_bytes(pickle.dumps(crafted))
        refused(copy, ".metadata", "posix.system is not loaded")
    assert not proof.exists()
    # it is not read twice: what was parsed is what is used
    pickle.loads((copy / ".metadata").read_bytes())
    assert proof.exists()


def edited(path, change):
    """A checkpoint without checksums whose metadata were changed."""
    found = pickle.loads((path / ".metadata").read_bytes())
    change(found)
    (path / ".metadata").write_bytes(pickle.dumps(found))


def elsewhere(name):
    def change(m):
        for k, v in m.storage_data.items():
            m.storage_data[k] = _StorageInfo(name, v.offset, v.length)

    return change  # fmt: skip


def entry(**fields):
    def change(m):
        for k, v in fields.items():
            setattr(m.state_dict_metadata["x"], k, v)

    return change  # fmt: skip


def place(**fields):
    def change(m):
        (at,) = [k for k in m.storage_data if k.fqn == "x"]
        for k, v in fields.items():
            setattr(m.storage_data[at], k, v)

    return change  # fmt: skip


def lost(m):
    m.storage_data = {k: v for k, v in m.storage_data.items() if k.fqn != "x"}


def half(m):
    m.state_dict_metadata["x"].chunks[0].sizes = torch.Size([4, 3])


Chunk, Size = of_dcp.ChunkStorageMetadata, torch.Size
EDITS = {
    "a file above": (elsewhere("../__0_0.distcp"), "not a file of the checkpoint"),
    "a file of the system": (elsewhere("/etc/passwd"), "not a file of the checkpoint"),
    "a file of Windows": (elsewhere("..\\x"), "not a file of the checkpoint"),
    "the folder": (elsewhere("."), "not a file of the checkpoint"),
    "another file": (elsewhere("none"), "none is missing"),
    "an extension": (place(transform_descriptors=["zstd"]), "extension"),
    "beyond the end": (place(offset=10**9), "bytes of"),
    "before the beginning": (place(offset=-5), "offset of x is -5"),
    "a long item": (place(length=2**62), "bytes of"),
    "a short item": (place(length=10), "x in"),
    "text for a number": (place(length="9"), "length of x"),
    "another size": (entry(size=Size([9, 3])), "not in the file as a whole"),
    "an absurd size": (entry(size=Size([2**62, 8])), "number of elements"),
    "a negative size": (entry(size=Size([-8, 3])), "is -8"),
    "another dtype": (entry(properties=of_dcp.TensorProperties(torch.float32)), "torch.float32"),
    "no chunk": (entry(chunks=[]), "not in the file as a whole"),
    "a chunk outside": (entry(chunks=[Chunk(Size([4, 0]), Size([8, 3]))]), "has a chunk"),
    "other dims": (entry(chunks=[Chunk(Size([0]), Size([24]))]), "has a chunk"),
    "a chunk in no file": (lost, "in no file"),
    "half of it": (half, "not in the file as a whole"),
    "a path elsewhere": (lambda m: m.planner_data.update(step=("model", "w")), "leads elsewhere"),
    "keys of numbers": (lambda m: m.state_dict_metadata.update({1: None}), "no text"),
    "a value for a tensor": (
        lambda m: m.state_dict_metadata.update(x=of_dcp.BytesStorageMetadata()), "in no file"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_broken_metadata(bare, name):
    change, word = EDITS[name]
    edited(bare, change)
    refused(bare, word)


# items --------------------------------------------------------------------------------------------


def saved(x):
    buffer = io.BytesIO()
    torch.save(x, buffer)
    return buffer.getvalue()


def compressed(x):
    """An archive that unfolds to far more than it is."""
    out = io.BytesIO()
    old = zipfile.ZipFile(io.BytesIO(saved(x)))
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item))
    return out.getvalue()


ITEMS = {
    "a call": (saved(Calls(os.system, "true")), "posix.system"),
    "another shape": (saved(X[:5]), "(5, 3)"),
    "an expanded shape": (saved(X.new_ones(()).expand(8, 4)), "(8, 4)"),
    "another dtype": (saved(X.float()), "torch.float32"),
    "complex": (saved(X.cfloat()), "torch.complex64"),
    "no tensor": (saved([1, 2]), "list, not a tensor"),
    "no values": (saved(X.to("meta")), "not a tensor with values"),
    "compressed": (compressed(torch.zeros(8, 3).double()), "compressed"),
    "an old format": (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "zip"),
    "half an archive": (saved(X)[:-200], "zip"),
    "zeros": (bytes(2000), "zip"),
    "nothing": (b"", "zip"),
}


@pytest.mark.parametrize("name", ITEMS)
def test_broken_items(bare, name):
    data, word = ITEMS[name]
    (bare / "x.distcp").write_bytes(data)
    edited(bare, place(relative_path="x.distcp", offset=0, length=len(data)))
    refused(bare, "x in x.distcp", word)


def test_pickles_in_values(tmp_path):
    """The states of generators are an archive within a value."""
    proof = tmp_path / "executed"
    evil = Calls(os.system, f"touch {proof}")
    kind = {
        "torch": torch.get_rng_state(),
        "cuda": None,
        "numpy": ["MT19937", torch.ones(3)],
        "python": 1,
    }
    for data in (
        saved([evil]),
        pickle.dumps(evil),
        saved([]),
        saved([kind]),
        saved([[1]]),
        b"x",
        "text",
    ):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        checkpoint.save({"random": {"states": data}}, tmp_path, "a")
        before = torch.get_rng_state()
        with pytest.raises(
            RuntimeError, match=r"a cannot be loaded: these are no states of random"
        ):
            checkpoint.load({"random": checkpoint.Randomness()}, tmp_path / "a")
        assert torch.get_rng_state().equal(before) and not proof.exists()


# files --------------------------------------------------------------------------------------------


def files(path):
    return sorted(p.name for p in path.iterdir())


def test_a_missing_file(copy, good):
    for name in files(good):
        (copy / name).unlink()
        refused(copy, f"{name} is missing")
        shutil.copy(good / name, copy / name)
    assert "no such folder" in refused(copy.parent / "none")


def test_a_cut_file(copy, good):
    for name in files(good):
        data = (good / name).read_bytes()
        for n in (0, len(data) // 2, len(data) - 1):
            (copy / name).write_bytes(data[:n])
            refused(copy, name)
        (copy / name).write_bytes(data + b"\0")
        if name != "checksums.json":
            refused(copy, name, "bytes of")
        (copy / name).write_bytes(data)
    assert st.simulate(2, said_on_every_rank, copy) == [None, None]


def test_a_flipped_bit(copy, good):
    for name in files(good):
        data = bytearray((good / name).read_bytes())
        for at in (0, len(data) // 3, len(data) // 2, len(data) - 1):
            data[at] ^= 4
            (copy / name).write_bytes(data)
            refused(copy, name)
            data[at] ^= 4
        (copy / name).write_bytes(data)


def test_a_pipe_is_no_file(copy):
    (copy / "__0_0.distcp").unlink()
    os.mkfifo(copy / "__0_0.distcp")
    refused(copy, "__0_0.distcp is missing")


def test_links_that_leave_the_checkpoint(copy, good, tmp_path):
    for name in files(good):
        shutil.copy(good / name, tmp_path / "elsewhere")
        (copy / name).unlink()
        (copy / name).symlink_to(tmp_path / "elsewhere")
        refused(copy, f"{name} is a link that leads out of the checkpoint")
        (copy / name).unlink()
        shutil.copy(good / name, copy / name)
    (tmp_path / "last").symlink_to(copy)
    assert st.simulate(2, said_on_every_rank, tmp_path / "last") == [None, None]


def reads(folder):
    """Rank 1 reads what is damaged, rank 0 does not."""
    write(folder)
    if dist.get_rank() == 0:
        path = folder / "a" / "__1_0.distcp"
        data = bytearray(path.read_bytes())
        at = data.find(X[7:].numpy().tobytes())
        assert at > 0
        data[at] ^= 1
        path.write_bytes(data)
    dist.barrier()
    return said_on_every_rank(folder / "a", ["x"])


@pytest.mark.gloo
def test_every_rank_raises_for_what_one_reads(tmp_path):
    said = run_workers(2, reads, tmp_path)
    assert said[0] == said[1] and "on rank 1: x in __1_0.distcp" in said[0]
    assert "checksum of bytes 0 to" in said[0]


def test_only_what_a_rank_reads_is_verified(tmp_path):
    """Damage in another block does not matter to who does not read it."""
    big = torch.arange(1 << 19, dtype=torch.float64)
    checkpoint.save({"a": torch.ones(3), "big": big, "step": 1}, tmp_path, "c")
    path = tmp_path / "c" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[3 << 20] ^= 1
    path.write_bytes(data)
    found = checkpoint.load({"a": torch.zeros(3), "step": 0}, tmp_path / "c")
    assert found["a"].eq(1).all() and found["step"] == 1
    with pytest.raises(RuntimeError, match=r"big in __0_0\.distcp: .* damaged: .* 3145728 to"):
        checkpoint.load({"big": torch.zeros_like(big)}, tmp_path / "c")


def test_checkpoints_without_checksums_load(plain):
    found = checkpoint.load(state(torch.zeros_like(X)), plain)
    assert found["x"].equal(X) and found["model"]["w"].eq(1).all() and found["step"] == 3
