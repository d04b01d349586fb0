"""UniRoute: which of several models answers a prompt, by how they did on prompts like it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pyspec.arguments import read_integer, read_number
from pyspec.turns import LARGE, SMALL, TURN_RULES

WIDTH = 512  # of the embedding that needs no model
ROUNDS = 50  # of the clustering, at most


def bag_of_tokens(tokens: Sequence[int]) -> np.ndarray:
    """The embedding [512] float64 of a text: roots of its tokens' counts, hashed to signed places, of length 1."""
    kinds, counts = np.unique(np.asarray(tokens, dtype=np.uint64), return_counts=True)
    mixed = kinds * np.uint64(0x9E3779B97F4A7C15)  # wraps: a multiplicative hash, whose upper bits are the good ones
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    signs = np.where(mixed >> np.uint64(63), -1.0, 1.0)
    found = np.bincount((mixed >> np.uint64(40)).astype(np.int64) % WIDTH, np.sqrt(counts) * signs, WIDTH)
    return found / max(np.linalg.norm(found), 1e-12)


class Router:
    """Knows of each model how often it errs on each cluster of prompts (UniRoute, arXiv 2502.08773).

    `r(x) = argmin over models of error(model, cluster of x) + price * cost(model)`. A new model is a vector of errors
    on the same prompts (`add`); nothing is trained again.

    Args:
        prompts: [N] token ids each, that clusters are made of; no answers are needed.
        clusters: how many, at least 1; N where there are fewer prompts.
        seed: of the clustering, K-means.
        embed: a text's embedding [D], of token ids; by default bag_of_tokens.

    Raises:
        ValueError, TypeError: naming the argument that is out of range.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        clusters: int = 8,
        seed: int = 0,
        embed: Callable[[Sequence[int]], np.ndarray] = bag_of_tokens,
    ):
        clusters = read_integer("clusters", clusters)
        if clusters < 1:
            raise ValueError(f"clusters must be at least 1, got {clusters}")
        if not len(prompts):
            raise ValueError("prompts must be at least one, got none")
        self._embed = embed
        points = np.stack([embed(prompt) for prompt in prompts])
        self.centres = _centres(points, min(clusters, len(points)), np.random.default_rng(seed))
        self.errors: dict[str, np.ndarray] = {}
        self.costs: dict[str, float] = {}

    def add(self, name: str, prompts: Sequence[Sequence[int]], errors: Sequence[float], cost: float) -> None:
        """Adds a model, or what is newly known of one.

        Args:
            name: of the model.
            prompts: token ids each; those of a validation set.
            errors: in [0, 1], of the model on each of them: 1 for a wrong answer.
            cost: of an answer, at least 0, in a unit that all models share.
        """
        errors, cost = np.asarray(errors, dtype=np.float64), read_number("cost", cost)
        if errors.shape != (len(prompts),) or not len(prompts) or not ((errors >= 0) & (errors <= 1)).all():
            raise ValueError(f"errors must be in [0, 1], one for each of {len(prompts)} prompts, got {errors.tolist()}")
        if not 0 <= cost < np.inf:
            raise ValueError(f"cost must be finite and at least 0, got {cost}")
        places = np.array([self.cluster(prompt) for prompt in prompts])
        counts = np.bincount(places, minlength=len(self.centres))
        sums = np.bincount(places, errors, minlength=len(self.centres))
        # a cluster with few prompts leans on the mean of all, by the weight of one prompt
        self.errors[name], self.costs[name] = (sums + errors.mean()) / (counts + 1), cost

    def cluster(self, prompt: Sequence[int]) -> int:
        """The cluster of a prompt: the one whose centre is nearest."""
        return int(((self.centres - self._embed(prompt)) ** 2).sum(1).argmin())

    def route(self, prompt: Sequence[int], price: float = 0.0) -> str:
        """The name of the model that is to answer a prompt; of equals the one that was added first.

        Args:
            price: how much error a unit of cost is worth, at least 0: the dial.
        """
        if not self.errors:
            raise ValueError("the router must know at least one model: add one first")
        cluster = self.cluster(prompt)
        return min(self.errors, key=lambda name: self.errors[name][cluster] + price * self.costs[name])

    def save(self, path: str | os.PathLike) -> None:
        """Writes clusters and models to a file; another embedding than bag_of_tokens is given again by who loads it."""
        names = list(self.errors)
        with open(path, "wb") as file:
            np.savez(
                file,
                centres=self.centres,
                names=np.array(names, dtype=str),
                errors=np.array([self.errors[name] for name in names]),
                costs=np.array([self.costs[name] for name in names]),
            )

    @classmethod
    def load(cls, path: str | os.PathLike, embed: Callable[[Sequence[int]], np.ndarray] = bag_of_tokens) -> Router:
        """What `save` wrote. Raises FileNotFoundError, or ValueError for another file."""
        router = cls.__new__(cls)
        router._embed = embed
        try:
            with np.load(Path(path)) as found:
                router.centres, names = found["centres"], found["names"].tolist()
                router.errors = dict(zip(names, found["errors"], strict=True))
                router.costs = dict(zip(names, found["costs"].tolist(), strict=True))
        except (ValueError, EOFError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is no file of Router.save") from None
        return router


class UniRouteTurns:
    """One of the two models writes the whole text, as a Router says of the prompt (arXiv 2502.08773).

    Args:
        router: knows the models "small" and "large"; or the file that `python -m training.answers` wrote of one.
        price: see Router.route: higher gives the small model more.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it knows other models.
    """

    first = SMALL

    def __init__(self, router: Router | str | os.PathLike | None = None, price: float = 0.1):
        if router is None:
            raise ValueError("router must be a Router or the file of one, from python -m training.answers, got None")
        self._router = Router.load(router) if isinstance(router, (str, os.PathLike)) else router
        self.price = read_number("price", price)
        if not 0 <= self.price < np.inf:
            raise ValueError(f"price must be finite and at least 0, got {price}")
        if set(self._router.errors) != {"small", "large"}:
            raise ValueError(f'router must know the models "small" and "large", got {list(self._router.errors)}')

    def start(self, seed: int, spelled, prompt: Sequence[int]) -> UniRouteTurns:
        rule = copy.copy(self)
        rule.first = LARGE if self._router.route(prompt, self.price) == "large" else SMALL
        return rule

    def next(self, token: int, row: np.ndarray) -> int:
        return self.first


def _centres(points: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Centres [count, D] of clusters of points [N, D]: K-means, begun with points far from each other (k-means++)."""
    centres = [points[generator.integers(len(points))]]
    while len(centres) < count:
        far = np.min([((points - centre) ** 2).sum(1) for centre in centres], axis=0)
        if not far.sum():
            break
        centres.append(points[generator.choice(len(points), p=far / far.sum())])
    centres = np.stack(centres)
    for _ in range(ROUNDS):
        places = ((points[:, None] - centres) ** 2).sum(2).argmin(1)
        moved = np.stack(list(_means(points, places, centres)))
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def _means(points: np.ndarray, places: np.ndarray, centres: np.ndarray) -> Iterator[np.ndarray]:
    """The mean of each cluster's points; where it has none, its old centre."""
    for cluster, centre in enumerate(centres):
        own = points[places == cluster]
        yield own.mean(0) if len(own) else centre


TURN_RULES.register(
    "uniroute", UniRouteTurns, "one of the two for the whole text, by clusters of prompts (arXiv 2502.08773)"
)
