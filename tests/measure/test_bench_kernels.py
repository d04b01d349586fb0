import copy
import json

import pytest
import torch

from pyspec.measure import cases, kernels


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small shapes, one repeat and no measuring of the machine: these tests are about the bookkeeping."""
    monkeypatch.setattr(kernels, "SECONDS", 0.0)
    monkeypatch.setattr(kernels.measure, "read_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(kernels.measure, "multiply_rate", lambda dtype, device: 1e11)
    small = {
        "small": (cases.Attention(128, 256, 4, 2, 64, 500),),
        "hybrid": (
            cases.Attention(64, 128, 2, 1, 64, 300),
            cases.StateSpace(64, 2, 64, 16),
            cases.DeltaNet(2, 32, 1, 16),
        ),
    }
    monkeypatch.setattr(cases, "MODELS", small)
    monkeypatch.setattr(cases, "CONTEXT", 384)
    monkeypatch.setattr(cases, "PROMPT", 256)


@pytest.fixture
def result():
    return kernels.run()


def test_every_op_is_checked_and_timed(result):
    assert not [row for row in result["rows"] if "failed" in row]
    assert {row["op"] for row in result["rows"]} == set(cases.OPS)
    for row in result["rows"]:
        assert row["us"] > 0 and row["floor_us"] > 0 and row["error"] < 2e-2
        assert row["share_of_floor"] == pytest.approx(row["floor_us"] / row["us"])
        assert row["floor_us"] == pytest.approx(max(row["bytes"] / 1e4, row["operations"] / 1e5))
    keys = [(row["op"], row["model"], row["shape"]) for row in result["rows"]]
    assert len(keys) == len(set(keys)), "compare tells rows apart by these"
    json.dumps(result)


def test_bytes_and_operations_are_those_of_the_formula():
    problem = cases._linear(cases.Attention(128, 256, 4, 2, 64, 500), 3, torch.float32, "cpu")
    assert problem.operations == 2 * 3 * 128 * 256
    assert problem.bytes == 4 * (128 * 256 + 3 * 256 + 3 * 128)
    problem = cases._block_masked_attention(cases.Attention(128, 256, 4, 2, 64, 500), "cpu")
    assert problem.operations == 4 * 4 * 64 * 8 * (32 * 33 // 2)


def test_a_wrong_kernel_is_named_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(cases.ops, "swiglu", lambda x, swiglu=cases.ops.swiglu: swiglu(x) + torch.rand(1))
    rows = kernels.run(["swiglu", "rms_norm"])["rows"]
    assert all("differs from the reference" in row["failed"] for row in rows if row["op"] == "swiglu")
    assert not any("failed" in row for row in rows if row["op"] == "rms_norm")


def test_what_a_call_changes_is_put_back_before_it_is_checked():
    problem = cases._rms_norm(cases.Attention(128, 256, 4, 2, 64, 500), "cpu")
    first = kernels.error_of(problem)
    for _ in range(50):
        problem.call()
    assert kernels.error_of(problem) == first


def test_comparison_finds_what_became_slower_over_its_floor(result):
    after = copy.deepcopy(result)
    slower, failed, gone = after["rows"][:3]
    slower["share_of_floor"] /= 1.5
    failed["failed"] = "ValueError: wrong"
    after["rows"].remove(gone)
    for row in after["rows"][3:]:  # the machine as a whole is twice as slow
        row["us"] *= 2
    lines = kernels.compare(result, after)
    assert len(lines) == len(result["rows"]) - 1
    regressed = [line for line in lines if line["regressed"]]
    assert [line["shape"] for line in regressed] == [slower["shape"], failed["shape"]]
    assert regressed[0]["over_before"] == pytest.approx(1.5)
    with pytest.raises(ValueError, match="of one device"):
        kernels.compare(result, after | {"device": "cuda"})


def test_the_page_needs_nothing_else(result):
    pytest.importorskip("matplotlib")
    from pyspec.measure.report import page

    result["rows"][0] = {name: result["rows"][0][name] for name in ("op", "model", "shape", "backend")}
    result["rows"][0]["failed"] = "ValueError: <wrong>"
    text = page(result)
    assert text.startswith("<!doctype html>") and "&lt;wrong&gt;" in text
    assert "src=" not in text and "@import" not in text and "<script" not in text
    assert text.count("<svg") == len(cases.OPS)
    for row in result["rows"][1:]:
        assert row["shape"] in text


def test_tables_name_every_case(result):
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    kernels.show(result, console)
    kernels.show_comparison(kernels.compare(result, result), console)
    text = console.export_text()
    assert all(text.count(row["shape"]) >= 2 for row in result["rows"])
    assert f"0 of {len(result['rows'])} are more than" in text


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="op must be one of"):
        kernels.run(["nothing"])
    with pytest.raises(ValueError, match="device must be cpu"):
        kernels.run(device="tpu")
    for text in ("nonsense", "[]", '{"device": "cpu"}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match="is not a result of"):
            kernels.read(tmp_path / "a.json")


def test_the_command_line(tmp_path, capsys, monkeypatch, result):
    pytest.importorskip("rich")
    from pyspec.cli import main

    page = tmp_path / "report.html"
    assert main(["bench", "kernels", "--op", "swiglu", "--op", "rms_norm", "--json", "--html", str(page)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {row["op"] for row in printed["rows"]} == {"swiglu", "rms_norm"} and page.read_text().count("<svg") == 2
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps(result))
    result["rows"][0]["share_of_floor"] /= 2
    after.write_text(json.dumps(result))
    assert main(["bench", "compare", str(before), str(before)]) == 0
    assert main(["bench", "compare", str(before), str(after)]) == 1
    assert "1 of" in capsys.readouterr().out
    assert main(["bench", "kernels", "--op", "nothing"]) == 2
    assert "op must be one of" in capsys.readouterr().err
    monkeypatch.setattr(cases.ops, "swiglu", lambda x: torch.rand(len(x), x.shape[1] // 2))
    assert main(["bench", "kernels", "--op", "swiglu"]) == 1, "a wrong kernel is a failure"
