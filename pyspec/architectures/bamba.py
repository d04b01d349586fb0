"""Bamba models, hybrids in which some layers are attention and the others Mamba-2.

A path is committed to both kinds of state: attention layers compact their keys and values, Mamba-2 layers replay it at
the beginning of the next round. All layers run the same nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyspec.architectures import FAMILIES, Family, Unsupported
from pyspec.architectures.blocks import attention as attention_block
from pyspec.architectures.blocks import feed_forward, tap
from pyspec.architectures.llama import LayerWeights, LlamaConfig
from pyspec.architectures.mamba import check_silu
from pyspec.architectures.mamba2 import Mamba2Config, Mamba2Layer, check_no_limit
from pyspec.architectures.rotary import Rope, rope_entries, rope_table
from pyspec.architectures.shapes import DEFAULTS, read_heads
from pyspec.architectures.weights import Blank, Matrix, NativeLayer, NativeWeights, dense
from pyspec.entries import Entries
from pyspec.ops.linear import LinearWeight
from pyspec.ops.rms_norm import rms_norm
from pyspec.runners.recurrent import HybridRunner

__all__ = ["BambaConfig", "BambaWeights"]


@dataclass(frozen=True)
class BambaConfig:
    """The shape of a model: that of its attention layers, that of its Mamba-2 layers, and which is which.

    attention.layers and recurrence.layers count each kind. The feed-forward layer of attention is that of all layers.
    """

    attention: LlamaConfig
    recurrence: Mamba2Config
    is_attention: tuple[bool, ...]  # of every layer
    rotary_dim: int  # of a head's dimensions, how many are turned
    architecture: str = "bamba"

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "norm_epsilon", "tied_embedding"):
            if getattr(self.attention, name) != getattr(self.recurrence, name):
                raise ValueError(f"attention and recurrence must have the same {name}")
        found = sum(self.is_attention), len(self.is_attention) - sum(self.is_attention)
        if found != (self.attention.layers, self.recurrence.layers):
            raise ValueError(
                f"is_attention must have {self.attention.layers} attention layers and {self.recurrence.layers} others, "
                f"got {found[0]} and {found[1]}"
            )
        if self.rotary_dim % 4 or not 0 < self.rotary_dim <= self.attention.head_dim:
            raise Unsupported(
                f"rotary_dim must be a multiple of 4 up to head_dim {self.attention.head_dim}, got {self.rotary_dim}"
            )

    @property
    def layers(self) -> int:
        return len(self.is_attention)

    @property
    def vocab_size(self) -> int:
        return self.attention.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.attention.hidden_size

    @property
    def tied_embedding(self) -> bool:
        return self.attention.tied_embedding

    def empty_layers(self, blank: Blank) -> list[NativeLayer]:
        kinds = {True: AttentionLayer, False: RecurrentLayer}
        return [kinds[is_attention].empty(self, blank) for is_attention in self.is_attention]

    def rope_frequencies(self) -> Tensor:
        """Radians per position, [head_dim / 2] fp32; 0 for the dimensions that are not turned."""
        exponents = torch.arange(0, self.rotary_dim, 2, device="cpu").float() / self.rotary_dim
        straight = exponents.new_zeros((self.attention.head_dim - self.rotary_dim) // 2)
        return torch.cat((1.0 / self.attention.rope_base**exponents, straight))

    def ropes(self, positions: int, device: torch.device) -> list[Rope]:
        """Cosines and sines of positions for every attention layer, which share them."""
        return [Rope(rope_table(self.rope_frequencies(), positions, device))] * self.attention.layers


@dataclass
class AttentionLayer(LayerWeights):
    """An attention layer.

    rotary_write turns the halves of a head against each other, all of it. Where only the first rotary_dim dimensions
    are turned, the rows of queries and keys are laid out in another order: half of those that are turned, half of those
    that are not, the other halves. Scores are sums over all dimensions, so they stay what they are.
    """

    REORDERED = ("qkv",)

    head_dim: int
    rotary_dim: int

    @classmethod
    def empty(cls, config: BambaConfig, blank: Blank) -> AttentionLayer:
        layer = LayerWeights.empty(config.attention, blank)
        return cls(**vars(layer), head_dim=config.attention.head_dim, rotary_dim=config.rotary_dim)

    def named(self, config: BambaConfig, prefix: str) -> dict[str, Tensor]:
        tensors = super().named(config.attention, prefix)
        if isinstance(self.qkv, LinearWeight):  # back to the checkpoint's order
            back = self._order().argsort()
            for name in ("q", "k"):
                for kind in ("weight", "bias"):
                    key = f"{prefix}self_attn.{name}_proj.{kind}"
                    if key in tensors:
                        tensors[key] = self._reordered(tensors[key], back)
        return {_bamba_name(name): tensor for name, tensor in tensors.items()}

    def prepare(self, config: BambaConfig) -> None:
        super().prepare(config.attention)

    def lay_out(self, dtype: torch.dtype) -> None:
        if not isinstance(self.qkv, LinearWeight):
            rows = self.output.shape[1]  # of the queries; keys and values share the rest
            for name in ("qkv", "qkv_bias"):
                if (values := getattr(self, name)) is None:
                    continue
                kv_rows = (len(values) - rows) // 2
                turned, straight = values.split([rows + kv_rows, kv_rows])
                setattr(self, name, torch.cat((self._reordered(turned, self._order()), straight)))
        super().lay_out(dtype)

    def _order(self) -> Tensor:
        """[head_dim]: which dimension of the checkpoint comes where."""
        turned, straight = torch.arange(self.head_dim, device="cpu").split(
            [self.rotary_dim, self.head_dim - self.rotary_dim]
        )
        halves = zip(turned.chunk(2), straight.chunk(2) if len(straight) else (straight, straight), strict=True)
        return torch.cat([part for half in halves for part in half])

    def _reordered(self, rows: Tensor, order: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, self.head_dim))[:, order.to(rows.device)].flatten(0, 1)


@dataclass
class RecurrentLayer(Mamba2Layer):
    """A Mamba-2 layer."""

    MATRICES = (*Mamba2Layer.MATRICES, "gate_up", "down")
    PREFIX = "mamba."
    NORM = "input_layernorm.weight"

    feed_forward_norm: Tensor  # [hidden]
    gate_up: Matrix  # [2 * intermediate, hidden]
    down: Matrix  # [hidden, intermediate]

    @classmethod
    def empty(cls, config: BambaConfig, blank: Blank) -> RecurrentLayer:
        hidden, intermediate = config.hidden_size, config.attention.intermediate_size
        return cls(
            **vars(config.recurrence.empty_layer(blank)),
            feed_forward_norm=blank.vector(hidden),
            gate_up=blank.matrix(2 * intermediate, hidden),
            down=blank.matrix(hidden, intermediate),
        )

    def prepare(self, config: BambaConfig) -> None:
        super().prepare(config.recurrence)

    def named(self, config: BambaConfig, prefix: str) -> dict[str, Tensor]:
        tensors = super().named(config.recurrence, prefix)
        gate, up = dense(self.gate_up).chunk(2)
        return tensors | {
            prefix + "pre_ff_layernorm.weight": self.feed_forward_norm,
            prefix + "feed_forward.gate_proj.weight": gate,
            prefix + "feed_forward.up_proj.weight": up,
            prefix + "feed_forward.down_proj.weight": dense(self.down),
        }


def _bamba_name(name: str) -> str:
    """The name that Bamba gives a tensor of Llama's."""
    return name.replace(".post_attention_layernorm.", ".pre_ff_layernorm.").replace(".mlp.", ".feed_forward.")


class BambaWeights(NativeWeights):
    """All weights, by the names of Hugging Face's Bamba."""

    NORM = "model.final_layernorm.weight"

    def forward(self, config: BambaConfig, hidden: Tensor, cache, numbers, dtype, layers=None, taps=()) -> list[Tensor]:
        epsilon, delta, tapped = config.attention.norm_epsilon, None, []
        counts = {True: iter(range(config.layers)), False: iter(range(config.layers))}  # each kind has a cache
        for number, (is_attention, layer) in enumerate(zip(config.is_attention, self.layers, strict=True)):
            index = next(counts[is_attention])
            norm = layer.scales.attention if is_attention else layer.norm
            x = rms_norm(hidden, norm, epsilon, delta=delta, out_dtype=dtype)
            if number in taps:
                tapped.append(tap(hidden))
            if is_attention:
                delta = attention_block(x, layer, config.attention, cache, index, numbers)
            else:
                delta = layer.mix(config.recurrence, x, cache.layer(index), numbers.round)
            norm = layer.scales.feed_forward if is_attention else layer.feed_forward_norm
            x = rms_norm(hidden, norm, epsilon, delta=delta, out_dtype=dtype)
            delta = feed_forward(x, layer.gate_up, layer.down)
        normed = rms_norm(hidden, self.norm, epsilon, delta=delta, out_dtype=dtype)
        return [normed, *tapped, *([tap(hidden)] if len(self.layers) in taps else [])]


# ==== config.json ====

_DEFAULTS = DEFAULTS | {"vocab_size": 128000, "intermediate_size": 14336, "max_position_embeddings": 262144}
_DEFAULTS |= {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "mamba_n_heads": 128, "mamba_n_groups": 1}
_DEFAULTS |= {"mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2}
_DEFAULTS |= {"mamba_conv_bias": True, "mamba_proj_bias": False}


def _read(source: Path | str, entries: Entries, architecture: str) -> BambaConfig:
    check_silu(source, entries, "HybridRunner")
    check_no_limit(source, entries, "HybridRunner")
    if entries.flag("mlp_bias"):
        raise Unsupported(f"{source} has mlp_bias True, HybridRunner has none")
    rope = rope_entries(entries)
    if (kind := rope.text("rope_type", rope.text("type", "default"))) != "default":
        raise Unsupported(f"{source} has rope scaling {kind!r}, HybridRunner has none")
    hidden, layers = entries.whole("hidden_size"), entries.whole("num_hidden_layers")
    heads, kv_heads, head_dim = read_heads(entries)
    places = set(entries.array("attn_layer_indices", int, []))
    is_attention = tuple(layer in places for layer in range(layers))
    if not any(is_attention) or all(is_attention):
        raise entries.wrong("attn_layer_indices", sorted(places), f"some of the {layers} layers, and not all")
    shared = {
        "vocab_size": entries.whole("vocab_size"),
        "hidden_size": hidden,
        "norm_epsilon": entries.number("rms_norm_eps"),
        "tied_embedding": entries.flag("tie_word_embeddings"),
    }
    attention = LlamaConfig(
        architecture=entries.text("model_type", "bamba"),
        intermediate_size=entries.whole("intermediate_size"),
        layers=sum(is_attention),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=entries.whole("max_position_embeddings"),
        rope_base=rope.number("rope_theta", entries.number("rope_theta", 10000.0)),
        qkv_bias=entries.flag("attention_bias"),
        output_bias=entries.flag("attention_bias"),
        **shared,
    )
    state_heads = entries.whole("mamba_n_heads")
    channels = entries.whole("mamba_expand") * hidden
    is_stated = entries.get("mamba_d_head", "auto") != "auto"
    state_head_dim = entries.whole("mamba_d_head") if is_stated else channels // state_heads
    if state_heads * state_head_dim != channels:
        raise entries.wrong("mamba_n_heads", state_heads, f"heads that share {channels} channels")
    recurrence = Mamba2Config(
        layers=layers - sum(is_attention),
        heads=state_heads,
        head_dim=state_head_dim,
        groups=entries.whole("mamba_n_groups"),
        state_size=entries.whole("mamba_d_state"),
        conv_taps=entries.whole("mamba_d_conv"),
        projection_bias=entries.flag("mamba_proj_bias"),
        conv_bias=entries.flag("mamba_conv_bias"),
        **shared,
    )
    return BambaConfig(attention, recurrence, is_attention, int(head_dim * rope.number("partial_rotary_factor", 0.5)))


_FAMILY = Family({"BambaForCausalLM": _DEFAULTS}, _read, BambaWeights, HybridRunner)
FAMILIES.register("bamba", _FAMILY, "Bamba, hybrids of attention and Mamba-2")
