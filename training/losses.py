"""How far a draft's guesses are from the target's laws, and what that says to its logits.

The logits of a batch are never there as a whole: `distil` makes them a chunk at a time, with their gradient at once. p
is the target's law, q the guess:

    kl           sum p log p/q, which punishes what the draft leaves out
    reverse kl   sum q log q/p, which punishes what it adds
    jsd          half of each, against the mean of the two
    tvd          half the sum of |p - q|: the chance that a drawn guess is refused
    hybrid       w kl + (1 - w) tvd, with w = exp(-3 a) and a = sum min(p, q), taken as given (arXiv 2602.23881)

The first four are compared by DistillSpec, Zhou et al., arXiv 2310.08461.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["DIVERGENCES", "Laws", "distil"]

CHUNK = 128  # rows of logits at a time: 8,192 tokens of them stay in a core's cache
LEAST = 1e-9  # of a share where its logarithm is taken


@dataclass(frozen=True)
class Laws:
    """Laws of the target over the tokens that a draft can guess.

    Attributes:
        shares: [L, Vd], in the dtype that products are made in.
        entropies: [L] fp32, in nats.
    """

    shares: Tensor
    entropies: Tensor


def distil(
    rows: Tensor, weight: Tensor, laws: Laws, index: Tensor, divergence: str = "kl", shared: Tensor | None = None
) -> Tensor:
    """The sum over rows of how far their guesses are from the target's laws.

    Args:
        rows: [R, H] that give logits.
        weight: [Vd, H] that makes them.
        laws: of the target.
        index: [R] int64, the law of each row.
        divergence: one of DIVERGENCES.
        shared: [R] fp32, in which sum min(p, q) is put: the chance that a drawn guess is accepted.

    Raises:
        ValueError: for another divergence.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    return _Distilled.apply(rows, weight, laws, index, DIVERGENCES[divergence], shared)


class _Distilled(torch.autograd.Function):
    """Makes the gradient along with the loss: rows of logits are never kept."""

    @staticmethod
    def forward(ctx, rows, weight, laws: Laws, index, divergence: Divergence, shared: Tensor | None) -> Tensor:
        dtype, learns = laws.shares.dtype, weight.requires_grad
        matrix, x, loss = weight.to(dtype), rows.to(dtype), rows.new_zeros((), dtype=torch.float32)
        to_rows, to_weight = torch.empty_like(rows), torch.zeros_like(weight) if learns else None
        for first in range(0, len(rows), CHUNK):
            part = slice(first, first + CHUNK)
            logits, law = F.linear(x[part], matrix).float(), laws.shares[index[part]].float()
            found, gradient = divergence(logits, law, laws.entropies[index[part]])
            loss += found.sum()
            if shared is not None:
                shared[part] = torch.minimum(logits.softmax(-1), law).sum(-1)
            gradient = gradient.to(dtype)
            to_rows[part] = (gradient @ matrix).to(rows.dtype)
            if learns:
                to_weight += gradient.T @ x[part]
        ctx.save_for_backward(to_rows, to_weight)
        return loss

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple:
        to_rows, to_weight = ctx.saved_tensors
        return to_rows * scale, None if to_weight is None else to_weight * scale, None, None, None, None


# ==== divergences: [R] and their gradients [R, Vd], of logits [R, Vd], laws [R, Vd] and the laws' entropies [R] ====

Divergence = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _kl(logits: Tensor, law: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor]:
    guess = logits.softmax(-1)
    highest, at = logits.max(-1, keepdim=True)
    log_sum = highest - guess.gather(-1, at).log()  # without a second pass of exponentials
    return log_sum[:, 0] - (law * logits).sum(-1) - entropies, guess - law


def _reverse_kl(logits: Tensor, law: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor]:
    log_guess = logits.log_softmax(-1)
    return _through(log_guess.exp(), log_guess - law.clamp(min=LEAST).log())


def _jsd(logits: Tensor, law: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor]:
    log_guess = logits.log_softmax(-1)
    guess = log_guess.exp()
    log_mean = ((guess + law) / 2).clamp(min=LEAST).log()
    of_guess, gradient = _through(guess, log_guess - log_mean)
    of_law = -entropies - (law * log_mean).sum(-1)
    return (of_guess + of_law) / 2, gradient / 2


def _tvd(logits: Tensor, law: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor]:
    guess = logits.softmax(-1)
    _, gradient = _through(guess, -(guess < law).float())
    return 1 - torch.minimum(guess, law).sum(-1), gradient


def _hybrid(logits: Tensor, law: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor]:
    (kl, to_kl), (tvd, to_tvd) = _kl(logits, law, entropies), _tvd(logits, law, entropies)
    share = torch.exp(-3 * (1 - tvd))
    return torch.lerp(tvd, kl, share), torch.lerp(to_tvd, to_kl, share[:, None])


def _through(guess: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """The guess's mean of its slopes, and their gradient through its softmax."""
    mean = (guess * slopes).sum(-1)
    return mean, guess * (slopes - mean[:, None])


DIVERGENCES: dict[str, Divergence] = {"kl": _kl, "reverse kl": _reverse_kl, "jsd": _jsd, "tvd": _tvd, "hybrid": _hybrid}
