"""The front door: sizes, decoders against the `gguf` package, what is refused."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from quantiser import QUANTISED, installed

from lorikeet.errors import ModelError
from lorikeet.gguf.blocks import TYPES, decode, encode, row_bytes


def rows(count: int = 8, width: int = 512) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1))


def test_the_table_is_that_of_the_gguf_package() -> None:
    for name, kind in TYPES.items():
        known = gguf.GGMLQuantizationType[name]
        assert (kind.name, kind.id) == (name, known)
        assert (kind.weights, kind.bytes) == gguf.GGML_QUANT_SIZES[known]


@pytest.mark.parametrize("name", TYPES)
def test_any_bytes_decode_as_in_the_gguf_package(name: str) -> None:
    """To the bit, but for the payload of a NaN."""
    random = np.random.default_rng(0)
    data = random.integers(0, 256, (400, row_bytes(name, 1024)), np.uint8)
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    found = decode(name, torch.from_numpy(data)).numpy()
    assert found.dtype == np.float32 and found.shape == wanted.shape == (400, 1024)
    same = found.view(np.uint32) == wanted.astype(np.float32, copy=False).view(np.uint32)
    assert (same | (np.isnan(found) & np.isnan(wanted))).all()
    assert np.isnan(wanted).mean() < 0.1


@pytest.mark.parametrize("name", TYPES)
def test_shapes_and_dtypes(name: str) -> None:
    data = encode(name, rows())
    assert data.dtype == torch.uint8 and data.shape == (8, row_bytes(name, 512))
    assert decode(name, data).shape == (8, 512)
    assert encode(name, rows()[:0]).shape == (0, row_bytes(name, 512))
    assert decode(name, data[:0]).shape == (0, 512)


@pytest.mark.parametrize("name", TYPES)
def test_rows_are_encoded_one_by_one(name: str) -> None:
    """Neither chunks, nor threads, nor where the numbers lie in memory change a byte."""
    many, columns = rows(700, 512), torch.rand(1024)[::2]
    whole = encode(name, many, columns)
    parts = [encode(name, part, columns) for part in many.split([1, 298, 401])]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole, encode(name, many.T.contiguous().T, columns))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 2)
        assert torch.equal(whole, encode(name, many, columns))
        assert torch.equal(decode(name, whole), torch.cat([decode(name, p) for p in parts]))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", TYPES)
def test_a_single_block_is_encoded_as_among_others(name: str) -> None:
    """numpy adds up a single column in another order than many."""
    many = rows(40, 256 if name.endswith("K") else 32)
    columns = torch.rand(many.shape[1])
    for given in (None, columns):
        whole, before = encode(name, many, given), many.clone()
        for size in (1, 2, 3):
            parts = [encode(name, part, given) for part in many.split(size)]
            assert torch.equal(whole, torch.cat(parts))
        assert torch.equal(many, before)


@pytest.mark.parametrize("name", TYPES)
def test_data_may_lie_anywhere(name: str) -> None:
    data = encode(name, rows())
    size = data.shape[1]
    shifted = torch.zeros(8, size + 3, dtype=torch.uint8)
    shifted[:, 3:] = data
    assert torch.equal(decode(name, shifted[:, 3:]), decode(name, data))


def test_decoded_float32_is_a_copy() -> None:
    data = encode("F32", rows())
    decode("F32", data).zero_()
    assert torch.equal(decode("F32", data), rows())
    source = rows()
    encode("F32", source).zero_()
    assert torch.equal(source, rows())


@pytest.mark.parametrize("name", TYPES)
def test_zeros_and_constants_survive(name: str) -> None:
    assert not decode(name, encode(name, torch.zeros(2, 512))).any()
    for value in (1.0, -1.0, 0.5, -0.2):
        found = decode(name, encode(name, torch.full((2, 512), value)))
        torch.testing.assert_close(found, torch.full((2, 512), value), rtol=5e-3, atol=0)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(name: str, value: float) -> None:
    broken = rows()
    broken[3, 77] = value
    with pytest.raises(ModelError, match=f"row 3, column 77: {name} cannot hold -?(nan|inf)"):
        encode(name, broken)


def test_a_refusal_in_another_thread_arrives() -> None:
    broken, threads = rows(1400, 1024), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for row in (3, 700, 1399):
            broken[row, 5] = float("nan")
            with pytest.raises(ModelError, match=f"row {row}, column 5"):
                encode("Q4_K", broken)
            broken[row, 5] = 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", [name for name in TYPES if name != "F32"])
def test_weights_too_large_for_a_type_are_refused(name: str) -> None:
    large = rows()
    large[5, 300] = -3.4e38
    with pytest.raises(ModelError, match=f"3.4e\\+38 do not fit {name}"):
        encode(name, large)


@pytest.mark.parametrize("name", QUANTISED)
def test_llama_cpp_refuses_the_same(name: str) -> None:
    quantiser = installed()
    if quantiser is None:
        pytest.skip("xllamacpp is not installed")
    refused = 0
    for size in (1e3, 1e4, 1e5, 1e6, 3e6, 1e7, 3e7, 1e8, 9e8, 1e9):
        large = rows() * size / rows().abs().max()
        if quantiser.accepts(name, quantiser.encode(name, large)):
            assert quantiser.accepts(name, encode(name, large))
        else:
            refused += 1
            with pytest.raises(ModelError, match=f"do not fit {name}"):
                encode(name, large)
    assert refused


@pytest.mark.parametrize("name", QUANTISED)
def test_importance_that_makes_no_sense_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=r"importance of shape \[256\] for rows of 512"):
        encode(name, rows(), torch.ones(256))
    for value in (-1.0, float("nan"), float("inf")):
        columns = torch.ones(512)
        columns[9] = value
        with pytest.raises(ModelError, match="negative or not finite"):
            encode(name, rows(), columns)


def test_widths_that_do_not_divide_into_blocks_are_refused() -> None:
    assert row_bytes("Q4_K", 2048) == 8 * 144
    for name, width in (("Q4_K", 576), ("Q8_0", 100), ("Q4_0", 0)):
        with pytest.raises(ModelError, match=f"rows of {width} weights do not divide"):
            row_bytes(name, width)
    with pytest.raises(ModelError, match="rows of 576 weights"):
        encode("Q6_K", torch.zeros(1, 576))
    with pytest.raises(ModelError, match="rows of 145 bytes are no whole number of Q4_K blocks"):
        decode("Q4_K", torch.zeros(1, 145, dtype=torch.uint8))
    with pytest.raises(ModelError, match="rows of 3 bytes are no whole number of F16 blocks"):
        decode("F16", torch.zeros(1, 3, dtype=torch.uint8))


def test_unknown_types_are_refused() -> None:
    for call in (lambda: row_bytes("Q9_9", 256), lambda: decode("Q9_9", torch.zeros(1, 1))):
        with pytest.raises(ModelError, match="Q9_9 is not a type that can be read or written"):
            call()
