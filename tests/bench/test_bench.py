"""The benchmarks' own arithmetic, on models of a few parameters: they must notice a token that differs."""

import dataclasses

import equality
import peers
import pytest
import steps
import torch
from peers import DRAFTERS, PHASES, Pyspec, Run

from pyspec.drafters import new_drafter
from pyspec.measure import prompts
from tests.helpers.fake_runner import FakeRunner

PROMPT = list(b"a tree is a tree is a tree")


class DrawnApart(FakeRunner):
    """A runner that breaks the promise: in a tree of several nodes its logits are others than alone."""

    def _tree_logits(self, committed, tree):
        logits = super()._tree_logits(committed, tree)
        if len(tree) > 1:
            logits[:, 99] += 40.0
        return logits


@pytest.fixture(scope="module")
def generate_bench():
    import generate

    return generate


def run(tokens, seconds=1.0, prefill=0.5, rounds=None):
    decoded = len(tokens) - 1
    return Run(list(tokens), seconds + prefill, seconds, decoded, rounds or decoded, dict.fromkeys(PHASES, seconds / 4))


def test_prompts_cover_every_category():
    found = prompts.spec_bench()
    assert len({prompt.category for prompt in found}) == 13
    assert len(prompts.first_of_each_category(found, 5)) == 65
    assert len({prompt.category for prompt in prompts.across_categories(found, 13)}) == 13
    assert len({prompt.question_id for prompt in prompts.across_categories(found, 50)}) == 50


@pytest.mark.parametrize("sampling", [{}, *equality.SAMPLED.values()], ids=str)
def test_equal_tokens_are_found_equal(sampling):
    model = FakeRunner()
    drafters = {name: new_drafter(name, model) for name in DRAFTERS}
    tokens, found = equality.check_drafters(model, PROMPT, drafters, 40, 8, **sampling)
    assert len(tokens) == 40
    assert found == dict.fromkeys(DRAFTERS, {"difference": None, "drift": 0.0})


def test_a_different_token_is_found_and_described():
    model = DrawnApart()
    tokens, found = equality.check_drafters(model, PROMPT, {"merged": new_drafter("merged", model)}, 20, 8)
    difference = found["merged"]["difference"]
    place = difference["place"]
    assert difference["plain_token"] == tokens[place] != difference["drafted_token"] == 99
    assert difference["drift"] == pytest.approx(40.0)
    assert difference["plain_logits"][0] >= difference["plain_logits"][1]
    assert difference["drafted_logits"][0] < difference["drafted_logits"][1]
    line = {"kind": "greedy", "question_id": 1, "new_tokens": 20, "drafters": found}
    assert equality.failures(equality.summary([line])) == 1


def test_only_near_ties_may_differ_from_the_reference():
    drafters = {"merged": {"difference": None, "drift": 0.0}}
    line = {"kind": "greedy", "question_id": 1, "new_tokens": 3, "drafters": drafters}
    for gap, failed in ((5e-5, 0), (2e-4, 1)):
        line["reference"] = {"differences": [{"place": 2, "gap": gap}], "near_ties": 1 - failed}
        kinds = equality.summary([line])
        assert equality.failures(kinds) == failed
        assert kinds["greedy"]["reference"]["largest_gap"] == gap


def test_a_restarted_drafter_knows_nothing():
    engine = Pyspec(FakeRunner(), "recycling", 8)
    first = engine.run(PROMPT, 40)
    assert first.tokens == Pyspec(FakeRunner(), None, 1).run(PROMPT, 40).tokens
    assert engine.run(PROMPT, 40).rounds < first.rounds  # it has seen this text
    engine.restart()
    assert engine.run(PROMPT, 40).rounds == first.rounds


def test_transformers_gets_the_same_model():
    pytest.importorskip("transformers")
    from pyspec.architectures.llama import LlamaConfig, LlamaWeights
    from pyspec.runners.attention import AttentionRunner

    config = LlamaConfig("llama", 128, 96, 160, 2, 4, 2, 64, 128, 1e-5, 10000.0, tied_embedding=True)
    weights = LlamaWeights.empty(config, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for tensor in weights.named(config).values():
        tensor.normal_(1.0 if tensor.dim() == 1 else 0.0, 0.2, generator=generator)
    model = AttentionRunner(config, weights, eos_tokens=(3,))
    plain = Pyspec(model, None, 1).run(PROMPT[:9], 24)
    dense_model = peers.dense_transformers(model)
    from pyspec.integrations.transformers import generate

    for settings in ({}, {"prompt_lookup_num_tokens": 4}, {"custom_generate": generate, "budget": 8}):
        engine = peers.Transformers(dense_model, model.eos_tokens, **settings)
        engine.run(PROMPT[:9], 4)  # what a first call makes is not counted in the next
        theirs = engine.run(PROMPT[:9], 24)
        assert theirs.tokens == plain.tokens
        assert 0 < theirs.decode_seconds < theirs.total_seconds
        assert theirs.rounds <= theirs.decode_tokens < len(theirs.tokens)

    found = equality.check_reference(dense_model, PROMPT[:9], plain.tokens)
    assert found == {"differences": [], "near_ties": 0}
    wrong = [*plain.tokens[:5], plain.tokens[5] + 1, *plain.tokens[6:]]
    assert equality.check_reference(dense_model, PROMPT[:9], wrong)["differences"][0]["place"] == 5


def test_figures_are_sums_first_and_ratios_then(generate_bench, capsys):
    questions = prompts.first_of_each_category(prompts.spec_bench(), 1)[:2]
    runs = {
        "pyspec plain": [run(range(11)), run(range(31), seconds=3.0)],
        "pyspec merged": [run(range(11), seconds=0.5, rounds=5), run([*range(30), 99], rounds=15)],
        "transformers": [run(range(11), seconds=2.0), run(range(31), seconds=6.0)],
    }
    report = generate_bench.report(questions, [[1, 2], [3]], runs)
    merged = report["engines"]["pyspec merged"]
    assert merged["tokens_per_second"] == pytest.approx(40 / 1.5)
    assert merged["tokens_per_second_end_to_end"] == pytest.approx(42 / 2.5)
    assert merged["tokens_per_round"] == 2.0
    assert merged["phase_shares"]["verify"] == pytest.approx(0.25)
    assert merged["over transformers"]["tokens_per_second"] == pytest.approx(8 / 1.5)
    assert merged["over pyspec plain"]["tokens_per_second"] == pytest.approx(4 / 1.5)
    assert (merged["equal_to_plain"], merged["median_first_difference"]) == (1, 30)
    second = report["categories"][questions[1].category]["pyspec merged"]
    assert (second["tokens_per_second"], second["equal_to_plain"]) == (pytest.approx(30.0), 0)

    pytest.importorskip("rich")
    measured = {"floor_seconds": 0.01, "weight_bytes": 2e8, "cache_bytes": 1e7, "bytes_per_second": 2e10}
    measured |= {"plain_over_floor": 1.5, "overhead_share": 0.03, "multiply_rate_fp32": 2e11}
    measured |= {name: dict.fromkeys(map(str, steps.SIZES), 1.0) for name in ("seconds", "over_plain")}
    settings = {"model": "SmolLM2-135M-Instruct", "device": "cpu", "dtype": "bf16", "new_tokens": 30}
    result = {"machine": generate_bench.machine(), **settings, "steps": measured, **report}
    generate_bench.show(result | {"missing": {"llama.cpp": "ImportError: no such package"}})
    shown = capsys.readouterr().out
    assert "missing: llama.cpp (ImportError: no such package)" in shown
    assert "5.33x transformers (goal 7.0)" in shown and "1.50x that (goal: at most 1.25x)" in shown


def test_linear_counts_what_it_times(monkeypatch, tmp_path, capsys):
    import bench_linear

    monkeypatch.setattr(bench_linear.measure, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(bench_linear.measure, "multiply_rate", lambda dtype, device: 1e11)
    monkeypatch.setattr(bench_linear, "ROWS", (1, 3, 64))
    monkeypatch.setattr(bench_linear, "ROOFLINE_ROWS", (3,))
    result = bench_linear.run(repeats=1, layers=1, head=(70, 576))
    assert [(row["weights"], row["rows"]) for row in result["results"]] == [
        (weights, rows) for weights in ("bfloat16", "float32", "int8") for rows in (1, 3, 64)
    ]
    parameters = 576 * (960 + 576 + 3072 + 1536)
    for row in result["results"]:
        value_bytes = {"bfloat16": 2, "float32": 4, "int8": 34 / 32}[row["weights"]]
        weight_bytes = (parameters + 576 * 96) * value_bytes  # 70 outputs fill three panels
        assert row["gb_s"] == pytest.approx(weight_bytes / row["ms"]["pyspec"] / 1e6)
        floors = {"bytes": weight_bytes / 1e6, "operations": 2 * row["rows"] * (parameters + 576 * 70) / 1e8}
        assert row["floor_ms"] == pytest.approx(max(floors.values())) == pytest.approx(floors[row["floor"]])
        assert row["of_bandwidth"] == pytest.approx(floors["bytes"] / row["ms"]["pyspec"])
        assert row["of_fp32_rate"] == pytest.approx(floors["operations"] / row["ms"]["pyspec"])
    one, three, _ = result["results"][:3]
    assert three["one_row_ms"] == one["ms"]["pyspec"]
    assert set(result["results"][-1]["ms"]) == {"pyspec", "torch float32", "torch bfloat16"}
    assert "of one row" in capsys.readouterr().out
    bench_linear.show_roofline(result)
    assert f"fp32 rate {three['of_fp32_rate']:.2f}x at 3 rows" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    bench_linear.plot(result, tmp_path / "linear.png")
    assert (tmp_path / "linear.png").stat().st_size > 0


def test_linear_times_no_wrong_result(monkeypatch):
    import bench_linear

    model = bench_linear.Model(torch.float32, layers=1, head=(70, 576))
    model.check()
    monkeypatch.setattr(bench_linear, "linear", lambda x, weight: x @ weight.unpack().T + len(x) * 1e-3)
    with pytest.raises(AssertionError):
        model.check()


def test_verify_times_every_size(monkeypatch, capsys):
    import bench_verify
    from rich.console import Console

    monkeypatch.setattr(steps.measure, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(steps.measure, "multiply_rate", lambda dtype, device: 1e11)
    monkeypatch.setattr(bench_verify, "SHAPES", {"tiny": (96, 160, 2, 4, 2, 64, 97, True)})
    monkeypatch.setattr(steps, "SIZES", (1, 5))
    runner = bench_verify.random_model("tiny", torch.float32, "cpu")
    found = bench_verify.times(runner, "tiny", "fp32", repeats=1)
    layer = 96 * 512 + 256 * 96 + 2 * 160 * 96 + 96 * 160
    assert found["weight_bytes"] == 4 * (2 * layer + 96 * 128)  # 97 outputs fill four panels
    assert found["cache_bytes"] == 2 * 2 * 2 * steps.CONTEXT * 64 * 4
    assert found["floor_seconds"] == pytest.approx((found["weight_bytes"] + found["cache_bytes"]) / 1e9)
    assert set(found["seconds"]) == {"1", "5"} and found["over_plain"]["1"] == 1
    assert 0 < found["overhead_share"] < 1
    steps.show(Console(), found, True)
    assert "Python and dispatch" in capsys.readouterr().out


def test_block_masked_attention_times_the_papers_variants(monkeypatch, tmp_path, capsys):
    pytest.importorskip("scipy", reason="the sparse pattern is ordered by scipy")
    import bench_block_masked_attention as bench

    monkeypatch.setattr(bench.measure, "read_bandwidth", lambda device: 1e12)
    monkeypatch.setattr(bench.measure, "multiply_rate", lambda dtype, device: 1e11)
    monkeypatch.setitem(bench.PLANS, "cpu", dataclasses.replace(bench.PLANS["cpu"], size=192))
    result = bench.run("cpu", (64, 192), with_flex=False, seconds=0)
    assert [row["pattern"] for row in result["rows"]] == 4 * list(bench.PATTERNS)
    for row in result["rows"]:
        assert {"pyspec", "base", "dense run", "sdpa"} <= set(row["ms"])
        assert {"pyspec", "from_dense", "from_predicate"} == set(row["build_ms"])
    causal = next(row for row in result["rows"] if row["pattern"] == "causal" and row["size"] == 192)
    assert causal["floor_ms"] == pytest.approx(4 * 8 * 64 * (192 * 193 / 2) / 1e8)
    bench.show_targets(result["targets"])
    printed = capsys.readouterr().out
    assert "of tiles" in printed and "us at most" in printed and printed.count("times as fast as sdpa") == 16
    pytest.importorskip("matplotlib")
    bench.draw(result, tmp_path / "masks.png")
    assert (tmp_path / "masks.png").stat().st_size > 0


def test_targets_of_masks_are_about_the_worst():
    import bench_block_masked_attention as bench

    def row(pattern, flex):
        return {"pattern": pattern, "dtype": "float32", "size": 4096, "ms": {"pyspec": 2.0, "flex": flex},
                "build_ms": {"pyspec": 1.0, "flex": 30.0}}  # fmt: skip

    result = {"rows": [row("causal", 3.0), row("tree", 1.9)], "density": [{"over_line": 0.8}], "tree_build_us": 49.0}
    found = {target["what"]: target for target in bench.targets_of(result, bench.PLANS["cpu"])}
    assert [(target["reached"], target["met"]) for target in found.values()] == [
        (pytest.approx(0.95), False),
        (30.0, True),
        (pytest.approx(0.2), False),
        (49.0, True),
    ]
    assert "worst: tree" in next(iter(found))


@pytest.mark.parametrize("size", [64, 192])
def test_predicates_say_what_the_masks_do(size):
    import bench_block_masked_attention as bench

    for pattern in bench.PATTERNS:
        mask = bench.builder(pattern, size, "cpu")()
        sees = bench.predicate(pattern, size, mask.to_dense()[0, 0])
        found = bench.BlockMask.from_predicate(sees, mask.rows, mask.keys)
        assert torch.equal(found.to_dense(), mask.to_dense()), pattern


def test_variants_are_the_papers():
    import bench_block_masked_attention as bench

    visible = torch.ones(64, 7 * 64, dtype=torch.bool)
    visible[:, 192:256] = False
    mask = bench.BlockMask.from_dense(visible)
    for variant, full in (("base", []), ("dense run", [0, 1, 2])):
        changed = bench.as_variant(mask, variant)
        assert changed.full_tiles.tolist() == full and len(changed.bits) == 6 - len(full)
        assert torch.equal(changed.to_dense(), mask.to_dense())
