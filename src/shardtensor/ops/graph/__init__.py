"""Graphs whose nodes lie on several ranks: edges by target, halos, mappers in chunks, files."""

from .chunks import chunked
from .cut import Graph, cut, follow
from .topology import Topology

__all__ = ["Graph", "Topology", "chunked", "cut", "follow"]
