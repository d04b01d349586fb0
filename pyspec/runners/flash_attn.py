"""flash-attn: it reads prompts for the Llama runner by request, and is a peer in benchmarks of attention.

A row of it has other bits in another call, because the tiles it is summed in hang on how many rows and keys there are.
It takes no mask but causal, a window and documents one after another: no tree.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DEVICE = "cuda"
DTYPES = (torch.float16, torch.bfloat16)


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why flash-attn cannot run for a dtype on a device, as what follows its name; None where it can."""
    if device.type != DEVICE:
        return f"needs a GPU, got device {device}"
    if dtype not in DTYPES:
        return f"needs activations in float16 or bfloat16, got {dtype}"
    row = torch.zeros(1, 1, 1, 64, dtype=dtype, device=device)
    try:
        attention(row, row, row)
    except ImportError as error:  # not installed, or built for another torch
        return f"needs the package flash-attn (pip install 'pyspec-kernels[flash]'): {error}"
    except RuntimeError as error:  # built for other GPUs
        return f"does not run on {device}: {error}"
    return None


def check_prompt_attention(prompt_attention: str, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError unless prompts can be read by this attention, with activations of a dtype on a device."""
    if prompt_attention not in ("pyspec", "flash-attn"):
        raise ValueError(f"prompt_attention must be pyspec or flash-attn, got {prompt_attention!r}")
    if prompt_attention == "flash-attn" and (reason := why_not(dtype, device)) is not None:
        raise ValueError(f"prompt_attention flash-attn {reason}")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention [B, Hq, T, D] of queries at the last T positions of keys and values [B, Hkv, S, D] of any strides.

    Args:
        causal: whether a row sees only what is not behind it.
        window: how many positions a row sees at most, its own the last; None for all.
        scale, softcap: of the scores, see tree_attention.
    """
    from flash_attn import flash_attn_with_kvcache

    sides = (-1, -1) if window is None else (window - 1, 0)  # before and behind, beside the own position
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    scores = {"softmax_scale": scale, "softcap": softcap or 0.0}
    return flash_attn_with_kvcache(q, k, v, causal=causal, window_size=sides, **scores).transpose(1, 2)


def documents(q: Tensor, k: Tensor, v: Tensor, length: int) -> Callable[[], Tensor]:
    """A call that gives [B * N, Hq, D]: the rows of q, k and v [B, H, N, D] are documents of one length, ragged."""
    from flash_attn import flash_attn_varlen_func

    q, k, v = (tensor.transpose(1, 2).flatten(0, 1).contiguous() for tensor in (q, k, v))
    starts = torch.arange(0, len(q) + 1, length, dtype=torch.int32, device=q.device)
    return lambda: flash_attn_varlen_func(q, k, v, starts, starts, length, length, causal=True)
