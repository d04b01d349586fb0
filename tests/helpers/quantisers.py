"""Ways of quantising keys and values behind one interface, so that attention to all of them is tested alike."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pyspec.ops import (
    gear_attention,
    gear_decode,
    gear_encode,
    residual_vq_attention,
    residual_vq_decode,
    residual_vq_encode,
    rotary_of_blocks,
)
from pyspec.ops.gear import BLOCK, blocks_seen
from tests.helpers.gear_formats import FORMATS, PRUNED, channels_of
from tests.helpers.tree_cases import make_case, path_to

TOLERANCE = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Quantiser:
    """encode(k, v) makes records, decode(quantised, head_dim) reads them in float64, attend is the op."""

    encode: Callable
    decode: Callable
    attend: Callable

    def case(self, lens, nodes, window=64, heads=4, kv_heads=2, head_dim=64, dtype=torch.float32, seed=0):
        """A case of tree_attention in full precision, its quantised blocks and what lies behind them."""
        case = make_case(lens, nodes, heads, kv_heads, head_dim, dtype, seed)
        blocks = max(case.k.shape[2] // BLOCK, 1)
        room = blocks * BLOCK - case.k.shape[2]
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, max(room, 0)))[:, :, : blocks * BLOCK] for x in (case.k, case.v))
        starts = [blocks_seen(n, window) * BLOCK for n in lens]
        longest = case.k.shape[2] - min(starts)
        dense = [torch.zeros(len(lens), kv_heads, longest, head_dim, dtype=dtype) for _ in range(2)]
        for to, x in zip(dense, (case.k, case.v), strict=True):
            for b, start in enumerate(starts):
                to[b, :, : x.shape[2] - start] = x[b, :, start:]
        return case, self.encode(k, v), *dense

    def oracle(self, case, quantised, window=64):
        """Row by row in float64: what a row at position p sees is decoded or not by its position alone."""
        heads, head_dim, kv_heads = case.q.shape[1], case.q.shape[3], case.k.shape[1]
        decoded = self.decode(quantised, head_dim)
        out = torch.zeros(case.q.shape, dtype=torch.float64)
        lse = torch.full(case.q.shape[:3], -torch.inf, dtype=torch.float64)
        for b, n in enumerate(case.lens.tolist()):
            for node in range(len(case.parents[b])):
                path = path_to(case.parents[b], node)
                start = max(0, (n + len(path) - 1 - window) // BLOCK * BLOCK)
                slots = [*range(start, n), *(n + j for j in path)]
                for head in range(heads):
                    of = head // (heads // kv_heads)
                    k, v = (
                        torch.cat((x[b, of, :start], exact[b, of, slots].double()))
                        for x, exact in zip(decoded, (case.k, case.v), strict=True)
                    )
                    scores = k @ case.q[b, head, node].double() * head_dim**-0.5
                    lse[b, head, node] = scores.logsumexp(0)
                    out[b, head, node] = scores.softmax(0) @ v
        return out, lse

    def check(self, on_backend, lens, nodes, window=64, dtype=torch.float32, **shape):
        """Attention to what is quantised against attention to what it stands for."""
        case, quantised, k, v = self.case(lens, nodes, window, dtype=dtype, **shape)
        out, lse = on_backend(
            self.attend, case.q, quantised, k, v, case.bits, case.lens, window=window, return_lse=True
        )
        expected, expected_lse = self.oracle(case, quantised, window)
        assert out.dtype == dtype and out.shape == case.q.shape
        torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        torch.testing.assert_close(lse.double(), expected_lse, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])

    def plain_decode(self, case, quantised, b, node, window=64):
        """The node's row as plain decoding computes it: its path committed, one row."""
        n, path = int(case.lens[b]), path_to(case.parents[b], node)
        slots = [*range(n), *(n + j for j in path)]
        start = blocks_seen(len(slots) - 1, window) * BLOCK
        return self.attend(
            case.q[b : b + 1, :, node : node + 1],
            quantised[b : b + 1],
            case.k[b : b + 1, :, slots[start:]],
            case.v[b : b + 1, :, slots[start:]],
            torch.ones(1, 1, 1, dtype=torch.int32),
            torch.tensor([len(slots) - 1], dtype=torch.int32),
            window=window,
            return_lse=True,
        )


def gear(format) -> Quantiser:
    def decode(quantised, head_dim):
        return [x.double() for x in gear_decode(quantised, format, head_dim)]

    def attend(q, quantised, k, v, bits, lens, **options):
        return gear_attention(q, quantised, k, v, bits, lens, format, **options)

    return Quantiser(lambda k, v: gear_encode(k, v, format, channels_of(k, format)), decode, attend)


# ==== residual VQ ====


def codebooks_of(depth=4, codes=256, batch=None, seed=0):
    """Random codewords that shrink with their level, as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    front = () if batch is None else (batch,)
    words = torch.randn(*front, 2, depth, codes, 32, generator=generator)
    return (words * 0.8 * 0.8 ** torch.arange(depth)[:, None, None]).half()


BOOKS = {"256": codebooks_of(), "deep": codebooks_of(9), "2048": codebooks_of(3, 2048)}


def frequencies_of(head_dim):
    """Rotary frequencies [D / 2] as models have them."""
    return (10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)).float()


def turned(k, *, back=False):
    """Keys [..., S, D] of positions 0 to S - 1 after rotary embedding, or before: float64, pairs as complex numbers."""
    angles = torch.arange(k.shape[-2]).double()[:, None] * frequencies_of(k.shape[-1]).double()
    pairs = torch.complex(*k.double().chunk(2, -1)) * torch.polar(torch.ones_like(angles), -angles if back else angles)
    return torch.cat((pairs.real, pairs.imag), -1)


def codes(books, pre_rope=False) -> Quantiser:
    """Codes of keys as they are cached, or as they were before rotary embedding."""

    def encode(k, v):
        return residual_vq_encode(turned(k, back=True).float() if pre_rope else k, v.float() if pre_rope else v, books)

    def decode(quantised, head_dim):
        k, v = residual_vq_decode(quantised, books, head_dim)
        return turned(k) if pre_rope else k.double(), v.double()

    def attend(q, quantised, k, v, bits, lens, **options):
        if pre_rope:
            options["rotary"] = rotary_of_blocks(frequencies_of(q.shape[3]), quantised.shape[2])
        return residual_vq_attention(q, quantised, k, v, bits, lens, books, **options)

    return Quantiser(encode, decode, attend)


QUANTISERS = {
    **{name: gear(format) for name, format in (FORMATS | PRUNED).items()},
    **{f"codes {name}": codes(books) for name, books in BOOKS.items()},
    **{f"pre-rope codes {name}": codes(books, True) for name, books in BOOKS.items()},
}
