"""The Triton kernel of row_statistics against the plain-PyTorch reference, and the row rule bit for bit."""

import pytest
import torch

from tests.helpers.on_gpu import assert_close, to_device

pytest.importorskip("triton", reason="Triton is not installed for this platform")
from pyspec.kernels.row_statistics import row_statistics  # noqa: E402
from pyspec.ops.row_statistics import row_statistics_reference  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("kernel_device"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's numpy on infinities
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN, HUGE = torch.inf, torch.nan, 3e38


def run(logits, tokens=None):
    tokens = None if tokens is None else tokens.to(DEVICE)
    return [out.cpu() for out in row_statistics(to_device(logits, DEVICE), tokens)]


def check(logits, tokens=None):
    found, expected = run(logits, tokens), row_statistics_reference(logits, tokens)
    assert [out.dtype for out in found] == [out.dtype for out in expected]
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    for ours, theirs in zip(found[2:], expected[2:], strict=True):
        assert_close(ours, theirs, atol=4e-6, rtol=4e-6, equal_nan=True)


@pytest.mark.parametrize(
    "vocab, dtype",
    [*((vocab, torch.float32) for vocab in (1, 7, 8, 2048, 5001)), (5001, torch.float16), (5001, torch.bfloat16)],
    ids=str,
)
def test_matches_the_reference(vocab, dtype):
    generator = torch.Generator().manual_seed(vocab)
    logits = (5 * torch.randn(3, vocab, generator=generator)).to(dtype)
    check(logits, torch.randint(0, vocab, (3, 17), generator=generator))


def test_ties_and_order():
    places = torch.arange(4700)
    rows = [torch.zeros(4700), places // 3, -places, places % 5]
    rows += [places % 512 == 511, places * (places % 512 == 100)]  # one in each of 9 and 10 groups
    rows += [(places == 480) | ((places > 0) & (places < 9)), places % 32 == 31]  # in a lane that others are before
    rows += [torch.where(places % 2 == 0, -0.0, 0.0), -(places % 32) * (places < 2000)]
    check(torch.stack(rows).float())


def test_rows_that_are_no_law_or_nearly_none():
    rows = torch.full((12, 2500), -INF)
    rows[1, 2400] = 1.0
    rows[2, ::500] = torch.arange(5.0)
    rows[3, [3, 2100]] = NAN
    rows[4] = 0.0
    rows[4, 7] = NAN
    rows[5, [1, 2300]] = INF
    rows[6] = 1.0
    rows[6, 9] = INF
    rows[7, 9], rows[7, 2300] = INF, NAN
    rows[8] = HUGE
    rows[9] = torch.where(torch.arange(2500) % 2 == 0, HUGE, -HUGE)
    rows[10] = -HUGE
    rows[11], rows[11, 2200] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
    check(rows, torch.tensor([[0, 9, 2400]]).repeat(12, 1))


def test_unknown_tokens_have_no_probability():
    *_, probabilities = run(torch.zeros(1, 4), torch.tensor([[-1, 0, 4, 2**40]]))
    assert_close(probabilities, torch.tensor([[NAN, 0.25, NAN, NAN]]), atol=1e-6, equal_nan=True)


def test_row_rule_and_strides():
    memory = torch.randn(4, 2501, generator=torch.Generator().manual_seed(0))
    logits, tokens = memory[:, 1:2400], torch.arange(12).view(4, 3)
    expected = run(logits, tokens)
    for row in range(4):
        alone = run(logits[row : row + 1].clone(), tokens[row : row + 1])
        assert all(torch.equal(ours[0], theirs[row]) for ours, theirs in zip(alone, expected, strict=True))


def test_no_rows():
    assert [tuple(out.shape) for out in run(torch.zeros(0, 5))] == [(0, 8), (0, 8), (0,), (0,), (0, 0)]
