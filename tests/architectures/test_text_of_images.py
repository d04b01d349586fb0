"""Models of images and text: their text runs in our kernels, whatever their files call it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyspec import from_transformers, load
from pyspec.runners.attention import AttentionRunner
from tests.helpers.random_llama import VOCABULARY
from tests.helpers.runner_checks import check_prompt

transformers = pytest.importorskip("transformers")
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "head_dim": 64}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
MROPE = {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [16, 8, 8], "mrope_interleaved": True}
KINDS = {
    "Gemma3": {"text_config": TEXT | {"sliding_window": 6}, "vision_config": VISION, "mm_tokens_per_image": 4},
    "Gemma4": {
        "text_config": TEXT | {"sliding_window": 6, "hidden_size_per_layer_input": 0, "layer_types": None},
        "vision_config": VISION,
        "audio_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 32},
    },
    "Mistral3": {
        "text_config": TEXT | {"model_type": "mistral", "sliding_window": 6},
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 16},
    },
    "Mistral3 with Ministral 3": {
        "text_config": TEXT | {"model_type": "ministral3"},
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 16},
    },
    "Qwen3VL": {
        "text_config": TEXT | {"rope_parameters": MROPE},
        "vision_config": {"hidden_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 96}
        | {"intermediate_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
}


def tiny(family):
    torch.manual_seed(0)
    config, family = KINDS[family], family.partition(" ")[0]
    config = getattr(transformers, f"{family}Config")(**config)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model


@pytest.mark.parametrize("family", KINDS)
def test_text_has_the_logits_of_transformers(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    check_prompt(load(str(tmp_path), dtype=torch.float32, device="cpu"), model)
    runner = from_transformers(model)
    assert isinstance(runner, AttentionRunner)
    check_prompt(runner, model)


@pytest.mark.parametrize("outer, inner", [("language_model.", "model."), ("model.language_model.", "")])
def test_either_way_of_naming_is_read(outer, inner, tmp_path):
    model = tiny("Gemma3")
    model.save_pretrained(tmp_path)
    tensors = {}
    for name, values in load_file(tmp_path / "model.safetensors").items():
        stem = name.replace("model.language_model.", "").replace("language_model.model.", "")
        is_text = stem != name
        tensors[outer + inner + stem if is_text else name] = values
    assert len(tensors) > 20
    save_file(tensors, tmp_path / "model.safetensors")
    check_prompt(load(str(tmp_path), dtype=torch.float32, device="cpu"), model)


def test_text_that_no_family_has_is_named(tmp_path):
    tiny("Mistral3").save_pretrained(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    description["text_config"]["model_type"] = "mistral4"
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(
        ValueError, match="has text of mistral4, our kernels have that of mistral, ministral, ministral3"
    ):
        load(str(tmp_path), dtype=torch.float32, device="cpu")
