"""How the prompts of a batch are read: several in one call, and what two of them begin with only once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pyspec.tree import DraftTree

FEWEST_SHARED = 32  # tokens; for fewer, such as the one that every text begins with, nobody waits


class PromptPlan:
    """Which tokens are read next, and which are taken over from another prompt.

    Attributes:
        prompts: [B] token lists.
        origins: [B] of (an earlier prompt, how many first tokens to take from it), 0 of them for none. At least the
            last token of a prompt is its own, because its logits are asked for. Nobody takes any unless share is set.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], *, share: bool = True):
        self.prompts = prompts
        self.origins = [_origin(prompts, index) if share else (0, 0) for index in range(len(prompts))]

    def next_pieces(
        self, lengths: Sequence[int], rows: int, sequences: int, block: int | None = None
    ) -> dict[int, DraftTree]:
        """Chains of the next tokens, rows in all, by sequence, of which there are lengths[b] so far. Empty at the end.

        A prompt that takes tokens from another waits until it has got them. No chain reaches behind the end of a block
        of so many tokens; None for none.
        """
        pieces: dict[int, DraftTree] = {}
        for sequence, prompt in enumerate(self.prompts):
            start = lengths[sequence]
            if start < self.origins[sequence][1] or start == len(prompt):
                continue
            most = rows if block is None else min(rows, block - start % block)
            pieces[sequence] = DraftTree.chain(prompt[start : start + most])
            rows -= len(pieces[sequence])
            if rows == 0 or len(pieces) == sequences:
                break
        return pieces

    def takers(self, origin: int) -> list[tuple[int, int]]:
        """The sequences that take tokens from this one, and how many."""
        return [(taker, count) for taker, (other, count) in enumerate(self.origins) if count and other == origin]

    def readers(self, sequence: int, start: int, count: int) -> Iterator[tuple[int, int]]:
        """The readers of a piece that a sequence reads from start: itself, those that take it over, and how much."""
        yield sequence, count
        for taker, taken in self.takers(sequence):
            if start < taken:
                yield from self.readers(taker, start, min(count, taken - start))


def _origin(prompts: Sequence[Sequence[int]], index: int) -> tuple[int, int]:
    prompt, best = prompts[index], (0, 0)
    for earlier, other in enumerate(prompts[:index]):
        limit = min(len(other), len(prompt) - 1)
        count = next((place for place in range(limit) if other[place] != prompt[place]), limit)
        if count >= FEWEST_SHARED and count > best[1]:
            best = (earlier, count)
    return best
