"""Whether long and broken training holds: flat memory, random kills, many starts.

    OMP_NUM_THREADS=1 python benchmarks/endurance.py [--ranks 4] [--steps 1000] [--kills 5]
        [--cycles 100] [--csv FILE]

1. `--steps` training steps on `--ranks` gloo ranks: resident memory and live tensors of each rank
   after a tenth of the steps and at the end.
2. The same training, of which a random rank is killed (SIGKILL) at random times and which goes on
   from its last checkpoint: the losses must be those of the first, bit by bit.
3. `--cycles` times: start the process group, one training step, stop it, in the same processes.

Ends with status 1 where memory grows by more than 5 %, tensors at all, or a loss differs.
"""

import argparse
import gc
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from tables import extend, hardware
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 2, 3, padding=1)
    )


def sample(step):
    """The input of a step: the same in every run."""
    return torch.randn(1, 2, 33, 16, generator=torch.Generator().manual_seed(step))


def train_step(net, optimizer, mesh, step):
    x = st.distribute_tensor(sample(step), mesh, [Shard(2)], src_data_rank=None)
    loss = (net(x) - x.roll(1, 2)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors():
    """Tensors of this process by type and shape, once nothing lets go of any more."""
    found = None
    while True:
        # what a hook in C++ holds is seen as garbage only once its owner has been collected
        for _ in range(3):
            gc.collect()
        objects = (x for x in gc.get_objects() if issubclass(type(x), torch.Tensor))
        now = Counter((type(x).__name__, tuple(x.shape)) for x in objects)
        if now == found:
            return now
        # a thread of gloo lets go of what it sent a moment after its sender went on
        found = now
        time.sleep(0.02)


def train(folder, steps, every):
    """One rank of a training that begins at its newest checkpoint; rank 0 writes the losses."""
    mesh, _ = st.init()
    net = st.parallelize(model(), mesh)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    first = 0
    newest = st.checkpoint.latest(folder / "checkpoints")
    # Adam makes its state at the first step
    train_step(net, optimizer, mesh, 0)
    net.load_state_dict(model().state_dict())
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    if newest is not None:
        train_step(net, optimizer, mesh, 0)
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": 0}
        st.checkpoint.load(state, newest)
        optimizer.load_state_dict(state["optimizer"])
        net.load_state_dict(state["net"])
        first = state["step"]
    marks = {}
    with (folder / f"losses-{dist.get_rank()}").open("a") as f:
        for step in range(first, steps):
            loss = train_step(net, optimizer, mesh, step)
            f.write(f"{step} {loss.hex()}\n")
            f.flush()
            if every and (step + 1) % every == 0 and step + 1 < steps:
                state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
                st.checkpoint.save(
                    {**state, "step": step + 1}, folder / "checkpoints", str(step + 1)
                )
            if step + 1 in (steps // 10, steps):
                marks[step + 1] = (resident(), live_tensors().total())
    with (folder / f"memory-{dist.get_rank()}").open("w") as f:
        f.writelines(f"{k} {m} {n}\n" for k, (m, n) in marks.items())


def cycle(ports):
    """One rank of a program that starts and stops its process group for each port."""
    marks = []
    for i, port in enumerate(ports):
        os.environ["MASTER_PORT"] = str(port)
        mesh, _ = st.init()
        net = st.parallelize(model(), mesh)
        loss = train_step(net, torch.optim.SGD(net.parameters(), 0.1), mesh, 0)
        del net
        dist.destroy_process_group()
        if i in (max(1, len(ports) // 10), len(ports) - 1):
            marks.append((resident(), live_tensors().total()))
    os.write(
        1, f"{marks[0][0]} {marks[-1][0]} {marks[0][1]} {marks[-1][1]} {loss.hex()}\n".encode()
    )


def free_ports(n):
    sockets = [socket.create_server(("localhost", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start(ranks, *args):
    """The processes of one program, without an agent: nothing but the library ends them."""
    port = str(free_ports(1)[0])
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "PMI"))}
    return [
        subprocess.Popen(
            [sys.executable, __file__, "--rank-of", *map(str, args)],
            stdout=subprocess.PIPE, text=True,
            env={**clean, "RANK": str(r), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(r),
                 "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": port},
        )
        for r in range(ranks)
    ]  # fmt: skip


def ended(processes, seconds=600):
    """(exit code, output) of each process."""
    found = []
    for p in processes:
        text, _ = p.communicate(timeout=seconds)
        found.append((p.returncode, text))
    return found


def losses(folder, rank=0):
    """step -> the set of losses that were found for it, in all runs."""
    found = {}
    for line in (folder / f"losses-{rank}").read_text().splitlines():
        step, _, value = line.partition(" ")
        found.setdefault(int(step), set()).add(value)
    return found


def broken(folder, ranks, steps, every, kills, rng):
    """Train, kill a random rank at a random time, go on; returns the seconds that endings took."""
    waits = []
    while True:
        processes = start(ranks, "train", folder, steps, every)
        if len(waits) == kills:
            assert all(code == 0 for code, _ in ended(processes)), "the last run failed"
            return waits
        done = steps_done(folder)
        goal = done + rng.randint(every // 2, 2 * every)
        while steps_done(folder) < goal and all(p.poll() is None for p in processes):
            time.sleep(0.02)
        rng.choice(processes).send_signal(signal.SIGKILL)
        begin = time.monotonic()
        codes = [code for code, _ in ended(processes, 60)]
        if all(c == 0 for c in codes):
            return waits
        waits.append(time.monotonic() - begin)


def steps_done(folder):
    file = folder / "losses-0"
    return len(losses(folder)) if file.exists() else 0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=25, help="steps between checkpoints")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        whole, torn = Path(name, "whole"), Path(name, "torn")
        whole.mkdir()
        torn.mkdir()
        begin = time.monotonic()
        assert all(code == 0 for code, _ in ended(start(args.ranks, "train", whole, args.steps, 0)))
        rows.append(("seconds of all steps", time.monotonic() - begin))
        for r in range(args.ranks):
            early, late = (
                list(map(int, x.split()))
                for x in Path(whole, f"memory-{r}").read_text().splitlines()
            )
            rows.append((f"memory growth of rank {r}, percent", 100 * (late[1] / early[1] - 1)))
            rows.append((f"more live tensors on rank {r}", late[2] - early[2]))
        waits = broken(
            torn, args.ranks, args.steps, args.every, args.kills, random.Random(args.seed)
        )
        differ = sum(losses(torn)[s] != v for s, v in losses(whole).items())
        rows += [
            ("kills", len(waits)),
            ("seconds until all ended, at most", max(waits, default=0.0)),
        ]
        rows.append(("losses that differ after kills", differ))
        begin = time.monotonic()
        found = ended(start(args.ranks, "cycle", *free_ports(args.cycles)))
        assert all(code == 0 for code, _ in found)
        rows.append((f"seconds of {args.cycles} starts and stops", time.monotonic() - begin))
        for r, (_, text) in enumerate(found):
            a, b, m, n, _ = text.split()
            rows.append(
                (f"memory growth of rank {r} over starts, percent", 100 * (int(b) / int(a) - 1))
            )
            rows.append((f"more live tensors on rank {r} over starts", int(n) - int(m)))
    machine = hardware()
    print(f"{machine}, {args.ranks} ranks, {args.steps} steps")
    for what, value in rows:
        print(f"{what:52} {value:10.2f}")
    extend(args.csv, ([machine, args.ranks, args.steps, *row] for row in rows))
    bad = [
        w
        for w, v in rows
        if ("percent" in w and v > 5) or (w.startswith(("more", "losses")) and v > 0)
    ]
    sys.exit(f"failed: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank-of"]:
        torch.set_num_threads(1)
        what, *rest = sys.argv[2:]
        if what == "train":
            train(Path(rest[0]), int(rest[1]), int(rest[2]))
        else:
            cycle(rest)
    else:
        main()
