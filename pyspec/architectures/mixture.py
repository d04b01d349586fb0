"""Mixtures of experts: layers whose feed-forward part is many, of which each row goes to a few."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from pyspec.architectures import Unsupported
from pyspec.architectures.blocks import experts
from pyspec.architectures.decoder import DecoderConfig
from pyspec.architectures.llama import DecoderLayer, LayerWeights, LlamaWeights
from pyspec.architectures.shapes import GGUF_TENSORS
from pyspec.architectures.weights import Blank, Matrix, dense, laid_out
from pyspec.entries import Entries
from pyspec.ops.lay_out import StoredMatrix, stored_floats
from pyspec.ops.route_experts import MOST_EXPERTS

__all__ = [
    "GGUF_EXPERTS",
    "GGUF_ROUTERS",
    "ExpertCheckpoint",
    "MixtureConfig",
    "MixtureLayer",
    "MixtureWeights",
    "SharedExpertPart",
    "SharedMixtureLayer",
    "read_choices",
    "read_gguf_choices",
]

GGUF_EXPERTS = GGUF_TENSORS | {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
GGUF_ROUTERS = {"ffn_gate_inp_shexp.weight": lambda row: row.view(1, -1)}  # llama.cpp's tools drop a dimension of one


@dataclass(frozen=True)
class MixtureConfig(DecoderConfig):
    """The shape of a model with experts.

    Attributes:
        experts: of a layer.
        experts_per_token: that a row goes to.
        expert_size: what intermediate_size is to a layer without experts.
        shared_size: the same of an expert of all rows; 0 where there is none.
        shared_gate: whether it has a gate, which is a sigmoid.
        sigmoid_gates: whether the gates of the others are sigmoids instead of a softmax.
        choice_bias: whether experts are chosen by their gates and a bias of each.
        renormalise: whether the gates of a row sum to 1.
        gate_scale: of all gates, behind that.
        expert_layers: whether each layer has experts; empty where all have.
    """

    experts: int = 1
    experts_per_token: int = 1
    expert_size: int = 1
    shared_size: int = 0
    shared_gate: bool = True
    sigmoid_gates: bool = False
    choice_bias: bool = False
    renormalise: bool = False
    gate_scale: float = 1.0
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
    names = ("num_experts", "num_local_experts")
    stated = [name for name in names if name in entries] or [name for name in names if entries.get(name) is not None]
    count = entries.whole(stated[0] if stated else "num_experts")
    return {"experts": count, "experts_per_token": entries.whole("num_experts_per_tok", most=count)}


def read_gguf_choices(entries: Entries) -> dict[str, int]:
    """The same, by a GGUF file."""
    count = entries.whole("expert_count")
    return {"experts": count, "experts_per_token": entries.whole("expert_used_count", most=count)}


@dataclass
class ExpertPart(DecoderLayer):
    """The feed-forward part of a layer with experts, whose matrices are [experts, outputs, inputs]; the router's is in
    fp32."""

    router_bias = gate_up_bias = gate_up_biases = down_bias = None  # gate_up_biases: as expert_gates takes them

    router: Matrix  # [experts, hidden]
    choice_bias: Tensor | None  # [experts]

    @classmethod
    def empty_feed_forward(cls, config: MixtureConfig, blank: Blank) -> dict[str, Tensor | None]:
        return {
            "gate_up": blank.matrix(config.experts, len(config.inner_parts) * config.expert_size, config.hidden_size),
            "down": blank.matrix(config.experts, config.hidden_size, config.expert_size),
            "router": blank.vector(config.experts, config.hidden_size),
            "choice_bias": blank.vector(config.experts) if config.choice_bias else None,
        }

    def named_feed_forward(self, config: MixtureConfig) -> dict[str, Tensor]:
        tensors = {"gate": dense(self.router)}
        if self.choice_bias is not None:
            tensors["choice_bias"] = self.choice_bias
        for number, (gate_up, down) in enumerate(zip(dense(self.gate_up), dense(self.down), strict=True)):
            for name, part in zip(config.inner_parts, gate_up.split(config.expert_size), strict=True):
                tensors[f"experts.{number}.{name}_proj"] = part
            tensors[f"experts.{number}.down_proj"] = down
        return tensors

    def lay_out(self, dtype: torch.dtype | str) -> None:
        super().lay_out(dtype)
        self.router = laid_out(self.router, torch.float32)

    def feed_forward(self, x: Tensor, config: MixtureConfig) -> Tensor:
        return experts(x, self, config)


@dataclass
class MixtureLayer(ExpertPart, LayerWeights):
    """A layer with attention and experts."""


@dataclass
class SharedExpertPart(ExpertPart):
    """The feed-forward part of a layer with experts and one more, of all rows."""

    SHARED = ("shared_gate_up", "shared_down")  # matrices

    shared_gate_up: Matrix  # [2 * shared_size, hidden]
    shared_down: Matrix  # [hidden, shared_size]
    shared_router: Matrix | None  # [1, hidden], of its gate

    @classmethod
    def empty_feed_forward(cls, config: MixtureConfig, blank: Blank) -> dict[str, Tensor | None]:
        return super().empty_feed_forward(config, blank) | {
            "shared_gate_up": blank.matrix(len(config.inner_parts) * config.shared_size, config.hidden_size),
            "shared_down": blank.matrix(config.hidden_size, config.shared_size),
            "shared_router": blank.vector(1, config.hidden_size) if config.shared_gate else None,
        }

    def named_feed_forward(self, config: MixtureConfig) -> dict[str, Tensor]:
        gate_up = dense(self.shared_gate_up)
        parts = zip(config.inner_parts, gate_up.split(config.shared_size), strict=True)
        tensors = {f"{name}_proj": part for name, part in parts}
        if "gate_up" in config.fused:
            tensors = {"gate_up_proj": gate_up}
        tensors["down_proj"] = dense(self.shared_down)
        tensors = {f"shared_expert.{name}": tensor for name, tensor in tensors.items()}
        if self.shared_router is not None:
            tensors["shared_expert_gate"] = dense(self.shared_router)
        return super().named_feed_forward(config) | tensors

    def lay_out(self, dtype: torch.dtype | str) -> None:
        super().lay_out(dtype)
        if self.shared_router is not None:
            self.shared_router = laid_out(self.shared_router, torch.float32)


@dataclass
class SharedMixtureLayer(SharedExpertPart, LayerWeights):
    """A layer with attention, experts and one more."""

    MATRICES = (*LayerWeights.MATRICES, *SharedExpertPart.SHARED)


class MixtureWeights(LlamaWeights):
    """All weights, by the names of Hugging Face's Qwen3 MoE."""

    @staticmethod
    def checkpoint(stored, config) -> ExpertCheckpoint:
        return ExpertCheckpoint(stored)


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
    (r"\.mlp\.(gate|up|down)_proj\.(\d+)\.weight$", r".mlp.experts.\2.\1_proj.weight"),
)


class ExpertCheckpoint:
    """A checkpoint of a mixture, see checkpoints.weights, with a tensor for each matrix of each expert.

    A stored one may be [experts, outputs, inputs], and the gates of an expert lie above its ups then, as in the classes
    of transformers.
    """

    NAMES = _NAMES
    IS_TRANSPOSED = False  # whether a stored one is [experts, inputs, outputs]

    def __init__(self, stored):
        self._stored = stored
        self._places: dict[str, tuple[str, tuple | None]] = {}  # a stored tensor, and where in it
        self.shapes: dict[str, tuple[int, ...]] = {}
        for original, shape in stored.shapes.items():
            name = original
            for pattern, replacement in self.NAMES:
                name = re.sub(pattern, replacement, name)
            for part, place in self._split(name, shape).items():
                self._places[part], self.shapes[part] = (original, place), self._shape(shape, place)
        self._left = Counter(original for original, _ in self._places.values())

    def _split(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple | None]:
        """The tensors that a stored one is, or is of, and where in it they are: an expert and rows, rows, or all."""
        match = re.fullmatch(r"(.*\.experts)\.(gate_up|up|down)_proj", name)
        if match is None or len(shape) != 3:
            return {name: None}
        parts = self._parts(match[2], shape[2 if self.IS_TRANSPOSED else 1])
        return {
            f"{match[1]}.{number}.{part}_proj.weight": (number, rows)
            for number, (part, rows) in product(range(shape[0]), parts.items())
        }

    def _shape(self, shape: tuple[int, ...], place: tuple | None) -> tuple[int, ...]:
        """Of a part of a stored tensor."""
        if place is None:
            return shape
        *number, rows = place
        shape = shape[len(number) :]
        outputs, *inputs = reversed(shape) if number and self.IS_TRANSPOSED else shape
        return (len(range(outputs)[rows]), *inputs)

    def _parts(self, kind: str, outputs: int) -> dict[str, slice]:
        """The tensors that a stored one is of, and their rows."""
        halves = {"gate": slice(outputs // 2), "up": slice(outputs // 2, None)}
        return halves if kind == "gate_up" else {kind: slice(None)}

    def blocks(self, name: str) -> Iterator[tuple[Tensor | slice, Tensor]]:
        """Row numbers and the values of these rows."""
        original, place = self._places[name]
        if place is None:
            yield from self._stored.blocks(original)
        else:
            yield slice(None), self._part(original, place)

    def stored(self, name: str) -> StoredMatrix | None:
        """The matrix as it lies in the file, or in memory."""
        original, place = self._places[name]
        return self._stored.stored(original) if place is None else stored_floats(self._part(original, place))

    def release(self, name: str) -> None:
        """Says that a tensor is done with."""
        original, _ = self._places[name]
        self._left[original] -= 1
        if not self._left[original]:
            self._stored.release(original)

    def _part(self, original: str, place: tuple) -> Tensor:
        *number, rows = place
        blocks = [values.detach() for _, values in self._stored.blocks(original)]
        whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        if not number:
            return whole[rows]
        matrix = whole[number[0]]
        return matrix.t()[rows].contiguous() if self.IS_TRANSPOSED else matrix[rows]
