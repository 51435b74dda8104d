"""What a checkpoint has and a state asks for: all of it, or an error that names the keys."""

import os
import shutil
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import checkpoint
from shardtensor.checkpoint import files
from shardtensor.ranks.testing import make_mesh

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def trained(make, steps=2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    optimizer = make(model.parameters())
    go_on(model, optimizer, steps)
    return model, optimizer


def go_on(model, optimizer, steps):
    x = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3)
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    return [p.detach().clone() for p in model.parameters()]


MAKE = {
    "AdamW": lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "plain SGD": lambda p: torch.optim.SGD(p, 0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=2),
    "two groups": lambda p: torch.optim.Adam([{"params": q, "lr": 0.1} for q in list(p)[:2]]),
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("way", ["state", "object"])
def test_an_optimizer_that_has_not_stepped(tmp_path, name, way):
    model, optimizer = trained(MAKE[name])
    checkpoint.save({"m": model.state_dict(), "o": optimizer.state_dict()}, tmp_path, "a")
    again, fresh = trained(MAKE[name], 0)
    if way == "object":
        checkpoint.load({"m": again.state_dict(), "o": fresh}, tmp_path / "a")
    else:
        state = {"m": again.state_dict(), "o": fresh.state_dict()}
        fresh.load_state_dict(checkpoint.load(state, tmp_path / "a")["o"])
    want, got = optimizer.state_dict(), fresh.state_dict()
    assert torch.utils._pytree.tree_structure(want) == torch.utils._pytree.tree_structure(got)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(go_on(again, fresh, 2), go_on(model, optimizer, 2), rtol=0, atol=0)


def test_what_a_scheduler_added(tmp_path):
    _, optimizer = trained(MAKE["SGD"])
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    checkpoint.save(optimizer.state_dict(), tmp_path, "a")
    state = trained(MAKE["SGD"], 0)[1].state_dict()
    checkpoint.load(state, tmp_path / "a")
    assert state["param_groups"][0]["initial_lr"] == 0.1 and len(state["state"]) == 4


def sharded_state(folder):
    """Moments of a sharded weight: where their shards shall be, an empty state does not say."""
    mesh = make_mesh((2,))
    w = st.distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)], src_data_rank=None)
    optimizer = {"state": {0: {"m": w}}, "param_groups": [{"params": [0]}]}
    checkpoint.save({"o": optimizer}, folder, "a")
    empty = {"state": {}, "param_groups": [{"params": [0]}]}
    with pytest.raises(RuntimeError, match=r"no place for o\.state\.0\.m\. .* get_state_dict"):
        checkpoint.load({"o": empty}, folder / "a")
    assert empty["state"] == {}
    w.zero_()
    checkpoint.load({"o": optimizer}, folder / "a")
    assert w.full_tensor().eq(1).all()


def test_an_optimizer_of_shards(tmp_path):
    st.simulate(2, sharded_state, tmp_path)


def test_keys_that_differ(tmp_path):
    checkpoint.save({"m": {"a": torch.ones(2), "b": {"c": 1}}, "step": 3}, tmp_path, "a")

    def load(state, **more):
        return checkpoint.load(state, tmp_path / "a", **more)

    zero = torch.zeros(2)
    with pytest.raises(RuntimeError, match=r"no place for m\.a, m\.b\.c"):
        load({"m": {}})
    with pytest.raises(RuntimeError, match=r"no place for m\.b\.c"):
        load({"m": {"a": zero}})
    with pytest.raises(RuntimeError, match=r"does not have m\.b\.d, m\.e,.*no place for m\.b\.c"):
        load({"m": {"a": zero, "b": {"d": 0}, "e": zero}})
    with pytest.raises(RuntimeError, match=r"does not have epoch"):
        load({"step": 0, "epoch": 0})
    with pytest.raises(RuntimeError, match=r"does not have k0.* and 12 more"):
        load({f"k{i}": 0 for i in range(20)})
    assert zero.eq(0).all()
    state = load({"m": {"a": zero, "e": 5}}, strict=False)
    assert state == {"m": {"a": zero, "e": 5}} and zero.eq(1).all()
    # what is not wanted at all is not read
    assert load({"step": 0}) == {"step": 3}


def test_tensors_and_values_are_not_mixed_up(tmp_path):
    saved = {
        "t": torch.ones(2),
        "v": 3,
        "i": torch.tensor([1 << 40]),
        "f": torch.tensor([1e30, -torch.inf]),
    }
    checkpoint.save(saved, tmp_path, "a")
    for state, said in [
        ({"t": 0}, r"t is a tensor of \(2,\) in the file, in the state it is int"),
        ({"v": torch.zeros(())}, "v is a value that is no tensor in the file"),
        ({"t": torch.zeros(3)}, "Size mismatch"),
        ({"t": torch.zeros(2, dtype=torch.int64)}, r"torch\.float32 does not go into"),
        ({"i": torch.zeros(1, dtype=torch.int32)}, "too large for"),
        ({"f": torch.zeros(2, dtype=torch.float16)}, "too large for"),
    ]:
        with pytest.raises(RuntimeError, match=said):
            checkpoint.load(state, tmp_path / "a")
    half = torch.zeros(2, dtype=torch.bfloat16)
    assert checkpoint.load({"t": half}, tmp_path / "a")["t"].eq(1).all()
    half = torch.zeros(2, dtype=torch.bfloat16)
    assert checkpoint.load({"f": half}, tmp_path / "a")["f"].isinf().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e8m0fnu, torch.float8_e4m3fn])
def test_what_a_dtype_holds_is_loaded(dtype, tmp_path):
    # of which the absolute value is beyond float32's largest
    x = torch.tensor([3e38 + 3e38j, 2]) if dtype.is_complex else torch.tensor([4.0, torch.nan])
    checkpoint.save({"x": x.to(torch.complex128) if dtype.is_complex else x}, tmp_path, "a")
    got = checkpoint.load({"x": torch.ones(2).to(dtype)}, tmp_path / "a")["x"]
    got = got if dtype.is_complex else got.float()
    torch.testing.assert_close(got, x, equal_nan=True)


def test_numbers_as_keys(tmp_path):
    """DCP makes text of them."""
    state = {"s": {0: {"a": 1, (1, 2): 2}, 7: torch.ones(1), None: "n"}, "l": [{3: 4}, {"5": 6}]}
    checkpoint.save(state, tmp_path, "a")
    empty = {"s": {0: {"a": 0, (1, 2): 0}, 7: torch.zeros(1), None: ""}, "l": [{3: 0}, {"5": 0}]}
    assert checkpoint.load(empty, tmp_path / "a") == state


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    for value in (np.float64(3), np.ones(2), nn.Linear(1, 1), {1, object()}, lambda: 0):
        with pytest.raises(RuntimeError, match=r"bad was not saved.*m\.v is "):
            checkpoint.save({"m": {"v": value}, "t": torch.ones(2)}, tmp_path, "bad")
        assert checkpoint.latest(tmp_path) is None
    for x in (torch.eye(2).to_sparse(), torch.ones(2, device="meta")):
        with pytest.raises(RuntimeError, match=r"bad was not saved.*m\.v is a tensor .* dense one"):
            checkpoint.save({"m": {"v": x}}, tmp_path, "bad")
    for state in ([torch.ones(2)], torch.ones(2), nn.Linear(1, 1), None):
        for save in (checkpoint.save, checkpoint.save_async):
            with pytest.raises(TypeError, match=r"the state is a .*; give a dict"):
                save(state, tmp_path, "bad")
    fine = {"v": [1, 2.5, "a", None, True, (1j, b"c")], "d": torch.float16}
    checkpoint.save(fine, tmp_path, "good")
    assert checkpoint.load({"v": 0, "d": 0}, tmp_path / "good") == fine
    with pytest.raises(TypeError, match="the state is a list; give a dict"):
        checkpoint.load([0], tmp_path / "good")


def odd(folder, value):
    mesh = make_mesh((3,))
    state = {"x": st.distribute_tensor(torch.ones(2), mesh, [Shard(0)], src_data_rank=None)}
    if dist.get_rank() == 1:
        state |= {"own": 5, "v": value}
    else:
        state["v"] = torch.ones(2)
    with pytest.raises(
        RuntimeError, match=r"a was not saved.*v is a tensor .* on rank 0, .* on ran"
    ):
        checkpoint.save({"s": state}, folder, "a")
    state["v"] = torch.zeros(2)
    checkpoint.save({"s": state}, folder, "a")
    return checkpoint.load({"s": state}, folder / "a", strict=False)["s"]["v"].tolist()


@pytest.mark.parametrize("value", [torch.ones(3), torch.ones(2, dtype=torch.int64), 5])
def test_ranks_that_save_different_tensors(tmp_path, value):
    assert st.simulate(3, odd, tmp_path, value) == [[0.0, 0.0]] * 3


def test_states_that_cannot_be_filled(tmp_path):
    checkpoint.save({"w": torch.ones(2)}, tmp_path, "a")
    for x, said in [
        (torch.ones(2, device="meta"), "without memory .*to_empty"),
        (torch.ones(2).to_sparse(), "w is dense in the file"),
    ]:
        with pytest.raises(RuntimeError, match=said):
            checkpoint.load({"w": x}, tmp_path / "a")


# names --------------------------------------------------------------------------------------------

NAMES = ["../x", "..", ".", "", "/tmp/x", "a/b", "a/", "a\\b", ".hidden", "a\0", "a\n", " ", "a ",
         "x" * 250, "\udc80", 3, None, b"x"]  # fmt: skip


@pytest.mark.parametrize("save", [checkpoint.save, checkpoint.save_async])
def test_names_stay_in_the_folder(tmp_path, save):
    for name in NAMES:
        with pytest.raises(ValueError, match=r"name .*: the checkpoint becomes a folder"):
            save({"x": 1}, tmp_path / "c", name)
    for keep in (-1, 1.5, None, "2"):
        with pytest.raises(ValueError, match="keep is how many"):
            save({"x": 1}, tmp_path / "c", "a", keep=keep)
    assert not list(tmp_path.iterdir())
    for name in ("step3", "12:30", "ü", "a.b", "x" * 240, "a b"):
        save({"x": 1}, tmp_path / "c", name, keep=0)
    checkpoint.finish()
    assert len(list((tmp_path / "c").iterdir())) == 6


def test_links_are_not_followed(tmp_path):
    folder, other = tmp_path / "c", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (other / "file").touch()
    # where the next save writes, and where it would have its name
    (folder / ".a.partial").symlink_to(other)
    (folder / "b").symlink_to(tmp_path / "none")
    checkpoint.save({"x": 1}, folder, "a")
    assert sorted(p.name for p in other.iterdir()) == ["file"] and not (folder / "a").is_symlink()
    with pytest.raises(FileExistsError):
        checkpoint.save({"x": 1}, folder, "b")
    (folder / "best").symlink_to(folder / "a")
    checkpoint.save({"x": 1}, folder, "c", keep=1)
    assert not (folder / "a").exists() and (folder / "best").is_symlink()


def blind(folder):
    """Another rank cannot see yet what the first has made."""
    real = os.path.lexists
    if dist.get_rank() == 1:
        folder = folder.parent / "unmounted"
    try:
        checkpoint.save({"x": 1}, folder, "a")
    except FileExistsError as e:
        return str(e)
    finally:
        assert os.path.lexists is real


def test_the_first_rank_decides(tmp_path):
    checkpoint.save({"x": 1}, tmp_path / "c", "a")
    said = st.simulate(2, blind, tmp_path / "c")
    assert said[0] == said[1] and "complete already" in said[0]


def test_whatever_the_first_rank_meets(tmp_path, monkeypatch):
    """Of errors that are none of files too the others are told."""

    def odd(path):
        raise MemoryError("of this much")

    monkeypatch.setattr(files, "contents", odd)

    def run():
        with pytest.raises(RuntimeError, match="MemoryError: of this much"):
            checkpoint.load({"x": 0}, tmp_path)

    st.simulate(2, run)


def named_by_time(folder):
    x = st.distribute_tensor(torch.ones(4), make_mesh((2,)), [Shard(0)], src_data_rank=None)
    path = checkpoint.save({"x": x}, folder, f"at {dist.get_rank()}")
    x.zero_()
    checkpoint.load({"x": x}, path)
    assert x.full_tensor().eq(1).all()
    return path.name


def test_a_name_that_differs_between_ranks(tmp_path):
    assert st.simulate(2, named_by_time, tmp_path) == ["at 0", "at 0"]
    assert [p.name for p in tmp_path.iterdir()] == ["at 0"]


def parted(folder):
    name = "ab"[dist.get_rank()]
    with pytest.raises(RuntimeError, match="on rank 1: the first rank loads a, this one b"):
        checkpoint.load({"x": 0}, folder / name)


def test_ranks_that_load_different_checkpoints(tmp_path):
    for name in "ab":
        checkpoint.save({"x": 1}, tmp_path, name)
    st.simulate(2, parted, tmp_path)


# the newest ---------------------------------------------------------------------------------------


def saved(folder, names, **more):
    for name in names:
        checkpoint.save({"x": torch.ones(3), "name": name}, folder, name, keep=0)
        time.sleep(0.01)


@pytest.mark.parametrize("plain", [False, True])
def test_the_newest_that_is_complete(tmp_path, plain):
    if plain:
        for name in "abc":
            dcp.save({"x": torch.ones(3)}, checkpoint_id=tmp_path / name, no_dist=True)
            time.sleep(0.01)
    else:
        saved(tmp_path, "abc")
    assert checkpoint.latest(tmp_path).name == "c"
    cut = tmp_path / "c" / ".metadata"
    cut.write_bytes(cut.read_bytes()[:-10])
    with pytest.warns(UserWarning, match=r"c is not complete: \.metadata"):
        assert checkpoint.latest(tmp_path).name == "b"
    (tmp_path / "b" / "__0_0.distcp").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"b is not complete: __0_0\.distcp has 0 bytes of"):
        assert checkpoint.latest(tmp_path).name == "a"
    (tmp_path / "a" / "__0_0.distcp").unlink()
    with pytest.warns(UserWarning, match=r"a is not complete: __0_0\.distcp is missing"):
        assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "none") is None


def test_broken_ones_are_not_counted(tmp_path):
    saved(tmp_path, "abcd")
    (tmp_path / "c" / "__0_0.distcp").unlink()
    checkpoint.save({"x": 1}, tmp_path, "e", keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c", "d", "e"]
    shutil.rmtree(tmp_path / "b")
    checkpoint.save({"x": 1}, tmp_path, "f", keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_clocks_that_go_wrong(tmp_path):
    """What was just saved is the newest, also where the others come from the future."""
    saved(tmp_path, "abc")
    for name in "ab":
        os.utime(tmp_path / name / ".metadata", (4e9, 4e9))
    checkpoint.save({"x": 1}, tmp_path, "d", keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    checkpoint.save_async({"x": 1}, tmp_path, "e", keep=2).wait()
    assert checkpoint.latest(tmp_path).name == "e" and (tmp_path / "d").exists()
