"""DecoderConfig: Llama's layers with what later families added to them, each of which is a file beside this one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyspec.architectures import Unsupported
from pyspec.architectures.llama import LlamaConfig
from pyspec.architectures.rotary import rope_frequencies, rope_table

__all__ = ["AROUND", "BEHIND", "DecoderConfig"]

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

    def rope_tables(self, positions: int, device: torch.device) -> list[Tensor]:
        tables = super().rope_tables(positions, device)
        others = {}
        if "local" in self.turns:
            local = rope_frequencies(self.local_rope_base, self.rope_width or self.head_dim, None)
            others["local"] = rope_table(local, positions, device)
        if "none" in self.turns:  # one pair of dimensions, by no angle
            others["none"] = rope_table(torch.zeros(1, device="cpu"), positions, device)
        return [
            others.get(turn, table) for turn, table in zip(self.turns or ("global",) * self.layers, tables, strict=True)
        ]
