"""Fourier transforms of one and several dims, and of frames."""

import torch

from .table import D, case, normal

C = torch.complex128

ONE = ["fft", "ifft", "rfft", "irfft", "hfft", "ihfft"]
REAL = {"rfft", "ihfft"}


def data(name, *shape):
    return torch.randn(*shape, dtype=D if name.rstrip("2n") in REAL else C)


def transform(name):
    """The torch function; complex results as pairs, so that both parts have cotangents."""
    fn = getattr(torch.fft, name)

    def run(*args, **kwargs):
        y = fn(*args, **kwargs)
        return torch.view_as_real(y.resolve_conj()) if y.is_complex() else y

    return run


def lines(name):
    fn = transform(name)
    ways = [(), (5,), (10, 2, "ortho"), (None, -1, "forward")]
    return lambda x: [*(fn(x, *a) for a in ways), fn(x, dim=1), fn(x, n=4, dim=0)]


def planes(name):
    fn = transform(name)
    ways = [("ortho", (3, 7), (1, 3)), ("forward", (6, -1), (3, 0))]
    return lambda x: [fn(x), *(fn(x, s, dim, norm) for norm, s, dim in ways)]


for name in ONE:
    case("fft", data(name, 2, 3, 7), name=name)(lines(name))
    case("fft of a vector", data(name, 7), name=name, gather=True)(transform(name))
    for kind in "2n":
        case("fft of several dims", data(name + kind, 2, 5, 4, 6), name=name + kind)(
            planes(name + kind)
        )
        for shape in [(5, 6), (1, 7, 4)]:
            case(
                "fft of all dims",
                data(name + kind, *shape),
                name=f"{name + kind} {shape}",
                gather=True,
            )(transform(name + kind))


@case("stft", normal(3, 50), torch.hann_window(8, dtype=D), dims=[None, ()])
def frames(x, w):
    return torch.view_as_real(torch.stft(x, 10, 3, 8, w, return_complex=True, normalized=True))
