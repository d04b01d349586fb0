"""Random layers that guess further tokens, for tiny hybrids, and what transformers' own module says with them."""

import copy
import json
import re

import torch
from safetensors.torch import load_file, save_file


def random_mtp(model, seed: int = 7) -> dict[str, torch.Tensor]:
    """The tensors mtp.* of a checkpoint of a tiny hybrid, as published ones name them."""
    layer = _module(model)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, value in layer.state_dict().items():
        deviation = 0.2 if value.dim() == 1 else value.shape[-1] ** -0.5
        tensors[_published(name)] = torch.randn(value.shape, generator=generator) * deviation
    return tensors


def add_mtp(folder, tensors) -> None:
    """Adds tensors to the safetensors file of a folder, and says in its config.json that there is a layer."""
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: values.contiguous() for name, values in tensors.items()}, path, {"format": "pt"})
    entries = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(entries | {"mtp_num_hidden_layers": 1}))


@torch.inference_mode()
def said_by_transformers(model, tensors, tokens: list[int], guesses: list[int]) -> torch.Tensor:
    """[1 + len(guesses), V] float64 logits below a text and along a chain of guesses below it.

    The text is read again with every guess, by transformers' MtpLayer around the model's own kind of layer.
    """
    model, layer = model.double(), _module(model).double()
    layer.load_state_dict({_of_module(name): values.double() for name, values in tensors.items()})
    model.config._experts_implementation = layer.config._experts_implementation = "eager"  # others lack float64
    hidden = model(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states[-1]  # behind the last norm
    ids, found = tokens[1:], []
    for guess in [*guesses, None]:
        embedded = model.get_input_embeddings()(torch.tensor([ids]))
        places = torch.arange(len(ids))[None]
        turned = model.model.rotary_emb(
            embedded, places[None].expand(4, -1, -1)[1:] if _is_sectioned(model) else places
        )
        mask = torch.full((len(ids), len(ids)), float("-inf"), dtype=torch.float64).triu(1)[None, None]
        out = layer(embedded, hidden, turned, mask, places, None)
        found.append(model.lm_head(out)[0, -1])
        if guess is not None:
            ids, hidden = [*ids, guess], torch.cat((hidden, out[:, -1:]), 1)
    model.float()
    return torch.stack(found)


def _is_sectioned(model) -> bool:
    return "mrope_section" in (model.config.rope_parameters or {})


def _module(model):
    from transformers.modeling_layers import MtpLayer

    decoder = model.get_decoder()
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
    config._attn_implementation = "eager"
    if hasattr(config, "mlp_only_layers"):
        config.mlp_only_layers = []
    return MtpLayer(config, type(decoder.layers[-1]), type(decoder.norm), 0).eval()


def _published(name: str) -> str:
    name = name.replace("mtp_block.", "layers.0.").replace("enorm", "pre_fc_norm_embedding")
    return "mtp." + re.sub("^post_norm", "norm", name.replace("hnorm", "pre_fc_norm_hidden").replace("eh_proj", "fc"))


def _of_module(name: str) -> str:
    name = re.sub("^norm", "post_norm", name.removeprefix("mtp.").replace("layers.0.", "mtp_block."))
    name = name.replace("pre_fc_norm_embedding", "enorm").replace("pre_fc_norm_hidden", "hnorm")
    return name.replace("fc.", "eh_proj.")
