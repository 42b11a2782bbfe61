"""The grid once more, in NumPy and on purpose: written from the formula of ONNX QuantizeLinear, not from gplq.

ONNX QuantizeLinear without a zero point: y = saturate(round(x / y_scale)), rounding to nearest, ties to even; the
range of saturation is that of the type (INT4: -8 … 7). Packed INT4: two elements a byte, the first in the low nibble.
"""

import numpy as np
from numpy.typing import NDArray


def quantize(x: NDArray[np.floating], scale: NDArray[np.floating], bits: int, signed: bool) -> NDArray[np.int64]:
    """Codes, int64; computed in the precision of ``x``, scales broadcast."""
    lowest = -(1 << (bits - 1)) if signed else 0
    highest = (1 << (bits - 1)) - 1 if signed else (1 << bits) - 1
    nearest = np.rint(np.divide(x, scale))  # rint: ties to even (IEEE 754 roundToIntegralTiesToEven)
    return np.minimum(np.maximum(nearest, lowest), highest).astype(np.int64)


def pack_int4(codes: NDArray[np.integer]) -> bytes:
    """Two's complement nibbles, the first of a pair in the low half; an odd end is filled with zero."""
    values = [int(code) % 16 for code in codes.ravel()]
    if len(values) % 2:
        values.append(0)
    return bytes(low + 16 * high for low, high in zip(values[::2], values[1::2], strict=True))


def unpack_int4(packed: bytes, count: int) -> NDArray[np.int64]:
    """Inverse of :func:`pack_int4`, flat."""
    nibbles = [nibble for byte in packed for nibble in (byte % 16, byte // 16)][:count]
    return np.array([nibble - 16 if nibble >= 8 else nibble for nibble in nibbles], dtype=np.int64)
