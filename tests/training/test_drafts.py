"""What the training of draft heads shares: which rows are learned, and how guesses are counted."""

import pytest
import torch
import torch.nn.functional as F

from training.data_files import Batch
from training.drafts import chains_of, measure


def a_batch():
    """Texts of 6 and 4 tokens, whose answers begin at 2 and 1."""
    texts = torch.tensor([0] * 6 + [1] * 4)
    positions = torch.tensor([*range(6), *range(4)])
    answer = positions >= torch.tensor([2, 1])[texts]
    return Batch(torch.arange(10), torch.zeros(10, 1, 4), answer, positions, texts)


def test_rows_that_are_learned():
    is_learned, has_guess = chains_of(a_batch())
    assert is_learned.nonzero()[:, 0].tolist() == [1, 2, 3, 4, 6, 7, 8]
    assert has_guess.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 6, 7]


class GivenGuesses:
    """A head whose guess of depth d behind row t is given[d][t], of tokens 10 to 19."""

    def __init__(self, given):
        self.given, self.logits = given, torch.nn.Linear(10, 10, bias=False)
        self.logits.weight.data = torch.eye(10)

    def guesses(self, batch, chains, depth, share, noise):
        assert (share, noise) == (1.0, 0.0)
        for index in range(depth):
            chains = chains[chains + index + 1 < 9]
            chains = chains[batch.texts[chains] == batch.texts[chains + index + 2]] if index else chains
            rows = [self.given[index][chain] - 10 for chain in chains.tolist()]
            yield chains, F.one_hot(torch.tensor(rows), 10).float()


class GivenChoices:
    tokens = torch.arange(10, 20)

    def choices(self, residual, dtype):
        return torch.tensor([11, 12, 13, 14, 99, 17, 18])  # after rows 1, 2, 3, 4, 6, 7, 8; 99 cannot be guessed


def test_guesses_are_right_while_all_before_them_are():
    first = {0: 11, 1: 12, 2: 10, 3: 14, 6: 17, 7: 18}  # all but that of chain 2
    second = {0: 12, 1: 10, 2: 14, 6: 18}  # right behind 0, 2 and 6
    third = {0: 13, 1: 14}  # right behind both, but not below 1's second
    found = measure(
        GivenGuesses([first, second, third]), GivenChoices(), [a_batch(), a_batch()], (1, 1, 1), torch.float32
    )
    assert found == pytest.approx([5 / 6, 2 / 4, 1 / 2])


class Unsure(GivenGuesses):
    """Whose second choice is the token one above."""

    def guesses(self, *arguments):
        for chains, rows in super().guesses(*arguments):
            yield chains, rows + 0.5 * rows.roll(1, -1)


def test_guesses_of_a_tree_are_right_where_one_of_them_is():
    first = {0: 11, 1: 12, 2: 12, 3: 10, 6: 17, 7: 17}  # those of chains 2 and 7 by the second choice, 3 by neither
    second = {0: 12, 1: 12, 2: 14, 6: 18}  # that of chain 1 by the second
    batches = [a_batch()]
    for widths, expected in (((2, 1), [5 / 6, 3 / 4]), ((2, 2), [5 / 6, 4 / 4]), ((1, 2), [3 / 6, 3 / 4])):
        found = measure(Unsure([first, second]), GivenChoices(), batches, widths, torch.float32)
        assert found == pytest.approx(expected)
