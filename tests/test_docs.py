"""Every Python block of the README and the docs runs, page by page, with what it takes for granted given here."""

import functools
import importlib
import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch

import pyspec
from tests.helpers.eagle3_heads import random_head, write_head
from tests.helpers.mtp_heads import add_mtp, random_mtp
from tests.helpers.tiny_hybrids import tiny_hybrid

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = {
    str(path.relative_to(ROOT)): BLOCK.findall(path.read_text())
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
WITH_BLOCKS = [page for page, blocks in PAGES.items() if blocks]
GENERATE, LOAD = pyspec.generate, pyspec.load


def heads(*lengths: int, kv_heads: int = 2):
    """Queries of 4 heads and so many rows, and keys and values of so many."""
    rows, keys = lengths
    q, kv = torch.randn(1, 4, rows, 64), torch.randn(2, 1, kv_heads, keys, 64)
    return {"q": q, "k": kv[0], "v": kv[1]}


def tiny(family: str):
    import transformers

    options = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2}
    if family == "Mamba":
        options |= {"state_size": 16}
    else:
        options |= {"intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**options)).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model


def inputs():
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 4}


@functools.cache
def demo(number: int = 0):
    return LOAD("demo")


def with_demo():
    model = demo()
    return {
        "pyspec": pyspec,
        "model": model,
        "draft": demo(1),
        "tokens": model.tokenizer.encode("one two three one two"),
    }


def with_texts():
    from training.data_files import SETTINGS, Text, shard_path, write_shard

    folder = Path("texts")
    folder.mkdir()
    (folder / SETTINGS).write_text('{"taps": [1, 2]}')
    write_shard(shard_path(folder, 0), [Text(torch.arange(5, dtype=torch.int32), 2, torch.zeros(5, 2, 8))] * 3)
    return {"epoch": 0, "done": 0}


# What the blocks of a page know before they begin, by the number of the block that needs it.
GIVEN = {
    "docs/acceptance.md": {0: with_demo},
    "docs/block_masked_attention.md": {0: lambda: heads(2200, 2200), 1: lambda: heads(2200, 2700)},
    "docs/drafting.md": {0: lambda: with_demo() | {"handbook": "Turn it off and on again."}},
    "docs/gear.md": {0: with_demo, 1: lambda: {"model": tiny("Llama"), "inputs": inputs()}},
    "docs/integrations.md": {
        0: lambda: {"model": tiny("Llama"), "inputs": {k: v for k, v in inputs().items() if k != "max_new_tokens"}},
        2: lambda: {"model": tiny("Mamba")},
    },
    "docs/linear.md": {0: lambda: {"w": torch.randn(48, 32), "x": torch.randn(3, 32), "bias": torch.zeros(48)}},
    "docs/residual_vq.md": {0: with_demo},
    "docs/row_statistics.md": {0: lambda: {"logits": torch.randn(3, 50), "drafted": torch.tensor([[1, 2]] * 3)}},
    "docs/cascades.md": {0: lambda: with_demo() | {"tokens": list(range(9, 20))}},
    "docs/beams.md": {0: with_demo},
    "docs/sampling.md": {0: with_demo},
    "docs/selective_state.md": {0: lambda: {"model": tiny("Mamba"), "tokens": [1, 2, 3]}},
    "docs/serving.md": {0: lambda: with_demo() | {"texts": ["One, two", "Three, four"]}},
    "docs/sparse_attention.md": {
        0: lambda: heads(1, 300) | {"q": torch.randn(1, 4, 64), "lengths": torch.tensor([300], dtype=torch.int32)}
    },
    "docs/server.md": {2: with_demo},
    "docs/topk.md": {0: lambda: {"x": torch.randn(4, 4096)}},
    "docs/training.md": {0: with_texts},
    "docs/tree_attention.md": {
        0: lambda: heads(4, 104) | {"prefix_lens": torch.tensor([100], dtype=torch.int32)}
    },
}  # fmt: skip
# Blocks that need an engine or a server which the tests do not install or start, by a word of theirs.
ENGINES = {"llama_cpp": "llama_cpp", "LLM(": "vllm", "openai.OpenAI(": "openai", "Application(": "starlette"}


@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_blocks_run(page, monkeypatch, tmp_path):
    if any(word in block for block in PAGES[page] for word in ("transformers", "from_transformers")):
        pytest.importorskip("transformers")
    monkeypatch.setitem(os.environ, "XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    # any model that a page loads is the demo model, or a small one; texts are short
    monkeypatch.setattr(pyspec, "load", known_model)
    monkeypatch.setattr(pyspec, "generate", functools.partial(GENERATE, max_new_tokens=6))
    if "mine.safetensors" in "".join(PAGES[page]):
        from pyspec.caches.codebooks import demo_codebooks

        demo_codebooks().save("mine.safetensors")
    if "Eagle3(" in "".join(PAGES[page]):
        head = write_head(tmp_path / "head", random_head(49152, 576), 49152, target_hidden_size=576)
        monkeypatch.setattr("pyspec.drafters.eagle3.find_source", lambda source: head)
    known: dict = {}
    for number, block in enumerate(PAGES[page]):
        engine = next((package for word, package in ENGINES.items() if word in block), None)
        if engine is not None:
            if importlib.util.find_spec(engine) is None or engine != "llama_cpp":
                compile(block, page, "exec")
                continue
            import llama_cpp

            importlib.import_module("pyspec.integrations.llama_cpp")
            from pyspec.checkpoints.sources import demo_file

            Path("model.gguf").symlink_to(demo_file())
            quiet = functools.partial(llama_cpp.Llama, n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False)
            known |= {"llama_cpp": type("Engine", (), {"Llama": staticmethod(quiet)}), "pyspec": pyspec}
            block = block.replace("max_tokens=200", "max_tokens=4")
        known |= GIVEN.get(page, {}).get(number, dict)()
        exec(compile(block, f"{page}, block {number + 1}", "exec"), known)


def known_model(source: str):
    from pyspec import from_transformers

    if source.startswith("state-spaces/"):
        return from_transformers(tiny("Mamba"))
    if source.startswith("Qwen/"):  # with a layer that guesses further tokens
        model = tiny_hybrid("qwen3_5", vocab_size=49152)
        model.save_pretrained("hybrid")
        add_mtp(Path("hybrid"), random_mtp(model))
        return LOAD("hybrid", device="cpu")
    return demo(int(source == "draft.gguf"))


LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?[^)]*\)")
LINKED = [*(ROOT / page for page in PAGES), ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md"]


def anchors(page: Path) -> set[str]:
    """Those of a page's headings, as GitHub and the site name them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text()):
        if "://" in target:
            continue
        found = page.parent / target if target else page
        assert found.exists(), f"{page.name} links to {target}"
        if page.is_relative_to(ROOT / "docs"):  # the site has files, not folders
            assert found.is_file(), f"{page.name} links to the folder {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name} links to {target}#{anchor}"


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_end_before_column_120(page):
    for number, line in enumerate(page.read_text().splitlines(), 1):
        assert len(line) <= 120, f"line {number} of {page.name} has {len(line)} columns"


def test_pages_are_linked():
    for page in (ROOT / "docs").rglob("*.md"):
        targets = {
            (other.parent / target).resolve() for other in LINKED for target, _ in LINK.findall(other.read_text())
        }
        assert page.resolve() in targets, f"nothing links to {page.name}"


FOLDERS = ("pyspec", "kernels", "csrc", "tests", "bench", "docs", "training", "examples", "models")
PATH = re.compile(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w/.-]*\w\.(?:py|cpp|h|cu|md|jsonl?|png|sh|safetensors))\b")
NAME = re.compile(r"(?<![\w/.])pyspec((?:\.[a-zA-Z]\w+)+)")
TEXTS = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".md", ".cpp", ".h", ".cu"} and not path.is_symlink()
)


def is_there(name: str) -> bool:
    """Whether a dotted name below pyspec is a module, or a word of the module that it begins with."""
    module, words = ROOT / "pyspec", name.split(".")[1:]
    if words[0] == "kernels":  # where setup.py puts it
        module, words = ROOT / "kernels/triton", words[1:]
    while words and ((module / words[0]).is_dir() or (module / f"{words[0]}.py").exists()):
        module /= words.pop(0)
    source = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
    return not words or re.search(rf"\b{words[0]}\b", source.read_text()) is not None


def test_paths_and_names_that_texts_mention_are_there():
    stale = []
    for text in (*LINKED, *TEXTS):
        words = text.read_text()
        results_of_a_script = "bench/results/" if text.suffix == ".py" else "none"
        missing = [path for path in PATH.findall(words) if not (ROOT / path).exists() and "NAME" not in path]
        stale += [f"{text.relative_to(ROOT)}: {path}" for path in missing if not path.startswith(results_of_a_script)]
        stale += [f"{text.relative_to(ROOT)}: pyspec{name}" for name in NAME.findall(words) if not is_there(name)]
    assert not stale, "what is named and is not there:\n" + "\n".join(sorted(set(stale)))
