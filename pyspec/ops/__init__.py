"""The ops, one file each: schema, fake, plain-PyTorch reference, public function."""

from pyspec.ops._library import backend, backends
from pyspec.ops.merge_attention import merge_attention
from pyspec.ops.row_statistics import RowStatistics, row_statistics
from pyspec.ops.tree_attention import tree_attention

__all__ = ["RowStatistics", "backend", "backends", "merge_attention", "row_statistics", "tree_attention"]
