"""The limits of the house: lengths of files and functions, and no circle among the imports of pyspec's modules."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (".py", ".cpp", ".cu", ".h")
MOST_LINES, MOST_PYTHON, MOST_CPP = 400, 60, 100

#: What is still above a limit, each with its size when it was last seen: may shrink, may not grow.
KNOWN = {
    "kernels/triton/block_masked_attention.py: block_masked_attention_kernel": 116,
}
#: Circles that are still there, by their modules.
KNOWN_CIRCLES: set[frozenset[str]] = set()


def tracked(*suffixes: str) -> list[str]:
    """Paths below the root of the files that git knows, or of all files in a copy without git."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a clone: there is no list of files")
    return [path for path in listed.split("\0") if path.endswith(suffixes) and (ROOT / path).is_file()]


# ==== lengths ====


def python_functions(source: str) -> list[tuple[str, int]]:
    """Name and lines of every function, its docstring's apart, and those that list a GPU kernel's parameters."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            is_kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            begin = node.body[0].lineno if is_kernel else node.lineno
            text = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
            found.append((node.name, node.end_lineno - begin + 1 - (text.end_lineno - text.lineno + 1 if text else 0)))
    return found


#: What a line of 0 or 2 columns of indent begins with where it begins no function.
NO_FUNCTION = r'namespace|struct|class|enum|union|public|private|for|while|if|extern "C" {|[#/{}]'


def cpp_functions(source: str) -> list[tuple[str, int]]:
    """Name and lines of every function, in the layout of clang-format: it ends with a brace below its first letter."""
    lines, found, row = re.sub(r"#define.*(\\\n.*)*", "", source).splitlines(), [], 0
    while row < len(lines):
        begin = re.match(rf"( {{0,2}})(?!{NO_FUNCTION})\S", lines[row])
        first, row = row, row + 1
        if not begin:
            continue
        while not re.search(r"[;{}]$", re.sub(r"\s*//.*", "", lines[row - 1])) and row < len(lines):
            row += 1
        statement = re.sub(r"\s*//.*", "", " ".join(lines[first:row]))
        name = re.match(r"[^(=]*?(\w+)\(", re.sub(r"template <.*?>|__\w+__\(.*?\)+", "", statement))
        if name and statement.endswith("{"):
            row = 1 + next(end for end in range(row, len(lines)) if lines[end].startswith(begin[1] + "}"))
            found.append((name[1], row - first))
    return found


def too_long() -> dict[str, int]:
    """Path, or path and function -> lines, of all that is above its limit."""
    found = {}
    for path in tracked(*SOURCES):
        source = (ROOT / path).read_text()
        found |= {path: lines} if (lines := source.count("\n")) > MOST_LINES else {}
        of_file, most = (python_functions, MOST_PYTHON) if path.endswith(".py") else (cpp_functions, MOST_CPP)
        found |= {f"{path}: {name}": lines for name, lines in of_file(source) if lines > most}
    return found


def test_files_and_functions_are_short():
    found = too_long()
    assert {name: lines for name, lines in found.items() if lines > KNOWN.get(name, 0)} == {}


def test_the_list_of_exceptions_only_has_exceptions():
    assert KNOWN.keys() <= too_long().keys()


# ==== imports ====


def modules() -> dict[str, str]:
    """Name -> path of pyspec's modules; kernels/triton is installed as pyspec.kernels."""
    found = {"pyspec._host": "csrc/host/module.cpp"}
    for path in tracked(".py"):
        if path.startswith(("pyspec/", "kernels/triton/")):
            name = path.removesuffix(".py").replace("kernels/triton", "pyspec/kernels").replace("/", ".")
            found[name.removesuffix(".__init__")] = path
    return found


def imports(name: str, source: str, known) -> set[str]:
    """Modules that a module imports, at its top or in a function, those for type checkers apart."""
    tree = ast.parse(source)
    typing = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in typing:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:  # a submodule, or something that the module itself has
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return found & set(known) - {name}


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Groups of modules that reach each other."""
    reached = {}
    for start in graph:
        seen, left = set(), [start]
        while left:
            for module in graph[left.pop()] - seen:
                seen.add(module)
                left.append(module)
        reached[start] = seen
    groups = {frozenset({other for other in seen if start in reached[other]}) for start, seen in reached.items()}
    return groups - {frozenset()}


def test_no_import_circle():
    known = modules()
    graph = {
        name: imports(name, (ROOT / path).read_text(), known) if path.endswith(".py") else set()
        for name, path in known.items()
    }
    assert sorted(map(sorted, circles(graph) ^ KNOWN_CIRCLES)) == []


# ==== the rules themselves ====


def test_python_functions_are_counted_without_docstrings():
    source = 'def f(a,\n      b):\n    """One.\n\n    Two.\n    """\n    def g():\n        return a\n    return g\n'
    assert python_functions(source) == [("f", 5), ("g", 2)]
    assert python_functions("@triton.jit(x)\n" + source) == [("f", 3), ("g", 2)]


def test_cpp_functions_are_counted_to_their_brace():
    source = """namespace {
constexpr int64_t kBlock = 128;
template <class T>
struct Side {
  explicit Side(const GearFormat& f,
                bool values)
      : format(f) {
    if (values) {
    }
  }
  int64_t bytes() const { return 0; }
};
void encode(
    const P& p) {
  auto item = [&](int64_t index) {
  };
}
}  // namespace
extern "C" void PYSPEC_ENTRY(pyspec_gear)(const P& p) {
  switch (p.x) {
  }
}
"""
    assert cpp_functions(source) == [("Side", 6), ("encode", 5), ("PYSPEC_ENTRY", 4)]


def test_circles_are_found_where_modules_reach_each_other():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d2"}, "d2": set()}
    assert circles(graph) == {frozenset({"b", "c"})}
    known = {"p", "p.q", "p.r", "p.s"}
    source = "import p.q\nif TYPE_CHECKING:\n    import p.r\ndef f():\n    from p import s, other\n"
    assert imports("p.x", source, known) == {"p", "p.q", "p.s"}
