"""pyspec bench and pyspec bench drafters, as they are typed."""

import codecs
import json

import pytest

from tests.helpers.command_line import fake_model, run, write_prompts

model = pytest.fixture(fake_model)


def test_bench_json(model, capsys, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    code, out, _ = run(capsys, "bench", "--prompts", prompts, "--limit", 2, "--max-new-tokens", 24, "--json")
    report = json.loads(out)
    assert code == 0
    assert [text["prompt"] for text in report["texts"]] == ["a 0", "a 1", "b 0", "b 1", "alone"]
    assert report["answers"] == {} and list(report["temperatures"]) == ["0.0"]
    rows = report["temperatures"]["0.0"]["all"]
    assert list(rows) == ["plain", "lookup", "recycling", "merged"]
    for name, row in rows.items():
        assert row["equal"] == 5
        runs = [text["temperatures"]["0.0"][name] for text in report["texts"]]
        assert all(one["first_difference"] is None and one["stats"]["new_tokens"] == 24 for one in runs)
        rounds = sum(sum(one["stats"]["accepted_lengths"]) for one in runs)
        assert row["tokens_per_round"] == pytest.approx(5 * 23 / rounds)
        decode = sum(one["stats"]["decode_seconds"] for one in runs)
        assert row["tokens_per_second"] == pytest.approx(5 * 23 / decode)
    assert rows["plain"]["speedup"] == 1.0 and rows["plain"]["tokens_per_round"] == 1.0
    assert rows["lookup"]["speedup"] == pytest.approx(
        rows["lookup"]["tokens_per_second"] / rows["plain"]["tokens_per_second"]
    )


def test_bench_table(model, capsys):
    code, out, err = run(capsys, "bench", "--drafter", "lookup", "--max-new-tokens", 8, "--temperature", 0.8)
    assert code == 0 and "4/4" in out and "lookup" in out and "recycling" not in out and "1.00x" in out
    assert "temperature 0.8" in out and "several drawn answers" not in out


@pytest.mark.parametrize(
    "line", ["not json", '{"text": "x"}', '{"turns": []}', '{"prompt": ""}', "[1]", '{"prompt": 3}']
)
def test_bench_names_the_bad_line(model, capsys, tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line)
    code, _, err = run(capsys, "bench", "--prompts", path)
    assert code == 2 and "line 2" in err and str(path) in err


def test_bench_of_an_empty_file(model, capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n")
    code, _, err = run(capsys, "bench", "--prompts", path)
    assert code == 2 and "no prompts" in err


def test_bench_reads_lines_of_json_as_they_are_written_anywhere(model, capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = ['{"prompt": "one\u2028line"}', "", '{"turns": ["two"]}']
    path.write_bytes(codecs.BOM_UTF8 + "\r\n".join(lines).encode())
    arguments = ("bench", "--prompts", path, "--drafter", "lookup", "--max-new-tokens", 2, "--json")
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and [text["prompt"] for text in json.loads(out)["texts"]] == ["one\u2028line", "two"]
    path.write_text('\n\n{"prompt": "fine"}\n\n{"turns": "no list"}\n')
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "line 5" in err
    path.write_text('{"prompt": "\\udce9"}')
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "line 1" in err


def test_every_drafter(model, capsys, tmp_path):  # noqa: F811
    prompts, output = write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "report.json"
    arguments = ("bench", "drafters", "--prompts", prompts, "--limit", 1, "--max-new-tokens", 12, "--budget", 6)
    code, out, err = run(capsys, *arguments, "--drafters", "lookup", "suffix", "--output", output)
    assert code == 0 and "temperature 0.8" in out and "suffix" in out and "over recycling" in out
    report = json.loads(output.read_text())
    assert list(report["temperatures"]["0.8"]) == ["all", "a", "b"]
    assert output.with_suffix(".png").exists()
    code, out, _ = run(capsys, *arguments, "--temperatures", 0, "--answers", 0, "--json")
    found = json.loads(out)
    assert code == 0 and found["answers"] == {} and list(found["temperatures"]) == ["0.0"]
    assert "layer_skip" not in found["temperatures"]["0.0"]["all"]  # the fake model has no layers
    assert {"plain", "merged", "ngrammys"} <= set(found["temperatures"]["0.0"]["all"])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--drafters", "medium"], "--drafters"),
        (["--temperatures", "-1"], "temperature"),
        (["--answers", "-1"], "--answers"),
        (["--output", "/nowhere/file.json"], "/nowhere"),
        (["--limit", "0"], "--limit"),
        (["--budget", "0"], "budget"),
    ],
)
def test_bad_input(model, capsys, arguments, words):  # noqa: F811
    code, out, err = run(capsys, "bench", "drafters", *arguments)
    assert code == 2 and out == "" and words in err.splitlines()[-1]
