"""What the host reads of a verified tree, whether it was sent with a round's or is asked for."""

import pytest
import torch

from pyspec.runners.verified import SentStatistics, Verified, pack_statistics
from pyspec.sampling.sampler import InvalidLogits, Sampler, _best

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def rows():
    """[9, 50]: a tie, rows that are nearly no law, and three that are none."""
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    logits[1, [7, 30]] = 5.0
    logits[2] = -torch.inf
    logits[2, 9] = 1.0
    logits[3, 4], logits[3, 6] = torch.inf, torch.nan
    logits[4, 8] = torch.inf
    logits[5] = -torch.inf
    logits[6] = 3e38
    return logits


@pytest.mark.parametrize("places", [(slice(0, 4), slice(4, 7), slice(7, 9)), (slice(0, 4), slice(5, 7))], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_what_was_sent_is_what_is_read(device, places):
    logits = rows().to(device)
    joined = pack_statistics(logits)
    sent = SentStatistics(joined)
    joined.zero_()  # a replay overwrites them
    for place in places:
        verified = Verified(logits[place], sent, place)
        verified.wait()
        for ours, theirs in zip(verified.statistics, Verified(logits[place].cpu()).statistics, strict=True):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.flags.c_contiguous
            torch.testing.assert_close(ours, theirs, equal_nan=True)
        assert verified.top_tokens()[0] is verified.statistics.top_tokens


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [3, 8, 50])
@pytest.mark.parametrize("device", DEVICES)
def test_top_tokens_are_those_of_the_statistics(device, vocab, dtype):
    logits = rows()[:, :vocab].to(device, dtype)
    for some in (logits, logits[[0, 1, 2, 5]], logits.T.contiguous().T):  # with a row that has NaN, and without
        verified = Verified(some)
        top_tokens, statistics = verified.top_tokens(), verified.statistics
        for ours, theirs in zip(top_tokens, statistics[:2], strict=True):
            assert ours.dtype == theirs.dtype and ours.flags.c_contiguous and (ours == theirs).all()


def test_statistics_are_computed_once():
    verified = Verified(rows())
    assert verified.statistics is verified.statistics


def test_statistics_name_the_token_that_argmax_names():
    logits, sampler = rows(), Sampler()
    statistics = Verified(logits).statistics
    reasons = {}
    for row in range(len(logits)):
        try:
            expected = sampler.draw(logits[row], 0)
        except InvalidLogits as invalid:
            reasons[row] = str(invalid)
            with pytest.raises(InvalidLogits) as found:
                _best(statistics, row)
            assert str(found.value) == reasons[row]
        else:
            assert _best(statistics, row) == expected == sampler.draws(None, Verified(logits))(row, 0)
    assert reasons == {3: "NaN", 4: "+inf", 5: "all -inf"}
