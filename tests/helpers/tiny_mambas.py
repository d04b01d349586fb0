"""Tiny random state space models, as transformers makes and saves them, and drafters that know the text."""

import torch

from pyspec import DraftTree
from pyspec.runners.foreign_support import cache_argument
from tests.helpers.random_llama import VOCABULARY

_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "eos_token_id": None}
KINDS = {
    "mamba": ("Mamba", _SHAPE),
    "mamba_untied_with_biases": (
        "Mamba",
        _SHAPE | {"use_bias": True, "tie_word_embeddings": False, "conv_kernel": 3, "time_step_rank": 5},
    ),
    "falcon_mamba": ("FalconMamba", _SHAPE | {"time_step_rank": 5, "mixer_rms_eps": 1e-5}),
    "mamba2": ("Mamba2", _SHAPE | {"num_heads": 3, "head_dim": 32, "state_size": 32, "n_groups": 1, "chunk_size": 8}),
    "mamba2_tied_with_groups": (
        "Mamba2",
        _SHAPE
        | {"num_heads": 6, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 8}
        | {"use_bias": True, "tie_word_embeddings": True, "use_conv_bias": False},
    ),
}
FAMILIES = ("mamba", "mamba2")


def tiny_mamba(kind: str):
    """A transformers model of 2 layers and 96 channels, in fp32, that forgets slowly."""
    import transformers

    family, options = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        mean, deviation = (1.0, 0.2) if parameter.dim() == 1 else (0.0, 0.3)
        if "dt_bias" in name or "dt_proj.bias" in name or "A_log" in name:
            mean, deviation = -2.0, 1.0
        torch.nn.init.normal_(parameter, mean, deviation)
    return model


@torch.inference_mode()
def step_by_step(model, prompt: list[int], new_tokens: int) -> list[torch.Tensor]:
    """The [V] logits of every greedy token by transformers, one token at a time, the prompt too."""
    name, cache, rows, tokens = cache_argument(type(model)), {}, [], list(prompt)
    for place in range(len(prompt) + new_tokens - 1):
        out = model(torch.tensor([[tokens[place]]]), use_cache=True, **cache)
        cache = {name: out[name]}
        if place >= len(prompt) - 1:
            rows.append(out.logits[0, -1].float())
            tokens.append(int(rows[-1].argmax()))
    return rows


class Knows:
    """Drafts from the text that is coming: right chains, wrong ones, or right ones among wrong branches."""

    proposal = "deterministic"

    def __init__(self, text: list[int], kind: str):
        self.text, self.kind, self.rounds = text, kind, 0

    def start(self, prompt):
        return self

    def observe(self, tree, verified, path):
        pass

    def propose(self, context, budget):
        assert context == self.text[: len(context)]
        coming = self.text[len(context) :][: budget - 1]
        self.rounds += 1
        if self.kind == "sometimes none" and self.rounds % 3:
            return DraftTree.chain(context[-1:])
        if self.kind == "wrong":
            return DraftTree.chain([context[-1], *((token + 1) % VOCABULARY for token in coming)])
        if self.kind == "half right":
            coming = [token if depth % 2 else (token + 1) % VOCABULARY for depth, token in enumerate(coming, start=1)]
        if self.kind != "branches":
            return DraftTree.chain([context[-1], *coming])
        tokens, parents, tip = [context[-1]], [-1], 0
        for token in coming[: (budget - 1) // 2]:
            tokens += [(token + 1) % VOCABULARY, token]
            parents += [tip, tip]
            tip = len(tokens) - 1
        return DraftTree(tokens, parents)
