"""The ops, one file each: schema, fake, plain-PyTorch reference, public function."""

from pyspec.ops._library import backend, backends
from pyspec.ops.block_masked_attention import block_masked_attention
from pyspec.ops.causal_conv import causal_conv
from pyspec.ops.expert_linear import ExpertWeight, expert_linear, lay_out_experts
from pyspec.ops.gated_delta import gated_delta
from pyspec.ops.gear import gear_attention
from pyspec.ops.gear_encode import gear_encode
from pyspec.ops.gear_format import GearFormat, gear_decode
from pyspec.ops.lay_out import StoredMatrix, lay_out
from pyspec.ops.linear import LinearWeight, lay_out_weight, linear
from pyspec.ops.merge_attention import merge_attention
from pyspec.ops.ragged_attention import ragged_attention
from pyspec.ops.residual_vq import residual_vq_attention, residual_vq_decode, residual_vq_encode, rotary_of_blocks
from pyspec.ops.rms_norm import rms_norm
from pyspec.ops.rotary_write import rotary_write
from pyspec.ops.route_experts import mix_experts, route_experts
from pyspec.ops.row_statistics import RowStatistics, row_statistics
from pyspec.ops.selective_state import Round, selective_state
from pyspec.ops.sparse_attention import sparse_attention
from pyspec.ops.swiglu import swiglu
from pyspec.ops.topk import TopK, topk
from pyspec.ops.topk_recall import choose_buckets, expected_recall
from pyspec.ops.tree_attention import tree_attention
