"""What the library raises."""


class UnsupportedOpError(NotImplementedError):
    """An op met a sharding that has no rule.

    Raised on every rank alike, before anything is sent; the message names the op, the specs and
    the next step.
    """
