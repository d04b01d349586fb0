"""The ops through torch.ops.pyspec, as another engine would call them: plain tensors in, plain tensors out.

    python examples/torch_ops.py

The functions in pyspec.ops check their arguments and give them defaults; these are what they call, and what
torch.compile sees.
"""

import torch

import pyspec.ops  # noqa: F401  makes torch.ops.pyspec known
from pyspec import DraftTree

HEADS, KV_HEADS, HEAD_DIM, PREFIX = 8, 2, 64, 100
tree = DraftTree([5, 6, 7, 8], [-1, 0, 0, 2])  # a root, two guesses behind it, and one behind the second
slots = PREFIX + len(tree)

q = torch.randn(1, HEADS, len(tree), HEAD_DIM)
k, v = torch.randn(2, 1, KV_HEADS, slots, HEAD_DIM).unbind()
bits, lens = torch.from_numpy(tree.ancestor_bits)[None], torch.tensor([PREFIX], dtype=torch.int32)

out, lse = torch.ops.pyspec.tree_attention(q, k, v, bits, lens, HEAD_DIM**-0.5, None, None, None)
print("tree_attention:", tuple(out.shape), "log-sum-exp", tuple(lse.shape))

logits = torch.randn(len(tree), 50_000)
top_tokens, top_logits, log_sum_exp, entropy, _ = torch.ops.pyspec.row_statistics(logits, None)
print("row_statistics: best tokens", top_tokens[:, 0].tolist(), "entropy", [round(x, 2) for x in entropy.tolist()])

values, indices = torch.ops.pyspec.topk(logits, 8, 0, 1, True, True, True)  # 0 buckets: exactly
assert torch.equal(indices, top_tokens)
print("topk: the same eight")
