"""The ops, one file each: schema, fake, plain-PyTorch reference, public function."""

from pyspec.ops._library import backend, backends
from pyspec.ops.block_masked_attention import block_masked_attention
from pyspec.ops.gear import GearFormat, gear_attention, gear_decode, gear_encode
from pyspec.ops.linear import PackedWeight, linear, pack_weight
from pyspec.ops.llama_layers import llama_layers
from pyspec.ops.merge_attention import merge_attention
from pyspec.ops.rms_norm import rms_norm
from pyspec.ops.rotary_write import rotary_write
from pyspec.ops.row_statistics import RowStatistics, row_statistics
from pyspec.ops.swiglu import swiglu
from pyspec.ops.tree_attention import tree_attention

__all__ = [
    "GearFormat",
    "PackedWeight",
    "RowStatistics",
    "backend",
    "backends",
    "block_masked_attention",
    "gear_attention",
    "gear_decode",
    "gear_encode",
    "linear",
    "llama_layers",
    "merge_attention",
    "pack_weight",
    "rms_norm",
    "rotary_write",
    "row_statistics",
    "swiglu",
    "tree_attention",
]
