"""Captions and columns of the tables that results.py makes of bench/results/*.json."""

from pyspec.caches import CACHES
from pyspec.drafters import DRAFTERS

NAME = "name"  # what rows are called that come with a name each

# By result: a caption, where its rows are, and its columns. A column is a heading and a path in the row; with a second
# path the first one's value over its own, as "2.5x"; with "%" a share. What a row lacks is left empty.
TIMES = [("ms", "ms/pyspec"), ("over SDPA", "ms/sdpa", "ms/pyspec"), ("over FlexAttention", "ms/flex", "ms/pyspec")]
ENGINES = [
    ("engine", NAME),
    ("tokens/s", "tokens_per_second"),
    ("over plain", "over pyspec plain/tokens_per_second"),
    ("with the prompt", "tokens_per_second_end_to_end"),
    ("tokens a round", "tokens_per_round"),
    ("texts like plain", "equal_to_plain"),
]
BEST = ("best tokens of the target", "agreement", "%")
STEPS = [("nodes", NAME), ("seconds", "value")]
QUANTISED = [("nodes", "nodes"), ("tokens", "length"), ("dense ms", "ms/dense"), ("SDPA ms", "ms/sdpa")]
DRAFTING = [
    ("drafter", NAME),
    ("tokens/s", "tokens_per_second"),
    ("over plain", "speedup"),
    ("over recycling", "over_recycling"),
    ("tokens a round", "tokens_per_round"),
    ("share of drafting", "draft_share", "%"),
    ("texts", "texts"),
    ("those of plain decoding", "equal"),
]
QUALITY = [
    ("cache", "cache"),
    ("bits at 8k", "effective_bits_at_8k"),
    ("perplexity", "perplexity"),
    ("change", "change", "%"),
    ("KL divergence", "kl"),
    ("same best token", "same_top", "%"),
    ("error of keys", "key_error"),
    ("of values", "value_error"),
    ("tokens a round", "accepted"),
    ("numbers found", "passkeys", "%"),
]
FLOORS = [
    (
        "Microseconds of a call on an H100, at the least",
        "calls",
        [
            ("call", NAME),
            ("for its bytes", "floors/memory"),
            ("for its instructions", "floors/instructions"),
            ("busiest", "floors/pipe"),
        ],
    )
]
_STATE_SPACE_ROUNDS = (
    "A round of six drafts, all accepted, over a plain step",
    "results",
    [
        ("model", "model"),
        ("weights", "weights"),
        ("batch", "batch"),
        *((way, f"over_plain/{way} 6") for way in ("replay", "kept", "snapshots", "joint", "recompute")),
        ("plain step, s", "seconds/replay 1"),
        ("over its floor", "plain_over_floor"),
        ("transformers' step over ours", "over_plain/transformers 1"),
    ],
)
FASTER = "How many times as fast as our dense attention"
TABLES = {
    "generate_bf16": [("Texts", "engines", ENGINES), ("A verify of so many nodes", "steps/seconds", STEPS)],
    "generate_int8": [("Texts", "engines", ENGINES), ("A verify of so many nodes", "steps/seconds", STEPS)],
    "drafters_bf16": [
        ("Greedy, all categories", "temperatures/0.0/all", DRAFTING),
        ("Temperature 0.8", "temperatures/0.8/all", DRAFTING),
        ("Several drawn answers to one problem", "answers", DRAFTING),
    ],
    "cascades": [
        (
            "Texts by rules of turns",
            "turns",
            [("rule", "rule"), ("dial", "dial"), ("large", "large_share", "%"), ("perplexity", "perplexity"), BEST],
        ),
        (
            "Answers by rules of answers: right ones, the mean over all shares that are given again",
            "answers",
            [("rule", "rule"), ("right", "mean_right", "%"), ("none again", "none", "%"), ("all again", "all", "%")],
        ),
    ],
    "cascades_speed": [
        (
            "Greedy texts of six prompts by exact speculation and by speculative cascades, both with merged tables",
            "speculative",
            [("alpha", "alpha"), ("tokens/s", "tokens_per_second"), ("perplexity", "perplexity"), BEST],
        ),
        (
            "Eight beams in four groups, in fp32: one tree, and rows of a batch on transformers' model",
            "beams",
            [
                ("new tokens", "tokens"),
                ("seconds", "seconds/pyspec"),
                ("transformers", "seconds/transformers"),
                ("faster", "speedup"),
                ("same beams", "same_beams"),
                ("largest difference of scores", "largest_difference"),
            ],
        ),
    ],
    "equality": [
        (
            "Texts with a drafter that are those of plain decoding, token by token",
            "checks",
            [
                ("check", NAME),
                ("texts", "prompts"),
                ("tokens", "tokens"),
                *((drafter, f"drafters/{drafter}/equal") for drafter in DRAFTERS),
            ],
        )
    ],
    "bit_equality": [
        (
            "Tokens, and rows of logits they were drawn from, that differ from plain decoding's in any bit",
            "checks",
            [
                ("dtype", "dtype"),
                ("drafter", "drafter"),
                ("nodes", "budget"),
                ("batch", "batch"),
                ("texts", "sequences"),
                ("tokens", "tokens"),
                ("rounds", "rounds"),
                ("tokens that differ", "token_differences"),
                ("rows that differ", "logit_differences"),
            ],
        )
    ],
    "kernels_cpu": [
        (
            "Every op in the shapes of six models",
            "rows",
            [
                ("op", "op"),
                ("model", "model"),
                ("shape", "shape"),
                ("us", "us"),
                ("share of the floor", "share_of_floor", "%"),
                ("over peers", "peers_us", "us"),
            ],
        )
    ],
    "models_cpu": [
        (
            "Seconds, and how many times as fast as llama.cpp on the same file",
            "rows",
            [
                ("file", "model"),
                *(
                    column
                    for name in ("plain", "verify", "prompt")
                    for column in ((name, f"seconds/{name}"), ("over llama.cpp", f"faster/{name}"))
                ),
                ("verify over plain", "verify_over_plain"),
                ("plain over its floor", "plain_over_floor"),
                ("load, s", "load/seconds"),
                ("memory over the file", "load/over_file"),
                ("peak", "load/peak_over_file"),
            ],
        )
    ],
    "perplexity_cpu": [
        (
            "",
            "rows",
            [
                ("format", "format"),
                ("perplexity", "pyspec"),
                ("llama.cpp's", "llama.cpp"),
                ("change", "change", "%"),
                ("of the values in fp32", "fp32"),
            ],
        )
    ],
    "attention_implementation_cpu": [
        (
            "",
            "rows",
            [
                ("dtype", "dtype"),
                ("documents", "documents"),
                ("attention, sdpa ms", "ms/sdpa/attention"),
                ("pyspec ms", "ms/pyspec/attention"),
                ("faster", "ms/sdpa/attention", "ms/pyspec/attention"),
                ("mask, sdpa ms", "ms/sdpa/mask"),
                ("pyspec's ms", "ms/pyspec/mask"),
                ("forward, faster", "ms/sdpa/forward", "ms/pyspec/forward"),
            ],
        )
    ],
    "tree_attention_cpu": [
        (
            "",
            "rows",
            [
                ("nodes", "nodes"),
                ("keys", "prefix"),
                ("dtype", "dtype"),
                *TIMES,
                ("over SDPA with a float mask", "ms/sdpa, float mask", "ms/pyspec"),
                ("floor ms", "floor_ms"),
                ("of the rate", "share_of_rate", "%"),
                ("of the bandwidth", "share_of_bandwidth", "%"),
            ],
        )
    ],
    "block_masked_attention_backward_cuda": [
        (
            "Gradients",
            "rows",
            [("mask", "pattern"), ("rows", "size"), *TIMES, ("over SDPA's causal path", "ms/sdpa causal", "ms/pyspec")],
        )
    ],
    "block_masked_attention_cpu": [
        (
            "",
            "rows",
            [
                ("mask", "pattern"),
                ("rows", "size"),
                ("visible tiles", "density", "%"),
                ("dtype", "dtype"),
                *TIMES,
                ("over SDPA's causal path", "ms/sdpa causal", "ms/pyspec"),
                ("mask built in ms", "build_ms/pyspec"),
                ("FlexAttention's", "build_ms/flex"),
            ],
        )
    ],
    "linear_cpu": [
        (
            "All linears of the demo model",
            "results",
            [
                ("weights", "weights"),
                ("rows", "rows"),
                ("ms", "ms/pyspec"),
                ("over one row", "ms/pyspec", "one_row_ms"),
                ("floor ms", "floor_ms"),
                ("bound by", "floor"),
                ("over peers", "ms", "ms/pyspec"),
            ],
        )
    ],
    "topk_cpu": [
        (
            "",
            "shapes",
            [
                ("rows", "rows"),
                ("values", "n"),
                ("k", "k"),
                ("dtype", "dtype"),
                ("torch.topk ms", "ms/torch.topk"),
                *((f"{how} over it", "ms/torch.topk", f"ms/{how}") for how in ("exact", "recall 0.99", "one stage")),
                ("recall of one stage", "recall/one stage", "%"),
            ],
        )
    ],
    "sparse_attention_cpu": [
        (
            "Quality",
            "quality",
            [
                ("setting", "setting"),
                ("error of the outputs", "error"),
                ("KL divergence", "kl"),
                ("same best token", "same", "%"),
                ("perplexity", "perplexity"),
                ("full attention's", "full_perplexity"),
            ],
        ),
        (
            "Time of a layer",
            "speed",
            [
                ("tokens", "n"),
                ("tree_attention ms", "ms/tree_attention"),
                ("torch ms", "ms/torch"),
                ("sparse, keys in columns, ms", "ms/sparse, keys in columns"),
                ("keys in rows", "ms/sparse, keys in rows"),
            ],
        ),
    ],
    "gear_cpu": [
        (
            FASTER,
            "rows",
            QUANTISED + [(cache, "ms/dense", f"ms/{cache}") for cache in CACHES if cache != "dense"],
        ),
        (
            "Encoding",
            "encode",
            [
                ("cache", NAME),
                ("us a token and layer", "us_per_token_and_layer"),
                ("bits at 8k", "effective_bits_at_8k"),
            ],
        ),
    ],
    "residual_vq_cpu": [
        (
            FASTER,
            "rows",
            QUANTISED + [(codes, "ms/dense", f"ms/{codes}") for codes in ("8 x 256", "4 x 256", "8 x 2048")],
        ),
        (
            "Encoding",
            "encode",
            [("codebooks", NAME), ("us a token and layer", "us_per_token_and_layer"), ("bits", "bits")],
        ),
    ],
    "selective_state_other_shapes_cpu": [_STATE_SPACE_ROUNDS],
    "selective_state_cpu": [
        _STATE_SPACE_ROUNDS,
        (
            "Texts of a trained model, tokens a second",
            "texts",
            [
                ("model", "model"),
                *((name, f"tokens_per_second/{name}") for name in ("plain", "lookup", "merged", "transformers")),
                ("lookup over plain", "tokens_per_second/lookup", "tokens_per_second/plain"),
            ],
        ),
    ],
    "hybrids_cpu": [
        (
            "A round of six drafts, all accepted, over a plain step",
            "results",
            [
                ("model", "model"),
                ("weights", "weights"),
                ("batch", "batch"),
                *((way, f"over_plain/{way} 6") for way in ("replay", "snapshots", "recompute")),
                ("16 drafts", "over_plain/replay 16"),
                ("plain step, s", "seconds/replay 1"),
                ("over its floor", "plain_over_floor"),
                ("transformers' step over ours", "over_plain/transformers 1"),
            ],
        ),
    ],
    "verify_cuda": [
        (
            "Seconds of a verify of so many nodes, behind 512 tokens, random weights",
            "results",
            [
                ("model", "model"),
                ("weights", "weights"),
                *((f"{nodes} nodes", f"seconds/{nodes}") for nodes in (1, 8, 16, 32, 64)),
                ("8 nodes over plain", "over_plain/8"),
                ("plain over its floor", "plain_over_floor"),
            ],
        ),
        (
            "A prompt of 2,048 tokens in pieces of 512, seconds",
            "prompts",
            [
                ("model and weights", NAME),
                ("replayed", "seconds/replayed"),
                ("launch by launch", "seconds/launched"),
                ("floor by operations", "floor_seconds"),
                ("tokens/s", "tokens_per_second"),
            ],
        ),
    ],
    "generation_cuda": [
        (
            caption,
            f"models/{model}",
            [
                ("drafter", NAME),
                ("tokens/s", "tokens_per_second"),
                ("texts", "texts"),
                ("those of plain decoding", "equal_to_plain"),
            ],
        )
        for caption, model in (
            ("models/demo-ssm, 5.4M parameters, trained", "demo_ssm"),
            ("A random Llama of 8B, bf16, which repeats nothing", "random_llama"),
        )
    ],
    "kv_cache": [("", "rows", QUALITY), ("llama.cpp, each over its own dense cache", "peers", QUALITY)],
    "compiled_kernels_triton_3_6": FLOORS,
    "compiled_kernels_triton_3_9": FLOORS,
    "compiled_kernels_nvcc_13_0": FLOORS,
    "instructions": [("", "instructions", [("kernel", NAME), ("instructions a call", "value")])],
}
