"""Random EAGLE-3 heads in the layouts that people have, and what a head says, in float64 and written another way."""

import json

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, THETA = 96, 2, 1, 64, 160, 7000.0
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


def random_head(vocab, target_hidden=HIDDEN, draft=40, kind="llama", layers=1, taps=3, biases=False, seed=0, **flags):
    """The tensors of a head by the names of speculators."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=None):
        return torch.randn(shape, generator=generator) * (scale or shape[-1] ** -0.5)

    def norm(*shape):
        return 1 + 0.3 * torch.randn(shape, generator=generator)

    tensors = {
        "embed_tokens.weight": normal(vocab, HIDDEN, scale=1.0),
        "fc.weight": normal(HIDDEN, taps * target_hidden),
        "norm.weight": norm(HIDDEN),
        "lm_head.weight": normal(draft, HIDDEN, scale=0.4),
        "layers.0.hidden_norm.weight": norm(HIDDEN),
    }
    if flags.get("norm_before_fc"):
        tensors["input_norm.weight"] = norm(taps * target_hidden)
    if flags.get("fc_norm"):
        tensors |= {f"fc_norm.{tap}.weight": norm(target_hidden) for tap in range(taps)}
    for layer in range(layers):
        prefix, width = f"layers.{layer}.", HIDDEN * (1 if layer else 2)
        for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = normal(rows * HEAD_DIM, width)
            if biases:
                tensors[f"{prefix}self_attn.{name}_proj.bias"] = normal(rows * HEAD_DIM, scale=0.2)
        tensors[f"{prefix}self_attn.o_proj.weight"] = normal(HIDDEN, HEADS * HEAD_DIM)
        if biases:
            tensors[f"{prefix}self_attn.o_proj.bias"] = normal(HIDDEN, scale=0.2)
        if kind == "qwen3":
            tensors |= {f"{prefix}self_attn.{name}_norm.weight": norm(HEAD_DIM) for name in "qk"}
        tensors |= {f"{prefix}{name}.weight": norm(HIDDEN) for name in ("input_layernorm", "post_attention_layernorm")}
        for name, shape in (("gate", (INTERMEDIATE, HIDDEN)), ("up", (INTERMEDIATE, HIDDEN)),
                            ("down", (HIDDEN, INTERMEDIATE))):  # fmt: skip
            tensors[f"{prefix}mlp.{name}_proj.weight"] = normal(*shape)
    if draft < vocab:
        kept = torch.randperm(vocab, generator=generator)[:draft].sort().values
        tensors["d2t"] = kept - torch.arange(draft)
        tensors["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill(0, kept, True)
    return tensors


def write_head(folder, tensors, vocab, *, layout="speculators", kind="llama", taps=None, pickled=False, **entries):
    """A folder as people have it; entries: of config.json, in eagle_config where the layout has one."""
    layers = len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
    shape = {
        "model_type": kind,
        "vocab_size": vocab,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "rope_theta": THETA,
        "max_position_embeddings": 16,  # which must not cap the text
        "attention_bias": "layers.0.self_attn.q_proj.bias" in tensors,
    }
    draft = {"draft_vocab_size": len(tensors["lm_head.weight"])} if "lm_head.weight" in tensors else {}
    named = {} if taps is None else {"eagle_aux_hidden_state_layer_ids": list(taps)}
    if layout == "speculators":
        config = {"speculators_model_type": "eagle3", "architectures": ["Eagle3Speculator"], **draft, **named}
        config |= {"transformer_layer_config": shape, **entries}
    else:
        config = {"architectures": ["LlamaForCausalLMEagle3"], **shape, **draft, "eagle_config": {**named, **entries}}
        tensors = {name.replace("layers.0.", "midlayer."): values for name, values in tensors.items()}
        if layout == "nemo":
            tensors = {f"model.{name}": values for name, values in tensors.items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file({name: values.contiguous() for name, values in tensors.items()}, folder / "model.safetensors")
    return folder


def steps(tensors, taps, tokens, guesses, flags):
    """[1 + len(guesses), draft] float64 logits of a chain of guesses below a text.

    Args:
        taps: [n, taps, target's hidden] of a text but its last token.
        tokens: [n] of the text from its second token on.
        guesses: the target's tokens, each below the one before.
    """
    weights = {name: values.double() for name, values in tensors.items() if name not in ("d2t", "t2d")}

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]

    def project(x, name):
        bias = weights.get(f"{name}.bias")
        return x @ weights[f"{name}.weight"].T + (0 if bias is None else bias)

    taps = taps.double()
    if flags.get("fc_norm"):
        taps = torch.stack([norm(taps[:, tap], f"fc_norm.{tap}") for tap in range(taps.shape[1])], 1)
    joined = taps.flatten(1)
    if flags.get("norm_before_fc"):
        joined = norm(joined, "input_norm")
    hidden, said = project(joined, "fc"), []
    count = len(hidden)
    for token in [None, *guesses]:
        tokens = tokens if token is None else [*tokens, token]
        out = hidden
        for layer in range(len({name.split(".")[1] for name in weights if name.startswith("layers.")})):
            prefix = f"layers.{layer}"
            x = norm(out, f"{prefix}.{'input_layernorm' if layer else 'hidden_norm'}")
            if not layer:
                out = x if flags.get("norm_before_residual") else out
                x = torch.cat([norm(weights["embed_tokens.weight"][tokens], f"{prefix}.input_layernorm"), x], 1)
            q, k, v = (
                project(x, f"{prefix}.self_attn.{name}_proj").view(len(x), -1, HEAD_DIM).transpose(0, 1)
                for name in "qkv"
            )
            if f"{prefix}.self_attn.q_norm.weight" in weights:
                q, k = (norm(values, f"{prefix}.self_attn.{name}_norm") for name, values in (("q", q), ("k", k)))
            q, k = turned(q), turned(k).repeat_interleave(HEADS // KV_HEADS, 0)
            scores = q @ k.transpose(1, 2) / HEAD_DIM**0.5
            scores += torch.full(scores.shape[1:], float("-inf")).triu(1)
            mixed = (scores.softmax(-1) @ v.repeat_interleave(HEADS // KV_HEADS, 0)).transpose(0, 1).flatten(1)
            out = out + project(mixed, f"{prefix}.self_attn.o_proj")
            x = norm(out, f"{prefix}.post_attention_layernorm")
            inner = F.silu(project(x, f"{prefix}.mlp.gate_proj")) * project(x, f"{prefix}.mlp.up_proj")
            out = out + project(inner, f"{prefix}.mlp.down_proj")
        normed = norm(out, "norm")
        said.append(project(normed[-1], "lm_head"))
        hidden = torch.cat([hidden, (normed if flags.get("norm_output") else out)[-1:]])
    assert len(hidden) == count + 1 + len(guesses)
    return torch.stack(said)


def turned(x):
    """Rotary positions 0, 1, ... of [heads, n, HEAD_DIM] as complex numbers."""
    frequencies = THETA ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
    angles = torch.arange(x.shape[1]).double()[:, None] * frequencies
    first, second = x.chunk(2, -1)
    found = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([found.real, found.imag], -1)
