"""The engines of the benchmarks: pyspec, and what one would use instead, on the same weights and token ids."""

from __future__ import annotations

import ctypes
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from pyspec import measure
from pyspec.checkpoints.sources import demo_file
from pyspec.drafters import new_drafter
from pyspec.generate import generate
from pyspec.runners.attention import LlamaRunner
from pyspec.stats import PHASES

LOOKUP_TOKENS = 10  # drafts of the peers' prompt lookup
DRAFTERS = ("merged", "lookup", "recycling")


@dataclass
class Run:
    """One prompt, continued by one engine. Decoding begins when the prefill has given its token."""

    tokens: list[int]  # new tokens, the end token included
    total_seconds: float
    decode_seconds: float
    decode_tokens: int  # new tokens without those that came with the prefill
    rounds: int  # calls of the model in decoding
    phase_seconds: dict[str, float] = field(default_factory=dict)  # pyspec's own


class Engine(Protocol):
    def restart(self) -> None:
        """Forgets what earlier prompts taught."""
        ...

    def run(self, prompt: list[int], new_tokens: int) -> Run:
        """Continues a prompt greedily, up to the end token or new_tokens."""
        ...


class Pyspec:
    """pyspec.generate; a drafter keeps what it learns from prompt to prompt, as in a server."""

    def __init__(self, model: LlamaRunner, drafter: str | None, budget: int | str):
        self._model, self._name, self._budget = model, drafter, budget
        self.restart()

    def restart(self) -> None:
        # made here, because a drafter that generate looks up by its name already knows the warm-up's prompt
        self._drafter = None if self._name is None else new_drafter(self._name, self._model)

    def run(self, prompt: list[int], new_tokens: int) -> Run:
        start = time.perf_counter()
        generation = generate(
            self._model, prompt, drafter=self._drafter, budget=self._budget, max_new_tokens=new_tokens
        )
        total = time.perf_counter() - start
        if generation.finish_reason == "interrupted":
            raise KeyboardInterrupt
        if generation.error is not None:
            raise RuntimeError(generation.error)
        stats = generation.stats
        return Run(
            tokens=generation.tokens,
            total_seconds=total,
            decode_seconds=stats.decode_seconds,
            decode_tokens=len(generation.tokens) - 1,
            rounds=stats.rounds,
            phase_seconds={phase: getattr(stats, f"{phase}_seconds") for phase in PHASES},
        )


class Transformers:
    """transformers' generate on a dense model of the same weights.

    settings: of its generate, such as prompt_lookup_num_tokens, or our custom_generate.
    """

    def __init__(self, dense_model, eos_tokens: Sequence[int], **settings):
        self._model = dense_model
        ends = {"eos_token_id": sorted(eos_tokens), "pad_token_id": min(eos_tokens)}
        self._settings = {"do_sample": False, **ends, **settings}

    def restart(self) -> None:
        pass

    def run(self, prompt: list[int], new_tokens: int) -> Run:
        ends: list[tuple[float, int]] = []  # of each stop for new tokens: when, and tokens so far
        calls = 0

        def count(*_):
            nonlocal calls
            calls += 1

        def clock(input_ids, scores, **_):
            if input_ids.is_cuda:
                torch.cuda.synchronize()
            ends.append((time.perf_counter(), input_ids.shape[1]))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        input_ids = torch.tensor([prompt], device=self._model.device)
        counting = self._model.register_forward_hook(count)
        start = time.perf_counter()
        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new_tokens,
            stopping_criteria=[clock],
            **self._settings,
        )
        end = time.perf_counter()
        counting.remove()
        first_time, first_length = ends[0]
        return Run(
            tokens=output[0, len(prompt) :].tolist(),
            total_seconds=end - start,
            decode_seconds=end - first_time,
            decode_tokens=output.shape[1] - first_length,
            rounds=calls - 1,
        )


class LlamaCpp:
    """llama.cpp through llama-cpp-python's generate: alone, with its own prompt lookup, or with our drafter."""

    def __init__(self, file: Path, context: int, eos_tokens: Sequence[int], threads: int, drafts: str | None = None):
        import llama_cpp

        self._eos_tokens = eos_tokens
        self._llama = llama_cpp.Llama(
            str(file),
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=drafts is not None,  # drafts are verified by them
            verbose=False,
        )
        self._calls = 0
        if drafts is not None:
            self._llama.draft_model = self._counting(self._draft_model(drafts))

    def _draft_model(self, drafts: str):
        """Our drafter of a name, or the engine's own prompt lookup for "own lookup"."""
        if drafts == "own lookup":
            from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

            return LlamaPromptLookupDecoding(num_pred_tokens=LOOKUP_TOKENS)
        from pyspec.integrations.llama_cpp import speculate

        return speculate(self._llama, drafts)

    def _counting(self, draft_model):
        """The draft model, its calls counted: one before each call of the model."""

        def draft(input_ids, /, **settings):
            self._calls += 1
            return draft_model(input_ids, **settings)

        return draft

    def restart(self) -> None:
        pass

    def run(self, prompt: list[int], new_tokens: int) -> Run:
        self._llama.reset()  # or the cached template of the prompt before would shorten the prefill
        self._calls = 0
        tokens: list[int] = []
        start = time.perf_counter()
        for token in self._llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
            if not tokens:
                first = time.perf_counter()
            tokens.append(token)
            if len(tokens) == new_tokens or token in self._eos_tokens:
                break
        end = time.perf_counter()
        return Run(
            tokens=tokens,
            total_seconds=end - start,
            decode_seconds=end - first,
            decode_tokens=len(tokens) - 1,
            rounds=self._calls or len(tokens) - 1,
        )


def engines(
    model: LlamaRunner,
    drafters: Sequence[str],
    budget: int | str,
    context: int,
    threads: int,
    is_demo: bool = True,
) -> tuple[dict[str, Engine], dict[str, str]]:
    """All engines by name, and the reasons for those that are missing.

    Args:
        model: its weights, dtype and device are what the peers get.
        drafters: pyspec's, each beside plain decoding.
        budget: tree nodes a round, or a controller's name.
        context: tokens that the longest prompt and its continuation need, drafts included. Kernels are compiled and
            graphs captured for them here.
        threads: of llama.cpp; torch's are a setting of the process.
        is_demo: whether model is the demo model on the CPU, which llama.cpp is asked for.
    """
    model.warm(context)
    found: dict[str, Engine] = {"pyspec plain": Pyspec(model, None, budget)}
    found |= {f"pyspec {name}": Pyspec(model, name, budget) for name in drafters}
    missing: dict[str, str] = {}
    peers = {"transformers": lambda: _transformers_engines(model, context)}
    if is_demo:
        peers["llama.cpp"] = lambda: _llama_cpp_engines(model, context, threads)
    for name, make in peers.items():
        try:
            found |= make()
        except Exception as error:  # a peer that cannot run is a result too
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing


def _transformers_engines(model: LlamaRunner, context: int) -> dict[str, Engine]:
    if model.weight_dtype == torch.int8:
        raise ValueError("transformers has no int8 weights for the CPU")
    from pyspec.integrations.transformers import generate as speculated
    from pyspec.integrations.transformers.generation import runner_of

    dense_model, ends = dense_transformers(model), model.eos_tokens
    runner_of(dense_model, native=True).warm(context)
    return {
        "transformers": Transformers(dense_model, ends),
        "transformers lookup": Transformers(dense_model, ends, prompt_lookup_num_tokens=LOOKUP_TOKENS),
        "transformers pyspec": Transformers(dense_model, ends, custom_generate=speculated),
        "transformers native": Transformers(dense_model, ends, custom_generate=speculated, native=True),
    }


def _llama_cpp_engines(model: LlamaRunner, context: int, threads: int) -> dict[str, Engine]:
    settings = (llama_cpp_file(model.weight_dtype), context, model.eos_tokens, threads)
    return {
        "llama.cpp": LlamaCpp(*settings),
        "llama.cpp lookup": LlamaCpp(*settings, "own lookup"),
        "llama.cpp pyspec": LlamaCpp(*settings, "merged"),
    }


def dense_transformers(model: LlamaRunner):
    """transformers' own Llama model with a copy of a runner's weights, in its dtype.

    transformers would load the GGUF file too, but keeps its weights packed, which is another precision and slower.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    if config.architecture != "llama" or config.rope_scaling is not None:
        raise ValueError(f"only a llama model without rope scaling is described here, got {config}")
    description = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context_length,
        rms_norm_eps=config.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        attention_bias=config.qkv_bias,
        tie_word_embeddings=config.tied_embedding,
        dtype=model.dtype,
    )
    dense_model = LlamaForCausalLM(description).to(model.device, model.dtype).eval()
    result = dense_model.load_state_dict(model.weights.named(config), strict=False)
    # the one tensor that a checkpoint may leave out is the head that is the embedding itself
    if result.unexpected_keys or set(result.missing_keys) - ({"lm_head.weight"} if config.tied_embedding else set()):
        raise ValueError(f"the weights do not fit transformers' Llama model: {result}")
    return dense_model


@torch.inference_mode()
def logits_along(dense_model, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """[len(tokens), V] fp32: a transformers model's logits for each of the tokens, given all that come before it."""
    input_ids = torch.tensor([[*prompt, *tokens[:-1]]], device=dense_model.device)
    return dense_model(input_ids, use_cache=False, logits_to_keep=len(tokens)).logits[0].float()


def llama_cpp_file(dtype: torch.dtype) -> Path:
    """The demo model requantised by llama.cpp to dtype, made once and kept in the user's cache."""
    import llama_cpp

    kinds = {
        torch.bfloat16: llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
        torch.float32: llama_cpp.LLAMA_FTYPE_ALL_F32,
        torch.int8: llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    }
    if dtype not in kinds:
        raise ValueError(f"llama.cpp is asked for bfloat16, float32 or int8, got {dtype}")
    source = demo_file()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyspec"
    file = cache / f"{source.stem}.{measure.name_of(dtype)}.gguf"
    if file.exists():
        return file
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.allow_requantize = True
    parameters.ftype = kinds[dtype]
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # it prints a line for every tensor
    try:
        failed = llama_cpp.llama_model_quantize(
            str(source).encode(), str(unfinished).encode(), ctypes.byref(parameters)
        )
        if failed:
            raise RuntimeError(f"llama.cpp could not requantise {source}: error {failed}")
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    return file
