"""expert_linear on the GPU: the kernels of linear over blocks of rows that chose the same expert.

A program is (block, outputs), over all inputs: experts are many, and so are programs without splits. Blocks have as
many rows for one row as for a thousand, so that a row's sums are always made the same way. Bound by reading the
weights of the experts that were chosen, each once for every block of its rows.
"""

import torch

import triton
from pyspec.kernels import linear, linear_codes
from pyspec.kernels.early_launch import launch_options
from pyspec.kernels.expert_rows import sort_rows

__all__ = ["expert_linear"]

ROWS = 16  # of a block


def expert_linear(x, ids, weight, bias, outputs, experts, format, out_dtype):
    """Launches the kernels; arguments and result of torch.ops.pyspec.expert_linear, format None for those of linear."""
    rows, inputs = x.shape
    out = x.new_empty((ids.numel(), outputs), dtype=out_dtype)
    if not out.numel():
        return out
    early = launch_options(x.device)
    with torch.cuda.device_of(x):
        if format is not None:
            architecture = 10 * torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 90
            height = linear_codes.tile_rows(ROWS, x.dtype, architecture)
            blocks = _blocks(x, ids, experts, height)
            tiles = weight.shape[1]
            how = {"ROWS": height, "IS_WHOLE": True, **early, **linear_codes.compile_options(height)}
            how |= linear_codes.constants_of(format, x.dtype, x.is_cuda)
            grid = (len(blocks["experts"]), len(weight) // experts, 1)
            numbers = len(out), outputs, inputs, tiles, tiles, x.stride(0)
            linear_codes.codes_kernel[grid](x, weight, bias, out, *numbers, **how, **blocks)
            return out
        if x.is_cuda and weight.dtype == torch.float32:
            x = x.float()
        tile = linear.tile_of(weight.dtype, ROWS)
        blocks = _blocks(x, ids, experts, tile["ROWS"])
        how = {"IS_WHOLE": True, **early, **linear.compile_options(weight.dtype, tile["ROWS"])}
        grid = (len(blocks["experts"]), triton.cdiv(outputs, tile["OUTPUTS"]), 1)
        if weight.dtype == torch.uint8:
            tiles = weight.shape[1]
            rounded = linear.round_rows(x, rows, tiles, early)
            weights = weight.view(torch.int8), weight.view(torch.int64)
            sizes = {name: tile[name] for name in ("ROWS", "OUTPUTS", "STAGES")}
            ends = bias, out, None, None, len(out), outputs, tiles, tiles
            linear.int8_kernel[grid](*rounded, *weights, *ends, **sizes, **how, **blocks, x_rows=rows)
        else:
            upcast = not x.is_cuda and x.dtype == torch.bfloat16  # the interpreter computes on the bits of bf16
            numbers = len(out), outputs, inputs, triton.cdiv(inputs, tile["INPUTS"]), x.stride(0)
            linear.float_kernel[grid](
                x, weight, bias, out, None, None, *numbers, **tile, **how, **blocks, UPCAST=upcast
            )
    return out


def _blocks(x, ids, experts, height):
    """What kernels take beside the arguments of linear."""
    order, owners = sort_rows(ids, experts, height)
    return {"order": order, "experts": owners, "choices": ids.shape[1]}
