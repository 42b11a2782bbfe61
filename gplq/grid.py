"""The grid: the only place in PyTorch that rounds.

Everything that is exported lies on one of two uniform grids without a zero point (GPLQ, Eq 1):

    signed b bits     codes -2^(b-1) … 2^(b-1)-1      weights, and activations of either sign
    unsigned b bits   codes 0 … 2^b-1                 the output of a softmax

    code = clamp(round_half_even(x / scale), low, high)        value = code * scale        scale > 0

The division is a true division and ties go to even, as in ONNX QuantizeLinear and in TensorRT's IQuantizeLayer.
Codes are kept in floating point: they are small integers, so that a matmul on them is exact in any order of summation
as long as the sum stays below 2^24 (4 bits: any K; 8 bits: K <= 1024).
"""

import torch
from torch import Tensor

# FP16's smallest normal number: a smaller scale would lose bits in an FP16 engine.
SMALLEST_SCALE = 2.0**-14
LARGEST_SCALE = 65504.0


def code_limits(bits: int, signed: bool) -> tuple[int, int]:
    """Lowest and highest code.

    >>> code_limits(4, signed=True), code_limits(4, signed=False)
    ((-8, 7), (0, 15))
    """
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def quantize(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    """Codes of ``x``, as floating point numbers of ``x``'s shape and dtype.

    ``scale`` broadcasts against ``x``. It must be a tensor on ``x``'s device: dividing by a Python number lets CUDA
    multiply by the rounded reciprocal instead, which moves ties.

    >>> quantize(torch.tensor([0.5, 1.5, -9.0]), torch.tensor(1.0), 4, signed=True)
    tensor([ 0.,  2., -8.])
    """
    low, high = code_limits(bits, signed)
    return torch.clamp(torch.round(x / scale), low, high)


def round_scale(scale: Tensor, scale_grid: str) -> Tensor:
    """Nearest positive scale that FP16 holds exactly ("fp16"), or with a 4-bit significand ("exact").

    FP16-exact scales make PyTorch, ONNX and an FP16 engine divide by the same number. With the "exact" grid (8 steps
    an octave) the products code * code * scale * scale have so few bits that an FP32 sum of 2048 of them is exact as
    well, so that a Q/DQ graph, which multiplies before it sums, gets the same bits as a sum over codes.

    >>> round_scale(torch.tensor([0.1, 1.0]), "exact")
    tensor([0.1016, 1.0000])
    """
    scale = scale.clamp(SMALLEST_SCALE, LARGEST_SCALE)
    if scale_grid == "exact":
        significand, exponent = torch.frexp(scale)  # significand in [0.5, 1)
        # frexp and ldexp by powers of two are exact; ldexp on floats rounds nothing here.
        scale = torch.ldexp(torch.round(significand * 16) / 16, exponent).clamp(max=61440.0)
    return scale.half().to(scale.dtype)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack signed integer codes for storage: two 4-bit codes a byte, the first in the low nibble, else one a byte.

    The nibble order is that of ONNX INT4 tensors. ``codes``: any shape, integral values. Returns uint8 [bytes].

    >>> pack_codes(torch.tensor([1, -1, 7]), 4)
    tensor([241,   7], dtype=torch.uint8)
    """
    flat = codes.flatten().to(torch.int16)
    if bits > 4:
        return flat.to(torch.int8).view(torch.uint8)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    nibbles = flat & 0xF
    return (nibbles[0::2] | (nibbles[1::2] << 4)).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Inverse of :func:`pack_codes`; int8 codes of ``shape``.

    Raises:
        ValueError: ``packed`` has not the size that ``shape`` needs.

    >>> unpack_codes(pack_codes(torch.tensor([1, -8, 7]), 4), 4, (3,))
    tensor([ 1, -8,  7], dtype=torch.int8)
    """
    count = int(torch.Size(shape).numel())
    expected = count if bits > 4 else (count + 1) // 2
    if packed.dtype != torch.uint8 or packed.shape != (expected,):
        raise ValueError(f"expected {expected} bytes of packed codes, found {tuple(packed.shape)} {packed.dtype}")
    if bits > 4:
        return packed.view(torch.int8).reshape(shape)
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=1).flatten()[:count].to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles).reshape(shape)
