"""The hashes of logits: that they are the same twice, and that one bit, a NaN or a missing scene is noticed."""

import bits
import pytest
import torch

from tests.helpers.fake_runner import FakeRunner


@pytest.fixture
def fp32(monkeypatch):
    monkeypatch.setattr(bits, "DTYPES", {"fp32": torch.float32})
    monkeypatch.setattr(bits, "LONG", 140)  # a chunk and a bit, and a block of a quantised cache and a bit


@pytest.mark.parametrize("model", ["llama", "mamba2"])
def test_a_build_has_the_bits_of_itself(model, fp32):
    pytest.importorskip("transformers")
    hashes = bits.hashes_of(model)
    assert hashes == bits.hashes_of(model)
    rounds = {name: value for name, value in hashes.items() if "round" in name and "dense" in name}
    assert len(set(rounds.values())) == len(rounds) == 2 * len(bits.TREES) + len(bits.ROUNDS_OF_BATCH)


def test_one_bit_is_noticed():
    class OneBitApart(FakeRunner):
        """Of trees of several nodes, as a kernel whose sums hang on the number of rows."""

        def _tree_logits(self, committed, tree):
            logits = super()._tree_logits(committed, tree)
            if len(tree) == 8:
                logits[-1, 0].nextafter_(torch.tensor(0.0))
            return logits

    ours, theirs = (dict(bits.scenes(runner(), None)) for runner in (FakeRunner, OneBitApart))
    different = [name for name in ours if ours[name] != theirs[name]]
    assert different == [name for name in ours if "round" in name and "8" in name.partition("nodes")[2]]


def test_nan_is_an_error():
    with pytest.raises(ValueError, match="must be finite"):
        bits.hash_of([torch.tensor([0.0, float("nan")])])


def test_compare_names_what_differs_or_is_missing(capsys):
    assert bits.compare({"a": "1"}, {"a": "1"}) == 0
    assert bits.compare({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"}) == 1
    printed = capsys.readouterr().out
    assert "b: differs" in printed and "c: is in one" in printed and "d: is in one" in printed
    assert "1 hashes are equal, 3 are not" in printed
