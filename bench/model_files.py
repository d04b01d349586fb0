"""The GGUF files that models.py measures: random weights in the shapes of real models, quantised by llama.cpp."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FORMATS = ("Q4_K_M", "Q8_0")  # llama.cpp's names


@dataclass(frozen=True)
class Shape:
    """A model with tied embeddings; window: of its sliding layers, or None."""

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    rope_base: float
    window: int | None = None

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names in GGUF files, and shapes, outermost first."""
        hidden, wide = self.hidden, self.intermediate
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "token_embd", (self.vocabulary, hidden)
        yield "output_norm", (hidden,)
        for layer in range(self.layers):
            parts = {"attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q": (queries, hidden)}
            parts |= {"attn_k": (keys, hidden), "attn_v": (keys, hidden), "attn_output": (hidden, queries)}
            parts |= {"ffn_gate": (wide, hidden), "ffn_up": (wide, hidden), "ffn_down": (hidden, wide)}
            if self.architecture != "llama":
                parts |= {"attn_q_norm": (self.head_dim,), "attn_k_norm": (self.head_dim,)}
            if self.architecture == "gemma3":
                parts |= {"post_attention_norm": (hidden,), "post_ffw_norm": (hidden,)}
            yield from ((f"blk.{layer}.{name}", shape) for name, shape in parts.items())


SHAPES = {
    "Llama-3.2-1B": Shape("llama", 16, 2048, 8192, 32, 8, 64, 128256, 5e5),
    "Qwen3-1.7B": Shape("qwen3", 28, 2048, 6144, 16, 8, 128, 151936, 1e6),
    "Gemma-3-1B": Shape("gemma3", 26, 1152, 6912, 4, 1, 256, 262144, 1e6, 512),
}


def random_file(name: str, kind: str, folder: Path) -> Path:
    """A file of a shape with random weights in a format of llama.cpp; made once and kept in the folder."""
    path = folder / f"{name}-{kind}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / f"{name}-F16.gguf"
        if not source.exists():
            _write(SHAPES[name], name, source)
        requantise(source, path, kind)
        if all((folder / f"{name}-{other}.gguf").exists() for other in FORMATS):
            source.unlink()
    return path


def requantise(source: Path, path: Path, kind: str) -> None:
    """Writes a GGUF file anew in another format of llama.cpp, such as "Q4_K_M"."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.allow_requantize = True
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # it prints a line for every tensor
    part = path.with_suffix(".part")
    if failed := llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp could not write {source} as {kind}: error {failed}")
    part.replace(path)


def _write(shape: Shape, name: str, path: Path) -> None:
    import gguf

    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, shape.architecture)
    _describe(writer, shape, name)
    texts, merges = vocabulary(shape.vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(texts)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(texts) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(texts) - 1)
    writer.add_eos_token_id(len(texts) - 1)
    draws = np.random.default_rng(0)
    # enough random values to look random to a quantiser; every tensor begins elsewhere among them
    values = (draws.standard_normal(2**24 - 3, np.float32) * 0.02).astype(np.float16)
    for tensor, size in shape.tensors():
        if len(size) == 1:
            writer.add_tensor(f"{tensor}.weight", np.ones(size, np.float32))
        else:
            start = int(draws.integers(len(values)))
            writer.add_tensor(f"{tensor}.weight", np.resize(np.roll(values, -start), size))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(path)


def _describe(writer, shape: Shape, name: str) -> None:
    writer.add_name(f"{name}, random")
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(1e-6)
    if shape.window:
        writer.add_sliding_window(shape.window)


def vocabulary(size: int) -> tuple[list[str], list[str]]:
    """Texts of so many tokens in GPT-2's alphabet of bytes, and merges that make each of them of two before it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    texts = [chr(code) for code in printable] + [chr(256 + place) for place in range(256 - len(printable))]
    alphabet, merges = list(texts), []
    for left in texts:  # which grows meanwhile
        for right in alphabet:
            if len(texts) == size - 1:
                return [*texts, "<|end_of_text|>"], merges
            texts.append(left + right)
            merges.append(f"{left} {right}")
    raise ValueError(f"size must be above 257, got {size}")
