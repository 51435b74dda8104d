"""What a call raises, as a value."""


def raised(fn, *args):
    """The error of fn(*args), None if there is none."""
    try:
        fn(*args)
    except Exception as e:
        return e
    return None
