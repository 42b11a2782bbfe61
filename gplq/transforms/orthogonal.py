"""Orthogonal matrices that spread what is concentrated in a few channels, in FP64.

Whoever multiplies a row vector with one of them distributes a single large channel evenly over all.
"""

import math

import torch
from torch import Tensor

# (J - 2 I) / 2, J full of ones: a Hadamard matrix whose rows sum to 1. Products of such matrices keep both properties.
_REGULAR = 0.5 - torch.eye(4, dtype=torch.float64)
# So many random matrices of up to so many rows cost nothing, and the best of them is clearly better than the first.
_DRAWS, _SMALL = 64, 64


def head_rotations(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [heads, head_dim, head_dim] for each of (heads, head_dim) = ``shape``.

    Hadamard with random signs where ``head_dim`` is a power of two (QuaRot, arXiv 2404.00456), which spreads a channel
    over all of them exactly evenly; else from the uniform distribution of orthogonal matrices.
    """
    heads, size = shape
    if size & (size - 1):
        return torch.stack([_uniform(size, generator) for _ in range(heads)])
    signs = torch.randint(0, 2, (heads, size, 1), generator=generator).double() * 2 - 1
    rotations: Tensor = signs * _hadamard(size)
    return rotations


def mean_keeping_rotation(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal R [size, size] with R 1 = 1, so that x R has the mean and the variance of x.

    That is what a LayerNorm without affine parameters commutes with: LN(x R) = LN(x) R. Signs, as a Hadamard matrix
    takes them for randomness, would break it. Instead R = P (H x ... x H x S) P' with permutations P, P', the Hadamard
    matrix H of order 4 whose rows sum to 1, and for the rest of the size a small random S with S 1 = 1. Of one large
    channel, all get the same share, but for S; a dense random R of C channels leaves sqrt(2 ln C) times as much in one.
    """
    rest, regular = size, torch.ones(1, 1, dtype=torch.float64)
    while rest % 4 == 0 and rest != 8:  # of order 2 there is nothing but the identity and the exchange
        rest, regular = rest // 4, torch.kron(regular, _REGULAR)
    draws = [_mean_keeping(rest, generator) for _ in range(_DRAWS if rest <= _SMALL else 1)]
    mixed = torch.kron(regular, min(draws, key=lambda draw: float(draw.abs().max())))
    rows, columns = (torch.randperm(size, generator=generator) for _ in range(2))
    return mixed[rows][:, columns]


def reflect(x: Tensor, axis: int) -> Tensor:
    """Multiply channels along ``axis`` by a fixed A = I - 2 v v^T with A 1 = 1, the cheapest matrix that mixes all."""
    size = x.shape[axis]
    v = torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    v = v - v.mean()
    v = (v / v.norm()).to(x)
    moved = x.movedim(axis, -1)
    reflected: Tensor = moved - 2 * (moved @ v)[..., None] * v
    return reflected.movedim(-1, axis)


def _mean_keeping(size: int, generator: torch.Generator) -> Tensor:
    """B diag(1, Q) B^T with 1 / sqrt(size) in B's first column and a random orthogonal Q."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    start = torch.randn(size, size, generator=generator, dtype=torch.float64)
    start[:, 0] = 1
    basis = torch.linalg.qr(start)[0]
    inner = torch.eye(size, dtype=torch.float64)
    inner[1:, 1:] = _uniform(size - 1, generator)
    rotation: Tensor = basis @ inner @ basis.T
    return rotation


def _uniform(size: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    rotation: Tensor = q * r.diagonal().sign()  # QR alone prefers some matrices
    return rotation


def _hadamard(size: int) -> Tensor:
    """Sylvester's, scaled to be orthogonal."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)
