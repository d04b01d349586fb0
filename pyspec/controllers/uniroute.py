"""Which of several drafters a request gets, or none, by what each gave in the cluster of its prompt. UniRoute.

Jitkrittum et al., arXiv 2502.08773: prompts are clustered, each model is a vector of its errors in the clusters, and a
prompt goes to the model with the least error + cost of its cluster. Another model joins with a vector of its own, and
nothing is trained anew. Here a drafter's vector are its gains, speed over plain decoding less 1, which have the cost in
them, and plain decoding's are 0. A file may know more drafters than are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pyspec.controllers import CONTROLLERS
from pyspec.controllers.prompt_features import NAMES
from pyspec.controllers.routed import Routed


class UniRoute(Routed):
    """Chooses once a request by the nearest cluster; arguments as Routed's."""

    name = "uniroute"

    def choose_from(self, arrays: Mapping[str, np.ndarray], known: list[str], drafters: list[str]) -> None:
        """Takes centres and vectors; raises ValueError where a drafter has none, or shapes are others."""
        missing = [each for each in drafters if each not in known]
        if missing:
            raise ValueError(f"drafters must have vectors (training/routing.py adds some), but {missing} have none")
        clusters = len(arrays.get("centres", ()))
        shapes = {name: array.shape for name, array in sorted(arrays.items())}
        expected = {
            "centres": (clusters, len(NAMES)),
            "scale": (len(NAMES),),
            "vectors": (clusters, len(known)),
        }
        if not clusters or shapes != expected:
            raise ValueError(f"clusters for {len(known)} drafters must have arrays {expected}, got {shapes}")
        self._centres, self._scale = arrays["centres"], arrays["scale"]
        self._vectors = np.pad(arrays["vectors"][:, [known.index(each) for each in drafters]], ((0, 0), (0, 1)))

    def gains(self, features: np.ndarray) -> np.ndarray:
        """The gains of the nearest cluster."""
        return self._vectors[int(((features * self._scale - self._centres) ** 2).sum(axis=1).argmin())]


CONTROLLERS.register(UniRoute.name, UniRoute, "of several drafters one a request, by clusters of prompts (UniRoute)")
