import inspect
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyspec import DraftTree, from_transformers, load
from pyspec.checkpoints.tokenizer import Tokenizer
from pyspec.runners.foreign import TransformersRunner
from pyspec.runners.foreign_support import cache_argument
from tests.helpers.random_llama import by_slot, verify_all
from tests.helpers.runner_checks import check_taps_of, observed_taps

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("error::FutureWarning", "error::DeprecationWarning:transformers")

VOCABULARY = 101
NEW_TOKENS = 16
_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_OLD_SHAPE = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 96}
SUPPORTED = {
    "GPT2": _OLD_SHAPE,
    "GPTNeoX": _SHAPE | {"intermediate_size": 64, "max_position_embeddings": 96},
    "OPT": _SHAPE | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 96},
    "Phi": _SHAPE | {"intermediate_size": 64, "max_position_embeddings": 96},
    "Qwen3": _SHAPE | {"intermediate_size": 64, "head_dim": 16, "num_key_value_heads": 1},
    "Falcon": _SHAPE | {"alibi": False},
    # dense: all its layers are attention, though others of its class are recurrent
    "GraniteMoeHybrid": _SHAPE | {
        "shared_intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 0, "num_experts_per_tok": 0,
        "mamba_n_heads": 4, "layer_types": ["attention"] * 2, "position_embedding_type": "rope",
    },
    "Mistral": _SHAPE | {"intermediate_size": 64, "num_key_value_heads": 1, "sliding_window": 5},
    "Gemma2": _SHAPE | {"intermediate_size": 64, "head_dim": 16, "num_key_value_heads": 1, "sliding_window": 5},
    "GptOss": _SHAPE | {
        "intermediate_size": 64, "head_dim": 16, "num_key_value_heads": 1, "sliding_window": 5, "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}  # fmt: skip
REFUSED = {
    "Mamba": (_SHAPE, "recurrent state"),
    "Bloom": ({"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 2}, "positions cannot be given"),
    "Falcon": (_SHAPE | {"alibi": True}, "positions cannot be given"),
    "Lfm2": (_SHAPE | {"intermediate_size": 64, "layer_types": ["conv", "full_attention"]}, "layers of convolution"),
    "GPTNeo": (
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 2,
         "attention_types": [[["global", "local"], 1]]},
        "count slots of the cache",
    ),
    "GraniteMoeHybrid": (
        SUPPORTED["GraniteMoeHybrid"] | {"layer_types": ["mamba", "attention"]}, "recurrent state",
    ),
    "Bert": (_SHAPE | {"intermediate_size": 64, "is_decoder": False}, "does not attend"),  # tokens see those behind
    "OpenAIGPT": (_OLD_SHAPE, "takes no cache"),
}  # fmt: skip


def tiny_model(family, options):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**options)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def greedy(model, prompt):
    """transformers' own greedy continuation."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


def speculate(runner, prompts, expected):
    """Greedy continuations by trees whose later branch is the right one, partly."""
    said = [[int(logits.argmax())] for logits in runner.prefill(prompts, capacity=64)]
    while min(map(len, said)) < NEW_TOKENS:
        trees = []
        for tokens, right in zip(said, expected, strict=True):
            a, b = (right + [0, 0])[len(tokens) : len(tokens) + 2] if len(tokens) < NEW_TOKENS else (0, 0)
            wrong = (b + 1) % VOCABULARY
            tree = DraftTree([tokens[-1], (a + 1) % VOCABULARY, a, b, wrong, b], [-1, 0, 0, 1, 2, 2])
            trees.append(tree if len(tokens) < NEW_TOKENS else None)
        logits, paths = verify_all(runner, trees), []
        for tokens, tree, rows in zip(said, trees, logits, strict=True):
            if tree is None:
                paths.append(None)
                continue
            path = [0]
            while True:
                tokens.append(int(rows[path[-1]].argmax()))
                following = [node for node in tree.children(path[-1]) if int(tree.tokens[node]) == tokens[-1]]
                if not following:
                    break
                path.append(following[-1])
            paths.append(path)
        runner.commit(by_slot(paths))
    return [tokens[:NEW_TOKENS] for tokens in said]


@pytest.mark.parametrize("family", SUPPORTED)
def test_greedy_text_is_that_of_generate(family):
    model = tiny_model(family, SUPPORTED[family])
    runner = TransformersRunner(model)
    for prompts in ([[5, 6, 7]], [[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [50]]):
        expected = [greedy(model, prompt) for prompt in prompts]
        assert speculate(runner, prompts, expected) == expected


def test_prompts_are_read_in_chunks_and_observed(monkeypatch):
    model = tiny_model("GPT2", SUPPORTED["GPT2"])
    runner = TransformersRunner(model)
    monkeypatch.setattr("pyspec.runners.foreign.PREFILL_CHUNK", 4)
    prompts = [list(range(1, 11)), [7]]
    pieces = [[], []]
    last = runner.prefill(prompts, observe=lambda b, chain, verified: pieces[b].append(verified.logits))
    assert [len(chunks) for chunks in pieces] == [3, 1]
    for prompt, chunks, logits in zip(prompts, pieces, last, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(torch.cat(chunks), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits, expected[-1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", SUPPORTED)
def test_taps(family, monkeypatch):
    """Those of a text are the same as a prompt in chunks and as paths of trees in a batch; logits stay as they are."""
    model = tiny_model(family, SUPPORTED[family])
    runner, layers = TransformersRunner(model), model.config.num_hidden_layers
    monkeypatch.setattr("pyspec.runners.foreign.PREFILL_CHUNK", 12)
    check_taps_of(runner, model)
    prompts, tree = [[1, 2, 3], [4] * 9], DraftTree([5, 6, 7, 8], [-1, 0, 0, 2])
    runner.prefill(prompts, capacity=32)
    plain = runner.verify({0: tree, 1: tree})
    assert plain[0].taps is None
    observed_taps(runner, prompts, [1, layers, layers + 1])
    verified = runner.verify({0: tree, 1: tree})
    for slot, prompt in enumerate(prompts):
        assert torch.equal(verified[slot].logits, plain[slot].logits)
        (again,) = observed_taps(runner.fork(), [[*prompt, 5, 7, 8]], [1, layers, layers + 1])
        close = {"atol": 1e-4 * float(again.abs().max()), "rtol": 1e-4}
        torch.testing.assert_close(verified[slot].taps[[0, 2, 3]], again[len(prompt) :], **close)


def test_layers_that_cannot_be_found_are_refused(monkeypatch):
    model = tiny_model("GPT2", SUPPORTED["GPT2"])
    runner = TransformersRunner(model)
    runner.prefill([[1, 2, 3]])
    for taps, error in (([4], ValueError), ([1, 0], ValueError), ("1", TypeError), ([0.5], TypeError)):
        with pytest.raises(error, match="taps must "):
            runner.prefill([[1]], taps=taps)
    monkeypatch.setattr(type(model), "get_decoder", lambda self: self.lm_head)
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not supported: its code does not say which"):
        runner.prefill([[1]], taps=[1])
    assert runner.lengths() == [3]


def test_verify_reads_only():
    runner = TransformersRunner(tiny_model("GPTNeoX", SUPPORTED["GPTNeoX"]))
    runner.prefill([[1, 2, 3], [4]], capacity=32)
    tree = DraftTree([5, 6, 7], [-1, 0, 0])
    first = runner.verify({1: tree})
    runner.verify({0: DraftTree.chain([9] * 8), 1: DraftTree.chain([8] * 5)})
    again = runner.verify({1: tree})
    assert list(first) == [1] and torch.equal(first[1].logits, again[1].logits)
    assert runner.lengths() == [3, 1]


def test_a_live_model_brings_its_tokenizer_and_end_tokens():
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "</s>": 2}, []))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    model = tiny_model("GPT2", SUPPORTED["GPT2"] | {"eos_token_id": 4})
    assert from_transformers(model, fast).eos_tokens == {2, 4}
    runner = TransformersRunner(model, Tokenizer.from_transformers(fast), eos_tokens=[9])
    assert runner.eos_tokens == {2, 4, 9}
    assert runner.tokenizer.encode("abba") == [0, 1, 1, 0]
    assert runner.vocab_size == VOCABULARY and runner.context_length == 96
    assert runner.fingerprint.startswith("gpt2-")
    with pytest.raises(ValueError, match="fast tokenizer"):
        from_transformers(model, object())


@pytest.mark.parametrize("family", REFUSED)
def test_models_without_a_croppable_cache_are_refused_by_name(family):
    options, reason = REFUSED[family]
    with pytest.raises(ValueError, match=rf"{family}\w+ is not supported: .*{reason}.*; supported are Bamba"):
        TransformersRunner(tiny_model(family, options))


def test_a_model_that_ignores_the_mask_is_refused(monkeypatch):
    model = tiny_model("GPT2", SUPPORTED["GPT2"])
    forward = model.forward

    def causal_by_slot(attention_mask=None, position_ids=None, **inputs):
        return forward(position_ids=position_ids, **inputs)

    causal_by_slot.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(model, "forward", causal_by_slot)
    with pytest.raises(ValueError, match="does not attend as its attention mask"):
        TransformersRunner(model)


def test_a_model_that_does_not_have_the_window_of_its_configuration_is_refused():
    model = tiny_model("GPT2", SUPPORTED["GPT2"])
    model.config.sliding_window = 5
    with pytest.raises(ValueError, match="its windows or chunks are not those that its configuration states"):
        TransformersRunner(model)


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("texts of a batch", "depend on what else is in a call"),
        ("experts that are full", "depend on what else is in a call"),
        ("the longest position", "depend on what else is in a call, or how far it goes"),
        ("the length of the cache", "they follow from the length of its cache"),
        ("an error", r"its forward fails .*IndexError: out of nothing\)"),
    ],
)
def test_a_model_whose_rows_hang_on_their_call_is_refused(fault, reason, monkeypatch):
    model = tiny_model("GPT2", SUPPORTED["GPT2"])
    block, whole = model.transformer.h[0].mlp, model.forward
    forward, longest = block.forward, []

    def changed(states):
        if fault == "texts of a batch":
            return forward(states - states.mean(0, keepdim=True) * (len(states) > 1))
        if fault == "experts that are full":  # each takes as many tokens as there are on average, in order
            expert = states[..., 0] > 0
            places = torch.where(expert, expert.flatten().cumsum(0).view(expert.shape), 0)
            return forward(states) * (places <= max(1, expert.numel() // 4))[..., None]
        if fault == "an error":
            raise IndexError("out of nothing")
        return forward(states) * max(1, longest[-1] / 20)  # as attention that is scaled by length behind 20 tokens

    def seen(*args, **inputs):
        cache = inputs.get(cache_argument(type(model)))
        by_cache = fault == "the length of the cache" and cache is not None
        longest.append(cache.get_seq_length() if by_cache else int(inputs["position_ids"].max()))
        return whole(*args, **inputs)

    seen.__signature__ = inspect.signature(whole)
    monkeypatch.setattr(block, "forward", changed)
    monkeypatch.setattr(model, "forward", seen)
    with pytest.raises(ValueError, match=f"GPT2LMHeadModel is not supported: .*{reason}; supported are Bamba"):
        TransformersRunner(model)


# ==== frequencies that depend on the longest position of a call ====

SWITCH = 20


def with_longrope(family):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": SWITCH}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [6.0] * 8, "factor": 4.0}
    options = _SHAPE | {"intermediate_size": 64, "num_key_value_heads": 1, "max_position_embeddings": 96}
    if family == "Phi3":
        options |= {"original_max_position_embeddings": SWITCH, "sliding_window": 262144, "pad_token_id": 0}
    return tiny_model(family, options | {"rope_parameters": rope})


@pytest.mark.parametrize("family, reads_again", [("Llama", False), ("Phi3", True)])
def test_texts_that_cross_a_switch_are_those_of_generate(family, reads_again, monkeypatch):
    """Also in a batch of texts on both sides, from prompts in chunks; Phi-3 reads its text again at the switch."""
    model = with_longrope(family)
    runner = TransformersRunner(model)
    assert (runner._switch, runner._reads_again) == (SWITCH, reads_again)
    monkeypatch.setattr("pyspec.runners.foreign.PREFILL_CHUNK", 7)
    text = [5, 9, 17, 3, 44, 8, 90, 21, 60, 2] * 3
    for prompts in ([text[:11]], [text[:SWITCH]], [text[: SWITCH + 1]], [text[:8], text[:25], [50], text[:SWITCH]]):
        expected = [greedy(model, prompt) for prompt in prompts]
        assert speculate(runner, prompts, expected) == expected


@pytest.mark.parametrize("family", ["Llama", "Phi3"])
def test_a_rejected_branch_behind_the_switch_leaves_no_trace(family):
    runner = TransformersRunner(with_longrope(family))
    text = [5, 9, 17, 3, 44, 8, 90, 21, 60, 2] * 3
    across = DraftTree.chain(text[SWITCH - 2 : SWITCH + 3])

    def committed(tree, path):
        runner.prefill([text[: SWITCH - 2]], capacity=64)
        first, again = (runner.verify({0: tree})[0].logits for _ in range(2))
        torch.testing.assert_close(first, again, atol=1e-4, rtol=1e-4)
        runner.commit({0: path})
        assert runner.lengths() == [SWITCH - 2 + len(path)]
        return first, runner.verify({0: DraftTree.chain(text[SWITCH - 2 + len(path) :][:1])})[0].logits[0]

    for kept in (1, 2, 3, 5):  # 20 tokens are on the near side, so the third of the tree is the first on the other
        logits, found = committed(across, list(range(kept)))
        short, expected = committed(across.first(kept), list(range(kept)))
        torch.testing.assert_close(logits[:kept], short, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length, broken_call", [(SWITCH - 1, 3), (SWITCH, 2)])
def test_a_text_is_whole_after_an_interruption_at_the_switch(length, broken_call, monkeypatch):
    runner = TransformersRunner(with_longrope("Phi3"))
    monkeypatch.setattr("pyspec.runners.foreign.PREFILL_CHUNK", 7)
    text = [5, 9, 17, 3, 44, 8, 90, 21, 60, 2] * 3
    tree = DraftTree.chain(text[length : length + 3])
    runner.prefill([text[:length]], capacity=64)
    expected = runner.verify({0: tree})[0].logits
    runner.prefill([text[:length]], capacity=64)
    if length < SWITCH:
        runner.verify({0: tree.first(1)})
    forward, calls = runner.model.forward, []

    def interrupted(*args, **inputs):
        calls.append(1)
        if len(calls) == broken_call:
            raise KeyboardInterrupt
        return forward(*args, **inputs)

    with monkeypatch.context() as patch:
        patch.setattr(runner.model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runner.verify({0: tree})
    assert runner.lengths() == [length]
    with pytest.raises(RuntimeError, match="call verify first"):
        runner.commit({0: [0]})
    torch.testing.assert_close(runner.verify({0: tree})[0].logits, expected, atol=1e-4, rtol=1e-4)


def test_dynamic_frequencies_are_read_to_where_they_begin_or_refused():
    options = _SHAPE | {"intermediate_size": 64, "num_key_value_heads": 1, "max_position_embeddings": 40}
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = tiny_model("Llama", options | {"rope_parameters": rope})
    runner = TransformersRunner(model)
    assert runner.context_length == 40
    prompt = list(range(1, 23))
    greedy(model, prompt * 3)  # leaves frequencies of a longer text in the model
    expected = [greedy(model, prompt)]
    greedy(model, prompt * 3)
    assert speculate(runner, [prompt], expected) == expected
    # a context that goes on behind the first change
    rotation = model.model.rotary_emb
    rotation.config = type(model.config)(**options | {"rope_parameters": rope})
    model.config.max_position_embeddings = 96
    with pytest.raises(ValueError, match="LlamaForCausalLM is not supported: its rotary frequencies are others for"):
        TransformersRunner(model)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    runner = TransformersRunner(tiny_model("GPT2", SUPPORTED["GPT2"]))
    with pytest.raises(RuntimeError, match="call prefill first"):
        runner.verify({0: DraftTree.chain([1])})
    runner.prefill([[1, 2, 3]], capacity=8)
    for prompts, options, message in (
        ([[]], {}, "is empty"),
        ([[1] * 97], {}, "97 tokens, the model's context is 96"),
        ([[VOCABULARY]], {}, "must hold token ids"),
        ([[1, 2]], {"capacity": 1}, "capacity must be at least"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.prefill(prompts, **options)
    with pytest.raises(ValueError, match="capacity is 8"):
        runner.verify({0: DraftTree.chain([1] * 6)})
    runner.verify({0: DraftTree.chain([1, 2])})
    with pytest.raises(ValueError, match=r"paths\[0\] must"):
        runner.commit({0: [1]})
    assert runner.lengths() == [3]
    runner.prefill([[1] * 95])
    with pytest.raises(ValueError, match="reaches position 96, the model's context is 96"):
        runner.verify({0: DraftTree.chain([1, 2])})
    assert runner.verify({0: DraftTree.chain([1])})[0].logits.shape == (1, VOCABULARY)


def test_folders_of_other_architectures_run_through_transformers(tmp_path):
    model = tiny_model("GPT2", SUPPORTED["GPT2"])
    model.save_pretrained(tmp_path)
    runner = load(str(tmp_path), dtype=torch.float32, device="cpu")
    assert isinstance(runner, TransformersRunner) and runner.dtype == torch.float32
    expected = [greedy(model, [5, 6, 7])]
    assert speculate(runner, [[5, 6, 7]], expected) == expected

    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({name: values for name, values in tensors.items() if "h.1.mlp.c_fc.weight" not in name}, file)
    with pytest.raises(ValueError, match=r"has no tensor transformer\.h\.1\.mlp\.c_fc\.weight"):
        load(str(tmp_path), device="cpu")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        load(str(tmp_path), device="cpu")


def test_llamas_that_the_native_runner_lacks_run_through_transformers(tmp_path):
    options = _SHAPE | {"intermediate_size": 64, "max_position_embeddings": 96}  # heads of 16
    model = tiny_model("Llama", options)
    model.save_pretrained(tmp_path)
    runner = load(str(tmp_path), dtype=torch.float32, device="cpu")
    assert isinstance(runner, TransformersRunner)
    expected = [greedy(model, [5, 6, 7])]
    assert speculate(runner, [[5, 6, 7]], expected) == expected
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
