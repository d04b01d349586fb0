"""pyspec on Ray: a stage of Ray Data, and draft and targets of one text on different actors.

    prompts.map_batches(Predictor, fn_constructor_kwargs={"model": "demo"}, batch_size=8, concurrency=2)

Nothing of Ray is imported here: Ray Data makes the predictors in its actors, and actor_calls takes an actor's methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np

import pyspec


class Predictor:
    """Continues the prompts of a batch of Ray Data; what its drafter learns is shared by all batches of an actor.

    Args:
        model: "demo", a GGUF file, a Hugging Face folder or hub id, or a runner that is loaded already.
        column: of the batch, with the prompts.
        chat: take a prompt as a user's turn, where the model has a chat template.
        load: further arguments of pyspec.load.
        settings: of pyspec.generate, such as max_new_tokens, temperature and seed.
    """

    def __init__(self, model: Any = "demo", *, column: str = "prompt", chat: bool = True, load=None, **settings):
        self._model = pyspec.load(model, **(load or {})) if isinstance(model, str) else model
        if self._model.tokenizer is None:
            raise ValueError("model must have a tokenizer")
        self._column, self._settings = column, settings
        self._is_chat = chat and self._model.tokenizer.chat_template is not None

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch with columns more: text, finish_reason, error ("" for none), prompt_tokens, new_tokens.

        Raises:
            KeyError: the batch has no column of prompts.
        """
        if self._column not in batch:
            raise KeyError(f"the batch must have a column {self._column!r}, got {', '.join(batch)}")
        prompts = [self._tokens(str(prompt)) for prompt in batch[self._column]]
        found = pyspec.generate(self._model, prompts, **self._settings)
        return dict(batch) | {
            "text": np.array(found.text, dtype=object),
            "finish_reason": np.array(found.finish_reason, dtype=object),
            "error": np.array([error or "" for error in found.error], dtype=object),
            "prompt_tokens": np.array([len(prompt) for prompt in prompts]),
            "new_tokens": np.array([len(tokens) for tokens in found.tokens]),
        }

    def _tokens(self, prompt: str) -> list[int]:
        tokenizer = self._model.tokenizer
        return tokenizer.chat([{"role": "user", "content": prompt}]) if self._is_chat else tokenizer.encode(prompt)


def actor_calls(method) -> Callable[..., Future]:
    """What DistributedText takes for a worker, of a method of a Ray actor.

    The actor is a pyspec.serving.distributed.Worker that `ray.remote` made one of; its method is `actor.draft` or
    `actor.verify`.
    """
    return lambda *asked: method.remote(*asked).future()
