"""pyspec as a model of the lm-evaluation-harness.

    python -m pyspec.integrations.lm_eval run --model pyspec --model_args model=demo,dtype=bf16 --tasks gsm8k

or, in Python, lm_eval.simple_evaluate(model=PyspecLM(model="demo"), tasks=[...]). Texts are generated with speculation.
Requests for log likelihoods are read ragged, a batch in one go, and what they begin with alike only once: the answers
to choose from behind one question cost little more than the question.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

import pyspec
from pyspec.integrations import require
from pyspec.ops import row_statistics
from pyspec.runners.exclusive import exclusive_use
from pyspec.runners.verified import Verified
from pyspec.tree import DraftTree

require("lm-eval", "0.4.9", "0.5")

from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402
from rich.progress import track  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
DTYPES |= {"int4": "int4"}
# what the harness may say of a text to generate, and what pyspec.generate calls it
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_p", "top_k")


@register_model("pyspec")
class PyspecLM(TemplateLM):
    """A model that pyspec.load takes, or a runner.

    Args:
        model: "demo", a GGUF file, a Hugging Face folder or hub id, or a runner that is loaded already.
        dtype: "fp32", "bf16", "fp16", "int8" or "int4"; the model's own by default.
        device: as for pyspec.load.
        drafter, budget: as for pyspec.generate. They change no greedy text.
        batch_size: texts that are generated, or requests that are read, together.
        seed: of sampled texts.
        max_gen_toks: new tokens of a text whose task does not say.
    """

    def __init__(
        self,
        model: str | pyspec.runners.Runner = "demo",
        dtype: str | None = None,
        device: str | None = None,
        drafter: str | None = "merged",
        budget: int | str = "auto",
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        seed: int = 0,
        max_gen_toks: int = 256,
    ):
        super().__init__()
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a positive number, got {batch_size!r}")
        is_name = isinstance(model, str)
        self.runner = pyspec.load(model, dtype=DTYPES.get(dtype), device=device) if is_name else model
        if self.runner.tokenizer is None:
            raise ValueError("model must have a tokenizer")
        self.tokenizer = self.runner.tokenizer
        self.batch_size = int(batch_size)
        self._device = self.runner.device
        self._settings = {"drafter": drafter, "budget": budget, "seed": seed}
        self._new_tokens = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        return min(self.runner.eos_tokens)

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        tokens = self.tokenizer.encode(string, special=True)  # as in a chat template, which names them
        begins = self.tokenizer.encode("")  # the token for the beginning, if the model wants one
        return tokens[len(begins) :] if add_special_tokens is False else tokens

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not add_generation_prompt:
            raise ValueError("add_generation_prompt must be True: pyspec's templates end where the assistant answers")
        return self.tokenizer.render(chat_history)

    # ==== texts ====

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continues the contexts, each until one of its stop strings."""
        settings = [self._generation_settings(request.args[1]) for request in requests]
        tokens = []
        for request, wanted in zip(requests, settings, strict=True):
            room = self.runner.context_length - wanted["max_new_tokens"]
            if room < 1:
                raise ValueError(f"max_gen_toks must leave room in {self.runner.context_length}, got {wanted}")
            tokens.append(self.tok_encode(request.args[0])[-room:])
        texts: list[str] = [""] * len(requests)
        batches = _batches(list(range(len(requests))), self.batch_size, lambda a, b: settings[a] == settings[b])
        for batch in track(batches, "texts", disable=disable_tqdm):
            found = pyspec.generate(
                self.runner, [tokens[index] for index in batch], **settings[batch[0]], **self._settings
            )
            for index, text, error in zip(batch, found.text, found.error, strict=True):
                if error is not None:
                    raise RuntimeError(f"request {index}: {error}")
                texts[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    def _generation_settings(self, asked: dict) -> dict:
        """Settings for pyspec.generate; refuses what it could not honour."""
        asked = dict(asked)
        until = asked.pop("until", None) or []
        new_tokens = [asked.pop(name) for name in _NEW_TOKENS if name in asked]
        do_sample = asked.pop("do_sample", None)
        sampling = {name: asked.pop(name) for name in _SAMPLING if asked.get(name) is not None}
        if asked:
            raise ValueError(f"generation settings must be known to pyspec, got {asked}")
        if do_sample is False:
            sampling = {}
        elif do_sample and "temperature" not in sampling:
            sampling["temperature"] = 1.0
        return {
            "stop": tuple(filter(None, [until] if isinstance(until, str) else until)),
            "max_new_tokens": new_tokens[0] if new_tokens else self._new_tokens,
            **{name: float(value) if name != "top_k" else int(value) for name, value in sampling.items()},
        }

    # ==== likelihoods ====

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log likelihood of each whole text, in windows as long as the context."""
        pieces, owners = [], []
        for index, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.runner.context_length - 1, 1
            )
            for context, continuation in map(make_disjoint_window, windows):
                pieces.append((("", ""), context, continuation))
                owners.append(index)
        sums = [0.0] * len(requests)
        for index, (likelihood, _) in zip(owners, self._loglikelihood_tokens(pieces, disable_tqdm), strict=True):
            sums[index] += likelihood
        for request, likelihood in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, likelihood)
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """Log likelihood of each continuation after its context, and whether it is what greedy decoding would say."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # neighbours share most of what they begin with
        order = sorted(range(len(requests)), key=lambda index: requests[index][1])
        for batch in track(_batches(order, self.batch_size), "likelihoods", disable=disable_tqdm):
            found = self._read([requests[index][1:] for index in batch])
            for index, result in zip(batch, found, strict=True):
                results[index] = result
                if requests[index][0] != ("", ""):
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], result)
        return results

    def _read(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """One ragged reading of context and continuation pairs; contexts that are too long lose their beginnings."""
        texts = [(context + continuation)[-self.runner.context_length - 1 :] for context, continuation in pairs]
        first = [len(text) - len(continuation) for text, (_, continuation) in zip(texts, pairs, strict=True)]
        if min(first) < 1:
            raise ValueError(f"continuations must fit the context of {self.runner.context_length} tokens")
        read, sums, greedy = [0] * len(texts), [0.0] * len(texts), [True] * len(texts)

        def observe(index: int, chain: DraftTree, verified: Verified) -> None:
            start = read[index]
            read[index] += len(chain)
            rows = range(max(first[index] - 1, start), read[index])  # row j predicts token j + 1
            if not rows:
                return
            logits = verified.logits[rows.start - start :]
            targets = torch.tensor([texts[index][row + 1] for row in rows], device=logits.device)
            statistics = row_statistics(logits)
            likelihoods = logits.gather(1, targets[:, None])[:, 0] - statistics.log_sum_exp
            sums[index] += float(likelihoods.double().sum())
            greedy[index] &= bool((statistics.top_tokens[:, 0] == targets).all())

        prompts = [text[:-1] for text in texts]
        with exclusive_use(self.runner):
            self.runner.prefill(prompts, capacity=max(map(len, prompts)), observe=observe)
        return list(zip(sums, greedy, strict=True))


def _batches(indices: list[int], size: int, belong=lambda a, b: True) -> list[list[int]]:
    """Neighbours that belong together, at most size of them."""
    batches: list[list[int]] = []
    for index in indices:
        if batches and len(batches[-1]) < size and belong(batches[-1][0], index):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
