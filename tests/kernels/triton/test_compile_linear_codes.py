"""The Triton kernel of linear for 4-bit weights compiled ahead of time, as a GPU would ask for it."""

import os
import re

import pytest
import torch

from tests.helpers.slow import slow

triton = pytest.importorskip("triton", reason="Triton is not installed for this platform")
from machine_code import functions  # noqa: E402
from without_gpu import launches  # noqa: E402

from pyspec.kernels import linear_codes as kernels  # noqa: E402
from pyspec.ops import lay_out_weight, linear_codes, linear_codes_tiles  # noqa: E402
from pyspec.ops.weight_formats import FORMATS, quantise  # noqa: E402
from tests.helpers.weight_formats import random_codes  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


ROWS = [1, 8, 9, 16, 32, 33, 64, 200]
IS_3_6 = triton.__version__ < "3.9"  # whose products of 8 rows are a warp's on Hopper too


def compiled(name, rows, dtype=torch.bfloat16, architecture=90, outputs=6144):
    """The machine code of the kernel that a launch gets."""
    format = FORMATS[name]
    with launches(architecture) as found:
        tiles = 4096 // linear_codes_tiles.tile_inputs(format)
        weight = torch.empty(outputs // 128, tiles, linear_codes_tiles.tile_bytes(format), dtype=torch.uint8)
        kernels.linear_codes(torch.empty(rows, 4096, dtype=dtype), weight, None, outputs, format, torch.float32)
    return functions(found[0].cubin)["codes_kernel"]


@pytest.mark.parametrize("architecture", [slow(80), 90, slow(100)])
@pytest.mark.parametrize(
    "name",
    [
        "q4_0",
        "q4_k",
        "q6_k",
        *map(slow, ("q5_0", "q5_k", "q3_k", "q2_k", "q4_1", "iq4_nl", "iq4_xs", "mxfp4", "int4_32", "int4_128")),
    ],
)
def test_all_rows_are_summed_by_one_kind_of_product(name, architecture):
    """The row rule on a GPU, where tiles of rows may differ: in each, a group is steps of 16 inputs from zero.

    That Hopper's two kinds of product give the same bits, which Triton 3.6 needs there, was seen on an H200.
    """
    for rows in ROWS:
        height = kernels.tile_rows(rows, torch.bfloat16, architecture)
        code = compiled(name, rows, architecture=architecture)
        loop = "\n".join(code.lines.values())
        products = set(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\S*", loop))
        if architecture == 80:
            assert products == {"HMMA.16816.F32.BF16"}
        elif architecture == 90:
            (shape,) = {product.split(".F32")[0] for product in products}
            assert shape == ("HMMA.16816" if IS_3_6 and height == 8 else f"HGMMA.64x{height}x16")
        else:
            assert height == 32 and products == {"UTCHMMA"}
        adds = re.search(r"\bFADD\S* \w+, (?!-?RZ)", loop)  # what begins at zero turns a sign
        assert not adds or FORMATS[name].has_scales  # products are added by multiply-adds, scales shifted
        most = 600 if IS_3_6 and architecture == 80 and height == 64 else 150
        most = max(most, 280) if name == "q5_k" and architecture == 80 else most  # Triton 3.9 spills a little there
        assert code.stack <= most
        if FORMATS[name].group >= 32:  # tiles of half the width are loaded at once, past shared memory
            assert code.count(r"\bLDGSTS\S*128") >= 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_activations_compile(dtype):
    for rows in (1, 64):
        assert compiled("q4_k", rows, dtype).stack <= 150


def test_what_is_on_a_gpu_gets_tiles():
    """And the op's launcher knows a format by its place."""
    weight, index = torch.randn(300, 200), torch.tensor([3, 299, 0])
    values, six_bits = quantise(weight, FORMATS["int4_32"]).values(), random_codes("q6_k", 300, 256)
    with launches() as found:
        laid_out = lay_out_weight(weight, "int4")
        assert laid_out.data.shape == (3, 2, linear_codes_tiles.tile_bytes(laid_out.format))
        assert torch.equal(laid_out.rows(index), values[index])
        x = torch.empty(3, 200, dtype=torch.bfloat16)
        place = list(FORMATS).index("int4_32")
        out = linear_codes._triton()(x, laid_out.data, None, 300, place, torch.float32)
        assert out.shape == (3, 300) and found[0].name == "codes_kernel"
        laid_out = lay_out_weight(six_bits)
        assert laid_out.dtype == "q6_k" and torch.equal(laid_out.rows(index), six_bits.values()[index])
