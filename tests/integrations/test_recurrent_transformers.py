"""model.generate(custom_generate=generate) of every family with a recurrent state, and what its cache cannot do."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from pyspec.integrations.transformers import generate  # noqa: E402
from pyspec.integrations.transformers.generation import runner_of  # noqa: E402
from pyspec.runners.foreign_support import cache_argument  # noqa: E402
from pyspec.runners.native import NativeRunner  # noqa: E402
from tests.helpers.random_llama import random_tokens  # noqa: E402
from tests.helpers.tiny_hybrids import KINDS as HYBRIDS  # noqa: E402
from tests.helpers.tiny_hybrids import tiny_hybrid  # noqa: E402
from tests.helpers.tiny_mambas import KINDS as MAMBAS  # noqa: E402
from tests.helpers.tiny_mambas import tiny_mamba  # noqa: E402

OPTIONS = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("kind", [*HYBRIDS, *MAMBAS])
def test_every_family_is_taken(kind):
    """The text is transformers' own, or differs first at a near tie; what pads a shorter prompt changes nothing."""
    model = (tiny_hybrid if kind in HYBRIDS else tiny_mamba)(kind)
    groups = getattr(model.config, "n_groups", getattr(model.config, "mamba_n_groups", 1))
    norm = next((module for module in model.modules() if type(module).__name__.endswith("RMSNormGated")), None)
    if groups > 1 and norm is not None and not hasattr(norm, "group_size"):
        pytest.skip("this version of transformers norms all groups of a Mamba-2 layer as one")
    model.generation_config.eos_token_id = None
    prompt = random_tokens(12)
    ids = torch.tensor([prompt])
    options = OPTIONS | {"return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(ids, **options)
    found = model.generate(ids, custom_generate=generate, budget=6, **OPTIONS)[0].tolist()
    assert isinstance(runner_of(model), NativeRunner)
    for place, (token, logits) in enumerate(zip(found[12:], expected.logits, strict=True)):
        if token != int(logits[0].argmax()):
            best = logits[0].topk(2).values
            assert best[0] - best[1] < 1e-3, place
            break
    padded = torch.tensor([[0] * 4 + prompt, random_tokens(16, seed=1)])
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    both = model.generate(padded, attention_mask=mask, custom_generate=generate, budget=6, **OPTIONS)
    assert both[0, 4:].tolist() == found


@pytest.mark.skipif(not hasattr(transformers.DynamicCache, "activate_past_recording"), reason="is before 5.23")
def test_a_cache_of_transformers_does_not_see_what_a_replay_needs():
    """Why there is no rollback of its recurrent caches: a crop leaves the state, and only the state behind all tokens
    of a pass is handed over, without the decays and corrections that it was made of."""
    model = tiny_hybrid("qwen3_5")
    seen = []

    class Watched(transformers.DynamicCache):
        def update_recurrent_state(self, state, *args, **kwargs):
            seen.append(tuple(state.shape))
            return super().update_recurrent_state(state, *args, **kwargs)

    cache = Watched(config=model.config)
    options = {cache_argument(type(model)): cache, "use_cache": True}
    with torch.inference_mode():
        model(torch.tensor([random_tokens(8)]), **options)
        cache.activate_past_recording()
        model(torch.tensor([random_tokens(3, seed=1)]), **options)
    config = model.config
    shape = (1, config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim)
    assert set(seen) == {shape}  # one for a pass, however many tokens it has
    before = cache.layers[0].recurrent_states[0].clone()
    assert not cache.is_croppable
    cache.layers[0].crop(-2)
    assert torch.equal(cache.layers[0].recurrent_states[0], before)
