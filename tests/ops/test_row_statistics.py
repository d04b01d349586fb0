"""row_statistics: every backend and instruction set against Python's floats, and the row rule bit for bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyspec.ops import row_statistics
from tests.helpers.every_backend import BACKENDS, each_backend, each_kernel, on_backend, same_bits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF, NAN, HUGE = math.inf, math.nan, 3e38
run, kernel = each_backend(row_statistics), each_kernel(row_statistics)


def oracle(row: list[float], tokens: list[int]):
    """Top tokens, their logits, log-sum-exp, entropy and probabilities of one row, in Python's floats."""
    order = sorted((i for i, x in enumerate(row) if x > -INF), key=lambda i: (-row[i], i))[:8]
    missing = [-INF] * (8 - len(order))
    top_tokens, top_logits = order + [-1] * len(missing), [row[i] for i in order] + missing
    if any(map(math.isnan, row)) or top_logits[0] in (INF, -INF):
        lse = NAN if any(map(math.isnan, row)) else top_logits[0]
        return top_tokens, top_logits, lse, NAN, [NAN] * len(tokens)
    best = top_logits[0]
    total = math.fsum(math.exp(x - best) for x in row)
    law = [math.exp(x - best) / total for x in row]
    entropy = math.fsum(-p * math.log(p) for p in law if p > 0)
    return top_tokens, top_logits, best + math.log(total), entropy, [law[token] for token in tokens]


def check(run, logits: torch.Tensor, tokens: torch.Tensor):
    found = run(logits, tokens)
    expected = [oracle(*row) for row in zip(logits.tolist(), tokens.tolist(), strict=True)]
    top_tokens, top_logits, lse, entropy, probabilities = zip(*expected, strict=True)
    assert found.top_tokens.tolist() == list(top_tokens)
    assert found.top_logits.tolist() == list(map(list, top_logits))
    assert all(out.dtype == torch.float32 for out in found[1:])
    for ours, theirs in ((found[2], lse), (found[3], entropy), (found[4], probabilities)):
        theirs = torch.tensor(theirs, dtype=torch.float64)
        torch.testing.assert_close(ours.double(), theirs, atol=3e-6, rtol=3e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 63, 64, 65, 1000, 5003])
def test_random_rows(run, vocab, dtype):
    generator = torch.Generator().manual_seed(vocab)
    scale = torch.tensor([[0.1], [1.0], [3.0], [30.0]])
    logits = (scale * torch.randn(4, vocab, generator=generator)).to(dtype)
    check(run, logits, torch.randint(0, vocab, (4, 3), generator=generator))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lowest_token(run, dtype):
    places = torch.arange(700)
    rows = [
        places * 0,
        places % 5,
        places // 3,
        -places,
        places,
        (places % 7 == 5) * 9,
        torch.where(places % 2 == 0, 0.0, -0.0),
    ]
    logits = torch.stack([row.float() for row in rows]).to(dtype)
    check(run, logits, places[None, :7].repeat(len(logits), 1))


def special_rows(vocab: int) -> torch.Tensor:
    rows = torch.full((12, vocab), -INF)
    rows[1, -3] = 1.0
    rows[2, ::80] = -torch.arange(len(rows[2, ::80]), dtype=torch.float32)
    rows[3, [3, -1]] = NAN
    rows[4], rows[4, 7] = 0.0, NAN
    rows[5, [1, -1]] = INF
    rows[6], rows[6, 9] = 1.0, INF
    rows[7, 9], rows[7, -1] = INF, NAN
    rows[8], rows[8, -1] = 1.0, NAN
    rows[9, ::3], rows[9, 1::3] = 20.0, -20.0
    rows[10] = torch.arange(vocab) / 7
    rows[11] = -200.0  # e^-200 is 0
    rows[11, -2] = 0.0
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [70, 321])
def test_special_rows(run, vocab, dtype):
    logits = special_rows(vocab).to(dtype)
    check(run, logits, torch.tensor([[0, 7, 9, vocab - 3]]).repeat(len(logits), 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_logits_do_not_overflow(run, dtype):
    rows = torch.zeros(6, 130)
    rows[0] = HUGE
    rows[1] = -HUGE
    rows[2, ::2], rows[2, 1::2] = HUGE, -HUGE
    rows[3] = torch.linspace(-HUGE, HUGE, 130)
    rows[4], rows[4, -1] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
    rows[5] = 1e4 * torch.randn(130, generator=torch.Generator().manual_seed(0))
    if dtype == torch.bfloat16:
        rows[4] = 0.0  # its extremes round to infinity
    check(run, rows.to(dtype), torch.tensor([[0, 1, 129]]).repeat(6, 1))


def test_uniform_and_certain_rows(run):
    logits = torch.zeros(2, 4096)
    logits[1, 17] = 200.0
    found = run(logits, torch.tensor([[5], [17]]))
    torch.testing.assert_close(found.entropy, torch.tensor([math.log(4096), 0.0]))
    torch.testing.assert_close(found.token_probabilities, torch.tensor([[1 / 4096], [1.0]]))


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_any_rows(data):
    value = st.one_of(st.integers(-3, 3).map(float), st.floats(width=32))
    vocab = data.draw(st.integers(1, 200))
    rows = data.draw(st.lists(st.lists(value, min_size=vocab, max_size=vocab), min_size=1, max_size=3))
    tokens = torch.zeros(len(rows), 2, dtype=torch.int64)
    tokens[:, 1] = vocab - 1
    backend = data.draw(st.sampled_from(BACKENDS))
    with on_backend(backend):
        check(row_statistics, torch.tensor(rows), tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows(run, dtype):
    memory = torch.randn(9, 403, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens = torch.arange(20).view(5, 4)
    for logits in (memory[::2, 3:300], memory[:1, 5:9].expand(5, 4), memory[:5, 7:8]):
        check(run, logits, (tokens.T.contiguous().T if len(logits[0]) > 20 else tokens * 0))


def test_no_rows_and_no_tokens(run):
    empty = run(torch.zeros(0, 5))
    assert [tuple(out.shape) for out in empty[:4]] == [(0, 8), (0, 8), (0,), (0,)]
    assert empty.token_probabilities is None and run(torch.zeros(3, 5)).token_probabilities is None
    assert run(torch.zeros(3, 5), torch.zeros(3, 0, dtype=torch.int64)).token_probabilities.shape == (3, 0)


# ==== the row rule ====


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [100, 20_011])
def test_row_rule(kernel, vocab, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(200_000 // vocab, vocab, generator=generator)).to(dtype)
    tokens = torch.randint(0, vocab, (len(logits), 3), generator=generator)
    threads, together = torch.get_num_threads(), kernel(logits, tokens)
    try:
        torch.set_num_threads(1)
        assert all(map(same_bits, kernel(logits, tokens), together))
    finally:
        torch.set_num_threads(threads)
    noise = torch.empty(5, vocab + 3, dtype=dtype).fill_(NAN)
    for row in range(0, len(logits), 3):
        noise[2, 1:-2] = logits[row]  # other neighbours, another stride, another alignment
        others = tokens[row].expand(5, 3)
        for ours, theirs in zip(kernel(noise[:, 1:-2], others), together, strict=True):
            assert same_bits(ours[2], theirs[row])


# ==== torch ====


@pytest.mark.parametrize("tokens", [None, torch.tensor([[0, 3], [4, 4]])], ids=["none", "tokens"])
def test_opcheck_and_compile(tokens):
    logits = torch.randn(2, 5)
    torch.library.opcheck(torch.ops.pyspec.row_statistics.default, (logits, tokens))
    compiled = torch.compile(row_statistics, fullgraph=True)
    for ours, theirs in zip(compiled(logits, tokens), row_statistics(logits, tokens), strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


def test_unknown_tokens_have_no_probability_where_they_are_not_looked_at(monkeypatch, run):
    tokens = torch.tensor([[-1, 0, 4, 2**40, -(2**63)]])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    probabilities = run(torch.zeros(1, 4), tokens).token_probabilities
    torch.testing.assert_close(probabilities, torch.tensor([[NAN, 0.25, NAN, NAN, NAN]]), equal_nan=True)


@pytest.mark.parametrize(
    "error, match, logits, tokens",
    [
        (TypeError, "logits must be float32.*float64", torch.zeros(2, 5).double(), None),
        (ValueError, r"logits must be \[R, V\].*\(5,\)", torch.zeros(5), None),
        (ValueError, r"logits must be \[R, V\].*\(2, 0\)", torch.zeros(2, 0), None),
        (ValueError, r"logits must have a contiguous last dimension.*\(1, 2\)", torch.zeros(5, 2).T, None),
        (TypeError, "tokens must be int64.*int32", torch.zeros(2, 5), torch.zeros(2, 1, dtype=torch.int32)),
        (ValueError, r"tokens must be \[2, M\].*\(2,\)", torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)),
        (ValueError, r"tokens must be \[2, M\].*\(3, 1\)", torch.zeros(2, 5), torch.zeros(3, 1, dtype=torch.int64)),
        (ValueError, "tokens must be on cpu.*meta", torch.zeros(2, 5), torch.zeros(2, 1, dtype=torch.int64).to("meta")),
        (ValueError, r"tokens must be in \[0, 5\), got 0 to 5", torch.zeros(1, 5), torch.tensor([[0, 5]])),
        (ValueError, r"tokens must be in \[0, 5\), got -1 to 4", torch.zeros(1, 5), torch.tensor([[4, -1]])),
    ],
)
def test_bad_input_names_the_argument(error, match, logits, tokens):
    with pytest.raises(error, match=f"^{match}"):
        row_statistics(logits, tokens)
