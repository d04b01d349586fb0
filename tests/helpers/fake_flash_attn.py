"""flash_attn as far as it is called here: the package's signatures and refusals, computed by plain torch in float32.

As with the package, a row's bits hang on the whole call.
"""

import torch


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """q [rows, Hq, D], k and v [keys, Hkv, D]; cu_seqlens [texts + 1]."""
    assert (dropout_p, softcap, alibi_slopes, return_attn_probs, block_table) == (0.0, 0.0, None, False, None)
    out = torch.empty_like(q)
    for starts in (cu_seqlens_q, cu_seqlens_k):
        assert starts.dtype == torch.int32 and starts.device == q.device and starts.is_contiguous()
    places = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    (row, key), *ends = places
    for row_end, key_end in ends:
        assert row_end - row <= max_seqlen_q and key_end - key <= max_seqlen_k
        text = q[row:row_end], k[key:key_end], v[key:key_end]
        out[row:row_end] = _attend(*(tensor[None] for tensor in text), softmax_scale, causal, window_size)[0]
        row, key = row_end, key_end
    assert row == len(q) and key == len(k) == len(v)
    return out


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """q [B, T, Hq, D], k_cache and v_cache [B, S, Hkv, D]."""
    absent = (k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table, alibi_slopes)
    assert all(argument is None for argument in absent)
    assert (softcap, num_splits, return_softmax_lse) == (0.0, 0, False)
    return _attend(q, k_cache, v_cache, softmax_scale, causal, window_size)


def _attend(q, k, v, scale, causal, window_size):
    for tensor in (q, k, v):
        assert tensor.dtype in (torch.float16, torch.bfloat16) and tensor.dtype == q.dtype
        assert tensor.stride(-1) == 1 and tensor.device == q.device
    (batch, rows, heads, dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    assert k.shape == v.shape == (batch, keys, kv_heads, dim) and dim <= 256 and heads % kv_heads == 0
    before, behind = window_size
    behind = 0 if causal else behind
    place = torch.arange(rows, device=q.device)[:, None] + keys - rows  # the last row is at the last key
    distance = torch.arange(keys, device=q.device) - place
    hidden = (distance > behind if behind >= 0 else False) | (distance < -before if before >= 0 else False)
    hidden |= torch.zeros_like(distance, dtype=torch.bool)
    k, v = (tensor.float().repeat_interleave(heads // kv_heads, 2) for tensor in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.float(), k) * (dim**-0.5 if scale is None else scale)
    scores = scores.masked_fill(hidden, -torch.inf)
    # weights are rounded at a scale that hangs on the call
    weights = (scores - scores.amax(-1, keepdim=True) - (rows + keys) % 7 / 10).exp()
    sums = weights.sum(-1).transpose(1, 2)[..., None]
    mixed = torch.einsum("bhts,bshd->bthd", weights.to(q.dtype).float(), v)
    return torch.where(sums > 0, mixed / sums, 0.0).to(q.dtype)
