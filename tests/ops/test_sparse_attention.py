"""sparse_attention: against the method written out head by head in float64, and against attention where it is exact."""

import math

import pytest
import torch
import torch.nn.functional as F

from pyspec.ops import sparse_attention

INF = math.inf


def inputs(batch=2, heads=6, kv_heads=2, slots=300, head_dim=32, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, head_dim, generator=generator) * torch.rand(head_dim, generator=generator) * 3
    k, v = (torch.randn(batch, kv_heads, slots, head_dim, generator=generator) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def oracle(q, k, v, length, components, positions, window, scale=None, value_mean=None):
    """One sequence: q [Hq, D], k, v [Hkv, S, D], with an exact top-k."""
    q, k, v = q.double(), k[:, :length].double(), v[:, :length].double()
    group, out = len(q) // len(k), []
    scale = q.shape[1] ** -0.5 if scale is None else scale
    for head in range(len(k)):
        queries, keys, values = q[head * group : (head + 1) * group], k[head], v[head]
        largest = sorted(range(q.shape[1]), key=lambda d: -queries[:, d].abs().sum().item())[:components]
        guessed = []
        for query in queries:
            share = query[largest].abs().sum() / query.abs().sum()
            guessed.append((keys[:, largest] @ query[largest] * scale / share.sqrt()).softmax(0))
        total = torch.stack(guessed).sum(0)
        local = list(range(max(length - window, 0), length))
        others = sorted(range(max(length - window, 0)), key=lambda i: -total[i].item())[:positions]
        chosen = others + local
        mean = values.mean(0) if value_mean is None else value_mean[head].double()
        for query, scores in zip(queries, guessed, strict=True):
            covered = scores[chosen].sum()
            mixed = (keys[chosen] @ query * scale).softmax(0) @ values[chosen]
            out.append(covered * mixed + (1 - covered) * mean)
    return torch.stack(out)


@pytest.mark.parametrize(
    "components, positions, window", [(32, 40, 8), (8, 40, 16), (3, 1, 1), (16, 500, 4), (8, 9, 500)]
)
@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (4, 4), (5, 1)])
def test_the_method(heads, kv_heads, components, positions, window):
    q, k, v = inputs(heads=heads, kv_heads=kv_heads)
    settings = dict(components=components, positions=positions, window=window)
    for lengths in (None, torch.tensor([300, 211]), torch.tensor([1, 17], dtype=torch.int32)):
        found = sparse_attention(q, k, v, lengths, per_bucket=None, **settings)
        for sequence in range(2):
            length = 300 if lengths is None else int(lengths[sequence])
            expected = oracle(q[sequence], k[sequence], v[sequence], length, **settings)
            torch.testing.assert_close(found[sequence].double(), expected, atol=2e-5, rtol=2e-5)
    columns = k.transpose(2, 3).contiguous().transpose(2, 3)  # stored as [D, S]
    again = sparse_attention(q, columns, v, lengths, per_bucket=None, **settings)
    torch.testing.assert_close(again, found, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_it_is_attention_where_everything_is_read(dtype):
    q, k, v = inputs(dtype=dtype)
    found = sparse_attention(q, k, v, components=32, positions=290, window=10, per_bucket=None, scale=0.2)
    expected = F.scaled_dot_product_attention(
        q[:, :, None].double(), k.double(), v.double(), scale=0.2, enable_gqa=True
    )[:, :, 0]
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


def test_buckets_are_nearly_as_good_as_an_exact_choice():
    q, k, v = inputs(batch=4, slots=4000, head_dim=64)
    full = F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]
    errors = {}
    for per_bucket in (None, 2, 1):
        found = sparse_attention(q, k, v, components=32, positions=256, per_bucket=per_bucket)
        errors[per_bucket] = ((found - full).norm() / full.norm()).item()
    assert errors[None] < errors[2] < 1.2 * errors[None] and errors[2] < errors[1]


def test_slots_behind_the_length_are_not_read():
    q, k, v = inputs()
    lengths = torch.tensor([250, 40])
    expected = sparse_attention(q, k, v, lengths, positions=60)
    for sequence, length in enumerate(lengths.tolist()):
        k[sequence, :, length:], v[sequence, :, length:] = math.nan, INF
    torch.testing.assert_close(sparse_attention(q, k, v, lengths, positions=60), expected, atol=0, rtol=0)


def test_strides_do_not_matter():
    q, k, v = inputs()
    expected = sparse_attention(q, k, v)
    columns = k.transpose(2, 3).contiguous().transpose(2, 3)  # stored as [D, S]
    torch.testing.assert_close(sparse_attention(q, columns, v), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(sparse_attention(q, k, v.transpose(1, 2).contiguous().transpose(1, 2)), expected)


def test_a_mean_that_is_known_is_used():
    q, k, v = inputs()
    settings = dict(components=4, positions=5, window=3, per_bucket=None)
    mean = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(1))
    found = sparse_attention(q, k, v, value_mean=mean, **settings)
    for sequence in range(2):
        expected = oracle(q[sequence], k[sequence], v[sequence], 300, 4, 5, 3, value_mean=mean[sequence])
        torch.testing.assert_close(found[sequence].double(), expected, atol=2e-5, rtol=2e-5)


def test_edges():
    q, k, v = inputs(batch=1, slots=1)
    torch.testing.assert_close(sparse_attention(q, k, v), v[:, :, 0].repeat_interleave(3, 1), atol=1e-6, rtol=1e-6)
    q, k, v = inputs()
    assert sparse_attention(q[:0], k[:0], v[:0]).shape == (0, 6, 32)
    assert sparse_attention(q * 0, k, v).isfinite().all()  # no entry of the query is larger than another


def test_compile():
    q, k, v = inputs()
    lengths = torch.tensor([300, 211])
    compiled = torch.compile(lambda *args: sparse_attention(*args, positions=60), fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, lengths), sparse_attention(q, k, v, lengths, positions=60))


Q, K = torch.zeros(2, 4, 8), torch.zeros(2, 2, 9, 8)


@pytest.mark.parametrize(
    "error, match, changed",
    [
        (TypeError, "q must be float32.*float64", {"q": Q.double()}),
        (ValueError, r"q must be \[B, Hq, D\].*\(2, 4\)", {"q": Q[..., 0]}),
        (ValueError, r"k must be \[2, Hkv, S, 8\].*\(2, 2, 9, 7\)", {"k": K[..., :7]}),
        (ValueError, r"k must be \[2, Hkv, S, 8\].*\(2, 2, 0, 8\)", {"k": K[:, :, :0]}),
        (ValueError, "q must have a multiple of k's 2 heads, got 3", {"q": Q[:, :3]}),
        (ValueError, r"v must have k's shape \(2, 2, 9, 8\), got \(2, 2, 8, 8\)", {"v": K[:, :, 1:]}),
        (TypeError, "v must be torch.float32 like q, got torch.float16", {"v": K.half()}),
        (ValueError, "k must be on cpu like q, got meta", {"k": K.to("meta")}),
        (TypeError, "lengths must be int32 or int64, got torch.float32", {"lengths": torch.ones(2)}),
        (ValueError, r"lengths must be \[2\], got shape \(3,\)", {"lengths": torch.ones(3, dtype=torch.int32)}),
        (ValueError, r"lengths must be in \[1, 9\], got 0 to 9", {"lengths": torch.tensor([0, 9])}),
        (ValueError, r"lengths must be in \[1, 9\], got 3 to 10", {"lengths": torch.tensor([3, 10])}),
        (ValueError, r"value_mean must be \[2, 2, 8\]", {"value_mean": torch.zeros(2, 2, 7)}),
        (ValueError, r"components must be in \[1, 8\], got 9", {"components": 9}),
        (ValueError, "positions must be in .*got 0", {"positions": 0}),
        (ValueError, "window must be in .*got 0", {"window": 0}),
        (TypeError, "window must be an int, got 1.0", {"window": 1.0}),
        (ValueError, r"per_bucket must be in \[1, 4\], got 5", {"per_bucket": 5, "window": 1}),
    ],
)
def test_bad_input_names_the_argument(error, match, changed):
    with pytest.raises(error, match=f"^{match}"):
        sparse_attention(**{"q": Q, "k": K, "v": K, "components": 4} | changed)
