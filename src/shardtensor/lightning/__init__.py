"""Lightning: `Trainer(strategy=shardtensor.lightning.DomainParallel(domain=4))`."""

from .strategy import DomainParallel

__all__ = ["DomainParallel"]
