"""TransformersRunner: any other Hugging Face causal model that keeps keys and values of all tokens.

The arithmetic is transformers' own: the law of the output is exact, its bits are not promised.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pyspec.models._checks import check_paths, check_prompts, check_trees
from pyspec.models._inference import inference
from pyspec.trees import DraftTree

__all__ = ["TransformersRunner", "eos_tokens_of", "load_folder"]

PREFILL_CHUNK = 256
SUPPORTED = (
    "supported are LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, MambaForCausalLM and Mamba2ForCausalLM "
    "(pyspec.load, pyspec.models.from_transformers), and through transformers the causal models with explicit "
    "positions that keep the keys and values of all tokens, such as GPT2LMHeadModel, GPTNeoXForCausalLM, "
    "OPTForCausalLM, PhiForCausalLM and Qwen3ForCausalLM"
)


class TransformersRunner:
    """A causal model of transformers with a cache of its own; see pyspec.models.Runner for the calls.

    Sequence b's committed keys are at slots 0 .. length - 1 of its row. All trees of a verify are written behind the
    longest sequence, and what is accepted moves to its place.

    Args:
        model: a transformers model with a language modelling head; it is put in eval mode.
        tokenizer: a pyspec.models.tokenizer.Tokenizer, a fast tokenizer of transformers, or None.
        eos_tokens: tokens that end a text, beside those that the model and the tokenizer name.

    Raises:
        ValueError: the model has state that cannot be cropped, or does not look where a mask tells it.
    """

    def __init__(self, model, tokenizer=None, eos_tokens: Sequence[int] = ()):
        from pyspec.models.tokenizer import Tokenizer

        _check_supported(type(model), model.config)
        if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
            tokenizer = Tokenizer.from_transformers(tokenizer)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.eos_tokens = eos_tokens_of(model, tokenizer) | frozenset(eos_tokens)
        self.vocab_size = model.get_output_embeddings().weight.shape[0]
        self.context_length = getattr(model.config, "max_position_embeddings", None) or 2048
        self.device, self.dtype = model.device, model.dtype
        description = model.config.to_json_string() + (tokenizer.fingerprint if tokenizer else "")
        self.fingerprint = f"{model.config.model_type}-{hashlib.sha256(description.encode()).hexdigest()[:16]}"
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._slots: _Slots | None = None
        self._lengths: list[int] = []
        self._verified: list[DraftTree | None] | None = None
        self._check_obeys_mask()

    def lengths(self) -> list[int]:
        """Committed tokens of each sequence."""
        return list(self._lengths)

    @inference
    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        capacity: int | None = None,
        observe: Callable[[int, DraftTree, Tensor], None] | None = None,
    ) -> list[Tensor]:
        """Starts a new batch from its prompts; returns the [V] fp32 logits after each prompt.

        Args:
            tokens: B prompts, none empty nor longer than the context.
            capacity: cache slots of a sequence: prompt, new tokens and one tree; the context length by default.
            observe: called with (sequence, chain, [n, V] logits) for each chunk of a prompt.

        Raises:
            ValueError: a prompt or the capacity does not fit; the batch before it is then untouched.
        """
        tokens = check_prompts(tokens, self.vocab_size, self.context_length, capacity)
        capacity = self.context_length if capacity is None else capacity
        self._slots = self._verified = None  # the old batch makes room for the new one
        self._slots = _Slots(len(tokens), capacity)
        self._lengths = [0] * len(tokens)
        last_logits = []
        for sequence, prompt in enumerate(tokens):
            for start in range(0, len(prompt), PREFILL_CHUNK):
                chunk = DraftTree.chain(prompt[start : start + PREFILL_CHUNK])
                logits = self._forward([sequence], [chunk], 0 if observe else 1)[0]
                self._lengths[sequence] += len(chunk)
                if observe is not None:
                    observe(sequence, chunk, logits)
            last_logits.append(logits[-1])
        return last_logits

    @inference
    def verify(self, trees: Sequence[DraftTree | None]) -> list[Tensor | None]:
        """[T, V] fp32 logits of every node of each sequence's tree; None marks a sequence that sits out.

        Raises:
            RuntimeError: before any prefill.
            ValueError: a tree has tokens outside of the vocabulary, or does not fit the capacity or the context.
        """
        check_trees(trees, None if self._slots is None else len(self._lengths), self.vocab_size)
        active = [sequence for sequence, tree in enumerate(trees) if tree is not None]
        results: list[Tensor | None] = [None] * len(trees)
        if active:
            for sequence in active:
                deepest = self._lengths[sequence] + int(trees[sequence].depths.max())
                if deepest >= self.context_length:
                    raise ValueError(
                        f"trees[{sequence}] reaches position {deepest}, the model's context is {self.context_length}"
                    )
            rows = range(active[0], active[-1] + 1)
            for sequence, logits in zip(rows, self._forward(rows, [trees[row] for row in rows]), strict=True):
                results[sequence] = logits
        self._verified = list(trees)
        return results

    @inference
    def commit(self, paths: Sequence[Sequence[int] | None]) -> None:
        """Makes a path of the last verified tree (node indices from the root, root included) state.

        Raises:
            RuntimeError: there is no verified tree.
            ValueError: a path does not follow its tree; nothing is committed then.
        """
        check_paths(paths, self._verified)
        self._verified = None
        for sequence, path in enumerate(paths):
            if path is not None:
                self._slots.move(sequence, path, self._lengths[sequence])
                self._lengths[sequence] += len(path)

    def _forward(self, rows: Sequence[int], trees: Sequence[DraftTree | None], keep: int = 0) -> list[Tensor | None]:
        """[T, V] fp32 logits for the trees of neighbouring rows, of their last `keep` nodes unless it is 0."""
        lengths = [self._lengths[row] for row in rows]
        start, nodes = max(lengths), max(len(tree) for tree in trees if tree is not None)
        if start + nodes > self._slots.capacity:
            raise ValueError(
                f"trees of {nodes} nodes need slots up to {start + nodes}, capacity is {self._slots.capacity}: "
                "prefill with a larger one"
            )
        tokens = torch.zeros(len(rows), nodes, dtype=torch.int64, device="cpu")
        positions = torch.zeros(len(rows), nodes, dtype=torch.int64, device="cpu")
        visible = torch.zeros(len(rows), 1, nodes, start + nodes, dtype=torch.bool, device="cpu")
        index = torch.arange(nodes, device="cpu")
        for row, (tree, length) in enumerate(zip(trees, lengths, strict=True)):
            if tree is None:
                continue
            size = len(tree)
            tokens[row, :size] = tree.tokens
            positions[row, :size] = tree.depths + length
            visible[row, 0, :size, :length] = True
            bits = tree.ancestor_bits[:, index[:size] // 32] >> (index[:size] % 32)
            visible[row, 0, :size, start : start + size] = (bits & 1).bool()
        mask = torch.zeros(visible.shape, dtype=self.dtype, device="cpu").masked_fill_(
            ~visible, torch.finfo(self.dtype).min
        )
        self._slots.rows, self._slots.start = slice(rows[0], rows[-1] + 1), start
        with self._own_device():
            logits = self.model(
                input_ids=tokens.to(self.device),
                attention_mask=mask.to(self.device),
                position_ids=positions.to(self.device),
                past_key_values=self._slots.cache,
                use_cache=True,
                **({"logits_to_keep": keep} if keep and self._keeps_logits else {}),
            ).logits.float()
        return [None if tree is None else logits[row, : len(tree)] for row, tree in enumerate(trees)]

    def _own_device(self):
        """Keeps the caller's default device from tensors that a model makes without naming one."""
        others = torch.get_default_device().type not in ("cpu", self.device.type)
        return torch.device(self.device) if others else contextlib.nullcontext()

    def _check_obeys_mask(self) -> None:
        """Raises ValueError if a node of a tree does not see exactly its ancestors, at its own position."""
        first, second, third, other = (token % self.vocab_size for token in (11, 22, 33, 44))
        expected, changed = (self._last_logits([first, token, second, third]) for token in (second, other))
        self.prefill([[first]], capacity=8)
        # the path root - 2 - 3 is the same text; node 1 is beside it
        in_tree = self.verify([DraftTree([second, other, second, third], [-1, 0, 0, 2])])[0][3]
        # another token in the text is the measure of what a token that is not in it may change
        scale = (changed - expected).abs().mean()
        self._slots = self._verified = None
        self._lengths = []
        if not (in_tree - expected).abs().mean() <= 0.25 * scale:
            raise ValueError(
                f"{type(self.model).__name__} is not supported: it does not attend as its attention mask and "
                f"position_ids tell; {SUPPORTED}"
            )

    def _last_logits(self, tokens: list[int]) -> Tensor:
        return self.prefill([tokens], capacity=8)[0]


def eos_tokens_of(model, tokenizer) -> frozenset[int]:
    """Tokens that end a text, by a live model's generation config and the tokenizer."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    named = named if isinstance(named, list) else [] if named is None else [named]
    return frozenset([*named, *(tokenizer.eos_tokens if tokenizer else ())])


class _Slots:
    """Keys and values of all layers, each [B, H, capacity, D], made when a layer first writes.

    `rows` and `start` say where the next forward writes; it then sees the slots before and its own.
    """

    def __init__(self, sequences: int, capacity: int):
        from transformers.cache_utils import Cache

        self.sequences = sequences
        self.capacity = capacity
        self.rows = slice(0, sequences)
        self.start = 0
        layer_class = _layer_class()
        self.cache = Cache(layer_class_to_replicate=lambda: layer_class(self))

    def move(self, sequence: int, path: Sequence[int], length: int) -> None:
        """Moves the slots start + path[j] of a sequence to length + j, in all layers."""
        if length == self.start and list(path) == list(range(len(path))):
            return
        source = self.start + torch.tensor(path, device="cpu")
        for layer in self.cache.layers:
            for slots in (layer.keys, layer.values):
                slots[sequence, :, length : length + len(path)] = slots[sequence, :, source.to(slots.device)]


def _layer_class() -> type:
    """A cache layer that writes into the slots; defined on first use because its base is in transformers."""
    from transformers.cache_utils import DynamicLayer

    class SlotLayer(DynamicLayer):
        def __init__(self, slots: _Slots):
            super().__init__()
            self._slots = slots

        def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
            slots = self._slots
            if not self.is_initialized:
                self.keys, self.values = (
                    states.new_zeros(slots.sequences, states.shape[1], slots.capacity, states.shape[3])
                    for states in (key_states, value_states)
                )
                self.dtype, self.device = key_states.dtype, key_states.device
                self.is_initialized = True
            end = slots.start + key_states.shape[2]
            for all_slots, states in ((self.keys, key_states), (self.values, value_states)):
                all_slots[slots.rows, :, slots.start : end] = states
            return self.keys[slots.rows, :, :end], self.values[slots.rows, :, :end]

        def get_seq_length(self, *args) -> int:
            return self._slots.start

        def get_mask_sizes(self, query_length, *args) -> tuple[int, int]:
            # transformers 4 passes the positions instead of their number
            query_length = query_length if isinstance(query_length, int) else len(query_length)
            return self._slots.start + query_length, 0

    return SlotLayer


def _check_supported(model_class: type, config) -> None:
    """Raises ValueError for models whose state cannot be cropped, or that do not take masks and positions."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    def refuse(reason: str):
        raise ValueError(f"{model_class.__name__} is not supported: {reason}; {SUPPORTED}")

    if getattr(config, "is_encoder_decoder", False):
        refuse("it has an encoder")
    if getattr(model_class, "_is_stateful", False):
        refuse("it keeps a recurrent state, which cannot be cropped after a rejection")
    if "position_ids" not in inspect.signature(model_class.forward).parameters or getattr(config, "alibi", False):
        refuse("its positions cannot be given, they follow from the order of the tokens")
    layers = DynamicCache(config=config).layers
    if any(type(layer) is not DynamicLayer for layer in layers) or "local" in getattr(config, "attention_layers", ()):
        refuse("it has layers that do not keep the keys of all tokens (sliding window, local or linear attention)")


def load_folder(
    folder: Path, description: dict, dtype: torch.dtype, device: torch.device, reason: str
) -> TransformersRunner:
    """A runner for a Hugging Face folder that LlamaRunner does not support, for the reason given.

    Raises:
        ValueError: the architecture is not supported, or the files are corrupt or incomplete.
    """
    try:
        import transformers
    except ImportError:
        raise ImportError(f"{reason}; other models need transformers: pip install pyspec-kernels[hf]") from None
    from pyspec.models.loading import eos_tokens
    from pyspec.models.tokenizer import Tokenizer

    architecture = (description.get("architectures") or [None])[0]
    model_class = getattr(transformers, str(architecture), None)
    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if model_class is None or architecture not in causal:
        raise ValueError(f"{folder} has architecture {architecture}, which is not supported; {SUPPORTED}")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        _check_supported(model_class, config)
        tokenizer = Tokenizer.from_folder(folder)
        with torch.device("cpu"):  # the caller's default device may have no memory, or too little
            options = {"dtype": dtype, "output_loading_info": True, "use_safetensors": True}
            model, report = model_class.from_pretrained(folder, **options)
    except (OSError, RuntimeError, KeyError, _safetensor_error()) as error:
        raise ValueError(f"{folder} cannot be loaded, it may be truncated or corrupt: {error}") from error
    if report["missing_keys"]:
        raise ValueError(f"{folder} has no tensor {', '.join(sorted(report['missing_keys'])[:5])}")
    return TransformersRunner(model.to(device), tokenizer, eos_tokens(folder, tokenizer))


def _safetensor_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError
