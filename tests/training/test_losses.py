"""Divergences are those of their formulas, and their gradients those of autograd."""

import pytest
import torch

from training.losses import DIVERGENCES, Laws, distil


def formula(name, logits, law):
    """[R] by autograd's own ops, in float64."""
    guess, log_guess = logits.softmax(-1), logits.log_softmax(-1)
    mean = (guess + law) / 2
    shared = torch.minimum(guess, law).sum(-1)
    share = torch.exp(-3 * shared.detach())
    kl = (law * (law.log() - log_guess)).sum(-1)
    return {
        "kl": kl,
        "reverse kl": (guess * (log_guess - law.log())).sum(-1),
        "jsd": ((law * (law / mean).log()).sum(-1) + (guess * (guess / mean).log()).sum(-1)) / 2,
        "tvd": (law - guess).abs().sum(-1) / 2,
        "hybrid": share * kl + (1 - share) * (1 - shared),
    }[name]


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_losses_and_gradients(name, learns):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 16, generator=generator).requires_grad_()
    weight = torch.randn(40, 16, generator=generator).requires_grad_(learns)
    law, index = torch.randn(9, 40, generator=generator).softmax(-1), torch.arange(300) % 9
    shared = torch.empty(300)
    loss = distil(rows, weight, Laws(law, torch.special.entr(law).sum(-1)), index, name, shared)
    (0.5 * loss).backward()
    same = [tensor.detach().double().requires_grad_() for tensor in (rows, weight)]
    expected = formula(name, same[0] @ same[1].T, law[index].double()).sum()
    (0.5 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-3)
    differ = ((same[0] @ same[1].T).softmax(-1) - law[index]).abs().sum(-1) / 2
    torch.testing.assert_close(1 - shared.double(), differ.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows.grad.double(), same[0].grad, rtol=1e-4, atol=1e-5)
    assert (weight.grad is not None) == learns
    if learns:
        torch.testing.assert_close(weight.grad.double(), same[1].grad, rtol=1e-4, atol=1e-4)


def test_another_divergence_is_refused():
    rows, laws = torch.zeros(1, 2), Laws(torch.ones(1, 3) / 3, torch.zeros(1))
    with pytest.raises(ValueError, match="divergence must be one of kl, reverse kl, .*, got 'mse'"):
        distil(rows, torch.zeros(3, 2), laws, torch.zeros(1, dtype=torch.int64), "mse")
