"""What Mamba and Mamba-2 share: a recurrence as part of a layer, layers that are nothing else, and their forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyspec.architectures.blocks import tap
from pyspec.architectures.weights import Blank, NativeLayer, NativeWeights, dense
from pyspec.ops.rms_norm import rms_norm

__all__ = ["MIXER", "RecurrentPart", "StateSpaceConfig", "StateSpaceLayer", "StateSpaceWeights", "check_positive"]

#: Tensors of a layer's recurrence, those that it has. gate_norm is Mamba-2's, x_proj, dt_proj and the rest Mamba's.
MIXER = (
    "in_proj",
    "in_bias",
    "conv_weight",  # [taps, conv channels] fp32
    "conv_bias",
    "x_proj",
    "BC_proj",
    "dt_proj",
    "A",  # as selective_state takes it: one dimension in Mamba-2, three in Mamba
    "D",  # [channels] fp32
    "dt_bias",  # [heads] fp32
    "low_norm",  # [dt_rank] fp32
    "BC_norm",  # [2, state_size] fp32
    "gate_norm",  # [groups, channels / groups] fp32
    "out_proj",
    "out_bias",
)


def check_positive(shape, *names: str) -> None:
    """Raises ValueError unless the attributes named are all at least 1."""
    for name in names:
        if getattr(shape, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(shape, name)}")


class RecurrentPart(NativeLayer):
    """Weights of a recurrence, as checkpoints have them but for the convolution, whose taps come first.

    shape is that of the recurrence in all methods. After `compute_recurrence`, `mixer` has the tensors of MIXER.
    """

    RECURRENCE: tuple[str, ...]  # matrices, in the order of their use
    NAMES: dict[str, str]  # of tensors whose names in a checkpoint are not ours

    @classmethod
    def empty_recurrence(cls, shape, blank: Blank) -> dict[str, Any]:
        """The fields of a recurrence."""
        raise NotImplementedError  # abstract: each kind has its own

    def named_recurrence(self, prefix: str) -> dict[str, Tensor]:
        """Where the recurrence's tensors of a checkpoint go, by their names behind a prefix."""
        tensors = {}
        for name in MIXER:
            name = {"A": "A_log"}.get(name, name)
            if (tensor := getattr(self, name, None)) is None:
                continue
            tensor = tensor.T[:, None] if name == "conv_weight" else dense(tensor)
            tensors[prefix + self.NAMES.get(name, name)] = tensor
        return tensors

    def compute_recurrence(self, shape) -> None:
        """Works out what a forward passes to ops, see NativeLayer.prepare."""
        own = self.computed(shape)
        self.mixer = {name: own[name] if name in own else getattr(self, name, None) for name in MIXER}

    def computed(self, shape) -> dict[str, Tensor]:
        """Those of MIXER that are not as in a checkpoint."""
        raise NotImplementedError  # abstract: each kind has its own

    def recur(self, x: Tensor, shape, state: tuple[Tensor, ...], round) -> Tensor:
        """[R, H] fp32: what the recurrence adds to normed rows x [R, H]; state: see StateCache.layer."""
        raise NotImplementedError  # abstract: each kind has its own


class StateSpaceConfig:
    """What MambaConfig and Mamba2Config share, and what the runner asks of them."""

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: int
    channels: int  # of the recurrence
    state_size: int
    conv_taps: int
    conv_channels: int
    record_width: int  # of what is recorded of a node in a layer
    norm_epsilon: float
    tied_embedding: bool

    @property
    def places(self) -> Sequence[int]:
        """Of each layer, its place in the cache."""
        return range(self.layers)

    def kind(self) -> type[StateSpaceLayer]:
        """What holds the weights of a layer."""
        raise NotImplementedError  # abstract: each family has its own

    def empty_layers(self, blank: Blank) -> list[StateSpaceLayer]:
        return [self.kind().empty(self, blank) for _ in range(self.layers)]


class StateSpaceLayer(RecurrentPart):
    """Weights of one layer: a norm, `norm` [hidden], and a recurrence."""

    @classmethod
    def empty(cls, config: StateSpaceConfig, blank: Blank) -> StateSpaceLayer:
        return cls(norm=blank.vector(config.hidden_size), **cls.empty_recurrence(config, blank))

    def named(self, config: StateSpaceConfig, prefix: str) -> dict[str, Tensor]:
        return {prefix + "norm.weight": self.norm} | self.named_recurrence(prefix + "mixer.")

    def prepare(self, config: StateSpaceConfig) -> None:
        if not hasattr(self, "mixer"):  # runners may share weights, and what they recorded knows where these lie
            self.compute_recurrence(config)

    def mix(self, x: Tensor, config: StateSpaceConfig, cache, place: int, numbers) -> Tensor:
        """[R, H] fp32: what the layer adds to normed rows x [R, H]; place: of the layer in the cache."""
        return self.recur(x, config, cache.layer(place), numbers.round)


class StateSpaceWeights(NativeWeights):
    """All weights, by the names of Hugging Face's Mamba."""

    LAYERS = "backbone.layers."
    EMBEDDING = "backbone.embeddings.weight"
    NORM = "backbone.norm_f.weight"

    def forward(
        self, config: StateSpaceConfig, hidden: Tensor, cache, numbers, dtype, layers=None, taps=()
    ) -> list[Tensor]:
        delta, tapped = None, []
        for index, layer in enumerate(self.layers):
            x = rms_norm(hidden, layer.norm, config.norm_epsilon, delta=delta, out_dtype=dtype)
            if index in taps:
                tapped.append(tap(hidden))
            delta = layer.mix(x, config, cache, config.places[index], numbers)
        normed = rms_norm(hidden, self.norm, config.norm_epsilon, delta=delta, out_dtype=dtype)
        return [normed, *tapped, *([tap(hidden)] if config.layers in taps else [])]
