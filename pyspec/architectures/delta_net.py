"""Gated delta nets: the shape and the weights of the recurrent layers of Qwen3-Next, Qwen3.5 and their relatives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyspec.architectures import Unsupported
from pyspec.architectures.blocks import gated_delta_net
from pyspec.architectures.hybrid import HybridConfig
from pyspec.architectures.llama import DecoderLayer
from pyspec.architectures.weights import Blank, Matrix, dense
from pyspec.entries import Entries
from pyspec.ops.selective_state import LANES, MULTIPLE

__all__ = ["DeltaLayer", "DeltaShape", "read_delta_shape"]


@dataclass(frozen=True)
class DeltaShape:
    """The shape of the recurrent layers; see pyspec.ops.gated_delta.

    Attributes:
        layers: how many there are.
        heads, head_dim: of values.
        key_heads, state_size: heads of queries and keys, and their width.
        conv_taps: of the convolution over queries, keys and values.
        strength, tiled: see gated_delta.
        inputs: the input matrices of checkpoints, by what follows in_proj_ in their names: a letter for each of
            queries, keys, values, gates (z), beta and decay (a).
        norm_epsilon: of the norm of what a head gives; the model's where it is None.
    """

    layers: int
    heads: int
    head_dim: int
    key_heads: int
    state_size: int
    conv_taps: int
    strength: float = 1.0
    tiled: bool = False
    inputs: tuple[str, ...] = ("qkv", "z", "b", "a")
    norm_epsilon: float | None = None

    def __post_init__(self):
        for name in ("layers", "heads", "head_dim", "key_heads", "state_size", "conv_taps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of gated delta nets must be at least 1, got {getattr(self, name)}")
        if self.head_dim % LANES or self.state_size % MULTIPLE:
            raise Unsupported(
                f"HybridRunner has value heads in multiples of {LANES} and key heads in multiples of {MULTIPLE}, "
                f"got {self.head_dim} and {self.state_size}"
            )
        if self.heads % self.key_heads:
            raise ValueError(f"value heads must be a multiple of key heads, got {self.heads} and {self.key_heads}")

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_channels(self) -> int:
        return self.key_heads * self.state_size

    @property
    def conv_channels(self) -> int:
        return self.channels + 2 * self.key_channels

    @property
    def input_rows(self) -> dict[str, int]:
        """Rows of the input matrices, by their names in `inputs`."""
        rows = dict.fromkeys("qk", self.key_channels) | dict.fromkeys("vz", self.channels)
        rows |= dict.fromkeys("ba", self.heads)
        return {name: sum(rows[part] for part in name) for name in self.inputs}

    @property
    def record_width(self) -> int:
        return self.key_channels + self.channels + self.heads


def read_delta_shape(entries: Entries, layers: int, **own) -> DeltaShape:
    """The shape of so many recurrent layers, by the entries of a config.json; own: fields that a family has."""
    return DeltaShape(
        layers=layers,
        heads=entries.whole("linear_num_value_heads"),
        head_dim=entries.whole("linear_value_head_dim"),
        key_heads=entries.whole("linear_num_key_heads"),
        state_size=entries.whole("linear_key_head_dim"),
        conv_taps=entries.whole("linear_conv_kernel_dim"),
        **own,
    )


@dataclass
class DeltaLayer(DecoderLayer):
    """A layer with a gated delta net; the taps of its convolution come first. After `prepare`, `A` is gated_delta's."""

    MATRICES = ("in_proj", "out_proj", *DecoderLayer.MATRICES)
    in_proj: Matrix  # [conv_channels + channels + 2 heads, hidden]: q, k and v, then z, beta and decay
    conv_weight: Tensor  # [taps, conv_channels]
    A_log: Tensor  # [heads]
    dt_bias: Tensor  # [heads]
    gate_norm: Tensor  # [head_dim]
    out_proj: Matrix  # [hidden, channels]

    @classmethod
    def empty(cls, config: HybridConfig, blank: Blank) -> DeltaLayer:
        shape = config.recurrence
        return cls(
            in_proj=blank.matrix(sum(shape.input_rows.values()), config.hidden_size),
            conv_weight=blank.vector(shape.conv_taps, shape.conv_channels),
            A_log=blank.vector(shape.heads),
            dt_bias=blank.vector(shape.heads),
            gate_norm=blank.vector(shape.head_dim),
            out_proj=blank.matrix(config.hidden_size, shape.channels),
            **cls.empty_parts(config, blank),
        )

    def named(self, config: HybridConfig, prefix: str) -> dict[str, Tensor]:
        sizes = config.recurrence.input_rows
        inputs = zip(sizes, dense(self.in_proj).split(list(sizes.values())), strict=True)
        mixer = {f"in_proj_{name}.weight": part for name, part in inputs}
        mixer |= {
            "conv1d.weight": self.conv_weight.T[:, None],
            "A_log": self.A_log,
            "dt_bias": self.dt_bias,
            "norm.weight": self.gate_norm,
            "out_proj.weight": dense(self.out_proj),
        }
        tensors = self.named_norms(config) | {f"linear_attn.{name}": tensor for name, tensor in mixer.items()}
        tensors |= {f"mlp.{name}.weight": tensor for name, tensor in self.named_feed_forward(config).items()}
        return {prefix + name: tensor for name, tensor in tensors.items()}

    def compute(self, config: HybridConfig) -> None:
        self.A = -self.A_log.exp()

    def mix(self, x: Tensor, config: HybridConfig, cache, place: int, numbers) -> Tensor:
        return gated_delta_net(x, self, config, cache.layer(place), numbers.round)
