# mypy: disable-error-code="attr-defined"
"""Kernels of torch that have no public name; `nn` are those behind torch.nn.functional."""

from typing import Any

import torch

nn: Any = torch._C._nn
# whose backward takes operands of two dtypes: not that of torch 2.11
MIXED_LOSS = not torch.__version__.startswith("2.11.")
# whether a DTensor is written to by a mask
MASKED_DTENSORS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)
functions: Any = torch._VF
# C++'s own; as torch.ops has them they are called by a function of Python
batch_norm_backward: Any = torch.ops.aten.native_batch_norm_backward.op
convolution_backward: Any = torch.ops.aten.convolution_backward.op
unique2: Any = torch._unique2
# the library that a convolution takes
conv_backend: Any = torch._C._select_conv_backend
# how what it gives lies in memory
conv_format: Any = torch._C._conv_determine_backend_memory_format
