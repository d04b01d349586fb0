"""What transformers does with state space models, as docs/selective_state.md says it: a change upstream shows here."""

import pytest
import torch

from pyspec.runners.foreign_support import cache_argument
from tests.helpers.random_llama import random_tokens
from tests.helpers.tiny_mambas import FAMILIES, tiny_mamba

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("error::FutureWarning")


def after(model, text):
    """The cache of a text, under the name that the model's forward has for it."""
    name = cache_argument(type(model))
    return {name: model(text, use_cache=True)[name]}


def test_the_cache_of_transformers_still_loses_mamba_states():
    """Several tokens at once start from an empty state there."""
    model, text = tiny_mamba("mamba"), torch.tensor([random_tokens(16)])
    with torch.inference_mode():
        expected = model(text, use_cache=False).logits
        found = model(text[:, 8:], use_cache=True, **after(model, text[:, :8])).logits
        if torch.allclose(found, expected[:, 8:], atol=1e-3):
            pytest.fail("transformers verifies several tokens of Mamba rightly now: say so in docs/selective_state.md")


def test_the_cache_of_transformers_verifies_mamba2():
    model, text = tiny_mamba("mamba2"), torch.tensor([random_tokens(16)])
    with torch.inference_mode():
        expected = model(text, use_cache=False).logits
        found = model(text[:, 8:], use_cache=True, **after(model, text[:, :8])).logits
    torch.testing.assert_close(found, expected[:, 8:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_assisted_generation_is_refused(kind):
    model, text = tiny_mamba(kind), torch.tensor([random_tokens(4)])
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_mamba(kind)}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            model.generate(text, max_new_tokens=4, do_sample=False, **options)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_state_is_fp32_and_one_column_wider_than_ours(kind):
    model = tiny_mamba(kind).bfloat16()
    with torch.inference_mode():
        (cache,) = after(model, torch.tensor([random_tokens(9)])).values()
    mixer, layer = model.backbone.layers[0].mixer, cache.layers[0]
    state, window = layer.recurrent_states[0], layer.conv_states[0]
    heads = (96, 16) if kind == "mamba" else (3, 32, 32)
    assert state.dtype == torch.float32 and state.shape == (1, *heads)
    assert window.dtype == torch.bfloat16 and window.shape == (1, mixer.conv1d.in_channels, 4)
