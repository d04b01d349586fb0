"""What a model needs of memory is said before it is taken, and one that cannot fit is refused."""

import pytest
import torch

from pyspec.checkpoints import load, memory
from pyspec.cli import main
from tests.helpers.tiny_models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocab_size=4000).save_pretrained(folder)
    return folder


def needed(folder, dtype, monkeypatch, available=10**12):
    monkeypatch.setattr(memory, "available_memory", lambda device: available)
    found = []
    runner = load(folder, dtype=dtype, device="cpu", announce=found.append)
    (need,) = found
    return need, runner


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, "int4", None])
def test_what_is_announced_is_what_the_weights_take(folder, dtype, monkeypatch):
    need, runner = needed(folder, dtype, monkeypatch)
    weights = runner.weights
    laid_out = [getattr(owner, name) for owner, name in weights.in_order()]
    vectors = [norm for layer in weights.layers for norm in layer.norms.values()]
    taken = sum(part.nbytes for part in (*laid_out, weights.embedding, weights.norm, *vectors))
    assert need.weights == taken
    assert need.kept == {None: "bfloat16", "int4": "int4_32"}.get(dtype, str(dtype).removeprefix("torch."))
    element = 4 if dtype == torch.float32 else 2
    assert need.cache >= 2 * 2 * 2 * 64 * need.tokens * element and need.total == need.weights + need.cache
    assert f"{need.weights / 1e9:.2f} GB for weights in {need.kept}" in str(need)


def test_a_model_that_does_not_fit_is_refused_with_what_would(folder, monkeypatch):
    totals = {dtype: needed(folder, dtype, monkeypatch)[0].total for dtype in (torch.float32, torch.int8, "int4")}
    assert totals["int4"] < totals[torch.int8] < totals[torch.float32]
    for available, proposal in (
        (totals[torch.int8], r": dtype int8 would take \S+ GB, int4 would take \S+ GB$"),
        (totals["int4"], r": dtype int4 would take \S+ GB$"),
        (totals["int4"] - 1, ", and no smaller dtype would fit$"),
    ):
        taken = []
        monkeypatch.setattr("pyspec.checkpoints.weights.HugePages", taken.append)
        with pytest.raises(MemoryError, match=rf"needs \S+ GB of memory .* GB are available\){proposal}"):
            needed(folder, torch.float32, monkeypatch, available)
        assert not taken


def test_nothing_is_refused_where_the_system_does_not_tell(folder, monkeypatch):
    need, _ = needed(folder, None, monkeypatch, available=None)
    assert need.available is None and "available" not in str(need)


def test_models_of_transformers_are_refused_too(tmp_path, monkeypatch):
    import transformers

    config = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.warns(RuntimeWarning, match="through transformers"):
        need, _ = needed(tmp_path, torch.float32, monkeypatch)
    assert need.weights > 4 * 32 * 100 and need.kept == "float32"
    with pytest.raises(MemoryError, match="dtype bfloat16 would take"):
        needed(tmp_path, torch.float32, monkeypatch, available=need.weights - 1)


def test_the_command_line_says_so_in_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available_memory", lambda device: 1000)
    assert main(["generate", "hi", "--model", str(folder)]) == 1
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and said.err.startswith(f"pyspec: {folder} needs ")
