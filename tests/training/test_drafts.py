"""What the training of draft heads shares: the loss is that of autograd, and the measurement that of a loop."""

import pytest
import torch
import torch.nn.functional as F

from training.data_files import Batch
from training.drafts import Laws, chains_of, distil, measure


@pytest.mark.parametrize("is_hybrid", [False, True])
def test_the_loss_and_its_gradient_are_those_of_autograd(is_hybrid):
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((300, 16), (40, 16)))
    law, index = torch.randn(9, 40, generator=generator).softmax(-1), torch.arange(300) % 9
    laws = Laws(law, torch.special.entr(law).sum(-1))
    distil(rows, weight, laws, index, is_hybrid).mul(0.5).backward()
    found = rows.grad, weight.grad
    rows.grad = weight.grad = None
    law, guess = law[index], (rows @ weight.T).log_softmax(-1)
    loss = F.kl_div(guess, law, reduction="none").sum(-1)
    if is_hybrid:
        shared = torch.minimum(guess.exp(), law).sum(-1)
        share = torch.exp(-3 * shared.detach())
        loss = share * loss + (1 - share) * (1 - shared)
    torch.testing.assert_close(distil(rows, weight, laws, index, is_hybrid), loss.sum(), rtol=1e-4, atol=1e-3)
    loss.sum().mul(0.5).backward()
    torch.testing.assert_close(found, (rows.grad, weight.grad), rtol=1e-4, atol=1e-4)


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
    found = measure(GivenGuesses([first, second, third]), GivenChoices(), [a_batch(), a_batch()], 3, torch.float32)
    assert found == pytest.approx([5 / 6, 2 / 4, 1 / 2])
