import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyspec
from pyspec.caches import cache_from_name
from pyspec.ops._library import compiled_library, instruction_sets
from tests.helpers.command_line import fake_model, pyspec_text, run
from tests.helpers.fake_runner import FakeRunner, ScriptedRunner

ROOT = Path(__file__).parents[1]
model = pytest.fixture(fake_model)


def _heed_interrupts() -> None:
    """A shell's background job ignores Ctrl-C and its children inherit that: CI may be one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# ---- generate


def test_generate_streams_the_text_and_ends_with_figures(model, capsys):
    code, out, err = run(capsys, "generate", "hello", "--max-new-tokens", 40)
    expected = pyspec_text(model, "user: hello\n", 40)
    assert (code, out) == (0, expected + "\n")
    for word in ("tokens/s", "speedup", "tokens/round", "draft", "verify", "accept", "commit", "merged", "plain"):
        assert word in err
    assert "plain decoding says the same 40 tokens" in err and "40 new tokens" in err and "at the limit" in err
    assert "seed" not in err  # greedy


def test_generate_json_is_all_there_is_on_stdout(model, capsys):
    code, out, _ = run(capsys, "generate", "hello", "--json", "--max-new-tokens", 30, "--temperature", 0.8, "--seed", 5)
    report = json.loads(out)
    assert code == 0
    assert report["finish_reason"] == "length" and len(report["tokens"]) == 30 and report["error"] is None
    assert report["prompt_tokens"] == len(b"user: hello\n")
    assert report["stats"]["seed"] == report["plain"]["stats"]["seed"] == 5
    assert report["stats"]["mean_accepted_length"] >= 1 == report["plain"]["stats"]["mean_accepted_length"]
    assert report["plain"]["equal"] is True and report["plain"]["first_difference"] is None


def test_generate_passes_every_setting_on(model, capsys, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("the prompt")
    threads = torch.get_num_threads()
    try:
        code, out, _ = run(
            capsys, "generate", "--file", prompt, "--raw", "--json", "--drafter", "lookup", "--budget", 4, "--top-k", 3,
            "--top-p", 0.9, "--temperature", 1.2, "--seed", 9, "--max-new-tokens", 20, "--dtype", "bf16",
            "--threads", 1, "--model", "some/model", "--no-compare",
        )  # fmt: skip
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    from pyspec.generate import generate

    settings = dict(top_k=3, top_p=0.9, temperature=1.2, seed=9, max_new_tokens=20)
    report = json.loads(out)
    assert code == 0 and model.loads == [("some/model", torch.bfloat16)]
    assert report["tokens"] == generate(model, list(b"the prompt"), drafter=None, **settings).tokens
    assert report["plain"] is None and report["drafter"] == "lookup" and report["budget"] == 4
    assert max(i for i, n in enumerate(report["stats"]["accepted_lengths"]) if n) <= 4


def test_generate_packs_its_cache(model, capsys, monkeypatch):
    seen = []

    def prefill(tokens, *, capacity, observe, cache):
        seen.append(cache)
        return FakeRunner.prefill(model, tokens, capacity=capacity, observe=observe)

    monkeypatch.setattr(model, "takes_quantised_cache", True, raising=False)
    monkeypatch.setattr(model, "prefill", prefill)
    settings = ("--cache", "gear-2bit", "--drafter", "lookup", "--budget", 4, "--max-new-tokens", 9, "--json")
    code, out, _ = run(capsys, "generate", "x", *settings)
    assert code == 0 and seen == [cache_from_name("gear-2bit")] * 2  # with the drafter, and plain
    assert json.loads(out)["cache"] == "gear-2bit" and json.loads(out)["plain"]["equal"]


def test_generate_reads_standard_input(model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    _, out, _ = run(capsys, "generate", "-", "--json", "--max-new-tokens", 5, "--drafter", "none")
    assert json.loads(out)["text"] == pyspec_text(model, "user: hello\n", 5)


def test_generate_without_a_chat_template_takes_the_prompt_as_it_is(model, capsys):
    model.tokenizer.chat_template = None
    _, out, _ = run(capsys, "generate", "hello", "--json", "--max-new-tokens", 5, "--drafter", "none")
    assert json.loads(out)["text"] == pyspec_text(model, "hello", 5)


def test_generate_takes_a_system_turn_and_variables_of_the_template(model, capsys, monkeypatch):
    seen = []

    def chat(messages, **variables):
        seen.append((messages, variables))
        return list(b"x")

    monkeypatch.setattr(model.tokenizer, "chat", chat)
    short = ("--max-new-tokens", 1, "--drafter", "none")
    values = ("enable_thinking=false", "reasoning_effort=high", 'tools=[{"a": "b=c"}]', "empty=")
    code, _, _ = run(capsys, "generate", "hi", "--system", "be brief", *short, *(
        part for value in values for part in ("--variable", value)))  # fmt: skip
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    variables = {"enable_thinking": False, "reasoning_effort": "high", "tools": [{"a": "b=c"}], "empty": ""}
    assert code == 0 and seen == [(turns, variables)]
    for wrong in ("enable_thinking", "=1", "a b=1", "messages=[]"):
        code, _, err = run(capsys, "generate", "hi", "--variable", wrong)
        assert code == 2 and "must be NAME=VALUE" in err
    for option, value in (("--system", "s"), ("--variable", "a=1")):
        code, _, err = run(capsys, "generate", "hi", "--raw", option, value, *short)
        assert code == 2 and f"{option} needs a chat template: --raw leaves that out" in err
    model.tokenizer.chat_template = None
    code, _, err = run(capsys, "generate", "hi", "--system", "", *short)
    assert code == 2 and "--system needs a chat template: this model has none" in err


def test_generate_stop_strings(model, capsys):
    text = pyspec_text(model, "user: hello\n", 20)
    code, out, err = run(capsys, "generate", "hello", "--stop", "never", "--stop", text[7:10])
    assert code == 0 and out == text[: text.index(text[7:10])] + "\n" and "ended by a stop string" in err


def test_generate_reports_where_plain_decoding_differs(model, capsys, monkeypatch):
    def lying(trees):  # what a runner does whose rows depend on the number of rows
        logits = FakeRunner.verify(model, trees)
        if len(trees[0]) == 1 and model.verified > 20:
            logits[0].logits[0] = torch.eye(model.vocab_size)[110] * 90
        return logits

    monkeypatch.setattr(model, "verify", lying)
    code, _, err = run(capsys, "generate", "hello", "--max-new-tokens", 40)
    assert code == 0 and "plain decoding says something else from token" in err


def test_generate_computes_what_a_drafter_needs(model, capsys):
    code, out, _ = run(capsys, "generate", "hello", "--drafter", "ngrammys", "--json", "--max-new-tokens", 30)
    report = json.loads(out)
    assert code == 0 and report["plain"]["equal"] and report["drafter"] == "ngrammys"


def test_nan_is_a_failure_that_keeps_the_text(model, capsys, monkeypatch):
    logits = model.logits
    nan = torch.full((model.vocab_size,), torch.nan)
    monkeypatch.setattr(model, "logits", lambda context: nan if len(context) > 20 else logits(context))
    code, out, err = run(capsys, "generate", "hello")
    assert code == 1 and len(out.strip()) == 9 and "are NaN" in err.splitlines()[-1]


# ---- Ctrl-C


def test_interruption_prints_the_text_so_far(model, capsys, monkeypatch):
    def verify(trees):
        if model.verified == 5:
            raise KeyboardInterrupt
        return FakeRunner.verify(model, trees)

    monkeypatch.setattr(model, "verify", verify)
    code, out, err = run(capsys, "generate", "hello", "--drafter", "none")
    assert code == 130 and len(out.strip()) == 6 and "interrupted" in err

    model.verified = 0
    code, out, _ = run(capsys, "generate", "hello", "--drafter", "none", "--json")
    assert code == 130 and len(json.loads(out)["text"]) == 6


def test_interruption_while_loading(capsys, monkeypatch):
    def load(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pyspec, "load", load)
    code, out, err = run(capsys, "generate", "hello")
    assert (code, out, err) == (130, "", "pyspec: interrupted\n")


def test_a_real_signal_in_a_real_process():
    script = """
import sys, time, pyspec
sys.path.insert(0, sys.argv[1])
from tests.helpers.fake_runner import FakeRunner
class Slow(FakeRunner):
    def verify(self, trees):
        time.sleep(0.02)
        return super().verify(trees)
pyspec.load = lambda *args, **kwargs: Slow()
from pyspec.cli import main
sys.exit(main(["generate", "hello", "--max-new-tokens", "5000"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(ROOT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT.parent)},
        preexec_fn=_heed_interrupts,
    )
    first = process.stdout.read(3)  # the text is streaming
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert len(first) == 3 and out.endswith(b"\n")
    assert b"interrupted" in err and b"Traceback" not in err


# ---- bad input


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["generate"], "required"),
        (["generate", ""], "prompt is empty"),
        (["generate", "  \n"], "prompt is empty"),
        (["generate", "--file", "/nowhere/prompt"], "/nowhere/prompt"),
        (["generate", "x", "--budget", "0"], "budget"),
        (["generate", "x", "--budget", "many"], "--budget"),
        (["generate", "x", "--max-new-tokens", "-1"], "max_new_tokens"),
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--temperature", "nan"], "temperature"),
        (["generate", "x", "--top-p", "2"], "top_p"),
        (["generate", "x", "--seed", "-1"], "seed"),
        (["generate", "x", "--stop", ""], "stop"),
        (["generate", "x", "--threads", "0"], "--threads"),
        (["generate", "x", "--drafter", "medium"], "--drafter"),
        (["generate", "x", "--drafter", "lookup", "--draft-model", "small"], "--draft-model"),
        (["generate", "x", "--draft-model", "small"], "another runner than target"),
        (["generate", "x", "--acceptance", "exacr"], "--acceptance"),
        (["generate", "x", "--acceptance", "block"], 'Use acceptance="exact"'),
        (["generate", "x", "--dtype", "int3"], "--dtype"),
        (["generate", "x", "--cache", "int5"], "--cache"),
        (["generate", "x", "--cache", "int4"], "cache must be dense for a FakeRunner"),
        (["generate", "x", "--drafter", "lookup", "--drafter-state", "file"], "drafter that learns"),
        (["generate", "x", "--drafter", "ngrammys", "--drafter-state", "file"], "drafter that learns"),
        (["generate", "x", "--drafter", "layer_skip"], "able to run some of its layers"),
        (["generate", "x", "--drafter-state", "/nowhere/file"], "/nowhere"),
        (["generate", "x" * 5000], "context"),
        (["bench", "--limit", "0"], "--limit"),
        (["bench", "--prompts", "/nowhere/prompts"], "/nowhere/prompts"),
        (["nothing"], "invalid choice"),
        ([], "required"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(model, capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == ""
    last = err.splitlines()[-1]
    assert words in last and "Traceback" not in err
    if "error: " not in last:  # argparse shows the usage before its own
        assert len(err.splitlines()) == 1


def test_an_unknown_model_is_bad_input(capsys):
    code, out, err = run(capsys, "generate", "x", "--model", "/nowhere/model.gguf")
    assert code == 2 and out == "" and "/nowhere/model.gguf" in err


def test_failures_exit_with_1_and_one_line(capsys, monkeypatch):
    def load(*args, **kwargs):
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(pyspec, "load", load)
    assert run(capsys, "generate", "x") == (1, "", "pyspec: RuntimeError: out of luck\n")


def test_without_rich_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    code, _, err = run(capsys, "generate", "x")
    assert code == 1 and "pyspec-kernels[hf]" in err


def test_a_model_without_a_tokenizer_is_bad_input(model, capsys):
    model.tokenizer = None
    code, _, err = run(capsys, "generate", "x")
    assert code == 2 and "tokenizer" in err


# ---- info, help


@pytest.fixture
def fast_rates(monkeypatch):
    """Rates that nobody measures."""
    monkeypatch.setattr("pyspec.measure.read_bandwidth", lambda device: 20e9)
    monkeypatch.setattr("pyspec.measure.kernel_rate", lambda dtype: dtype.itemsize * 1e11)


def test_info(model, fast_rates, capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    for word in ("torch", torch.__version__, "tree_attention on cpu", "topk on cuda", "extras", "demo", "threads"):
        assert word in out
    for word in ("20.0 GB/s", "fp32 400, bf16 200, int8 100 GFLOP/s", "Does it pay here?", "pays from", "Measured in"):
        assert word in out


def test_info_without_a_demo_model(fast_rates, capsys, monkeypatch):
    def missing():
        raise FileNotFoundError("no such file")

    monkeypatch.setattr("pyspec.checkpoints.sources.demo_file", missing)
    code, out, _ = run(capsys, "info")
    assert code == 0 and "the demo model was not found: no such file" in out and "20.0 GB/s" in out


@pytest.mark.skipif(compiled_library()[0] is None, reason="the compiled kernels are not there")
def test_an_instruction_set_of_another_machine_is_refused_with_the_list(capsys, monkeypatch):
    monkeypatch.setenv("PYSPEC_ISA", "z80")
    code, _, err = run(capsys, "info")
    assert code == 2 and "PYSPEC_ISA must be one of portable" in err and err.endswith("on this processor, got z80\n")
    monkeypatch.setenv("PYSPEC_ISA", "portable")
    sets = instruction_sets()
    assert sets["used"] == "portable" and sets["used"] in sets["compiled"] and sets["used"] in sets["found"]


def test_info_json(model, fast_rates, capsys):
    code, out, _ = run(capsys, "info", "--json")
    report = json.loads(out)
    assert code == 0 and report["versions"]["torch"] == torch.__version__
    assert {"op", "device", "backend", "reason"} == set(report["ops"][0])


def test_help_is_quick_because_it_imports_nothing_heavy_beside_torch():
    script = """
import sys
import torch
before = set(sys.modules)
from pyspec.cli import main
try:
    main(["--help"])
finally:
    print("imported:", {name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    help_text, imported = result.stdout.split("imported: ")
    assert "generate" in help_text and imported == "{'pyspec'}\n"


def test_info_tells_what_trees_cost(model, fast_rates, capsys):
    code, out, _ = run(capsys, "info", "--json")
    report = json.loads(out)["measured"]
    assert code == 0 and report["costs"][0] == {"nodes": 1, "seconds": 1.0, "plain_steps": 1.0, "chance_to_pay": None}
    last = report["costs"][-1]
    assert last["nodes"] > 1 and last["plain_steps"] == pytest.approx(1 + (last["nodes"] - 1) / 63)
    assert last["chance_to_pay"] == pytest.approx(1 / 63)
    assert report["operations_per_second"] == {"fp32": 4e11, "bf16": 2e11, "int8": 1e11}


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m pyspec info --json | head -c 1"
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    result = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment)
    assert result.stdout == "{" and "Traceback" not in result.stderr and "Exception" not in result.stderr


def test_scripted_text_with_an_emoji(monkeypatch, capsys):
    runner = ScriptedRunner("grüße 🌳".encode())
    runner.prompt_length = len(b"user: x\n")
    monkeypatch.setattr(pyspec, "load", lambda *args, **kwargs: runner)
    code, out, _ = run(capsys, "generate", "x")
    assert (code, out) == (0, "grüße 🌳\n")
