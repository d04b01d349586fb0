"""What a program of tree_attention knows of its rows: their nodes, and where the keys lie that a node sees.

A node's row of ancestor bits says it all: ancestors in index order are ancestors in depth order.
"""

import triton
import triton.language as tl


@triton.jit
def count_bits(word):
    word = word.to(tl.uint32, bitcast=True)
    pairs = word - ((word >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
    return ((octets * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def depth_of(bits, WORDS: tl.constexpr):
    """Depth of a node, -1 for padding; bits: pointer to its row, or a tensor of them."""
    count = count_bits(tl.load(bits))
    for index in tl.static_range(1, WORDS):
        count += count_bits(tl.load(bits + index))
    return count - 1


@triton.jit
def ancestor_at(depth, bits, WORDS: tl.constexpr):
    """Node index [N] of the ancestor at each depth [N], any index where there is none; bits: pointer to a row."""
    word = tl.zeros_like(depth)
    rest, node = depth, word
    before = 0
    for index in tl.static_range(WORDS):
        loaded = tl.load(bits + index)
        is_reached = depth >= before
        word = tl.where(is_reached, loaded, word)
        rest = tl.where(is_reached, depth - before, rest)
        node = tl.where(is_reached, index * 32, node)
        before += count_bits(loaded)
    for step in tl.static_range(5):  # the set bit number `rest` of word, by halves
        width = 16 >> step
        low = count_bits(word & ((1 << width) - 1))
        is_high = rest >= low
        rest = tl.where(is_high, rest - low, rest)
        node = tl.where(is_high, node + width, node)
        word = tl.where(is_high, word >> width, word)
    return node


@triton.jit
def slots_of(positions, prefix, bits, WORDS: tl.constexpr):
    """Slot [N] of the key at each position [N] for one node; bits: pointer to its row."""
    ancestors = ancestor_at(tl.maximum(positions - prefix, 0), bits, WORDS)
    return tl.where(positions < prefix, positions, prefix + ancestors)


@triton.jit
def rows_of_block(root, head_block, bits, nodes, GROUP: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Node, head within its group, depth and whether there is such a row, [ROWS] each; and whether they are a chain.

    The block's nodes are those from `root` on. They are a chain if they are the tree's first, each the child of the one
    before. Depth is -1 where there is no row, or one of padding.
    """
    HEADS: tl.constexpr = GROUP if GROUP < ROWS else ROWS
    local = tl.arange(0, ROWS)
    node, head = root + local // HEADS, head_block * HEADS + local % HEADS
    there = (local < ROWS // HEADS * HEADS) & (node < nodes) & (head < GROUP)
    node, head = tl.minimum(node, nodes - 1), tl.minimum(head, GROUP - 1)
    depth = tl.where(there, depth_of(bits + node * WORDS, WORDS), -1)
    is_chain = tl.max(((depth >= 0) & (depth != node)).to(tl.int32), 0) == 0
    return node, head, depth, there, is_chain
