"""What a typed program sees of the public API: `pyright` in strict mode has nothing to say of it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import checkpoint, io, testing


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def tensors(mesh: DeviceMesh, x: Tensor) -> Tensor:
    a: st.ShardTensor = st.distribute_tensor(x, mesh, [Shard(2)], sizes={2: (3, 4)})
    spec: st.Spec = a.spec
    sizes: dict[int, tuple[int, ...]] = spec.sizes
    dim: st.Dim = spec.dims[2]
    rows: tuple[int, ...] = dim.sizes
    local: Tensor = a.to_local(grad_placements=[Shard(2)])
    b: st.ShardTensor = a.redistribute(placements=[Replicate()])
    c: st.ShardTensor = st.ShardTensor.from_local(local, mesh, [Shard(2)], sizes=sizes)
    print(rows, b.placements, c.device_mesh, a.shape, a.dtype, spec.local_shape)
    return b.full_tensor()


def training(loader: io.Loader, folder: Path) -> None:
    mesh, device = st.init(data=2, domain=-1)
    model: Net = st.parallelize(Net().to(device), mesh, data="data", fsdp="all")
    optimizer = torch.optim.AdamW(model.parameters())
    for batch in loader:
        loss: Tensor = model(batch["x"]).square().mean()
        loss.backward()
        optimizer.step()
    checkpoint.save({"model": model.state_dict()}, folder, "step1")
    path: Path | None = checkpoint.latest(folder)
    if path is not None:
        state: dict[str, Any] = checkpoint.load({"model": model.state_dict()}, path)
        print(state)


def before(x: Tensor) -> None:
    print(st.check(Net(), x), st.plan(Net, [(1, 1, 64, 64)], 4))

    def ranks() -> float:
        return 1.0

    found: list[float] = st.simulate(2, ranks)
    print(found)
    with st.trace() as t, st.fallback("error"), st.guard():
        print(t.messages, t.bytes, t.sent)


def data(mesh: DeviceMesh, x: st.ShardTensor) -> None:
    source: io.Source = io.open_array("a.zarr", "t")
    block: Tensor = io.read_block(source, x.spec)
    read: st.ShardTensor = io.read(source, mesh, [Shard(0)], index={0: 3})
    weather = io.LatLon("a.zarr", ["t2m"], mesh, [Shard(1)], lead=[1, 2])
    sample: dict[str, Any] = weather[0]
    sampler = io.DomainSampler(len(weather), mesh, weights=[1.0] * len(weather))
    io.write_zarr(read, "b.zarr", "t", step=0, dims=("time", "y"), coords={"y": [1, 2]})
    print(block, sample, sampler, io.report(source, x.spec).amplification)


@st.rule("some_op")
def some_op(x: st.ShardTensor, n: int = 1) -> st.ShardTensor:
    if n > 1:
        raise st.UnsupportedOpError("some_op of n > 1")
    return x


def held(x: Tensor) -> None:
    testing.hold(torch.diff, [x, 1, 0], [testing.shard(0), None, None], (2,))
    y: Tensor = st.neighborhood_attention(x, x, x, 3)
    z: Tensor = st.sphere.pad_sphere(y, (1, 1, 1, 1))
    modes: Tensor = st.spectral.truncated_rfftn(z, modes=(4, 4))
    print(modes)
