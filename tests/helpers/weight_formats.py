"""Random weights in every format."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch

from pyspec.ops.linear import JoinedWeight, LinearWeight, lay_out_weight
from pyspec.ops.linear_codes import lay_out_codes
from pyspec.ops.weight_formats import _GGUF, FORMATS, GGUF_KINDS, Codes, from_gguf, join_codes, quantise

if TYPE_CHECKING:
    import gguf

# where factors and floors, fp16, lie in a block; the exponent of mxfp4 is its first byte
_FACTORS = {"q4_1": (0, 2), "q5_1": (0, 2), "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2)}
_FACTORS |= {"q6_k": (208,)}


def gguf_bytes(kind: str, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Random bytes of a tensor of shape [N, K] with factors of either sign from 2^-7 to 1/2 (2^-7 to 8 for mxfp4)."""
    numbers = np.random.default_rng(seed)
    blocks = shape[0] * shape[1] // FORMATS[kind].block
    data = numbers.integers(0, 256, (blocks, _GGUF[kind][0]), dtype=np.uint8)
    if kind == "mxfp4":
        data[:, 0] = numbers.integers(121, 132, blocks)
    else:
        for place in _FACTORS.get(kind, (0,)):
            factors = numbers.uniform(2**-7, 0.5, blocks) * numbers.choice([-1, 1], blocks)
            data[:, place : place + 2] = factors.astype(np.float16)[:, None].view(np.uint8)
    return torch.from_numpy(data.reshape(-1))


def random_codes(name: str, outputs: int, inputs: int, seed: int = 0) -> Codes:
    """A random weight [outputs, inputs]; inputs must be whole blocks but for int4."""
    if name in GGUF_KINDS:
        return from_gguf(name, gguf_bytes(name, (outputs, inputs), seed), (outputs, inputs))
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    return quantise(weight, FORMATS[name])


# ==== blocks with values of a given size, of any type that gguf dequantises ====


def gguf_blocks(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...], std: float, seed: int = 0) -> np.ndarray:
    """Random bytes, uint8 [..., bytes of a row], of a tensor whose values have about this standard deviation."""
    import gguf  # which the tests of ops do without

    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    numbers = np.random.default_rng(seed)
    blocks = int(np.prod(shape)) // block
    data = numbers.integers(0, 256, (blocks, block_bytes), dtype=np.uint8)
    signs, name = numbers.choice([-1, 1], blocks), kind.name.lower()
    if name == "mxfp4":
        data[:, 0] = numbers.integers(0, 3, blocks) + 124 + round(np.log2(std))
    elif name == "nvfp4":  # a sign and four bits of exponent, 7 of which is 1
        data[:, :4] = (numbers.integers(0, 3, (blocks, 4)) + 5 + round(np.log2(std))) << 3 | data[:, :4] & 7
    else:
        write_factors(data, name, signs.astype(np.float16))
        ones = gguf.quants.dequantize(data, kind).std()
        write_factors(data, name, (signs * numbers.uniform(0.5, 1.5, blocks) * std / ones).astype(np.float16))
    return data.reshape(*shape[:-1], -1)


def write_factors(data: np.ndarray, name: str, factors: np.ndarray) -> None:
    """Puts factors, fp16 [blocks], to their places in blocks."""
    if name == "iq1_m":  # four bits in each of the last four words
        words = data[:, 48:56].view(np.uint16)
        bits = factors.view(np.uint16)[:, None] >> np.arange(0, 16, 4) & 15
        words[:] = words & 0x0FFF | (bits << 12).astype(np.uint16)
        return
    for place in _FACTORS.get(name, {"tq1_0": (52,), "tq2_0": (64,)}.get(name, (0,))):
        data[:, place : place + 2] = factors[:, None].view(np.uint8)


def lay_out_parts(parts: Sequence[Codes]) -> LinearWeight:
    """Weights of so many inputs one below another as one weight, each in the format that it has."""
    joined = [join_codes(list(group)) for _, group in groupby(parts, lambda part: part.format.name)]
    if len(joined) == 1:
        return lay_out_weight(joined[0])
    data = torch.cat([lay_out_codes(part).flatten() for part in joined])
    outputs = sum(part.outputs for part in joined)
    formats = tuple((part.format, part.outputs) for part in joined)
    return JoinedWeight(data, outputs, joined[0].inputs, parts=formats)
