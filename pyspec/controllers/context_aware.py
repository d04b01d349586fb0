"""Which of several drafters a request gets, or none, by a policy over its prompt. Assistant selection.

Huang et al., arXiv 2408.08470: a softmax policy over drafters and plain decoding sees an embedding of the prompt, and
is trained offline as a contextual bandit whose rewards are all known. So the expected reward, sum_i pi(i | x) r_i(x),
is computed and not sampled. Here r_i is the speed that a drafter would have had over plain decoding on the recorded
text, less 1, where the paper weighs the similarity of texts against the drafter's latency; x are PromptFeatures.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pyspec.controllers import CONTROLLERS
from pyspec.controllers.prompt_features import NAMES
from pyspec.controllers.routed import Routed


class ContextAware(Routed):
    """Chooses once a request by a trained policy; arguments as Routed's."""

    name = "context_aware"

    def choose_from(self, arrays: Mapping[str, np.ndarray], known: list[str], drafters: list[str]) -> None:
        """Takes a policy; raises ValueError where it is for other drafters, or its shapes are others."""
        if sorted(known) != sorted(drafters):
            raise ValueError(f"drafters must be those that the policy was trained for, {known}, got {drafters}")
        hidden = len(arrays.get("first", ()))
        shapes = {name: array.shape for name, array in sorted(arrays.items())}
        expected = {
            "first": (hidden, len(NAMES)),
            "first_bias": (hidden,),
            "second": (len(known) + 1, hidden),
            "second_bias": (len(known) + 1,),
        }
        if shapes != expected:
            raise ValueError(f"a policy for {len(known)} drafters must have arrays {expected}, got {shapes}")
        order = [*(known.index(each) for each in drafters), len(known)]
        self._first, self._first_bias = arrays["first"], arrays["first_bias"]
        self._second, self._second_bias = arrays["second"][order], arrays["second_bias"][order]

    def gains(self, features: np.ndarray) -> np.ndarray:
        """The policy's logits."""
        return self._second @ np.maximum(self._first @ features + self._first_bias, 0.0) + self._second_bias


CONTROLLERS.register(ContextAware.name, ContextAware, "of several drafters one a request, by a policy over its prompt")
