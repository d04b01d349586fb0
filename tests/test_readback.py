import gc

import pytest
import torch

import pyspec.readback
from pyspec.readback import pack_statistics, read_statistics, read_top_tokens, send_statistics, wait_for
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


@pytest.mark.parametrize("places", [None, [slice(0, 4), slice(5, 7)]], ids=["all rows", "some rows"])
@pytest.mark.parametrize("device", DEVICES)
def test_what_was_sent_is_what_is_read(device, places):
    logits = rows().to(device)
    parts = logits.split([4, 3, 2]) if places is None else [logits[place].clone() for place in places]
    expected = [read_statistics(part.cpu()) for part in parts]
    packed = pack_statistics(logits)
    send_statistics(packed, parts, places)
    packed.zero_()  # a replay overwrites them
    wait_for([None, *parts])
    for part, statistics in zip(parts, expected, strict=True):
        assert part in pyspec.readback._sent
        for found in (read_statistics(part), read_statistics(part)):
            for ours, theirs in zip(found, statistics, strict=True):
                assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.flags.c_contiguous
                torch.testing.assert_close(ours, theirs, equal_nan=True)
    del part, parts
    gc.collect()
    assert not len(pyspec.readback._sent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [3, 8, 50])
@pytest.mark.parametrize("device", DEVICES)
def test_top_tokens_are_those_of_the_statistics(device, vocab, dtype):
    logits = rows()[:, :vocab].to(device, dtype)
    for some in (logits, logits[[0, 1, 2, 5]]):  # with a row that has NaN, and without
        statistics = read_statistics(some)
        for ours, theirs in zip(read_top_tokens(some), statistics[:2], strict=True):
            assert ours.dtype == theirs.dtype and ours.flags.c_contiguous and (ours == theirs).all()


def test_statistics_name_the_token_that_argmax_names():
    logits, sampler = rows(), Sampler()
    statistics = read_statistics(logits)
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
            assert _best(statistics, row) == expected == sampler.draws(logits)(row, 0)
    assert reasons == {3: "NaN", 4: "+inf", 5: "all -inf"}
