"""Mixtures of experts: layers whose feed-forward part is many, of which each row goes to a few."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyspec.architectures import Unsupported
from pyspec.architectures.blocks import experts
from pyspec.architectures.decoder import DecoderConfig
from pyspec.architectures.llama import LayerWeights, LlamaWeights
from pyspec.architectures.shapes import GGUF_TENSORS
from pyspec.architectures.weights import Blank, Matrix, dense, laid_out
from pyspec.entries import Entries
from pyspec.ops.route_experts import MOST_EXPERTS
from pyspec.ops.weight_formats import Codes, join_codes

__all__ = ["GGUF_EXPERTS", "MixtureConfig", "MixtureWeights", "StackedExperts", "read_choices", "read_gguf_choices"]

GGUF_EXPERTS = GGUF_TENSORS | {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}


@dataclass(frozen=True)
class MixtureConfig(DecoderConfig):
    """The shape of a model with experts.

    Attributes:
        experts: of a layer.
        experts_per_token: that a row goes to.
        expert_size: what intermediate_size is to a layer without experts.
        shared_size: the same of an expert of all rows, whose gate is a sigmoid; 0 where there is none.
        renormalise: whether the gates of a row sum to 1.
        expert_layers: whether each layer has experts; empty where all have.
    """

    experts: int = 1
    experts_per_token: int = 1
    expert_size: int = 1
    shared_size: int = 0
    renormalise: bool = False
    expert_layers: tuple[bool, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if not self.expert_layers:
            object.__setattr__(self, "expert_layers", (True,) * self.layers)
        if self.experts > MOST_EXPERTS:
            raise Unsupported(
                f"{self.architecture} has {self.experts} experts, our kernels have at most {MOST_EXPERTS}"
            )
        if self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token must be at most experts, got {self.experts_per_token} of {self.experts} experts"
            )

    def empty_layers(self, blank: Blank) -> list[LayerWeights]:
        kind = SharedMixtureLayer if self.shared_size else MixtureLayer
        return [(kind if has_experts else LayerWeights).empty(self, blank) for has_experts in self.expert_layers]


def read_choices(entries: Entries) -> dict[str, int]:
    """How many experts there are, and how many a row goes to, by a config.json, where either name may be in use."""
    stated = [name for name in ("num_experts", "num_local_experts") if name in entries]
    count = entries.whole(stated[0] if stated else "num_experts")
    return {"experts": count, "experts_per_token": entries.whole("num_experts_per_tok", most=count)}


def read_gguf_choices(entries: Entries) -> dict[str, int]:
    """The same, by a GGUF file."""
    count = entries.whole("expert_count")
    return {"experts": count, "experts_per_token": entries.whole("expert_used_count", most=count)}


@dataclass
class MixtureLayer(LayerWeights):
    """A layer with experts, whose matrices are [experts, outputs, inputs]; the router's is in fp32."""

    DOWN = "experts.down_proj"

    router: Matrix  # [experts, hidden]

    @classmethod
    def empty_feed_forward(cls, config: MixtureConfig, blank: Blank) -> dict[str, Tensor]:
        return {
            "gate_up": blank.matrix(config.experts, 2 * config.expert_size, config.hidden_size),
            "down": blank.matrix(config.experts, config.hidden_size, config.expert_size),
            "router": blank.vector(config.experts, config.hidden_size),
        }

    def named_gates(self, config: MixtureConfig) -> dict[str, Tensor]:
        gate, up = dense(self.gate_up).split(config.expert_size, 1)
        return {"gate": dense(self.router), "experts.gate_proj": gate, "experts.up_proj": up}

    def lay_out(self, dtype: torch.dtype | str) -> None:
        super().lay_out(dtype)
        self.router = laid_out(self.router, torch.float32)

    def feed_forward(self, x: Tensor, config: MixtureConfig) -> Tensor:
        return experts(x, self, config)


@dataclass
class SharedMixtureLayer(MixtureLayer):
    """A layer with experts and one more, of all rows."""

    MATRICES = (*LayerWeights.MATRICES, "shared_gate_up", "shared_down")

    shared_gate_up: Matrix  # [2 * shared_size, hidden]
    shared_down: Matrix  # [hidden, shared_size]
    shared_router: Matrix  # [1, hidden], of its gate

    @classmethod
    def empty_feed_forward(cls, config: MixtureConfig, blank: Blank) -> dict[str, Tensor]:
        return super().empty_feed_forward(config, blank) | {
            "shared_gate_up": blank.matrix(2 * config.shared_size, config.hidden_size),
            "shared_down": blank.matrix(config.hidden_size, config.shared_size),
            "shared_router": blank.vector(1, config.hidden_size),
        }

    def named_gates(self, config: MixtureConfig) -> dict[str, Tensor]:
        gate, up = dense(self.shared_gate_up).split(config.shared_size)
        tensors = {"gate_proj": gate, "up_proj": up, "down_proj": dense(self.shared_down)}
        tensors = {f"shared_expert.{name}": tensor for name, tensor in tensors.items()}
        return super().named_gates(config) | tensors | {"shared_expert_gate": dense(self.shared_router)}

    def lay_out(self, dtype: torch.dtype | str) -> None:
        super().lay_out(dtype)
        self.shared_router = laid_out(self.shared_router, torch.float32)


class MixtureWeights(LlamaWeights):
    """All weights, by the names of Hugging Face's Qwen3 MoE, with one tensor for all experts of a layer."""

    @staticmethod
    def checkpoint(stored) -> StackedExperts:
        return StackedExperts(stored)


# ==== checkpoints ====

# Names in the files and in the classes of other families, and in old files of llama.cpp.
_NAMES = (
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.mlp\.router\.(layer\.)?weight$", ".mlp.gate.weight"),
    (r"\.mlp\.input_linear\.weight$", ".mlp.experts.gate_up_proj"),
    (r"\.mlp\.output_linear\.weight$", ".mlp.experts.down_proj"),
    (r"(\.experts\.\d+)\.w1\.", r"\1.gate_proj."),
    (r"(\.experts\.\d+)\.w2\.", r"\1.down_proj."),
    (r"(\.experts\.\d+)\.w3\.", r"\1.up_proj."),
    (r"\.ffn_(gate|up|down)\.(\d+)\.weight$", r".mlp.experts.\2.\1_proj.weight"),
)


class StackedExperts:
    """A checkpoint of a mixture: `shapes` of all tensors, `blocks` or `codes` of one.

    Each expert's tensor, ...experts.3.gate_proj.weight, is a part of that of all, ...experts.gate_proj.weight [experts,
    outputs, inputs]; where gates and ups are one tensor, each has its rows of it.
    """

    def __init__(self, stored):
        self._stored = stored
        self._whole: dict[str, tuple[str, slice]] = {}  # tensors, and the rows of each expert's part
        self._parts: dict[str, dict[int, str]] = defaultdict(dict)  # tensors by expert
        self.shapes: dict[str, tuple[int, ...]] = {}
        for original, shape in stored.shapes.items():
            self._add(original, shape)

    def _add(self, original: str, shape: tuple[int, ...]) -> None:
        name = original
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if match := re.fullmatch(r"(.*\.experts)\.gate_up_proj(\.weight)?", name):
            middle = shape[1] // 2
            for part, rows in (("gate", slice(middle)), ("up", slice(middle, None))):
                self.shapes[f"{match[1]}.{part}_proj.weight"] = (shape[0], middle, *shape[2:])
                self._whole[f"{match[1]}.{part}_proj.weight"] = original, rows
        elif match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            name, number = f"{match[1]}.{match[3]}.weight", int(match[2])
            if self._parts[name] and self.shapes[name][1:] != shape:  # named as it is, which no model has
                self.shapes[original], self._whole[original] = shape, (original, slice(None))
                return
            self._parts[name][number] = original
            self.shapes[name] = (len(self._parts[name]), *shape)
        else:
            name = re.sub(r"(\.experts\.down_proj)$", r"\1.weight", name)
            self.shapes[name], self._whole[name] = shape, (original, slice(None))

    def blocks(self, name: str) -> Iterator[tuple[object, Tensor]]:
        """Places along the first dimensions, and their values."""
        if name in self._parts:
            for place, number in enumerate(sorted(self._parts[name])):
                for rows, values in self._stored.blocks(self._parts[name][number]):
                    yield (place, rows), values
            return
        original, rows = self._whole[name]
        for places, values in self._stored.blocks(original):
            yield places, values if rows == slice(None) else values[:, rows]

    def codes(self, name: str) -> Codes | None:
        """The tensor in the bits that it has, its experts one below another; None where it has floats."""
        if name in self._parts:
            parts = [self._stored.codes(self._parts[name][number]) for number in sorted(self._parts[name])]
            formats = {None if part is None else part.format.name for part in parts}
            return join_codes(parts) if len(formats) == 1 and None not in formats else None
        original, rows = self._whole[name]
        codes = self._stored.codes(original)
        if codes is None or rows == slice(None):
            return codes
        places = torch.arange(codes.outputs, device="cpu").view(self._stored.shapes[original][:2])
        return codes.rows(places[:, rows].flatten())
