"""The shape, the weights and the forward of Gemma 4, whose checkpoints gemma4.py reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyspec.architectures import Unsupported
from pyspec.architectures.blocks import attention, tap
from pyspec.architectures.decoder import AROUND, DecoderConfig
from pyspec.architectures.llama import LayerWeights, LlamaWeights
from pyspec.architectures.mixture import ExpertCheckpoint
from pyspec.architectures.rotary import Rope, rope_frequencies, rope_table
from pyspec.architectures.weights import Blank, Matrix, NativeLayer, NativeWeights, dense, laid_out
from pyspec.ops.expert_linear import expert_linear
from pyspec.ops.linear import linear
from pyspec.ops.rms_norm import rms_norm
from pyspec.ops.route_experts import MOST_EXPERTS, mix_experts, route_experts
from pyspec.ops.swiglu import swiglu
from pyspec.ops.tree_attention import TREE_HEAD_DIMS

__all__ = ["Gemma4Config", "Gemma4Weights"]


@dataclass(frozen=True)
class Gemma4Config(DecoderConfig):
    """The shape of a model. kv_heads, head_dim and local_rope_base are those of layers with a window.

    Attributes:
        is_global: whether each layer is of the kind that has no window.
        global_kv_heads, global_head_dim: of these.
        global_turned: of the pairs of dimensions of a head, how many are turned in these, the first ones.
        shared_layers: how many layers, the last, read the keys of the last layer before them of their kind.
        shared_intermediate_size: what intermediate_size is to them.
        input_size: of each layer's part of the second embedding; 0 where there is none.
        experts, experts_per_token, expert_size: as a MixtureConfig has them; no experts where they are 0.
    """

    norm_names = AROUND  # noqa: RUF012
    norms_values = True

    is_global: tuple[bool, ...] = ()
    global_kv_heads: int = 1
    global_head_dim: int = 512
    global_turned: int = 64
    shared_layers: int = 0
    shared_intermediate_size: int = 1
    input_size: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.global_head_dim not in TREE_HEAD_DIMS:
            raise Unsupported(f"global_head_dim {self.global_head_dim}: supported are {TREE_HEAD_DIMS}")
        if self.heads % self.global_kv_heads:
            raise ValueError(f"heads must be a multiple of global_kv_heads, got {self.heads}, {self.global_kv_heads}")
        writers = self.is_global[: self.layers - self.shared_layers]
        if not set(self.is_global) <= set(writers):
            raise ValueError(f"shared_layers must leave a layer of each kind that has keys, got {self.shared_layers}")
        if self.experts and self.shared_layers:
            raise Unsupported(f"{self.architecture} has experts and layers that share keys, our kernels have either")
        if self.experts > MOST_EXPERTS:
            raise Unsupported(f"{self.architecture} has {self.experts} experts, our kernels have up to {MOST_EXPERTS}")

    @property
    def layer_heads(self) -> list[tuple[int, int]]:
        """Key heads of each layer and their width."""
        shapes = {False: (self.kv_heads, self.head_dim), True: (self.global_kv_heads, self.global_head_dim)}
        return [shapes[is_global] for is_global in self.is_global]

    @property
    def key_layers(self) -> list[int]:
        """Of each layer, the one whose keys it reads."""
        own = self.layers - self.shared_layers
        last = {kind: layer for layer, kind in enumerate(self.is_global[:own])}
        return [layer if layer < own else last[kind] for layer, kind in enumerate(self.is_global)]

    def of_layer(self, layer: int) -> Gemma4Config:
        """The shape of a model whose layers are all like one of this."""
        kv_heads, head_dim = self.layer_heads[layer]
        is_shared = layer >= self.layers - self.shared_layers
        size = self.shared_intermediate_size if is_shared else self.intermediate_size
        return replace(self, kv_heads=kv_heads, head_dim=head_dim, intermediate_size=size)

    def empty_layers(self, blank: Blank) -> list[Gemma4Layer]:
        kinds = {False: Gemma4Layer, True: SharedKeysLayer} if not self.experts else {False: ExpertLayer}
        own = self.layers - self.shared_layers
        return [kinds[layer >= own].empty(self.of_layer(layer), blank) for layer in range(self.layers)]

    def rope_frequencies(self) -> Tensor:
        """Radians per position, [global_head_dim / 2] fp32, of layers without a window."""
        frequencies = rope_frequencies(self.rope_base, self.global_head_dim, self.rope_scaling)
        frequencies[self.global_turned :] = 0
        return frequencies

    def ropes(self, positions: int, device: torch.device) -> list[Rope]:
        """What each layer's heads are turned by at so many positions."""
        local = rope_frequencies(self.local_rope_base, self.head_dim, None)
        ropes = [Rope(rope_table(each, positions, device)) for each in (local, self.rope_frequencies())]
        return [ropes[is_global] for is_global in self.is_global]


@dataclass
class Gemma4Layer(LayerWeights):
    """A layer, whose output is multiplied by a number of its own.

    Where there is a second embedding, the layer's part of it goes through a third part: per_layer_projection
    (activation(per_layer_gate x) part).
    """

    shape: Gemma4Config  # of_layer
    layer_scale: Tensor  # [1]
    per_layer_gate: Matrix | None  # [input_size, hidden]
    per_layer_projection: Matrix | None  # [hidden, input_size]
    per_layer_norm: Tensor | None  # [hidden], of what the projection gives

    @classmethod
    def empty(cls, config: Gemma4Config, blank: Blank) -> Gemma4Layer:
        layer = super().empty(config, blank)
        if config.input_size:
            layer.MATRICES = (*cls.MATRICES, "per_layer_gate", "per_layer_projection")
        return layer

    @classmethod
    def empty_feed_forward(cls, config: Gemma4Config, blank: Blank) -> dict:
        hidden, size = config.hidden_size, config.input_size
        return super().empty_feed_forward(config, blank) | {
            "shape": config,
            "layer_scale": blank.vector(1),
            "per_layer_gate": blank.matrix(size, hidden) if size else None,
            "per_layer_projection": blank.matrix(hidden, size) if size else None,
            "per_layer_norm": blank.vector(hidden) if size else None,
        }

    def named(self, config: Gemma4Config, prefix: str) -> dict[str, Tensor]:
        tensors = super().named(self.shape, prefix) | {prefix + "layer_scalar": self.layer_scale}
        if self.per_layer_gate is not None:
            tensors[prefix + "per_layer_input_gate.weight"] = dense(self.per_layer_gate)
            tensors[prefix + "per_layer_projection.weight"] = dense(self.per_layer_projection)
            tensors[prefix + "post_per_layer_input_norm.weight"] = self.per_layer_norm
        return tensors

    def prepare(self, config: Gemma4Config) -> None:
        super().prepare(self.shape)
        self.scale = float(self.layer_scale)

    def beside(self, hidden: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
        """What the feed-forward part gives, with that of experts where there are any; hidden is what it took in."""
        return delta


@dataclass
class SharedKeysLayer(Gemma4Layer):
    """A layer that reads the keys of another."""

    has_keys = False


@dataclass
class ExpertLayer(Gemma4Layer):
    """A layer with experts beside the feed-forward part; what either gives has a norm of its own.

    The router is in fp32, and so are its inputs, whose norm has no weights but router_scale / sqrt(hidden).
    """

    MATRICES = (*Gemma4Layer.MATRICES, "expert_gate_up", "expert_down")

    router: Matrix  # [experts, hidden]
    router_scale: Tensor  # [hidden]
    expert_scales: Tensor  # [experts], of gates
    expert_gate_up: Matrix  # [experts, 2 * expert_size, hidden]
    expert_down: Matrix  # [experts, hidden, expert_size]
    dense_output: Tensor  # [hidden], weights of norms: of what the feed-forward part gives
    expert_input: Tensor  # of what experts take in
    expert_output: Tensor  # and of what they give

    @classmethod
    def empty_feed_forward(cls, config: Gemma4Config, blank: Blank) -> dict:
        hidden, size = config.hidden_size, config.expert_size
        norms = {name: blank.vector(hidden) for name in ("dense_output", "expert_input", "expert_output")}
        return super().empty_feed_forward(config, blank) | {
            "router": blank.vector(config.experts, hidden),
            "router_scale": blank.vector(hidden),
            "expert_scales": blank.vector(config.experts),
            "expert_gate_up": blank.matrix(config.experts, 2 * size, hidden),
            "expert_down": blank.matrix(config.experts, hidden, size),
            **norms,
        }

    def named(self, config: Gemma4Config, prefix: str) -> dict[str, Tensor]:
        tensors = super().named(config, prefix) | {
            prefix + "router.proj.weight": dense(self.router),
            prefix + "router.scale": self.router_scale,
            prefix + "router.per_expert_scale": self.expert_scales,
            prefix + "post_feedforward_layernorm_1.weight": self.dense_output,
            prefix + "pre_feedforward_layernorm_2.weight": self.expert_input,
            prefix + "post_feedforward_layernorm_2.weight": self.expert_output,
        }
        for kind, matrix in (("gate_up", self.expert_gate_up), ("down", self.expert_down)):
            for number, values in enumerate(dense(matrix)):
                tensors[f"{prefix}experts.{number}.{kind}_proj.weight"] = values
        return tensors

    def lay_out(self, dtype: torch.dtype | str) -> None:
        super().lay_out(dtype)
        self.router = laid_out(self.router, torch.float32)

    def prepare(self, config: Gemma4Config) -> None:
        super().prepare(config)
        self.router_norm = self.router_scale * config.hidden_size**-0.5

    def beside(self, hidden: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
        config, epsilon = self.shape, self.shape.norm_epsilon
        logits = linear(rms_norm(hidden, self.router_norm, epsilon), self.router)
        gates, ids = route_experts(logits, config.experts_per_token, renormalise=True, scales=self.expert_scales)
        x = rms_norm(hidden, self.expert_input, epsilon, out_dtype=dtype)
        inner = expert_linear(x, ids, self.expert_gate_up, out_dtype=torch.float32)
        inner = swiglu(inner, activation=config.activation, out_dtype=dtype)
        values = expert_linear(inner, ids.view(-1, 1), self.expert_down, out_dtype=torch.float32)
        both = rms_norm(delta, self.dense_output, epsilon)
        rms_norm(both, None, epsilon, delta=mix_experts(values, gates), delta_weight=self.expert_output)
        return both


@dataclass
class Gemma4Weights(LlamaWeights):
    """All weights, by the names of Hugging Face's Gemma 4.

    Where there is a second embedding, `per_layer_embedding` [vocab, layers * input_size] is its table, read by rows;
    what a layer takes in of it is mixed with `per_layer_model` [layers * input_size, hidden] times the first one.
    """

    INPUTS = ("per_layer_embedding", "per_layer_model")

    per_layer_embedding: Matrix | None = None
    per_layer_model: Matrix | None = None
    per_layer_norm: Tensor | None = None  # [input_size], of the mix

    @staticmethod
    def checkpoint(stored, config: Gemma4Config) -> Gemma4Checkpoint:
        return Gemma4Checkpoint(stored, config)

    @classmethod
    def empty(cls, config: Gemma4Config, dtype, device, matrices=None) -> Gemma4Weights:
        weights, blank = super().empty(config, dtype, device, matrices), Blank(dtype, device, matrices)
        if size := config.layers * config.input_size:
            weights.MATRICES = (*cls.MATRICES, *cls.INPUTS)
            weights.per_layer_embedding = blank.matrix(config.vocab_size, size)
            weights.per_layer_model = blank.matrix(size, config.hidden_size)
            weights.per_layer_norm = blank.vector(config.input_size)
        return weights

    def named_outside(self, config: Gemma4Config) -> dict[str, Tensor]:
        tensors = super().named_outside(config)
        if config.input_size:
            tensors["model.embed_tokens_per_layer.weight"] = dense(self.per_layer_embedding)
            tensors["model.per_layer_model_projection.weight"] = dense(self.per_layer_model)
            tensors["model.per_layer_projection_norm.weight"] = self.per_layer_norm
        return tensors

    def lay_out_outside(self, dtype: torch.dtype | str) -> None:
        super().lay_out_outside(dtype)
        for name in self.INPUTS if self.per_layer_model is not None else ():
            setattr(self, name, laid_out(getattr(self, name), dtype))

    def in_order(self) -> list[tuple[NativeLayer | NativeWeights, str]]:
        own = [(self, name) for name in self.INPUTS] if self.per_layer_model is not None else []
        return own + super().in_order()

    def embeds_by_op(self, config: Gemma4Config) -> bool:
        return False

    def embed(self, config: Gemma4Config, tokens: Tensor) -> Tensor:
        """Embedded rows [R, H], and behind them, in the same vector, what each layer takes in, [layers, R, size]."""
        hidden = super().embed(config, tokens)
        if not config.input_size:
            return hidden
        rows, size = len(tokens), config.input_size
        matrix = self.per_layer_model
        x = hidden.to(matrix.dtype) if matrix.dtype in (torch.float16, torch.bfloat16) else hidden
        context = linear(x, matrix, out_dtype=torch.float32) * config.hidden_size**-0.5
        context = rms_norm(context.view(-1, size), self.per_layer_norm, config.norm_epsilon)
        inputs = self.per_layer_embedding.rows(tokens) * size**0.5
        inputs = (context.view(rows, -1, size) + inputs.view(rows, -1, size)) * 2**-0.5
        return torch.cat((hidden.flatten(), inputs.transpose(0, 1).flatten()))

    def forward(
        self, config: Gemma4Config, hidden: Tensor, cache, numbers, dtype, layers=None, taps=()
    ) -> list[Tensor]:
        rows, delta, delta_scale, scale = len(numbers.tokens), None, None, 1.0
        tapped = []
        if config.input_size:
            hidden, inputs = hidden.split([rows * config.hidden_size, rows * config.layers * config.input_size])
            hidden, inputs = hidden.view(rows, -1), inputs.view(config.layers, rows, -1)

        def norm(weight: Tensor | None) -> Tensor:
            """Takes in what the last part of a layer gave."""
            change = {"delta": delta, "delta_weight": delta_scale, "hidden_scale": scale}
            return rms_norm(hidden, weight, config.norm_epsilon, out_dtype=dtype, **change)

        for index in range(config.layers) if layers is None else layers:
            layer = self.layers[index]
            scales = layer.scales
            x = norm(scales.attention)
            if index in taps:
                tapped.append(tap(hidden))
            delta, delta_scale = attention(x, layer, config, cache, index, numbers), scales.attention_output
            scale = 1.0
            x = norm(scales.feed_forward)
            delta = layer.beside(hidden, layer.feed_forward(x, config), dtype)
            delta_scale = scales.feed_forward_output
            if config.input_size:
                gate = linear(norm(None), layer.per_layer_gate, out_dtype=torch.float32)
                inner = swiglu(gate, up=inputs[index], activation=config.activation, out_dtype=dtype)
                delta = linear(inner, layer.per_layer_projection, out_dtype=torch.float32)
                delta_scale = layer.per_layer_norm
            scale = layer.scale
        normed = norm(self.last_scale)
        return [normed, *tapped, *([tap(hidden)] if config.layers in taps else [])]


class Gemma4Checkpoint(ExpertCheckpoint):
    """A checkpoint of Gemma 4, see ExpertCheckpoint: gates and ups of an expert are one tensor.

    Values that are keys have their matrix; layers that read the keys of others have none, though files may.
    """

    NAMES = (
        (r"\.layer_scalar\.weight$", ".layer_scalar"),
        (r"\.router\.proj\.scale$", ".router.scale"),
        (r"\.experts\.down_proj\.scale$", ".router.per_expert_scale"),
    )

    def __init__(self, stored, config: Gemma4Config):
        super().__init__(stored)
        own = config.layers - config.shared_layers
        for layer in range(config.layers):
            names = {part: f"model.layers.{layer}.self_attn.{part}" for part in ("k_proj", "v_proj", "k_norm")}
            keys, values = (f"{names[part]}.weight" for part in ("k_proj", "v_proj"))
            if layer >= own:
                for name in [name for name in self.shapes if name.startswith(tuple(f"{n}." for n in names.values()))]:
                    self._left[self._places.pop(name)[0]] -= 1
                    del self.shapes[name]
            elif keys in self.shapes and values not in self.shapes:
                self._places[values], self.shapes[values] = self._places[keys], self.shapes[keys]
                self._left[self._places[keys][0]] += 1

    def _parts(self, kind: str, outputs: int) -> dict[str, slice]:
        return {kind: slice(None)}
