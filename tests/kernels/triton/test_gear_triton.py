"""The Triton kernels of gear_attention: against the reference, and the row rule bit for bit."""

import pytest
import torch

from tests.helpers.on_gpu import assert_close, to_device
from tests.helpers.slow import slow

pytest.importorskip("triton", reason="Triton is not installed for this platform")
import pyspec  # noqa: E402
from pyspec.kernels.gear import gear  # noqa: E402
from pyspec.ops.gear import gear_reference  # noqa: E402
from pyspec.ops.gear_encode import encode_records  # noqa: E402
from pyspec.ops.gear_format import BLOCK, GearFormat  # noqa: E402

pytestmark = pytest.mark.usefixtures("kernel_device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
FORMATS = {
    "int8": (GearFormat(8, 128), 64),
    "int4, odd head": (GearFormat(4, 128), 80),
    "int4, groups of a token": (GearFormat(4, 32, rank=1), 96),
    "3 bits": (GearFormat(3, 32, outliers=4), 64),
    "kivi": (GearFormat(2, 64), 128),
    "gear": (GearFormat(2, 64, rank=4, outliers=2), 64),
    "channels": (GearFormat(4, 64, rank=1, outliers=2, key_channels=48), 64),
}


def make_case(format, head_dim, seen, heads=2, kv_heads=1, blocks=6, dtype=torch.float32, seed=0):
    """Queries, records of keys with outlier channels, and how many blocks each of the nodes sees."""
    generator = torch.Generator().manual_seed(seed)
    batch, nodes = len(seen), len(seen[0])
    k, v = torch.randn(2, batch, kv_heads, blocks * BLOCK, head_dim, generator=generator).unbind(0)
    k = k * torch.randn(head_dim, generator=generator).exp() + torch.randn(head_dim, generator=generator)
    channels = None
    if format.key_channels:
        order = torch.rand(batch, kv_heads, blocks, head_dim, generator=generator).argsort(-1)
        channels = order[..., : format.key_channels].sort(-1).values.to(torch.uint8)
    with pyspec.backend("reference"):
        quantised = encode_records(k, v, format, channels)
    q = torch.randn(batch, heads, nodes, head_dim, generator=generator).to(dtype)
    return q, quantised, torch.tensor(seen, dtype=torch.int32), *format.layout, head_dim**-0.5


def run(q, quantised, seen, *rest):
    *rest, oldest = rest if len(rest) > 6 else (*rest, None)
    tensors = (to_device(tensor, DEVICE) for tensor in (q, quantised, seen))
    rest.append(None if oldest is None else to_device(oldest, DEVICE))
    return [out.cpu() for out in gear(*tensors, *rest)]


@pytest.mark.parametrize("name", [slow(name) if name == "int4, groups of a token" else name for name in FORMATS])
def test_it_is_the_reference(name):
    format, head_dim = FORMATS[name]
    heads, kv_heads = (4, 2) if name == "kivi" else (2, 1)
    case = make_case(format, head_dim, [[5, 0, 4], [1, 6, 2]], heads, kv_heads)
    for found, expected in zip(run(*case), gear_reference(*case), strict=True):
        assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_16_bits(dtype):
    case = make_case(*FORMATS["gear"], [[5, 2, 4]], dtype=dtype)
    out, lse = run(*case)
    expected = gear_reference(*case)
    assert out.dtype == dtype
    assert_close(out.float(), expected[0].float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert_close(lse, expected[1], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_rows_have_the_bits_that_they_have_alone():
    """In any number and company, of nodes that see more or fewer records."""
    seen = [[5, 0, 4, 6, 6, 1, 2]]
    q, quantised, counts, *rest = make_case(*FORMATS["gear"], seen, heads=3, kv_heads=1)
    out, lse = run(q, quantised, counts, *rest)
    for nodes in ([0], [1], [3], [6, 2, 4]):
        few, few_lse = run(q[:, :, nodes], quantised, counts[:, nodes], *rest)
        assert torch.equal(few, out[:, :, nodes]) and torch.equal(few_lse, lse[:, :, nodes])


def test_what_no_row_sees_may_hold_anything():
    q, quantised, counts, *rest = make_case(*FORMATS["gear"], [[2, 3]])
    expected = run(q, quantised, counts, *rest)
    quantised[:, :, 3:] = 255  # NaN scales
    wide = torch.full((1, 1, 9, quantised.shape[3]), 255, dtype=torch.uint8)
    wide[:, :, 1:7] = quantised
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    for found, right in zip(run(turned, wide[:, :, 1:7], counts, *rest), expected, strict=True):
        assert torch.equal(found, right)
    out, lse = run(q, quantised, counts * 0, *rest)
    assert (out == 0).all() and (lse == -torch.inf).all()
    out, lse = run(q, quantised[:, :, :0], counts * 0, *rest)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("name", ["gear", slow("channels")])
def test_a_window_has_the_bits_that_it_has_alone(name):
    """Of rows that begin before the first token, within a record, at its end, behind all, and see no record at all."""
    q, quantised, seen, *rest = make_case(*FORMATS[name], [[5, 4, 6, 6, 0, 2]])
    oldest = torch.tensor([[0, 300, 129, 767, 5, 10**7]], dtype=torch.int32)
    found = run(q, quantised, seen, *rest, oldest)
    for ours, expected in zip(found, gear_reference(q, quantised, seen, *rest, oldest), strict=True):
        assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    for node in (1, 2, 3, 5):
        broken = quantised.clone()
        broken[:, :, : oldest[0, node] // BLOCK] = 255  # nothing before a row's own records counts
        alone = run(q[:, :, node, None], broken, seen[:, node, None], *rest, oldest[:, node, None])
        assert all(torch.equal(part[:, :, 0], all_[:, :, node]) for part, all_ in zip(alone, found, strict=True))


@pytest.mark.slow
def test_windows_behind_the_short_chunks():
    q, quantised, seen, *rest = make_case(GearFormat(4, 128), 64, [[40, 37, 36, 40, 33]], blocks=40)
    oldest = torch.tensor([[34 * 128 + 5, 31 * 128, 36 * 128 - 1, -70000, 33 * 128 + 5]], dtype=torch.int32)
    for nodes in (slice(0, 5), slice(4, 5)):  # the last sees nothing, and nobody reads its chunk for it
        case = (q[:, :, nodes], quantised, seen[:, nodes], *rest, oldest[:, nodes])
        for found, expected in zip(run(*case), gear_reference(*case), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_chunks_of_several_records():
    """After the first 32 records."""
    case = make_case(GearFormat(4, 128), 64, [[32, 33, 38]], blocks=38)
    for found, expected in zip(run(*case), gear_reference(*case), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["int8", "gear"])
def test_the_largest_keys_and_values_in_16_bits(name):
    """Outliers, and what else is quantised, up to the end of fp16; beside them vectors of next to no range."""
    format, head_dim = FORMATS[name]
    k, v = torch.randn(2, 1, 1, BLOCK, head_dim, generator=torch.Generator().manual_seed(0)).unbind(0)
    k[..., 5, :], k[..., 6, :], v[..., 3], v[..., 4] = 65504.0, -65504.0, 65504.0, -65504.0
    k[..., 7], v[..., 7, 8:], v[..., 9, :] = 0.0, 0.0, 1e-3
    k[..., 50, 7] = 100.0
    with pyspec.backend("reference"):
        quantised = encode_records(k, v, format)
    q = torch.randn(1, 2, 3, head_dim, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16) * 2**-12
    case = q, quantised, torch.ones(1, 3, dtype=torch.int32), *format.layout, head_dim**-0.5
    out, lse = run(*case)
    expected = gear_reference(*case)
    torch.testing.assert_close(out.float(), expected[0].float(), atol=1e-2, rtol=2e-2)
    torch.testing.assert_close(lse, expected[1], atol=2e-2, rtol=2e-2)
