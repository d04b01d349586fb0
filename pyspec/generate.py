"""generate: one prompt or many, continued with tree speculation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from pyspec.acceptance import AcceptanceRule, acceptance_from_name, check_laws
from pyspec.arguments import described, read_integer, read_prompts
from pyspec.caches import QuantisedSettings, cache_from_name
from pyspec.caches.prefixes import read_memory
from pyspec.controllers import Controller, controller_for, read_controller
from pyspec.drafters import Drafter, drafter_from_name
from pyspec.loop import speculate
from pyspec.runners import Runner
from pyspec.sampling.logprobs import MOST_LOGPROBS
from pyspec.sampling.sampler import Sampler
from pyspec.sequence import Sequence, TextStream
from pyspec.stats import Stats, clock_of

LARGEST_BUDGET = 4096
MOST_NEW_TOKENS = 2**24


@dataclass
class Generation:
    """What generate gives back; for a batch, every field but stats is a list with an entry per prompt.

    Attributes:
        tokens: new tokens, the prompt not included; the end token and the tokens of a stop string are.
        text: of these tokens, without end token and stop string; None where the model has no tokenizer.
        finish_reason: "eos", "stop" (a stop string), "length", "interrupted" (Ctrl-C) or "error".
        error: what went wrong where finish_reason is "error", else None.
        stats: what was done, and where the time went.
        logprobs: of each new token where they were asked for, see TokenLogprobs; else None.
    """

    tokens: list
    text: str | list[str] | None
    finish_reason: str | list[str]
    error: str | None | list[str | None]
    stats: Stats
    logprobs: list | None = None


def generate(
    model: Runner,
    tokens,
    *,
    drafter: str | Drafter | list | None = "merged",
    budget: int | str = "auto",
    controller: str | Controller | None = None,
    acceptance: str | AcceptanceRule = "exact",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: str | Iterable[str] = (),
    cache: str | QuantisedSettings = "dense",
    stream: Callable | None = None,
    logprobs: int | None = None,
    prefix_memory: int = 0,
    **settings,
) -> Generation:
    """Continues one prompt, or a batch of them, with tree speculation.

    Calls on one runner wait for each other, from whatever thread; model.fork() gives a runner that need not wait.

    The text is what the model alone would say, over the same cache: with one seed (or greedily) it is the same for
    any drafter, budget and batch, unless another acceptance rule is asked for. Ctrl-C ends it early and keeps what
    there is.

    Args:
        model: a runner, from pyspec.load.
        tokens: the token ids of one prompt, or a list of such lists; their lengths may differ. Arrays, tensors and
            iterators of integers are as good, and so is what a tokenizer returns: its attention_mask says what is
            padding, on the left or on the right, which is left out.
        drafter: a name of pyspec.drafters.DRAFTERS (docs/drafting.md), a drafter, or None for plain decoding; or a list
            of drafters that take turns, as a controller chooses.
        budget: tree nodes a round, in [1, 4096], the last committed token being one of them; "auto" is the number that
            gives most tokens a second by the measured costs of this model on this machine.
        controller: who decides within the budget: a name of pyspec.controllers.CONTROLLERS (docs/controllers.md),
            several with "+" between them, or a controller. None is "pays" for the budget "auto", else "fixed".
        acceptance: a name of pyspec.acceptance.RULES, or a rule (docs/acceptance.md). All but "exact" keep at most the
            law of the text, not the text of a seed; some are lossy, and most are for drafters that draw.
        max_new_tokens: new tokens for each prompt; the model's context ends a text too.
        temperature, top_p, top_k: see Sampler; temperature 0 is greedy.
        seed: None takes one from the operating system; stats.seed tells which.
        stop: strings that end the text before they begin.
        cache: how keys and values are kept (docs/gear.md): a name of pyspec.caches.CACHES, or a GearSettings or
            ResidualVqSettings.
        stream: called with each new piece of text; for a batch with (index, piece). The pieces make up the text.
        logprobs: how many of the likeliest tokens are told beside each new one, in [0, 100]; None tells nothing.
        prefix_memory: bytes of beginnings of texts that the model keeps from this call on, for calls that begin with
            the same tokens (docs/serving.md): the next turn of a chat is not read from its beginning. 0 keeps none, and
            frees what an earlier call kept.
        settings: of warpers, by the names of pyspec.sampling.warpers.WARPERS (docs/sampling.md), say min_p=0.05; and
            deferral of acceptance="cascade", in [0, 1], larger leaving more to the drafter. None leaves one out.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, before any work.
        RuntimeError: this thread is generating with the model already, and calls from a callback of that.
    """
    check_model(model)
    batched, prompts = prompts_of(tokens, model)
    stop = stop_strings(stop, model)
    if stream is not None:
        check_stream(stream, model)
    budget, max_new_tokens = check_limits(budget, max_new_tokens)
    controller = read_controller(controller)
    logprobs = read_logprobs(logprobs)
    cache = cache_settings(cache, model, budget)
    kept = _check_prefix_memory(prefix_memory, model)
    rule = acceptance_from_name(acceptance, settings)
    sampler = Sampler(temperature, top_k, top_p, seed, **settings)
    shared_drafter = drafter_for(drafter, model, rule, cache, sampler)
    controller = controller_for(budget, controller, model, shared_drafter, cache)
    stats = Stats(seed=sampler.seed)
    stats.clock = clock_of(model)
    sequences = [
        Sequence(
            model=model,
            context=list(prompt),
            prompt_length=len(prompt),
            limit=min(len(prompt) + max_new_tokens, model.context_length),
            drafter=shared_drafter,
            sampler=sampler.start(prompt, model),
            text=None if model.tokenizer is None else TextStream(model.tokenizer, stop),
            stream=None if stream is None else _stream_of(stream, index if batched else None),
            top_logprobs=logprobs,
        )
        for index, prompt in enumerate(prompts)
    ]
    try:
        speculate(model, sequences, rule, controller=controller, cache=cache, prefix_memory=kept, stats=stats)
    except KeyboardInterrupt:
        for sequence in sequences:
            if sequence.going:
                with suppress(KeyboardInterrupt):  # an impatient second Ctrl-C while the last text is shown
                    sequence.finish("interrupted")
    stats.new_tokens = sum(len(sequence.new_tokens) for sequence in sequences)
    return generation_of(sequences, stats, batched)


def generation_of(sequences: list[Sequence], stats: Stats, batched: bool) -> Generation:
    """What became of sequences, a batch or a single one."""
    fields = (
        [sequence.new_tokens for sequence in sequences],
        [None if sequence.text is None else sequence.text.text for sequence in sequences],
        [sequence.finish_reason for sequence in sequences],
        [sequence.error for sequence in sequences],
    )
    logprobs = [sequence.logprobs for sequence in sequences]
    if not batched:
        fields, logprobs = tuple(values[0] for values in fields), logprobs[0]
    elif sequences[0].text is None:
        fields = (fields[0], None, *fields[2:])
    return Generation(*fields, stats=stats, logprobs=None if sequences[0].top_logprobs is None else logprobs)


def _stream_of(stream: Callable, index: int | None) -> Callable[[str], None]:
    return stream if index is None else lambda piece: stream(index, piece)


def check_model(model: Runner) -> None:
    if not all(hasattr(model, name) for name in ("prefill", "verify", "commit", "vocab_size", "context_length")):
        raise TypeError(f"model must be a runner, from pyspec.load or pyspec.from_transformers, got {described(model)}")


def prompts_of(tokens, model: Runner, argument: str = "tokens") -> tuple[bool, list[list[int]]]:
    """Whether tokens, an argument, is a batch, and its prompts."""
    batched, prompts = read_prompts(tokens, model.context_length)
    for number, prompt in enumerate(prompts):
        name = f"{argument}[{number}]" if batched else argument
        if not prompt:
            raise ValueError(f"{name} must not be empty: the prompt gives the model the position to speak from")
        if len(prompt) >= model.context_length:
            raise ValueError(
                f"{name} must leave room in the model's context of {model.context_length} tokens, got {len(prompt)}"
            )
        if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            raise ValueError(
                f"{name} must hold tokens of the model's vocabulary, in [0, {model.vocab_size}), "
                f"got {min(prompt)} to {max(prompt)}"
            )
    return batched, prompts


def check_stream(stream: Callable, model: Runner) -> None:
    if not callable(stream):
        raise TypeError(f"stream must be a function or None, got {described(stream)}")
    if model.tokenizer is None:
        raise ValueError("stream needs text, and this model has no tokenizer")


def stop_strings(stop: str | Iterable[str], model: Runner) -> tuple[str, ...]:
    try:
        strings = (stop,) if isinstance(stop, str) else tuple(stop)
    except TypeError:
        raise TypeError(f"stop must be a string or strings, got {described(stop)}") from None
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop must be strings that are not empty, got {described(string)}")
    if strings and model.tokenizer is None:
        raise ValueError("stop needs text, and this model has no tokenizer")
    return strings


def read_logprobs(logprobs: int | None) -> int | None:
    """Checks a number of likeliest tokens, or None; raises TypeError or ValueError for what is not in [0, 100]."""
    if logprobs is None:
        return None
    logprobs = read_integer("logprobs", logprobs, "an integer or None")
    if not 0 <= logprobs <= MOST_LOGPROBS:
        raise ValueError(f"logprobs must be in [0, {MOST_LOGPROBS}], got {logprobs}")
    return logprobs


def drafter_for(drafter, model: Runner, rule: AcceptanceRule, settings, sampler: Sampler) -> Drafter | None:
    """The drafter of all sequences; raises ValueError for one that does not go with the rule or the cache."""
    shared = drafter_from_name(drafter, model)
    check_laws(shared, rule)
    if settings is not None and getattr(shared, "needs_dense_cache", False):
        raise ValueError(f"cache must be dense for a {type(shared).__name__}, got {settings!r}")
    if rule.siblings is None and rule.law == "exact" and hasattr(shared, "coupled_to"):
        shared = shared.coupled_to(sampler)
    return shared


def cache_settings(cache: str | QuantisedSettings, model: Runner, budget: int | str) -> QuantisedSettings | None:
    """The settings of a cache, None for a dense one; raises ValueError where model or budget do not fit."""
    settings = cache_from_name(cache)
    if settings is None:
        return None
    if not getattr(model, "takes_quantised_cache", False):
        raise ValueError(f"cache must be dense for a {type(model).__name__}, got {cache!r}")
    if not isinstance(budget, str) and budget > settings.largest_tree:
        raise ValueError(f"budget must be at most {settings.largest_tree} nodes with cache {cache!r}, got {budget}")
    return settings


def _check_prefix_memory(memory: int, model: Runner) -> int:
    if read_memory("prefix_memory", memory) and not hasattr(model, "keep_prefixes"):
        raise ValueError(f"prefix_memory must be 0 for a {type(model).__name__}, got {memory}")
    return memory


def check_limits(budget: int | str, max_new_tokens: int) -> tuple[int | str, int]:
    """Checks budget and number of new tokens, as generate takes them; raises TypeError or ValueError for any others."""
    if not (isinstance(budget, str) and budget == "auto"):
        budget = read_integer("budget", budget, 'an integer or "auto"')
    max_new_tokens = read_integer("max_new_tokens", max_new_tokens)
    for name, value, most in (("budget", budget, LARGEST_BUDGET), ("max_new_tokens", max_new_tokens, MOST_NEW_TOKENS)):
        if not isinstance(value, str) and not 1 <= value <= most:
            raise ValueError(f"{name} must be in [1, {most}], got {value}")
    return budget, max_new_tokens
