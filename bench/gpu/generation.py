"""Whole texts: plain decoding against speculation, on the demo of a state space model and on a random 8B Llama.

The random model writes in circles, so its acceptance says nothing of real texts: what it shows is what a round costs.
Every text must be plain decoding's.
"""

import sys
import time

import bench_verify
import torch
from where import DEVICE, IS_DRY, synchronize

import pyspec
from pyspec import generate, measure

DRAFTERS = (None, "lookup", "merged")
NEW_TOKENS = 12 if IS_DRY else 256
if IS_DRY:
    bench_verify.SHAPES = dict.fromkeys(bench_verify.SHAPES, (64, 96, 2, 4, 2, 64, 300, True))


def demo_ssm():
    model = pyspec.load("models/demo-ssm", device=DEVICE)
    texts = ("import os\n\n\ndef walk(", "class Node:\n    def __init__(self", "def main():\n    parser = ")
    return model, [model.tokenizer.encode(text) for text in texts]


def random_llama():
    model = bench_verify.random_model("Llama-3.1-8B", torch.bfloat16, DEVICE)
    return model, [[place * step % model.vocab_size for place in range(200)] for step in (31, 77)]


def main() -> int:
    result, is_equal = {"machine": measure.machine(), "device": DEVICE, "models": {}}, True
    for make in (demo_ssm, random_llama):
        model, prompts = make()
        model.warm(max(map(len, prompts)) + NEW_TOKENS + 64)
        settings = [{}] if make is random_llama else [{}, {"temperature": 0.7, "seed": 1}]
        rows = result["models"][make.__name__] = {}
        for sampling in settings:
            plain = None
            for drafter in DRAFTERS:
                texts, seconds = [], 0.0
                generate(model, prompts[0], drafter=drafter, max_new_tokens=16, **sampling)
                for prompt in prompts:
                    synchronize()
                    start = time.perf_counter()
                    made = generate(model, prompt, drafter=drafter, max_new_tokens=NEW_TOKENS, **sampling)
                    seconds += time.perf_counter() - start
                    texts.append(made.tokens)
                plain = plain or texts
                tokens = sum(map(len, texts))
                name = f"{drafter or 'plain'}{', drawn' if sampling else ''}"
                rows[name] = {
                    "tokens_per_second": tokens / seconds,
                    "equal_to_plain": sum(a == b for a, b in zip(texts, plain, strict=True)),
                    "texts": len(texts),
                    "tokens": tokens,
                    "stats": str(made.stats),
                }
                is_equal &= texts == plain
                measure.save("generation_cuda", result)
                print(make.__name__, name, {key: rows[name][key] for key in ("tokens_per_second", "equal_to_plain")})
        del model
        torch.cuda.empty_cache()
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
