"""The Triton kernel that merges blocks: its numbers in Triton's interpreter, its code for sm_90."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent
NUMBERS = """
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Shard
import shardtensor as st
from shardtensor import testing as T
from shardtensor.attention import blocks, merge, merge_kernel
from shardtensor.attention.strategy import strategy

blocks._looked_at = lambda lse: False
calls, plain = [], merge_kernel.merged
merge_kernel.merged = lambda *args: calls.append(args[4].dtype) or plain(*args)
torch.manual_seed(0)

def attend(q, k, v, causal):
    with strategy("ring"):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

for cut in ((5, 3), (3, 0, 5), (2, 2, 2, 2)):
    for causal in (False, True):
        x = [torch.randn(2, 3, 8, 4, dtype=torch.float64) for _ in range(3)]
        T.hold(attend, [*x, causal], [*[T.shard(2, cut)] * 3, None], (len(cut),))
assert len(calls) > 10

def run(x):
    mesh = T.make_mesh((4,))
    return attend(*(st.distribute_tensor(y, mesh, [Shard(2)], src_data_rank=None) for y in x), False)

# bfloat16 the interpreter cuts off, where a GPU rounds
x = [torch.randn(2, 3, 300, 72).half() for _ in range(3)]
true = F.scaled_dot_product_attention(*(y.double() for y in x))
own = (F.scaled_dot_product_attention(*x) - true).abs().max()
for got in st.simulate(4, lambda: run(x).full_tensor()):
    assert got.dtype is torch.float16 and (got - true).abs().max() <= 2 * own
assert torch.float16 in calls

inf = float("inf")
out, block = torch.randn(1, 1, 3, 2), torch.randn(1, 1, 3, 2)
lse, more = torch.tensor([[[-inf, 0.5, -inf]]]), torch.tensor([[[0.25, -inf, -inf]]])
want = torch.stack((block[0, 0, 0], out[0, 0, 1], out[0, 0, 2]))
plain(out, lse, block, more, out, lse)
assert torch.equal(out[0, 0], want) and lse.tolist() == [[[0.25, 0.5, -inf]]]
"""
CODE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from shardtensor.attention.merge_kernel import _kernel

for half in ("bf16", "fp16", "fp32"):
    kinds = dict.fromkeys(_kernel.arg_names, "i64")
    kinds |= dict(out="*fp32", lse="*fp32", block=f"*{half}", block_lse="*fp32", to=f"*{half}")
    kinds |= dict(lse_to="*fp32", heads="i32", rows="i32", width="i32")
    kinds |= dict(ROWS="constexpr", WIDTH="constexpr")
    source = ASTSource(_kernel, signature=kinds, constexprs={"ROWS": 64, "WIDTH": 64})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert "sm_90" in made.asm["ptx"]
"""


def ran(program, **options):
    path = os.pathsep.join([str(ROOT.parent / "src"), str(ROOT)])
    env = {**os.environ, "SHARDTENSOR_MERGE": "triton", "PYTHONPATH": path, **options}
    # the interpreter reads the source of what it runs
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]


def test_numbers_of_the_interpreter():
    ran(NUMBERS, TRITON_INTERPRET="1")


def test_it_is_compiled_for_a_gpu():
    ran(CODE)
