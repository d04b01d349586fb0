"""The weights of all native runners: matrices that are laid out in their place, and one buffer for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyspec.fingerprint import WeightSample
from pyspec.machine.huge_pages import HugePages
from pyspec.ops.expert_linear import lay_out_experts
from pyspec.ops.linear import LinearWeight, lay_out_weight, linear

__all__ = ["Blank", "Matrix", "NativeLayer", "NativeWeights", "dense", "laid_out", "move_together"]

Matrix = Tensor | LinearWeight


def move_together(places: Sequence[tuple[object, str]]) -> None:
    """Moves laid out matrices, each an attribute of what holds it, into one buffer in this order."""
    buffer = HugePages([getattr(owner, name).nbytes for owner, name in places])
    for owner, name in places:  # one by one, so that there is never a second copy of all
        weight = getattr(owner, name)
        setattr(owner, name, replace(weight, data=buffer.move(weight.data)))


def laid_out(matrix: Matrix, dtype: torch.dtype | str) -> LinearWeight:
    """A matrix, or those of experts [experts, outputs, inputs], laid out."""
    if isinstance(matrix, LinearWeight):
        return matrix
    return lay_out_experts(matrix, dtype) if matrix.dim() == 3 else lay_out_weight(matrix, dtype)


def dense(matrix: Matrix) -> Tensor:
    return matrix.unpack() if isinstance(matrix, LinearWeight) else matrix


@dataclass(frozen=True)
class Blank:
    """Makes tensors to be filled from a checkpoint; matrices may be elsewhere: on "meta" they have no memory yet."""

    dtype: torch.dtype
    device: torch.device
    matrices: torch.device | None = None

    def matrix(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.matrices or self.device)

    def vector(self, *shape: int) -> Tensor:
        """Norms, biases and the like: as exact as the arithmetic they are part of."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)


class NativeLayer:
    """Weights of one layer, a dataclass of tensors. `named` says where each tensor of a checkpoint goes."""

    MATRICES: tuple[str, ...]  # in the order of their use
    REORDERED: tuple[str, ...] = ()  # of these, those whose rows lay_out puts in another order

    def named(self, config, prefix: str) -> dict[str, Tensor]:
        """Views by their Hugging Face name, or copies of what is laid out; names begin with prefix."""
        raise NotImplementedError  # abstract: each kind of layer has its own

    def prepare(self, config) -> None:
        """Works out what a forward passes to ops beside the tensors of a checkpoint, once the matrices are laid out."""

    def lay_out(self, dtype: torch.dtype | str) -> None:
        """Lays out the matrices that are not laid out yet; each takes the place of its dense form."""
        for name in self.MATRICES:
            setattr(self, name, laid_out(getattr(self, name), dtype))


@dataclass
class NativeWeights:
    """All weights. Where embedding and head are tied, they are one matrix here too.

    config is the model's shape: vocab_size, hidden_size, tied_embedding, and `empty_layers(blank)`.
    """

    MATRICES, REORDERED = ("embedding", "head"), ()
    LAYERS = "model.layers."  # and a number: what the names of a layer's tensors begin with
    EMBEDDING = "model.embed_tokens.weight"
    NORM = "model.norm.weight"

    embedding: Matrix  # [vocab, hidden]
    layers: list[NativeLayer] = field(repr=False)
    norm: Tensor  # [hidden]
    head: Matrix  # [vocab, hidden]
    is_together: bool = field(default=False, repr=False)  # see move_together
    sample: str = ""  # WeightSample of the checkpoint; empty where the weights are of none
    mtp: Any = field(default=None, repr=False)  # NextTokens of the checkpoint, or None

    def forward(self, config, hidden: Tensor, cache, numbers, dtype: torch.dtype, layers=None, taps=()) -> list[Tensor]:
        """[R, H] of dtype, after the last norm: all layers, or those named, for the rows of a round; then the taps.

        A straight line of ops, because it is recorded; see architectures.blocks.

        Args:
            hidden: [R, H] fp32, the embedded rows; used up.
            cache: of the batch; keys, values and states of the rows go there.
            numbers: the round, a pyspec.runners.numbers.Numbers.
            dtype: of activations.
            layers: some of the layers, ascending; only where they are all attention.
            taps: layers whose residual stream is to come back too, [R, H] fp32 each, ascending: what a layer takes in
                before it norms it, and by the number of layers what the last norm takes in.
        """
        raise NotImplementedError  # abstract: each family has its own

    @staticmethod
    def checkpoint(stored, config):
        """A checkpoint whose tensors are those of `named`, of one as it is stored; see checkpoints.weights."""
        return stored

    @classmethod
    def empty(
        cls, config, dtype: torch.dtype, device: torch.device, matrices: torch.device | None = None
    ) -> NativeWeights:
        """Dense weights to be filled through `named`; see Blank."""
        blank = Blank(dtype, device, matrices)
        embedding = blank.matrix(config.vocab_size, config.hidden_size)
        head = embedding if config.tied_embedding else blank.matrix(config.vocab_size, config.hidden_size)
        return cls(embedding, config.empty_layers(blank), blank.vector(config.hidden_size), head)

    def named(self, config) -> dict[str, Tensor]:
        """Where each tensor of a checkpoint goes, by its Hugging Face name: views, or copies of what is laid out."""
        tensors = self.named_outside(config)
        for index, layer in enumerate(self.layers):
            tensors |= layer.named(config, f"{self.LAYERS}{index}.")
        return tensors

    def named_outside(self, config) -> dict[str, Tensor]:
        """`named` without the layers."""
        tensors = {self.EMBEDDING: dense(self.embedding), self.NORM: self.norm}
        if not config.tied_embedding:
            tensors["lm_head.weight"] = dense(self.head)
        return tensors

    def sampled(self, config) -> str:
        """The WeightSample of the checkpoint, or where there was none, of these weights."""
        if self.sample:
            return self.sample
        sample = WeightSample().add(self.named_outside(config).items())
        for index, layer in enumerate(self.layers):
            sample.add(layer.named(config, f"{self.LAYERS}{index}.").items())
        return sample.hexdigest()

    def lay_out_outside(self, dtype: torch.dtype | str) -> None:
        """Lays out the head, and the embedding where it is the head; an embedding of its own is only read by rows."""
        tied = self.embedding is self.head
        self.head = laid_out(self.head, dtype)
        if tied:
            self.embedding = self.head

    def prepare(self, config) -> None:
        """Works out what a forward passes to ops beside the tensors of a checkpoint, once the matrices are laid out."""
        for layer in self.layers:
            layer.prepare(config)

    def embeds_by_op(self, config) -> bool:
        """Whether `embed` of int32 tokens is one op, which a tape records."""
        return isinstance(self.embedding, LinearWeight) and self.embedding.rows_by_op

    def embed(self, config, tokens: Tensor) -> Tensor:
        """[R, H] fp32: what the layers take in for tokens [R]."""
        if isinstance(self.embedding, LinearWeight):
            return self.embedding.rows(tokens)
        return F.embedding(tokens, self.embedding).float()

    def logits(self, config, hidden: Tensor) -> Tensor:
        """[R, V] fp32 of rows [R, H] that `forward` gave."""
        return linear(hidden, self.head, out_dtype=torch.float32)

    def lay_out(self, dtype: torch.dtype | str) -> None:
        """Lays out every matrix that `linear` reads, as float32, float16, bfloat16, int8 or "int4"."""
        self.lay_out_outside(dtype)
        for layer in self.layers:
            layer.lay_out(dtype)

    @property
    def dtype(self) -> torch.dtype | str:
        """What every laid out matrix is kept in; where they differ, the names of all, in the order of a step."""
        kept = dict.fromkeys(getattr(owner, name).dtype for owner, name in self.in_order())
        return ", ".join(map(str, kept)) if len(kept) > 1 else self.head.dtype

    def in_order(self) -> list[tuple[NativeLayer | NativeWeights, str]]:
        """The matrices that a step reads, each by what holds it and its name there."""
        return [(layer, name) for layer in self.layers for name in layer.MATRICES] + [(self, "head")]

    def move_together(self) -> None:
        """Moves the laid out matrices into one buffer, in the order in which a step reads them; once.

        Runners may share weights, and what they recorded knows where these lie.
        """
        if self.is_together:
            return
        self.is_together = True
        tied = self.embedding is self.head
        move_together(self.in_order())
        if tied:
            self.embedding = self.head
