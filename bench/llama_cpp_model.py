"""llama.cpp's own calls on a file, for benchmarks that look at single ones; peers.py has it as an engine for texts."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np


class LlamaCppModel:
    """What stands in llama.cpp's cache, and more tokens behind it.

    Args:
        most: tokens of a call.
    """

    def __init__(self, file: Path, threads: int, most: int):
        import llama_cpp

        self._library = llama_cpp
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # it prints a line for every tensor
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = 2 * most
        settings.n_batch = settings.n_ubatch = most
        settings.n_threads = settings.n_threads_batch = threads
        self._model, self._context = model, llama_cpp.llama_init_from_model(model, settings)
        self._batch = llama_cpp.llama_batch_init(most, 0, 1)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def close(self) -> None:
        self._library.llama_batch_free(self._batch)
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def read(self, tokens: list[int], start: int, *, all_logits: bool):
        """Logits [n, V] of all tokens or the last one, read at positions from start on; later ones are forgotten."""
        library, batch = self._library, self._batch
        library.llama_memory_seq_rm(library.llama_get_memory(self._context), 0, start, -1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, start + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = all_logits or place == len(tokens) - 1
        if failed := library.llama_decode(self._context, batch):
            raise RuntimeError(f"llama.cpp cannot read {len(tokens)} tokens behind {start}: error {failed}")
        rows = len(tokens) if all_logits else 1
        return np.ctypeslib.as_array(library.llama_get_logits(self._context), (rows, self.vocabulary))
