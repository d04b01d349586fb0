"""Attention masks as tiles: BlockMask (block_mask.py), what tiles hold (tiles.py) and orders of rows (orders.py)."""

from pyspec.masks.block_mask import BlockMask
