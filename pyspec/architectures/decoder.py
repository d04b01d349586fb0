"""DecoderConfig: Llama's layers with what later families added to them, each of which is a file beside this one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyspec.architectures import Unsupported
from pyspec.architectures.llama import LlamaConfig
from pyspec.architectures.rotary import Rope, read_rope, rope_entries, rope_frequencies, rope_table
from pyspec.architectures.shapes import read_activation, read_shape
from pyspec.entries import Entries

__all__ = ["AROUND", "BEHIND", "DecoderConfig", "read_decoder", "read_rope_width"]

# Names of norms where a layer's parts norm what they give, and where they do both.
BEHIND = {"attention_output": "post_attention_layernorm", "feed_forward_output": "post_feedforward_layernorm"}
AROUND = BEHIND | {"attention": "input_layernorm", "feed_forward": "pre_feedforward_layernorm"}


@dataclass(frozen=True)
class DecoderConfig(LlamaConfig):
    """The shape of a model whose layers have more than Llama's.

    Attributes:
        activation: of swiglu.
        head_norm: whether queries and keys are normed before they are turned: "head", each head by itself; "row", all
            heads of a row together; or None.
        norm_offset: what checkpoints leave out of the weights of norms.
        embedding_scale: of the embedding's rows.
        logits_scale, logits_softcap: of the last logits; they are scaled first.
        attention_scale, attention_softcap: of scores, see tree_attention.
        rope_width: dimensions of a head that are turned, the first ones; None for all.
        turns: by layer, which frequencies turn its heads: "global", those of rope_base and rope_scaling; "local", those
            of local_rope_base; "none", they are not turned. Empty for "global" everywhere.
        local_rope_base: see turns.
        query_scaling: (factor, period): queries at position p are multiplied by 1 + factor log(1 + p // period).
        centred: whether norms are layer norms, which take the mean off; not those of queries and keys.
        norm_bias: whether norms have biases.
        is_parallel: whether attention and feed forward take in the same normed rows.
        has_sinks: whether each head has a sink, see tree_attention.
        is_gated: whether what attention gives is multiplied by sigmoids of gates, which the rows of queries bring.
    """

    activation: str = "silu"
    head_norm: str | None = None
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    rope_width: int | None = None
    turns: tuple[str, ...] = ()
    local_rope_base: float = 10000.0
    query_scaling: tuple[float, int] | None = None
    centred: bool = False
    norm_bias: bool = False
    is_parallel: bool = False
    has_sinks: bool = False
    is_gated: bool = False

    def __post_init__(self):
        super().__post_init__()
        # a window as long as the context never slides
        windows = tuple(None if window and window >= self.context_length else window for window in self.windows)
        object.__setattr__(self, "windows", windows)
        width, scaling = self.rope_width or self.head_dim, self.rope_scaling
        if scaling is not None and scaling.switch and {len(scaling.table), len(scaling.long)} != {width // 2}:
            raise ValueError(
                f"longrope must have {width // 2} factors, got {len(scaling.table)} and {len(scaling.long)}"
            )
        if self.rope_width is not None and (self.rope_width % 2 or not 0 < self.rope_width <= self.head_dim):
            raise Unsupported(f"rope_width must be even and at most head_dim {self.head_dim}, got {self.rope_width}")

    def ropes(self, positions: int, device: torch.device) -> list[Rope]:
        (shared, *_), scales = super().ropes(positions, device), None
        if self.query_scaling is not None:
            factor, period = self.query_scaling
            periods = torch.arange(positions, device="cpu") // period
            scales = (1 + factor * torch.log(1.0 + periods)).to(device)
        ropes = {"global": Rope(shared.cos_sin, scales)}
        if "local" in self.turns:
            local = rope_frequencies(self.local_rope_base, self.rope_width or self.head_dim, None)
            ropes["local"] = Rope(rope_table(local, positions, device), scales)
        if "none" in self.turns:  # one pair of dimensions, by no angle
            ropes["none"] = Rope(rope_table(torch.zeros(1, device="cpu"), positions, device), scales)
        return [ropes[turn] for turn in self.turns or ("global",) * self.layers]


def read_decoder(
    source: Path | str,
    entries: Entries,
    architecture: str,
    theta: float = 10000.0,
    *,
    in_part: bool = False,
    epsilon: str = "rms_norm_eps",
) -> dict[str, Any]:
    """Fields of a DecoderConfig that many families state alike; see read_shape and read_rope."""
    shape = read_shape(source, entries, architecture, epsilon=epsilon)
    shape["rope_base"], shape["rope_scaling"] = read_rope(source, entries, theta, in_part=in_part)
    has_bias = entries.flag("attention_bias")
    return shape | {"qkv_bias": has_bias, "output_bias": has_bias, "activation": read_activation(source, entries)}


def read_rope_width(entries: Entries, head_dim: int, part: float = 1.0) -> int:
    """Dimensions of a head that are turned; part of them where a file does not say."""
    stated = entries.number("partial_rotary_factor", part)
    return int(head_dim * rope_entries(entries).number("partial_rotary_factor", stated))
