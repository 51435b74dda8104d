"""Layers of torch-harmonics 0.9 on ShardTensors, unmodified: rules for the kernels that they call.

Each kernel has a table of entries, alike on all ranks, that says which input latitudes an output
latitude sees: a rank fetches those that others hold, and gives them to the stock kernel with its
part of the table. Kernels turn whole circles, so longitudes that are cut are dealt out as latitudes
first, and cut again in the end.

The rules take effect when the program imports torch_harmonics.
"""

from . import attention, convolution

__all__ = ["attention", "convolution"]
