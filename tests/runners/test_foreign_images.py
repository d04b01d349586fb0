"""Models of images and text read text through transformers, from their folders too."""

import pytest
import torch

from pyspec import from_transformers, generate, load
from pyspec.integrations.transformers.generation import generate as custom_generate

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*through transformers instead:RuntimeWarning")

PROMPT = [5, 9, 17, 3, 44, 8] * 3
TEXT = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip
SIGHT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_SIGHT = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
QWEN_TOKENS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "Qwen2_5_VL": {
        "text_config": TEXT | MROPE,
        "vision_config": QWEN_SIGHT | {"fullatt_block_indexes": [0]},
        **QWEN_TOKENS,
    },
    "Gemma3": {
        "text_config": TEXT | SLIDING,
        "vision_config": SIGHT,
        "mm_tokens_per_image": 4,
        "image_token_index": 90,
        "boi_token_index": 91,
        "eoi_token_index": 92,
    },
    "Mistral3": {
        "text_config": TEXT | {"model_type": "mistral", "sliding_window": 5},
        "vision_config": SIGHT | {"model_type": "pixtral", "head_dim": 8},
        "image_token_index": 90,
    },
}


def tiny_model(family, options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("family", MODELS)
def test_text_is_that_of_generate(family, tmp_path):
    model = tiny_model(family, MODELS[family])
    model.save_pretrained(tmp_path)
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(torch.tensor([PROMPT]), **settings)[0].tolist()
    assert model.generate(torch.tensor([PROMPT]), custom_generate=custom_generate, **settings)[0].tolist() == expected
    for runner in (from_transformers(model), load(tmp_path, dtype=torch.float32, device="cpu")):
        assert PROMPT + generate(runner, PROMPT, max_new_tokens=16, budget=8).tokens == expected


def test_text_alone_is_read_where_transformers_has_it(tmp_path):
    text = TEXT | {"intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": 5}
    sight = SIGHT | {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32}
    options = {"text_config": text | {"no_rope_layers": [1, 0]}, "vision_config": sight | {"intermediate_size": 64}}
    model = tiny_model("Llama4", options)
    model.save_pretrained(tmp_path)
    runner = load(tmp_path, dtype=torch.float32, device="cpu")
    assert type(runner.model).__name__ == "Llama4ForCausalLM"
    expected = model.language_model.generate(torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert PROMPT + generate(runner, PROMPT, max_new_tokens=16, budget=8).tokens == expected[0].tolist()


def test_a_recurrent_text_is_refused_by_the_name_of_its_class(tmp_path):
    text = TEXT | {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
    text |= {"linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    tiny_model("Qwen3_5", {"text_config": text, "vision_config": QWEN_SIGHT, **QWEN_TOKENS}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Qwen3_5ForCausalLM is not supported: it keeps a recurrent state"):
        load(tmp_path, dtype=torch.float32, device="cpu")
