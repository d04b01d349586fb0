"""What Mamba and Mamba-2 share: the shape of a recurrent layer, its weights, and the forward."""

from __future__ import annotations

from torch import Tensor

from pyspec.architectures.blocks import tap
from pyspec.architectures.weights import Blank, NativeLayer, NativeWeights, dense
from pyspec.ops.rms_norm import rms_norm

__all__ = ["MIXER", "StateSpaceConfig", "StateSpaceLayer", "StateSpaceWeights"]

#: Tensors of a layer's recurrence, those that it has. gate_norm is Mamba-2's, x_proj and dt_proj are Mamba's.
MIXER = (
    "in_proj",
    "in_bias",
    "conv_weight",  # [taps, conv channels] fp32
    "conv_bias",
    "x_proj",
    "dt_proj",
    "A",  # as selective_state takes it: one dimension in Mamba-2, three in Mamba
    "D",  # [channels] fp32
    "dt_bias",  # [heads] fp32
    "gate_norm",  # [groups, channels / groups] fp32
    "out_proj",
    "out_bias",
)


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
    dt_rank: int  # 0 where dt comes straight from the input projection
    norm_epsilon: float
    tied_embedding: bool

    def check_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def empty_layer(self, blank: Blank) -> StateSpaceLayer:
        raise NotImplementedError  # abstract: each family has its own

    def empty_layers(self, blank: Blank) -> list[StateSpaceLayer]:
        return [self.empty_layer(blank) for _ in range(self.layers)]


class StateSpaceLayer(NativeLayer):
    """Weights of one layer, as checkpoints have it but for the convolution, whose taps come first."""

    PREFIX = "mixer."  # what the names of all but the norm begin with
    NORM = "norm.weight"
    NAMES: dict[str, str]  # of tensors whose names in a checkpoint are not ours

    def named(self, config: StateSpaceConfig, prefix: str) -> dict[str, Tensor]:
        tensors = {prefix + self.NORM: self.norm}
        for name in MIXER:
            name = {"A": "A_log"}.get(name, name)
            if (tensor := getattr(self, name, None)) is None:
                continue
            tensor = tensor.T[:, None] if name == "conv_weight" else dense(tensor)
            tensors[prefix + self.PREFIX + self.NAMES.get(name, name)] = tensor
        return tensors

    def prepare(self, config: StateSpaceConfig) -> None:
        if hasattr(self, "mixer"):
            return  # runners may share weights, and what they recorded knows where these lie
        own = self.computed(config)
        #: MIXER of this layer; what it lacks is None.
        self.mixer = {name: own[name] if name in own else getattr(self, name, None) for name in MIXER}

    def mix(self, x: Tensor, config: StateSpaceConfig, cache, place: int, numbers) -> Tensor:
        """[R, H] fp32: what the layer adds to normed rows x [R, H]; place: of the layer in the cache."""
        raise NotImplementedError  # abstract: each family has its own

    def computed(self, config: StateSpaceConfig) -> dict[str, Tensor]:
        """Those of MIXER that are not as in a checkpoint."""
        raise NotImplementedError  # abstract: each family has its own


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
            delta = layer.mix(x, config, cache, index, numbers)
        normed = rms_norm(hidden, self.norm, config.norm_epsilon, delta=delta, out_dtype=dtype)
        return [normed, *tapped, *([tap(hidden)] if config.layers in taps else [])]
