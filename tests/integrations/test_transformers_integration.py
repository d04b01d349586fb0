import inspect
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

from pyspec.integrations import require  # noqa: E402
from pyspec.integrations.transformers import fix_mamba_steps, generate  # noqa: E402
from pyspec.runners.foreign_support import cache_argument  # noqa: E402
from tests.helpers.small_transformers import CACHE, OPTIONS, PROMPT, VOCABULARY, tiny  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error::FutureWarning", "error::DeprecationWarning:transformers")
PADDED = torch.tensor([[0, 0, 0, 5, 6, 7], [1, 2, 3, 4, 5, 6]])
PADDING = (torch.arange(6) >= torch.tensor([[3], [0]])).long()


@pytest.fixture(scope="module")
def llama():
    return tiny()


def both(model, ids, **options):
    """What transformers says, and what we say, for one call."""
    options = OPTIONS | options
    torch.manual_seed(1)
    expected = model.generate(ids, **options)
    torch.manual_seed(1)
    return expected, model.generate(ids, custom_generate=generate, drafter="merged", budget=8, **options)


# ==== generate ====


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Mamba", "Mamba2", "Qwen3"])
def test_greedy_text_is_that_of_transformers(family):
    model = tiny(family)
    expected, found = both(model, torch.tensor(PROMPT))
    assert torch.equal(found, expected)
    if family != "Mamba2":  # transformers' own lets padding into its state
        expected, found = both(model, PADDED, attention_mask=PADDING)
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 12, "eos_token_id": [73, 30]},
        {"eos_token_id": list(range(0, 101, 3))},
        {"forced_eos_token_id": 9, "eos_token_id": 9},
        {"suppress_tokens": list(range(0, 101, 2))},
        {"sequence_bias": [[[73], -2.0], [[30, 30], -3.0]]},
        {"bad_words_ids": [[word] for word in range(0, 101, 2)]},
        {"exponential_decay_length_penalty": (4, 2.0), "eos_token_id": 60},
        {"prefix_allowed_tokens_fn": lambda row, ids: [int(ids[-1] * 7 + n) % VOCABULARY for n in range(9)]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_processors_are_honoured(llama, options):
    expected, found = both(llama, torch.tensor(PROMPT), **options)
    assert torch.equal(found, expected)
    plain, _ = both(llama, torch.tensor(PROMPT))
    assert not torch.equal(plain, expected), "the option must matter"


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen3"])
def test_native_runs_in_our_kernels_and_says_the_same(family, monkeypatch):
    model = tiny(family)
    for ids, options in ((torch.tensor(PROMPT), {}), (PADDED, {"attention_mask": PADDING, "repetition_penalty": 1.3})):
        expected, found = both(model, ids, **options)
        with monkeypatch.context() as patch:
            patch.setattr(model.model, "forward", None)  # it is not needed
            native = model.generate(ids, custom_generate=generate, native=True, **OPTIONS | options)
        assert torch.equal(native, expected) and torch.equal(found, expected)


def test_native_is_refused_where_there_are_no_kernels():
    model = tiny("Phi")
    with pytest.raises(ValueError, match="native must be False: pyspec has no kernels for PhiForCausalLM"):
        model.generate(torch.tensor(PROMPT), custom_generate=generate, native=True, **OPTIONS)
    both(model, torch.tensor(PROMPT))


def test_sampling_follows_the_processed_law(llama):
    """Over many draws of one token the shares are those of the warped law, for every warper at once."""
    options = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "max_new_tokens": 2}
    copies = 600
    ids = torch.tensor(PROMPT)
    torch.manual_seed(3)
    found = llama.generate(ids, custom_generate=generate, budget=4, num_return_sequences=copies, **OPTIONS | options)[
        :, ids.shape[1]
    ]
    once = llama.generate(
        ids, output_scores=True, return_dict_in_generate=True, **OPTIONS | options | {"max_new_tokens": 1}
    )
    law = once.scores[0][0].softmax(-1)
    shares = torch.bincount(found, minlength=VOCABULARY) / copies
    assert (law > 0.02).sum() > 2, "a law of one token would show nothing"
    assert (shares[law == 0] == 0).all()
    assert (shares - law).abs().max() < 4 * (0.25 / copies) ** 0.5


def test_a_seed_repeats_and_drafts_do_not_matter(llama):
    def sample(**options):
        torch.manual_seed(5)
        call = OPTIONS | {"do_sample": True, "custom_generate": generate} | options
        return llama.generate(torch.tensor(PROMPT), **call)

    first = sample(budget=8)
    assert torch.equal(first, sample(budget=8))
    assert torch.equal(first, sample(drafter=None))
    torch.manual_seed(6)
    assert not torch.equal(first, llama.generate(
        torch.tensor(PROMPT), custom_generate=generate, **OPTIONS | {"do_sample": True}
    ))  # fmt: skip


def test_stopping_criteria_see_every_token(llama):
    plain = llama.generate(torch.tensor(PROMPT), **OPTIONS)[0].tolist()
    lengths = []

    class After(transformers.StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            lengths.append(ids.shape[1])
            return torch.tensor([ids[0].tolist() == plain[:15]])

    _, found = both(llama, torch.tensor(PROMPT), stopping_criteria=transformers.StoppingCriteriaList([After()]))
    assert found[0].tolist() == plain[:15]
    half = len(lengths) // 2
    assert lengths[half:] == list(range(9, 16)), "each token once, in order"


def test_rows_end_alone_and_are_padded(llama):
    ends = llama.generate(PADDED, attention_mask=PADDING, **OPTIONS)[0, 8].item()
    expected, found = both(llama, PADDED, attention_mask=PADDING, eos_token_id=ends, pad_token_id=99)
    assert torch.equal(found, expected)


def test_scores_and_logits_of_each_token(llama):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    expected, found = both(llama, PADDED, attention_mask=PADDING, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        ours, theirs = torch.stack(found[name]), torch.stack(expected[name])
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_stream_gets_prompt_tokens_and_end(llama):
    class Streamer:
        seen, ended = [], False

        def put(self, tokens):
            self.seen += tokens.flatten().tolist()

        def end(self):
            self.ended = True

    streamer, pieces = Streamer(), []
    text = llama.generate(torch.tensor(PROMPT), custom_generate=generate, stream=streamer, **OPTIONS)
    assert streamer.seen == text[0].tolist() and streamer.ended
    llama.generate(torch.tensor(PROMPT), custom_generate=generate, stream=lambda t: pieces.append(int(t)), **OPTIONS)
    assert pieces == text[0, len(PROMPT[0]) :].tolist()


def test_logits_that_are_no_law_end_a_text_and_keep_it(llama):
    class Poison(transformers.LogitsProcessor):
        def __call__(self, ids, scores):
            return scores * float("nan") if ids.shape[1] >= 12 else scores

    plain = llama.generate(torch.tensor(PROMPT), **OPTIONS)
    with pytest.warns(UserWarning, match="ends early.*NaN"):
        found = llama.generate(
            torch.tensor(PROMPT),
            custom_generate=generate,
            logits_processor=transformers.LogitsProcessorList([Poison()]),
            **OPTIONS,
        )
    assert torch.equal(found, plain[:, :12])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 2}, "num_beams must be 1"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens must be None"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions must be False"),
        ({"use_cache": False}, "use_cache must be True"),
        ({"guidance_scale": 1.5}, "keeps state"),
        ({"budget": 0}, "budget must be in"),
        ({"drafter": "nobody"}, "drafter must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_honoured_is_refused(llama, options, message):
    with pytest.raises(ValueError, match=message):
        llama.generate(torch.tensor(PROMPT), custom_generate=generate, **OPTIONS | options)


def caches(model):
    """Caches that are the caller's: new, used, of a class of his own."""
    own_class = type("OwnCache", (transformers.DynamicCache,), {})
    used = model(torch.tensor(PROMPT), use_cache=True)[CACHE]
    return transformers.DynamicCache(), transformers.DynamicCache(config=model.config), used, own_class()


@pytest.mark.parametrize("which", range(4))
def test_a_cache_of_the_callers_is_refused(llama, which):
    cache = caches(llama)[which]
    with pytest.raises(ValueError, match=f"past_key_values must not be given, got {CACHE}={type(cache).__name__}"):
        llama.generate(torch.tensor(PROMPT), custom_generate=generate, **{CACHE: cache}, **OPTIONS)


def prepared(model, ids, **options):
    """What transformers gives a custom_generate for a call."""
    kept = []
    model.generate(ids, custom_generate=lambda *args, **inputs: kept.append((args[1:], inputs)) or ids, **options)
    return kept[0]


def test_what_transformers_prepares_is_taken_whatever_it_is_named(llama, monkeypatch):
    """A later version, with other names for the same: a cache, an empty container, a flag and a table of positions."""
    plain = llama.generate(torch.tensor(PROMPT), **OPTIONS)
    theirs = llama.generate

    def later(ids, custom_generate, **options):
        def renamed(*args, **inputs):
            cache = inputs.pop(CACHE)
            more = {"kv": cache, "encoded": {}, "places": torch.arange(ids.shape[1]), "fast_path": True, "notes": None}
            return custom_generate(*args, **inputs, **more)

        return theirs(ids, custom_generate=renamed, **options)

    monkeypatch.setattr(llama, "generate", later)
    assert torch.equal(llama.generate(torch.tensor(PROMPT), custom_generate=generate, **OPTIONS), plain)


@pytest.mark.parametrize(
    "name, value",
    [
        ("pixel_values", torch.zeros(1, 3, 2, 2)),
        ("encoder_outputs", {"last_hidden_state": torch.zeros(1, 2, 8)}),
        ("mm_encoder_outputs", {"image": torch.zeros(1, 2, 8)}),
        ("token_type_ids", torch.ones(1, 8, dtype=torch.long)),
        ("position_ids", torch.arange(1, 9)[None]),
        ("logits_to_keep", 3),
        ("use_cache", 1.0),
        ("anything", True),
        ("anything", "words"),
        ("state", [torch.zeros(2)]),
    ],
)
def test_inputs_of_the_callers_are_refused_by_name(llama, name, value):
    ids = torch.tensor(PROMPT)
    args, inputs = prepared(llama, ids, **OPTIONS)
    with pytest.raises(ValueError, match=f"^{name} is not taken by pyspec's generate"):
        generate(llama, *args, **inputs | {name: value})


def test_inputs_that_say_nothing_are_taken(llama):
    ids = torch.tensor(PROMPT)
    args, inputs = prepared(llama, ids, **OPTIONS)
    nothing = {"images": None, "mm_encoder_outputs": {}, "more": [{}, (), None], "output_router_logits": False}
    assert torch.equal(generate(llama, *args, **inputs | nothing), llama.generate(ids, **OPTIONS))


def test_token_type_ids_are_taken_where_they_mean_nothing(monkeypatch):
    ids = torch.tensor(PROMPT)
    shape = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    types = torch.zeros_like(ids)
    with pytest.raises(ValueError, match="^token_type_ids is not taken"):  # GPT-2 adds the embedding of token 0
        model.generate(ids, token_type_ids=types, custom_generate=generate, **OPTIONS)
    forward = model.forward

    def without_types(input_ids=None, token_type_ids=None, **inputs):
        return forward(input_ids=input_ids, **inputs)

    monkeypatch.setattr(model, "forward", without_types)
    without_types.__signature__ = inspect.signature(forward)
    expected = model.generate(ids, **OPTIONS)
    found = model.generate(ids, token_type_ids=types, custom_generate=generate, **OPTIONS)
    assert torch.equal(found, expected)


def test_models_of_text_and_images_read_text():
    text = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"deepstack_visual_indexes": [0], "patch_size": 4, "num_position_embeddings": 16}
    marks = {"image_token_id": 190, "video_token_id": 191, "vision_start_token_id": 192, "vision_end_token_id": 193}
    torch.manual_seed(0)
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **marks)
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    for options in ({}, {"mm_token_type_ids": torch.zeros(1, 8, dtype=torch.long)}):  # as its processor gives them
        expected, found = both(model, torch.tensor(PROMPT), **options)
        assert torch.equal(found, expected)
    expected, found = both(model, PADDED, attention_mask=PADDING)
    assert torch.equal(found, expected)
    image = torch.tensor([[5, 192, 190, 193, 6]])
    pixels = {"pixel_values": torch.randn(4, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    with pytest.raises(ValueError, match=r"^(pixel_values|image_grid_thw|mm_\w+) is not taken by pyspec's generate"):
        model.generate(image, mm_token_type_ids=(image == 190).long(), custom_generate=generate, **pixels, **OPTIONS)


def test_embeddings_and_encoders_are_refused_by_name(llama):
    embedded = llama.get_input_embeddings()(torch.tensor(PROMPT)).detach()
    with pytest.raises(ValueError, match="inputs_embeds is not taken"):
        llama.generate(inputs_embeds=embedded, custom_generate=generate, **OPTIONS)
    shape = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**shape, decoder_start_token_id=0)).eval()
    with pytest.raises(ValueError, match="encoder_outputs is not taken"):
        t5.generate(torch.tensor(PROMPT), custom_generate=generate, **OPTIONS)


def test_padding_on_the_right_is_refused(llama):
    with pytest.raises(ValueError, match="padding on the left"):
        llama.generate(PADDED.flip(1), attention_mask=PADDING.flip(1), custom_generate=generate, **OPTIONS)


def test_processors_know_their_row_of_a_batch(llama):
    allowed = {0: [3, 4, 5], 1: [50, 60, 70]}
    options = {"attention_mask": PADDING, "prefix_allowed_tokens_fn": lambda row, ids: allowed[row]}
    expected, found = both(llama, PADDED, **options)
    assert torch.equal(found, expected)
    assert all(set(found[row, 6:].tolist()) <= set(allowed[row]) for row in allowed)


# ==== Mamba-1 ====


def test_mamba_reads_several_tokens_after_a_cache():
    ids = torch.randint(1, VOCABULARY, (2, 40))
    model, untouched = tiny("Mamba"), tiny("Mamba")
    expected = model(ids).logits[:, 25:]

    def in_two(model):
        name = cache_argument(type(model))
        cache = {name: model(ids[:, :25], use_cache=True)[name]}
        return model(ids[:, 25:], use_cache=True, **cache).logits

    assert (in_two(model) - expected).abs().max() > 1e-2, "transformers has been mended: this can go"
    assert fix_mamba_steps(model) is model and fix_mamba_steps(model) is model
    torch.testing.assert_close(in_two(model), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(ids).logits[:, 25:], expected)
    assert (in_two(untouched) - expected).abs().max() > 1e-2, "only the instance is changed"
    with pytest.raises(TypeError, match="Mamba-1 layers"):
        fix_mamba_steps(tiny())


# ==== versions ====


def test_versions_outside_the_range_are_refused():
    with pytest.raises(ImportError, match=r"transformers must be in \[90, 91\), got .*pip install"):
        require("transformers", "90", "91")
    with pytest.raises(ImportError, match="this needs no-such-engine"):
        require("no-such-engine", "1", "2")


def test_nothing_is_registered_by_importing():
    import subprocess

    code = (
        "import pyspec.integrations.transformers, transformers;"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS;"
        "print('pyspec' in ALL_ATTENTION_FUNCTIONS.valid_keys())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
