"""Does another build of pyspec compute the same logits, bit for bit, with every runner?

    python bench/bits.py --write FILE               hashes of this build's logits, as JSON: name -> SHA-256
    python bench/bits.py --check FILE               compares with a file that another build wrote; 1 if any differs
    python bench/bits.py demo mamba --check FILE    these models alone

For a change that must not touch the arithmetic: write with the build before it, check with the build after it, on one
machine, with one number of threads (torch's own sums, which Phi's are, hang on it; ours don't). Hashes of another
machine say nothing, since the bits of a float kernel are those of its instruction set; none are committed.

The models are the demo model and small random ones, which transformers makes from a fixed seed and saves to a
temporary folder. Each is loaded in fp32, bf16 and int8 (Phi, which stands for the models that run on transformers' own
arithmetic, in fp32 and bf16), and reads

- a prompt of a few tokens and one of several chunks, then trees of 1, 8 and 40 nodes, whose branching paths it commits;
- a batch of three prompts, two of which begin alike, with trees of other sizes and a sequence that sits out;
- with a dense cache, and, where keys and values can be quantised, with each of the caches, across the end of a block.

Only what users call is called, so that the script runs on builds whose insides are others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

import pyspec
from pyspec import DraftTree
from pyspec.caches import CACHES, cache_from_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
#: Builds before Verified have lists with None where now there are dicts by slot.
TAKES_LISTS = not (Path(pyspec.__file__).parent / "runners" / "verified.py").exists()
VOCABULARY = 260
SHORT, LONG = 5, 380  # tokens: LONG is three chunks of attention's, and 384 is the end of a block
CAPACITY = LONG + 160
TREES = (1, 8, 40)
ROUNDS_OF_BATCH = ((1, 8, 40), (8, None, 1), (40, 3, None), (None, 40, 8))

_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 96, "num_hidden_layers": 3, "eos_token_id": None}
_ATTENTION = _SHAPE | {
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2 * CAPACITY,
}
_MIXED = ["full_attention", "sliding_attention", "full_attention"]
_MAMBA2 = {"num_heads": 6, "head_dim": 32, "state_size": 32, "chunk_size": 8}
_BAMBA = {"mamba_n_heads": 6, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 8, "attn_layer_indices": [1]}
#: name -> (the class's name in transformers, options of its configuration)
MODELS = {
    "demo": None,
    "llama": ("Llama", _ATTENTION | {"attention_bias": True}),
    "mistral": ("Mistral", _ATTENTION | {"sliding_window": 50}),
    "qwen2": ("Qwen2", _ATTENTION | {"use_sliding_window": True, "sliding_window": 50, "layer_types": _MIXED}),
    "mamba": ("Mamba", _SHAPE),
    "mamba-biases": ("Mamba", _SHAPE | {"use_bias": True, "tie_word_embeddings": False, "conv_kernel": 3}),
    "mamba2": ("Mamba2", _SHAPE | _MAMBA2 | {"n_groups": 1}),
    "mamba2-groups": ("Mamba2", _SHAPE | _MAMBA2 | {"n_groups": 2, "use_bias": True, "use_conv_bias": False}),
    "bamba": ("Bamba", _ATTENTION | _BAMBA),
    "bamba-biases": ("Bamba", _ATTENTION | _BAMBA | {"attention_bias": True, "mamba_proj_bias": True}),
    "qwen3": ("Qwen3", _ATTENTION),
    "olmo2": ("Olmo2", _ATTENTION),
    "granite": ("Granite", _ATTENTION | {"residual_multiplier": 0.22, "attention_multiplier": 0.1}),
    "gemma2": ("Gemma2", _ATTENTION | {"sliding_window": 50}),
    "phi": ("Phi", _ATTENTION | {"hidden_size": 128}),  # falls back to transformers
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; all by default")
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the hashes go")
    parser.add_argument("--check", type=Path, metavar="FILE", help="hashes of another build")
    options = parser.parse_args()
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"MODEL must be one of {', '.join(MODELS)}, got {', '.join(sorted(unknown))}")
    hashes = {}
    for model in options.models or MODELS:
        hashes |= hashes_of(model)
        print(f"{model}: {len(hashes)} hashes", flush=True)
    if options.write:
        options.write.write_text(json.dumps(hashes, indent=0) + "\n")
    if options.check:
        expected = json.loads(options.check.read_text())
        if options.models:
            expected = {name: value for name, value in expected.items() if name.split()[0] in options.models}
        raise SystemExit(compare(hashes, expected))


def compare(hashes: dict[str, str], expected: dict[str, str]) -> int:
    """Prints the names whose hashes differ, or which one of the two has alone; 1 if there are any."""
    names = [name for name in expected | hashes if hashes.get(name) != expected.get(name)]
    for name in names:
        print(f"{name}: {'differs' if name in hashes and name in expected else 'is in one of the two alone'}")
    print(f"{len(expected | hashes) - len(names)} hashes are equal, {len(names)} are not")
    return int(bool(names))


def hashes_of(model: str) -> dict[str, str]:
    """Name -> SHA-256 of all that a model says, in every dtype and with every cache that it takes."""
    hashes = {}
    with tempfile.TemporaryDirectory() as folder:
        source = "demo" if model == "demo" else save(model, folder)
        for dtype in DTYPES if model != "phi" else ("fp32", "bf16"):
            runner = pyspec.load(source, dtype=DTYPES[dtype], device="cpu")
            for cache, settings in caches(model).items():
                for name, value in scenes(runner, settings):
                    hashes[f"{model} {dtype} {cache} {name}"] = value
    return hashes


def save(model: str, folder: str) -> str:
    """Writes a random model that forgets slowly, all of whose weights say something."""
    import transformers

    family, options = MODELS[model]
    config = getattr(transformers, f"{family}Config")(**options)
    made = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        mean, deviation = (1.0, 0.2) if parameter.dim() == 1 else (0.0, 0.2)
        if "dt_bias" in name or "dt_proj.bias" in name or "A_log" in name:
            mean, deviation = -2.0, 1.0
        torch.nn.init.normal_(parameter, mean, deviation, generator=generator)
    made.save_pretrained(folder)
    return folder


def caches(model: str) -> dict[str, object]:
    """Name -> settings, None for the dense cache; quantised ones for the models whose keys can be."""
    if model not in ("demo", "llama"):
        return {"dense": None}
    found = {"dense": None} | {name: cache_from_name(name) for name in CACHES if name != "rvq"}
    found["int4-half-the-tokens"] = replace(found["int4"], keep=0.5, whole_layers=1)
    found["int4-half-the-channels"] = replace(found["int4"], key_channels=32)
    if model == "demo":
        found["rvq"] = cache_from_name("rvq")  # its codebooks are the demo model's
    return found


def scenes(runner, settings) -> Iterator[tuple[str, str]]:
    """(what was asked, the hash of the logits): a short and a long prompt alone, then three in a batch."""
    draw = random.Random(0)
    text = [draw.randrange(VOCABULARY) for _ in range(LONG)]
    other = [draw.randrange(VOCABULARY) for _ in range(SHORT)]
    prompts = {f"{SHORT} tokens": [text[:SHORT]], f"{LONG} tokens": [text]}
    prompts["batch"] = [text, text[:126] + other, other]
    for name, batch in prompts.items():
        read = [[] for _ in batch]

        def observe(sequence, chain, logits, read=read):
            read[sequence].append(getattr(logits, "logits", logits).clone())  # older builds show tensors

        options = {} if settings is None else {"cache": settings}
        ends = runner.prefill(batch, capacity=CAPACITY, observe=observe, **options)
        yield f"{name}, prompt", hash_of([*(torch.cat(rows) for rows in read), *ends])
        for number, sizes in enumerate([(size,) for size in TREES] if len(batch) == 1 else ROUNDS_OF_BATCH):
            trees = [None if size is None else random_tree(size, draw) for size in sizes]
            yield f"{name}, round {number}, nodes {sizes}", hash_of(verify(runner, trees))
            paths = [None if tree is None else random_path(tree, draw) for tree in trees]
            runner.commit(paths if TAKES_LISTS else by_slot(paths))
        tree = random_tree(9, draw)
        yield f"{name}, at the end", hash_of(verify(runner, [tree, *[None] * (len(batch) - 1)]))
        if settings is None and hasattr(runner, "draft"):
            yield f"{name}, draft by some layers", hash_of([runner.draft(0, tree, [0, 2])])


def verify(runner, trees: list[DraftTree | None]) -> list[torch.Tensor]:
    """[T, V] logits of each sequence's tree, without those that sit out."""
    if TAKES_LISTS:
        return [logits for logits in runner.verify(trees) if logits is not None]
    return [verified.logits for verified in runner.verify(by_slot(trees)).values()]


def by_slot(values: list) -> dict:
    return {slot: value for slot, value in enumerate(values) if value is not None}


def random_tree(nodes: int, draw: random.Random) -> DraftTree:
    """A tree that is deep as well as wide."""
    parents = [-1] + [draw.randrange(max(0, node - 3), node) for node in range(1, nodes)]
    return DraftTree([draw.randrange(VOCABULARY) for _ in range(nodes)], parents)


def random_path(tree: DraftTree, draw: random.Random) -> list[int]:
    """From the root to one of the last nodes, which leaves siblings out."""
    parents, node = tree.parents.tolist(), draw.randrange(len(tree) * 3 // 4, len(tree))
    path = [node]
    while (node := parents[node]) >= 0:
        path.append(node)
    return path[::-1]


def hash_of(logits: list[torch.Tensor]) -> str:
    """SHA-256 of the shapes and the bits of fp32 logits, which must be finite: NaN would be equal to any NaN."""
    value = hashlib.sha256()
    for rows in logits:
        if not rows.isfinite().all():
            raise ValueError("logits must be finite for their bits to say something")
        value.update(repr(tuple(rows.shape)).encode())
        value.update(rows.float().contiguous().numpy().tobytes())
    return value.hexdigest()


if __name__ == "__main__":
    main()
