"""EAGLE-3 heads say what the library that trains most of them says: speculators 0.9.0 (`make test-engines`)."""

import pytest
import torch

from pyspec.drafters.eagle3 import Eagle3
from tests.drafters.heads.test_eagle3 import COMBINATIONS, TAPS, name_of, said
from tests.helpers import eagle3_heads
from tests.helpers.eagle3_heads import random_head, write_head
from tests.helpers.random_llama import VOCABULARY, random_llama, random_tokens
from tests.helpers.runner_checks import observed_taps
from training import eagle3 as training_eagle3
from training.drafts import Target

pytest.importorskip("speculators")
transformers = pytest.importorskip("transformers")

from speculators import SpeculatorsConfig, VerifierConfig  # noqa: E402
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig  # noqa: E402
from speculators.proposals.greedy import GreedyTokenProposalConfig  # noqa: E402


def their_model(tensors, kind, layers, flags):
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": eagle3_heads.HIDDEN,
        "intermediate_size": eagle3_heads.INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": eagle3_heads.HEADS,
        "num_key_value_heads": eagle3_heads.KV_HEADS,
        "head_dim": eagle3_heads.HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": eagle3_heads.THETA},
    }
    of_layer = (transformers.LlamaConfig if kind == "llama" else transformers.Qwen3Config)(**shape)
    of_layer._attn_implementation = "eager"
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=of_layer,
        draft_vocab_size=len(tensors["lm_head.weight"]),
        eagle_aux_hidden_state_layer_ids=list(TAPS),
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=4)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
        ),
        **flags,
    )
    model = Eagle3DraftModel(config).eval()
    missing, unknown = model.load_state_dict(tensors, strict=False)
    assert not unknown and all("verifier" in name for name in missing)
    return model


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("flags", COMBINATIONS, ids=name_of)
def test_four_steps_have_the_logits_of_speculators(tmp_path, kind, layers, flags):
    """Theirs are taught: the guesses of a row are the tokens behind it, so a longer text holds them."""
    target = random_llama(windows=(None,) * 6)
    tensors = random_head(VOCABULARY, target.hidden_size, kind=kind, layers=layers, **flags)
    folder = write_head(tmp_path, tensors, VOCABULARY, kind=kind, taps=TAPS, **flags)
    drafter = Eagle3(folder, target, weights=torch.float32)
    prompt, guesses = random_tokens(30), [3, 17, 9]
    text = prompt + drafter.head.target_tokens(torch.tensor(guesses).numpy()).tolist()
    (taps,) = observed_taps(target, [text[:-1]], TAPS)
    theirs, logits = their_model(tensors, kind, layers, flags), []
    theirs.lm_head.register_forward_hook(lambda module, args, result: logits.append(result[0, len(prompt) - 2]))
    theirs(
        taps.flatten(1)[None], torch.tensor([text[1:]]), torch.zeros(1, len(text) - 1, dtype=torch.int64), ttt_steps=4
    )
    expected = torch.stack(logits)
    found = said(drafter, target, prompt, guesses).log()
    torch.testing.assert_close(found, expected.double().log_softmax(-1), atol=1e-5, rtol=1e-5)


def test_a_trained_head_loads_in_speculators(tmp_path):
    """training.eagle3 writes what their from_pretrained reads, with nothing missing and nothing left over."""
    target = random_llama(windows=(None,) * 6)
    head = training_eagle3.Eagle3(Target(target, torch.arange(0, 80, 2)), TAPS)
    shape = target.config
    verifier = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
    )
    transformers.LlamaForCausalLM(verifier).save_pretrained(tmp_path / "target")
    head.write(tmp_path, str(tmp_path / "target"))
    theirs = Eagle3DraftModel.from_pretrained(tmp_path)
    tensors = theirs.state_dict()
    for name, values in head.state_dict().items():
        torch.testing.assert_close(tensors[name].float(), values.bfloat16().float(), atol=0, rtol=0)
    assert theirs.config.eagle_aux_hidden_state_layer_ids == list(TAPS) and theirs.config.norm_output
    assert theirs.config.transformer_layer_config.rope_parameters["rope_theta"] == target.config.rope_base
    assert (tensors["d2t"] + torch.arange(40)).tolist() == list(range(0, 80, 2))
