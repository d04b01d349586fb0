"""What falls back to transformers, what it says, and what nobody runs."""

import pytest
import torch

from pyspec import from_transformers, load
from pyspec.runners.foreign import TransformersRunner
from pyspec.runners.foreign_support import _say_foreign
from tests.runners.test_foreign import SUPPORTED, tiny_model

SHAPE = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = SHAPE | {"intermediate_size": 64, "max_position_embeddings": 96, "num_key_value_heads": 2}
RECURRENT = SHAPE | {"num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 1}
HYBRID = SMALL | {"mamba_n_heads": 4, "mamba_d_state": 16, "attn_layer_indices": [1], "attention_dropout": 0.0}


@pytest.mark.parametrize("from_folder", [False, True], ids=["live", "folder"])
@pytest.mark.parametrize(
    "family, options, feature",
    [
        ("Phi", SUPPORTED["Phi"], "has architecture PhiForCausalLM, which our kernels do not run"),
        ("Qwen3", SUPPORTED["Qwen3"], "head_dim 16 of qwen3: supported are"),
        ("Llama", SMALL | {"mlp_bias": True, "head_dim": 64}, "has mlp_bias, which AttentionRunner does not have"),
        ("Mistral", SMALL | {"head_dim": 16, "sliding_window": 9}, "head_dim 16 of mistral: supported are"),
        ("Qwen2", SMALL | {"hidden_act": "gelu"}, "has hidden_act 'gelu', Llama's kernels have silu"),
    ],
)
def test_a_model_without_kernels_runs_through_transformers_and_says_so_once(
    family, options, feature, from_folder, tmp_path
):
    model = tiny_model(family, options)
    model.save_pretrained(tmp_path)
    _say_foreign.cache_clear()
    with pytest.warns(RuntimeWarning) as told:
        for _ in range(2):
            runner = load(tmp_path, dtype=torch.float32, device="cpu") if from_folder else from_transformers(model)
    assert isinstance(runner, TransformersRunner)
    (said,) = [warning for warning in told if "through transformers" in str(warning.message)]
    assert feature in str(said.message) and "On a CPU that takes several times as long" in str(said.message)
    assert said.filename == __file__


@pytest.mark.parametrize("from_folder", [False, True], ids=["live", "folder"])
@pytest.mark.parametrize(
    "family, options, feature, reason",
    [
        ("Mamba", SHAPE | {"hidden_act": "gelu"}, "has hidden_act 'gelu', RecurrentRunner has silu", "recurrent state"),
        ("Mamba2", RECURRENT | {"time_step_limit": [0.0, 1.0]}, "RecurrentRunner has no limit", "recurrent state"),
        ("Bamba", HYBRID | {"mlp_bias": True}, "has mlp_bias True, HybridRunner has none", "recurrent state"),
    ],
)
def test_a_model_that_transformers_cannot_run_either_is_refused_with_both_reasons(
    family, options, feature, reason, from_folder, tmp_path
):
    model = tiny_model(family, options)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{feature}.*; {family}ForCausalLM is not supported: .*{reason}"):
        load(tmp_path, dtype=torch.float32, device="cpu") if from_folder else from_transformers(model)
