"""Reading and writing samples: each rank only what it holds."""

from .block import Report, aligned_sizes, read, read_block, report, spec_of
from .latlon import LatLon
from .loader import DomainSampler, Loader
from .meshes import Mesh, Points, cases, convert, read_mesh
from .sharded import read_sharded
from .source import Source, open_array
from .well import WellFile, write_well
from .write import write_zarr

__all__ = [
    "DomainSampler",
    "LatLon",
    "Loader",
    "Mesh",
    "Points",
    "Report",
    "Source",
    "WellFile",
    "aligned_sizes",
    "cases",
    "convert",
    "open_array",
    "read",
    "read_block",
    "read_mesh",
    "read_sharded",
    "report",
    "spec_of",
    "write_well",
    "write_zarr",
]
