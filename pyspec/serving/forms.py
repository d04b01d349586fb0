"""Forms: what becomes of an Ask, in OpenAI's objects, whole or piece by piece."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence

from pyspec.sampling.logprobs import TokenLogprobs
from pyspec.serving.requests import Ask

_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}  # what generate calls them -> what OpenAI does
_LEAST_LOGPROB = -9999.0  # JSON has no -inf; OpenAI's number for a token that cannot come


def event(data: dict | str) -> bytes:
    """A server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


class Form:
    """How the texts of a request are told. Subclasses say what the choices of each endpoint look like.

    Args:
        ask: what was asked for.
        model: the runner that answers.
        name: of the model, for clients.
    """

    prefix: str
    whole_object: str
    piece_object: str

    def __init__(self, ask: Ask, model, name: str):
        self.id = self.prefix + secrets.token_hex(12)
        self._ask, self._model = ask, model
        self._common = {"created": int(time.time()), "model": name, "system_fingerprint": f"pyspec-{model.fingerprint}"}
        self._offsets = [0] * len(ask.prompts)

    def whole(self, results: Sequence) -> dict:
        """The response, of the results of all texts."""
        choices = [self._whole_choice(place, result) for place, result in enumerate(results)]
        return self._object(self.whole_object, choices) | {"usage": self.usage(results)}

    def first(self, place: int) -> dict | None:
        """What a stream begins a text with, or None."""
        return None

    def piece(self, place: int, piece) -> dict | None:
        """A piece of a text; None where there is nothing to tell."""
        logprobs = self._logprobs(place, piece.tokens, piece.logprobs or ())
        if not piece.text and logprobs is None:
            return None
        return self._chunk([self._piece_choice(place, piece.text, logprobs, None)])

    def last(self, place: int, result) -> dict:
        """What a stream ends a text with."""
        return self._chunk([self._piece_choice(place, None, None, _REASONS[result.finish_reason])])

    def end(self, results: Sequence) -> dict | None:
        """What a stream ends with: the counts, where they are wanted."""
        return self._chunk([]) | {"usage": self.usage(results)} if self._ask.usage_at_end else None

    def usage(self, results: Sequence) -> dict:
        """The counts of tokens; drafts that were accepted are among the new ones, those that were rejected are not.

        A prompt counts once for all of its texts.
        """
        prompts = {id(prompt): len(prompt) for prompt in self._ask.prompts}
        cached = {
            id(prompt): result.stats.prefix_tokens for prompt, result in zip(self._ask.prompts, results, strict=True)
        }
        new = sum(len(result.tokens) for result in results)
        accepted = sum(accepted_drafts(result.stats) for result in results)
        drafted = sum(result.stats.nodes - sum(result.stats.accepted_lengths) for result in results)
        return {
            "prompt_tokens": sum(prompts.values()),
            "completion_tokens": new,
            "total_tokens": sum(prompts.values()) + new,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": drafted - accepted,
            },
        }

    def _chunk(self, choices: list) -> dict:
        chunk = self._object(self.piece_object, choices)
        return chunk | {"usage": None} if self._ask.usage_at_end else chunk

    def _object(self, name: str, choices: list) -> dict:
        return {"id": self.id, "object": name, **self._common, "choices": choices}

    def _spelled(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> list[tuple[int, TokenLogprobs]]:
        """The tokens that have a text, which the end token has not."""
        return [pair for pair in zip(tokens, logprobs, strict=False) if pair[0] not in self._model.eos_tokens]

    def _text(self, token: int) -> str:
        return self._model.tokenizer.token_bytes(token).decode("utf-8", errors="replace")

    def _whole_choice(self, place: int, result) -> dict:
        raise NotImplementedError

    def _piece_choice(self, place: int, text: str | None, logprobs: dict | None, reason: str | None) -> dict:
        raise NotImplementedError

    def _logprobs(self, place: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict | None:
        raise NotImplementedError


class ChatForm(Form):
    """The form of /v1/chat/completions."""

    prefix, whole_object, piece_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def first(self, place: int) -> dict:
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": place, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _whole_choice(self, place: int, result) -> dict:
        return {
            "index": place,
            "message": {"role": "assistant", "content": result.text, "refusal": None},
            "logprobs": self._logprobs(place, result.tokens, result.logprobs or ()),
            "finish_reason": _REASONS[result.finish_reason],
        }

    def _piece_choice(self, place: int, text: str | None, logprobs: dict | None, reason: str | None) -> dict:
        delta = {} if text is None else {"content": text}
        return {"index": place, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, place, tokens, logprobs) -> dict | None:
        if self._ask.top_logprobs is None:
            return None
        content = [
            self._entry(token, each.logprob)
            | {"top_logprobs": [self._entry(other, logprob) for other, logprob in each.top.items()]}
            for token, each in self._spelled(tokens, logprobs)
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict:
        spelled = self._model.tokenizer.token_bytes(token)
        return {"token": self._text(token), "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(spelled)}


class TextForm(Form):
    """The form of /v1/completions."""

    prefix, whole_object, piece_object = "cmpl-", "text_completion", "text_completion"

    def _whole_choice(self, place: int, result) -> dict:
        logprobs = self._logprobs(place, result.tokens, result.logprobs or ())
        return self._piece_choice(place, result.text, logprobs, _REASONS[result.finish_reason])

    def _piece_choice(self, place: int, text: str | None, logprobs: dict | None, reason: str | None) -> dict:
        return {"index": place, "text": text or "", "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, place, tokens, logprobs) -> dict | None:
        if self._ask.top_logprobs is None:
            return None
        told = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, each in self._spelled(tokens, logprobs):
            told["tokens"].append(self._text(token))
            told["token_logprobs"].append(max(each.logprob, _LEAST_LOGPROB))
            top: dict[str, float] = {}
            for other, logprob in each.top.items():  # the likeliest of tokens that are spelled alike
                top.setdefault(self._text(other), max(logprob, _LEAST_LOGPROB))
            told["top_logprobs"].append(top)
            told["text_offset"].append(self._offsets[place])
            self._offsets[place] += len(told["tokens"][-1])
        return told


def accepted_drafts(stats) -> int:
    """How many drafted tokens a text took: each of its rounds gives one token that was not drafted."""
    return sum(max(0, tokens - 1) * count for tokens, count in enumerate(stats.accepted_lengths))
