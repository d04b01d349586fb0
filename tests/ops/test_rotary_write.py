"""rotary_write against complex rotation in float64, and that only the named slots are written."""

import pytest
import torch

from pyspec.ops import rotary_write
from tests.helpers.every_backend import KERNELS, each_backend, each_kernel

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
HEADS, KV_HEADS, POSITIONS = 4, 2, 50
run, kernel = each_backend(rotary_write), each_kernel(rotary_write)


def angles(head_dim):
    return torch.outer(torch.arange(POSITIONS), 100.0 ** -(torch.arange(head_dim // 2) * 2 / head_dim))


def arguments(rows=5, head_dim=64, dtype=torch.float32, width=None):
    torch.manual_seed(head_dim)
    turned = angles(width or head_dim)
    cache = torch.full((2, 3, KV_HEADS, 20, head_dim), 7.0, dtype=dtype)
    return {
        "qkv": torch.randn(rows, (HEADS + 2 * KV_HEADS) * head_dim),
        "cos_sin": torch.stack((turned.cos(), turned.sin()), 1).float(),
        "positions": torch.randint(0, POSITIONS, (rows,), dtype=torch.int32),
        "sequences": torch.arange(rows, dtype=torch.int32) % 3,
        "slots": torch.arange(rows, dtype=torch.int32) * 2,
        "keys": cache[0],
        "values": cache[1],
        "heads": HEADS,
        "norm": None,
        "epsilon": 0.0,
        "query_scales": None,
        "norm_values": False,
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 512])
def test_equals_a_complex_rotation(run, head_dim, dtype):
    given = arguments(head_dim=head_dim, dtype=dtype)
    q = run(**given)
    heads = given["qkv"].double().unflatten(1, (-1, head_dim))
    turn = torch.polar(torch.ones(1), angles(head_dim).float())[given["positions"].long(), None].to(torch.complex128)
    spun = torch.complex(*heads[:, : HEADS + KV_HEADS].chunk(2, -1)) * turn
    expected = torch.cat((spun.real, spun.imag), -1)
    close = {"atol": 4 * TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    assert q.shape == (5, HEADS, head_dim) and q.dtype == dtype
    torch.testing.assert_close(q.double(), expected[:, :HEADS], **close)
    places = given["sequences"].long(), slice(None), given["slots"].long()
    torch.testing.assert_close(given["keys"][places].double(), expected[:, HEADS:], **close)
    torch.testing.assert_close(given["values"][places].double(), heads[:, HEADS + KV_HEADS :], **close)
    for cache in (given["keys"], given["values"]):  # nothing else was written
        cache[places] = 7.0
        assert (cache == 7.0).all()


@pytest.mark.parametrize("width", [2, 48, 64])
def test_the_other_dimensions_stay(run, width):
    given = arguments(width=width)
    q = run(**given)
    heads = given["qkv"].unflatten(1, (-1, 64)).clone()
    turned = heads[:, : HEADS + KV_HEADS, :width]
    half = arguments(head_dim=64, width=width)["cos_sin"][given["positions"].long(), :, None]
    x, y = turned.chunk(2, -1)
    turned.copy_(torch.cat((x * half[:, 0] - y * half[:, 1], y * half[:, 0] + x * half[:, 1]), -1))
    torch.testing.assert_close(q, heads[:, :HEADS])
    places = given["sequences"].long(), slice(None), given["slots"].long()
    torch.testing.assert_close(given["keys"][places], heads[:, HEADS : HEADS + KV_HEADS])


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("head_dim, width", [(64, 64), (80, 32), (256, 256)])
def test_queries_and_keys_are_normed_before(run, head_dim, width, is_whole):
    """By every head, or by all query heads and all key heads of a row."""
    plain = arguments(head_dim=head_dim, width=width)
    norm = torch.randn(HEADS + KV_HEADS if is_whole else 2, head_dim) + 1
    normed = plain | {name: plain[name].clone() for name in ("qkv", "keys", "values")} | {"norm": norm, "epsilon": 0.1}
    heads = plain["qkv"].unflatten(1, (-1, head_dim))  # a view
    for first, count, weight in ((0, HEADS, norm[: HEADS if is_whole else 1]),
                                 (HEADS, KV_HEADS, norm[HEADS if is_whole else 1 :])):  # fmt: skip
        part = heads[:, first : first + count]
        scale = (part.square().mean((1, 2) if is_whole else 2, keepdim=True) + 0.1).rsqrt()
        part.copy_(part * scale * weight)
    torch.testing.assert_close(run(**normed), run(**plain), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(normed["keys"], plain["keys"], atol=1e-5, rtol=1e-5)
    assert torch.equal(normed["values"], plain["values"])


@pytest.mark.parametrize("width", [48, 64])
def test_queries_may_be_scaled_by_their_position(run, width):
    given = arguments(width=width)
    expected, keys = run(**given), given["keys"].clone()
    scales = torch.rand(POSITIONS) + 0.5
    found = run(**given | {"query_scales": scales})
    torch.testing.assert_close(found, expected * scales[given["positions"].long(), None, None])
    assert torch.equal(given["keys"], keys)


@pytest.mark.parametrize("head_dim", [64, 80, 512])
def test_values_may_be_normed(run, head_dim):
    given = arguments(head_dim=head_dim) | {"epsilon": 0.1}
    expected, keys = run(**given), given["keys"].clone()
    assert torch.equal(run(**given | {"norm_values": True}), expected) and torch.equal(given["keys"], keys)
    values = given["qkv"].double().unflatten(1, (-1, head_dim))[:, HEADS + KV_HEADS :]
    values = values / (values.square().mean(2, keepdim=True) + 0.1).sqrt()
    found = given["values"][given["sequences"].long(), :, given["slots"].long()]
    torch.testing.assert_close(found.double(), values, atol=2e-6, rtol=2e-6)


def test_queries_alone_are_those_beside_keys(run):
    given = arguments() | {"norm": torch.randn(2, 64), "epsilon": 0.1}
    expected = run(**given)
    alone = {"qkv": given["qkv"][:, : HEADS * 64], "keys": given["keys"][:, :0], "values": given["values"][:, :0]}
    assert torch.equal(run(**given | alone | {"norm_values": True}), expected)


@pytest.mark.parametrize("norm", [None, torch.randn(2, 64), torch.randn(6, 64)], ids=["plain", "head", "row"])
def test_a_row_has_the_bits_it_has_alone(kernel, norm):
    given = arguments(rows=9) | {"norm": norm, "epsilon": 1e-6, "query_scales": torch.rand(POSITIONS)}
    given["norm_values"] = True
    q, keys = kernel(**given), given["keys"].clone()
    for row in range(9):
        one = given | {name: given[name][row : row + 1] for name in ("qkv", "positions", "sequences", "slots")}
        assert torch.equal(kernel(**one)[0], q[row])
    assert torch.equal(given["keys"], keys)


def test_opcheck():
    torch.library.opcheck(torch.ops.pyspec.rotary_write.default, tuple(arguments().values()))


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"qkv": torch.zeros(5, 8)}, ValueError, "qkv must have shape"),
        ({"positions": torch.zeros(5, dtype=torch.int64)}, TypeError, "positions must be int32"),
        ({"slots": torch.zeros(4, dtype=torch.int32)}, ValueError, r"slots must have shape \(5,\)"),
        ({"values": torch.zeros(3, KV_HEADS, 19, 64)}, ValueError, "values must be"),
        ({"values": torch.zeros(3, KV_HEADS, 20, 64).half()}, TypeError, "values must be .* like keys"),
        ({"cos_sin": torch.zeros(50, 2, 33)}, ValueError, "cos_sin must have angles for at most 64 dimensions"),
        ({"cos_sin": torch.zeros(50, 3, 32)}, ValueError, "cos_sin must have shape"),
        ({"query_scales": torch.zeros(49)}, ValueError, r"query_scales must have shape \(50,\)"),
        ({"query_scales": torch.zeros(100)[::2]}, ValueError, "query_scales must be contiguous"),
        ({"norm": torch.zeros(3, 64)}, ValueError, r"norm must have shape \(2, 64\) or \(6, 64\), got \(3, 64\)"),
    ],
)
def test_bad_input_is_named(changed, error, message):
    with pytest.raises(error, match=message):
        rotary_write(**arguments() | changed)


@pytest.mark.skipif(not KERNELS, reason="the reference leaves places to torch's own indexing")
@pytest.mark.parametrize("name, value", [("positions", POSITIONS), ("sequences", 3), ("slots", 20), ("slots", -1)])
def test_places_outside_are_refused_before_anything_is_written(name, value):
    given = arguments()
    given[name][4] = value
    with pytest.raises(RuntimeError, match=rf"{name}\[4\] is {value}"):
        rotary_write(**given)
    assert (given["keys"] == 7.0).all()
