"""Prompts read by flash-attn: on the CPU by a fake of it, on a GPU by the package where it is installed."""

import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import pyspec
import pyspec.runners.attention
from pyspec.cli import main
from pyspec.runners import flash_attn
from tests.helpers import fake_flash_attn
from tests.helpers.fake_recorder import FakeRecorder, with_graphs
from tests.helpers.random_llama import random_llama, random_tokens, random_tree
from tests.helpers.tiny_mambas import tiny_mamba
from tests.helpers.tiny_models import tiny_model, write_gguf

LONG = random_tokens(150, 50)


@pytest.fixture
def fake(monkeypatch):
    """A fake of the package takes its place, on the CPU."""
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn)
    monkeypatch.setattr(flash_attn, "DEVICE", "cpu")


@pytest.fixture(params=["fake", "package"])
def device(request):
    """Where flash-attn runs."""
    if request.param == "fake":
        request.getfixturevalue("fake")
        return "cpu"
    if reason := flash_attn.why_not(torch.bfloat16, torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        pytest.skip(reason)
    return "cuda"


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(pyspec.runners.attention, "FLASH_CHUNK", 50)


def flash_llama(device, dtype=torch.bfloat16, **options):
    return random_llama(device, dtype, prompt_attention="flash-attn", **options)


def read(runner, prompts):
    """For each prompt: logits after it, its keys and values, and what an observer saw."""
    seen = [[] for _ in prompts]
    last = runner.prefill(prompts, capacity=200, observe=lambda b, chain, rows: seen[b].append(rows.logits))
    caches = [runner._cache.keys_values[:, :, b, :, : len(prompt)].clone() for b, prompt in enumerate(prompts)]
    return list(zip(last, caches, map(torch.cat, seen), strict=True))


# ==== the calls ====


@pytest.mark.parametrize("causal, window", [(True, None), (False, None), (True, 1), (True, 20), (True, 500)])
def test_attention_is_that_of_the_last_rows(device, causal, window):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, rows, 64, generator=generator).to(device, torch.bfloat16)
        for heads, rows in ((4, 30), (2, 70), (2, 70))
    )
    back = torch.arange(40, 70, device=device)[:, None] - torch.arange(70, device=device)
    mask = (back >= 0) & (back < (window or 70)) if causal else back < 70
    expected = scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, enable_gqa=True)
    found = flash_attn.attention(q, k, v, causal=causal, window=window)
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)


def test_documents_see_themselves_alone(device):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 60, 64, generator=generator).to(device, torch.float16) for h in (4, 2, 2))
    found = flash_attn.documents(q, k, v, 15)().unflatten(0, (2, 60)).transpose(1, 2)
    parts = zip(*(tensor.float().split(15, 2) for tensor in (q, k, v)), strict=True)
    expected = torch.cat([scaled_dot_product_attention(*p, is_causal=True, enable_gqa=True) for p in parts], 2)
    torch.testing.assert_close(found.float(), expected, atol=1e-2, rtol=1e-2)


# ==== the runner ====


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.float16, "windows": (6, None)}, {"dtype": torch.int8, "biases": True}],
    ids=["bfloat16", "float16 with a window", "int8 with biases"],
)
def test_prompts_are_read_within_rounding(device, small_chunks, options):
    ours = random_llama(device, **{"dtype": torch.bfloat16} | options)
    ((*theirs, observed),) = read(flash_llama(device, **options), [LONG])
    assert torch.equal(theirs[0], observed[-1])
    for found, expected in zip((*theirs, observed), read(ours, [LONG])[0], strict=True):
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        assert 0 < error < 4e-2  # int8 activations may be rounded the other way


def test_prompts_are_read_in_large_chunks(fake, small_chunks, monkeypatch):
    runner, calls, attention = flash_llama("cpu"), [], flash_attn.attention

    def counted(q, k, v, **mask):
        calls.append((q.shape[2], k.shape[2]))
        return attention(q, k, v, **mask)

    monkeypatch.setattr(flash_attn, "attention", counted)
    runner.prefill([LONG[:120], LONG[:1]], capacity=200)
    assert calls == [size for size in ((50, 50), (50, 100), (20, 120), (1, 1)) for _ in runner.weights.layers]
    runner.verify({0: random_tree(5), 1: random_tree(3)})
    assert len(calls) == 8


@pytest.mark.parametrize("is_static", [False, True])
def test_every_prompt_has_the_bits_that_it_has_alone(device, small_chunks, is_static, monkeypatch):
    """Whatever it shares with others. A fork reads as its runner does."""
    runner = flash_llama(device)
    prompts = [LONG[:90], random_tokens(20), LONG, LONG[:60] + [1, 2]]
    alone = [read(runner.fork(), [prompt])[0] for prompt in prompts]
    if device == "cpu" and is_static:
        monkeypatch.setattr(pyspec.runners.native, "GraphRecorder", FakeRecorder)
        with_graphs(runner)
    for found, expected in zip(read(runner, prompts), alone, strict=True):
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "drawn"])
def test_speculation_says_what_plain_decoding_says(device, small_chunks, settings):
    runner = flash_llama(device)
    prompts = [LONG[:130] + LONG[:40], LONG[:60]]
    plain = pyspec.generate(runner, prompts, drafter=None, max_new_tokens=60, **settings)
    for drafter, budget in (("lookup", 8), ("merged", 24)):
        drafted = pyspec.generate(runner, prompts, drafter=drafter, budget=budget, max_new_tokens=60, **settings)
        assert drafted.tokens == plain.tokens
        assert drafted.stats.rounds < plain.stats.rounds


def test_quantised_caches_are_refused(fake):
    with pytest.raises(ValueError, match="cache must be dense with prompt_attention flash-attn, got a quantised one"):
        pyspec.generate(flash_llama("cpu"), LONG, cache="int8", max_new_tokens=3)


# ==== loading ====


@pytest.mark.parametrize("is_gguf", [False, True])
def test_a_loaded_model_reads_prompts_so(fake, is_gguf, tmp_path):
    source, model = tmp_path / "tiny.gguf", tiny_model("llama")
    if is_gguf:
        write_gguf(source, model)
    else:
        model.save_pretrained(source)
    prompt = LONG[:100]
    (found,), (expected,) = (
        pyspec.load(str(source), dtype=torch.bfloat16, device="cpu", prompt_attention=by).prefill([prompt])
        for by in ("flash-attn", "pyspec")
    )
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize(
    "prompt_attention, dtype, message",
    [
        ("sdpa", torch.bfloat16, "prompt_attention must be pyspec or flash-attn, got 'sdpa'"),
        (None, torch.bfloat16, "prompt_attention must be pyspec or flash-attn, got None"),
        ("flash-attn", torch.float32, "prompt_attention flash-attn needs activations in .*, got torch.float32"),
    ],
)
def test_what_cannot_be_is_said_before_a_file_is_looked_for(fake, prompt_attention, dtype, message):
    with pytest.raises(ValueError, match=message):
        pyspec.load("nowhere.gguf", dtype=dtype, device="cpu", prompt_attention=prompt_attention)
    with pytest.raises(ValueError, match=message):
        random_llama(dtype=dtype, prompt_attention=prompt_attention)


def test_a_device_or_a_package_that_is_not_there(monkeypatch):
    def load():
        pyspec.load("nowhere.gguf", dtype=torch.bfloat16, device="cpu", prompt_attention="flash-attn")

    with pytest.raises(ValueError, match="prompt_attention flash-attn needs a GPU, got device cpu"):
        load()
    monkeypatch.setattr(flash_attn, "DEVICE", "cpu")
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # as if it were not installed
    with pytest.raises(ValueError, match="flash-attn needs the package flash-attn .*'pyspec-kernels.flash.'.*: "):
        load()


def test_other_families_are_refused_before_weights_are_read(fake, tmp_path, monkeypatch):
    tiny_mamba("mamba").save_pretrained(tmp_path / "mamba")
    wide = tiny_model("llama")
    wide.config.head_dim = 320
    wide.config.save_pretrained(tmp_path / "wide")
    (tmp_path / "mamba" / "model.safetensors").unlink()
    for folder, reason in (("mamba", "got mamba"), ("wide", "head_dim 320 .*")):
        with pytest.raises(
            ValueError, match=f"prompt_attention flash-attn needs a model of the .*Llama or .* family.*{reason}"
        ):
            pyspec.load(str(tmp_path / folder), dtype=torch.bfloat16, device="cpu", prompt_attention="flash-attn")


# ==== the command line ====


def test_the_command_line_takes_it_and_info_says_what_it_gives_up(fake, monkeypatch, capsys, tmp_path):
    ours = pyspec.load("demo", dtype=torch.bfloat16, device="cpu")
    asked = []
    monkeypatch.setattr(pyspec, "load", lambda source, **options: asked.append(options["prompt_attention"]) or ours)
    options = ["generate", "hi", "--max-new-tokens", "2", "--drafter", "none"]
    assert main(options) == main([*options, "--prompt-attention", "flash-attn"]) == 0
    assert asked == ["pyspec", "flash-attn"]
    assert main([*options, "--prompt-attention", "flash-attn", "--cache", "int8"]) == 2
    assert "--cache must be dense with --prompt-attention flash-attn, got int8" in capsys.readouterr().err
    monkeypatch.setattr("pyspec.cli.info._rates", dict)
    monkeypatch.setattr("pyspec.cli.info._costs", lambda arguments: {})
    monkeypatch.setattr("pyspec.cli.info._show_measured", lambda *found: None)
    assert main(["info"]) == 0
    assert "a text has one cache as a prompt, another as an answer\n" in capsys.readouterr().out
