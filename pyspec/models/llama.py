"""LlamaRunner: Llama-shaped models (Llama, SmolLM2, Mistral, Qwen2) over a dense KV cache.

The nodes of all trees of a batch run packed through the linear layers, [sum of T_b, hidden]; only attention
sees one tree beside another, padded to the largest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pyspec.caches.dense import DenseCache
from pyspec.models._checks import check_paths, check_prompts, check_trees
from pyspec.ops.tree_attention import HEAD_DIMS, tree_attention
from pyspec.trees import DraftTree

__all__ = ["LayerWeights", "LlamaConfig", "LlamaRunner", "LlamaWeights", "RopeScaling", "Unsupported"]

PREFILL_CHUNK = 256
LOGITS_BLOCK = 16


class Unsupported(ValueError):
    """A model of the family with a feature that LlamaRunner does not have."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context of the first training.

    "linear" divides all of them by factor; "llama3" leaves wavelengths below original_context / high_factor,
    divides those above original_context / low_factor and blends between; "table" divides each by its own factor.
    """

    kind: str
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_context: int = 8192
    table: tuple[float, ...] = ()


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model. windows holds each layer's sliding window in positions, None for full attention."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    norm_epsilon: float
    rope_base: float
    rope_scaling: RopeScaling | None = None
    windows: tuple[int | None, ...] = ()
    qkv_bias: bool = False
    output_bias: bool = False
    tied_embedding: bool = False

    def __post_init__(self):
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.layers)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "context_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim not in HEAD_DIMS:
            raise Unsupported(f"head_dim {self.head_dim} of {self.architecture}: supported are {HEAD_DIMS}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")

    def rope_frequencies(self) -> Tensor:
        """[head_dim / 2] fp32: radians per position."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        frequencies = 1.0 / self.rope_base**exponents
        scaling = self.rope_scaling
        if scaling is None:
            return frequencies
        if scaling.kind == "table":
            return frequencies / torch.tensor(scaling.table)
        if scaling.kind == "linear":
            return frequencies / scaling.factor
        wavelengths = 2 * math.pi / frequencies
        kept = (scaling.original_context / wavelengths - scaling.low_factor) / (
            scaling.high_factor - scaling.low_factor
        )
        kept = kept.clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / scaling.factor


@dataclass
class LayerWeights:
    """One layer. Queries, keys and values are one matrix, and so are gate and up."""

    attention_norm: Tensor  # [hidden]
    qkv: Tensor  # [(heads + 2 kv_heads) * head_dim, hidden]
    qkv_bias: Tensor | None
    output: Tensor  # [hidden, heads * head_dim]
    output_bias: Tensor | None
    feed_forward_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 * intermediate, hidden]
    down: Tensor  # [hidden, intermediate]


@dataclass
class LlamaWeights:
    """All weights; head is embedding itself where they are tied."""

    embedding: Tensor  # [vocab, hidden]
    layers: list[LayerWeights] = field(repr=False)
    norm: Tensor  # [hidden]
    head: Tensor  # [vocab, hidden]

    @classmethod
    def empty(cls, config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> LlamaWeights:
        """Weights to be filled through `named`."""

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def new_norm() -> Tensor:  # as exact as the arithmetic it is part of
            return torch.empty(config.hidden_size, device=device)

        qkv_rows = (config.heads + 2 * config.kv_heads) * config.head_dim
        embedding = new(config.vocab_size, config.hidden_size)
        layers = [
            LayerWeights(
                attention_norm=new_norm(),
                qkv=new(qkv_rows, config.hidden_size),
                qkv_bias=new(qkv_rows) if config.qkv_bias else None,
                output=new(config.hidden_size, config.heads * config.head_dim),
                output_bias=new(config.hidden_size) if config.output_bias else None,
                feed_forward_norm=new_norm(),
                gate_up=new(2 * config.intermediate_size, config.hidden_size),
                down=new(config.hidden_size, config.intermediate_size),
            )
            for _ in range(config.layers)
        ]
        head = embedding if config.tied_embedding else new(config.vocab_size, config.hidden_size)
        return cls(embedding, layers, new_norm(), head)

    def named(self, config: LlamaConfig) -> dict[str, Tensor]:
        """Where each tensor of a checkpoint goes, by its Hugging Face name: views into the weights."""
        kv_rows = config.kv_heads * config.head_dim
        qkv_rows = [config.heads * config.head_dim, kv_rows, kv_rows]
        tensors = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        if not config.tied_embedding:
            tensors["lm_head.weight"] = self.head
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}."
            tensors[prefix + "input_layernorm.weight"] = layer.attention_norm
            tensors[prefix + "post_attention_layernorm.weight"] = layer.feed_forward_norm
            tensors[prefix + "self_attn.o_proj.weight"] = layer.output
            tensors[prefix + "mlp.down_proj.weight"] = layer.down
            for name, part in zip("qkv", layer.qkv.split(qkv_rows), strict=True):
                tensors[f"{prefix}self_attn.{name}_proj.weight"] = part
            if layer.qkv_bias is not None:
                for name, part in zip("qkv", layer.qkv_bias.split(qkv_rows), strict=True):
                    tensors[f"{prefix}self_attn.{name}_proj.bias"] = part
            if layer.output_bias is not None:
                tensors[prefix + "self_attn.o_proj.bias"] = layer.output_bias
            for name, part in zip(("gate", "up"), layer.gate_up.split(config.intermediate_size), strict=True):
                tensors[f"{prefix}mlp.{name}_proj.weight"] = part
        return tensors


class LlamaRunner:
    """A Llama-shaped model with its KV cache; see pyspec.models.Runner for the calls.

    Args:
        config: the model's shape.
        weights: filled weights; their dtype and device are the runner's.
        tokenizer: a pyspec.models.tokenizer.Tokenizer, or None.
        eos_tokens: tokens that end a text.
    """

    def __init__(self, config: LlamaConfig, weights: LlamaWeights, tokenizer=None, eos_tokens: Sequence[int] = ()):
        self.config = config
        self.weights = weights
        self.tokenizer = tokenizer
        self.eos_tokens = frozenset(eos_tokens)
        self.vocab_size = config.vocab_size
        self.context_length = config.context_length
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        vocabulary = "" if tokenizer is None else tokenizer.fingerprint
        description = repr(sorted(asdict(config).items())) + vocabulary
        self.fingerprint = f"{config.architecture}-{hashlib.sha256(description.encode()).hexdigest()[:16]}"
        self._epsilon = torch.tensor(config.norm_epsilon, device=self.device)
        self._frequencies = config.rope_frequencies()
        self._cos_sin = torch.empty(2, 0, 1, config.head_dim, device=self.device)
        self._cache: DenseCache | None = None
        self._verified: list[DraftTree | None] | None = None

    def lengths(self) -> list[int]:
        """Committed tokens of each sequence."""
        return [] if self._cache is None else list(self._cache.lengths)

    @torch.inference_mode()
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
        check_prompts(tokens, self.vocab_size, self.context_length)
        longest = max(map(len, tokens))
        capacity = self.context_length if capacity is None else capacity
        if capacity < longest:
            raise ValueError(f"capacity must be at least the longest prompt, {longest} tokens, got {capacity}")
        self._cache = self._verified = None  # the old batch makes room for the new one
        config = self.config
        cache = DenseCache(
            config.layers, len(tokens), config.kv_heads, capacity, config.head_dim, self.dtype, self.device
        )
        self._extend_rope(capacity)
        last_logits = []
        for sequence, prompt in enumerate(tokens):
            for start in range(0, len(prompt), PREFILL_CHUNK):
                chunk = prompt[start : start + PREFILL_CHUNK]
                hidden = self._forward(_PromptChunk(chunk, sequence, cache, config.windows, self.device))
                cache.lengths[sequence] += len(chunk)
                if observe is not None:
                    observe(sequence, DraftTree.chain(chunk), self._logits(hidden))
            # alone, so that its bits do not depend on whether someone observes
            last_logits.append(self._logits(hidden[-1:])[0])
        self._cache = cache
        return last_logits

    @torch.inference_mode()
    def verify(self, trees: Sequence[DraftTree | None]) -> list[Tensor | None]:
        """[T, V] fp32 logits of every node of each sequence's tree; None marks a sequence that sits out.

        Raises:
            RuntimeError: before any prefill.
            ValueError: a tree has tokens outside of the vocabulary or does not fit the cache's capacity.
        """
        cache = self._cache
        check_trees(trees, None if cache is None else len(cache.lengths), self.vocab_size)
        active = [sequence for sequence, tree in enumerate(trees) if tree is not None]
        if not active:
            self._verified = list(trees)
            return [None] * len(trees)
        for sequence in active:
            cache.check_room(sequence, len(trees[sequence]))
        hidden = self._forward(_PackedTrees(trees, active, cache, self.config.windows, self.device))
        self._verified = list(trees)
        logits = iter(self._logits(hidden).split([len(trees[sequence]) for sequence in active]))
        return [None if tree is None else next(logits) for tree in trees]

    @torch.inference_mode()
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
                self._cache.commit(sequence, path)

    def _forward(self, nodes: _PromptChunk | _PackedTrees) -> Tensor:
        """[R, hidden] of R packed nodes, after the last norm; their keys and values are written to the cache."""
        config, weights = self.config, self.weights
        rotated_heads = config.heads + config.kv_heads
        cos, sin = self._cos_sin[:, nodes.positions.to(self.device)]
        hidden = F.embedding(nodes.tokens, weights.embedding).float()
        for index, layer in enumerate(weights.layers):
            projected = linear(self._norm(hidden, layer.attention_norm), layer.qkv, layer.qkv_bias)
            qkv = projected.to(torch.float32, memory_format=torch.contiguous_format)
            qkv = qkv.view(len(hidden), -1, config.head_dim)
            _rotate(qkv[:, :rotated_heads], cos, sin)
            qkv = qkv.to(self.dtype)
            keys_values = qkv[:, config.heads :].unflatten(1, (2, config.kv_heads))
            mixed = nodes.attend(index, qkv[:, : config.heads], keys_values).reshape(len(hidden), -1)
            hidden += linear(mixed, layer.output, layer.output_bias)
            gate, up = linear(self._norm(hidden, layer.feed_forward_norm), layer.gate_up).chunk(2, dim=-1)
            hidden += linear(F.silu(gate).mul_(up), layer.down)
        return self._norm(hidden, weights.norm)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[R, hidden] in the model's dtype from the fp32 residual stream."""
        # fewer operations than F.rms_norm, which for the few rows of a tree takes longer than a layer's attention
        norms = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        scales = torch.addcmul(self._epsilon, norms, norms, value=1 / hidden.shape[-1]).rsqrt_()
        return (hidden * scales).mul_(weight).to(self.dtype)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = linear(hidden, self.weights.head)
        out = torch.empty(logits.shape, dtype=torch.float32, device=self.device)
        # linear gives columns on the CPU: turned a few rows at a time, they stay in the processor's cache
        for rows, place in zip(logits.split(LOGITS_BLOCK), out.split(LOGITS_BLOCK), strict=True):
            place.copy_(rows)
        return out

    def _extend_rope(self, positions: int) -> None:
        """Makes the table of cosines and sines, [2, positions, 1, D] fp32, long enough."""
        if positions <= self._cos_sin.shape[1]:
            return
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))
        self._cos_sin = table[:, :, None].to(self.device)


class _PromptChunk:
    """A piece of one prompt: the nodes of a chain."""

    def __init__(
        self,
        chunk: Sequence[int],
        sequence: int,
        cache: DenseCache,
        windows: Sequence[int | None],
        device: torch.device,
    ):
        self.cache = cache
        self.sequence = sequence
        self.windows = windows
        start = cache.lengths[sequence]
        self.end = start + len(chunk)
        self.tokens = torch.tensor(chunk, device=device)
        self.positions = torch.arange(start, self.end)
        self.masks = {window: self._mask(window, device) for window in set(windows)}
        self.slots = cache.free_slots(sequence, len(chunk))

    def _mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """[n, end] of what each token sees, or None where plain causal attention is the same."""
        if len(self.tokens) == self.end and (window is None or window >= self.end):
            return None
        distance = self.positions[:, None] - torch.arange(self.end)
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return visible.to(device)

    def attend(self, layer: int, q: Tensor, keys_values: Tensor) -> Tensor:
        """[n, Hq, D] from q [n, Hq, D], after writing keys and values [n, 2, Hkv, D] to the cache."""
        self.slots[layer].copy_(keys_values)
        k, v = (part[self.sequence, None, :, : self.end] for part in self.cache.layers[layer])
        mask = self.masks[self.windows[layer]]
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return out[0].transpose(0, 1)


class _PackedTrees:
    """The trees of one verify: the rows of all nodes, one tree after another."""

    def __init__(
        self,
        trees: Sequence[DraftTree | None],
        active: list[int],
        cache: DenseCache,
        windows: Sequence[int | None],
        device: torch.device,
    ):
        self.cache = cache
        self.windows = windows
        packed = [trees[sequence] for sequence in active]
        lengths = [cache.lengths[sequence] for sequence in active]
        self.sizes = [len(tree) for tree in packed]
        self.slots = [cache.free_slots(sequence, size) for sequence, size in zip(active, self.sizes, strict=True)]
        self.tokens = torch.cat([tree.tokens for tree in packed]).to(device)
        self.positions = torch.cat([tree.depths + n for tree, n in zip(packed, lengths, strict=True)])
        self.prefix_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        nodes = max(self.sizes)
        bits = torch.zeros(len(packed), nodes, (nodes + 31) // 32, dtype=torch.int32)
        for row, tree in zip(bits, packed, strict=True):
            row[: len(tree), : tree.ancestor_bits.shape[1]] = tree.ancestor_bits
        self.ancestor_bits = bits.to(device)
        self.block_table = None
        if len(active) < len(cache.lengths):  # the cache row of a whole sequence is one page
            self.block_table = torch.tensor(active, dtype=torch.int32, device=device)[:, None]
        self.is_node = None
        if min(self.sizes) < nodes:
            self.is_node = (torch.arange(nodes) < torch.tensor(self.sizes)[:, None]).to(device)

    def attend(self, layer: int, q: Tensor, keys_values: Tensor) -> Tensor:
        """[R, Hq, D] from q [R, Hq, D], after writing keys and values [R, 2, Hkv, D] to the cache."""
        for slots, part in zip(self.slots, keys_values.split(self.sizes), strict=True):
            slots[layer].copy_(part)
        if self.is_node is None:
            padded = q.unflatten(0, (len(self.sizes), -1))
        else:
            padded = q.new_zeros(*self.is_node.shape, *q.shape[1:])
            padded[self.is_node] = q
        k, v = self.cache.layers[layer]
        out = tree_attention(
            padded.transpose(1, 2),
            k,
            v,
            self.ancestor_bits,
            self.prefix_lens,
            window=self.windows[layer],
            block_table=self.block_table,
        ).transpose(1, 2)
        return out.flatten(0, 1) if self.is_node is None else out[self.is_node]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [R, K] times weight [N, K] transposed, plus bias [N]: [R, N], in strides of its own choice."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        # the weight as the left factor is up to twice as fast as F.linear, except for a single row, which is
        # therefore computed twice
        rows = x if len(x) > 1 else x.repeat(2, 1)
        out = torch.mm(weight, rows.t()).t()[: len(x)]
        return out if bias is None else out + bias
    return F.linear(x, weight, bias)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding of heads [R, H, D] fp32 in place; cos, sin [R, 1, D], the first half of sin negated."""
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    heads.mul_(cos).addcmul_(swapped, sin)
