"""Heads whose keys of a text are made of what the target's layers said of it, and of nothing else.

    c = hidden_norm(fc(taps));  in each layer key and value of a text's token are k_proj(c) and v_proj(c)

Rows that guess see those keys and their own. So reading a text is one product a layer, and takes no attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyspec.architectures.blocks import attention, feed_forward, write_keys
from pyspec.architectures.llama import LlamaConfig
from pyspec.architectures.weights import Blank
from pyspec.drafters.heads.files import kind_of, read_layers, read_taps, read_values
from pyspec.drafters.heads.trained import TrainedHead
from pyspec.entries import Entries
from pyspec.ops.linear import linear
from pyspec.ops.rms_norm import rms_norm

__all__ = ["ContextConfig", "ContextHead"]


@dataclass(frozen=True)
class ContextConfig:
    """What such a head is.

    Attributes:
        layers: the shape of its layers, of Llama or Qwen3.
        draft_vocab_size: tokens that it can guess.
        target_hidden_size: width of the target's residual stream.
        taps: the target's layers whose residual stream it reads, see Runner.prefill.
        choices: what was taken where the files leave it open, one sentence each.
    """

    layers: LlamaConfig
    draft_vocab_size: int
    target_hidden_size: int
    taps: tuple[int, ...]
    choices: tuple[str, ...]

    @classmethod
    def read_common(
        cls, folder: Path, tensors: Mapping[str, Tensor], target, taps: Sequence[int] | None, kind: str
    ) -> tuple[dict, Entries]:
        """The fields above by name, and the entries of config.json.

        Raises:
            FileNotFoundError, ValueError: there is no config.json, or it describes no such head; it names the entry.
        """
        path, values = read_values(folder)
        if kind_of(values) != kind:
            raise ValueError(f"{path} must describe a head of speculators_model_type {kind!r}, got {kind_of(values)!r}")
        entries, choices = Entries(str(path), values), []
        of_layer, has_norms = entries.part("transformer_layer_config"), "layers.0.self_attn.q_norm.weight" in tensors
        layers = read_layers(path, of_layer, values.get("transformer_layer_config") or {}, has_norms, choices)
        if any(layers.windows):
            raise ValueError(f"{path} has layers with sliding windows, supported is attention to the whole text")
        fields = {
            "layers": layers,
            "draft_vocab_size": entries.whole("draft_vocab_size", layers.vocab_size),
            "target_hidden_size": entries.whole("target_hidden_size", layers.hidden_size),
            "taps": read_taps(path, entries, target.layers, taps, choices, "aux_hidden_state_layer_ids"),
        }
        return fields | {"choices": tuple(choices)}, entries


class ContextHead(TrainedHead):
    """The base of these heads; config is a ContextConfig, other arguments and errors are as for TrainedHead."""

    def _own_places(self, blank: Blank) -> dict[str, Tensor]:
        return {"hidden_norm.weight": self.hidden_norm}

    def _lay_out_own(self, weights: torch.dtype | str) -> Sequence[str]:
        return []

    def read(self, taps: Tensor, cache, numbers) -> Tensor:
        """Writes the keys of a text's rows, of the target's taps [R, taps, hidden] fp32; the rows [R, H] that they are
        made of; a straight line of ops."""
        shape = self.config.layers
        context = rms_norm(self.joined(taps), self.hidden_norm, shape.norm_epsilon, out_dtype=self.dtype)
        for index, layer in enumerate(self.layers):
            projected = linear(context, layer.qkv, layer.qkv_bias, out_dtype=torch.float32)
            write_keys(projected, layer, shape, cache, index, numbers)
        return context

    def guess(self, embedded: Tensor, given: Tensor, cache, numbers) -> list[Tensor]:
        """What rows say: [R, H] after the last norm, then what the kind's batch takes; a straight line of ops.

        Args:
            embedded: [R, H] fp32 of the rows' tokens, used up.
            given: [R, given_width] fp32 that rows take in beside.
            cache: of keys and values, one layer for each of the head's.
            numbers: where the rows lie, a pyspec.runners.numbers.Numbers.
        """
        raise NotImplementedError  # abstract: each kind has its own

    def _through_layers(self, stream: Tensor, delta: Tensor | None, cache, numbers) -> Tensor:
        """[R, H] after the last norm, of the residual stream [R, H] fp32, used up, and what is to be added to it."""
        shape, epsilon = self.config.layers, self.config.layers.norm_epsilon
        for index, layer in enumerate(self.layers):
            x = rms_norm(stream, layer.scales.attention, epsilon, delta=delta, out_dtype=self.dtype)
            delta = attention(x, layer, shape, cache, index, numbers)
            x = rms_norm(stream, layer.scales.feed_forward, epsilon, delta=delta, out_dtype=self.dtype)
            delta = feed_forward(x, layer.gate_up, layer.down, shape.activation)
        return rms_norm(stream, self.norm, epsilon, delta=delta, out_dtype=self.dtype)
