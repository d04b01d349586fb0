"""A cache in one file, as one would add it: keys and values of whole blocks in 16 bits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyspec.caches import CACHES, QuantisedSettings
from pyspec.ops.gear import BLOCK, TreeRows, attention_to_blocks, join_exact, used_blocks


@dataclass(frozen=True)
class HalvesSettings(QuantisedSettings):
    """A record is a block's keys [128, D] and then its values, in fp16."""

    window: int = 64

    def check_head_dim(self, head_dim: int) -> None:
        """Every size will do."""

    def record_bytes(self, head_dim: int) -> int:
        return 2 * BLOCK * head_dim * 2

    def encode(self, k: Tensor, v: Tensor, channels: None, block: int) -> Tensor:
        layers, kv_heads, tokens, head_dim = k.shape
        halves = torch.stack([k, v], 2).half()  # [layers, Hkv, 2, S, D]
        blocks = halves.view(layers, kv_heads, 2, tokens // BLOCK, BLOCK * head_dim).transpose(2, 3)
        return blocks.flatten(3).contiguous().view(torch.uint8)

    def attend(
        self, layer: int, q, quantised, k, v, rows: TreeRows, scale: float, records: int
    ) -> tuple[Tensor, Tensor]:
        halves = used_blocks(quantised, rows.seen).view(torch.float16).float()
        keys_values = halves.unflatten(3, (2, BLOCK, q.shape[3])).movedim(3, 0).flatten(3, 4)  # [2, B, Hkv, S, D]
        return join_exact(attention_to_blocks(q, *keys_values, rows.seen, scale), q, k, v, rows, scale)


CACHES.register("halves", HalvesSettings, "16 bits")
