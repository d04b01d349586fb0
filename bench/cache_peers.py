"""What peers' quantised caches do to the law of the next token: transformers' QuantizedCache, and llama.cpp's.

Each is compared with the dense cache of the same engine on the same weights, so that only the cache differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import peers
import torch

from pyspec.runners.foreign_support import cache_argument

CHUNK = 32  # tokens of a step of transformers: the decode path, without one pass for each token
QUANTIZED = {"quanto": 0, "hqq": 1}  # backends of transformers, and the axis that groups lie along
BITS = (4, 2)
LLAMA_CPP = {"q8_0": "GGML_TYPE_Q8_0", "q4_0": "GGML_TYPE_Q4_0"}

Laws = Callable[[list[int]], torch.Tensor]  # [n - 1, V] log-probabilities of the next token along a text


def engines(model, tokens: int, threads: int) -> Iterator[tuple[str, Callable[[], tuple[Laws, dict[str, Laws]]]]]:
    """Name, and what makes the dense laws and those of each quantised cache; raises where a peer cannot run."""
    for backend in QUANTIZED:
        yield f"transformers {backend}", lambda backend=backend: _transformers(model, backend)
    yield "llama.cpp", lambda: _llama_cpp(model, tokens, threads)


def _transformers(model, backend: str) -> tuple[Laws, dict[str, Laws]]:
    from transformers import DynamicCache, QuantizedCache

    dense_model = peers.dense_transformers(model)
    name = cache_argument(type(dense_model))

    @torch.inference_mode()
    def along(text: list[int], cache) -> torch.Tensor:
        rows = []
        for start in range(0, len(text) - 1, CHUNK):
            piece = torch.tensor([text[start : min(start + CHUNK, len(text) - 1)]])
            rows.append(dense_model(piece, **{name: cache}).logits[0].float().log_softmax(-1))
        return torch.cat(rows)

    def quantised(bits: int) -> QuantizedCache:
        axis = QUANTIZED[backend]
        return QuantizedCache(backend, dense_model.config, nbits=bits, axis_key=axis, axis_value=axis)

    quantised(BITS[0])  # raises where the backend is not installed
    found = {f"{bits} bits": lambda text, bits=bits: along(text, quantised(bits)) for bits in BITS}
    return lambda text: along(text, DynamicCache()), found


def _llama_cpp(model, tokens: int, threads: int) -> tuple[Laws, dict[str, Laws]]:
    import llama_cpp

    file = peers.llama_cpp_file(model.weight_dtype)

    def laws(kind: int) -> Laws:
        def along(text: list[int]) -> torch.Tensor:
            llama = llama_cpp.Llama(
                str(file),
                n_ctx=tokens,
                n_threads=threads,
                n_threads_batch=threads,
                type_k=kind,
                type_v=kind,
                flash_attn=True,  # it has no quantised values without
                logits_all=True,
                verbose=False,
            )
            llama.eval(text[:-1])
            rows = torch.from_numpy(llama.scores[: len(text) - 1]).log_softmax(-1)
            llama.close()
            return rows

        return along

    return laws(llama_cpp.GGML_TYPE_F16), {
        name: laws(getattr(llama_cpp, attribute)) for name, attribute in LLAMA_CPP.items()
    }
