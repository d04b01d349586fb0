"""cascade: one text of a small and a large model, each of them speculating in what it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pyspec.acceptance.exact import ExactAcceptance
from pyspec.answers import ANSWER_RULES, AnswerRule
from pyspec.controllers import controller_for, read_controller
from pyspec.drafters import Drafter
from pyspec.generate import (
    Generation,
    check_limits,
    check_model,
    check_stream,
    drafter_for,
    generate,
    prompts_of,
    stop_strings,
)
from pyspec.loop import prefill, run_round
from pyspec.runners import Runner
from pyspec.runners.exclusive import exclusive_use
from pyspec.runners.verified import Verified
from pyspec.sampling.sampler import Sampler
from pyspec.sequence import Sequence as TextSequence
from pyspec.sequence import TextStream
from pyspec.stats import Stats, clock_of
from pyspec.tree import Accepted, DraftTree
from pyspec.turns import LARGE, SMALL, TURN_RULES, TurnRule

#: Tokens that a model which sat out reads at once.
CATCH_UP = 64


@dataclass
class Cascade:
    """What cascade gives back.

    Attributes:
        tokens, text, finish_reason, error: as of a Generation.
        turns: (0 for the small model or 1 for the large one, how many tokens it wrote), in order. An answer that the
            large model has replaced is a turn of the small one.
        stats: of the small model and of the large one.
        score: of the small model's answer, where an answer rule has judged it; else None.
    """

    tokens: list[int]
    text: str | None
    finish_reason: str
    error: str | None
    turns: list[tuple[int, int]]
    stats: tuple[Stats, Stats]
    score: float | None = None

    @property
    def large_share(self) -> float:
        """The share of the tokens that the large model wrote."""
        return sum(count for model, count in self.turns if model == LARGE) / max(1, len(self.tokens))


def cascade(
    small: Runner,
    large: Runner,
    tokens,
    *,
    rule: str | TurnRule | AnswerRule = "entropy",
    drafters: Sequence[str | Drafter | None] = ("merged", "merged"),
    budget: int | str = "auto",
    controller: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: str | Iterable[str] = (),
    stream: Callable[[str], None] | None = None,
    **warpers,
) -> Cascade:
    """Continues a prompt with two models of one vocabulary; a rule decides which of them writes.

    A turn rule decides token by token: a model that sat out reads what it missed in chunks when its turn comes. An
    answer rule decides when the small model has answered: the large one answers in its place where that looks bad. A
    token is what the model that wrote it would say by plain decoding, so with one seed the text is the same with any
    drafters and with none.

    Args:
        small, large: runners, from pyspec.load.
        tokens: the token ids of one prompt, as for generate.
        rule: a name of pyspec.turns.TURN_RULES or of pyspec.answers.ANSWER_RULES (docs/cascades.md), or a rule.
        drafters: of the small model and of the large one, as for generate.
        budget, controller, max_new_tokens, temperature, top_p, top_k, seed, stop, stream, warpers: as for generate. An
            answer is streamed when it is certain to stand.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, before any work.
    """
    for model in (small, large):
        check_model(model)
    _check_models(small, large)
    batched, prompts = prompts_of(tokens, large if large.context_length < small.context_length else small)
    if batched:
        raise TypeError("tokens must be one prompt, got a batch")
    stop = stop_strings(stop, large)
    if stream is not None:
        check_stream(stream, large)
    budget, max_new_tokens = check_limits(budget, max_new_tokens)
    controller = read_controller(controller)
    sampler = Sampler(temperature, top_k, top_p, seed, **warpers)
    made = [
        drafter_for(each, model, ExactAcceptance(), None, sampler)
        for model, each in zip((small, large), drafters, strict=True)
    ]
    rule, (prompt,) = _rule_of(rule), prompts
    if hasattr(rule, "defers"):
        settings = {"budget": budget, "controller": controller, "max_new_tokens": max_new_tokens}
        settings |= {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": sampler.seed, "stop": stop}
        return _answer((small, large), prompt, rule, drafters, stream, settings | warpers)
    turns = rule.start(sampler.seed, None if large.tokenizer is None else large.tokenizer.token_bytes, prompt)
    writers = [
        _Writer(model, drafter, budget, controller, sampler.seed)
        for model, drafter in zip((small, large), made, strict=True)
    ]
    text = TextSequence(
        model=large,
        context=list(prompt),
        prompt_length=len(prompt),
        limit=min(len(prompt) + max_new_tokens, small.context_length, large.context_length),
        drafter=None,
        sampler=sampler.start(prompt, large),
        text=None if large.tokenizer is None else TextStream(large.tokenizer, stop),
        stream=stream,
    )
    with exclusive_use(small), exclusive_use(large):
        written = _write(writers, text, _InTurns(turns))
    said = None if text.text is None else text.text.text
    stats = (writers[0].stats, writers[1].stats)
    return Cascade(text.new_tokens, said, text.finish_reason, text.error, written, stats)


def _rule_of(rule: str | TurnRule | AnswerRule) -> TurnRule | AnswerRule:
    """The rule of a name; a rule passes through."""
    if isinstance(rule, str) and rule in ANSWER_RULES:
        return ANSWER_RULES[rule]()
    if isinstance(rule, (str, type)) or not (hasattr(rule, "defers") or hasattr(rule, "next")):
        return TURN_RULES.named("rule", rule, f"{', '.join(ANSWER_RULES)}, or a rule")()
    return rule


def _answer(models, prompt: list[int], rule: AnswerRule, drafters, stream, settings: dict) -> Cascade:
    """The small model's answer where it stands, else the large one's."""
    small, large = models
    first = generate(small, prompt, drafter=drafters[SMALL], logprobs=0, **settings)
    turns, stats = [(SMALL, len(first.tokens))], [first.stats, Stats(seed=first.stats.seed)]
    if not first.tokens or first.finish_reason == "interrupted":
        return _cascade_of(first, turns, stats, None)
    score = rule.score(np.array([each.logprob for each in first.logprobs]))
    if not rule.defers(score):
        if stream is not None and first.text:
            stream(first.text)
        return _cascade_of(first, turns, stats, score)
    second = generate(large, prompt, drafter=drafters[LARGE], stream=stream, **settings)
    return _cascade_of(second, [*turns, (LARGE, len(second.tokens))], [first.stats, second.stats], score)


def _cascade_of(said: Generation, turns: list[tuple[int, int]], stats: list[Stats], score: float | None) -> Cascade:
    return Cascade(said.tokens, said.text, said.finish_reason, said.error, turns, tuple(stats), score)


def _write(writers: list[_Writer], text: TextSequence, rule: _InTurns) -> list[tuple[int, int]]:
    """Writes a text to its end; returns the turns."""
    written = []
    try:
        while text.going:
            active, before = rule.active, len(text.context)
            writers[active].take_turn(text, rule)
            written.append((active, len(text.context) - before))
            writers[active].stats.new_tokens += written[-1][1]
    except KeyboardInterrupt:
        text.finish("interrupted")
    return written


class _Writer:
    """A model with its drafter, its controller and its stats."""

    def __init__(self, model: Runner, drafter: Drafter | None, budget: int | str, controller: str | None, seed: int):
        self.stats = Stats(seed=seed)
        self.stats.clock = clock_of(model)
        self._model, self._drafter, self._has_begun = model, drafter, False
        self._controller = controller_for(budget, controller, model, drafter)

    def take_turn(self, text: TextSequence, rule: _InTurns) -> None:
        """Continues the text until it ends or the turn does."""
        active, text.model = rule.active, self._model
        with self.stats.timed("total"):
            text.drafter = self._drafter
            if not text.new_tokens:
                prefill(self._model, [text], rule, self._controller, None, self.stats)
                self._drafter, self._has_begun = text.drafter, True
            else:
                with self.stats.timed("prefill"):
                    self._catch_up(text)
            while text.going and rule.active == active:
                run_round(self._model, {0: text}, rule, self._controller, self.stats)

    def _catch_up(self, text: TextSequence) -> None:
        """Reads what the other model wrote."""
        if not self._has_begun:
            text.start_drafting()
            self._drafter, self._has_begun = text.drafter, True
            taps = getattr(text.drafter, "taps", None)  # which only some runners take
            self._model.prefill(
                [text.context[: text.prompt_length]],
                capacity=text.limit + max(CATCH_UP, self._controller.largest),
                observe=None if text.drafter is None else lambda slot, chain, verified: self._observe(chain, verified),
                **({} if taps is None else {"taps": taps}),
            )
        missed = text.context[self._model.lengths()[0] : -1]
        for start in range(0, len(missed), CATCH_UP):
            chain = DraftTree.chain(missed[start : start + CATCH_UP])
            verified = self._model.verify({0: chain})[0]
            self._model.commit({0: range(len(chain))})
            self._observe(chain, verified)

    def _observe(self, chain: DraftTree, verified: Verified) -> None:
        if self._drafter is not None:
            self._drafter.observe(chain, verified, range(len(chain)))


class _InTurns:
    """The exact rule, up to the token with which a turn ends."""

    law = "exact"
    siblings = None

    def __init__(self, turns: TurnRule):
        self._turns, self._exact = turns, ExactAcceptance()
        self.active = turns.first

    def accept(self, tree: DraftTree, verified: Verified, sampler: Sampler, position: int) -> Accepted:
        accepted = self._exact.accept(tree, verified, sampler, position)
        for count, (node, token) in enumerate(zip(accepted.path, accepted.tokens(tree), strict=True), start=1):
            active = self._turns.next(token, verified.logits[node].cpu().numpy())
            if active != self.active:
                self.active = active
                return Accepted(accepted.path[:count], token)
        return accepted


def _check_models(small: Runner, large: Runner) -> None:
    """Raises ValueError unless they are two runners of one vocabulary."""
    if small is large:
        raise ValueError("small and large must be two runners, got one: use fork() for another on the same weights")
    named = [getattr(model.tokenizer, "fingerprint", None) for model in (small, large)]
    if small.vocab_size != large.vocab_size or (None not in named and named[0] != named[1]):
        raise ValueError(
            f"small and large must have one vocabulary, got {small.vocab_size} tokens ({named[0]}) and "
            f"{large.vocab_size} ({named[1]})"
        )
