"""GearCache in transformers: what its layers hold and return, cropping, batches, and generation with drafts."""

import copy
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

import pyspec  # noqa: E402
from pyspec.caches import cache_from_name  # noqa: E402
from pyspec.integrations.transformers import GearCache, GearLayer, register_attention  # noqa: E402
from pyspec.integrations.transformers import cache as cache_module  # noqa: E402
from pyspec.ops import gear_decode, gear_encode  # noqa: E402
from pyspec.ops.gear_format import BLOCK  # noqa: E402
from pyspec.runners.foreign_support import cache_argument  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error::FutureWarning", "error::DeprecationWarning:transformers")
CACHE = cache_argument(transformers.LlamaForCausalLM)  # its name depends on the version

HEADS, HEAD_DIM, VOCABULARY = 2, 64, 101
GEAR = cache_from_name("gear-2bit")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def states(tokens, batch=1, seed=0):
    return torch.randn(2, batch, HEADS, tokens, HEAD_DIM, generator=torch.Generator().manual_seed(seed)).unbind(0)


def feed(layer, k, v, chunks):
    done, found = layer.get_seq_length(), None
    for count in chunks:
        found = layer.update(k[:, :, done : done + count], v[:, :, done : done + count])
        done += count
    return found


def test_blocks_are_quantised_when_the_window_is_past_them():
    k, v = states(400, batch=2)
    layer = GearLayer(GEAR, 0)
    for chunks, blocks in (([191], 0), ([1], 0), ([1], 1), ([126], 1), ([1], 1), ([1], 2)):
        found = feed(layer, k, v, chunks)
        held = layer.get_seq_length()
        assert layer.quantised.shape[2] == blocks and layer.get_mask_sizes(3) == (held + 3, 0)
        quantised = gear_encode(k[:, :, : blocks * BLOCK], v[:, :, : blocks * BLOCK], GEAR)
        assert torch.equal(layer.quantised, quantised)
        for all_states, exact, kept, decoded in zip(
            found, (k, v), (layer.keys, layer.values), gear_decode(quantised, GEAR, HEAD_DIM), strict=True
        ):
            assert torch.equal(kept, exact[:, :, blocks * BLOCK : held])
            assert torch.equal(all_states, torch.cat((decoded, kept), 2))
    once = GearLayer(GEAR, 0)
    feed(once, k, v, [held - 1, 1])
    assert torch.equal(once.quantised, layer.quantised) and torch.equal(once.keys, layer.keys)


def test_a_cropped_draft_leaves_no_trace():
    """Peers crop only what is not quantised yet, by the length of everything."""
    k, v = states(300)
    for length in (100, 130, 191, 192, 260):
        for drafted, kept in ((1, 0), (60, 0), (60, 33), (64, 63)):
            if length + kept + 2 > 300:
                continue
            touched, clean = GearLayer(GEAR, 0), GearLayer(GEAR, 0)
            for layer in (touched, clean):
                feed(layer, k, v, [length - 1, 1])
            draft = [x.clone() for x in states(drafted, seed=9)]
            for part, right in zip(draft, (k, v), strict=True):
                part[:, :, :kept] = right[:, :, length : length + kept]
            touched.update(*draft)
            touched.crop(kept - drafted if length % 2 else length + kept)
            assert touched.get_seq_length() == length + kept
            feed(clean, k, v, [1] * kept)
            for layer in (touched, clean):
                feed(layer, k, v, [1])
            for name in ("quantised", "keys", "values"):
                assert torch.equal(getattr(touched, name), getattr(clean, name))


def test_what_is_quantised_is_not_cropped():
    k, v = states(300)
    layer = GearLayer(GEAR, 3)
    layer.crop(-1)
    feed(layer, k, v, [299, 1])
    layer.crop(0)
    layer.crop(301)
    assert layer.get_seq_length() == 300
    for length in (127, -173):
        with pytest.raises(ValueError, match="cannot be cropped to 127 tokens: 128 are quantised in layer 3"):
            layer.crop(length)
    layer.crop(128)
    assert layer.get_seq_length() == 128 and layer.keys.shape[2] == 0


def test_batches_are_reordered_repeated_and_selected():
    k, v = states(300, batch=3)
    layer = GearLayer(GEAR, 0)
    feed(layer, k, v, [299, 1])
    for change, rows in (
        (lambda layer: layer.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
    ):
        changed = copy.deepcopy(layer)
        change(changed)
        for name in ("quantised", "keys", "values"):
            assert torch.equal(getattr(changed, name), getattr(layer, name)[rows])
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.nbytes == 0
    feed(layer, k[:1], v[:1], [5])
    assert layer.get_seq_length() == 5


def greedy(model, prompt, cache, **options):
    options = {"max_new_tokens": 150, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **{CACHE: cache}, **options)


def test_short_texts_are_those_of_the_dense_cache(model):
    prompt = torch.randint(1, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))
    cache = GearCache("gear-2bit")
    found = greedy(model, prompt, cache)
    assert torch.equal(found, greedy(model, prompt, None)) and cache.get_seq_length() == 169
    cache = GearCache("int8")  # and beyond, as attention to what the cache returns
    long = greedy(model, prompt[:1], cache, max_new_tokens=250)
    assert long.shape[1] == 270 and cache.layers[0].quantised.shape[2] == 1
    dense = transformers.DynamicCache()
    greedy(model, prompt[:1], dense, max_new_tokens=250)
    assert cache.nbytes < 0.8 * sum(x.nbytes for layer in dense.layers for x in (layer.keys, layer.values))


def say(model, prompt, cache, new, drafts=None):
    """Greedy tokens behind a prompt that is read first; drafts(said) are tokens that are tried, and cropped."""
    model(prompt[:, :-1], **{CACHE: cache})
    said = [int(prompt[0, -1])]
    while len(said) <= new:
        tried = [said[-1], *(drafts(said) if drafts else [])]
        best = model(torch.tensor([tried]), **{CACHE: cache}).logits[0].argmax(-1).tolist()
        kept = 1
        while kept < len(tried) and tried[kept] == best[kept - 1]:
            kept += 1
        cache.crop(kept - len(tried))
        said += best[:kept]
    return said[1 : new + 1]


@torch.no_grad()
@pytest.mark.parametrize("name", ["gear-4bit", "gear-2bit"])
def test_drafts_change_no_token_between_the_turns(model, name):
    prompt = torch.randint(1, VOCABULARY, (1, 199), generator=torch.Generator().manual_seed(2))
    caches = [GearCache(name), GearCache(name)]
    plain = say(model, prompt, caches[0], 100)

    def half_right(said):
        right = plain[len(said) - 1 : len(said) + 3]
        return right[: len(said) % 4] + [1, 2, 3]

    assert say(model, prompt, caches[1], 100, half_right) == plain and len(set(plain)) > 5
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        assert layers[0].quantised.shape[2] == 1
        assert torch.equal(layers[0].quantised, layers[1].quantised)  # of the prompt


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 7}, {"assistant_model": True}], ids=str)
def test_assisted_generation_says_the_same(model, options):
    """Across the places where blocks turn too: the rounding of int8 is too fine to show."""
    prompt = torch.randint(1, VOCABULARY, (1, 37), generator=torch.Generator().manual_seed(2)).repeat(1, 5)
    caches = [GearCache("int8"), GearCache("int8")]
    plain = greedy(model, prompt, caches[0])
    if "assistant_model" in options:
        options = {"assistant_model": copy.deepcopy(model)}
        for parameter in options["assistant_model"].parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    assert torch.equal(greedy(model, prompt, caches[1], **options), plain)
    assert {cache.layers[1].quantised.shape[2] for cache in caches} == {2}


@torch.no_grad()
def test_beams_and_copies(model):
    prompt = torch.randint(1, VOCABULARY, (1, 200))
    found = greedy(model, prompt, GearCache("gear-2bit"), num_beams=3, max_new_tokens=30)
    assert found.shape == (1, 230)
    cache = GearCache("gear-2bit")
    model(prompt, **{CACHE: cache})
    model(prompt[:, :1], **{CACHE: cache})
    again = copy.deepcopy(cache)
    token = torch.tensor([[7]])
    torch.testing.assert_close(
        model(token, **{CACHE: cache}).logits, model(token, **{CACHE: again}).logits, atol=0, rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["int8", "gear-2bit"])
def test_attention_pyspec_reads_records_as_they_lie(model, monkeypatch, name):
    register_attention()
    own = copy.deepcopy(model)
    own.set_attn_implementation("pyspec")
    prompt = torch.randint(1, VOCABULARY, (2, 380), generator=torch.Generator().manual_seed(4))
    cache = GearCache(name)
    model(prompt[:, :330], **{CACHE: cache})
    caches = [copy.deepcopy(cache) for _ in range(3)]
    texts = prompt[:, 330:335], prompt[:, 335:336], prompt[:, 336:360]  # the last is too long to be read so
    expected = [model(text, **{CACHE: caches[0]}).logits for text in texts]
    decoding = []
    decode = cache_module.gear_decode
    monkeypatch.setattr(cache_module, "gear_decode", lambda *args: decoding.append(1) or decode(*args))
    for text, logits, times in zip(texts, expected, (0, 0, 2), strict=True):
        found = own(text, **{CACHE: caches[1]}).logits
        torch.testing.assert_close(found, logits, atol=2e-4, rtol=2e-4)
        assert len(decoding) == times  # of both layers
    padded = torch.ones(2, 335, dtype=torch.long)
    padded[0, :9] = 0
    found = own(texts[0], **{CACHE: caches[2]}, attention_mask=padded).logits
    torch.testing.assert_close(found[1], expected[0][1], atol=2e-4, rtol=2e-4)
    assert len(decoding) == 4 and caches[1].layers[0].quantised.shape[2] == 2


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="cache must name or be a pyspec.GearSettings, got 'dense'"):
        GearCache("dense")
    with pytest.raises(ValueError, match="cache must be one of"):
        GearCache("gear")
    with pytest.raises(ValueError, match="keep must be 1 with transformers.* got 0.5"):
        GearCache(pyspec.GearSettings(keep=0.5))
    with pytest.raises(ValueError, match="key_channels must be 0 with transformers"):
        GearCache(pyspec.GearSettings(key_channels=32))
    cache = GearCache(pyspec.GearSettings(4, 64))
    with pytest.raises(ValueError, match="head_dim must be one of"):
        cache.update(torch.zeros(1, 1, 3, 48), torch.zeros(1, 1, 3, 48), 0)
    with pytest.raises(ValueError, match="layer 1 must have one head_dim to be quantised, got 64 and 128"):
        cache.update(torch.zeros(1, 1, 3, 64), torch.zeros(1, 1, 3, 128), 1)
    k, v = states(250)
    v[0, 1, 33, 5] = torch.nan
    layer = GearLayer(GEAR, 4)
    layer.update(k, v)
    with pytest.raises(ValueError, match="values must be .* nan in layer 4, head 1, position 33, channel 5 of seq"):
        layer.update(k[:, :, :1], v[:, :, :1])


def test_it_is_imported_only_when_asked_for():
    code = "import pyspec, sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
