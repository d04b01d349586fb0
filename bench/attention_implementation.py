"""What does attn_implementation="pyspec" save a transformers model that reads joined documents?

    python bench/attention_implementation.py            a table, bench/results/attention_implementation_cpu.json

One forward over 4,096 tokens of joined documents (position_ids start anew with each), the same call for both: "sdpa" is
given transformers' dense 4D mask, "pyspec" a block mask. Timed are the attention function, summed over the layers, and
the making of the mask, once a forward. The model has the demo model's heads and random weights: neither changes a time.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict

import torch
from command_line import parse, parser_of

from pyspec import measure

TOKENS, LAYERS = 4096, 4
DOCUMENTS = (8, 32)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = ("sdpa", "pyspec")
GOAL = 3.0  # times as fast as sdpa, by the attention function


def model_of(dtype: torch.dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    config = LlamaConfig(hidden_size=576, intermediate_size=576, num_hidden_layers=LAYERS, vocab_size=512, **heads)
    return LlamaForCausalLM(config).to(dtype).eval()


def register_timed(seconds: dict[str, float]) -> None:
    """Both implementations under the names "timed sdpa" and "timed pyspec", which add up their seconds."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from pyspec.integrations.transformers import register_attention

    def timed(kind: str, call):
        def wrapper(*arguments, **options):
            start = time.perf_counter()
            result = call(*arguments, **options)
            seconds[kind] += time.perf_counter() - start
            return result

        return wrapper

    register_attention()
    for name in NAMES:
        AttentionInterface.register(f"timed {name}", timed("attention", ALL_ATTENTION_FUNCTIONS[name]))
        AttentionMaskInterface.register(f"timed {name}", timed("mask", ALL_MASK_ATTENTION_FUNCTIONS[name]))


@torch.inference_mode()
def run(dtype: torch.dtype, documents: int, repeats: int, seconds: dict[str, float]) -> dict[str, dict[str, float]]:
    """Median milliseconds of attention, mask and the whole forward, by implementation."""
    model = model_of(dtype)
    length = TOKENS // documents
    tokens = torch.randint(512, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(TOKENS)[None] % length
    found: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    logits = {}
    for _ in range(repeats + 1):  # the first warms up
        for name in NAMES:
            model.set_attn_implementation(f"timed {name}")
            seconds.clear()
            start = time.perf_counter()
            logits[name] = model(tokens, position_ids=positions, use_cache=False).logits
            found[name].append({**seconds, "forward": time.perf_counter() - start})
    torch.testing.assert_close(logits["pyspec"], logits["sdpa"], atol=2e-2, rtol=2e-2)
    kinds = ("attention", "mask", "forward")
    return {
        name: {kind: 1e3 * statistics.median(run[kind] for run in runs[1:]) for kind in kinds}
        for name, runs in found.items()
    }


def main() -> int:
    parser = parser_of(__doc__, repeats=5)
    options = parse(parser)
    seconds: dict[str, float] = defaultdict(float)
    register_timed(seconds)
    rows = []
    for dtype_name, dtype in DTYPES.items():
        for documents in DOCUMENTS:
            times = run(dtype, documents, options.repeats, seconds)
            ratio = times["sdpa"]["attention"] / times["pyspec"]["attention"]
            rows.append({"dtype": dtype_name, "documents": documents, "ms": times, "faster": ratio})
            print(f"{dtype_name}, {documents} documents of {TOKENS // documents} tokens, {LAYERS} layers")
            for name in NAMES:
                print(f"    {name:<8}" + "".join(f"{kind} {ms:8.1f} ms   " for kind, ms in times[name].items()))
            print(f"    attention {ratio:.1f}x faster (goal {GOAL}x)", flush=True)
    machine = measure.machine()
    print(f"wrote {measure.save('attention_implementation_cpu', {'machine': machine, 'tokens': TOKENS, 'rows': rows})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
