"""The site is whole: pages are in the map, ops have a page, public names are in the API, and runs are shown."""

import importlib
import importlib.util
import json
import re
from types import ModuleType

import pytest

from tests.helpers.site import PAGES, ROOT, load_extension

API = {
    name: page for page, text in PAGES.items() for name in re.findall(r"^\.\. auto\w+:: ([\w.]+)", text, re.MULTILINE)
}
PUBLIC = ("pyspec", "pyspec.ops", "pyspec.caches", "pyspec.drafters", "pyspec.drafters.shapes", "pyspec.acceptance")
OPS = sorted(path.stem for path in (ROOT / "pyspec/ops").glob("[!_]*.py"))


@pytest.fixture(scope="module")
def results():
    return load_extension("results")


def test_every_page_is_in_the_map():
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", PAGES["index"], re.MULTILINE | re.DOTALL)
    entries = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    assert sorted(entries) == sorted(set(PAGES) - {"index"})
    for page in entries:
        assert f"]({page}.md)" in PAGES["index"] or any(f"]({page}.md" in text for text in PAGES.values()), page


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_page_that_names_it(op):
    assert any(re.search(rf"\b{op}\b", text) for page, text in PAGES.items() if not page.startswith("api/"))


def public_names(package):
    """What a room lists as its own or, where it only gathers, all that it imports."""
    room = importlib.import_module(package)
    gathered = (name for name, value in vars(room).items() if name[0] != "_" and not isinstance(value, ModuleType))
    return set(getattr(room, "__all__", gathered))


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_in_the_api(package):
    names = {name.rpartition(".")[2] for name in API}
    missing = public_names(package) - names
    assert not missing, f"docs/api has no entry for {', '.join(sorted(missing))} of {package}"


def test_api_names_are_there():
    for name in API:
        if name.startswith("pyspec.integrations.") and not name.startswith("pyspec.integrations.vllm."):
            continue  # they need their engines; the build of the site looks at them
        parent, _, attribute = name.rpartition(".")
        is_there = hasattr(importlib.import_module(parent), attribute) or importlib.util.find_spec(name)
        assert is_there, f"docs/{API[name]}.md names {name}"


def test_every_run_is_shown(results):
    page = results.filled(PAGES["results"])
    assert not results.MARK.search(page)
    for path in results.RESULTS.glob("*.json"):
        machine = json.loads(path.read_text()).get("machine")
        assert f"{path.name}](../bench/results/{path.name})" in page
        assert machine is None or f"{machine['date']}" in results.tables(path.stem)
        assert "\n| --- |" in results.tables(path.stem), f"{path.name} has no table"
    for path in results.RESULTS.glob("*.png"):
        assert f"](../bench/results/{path.name})" in page, f"docs/results.md does not show {path.name}"


def test_tables_are_as_wide_as_their_heads(results):
    for path in results.RESULTS.glob("*.json"):
        for lines in re.findall(r"(?:^\|.*\|$\n?)+", results.tables(path.stem), re.MULTILINE):
            widths = {len(re.findall(r"(?<!\\)\|", line)) for line in lines.splitlines()}
            assert len(widths) == 1 and len(lines.splitlines()) > 2


def test_table_of_numbers(results):
    rows = [{"ms": {"pyspec": 2.0, "sdpa": 5.0}, "share": 0.123}, {"ms": {"pyspec": 1234.5}}]
    columns = [
        ("ms", "ms/pyspec"),
        ("over SDPA", "ms/sdpa", "ms/pyspec"),
        ("share", "share", "%"),
        ("none", "no/where"),
    ]
    assert results.table(rows, columns).splitlines() == [
        "| ms | over SDPA | share |",
        "| --- | --- | --- |",
        "| 2 | 2.50x | 12.3% |",
        "| 1,234 |  |  |",
    ]


def test_a_run_that_no_page_knows_is_shown_whole(results, tmp_path, monkeypatch):
    run = {"machine": {"cpu": "a CPU", "threads": 2, "date": "2030-01-01"}, "dtype": "bf16", "rows": [{"op": "new"}]}
    (tmp_path / "old.json").write_text(json.dumps(run))
    run["rows"] += [{"op": "newer", "ms": {"ours": 1.5, "peer | it": 3.0}}]
    (tmp_path / "new.json").write_text(json.dumps(run))
    (tmp_path / "new.png").write_bytes(b"")
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert results.filled("# Another page") == "# Another page"
    page = results.filled("# Results\n\n<!-- results: old -->\n")
    assert page.count("a CPU, 2 threads, 2030-01-01, bf16.") == 2 and "\n## new\n" in page
    assert "| op | ms |" in page and r"| newer | ours 1.5, peer \| it 3 |" in page
    assert "![new](../bench/results/new.png)" in page
