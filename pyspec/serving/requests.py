"""Requests: what OpenAI's fields ask of the engine, for chats and for plain completions.

A field is honoured, or refused by its name; one that asks for what is the case anyway is taken too.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pyspec.sampling.warpers import WARPERS
from pyspec.serving.engine import Engine
from pyspec.serving.fields import Fields, wrong
from pyspec.serving.messages import read_messages, read_tools
from pyspec.serving.refusals import Refused

MOST_STOPS = 16
MOST_TOP_LOGPROBS = 20  # OpenAI's
_LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")  # these name a request and change no text
_UNSUPPORTED_IN_CHATS = frozenset(
    "functions function_call audio prediction web_search_options verbosity prompt_cache_retention moderation".split()
)
_UNSUPPORTED = frozenset(("suffix",))
#: Settings of generate beyond OpenAI's fields, by the names that other servers give them too.
_BEYOND = frozenset(WARPERS) - {"logit_bias", "frequency_penalty", "presence_penalty"}


@dataclass
class Ask:
    """What a request asks for.

    Attributes:
        prompts: token ids, of each text that is asked for; their number is that of the choices.
        seeds: one for each of them.
        settings: what engine.submit is called with beside these, for all of them alike.
        stream: whether the texts are wanted piece by piece.
        usage_at_end: whether a stream ends with the counts.
        top_logprobs: how many of the likeliest tokens are told beside each; None tells no log probabilities.
    """

    prompts: list[list[int]]
    seeds: list[int]
    settings: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    usage_at_end: bool = False
    top_logprobs: int | None = None


def read_chat(body: dict, engine: Engine, name: str) -> Ask:
    """Reads a request of /v1/chat/completions.

    Args:
        body: its JSON.
        engine: what will answer; as many texts as it has slots may be asked for at once.
        name: of the model, which the request must ask for.

    Raises:
        Refused: a field does not fit, or is not known.
    """
    fields = Fields(body)
    _check_model(fields, name)
    messages, tools, variables = read_messages(fields), read_tools(fields), _variables(fields)
    ask = _read_common(fields, engine.slots, _chat_logprobs)
    limits = [fields.integer(each, 1, 2**24) for each in ("max_tokens", "max_completion_tokens")]
    if None not in limits:
        raise Refused("'max_tokens' must be left out beside 'max_completion_tokens'", param="max_tokens")
    ask.settings["max_new_tokens"] = next(filter(None, limits), engine.context_length)
    _read_format(fields, ask)
    fields.one_of("modalities", (None, ["text"]))
    fields.one_of("store", (None, False))
    fields.one_of("service_tier", (None, "auto", "default"))
    fields.finish(_UNSUPPORTED_IN_CHATS)

    tokenizer = _tokenizer(engine)
    if tokenizer.chat_template is None:
        raise Refused("the model has no chat template: send its prompt to /v1/completions", param="messages")
    try:
        prompt = tokenizer.chat(messages, **({"tools": tools} if tools else {}), **variables)
    except (ValueError, TypeError) as error:
        raise Refused(str(error), param="messages") from None
    _check_prompt(prompt, engine, "messages")
    ask.prompts = [prompt] * len(ask.seeds)
    return ask


def read_completion(body: dict, engine: Engine, name: str) -> Ask:
    """Reads a request of /v1/completions; arguments and errors as for read_chat."""
    fields = Fields(body)
    _check_model(fields, name)
    prompts = _prompts(fields.any("prompt"), _tokenizer(engine))
    for prompt in prompts:
        _check_prompt(prompt, engine, "prompt")
    ask = _read_common(fields, engine.slots, _text_logprobs, len(prompts))
    ask.settings["max_new_tokens"] = fields.integer("max_tokens", 1, 2**24, 16)  # OpenAI's default
    n = len(ask.seeds) // len(prompts)
    fields.one_of("best_of", (None, n))
    fields.one_of("echo", (None, False))
    fields.finish(_UNSUPPORTED)
    ask.prompts = [prompt for prompt in prompts for _ in range(n)]
    return ask


def _variables(fields: Fields) -> dict:
    """What the chat template may use beside messages and tools."""
    variables = fields.mapping("chat_template_kwargs") or {}
    for name in ("messages", "tools", "documents", "chat_template", "add_generation_prompt"):
        if name in variables:  # a template is a program, and a client's would run here
            full = f"chat_template_kwargs.{name}"
            raise Refused(f"'{full}' must be left out", param=full, code="unsupported_parameter")
    effort = fields.text("reasoning_effort")
    return variables if effort is None else variables | {"reasoning_effort": effort}


def _check_model(fields: Fields, name: str) -> None:
    asked = fields.text("model")
    if asked is None:
        raise Refused("you must provide a model parameter", param="model")
    if asked != name:
        shown = asked if len(asked) <= 80 else f"{asked[:77]}..."
        raise Refused(
            f"The model '{shown}' does not exist: this server has '{name}'",
            status=404,
            param="model",
            code="model_not_found",
        )


def _read_common(fields: Fields, most_texts: int, read_logprobs: Callable, prompts: int = 1) -> Ask:
    """Reads what chats and plain completions have in common, for so many prompts."""
    n = fields.integer("n", 1, most_texts, 1)
    if n * prompts > most_texts:
        raise Refused(
            f"this server writes {most_texts} texts at once, got {prompts} prompts with n={n}",
            param="n" if n > 1 else "prompt",
            code="invalid_value",
        )
    seed = fields.integer("seed", -(2**63), 2**64 - 1)
    seed = secrets.randbits(32) if seed is None else seed
    ask = Ask([], [(seed + place % n) % 2**64 for place in range(n * prompts)])
    settings = ask.settings
    settings["temperature"] = float(fields.number("temperature", 0, 2, 1.0))
    settings["top_p"] = float(fields.number("top_p", 0, 1, 1.0))
    settings["top_k"] = fields.integer("top_k", 0, 2**31, 0)
    settings["stop"] = _stops(fields)
    for name in ("frequency_penalty", "presence_penalty"):
        if penalty := fields.number(name, -2, 2, 0):
            settings[name] = penalty
    if bias := fields.mapping("logit_bias"):
        settings["logit_bias"] = {token: Fields(bias, "logit_bias.").number(token, -100, 100) for token in bias}
    for name in sorted(_BEYOND):
        if name in fields:
            settings[name] = fields.any(name)
    ask.top_logprobs = settings["logprobs"] = read_logprobs(fields)
    ask.stream = fields.flag("stream")
    _read_stream_options(fields, ask)
    for name in _LABELS:
        fields.any(name)
    return ask


def _stops(fields: Fields) -> tuple[str, ...]:
    stop = fields.any("stop", ())
    stops = (stop,) if isinstance(stop, str) else stop
    is_list = isinstance(stops, (list, tuple)) and len(stops) <= MOST_STOPS
    if not is_list or not all(isinstance(each, str) and each for each in stops):
        raise wrong("stop", f"a string, or at most {MOST_STOPS}, none empty", stop)
    return tuple(stops)


def _read_stream_options(fields: Fields, ask: Ask) -> None:
    options = fields.mapping("stream_options")
    if options is None:
        return
    if not ask.stream:
        raise Refused("'stream_options' must be left out where 'stream' is not true", param="stream_options")
    inner = Fields(options, "stream_options.")
    ask.usage_at_end = inner.flag("include_usage")
    inner.one_of("include_obfuscation", (None, False))
    inner.finish()


def _chat_logprobs(fields: Fields) -> int | None:
    wanted, most = fields.flag("logprobs"), fields.integer("top_logprobs", 0, MOST_TOP_LOGPROBS)
    if most is not None and not wanted:
        raise Refused("'top_logprobs' must be left out where 'logprobs' is not true", param="top_logprobs")
    return (most or 0) if wanted else None


def _text_logprobs(fields: Fields) -> int | None:
    return fields.integer("logprobs", 0, MOST_TOP_LOGPROBS)


def _read_format(fields: Fields, ask: Ask) -> None:
    """response_format becomes a grammar."""
    asked = fields.mapping("response_format")
    if asked is None:
        return
    inner = Fields(asked, "response_format.")
    kind = inner.one_of("type", ("text", "json_object", "json_schema"))
    schema = {"type": "object"}
    if kind == "json_schema":
        described = inner.mapping("json_schema")
        if described is None:
            raise Refused("'response_format.json_schema' must be an object", param="response_format.json_schema")
        of_schema = Fields(described, "response_format.json_schema.")
        of_schema.text("name"), of_schema.text("description"), of_schema.flag("strict")
        schema = of_schema.mapping("schema") or schema
        of_schema.finish()
    inner.finish()
    if kind == "text":
        return
    if "grammar" in ask.settings:
        raise Refused("'grammar' must be left out beside 'response_format'", param="grammar")
    ask.settings["grammar"] = {"json_schema": schema}


def _tokenizer(engine: Engine):
    if engine.model.tokenizer is None:
        raise Refused("this model has no tokenizer, so it cannot speak", status=501)
    return engine.model.tokenizer


def _prompts(asked, tokenizer) -> list[list[int]]:
    """The prompts of a completion: a string, token ids, or a list of either."""
    several = asked if isinstance(asked, list) and asked and not _is_token(asked[0]) else [asked]
    prompts = []
    for prompt in several:
        if isinstance(prompt, list) and prompt and all(map(_is_token, prompt)):
            prompts.append(prompt)
        elif isinstance(prompt, str):
            prompts.append(tokenizer.encode(prompt, special=True))
        else:
            raise wrong("prompt", "a string, token ids, or a list of either, none empty", asked)
    return prompts


def _is_token(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_prompt(prompt: list[int], engine: Engine, param: str) -> None:
    context, vocabulary = engine.context_length, engine.model.vocab_size
    if not prompt:
        raise Refused(f"'{param}' must not be empty", param=param)
    if len(prompt) >= context:
        raise Refused(
            f"This model's maximum context length is {context} tokens, of which an answer needs one. "
            f"However, '{param}' has {len(prompt)} tokens.",
            param=param,
            code="context_length_exceeded",
        )
    if not 0 <= min(prompt) <= max(prompt) < vocabulary:
        raise Refused(
            f"'{param}' must hold tokens in [0, {vocabulary}), got {min(prompt)} to {max(prompt)}", param=param
        )
