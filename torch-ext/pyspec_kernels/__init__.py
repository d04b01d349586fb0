"""The compiled ops of pyspec as torch calls them: every argument given, few of them checked.

What they take is told by the functions of the same names in pyspec.ops. A build for CUDA has kernels for causal_conv,
residual_vq, selective_state and topk; those of the other ops are written in Triton and come with pyspec.
"""

from ._ops import ops

block_masked_attention = ops.block_masked_attention
block_masked_attention_backward = ops.block_masked_attention_backward
causal_conv = ops.causal_conv
expert_linear = ops.expert_linear
gated_delta = ops.gated_delta
gear = ops.gear
gear_encode = ops.gear_encode
gear_ragged = ops.gear_ragged
lay_out = ops.lay_out
linear = ops.linear
linear_codes = ops.linear_codes
linear_codes_rows = ops.linear_codes_rows
linear_joined = ops.linear_joined
linear_rows = ops.linear_rows
merge_attention = ops.merge_attention
mix_experts = ops.mix_experts
ragged_attention = ops.ragged_attention
residual_vq = ops.residual_vq
residual_vq_encode = ops.residual_vq_encode
residual_vq_ragged = ops.residual_vq_ragged
rms_norm = ops.rms_norm
rotary_write = ops.rotary_write
route_experts = ops.route_experts
row_statistics = ops.row_statistics
selective_state = ops.selective_state
swiglu = ops.swiglu
take_columns = ops.take_columns
topk = ops.topk
tree_attention = ops.tree_attention

__all__ = [
    "block_masked_attention",
    "block_masked_attention_backward",
    "causal_conv",
    "expert_linear",
    "gated_delta",
    "gear",
    "gear_encode",
    "gear_ragged",
    "lay_out",
    "linear",
    "linear_codes",
    "linear_codes_rows",
    "linear_joined",
    "linear_rows",
    "merge_attention",
    "mix_experts",
    "ragged_attention",
    "residual_vq",
    "residual_vq_encode",
    "residual_vq_ragged",
    "rms_norm",
    "rotary_write",
    "route_experts",
    "row_statistics",
    "selective_state",
    "swiglu",
    "take_columns",
    "topk",
    "tree_attention",
]
