"""The grid in PyTorch against the one in NumPy."""

import numpy as np
import pytest
import reference
import torch

from gplq import grid

GRIDS = [(bits, signed) for bits in (2, 3, 4, 8) for signed in (True, False)]


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_codes_are_those_of_the_reference(bits: int, signed: bool, dtype: type[np.floating]) -> None:
    random = np.random.default_rng(bits)
    x = random.normal(scale=2.0**bits / 10, size=(4000, 7)).astype(dtype)
    scale = random.uniform(0.01, 0.3, 7).astype(dtype)
    codes = grid.quantize(torch.from_numpy(x), torch.from_numpy(scale), bits, signed)
    np.testing.assert_array_equal(codes.numpy(), reference.quantize(x, scale, bits, signed))
    assert codes.numpy().dtype == dtype


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0999755859375, 3.0])
def test_ties_go_to_even(scale: float) -> None:
    # (k + 1/2) * scale is exact in float64 for scales that FP16 holds, and so is the division back.
    halves = np.arange(-12, 12) + 0.5
    codes = grid.quantize(torch.from_numpy(halves * scale), torch.tensor(scale, dtype=torch.float64), 4, signed=True)
    expected = [min(max(int(low) + int(low) % 2, -8), 7) for low in np.floor(halves)]
    assert codes.tolist() == expected


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_values_out_of_range_become_the_limits(bits: int, signed: bool) -> None:
    low, high = grid.code_limits(bits, signed)
    codes = grid.quantize(torch.tensor([-1e30, -torch.inf, 1e30, torch.inf]), torch.tensor(0.5), bits, signed)
    assert codes.tolist() == [low, low, high, high]
    assert high - low == 2**bits - 1


@pytest.mark.parametrize("kind", ["fp16", "exact"])
def test_rounded_scales_are_the_nearest_of_the_grid(kind: str) -> None:
    every = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)  # all positive finite FP16
    allowed = every[every >= 2.0**-14]
    if kind == "exact":
        significands = np.frexp(allowed)[0] * 16
        allowed = allowed[significands == np.rint(significands)]
    scales = np.exp(np.random.default_rng(0).uniform(np.log(2.0**-14), np.log(6e4), 2000)).astype(np.float32)
    rounded = grid.round_scale(torch.from_numpy(scales), kind).numpy().astype(np.float64)
    assert np.isin(rounded, allowed).all()
    place = np.searchsorted(allowed, scales).clip(1, len(allowed) - 1)
    least = np.minimum(np.abs(allowed[place] - scales), np.abs(allowed[place - 1] - scales))
    np.testing.assert_array_equal(np.abs(rounded - scales), least)


@pytest.mark.parametrize("kind", ["fp16", "exact"])
def test_scales_out_of_range_come_back_into_it(kind: str) -> None:
    low, high = grid.round_scale(torch.tensor([0.0, 1e9]), kind).tolist()
    assert low == 2.0**-14
    assert high == {"fp16": 65504.0, "exact": 61440.0}[kind]


@pytest.mark.parametrize("shape", [(1,), (2, 3), (3, 5), (4, 16), (0,)])
def test_int4_bytes_are_those_of_the_reference(shape: tuple[int, ...]) -> None:
    codes = np.random.default_rng(1).integers(-8, 8, shape)
    packed = grid.pack_codes(torch.from_numpy(codes), 4)
    assert bytes(packed.tolist()) == reference.pack_int4(codes)
    assert packed.numel() == (codes.size + 1) // 2
    unpacked = grid.unpack_codes(packed, 4, shape)
    np.testing.assert_array_equal(unpacked.numpy(), codes)
    np.testing.assert_array_equal(unpacked.numpy().ravel(), reference.unpack_int4(bytes(packed.tolist()), codes.size))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_every_code_survives_packing(bits: int) -> None:
    low, high = grid.code_limits(bits, signed=True)
    codes = torch.arange(low, high + 1)
    assert torch.equal(grid.unpack_codes(grid.pack_codes(codes, bits), bits, tuple(codes.shape)).long(), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_codes_of_a_wrong_size_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="bytes of packed codes"):
        grid.unpack_codes(torch.zeros(7, dtype=torch.uint8), bits, (4, 4))
    with pytest.raises(ValueError, match="int16"):
        grid.unpack_codes(torch.zeros(16 if bits == 8 else 8, dtype=torch.int16), bits, (4, 4))
