"""generate: what model.generate(custom_generate=...) calls in place of transformers' own loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from pyspec.acceptance import check_laws
from pyspec.acceptance.exact import ExactAcceptance
from pyspec.architectures import Unsupported
from pyspec.checkpoints import from_transformers
from pyspec.checkpoints.load import config_of
from pyspec.controllers import Controller, controller_for, read_controller
from pyspec.drafters import Drafter, drafter_from_name
from pyspec.generate import check_limits
from pyspec.loop import speculate
from pyspec.runners import Runner
from pyspec.runners.exclusive import lock_of
from pyspec.runners.foreign import TransformersRunner
from pyspec.runners.verified import Verified
from pyspec.sampling.sampler import Sampler
from pyspec.sequence import Sequence
from pyspec.stats import Stats
from pyspec.tree import Accepted, DraftTree

# Options of a generation config that would be lost here, and the values that ask for nothing.
_REFUSED = {
    "num_beams": (None, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "use_cache": (None, True),
    "cache_implementation": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "compile_config": (None,),
}
# Processors that know which row of the batch they are given; those that are not of transformers may know it too.
_BATCH_PROCESSORS = ("PrefixConstrained", "RepetitionPenalty", "EncoderRepetitionPenalty", "EncoderNoRepeatNGram")
# Those that look at earlier calls.
_STATEFUL_PROCESSORS = ("UnbatchedClassifierFreeGuidance", "ClassifierFreeGuidance", "SynthIDTextWatermark", "Whisper")


class _Runners(dict):
    """Runners of a model, which a copy of it, or a pickle, begins without."""

    def __reduce__(self):
        return _Runners, ()


def runner_of(model, native: bool = False) -> Runner:
    """The runner that reads a live model; made once, and kept with the model.

    Models with a cache of keys run as they are, through their own forward. Others (Mamba, Mamba-2), and with native
    all of them, run in our kernels, on a copy of their weights as they are at the first call.

    Raises:
        ValueError: the model cannot be read so; the message names its family.
    """
    with lock_of(model):
        kept = vars(model).setdefault("_pyspec_runners", _Runners())
        if native not in kept:
            kept[native] = _native_runner(model) if native else _runner(model)
        return kept[native]


def _runner(model) -> Runner:
    try:
        return TransformersRunner(model)
    except ValueError:
        return runner_of(model, native=True)


def _native_runner(model) -> Runner:
    try:
        config_of(model)
    except Unsupported as reason:
        raise ValueError(f"native must be False: pyspec has no kernels for {type(model).__name__}: {reason}") from None
    return from_transformers(model)


@torch.inference_mode()
def generate(
    model,
    input_ids: Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    *,
    drafter: str | Drafter | None = "merged",
    budget: int | str = "auto",
    controller: str | Controller | None = None,
    native: bool = False,
    stream=None,
    synced_gpus: bool = False,
    **model_kwargs,
):
    """transformers' generate, speculated: give it as custom_generate::

        model.generate(**inputs, custom_generate=generate, drafter="merged", budget=16, max_new_tokens=128)

    Greedy texts are those of the model's own generate but for near ties, because a tree is other arithmetic to it than
    a token; sampled texts follow the same law. Logits processors and stopping criteria see tokens one by one, as usual,
    and batches are padded on the left.

    Args:
        drafter, budget, controller: as for pyspec.generate.
        native: run the model in pyspec's kernels, on a copy of its weights, instead of its own forward: the Llama
            family, and state space models, which always do. On a CPU that is several times as fast.
        stream: a streamer of transformers, or a function of the new tokens; one sequence only. transformers does not
            pass its own `streamer` on to a custom_generate, and does not say so.

    Returns:
        [B, L] token ids with the prompts, or a GenerateDecoderOnlyOutput where return_dict_in_generate asks for it; its
        scores and logits where asked for. It holds no cache.

    Raises:
        ValueError: the call asks for what is not honoured here (beams, attentions, a cache of the caller's, processors
            that keep state), naming it; or the model is not supported.
    """
    _check_call(generation_config, logits_processor)
    _check_inputs(model, input_ids, model_kwargs)
    budget, _ = check_limits(budget, 1)
    controller = read_controller(controller)
    if stream is not None and len(input_ids) > 1:
        raise ValueError(f"stream takes one sequence, got {len(input_ids)}")
    prompts = _without_padding(input_ids, model_kwargs.get("attention_mask"))
    runner = runner_of(model, native)
    if max(map(len, prompts)) >= runner.context_length:
        raise ValueError(f"input_ids must leave room in the context of {runner.context_length}, got {input_ids.shape}")
    shared_drafter = drafter_from_name(drafter, runner)
    check_laws(shared_drafter, ExactAcceptance())
    controller = controller_for(budget, controller, runner, shared_drafter)
    keeps = _Kept.asked_for(generation_config)
    rows = [
        _Row(
            model=runner,
            context=prompt,
            prompt_length=len(prompt),
            limit=min(generation_config.max_length - input_ids.shape[1] + len(prompt), runner.context_length),
            drafter=shared_drafter,
            sampler=_RowSampler(input_ids.cpu(), number, logits_processor, generation_config.do_sample, keeps()),
            criteria=stopping_criteria,
            put=getattr(stream, "put", stream),
        )
        for number, prompt in enumerate(prompts)
    ]
    if stream is not None and hasattr(stream, "put"):
        stream.put(input_ids.cpu())  # streamers take the prompt first, and skip it if told so
    speculate(runner, rows, ExactAcceptance(), controller=controller, cache=None, stats=Stats(seed=0))
    if stream is not None and hasattr(stream, "end"):
        stream.end()
    for number, row in enumerate(rows):
        if row.error is not None:
            warnings.warn(f"sequence {number} ends early: {row.error}", stacklevel=2)
    return _output(input_ids, rows, generation_config)


# ==== the call ====


def _check_call(config, processors) -> None:
    for name, nothing in _REFUSED.items():
        if getattr(config, name, None) not in nothing:
            raise ValueError(f"{name} must be {nothing[-1]} with pyspec's generate, got {getattr(config, name)!r}")
    for processor in processors:
        name = type(processor).__name__
        if name.startswith(_STATEFUL_PROCESSORS):
            raise ValueError(f"{name} keeps state from token to token, which a rejected draft would spoil")


def _check_inputs(model, input_ids: Tensor, inputs: dict) -> None:
    """Raises ValueError for inputs beside token ids and padding, and for a cache of the caller's.

    How transformers names what it prepares itself changes between versions. So it is asked what it makes of these
    tokens, and inputs are compared with that: its own are the same.
    """
    if model.config.is_encoder_decoder or not input_ids.shape[1]:
        raise ValueError(
            f"{'encoder_outputs' if model.config.is_encoder_decoder else 'inputs_embeds'} is not taken by pyspec's "
            "generate, which reads token ids alone"
        )
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(input_ids)
    own = None
    for name, value in inputs.items():
        if name == "attention_mask" or _is_nothing(value):
            continue
        if isinstance(value, Cache):
            _check_fresh(name, value)
            continue
        if own is None:
            own = _prepared(model, input_ids, {"attention_mask": mask} if "attention_mask" in inputs else {})
        if not (name in own and _equal(value, own[name])) and not _marks_nothing(model, input_ids, name, value):
            raise ValueError(
                f"{name} is not taken by pyspec's generate, which reads token ids and padding on their left alone"
            )


def _prepared(model, input_ids: Tensor, mask: dict) -> dict:
    """The inputs that transformers makes of token ids and their mask by itself."""
    config = GenerationConfig(max_length=input_ids.shape[1] + 1, pad_token_id=0)
    return model.generate(input_ids, generation_config=config, custom_generate=lambda *_, **inputs: inputs, **mask)


def _is_nothing(value) -> bool:
    """Whether an input says nothing: None, False, or a container of nothing else."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return all(map(_is_nothing, value))
    return value is None or value is False


def _equal(value, own) -> bool:
    if isinstance(value, Tensor) or isinstance(own, Tensor):
        return isinstance(value, Tensor) and isinstance(own, Tensor) and torch.equal(value.to(own.device), own)
    return type(value) is type(own) and value == own


def _marks_nothing(model, input_ids: Tensor, name: str, value) -> bool:
    """Whether an input is a zero for each token, which tokenizers add, and the model reads it as it reads none."""
    if not isinstance(value, Tensor) or value.shape != input_ids.shape or value.any():
        return False
    some = slice(0, 1), slice(-8, None)
    marked, plain = (
        model(input_ids=input_ids[some].to(model.device), use_cache=False, **marks).logits.float()
        for marks in ({name: value[some].to(model.device)}, {})
    )
    return torch.allclose(marked, plain, rtol=1e-2, atol=1e-3 * float(plain.abs().max()))


def _check_fresh(name: str, cache: Cache) -> None:
    """Raises ValueError unless a cache is one that transformers has just made: of its own kind, unmarked and empty."""
    is_own = type(cache).__module__.startswith("transformers.") and not getattr(cache, "_is_user_defined", False)
    held = tree_leaves([vars(cache), *map(vars, getattr(cache, "layers", ()))])
    if not is_own or any(isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() for leaf in held):
        raise ValueError(
            f"a cache such as past_key_values must not be given, got {name}={type(cache).__name__}(...): pyspec's "
            "generate reads the whole text into a cache of its own"
        )


def _without_padding(input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The prompts, what is masked on their left left out."""
    if mask is None:
        return input_ids.tolist()
    mask = mask.cpu().bool()
    if mask.shape != input_ids.shape or not mask[:, -1].all() or (mask[:, 1:] < mask[:, :-1]).any():
        raise ValueError("attention_mask must be [B, L] and mask nothing but padding on the left")
    return [row[seen].tolist() for row, seen in zip(input_ids.cpu(), mask, strict=True)]


# ==== one sequence ====


@dataclass
class _Kept:
    """Rows of scores and logits for the output, None where they are not asked for."""

    scores: list[Tensor] | None
    logits: list[Tensor] | None

    @staticmethod
    def asked_for(config) -> Callable[[], _Kept]:
        scores = config.return_dict_in_generate and config.output_scores
        logits = config.return_dict_in_generate and config.output_logits
        return lambda: _Kept([] if scores else None, [] if logits else None)


class _RowSampler:
    """Draws a sequence's tokens from logits as its processors leave them.

    Noise comes from a seed that torch's generator gives (so torch.manual_seed decides), one for each sequence, or the
    copies of one prompt would say the same.
    """

    def __init__(self, input_ids: Tensor, row: int, processors, do_sample: bool, kept: _Kept):
        seed = int(torch.randint(2**62, (), device="cpu"))
        self._noise = Sampler(1.0 if do_sample else 0.0, seed=seed)
        self._processors = processors
        self._batch, self._row = (len(input_ids), row) if _know_their_row(processors) else (1, 0)
        self.ids = input_ids[row]  # with the padding: processors see it in transformers too
        self.kept = kept

    def draws(self, tree: DraftTree, verified: Verified) -> Callable[[int, int], int]:
        """A function of (node, position); nodes are asked for along a path, root first."""
        logits, path = verified.logits, []

        def draw(node: int, position: int) -> int:
            ids = torch.cat([self.ids, self.ids.new_tensor(path)]).to(logits.device)
            # a batch of copies, of which only this sequence's row counts
            scores = self._processors(ids.repeat(self._batch, 1), logits[node].repeat(self._batch, 1))[self._row]
            token = self._noise.draw(scores.float(), position)
            path.append(token)
            if self.kept.scores is not None:
                self.kept.scores.append(scores)
            if self.kept.logits is not None:
                self.kept.logits.append(logits[node].clone())
            return token

        return draw

    def extend(self, accepted: Accepted) -> None:
        """The text goes on in `ids`, token by token."""

    def forced(self, most: int) -> list[int]:
        """Processors don't tell what they force."""
        return []


def _know_their_row(processors) -> bool:
    names = [(type(processor).__module__, type(processor).__name__) for processor in processors]
    return any(
        name.startswith(_BATCH_PROCESSORS) or module != "transformers.generation.logits_process"
        for module, name in names
    )


@dataclass
class _Row(Sequence):
    """A sequence that ends where the stopping criteria say so."""

    criteria: Callable = field(kw_only=True)
    put: Callable[[Tensor], None] | None = None

    def _read(self, token: int) -> None:
        self.sampler.ids = torch.cat([self.sampler.ids, self.sampler.ids.new_tensor([token])])
        if self.put is not None:
            self.put(torch.tensor([token], device="cpu"))
        if self._ends():
            self.finish("stopped")

    def _ends(self) -> bool:
        kept, new = self.sampler.kept.scores, len(self.new_tokens)
        scores = None if kept is None else tuple(row[None] for row in kept[:new])
        return bool(self.criteria(self.sampler.ids[None].to(self.model.device), scores)[0])


# ==== the output ====


def _output(input_ids: Tensor, rows: list[_Row], config):
    longest = max(len(row.new_tokens) for row in rows)
    pad = getattr(config, "_pad_token_tensor", None)
    pad = 0 if pad is None else int(pad)
    new = [row.new_tokens + [pad] * (longest - len(row.new_tokens)) for row in rows]
    sequences = torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(
        sequences=sequences, scores=_steps(rows, "scores", longest), logits=_steps(rows, "logits", longest)
    )


def _steps(rows: list[_Row], name: str, longest: int) -> tuple[Tensor, ...] | None:
    """A [B, V] tensor for each new token; zeros where a sequence has ended."""
    kept = [getattr(row.sampler.kept, name) for row in rows]
    if kept[0] is None:
        return None
    kept = [vectors[: len(row.new_tokens)] for vectors, row in zip(kept, rows, strict=True)]
    nothing = torch.zeros_like(next(vectors[0] for vectors in kept if vectors))
    return tuple(
        torch.stack([vectors[step] if step < len(vectors) else nothing for vectors in kept]) for step in range(longest)
    )
