"""What the library raises."""


class UnsupportedOpError(NotImplementedError):
    """An op met a sharding that has no rule.

    Raised on every rank alike, before anything is sent; the message names the op, the specs and
    the next step.
    """


class RankError(RuntimeError):
    """Another rank raised or died, or ranks wait for each other for ever."""


class DivergenceError(RankError):
    """Ranks part: one came to another collective than the others, with other sizes, or not at all.

    Raised under `guard` on every rank; the message names ranks, ops and lines.
    """


class TransportError(RuntimeError):
    """A buffer under way was touched or not waited for, or is none that NCCL takes.

    Raised by the strict transport; the message names the op and its line.
    """
