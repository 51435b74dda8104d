"""Short-time Fourier transform: frames by windows of the signal, then a transform of each."""

from __future__ import annotations

import torch
from torch import Tensor

from ...registry import rule


@rule("stft")
def stft(
    input: Tensor,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Tensor | None = None,
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,
    align_to_window: bool | None = None,
) -> Tensor:
    """(..., L) to (..., frequencies, frames); torch.stft has padded the signal by then."""
    if not (input.is_floating_point() or input.is_complex()):
        raise RuntimeError(f"stft of {input.dtype}: expected floating point or complex values")
    hop, width = hop_length or n_fft // 4, win_length or n_fft
    if not 0 < n_fft <= input.shape[-1] or hop <= 0 or not 0 < width <= n_fft:
        raise RuntimeError(
            f"stft: n_fft {n_fft}, hop_length {hop}, win_length {width} for {input.shape[-1]} "
            "samples"
        )
    frames = input.unfold(-1, n_fft, hop)
    if window is not None or width < n_fft:
        kind = input.real.dtype if input.is_complex() else input.dtype
        shape = torch.ones(width, dtype=kind) if window is None else window
        left = (n_fft - width) // 2
        frames = frames * torch.nn.functional.pad(shape, (left, n_fft - width - left))
    whole = input.is_complex() or (window is not None and window.is_complex()) or onesided is False
    norm = "ortho" if normalized else "backward"
    found = (torch.fft.fft if whole else torch.fft.rfft)(frames, norm=norm).transpose(-1, -2)
    return found if return_complex or return_complex is None else torch.view_as_real(found)
