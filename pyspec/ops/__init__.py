"""The ops, one file each: schema, fake, plain-PyTorch reference, public function."""

from pyspec.ops._library import backend, backends
from pyspec.ops.merge_attention import merge_attention
from pyspec.ops.tree_attention import tree_attention

__all__ = ["backend", "backends", "merge_attention", "tree_attention"]
