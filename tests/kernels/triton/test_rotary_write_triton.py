"""The Triton kernel of rotary_write against the plain-PyTorch reference, and that only the named slots are written."""

import pytest
import torch

from tests.helpers.on_gpu import assert_close

pytest.importorskip("triton", reason="Triton is not installed for this platform")
from pyspec.kernels.rotary_write import rotary_write  # noqa: E402
from pyspec.ops.rotary_write import rotary_write_reference  # noqa: E402

pytestmark = pytest.mark.usefixtures("kernel_device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One unit in the last place, of numbers below 4; the interpreter rounds bf16 to zero.
TOLERANCE = {torch.float32: 5e-7, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def arguments(rows, head_dim, heads, kv_heads, dtype, width=None, norm_rows=0):
    generator = torch.Generator().manual_seed(head_dim)
    angles = torch.outer(torch.arange(50.0), 100.0 ** -torch.linspace(0, 1, (width or head_dim) // 2))
    cache = torch.full((2, 2, 3, kv_heads, 20, head_dim), 7.0, dtype=dtype)[1]  # of the second of two layers
    return {
        "qkv": torch.rand(rows, (heads + 2 * kv_heads) * head_dim, generator=generator) * 2 - 1,
        "cos_sin": torch.stack((angles.cos(), angles.sin()), 1),
        "positions": torch.randint(0, 50, (rows,), dtype=torch.int32, generator=generator),
        "sequences": torch.arange(rows, dtype=torch.int32) % 3,
        "slots": torch.arange(rows, dtype=torch.int32) * 2,
        "keys": cache[0],
        "values": cache[1],
        "query_scales": torch.rand(50, generator=generator) + 0.5 if norm_rows else None,
        "norm": torch.rand(norm_rows, head_dim, generator=generator) if norm_rows else None,
        "norm_values": norm_rows == 2,
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "rows, head_dim, heads, kv_heads", [(5, 64, 4, 2), (3, 80, 3, 1), (1, 512, 2, 2), (2, 64, 2, 0), (0, 64, 4, 2)]
)
@pytest.mark.parametrize("width, norm_rows", [(None, 0), (48, 0), (None, 2), (32, 6)])
def test_matches_the_reference(rows, head_dim, heads, kv_heads, width, norm_rows, dtype):
    if norm_rows == 6:
        norm_rows = heads + kv_heads
    expected = arguments(rows, head_dim, heads, kv_heads, dtype, width, norm_rows)
    found = {
        name: tensor.to(DEVICE, copy=True) if isinstance(tensor, torch.Tensor) else tensor
        for name, tensor in expected.items()
    }
    options = {"heads": heads, "epsilon": 0.01}
    q = rotary_write(**found, **options)
    assert q.dtype == dtype and q.is_contiguous()
    results = {"q": (q, rotary_write_reference(**expected, **options))}
    results |= {name: (found[name], expected[name]) for name in ("keys", "values")}
    for ours, theirs in results.values():
        assert_close(ours.cpu().float(), theirs.float(), atol=TOLERANCE[dtype], rtol=0)
    untouched = expected["keys"] == 7.0
    assert (found["keys"].cpu()[untouched] == 7.0).all() and (found["values"].cpu()[untouched] == 7.0).all()


@pytest.mark.parametrize("norm_rows", [0, 2, 6])
def test_a_row_has_the_bits_it_has_alone(norm_rows):
    given = arguments(9, 64, 4, 2, torch.float32, norm_rows=norm_rows)
    given = {name: tensor.to(DEVICE) if isinstance(tensor, torch.Tensor) else tensor for name, tensor in given.items()}
    options = {"heads": 4, "epsilon": 0.01}
    q, keys = rotary_write(**given, **options), given["keys"].clone()
    for row in range(9):
        one = given | {name: given[name][row : row + 1] for name in ("qkv", "positions", "sequences", "slots")}
        assert torch.equal(rotary_write(**one, **options)[0], q[row])
    assert torch.equal(given["keys"], keys)
