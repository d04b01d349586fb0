"""Bamba models, hybrids in which some layers are attention and the others Mamba-2."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pyspec.architectures import FAMILIES, Family, Unsupported
from pyspec.architectures.blocks import feed_forward
from pyspec.architectures.decoder import read_rope_width
from pyspec.architectures.hybrid import HybridConfig
from pyspec.architectures.llama import DecoderLayer, LayerWeights, LlamaWeights, Scales
from pyspec.architectures.mamba import check_silu
from pyspec.architectures.mamba2 import Mamba2Config, Mamba2Layer, check_no_limit
from pyspec.architectures.rotary import rope_entries
from pyspec.architectures.shapes import DEFAULTS, read_heads
from pyspec.architectures.weights import Blank, Matrix, dense
from pyspec.entries import Entries
from pyspec.runners.recurrent import HybridRunner

__all__ = ["BambaConfig", "BambaWeights"]


@dataclass(frozen=True)
class BambaConfig(HybridConfig):
    """The shape of a model; its recurrence is that of a Mamba-2."""

    norm_names = {"attention": "input_layernorm", "feed_forward": "pre_ff_layernorm"}  # noqa: RUF012

    def kind_of(self, layer: int) -> type[DecoderLayer]:
        return AttentionLayer if self.is_attention[layer] else RecurrentLayer


class AttentionLayer(LayerWeights):
    """An attention layer."""

    def named(self, config: BambaConfig, prefix: str) -> dict[str, Tensor]:
        return {name.replace(".mlp.", ".feed_forward."): of for name, of in super().named(config, prefix).items()}


@dataclass
class RecurrentLayer(Mamba2Layer):
    """A Mamba-2 layer, with a feed-forward part."""

    MATRICES = (*Mamba2Layer.MATRICES, "gate_up", "down")
    PREFIX = "mamba."
    NORM = "input_layernorm.weight"
    shifts = Scales()

    feed_forward_norm: Tensor  # [hidden]
    gate_up: Matrix  # [2 * intermediate, hidden]
    down: Matrix  # [hidden, intermediate]

    @classmethod
    def empty(cls, config: BambaConfig, blank: Blank) -> RecurrentLayer:
        hidden, intermediate = config.hidden_size, config.intermediate_size
        return cls(
            **vars(config.recurrence.empty_layer(blank)),
            feed_forward_norm=blank.vector(hidden),
            gate_up=blank.matrix(2 * intermediate, hidden),
            down=blank.matrix(hidden, intermediate),
        )

    def prepare(self, config: BambaConfig) -> None:
        super().prepare(config.recurrence)
        self.scales = Scales(attention=self.norm, feed_forward=self.feed_forward_norm)

    def named(self, config: BambaConfig, prefix: str) -> dict[str, Tensor]:
        tensors = super().named(config.recurrence, prefix)
        gate, up = dense(self.gate_up).chunk(2)
        return tensors | {
            prefix + "pre_ff_layernorm.weight": self.feed_forward_norm,
            prefix + "feed_forward.gate_proj.weight": gate,
            prefix + "feed_forward.up_proj.weight": up,
            prefix + "feed_forward.down_proj.weight": dense(self.down),
        }

    def mix(self, x: Tensor, config: BambaConfig, cache, place: int, numbers) -> Tensor:
        return super().mix(x, config.recurrence, cache, place, numbers)

    def feed_forward(self, x: Tensor, config: BambaConfig) -> Tensor:
        return feed_forward(x, self.gate_up, self.down, config.activation)


class BambaWeights(LlamaWeights):
    """All weights, by the names of Hugging Face's Bamba."""

    NORM = "model.final_layernorm.weight"


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
    return BambaConfig(
        architecture=entries.text("model_type", "bamba"),
        intermediate_size=entries.whole("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=entries.whole("max_position_embeddings"),
        rope_base=rope.number("rope_theta", entries.number("rope_theta", 10000.0)),
        rope_width=read_rope_width(entries, head_dim, 0.5),
        qkv_bias=entries.flag("attention_bias"),
        output_bias=entries.flag("attention_bias"),
        recurrence=recurrence,
        is_attention=is_attention,
        **shared,
    )


_FAMILY = Family({"BambaForCausalLM": _DEFAULTS}, _read, BambaWeights, HybridRunner)
FAMILIES.register("bamba", _FAMILY, "Bamba, hybrids of attention and Mamba-2")
