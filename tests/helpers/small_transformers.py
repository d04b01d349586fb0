"""Small random models of transformers, whose greedy texts repeat themselves."""

import torch
import transformers

from pyspec.runners.foreign_support import cache_argument

CACHE = cache_argument(transformers.LlamaForCausalLM)  # its name depends on the version

VOCABULARY = 101
OPTIONS = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PROMPT = [[5, 6, 7, 5, 6, 7, 5, 6]]


def tiny(family="Llama", **options):
    shape = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2}
    if family == "Mamba":
        shape |= {"state_size": 16}
    elif family == "Mamba2":
        shape |= {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1}
    else:
        shape |= {"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
        shape |= {"max_position_embeddings": 256}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**shape | options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "A_log" not in name:
            torch.nn.init.normal_(parameter, std=0.12)  # so that texts repeat themselves, and drafts are accepted
    return model
