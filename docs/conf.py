"""Settings of the site: `make docs` builds it from these pages and the docstrings into build/docs."""

import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import pyspec.integrations  # noqa: E402

project = "pyspec"
author = "the authors of pyspec"
version = release = pyspec.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "results", "registries"]
html_theme = "furo"
html_show_copyright = False
html_title = "pyspec"
html_copy_source = False

# Links and anchors are GitHub's, so that a page reads alike in both places.
myst_heading_anchors = 4
highlight_language = "none"
smartquotes = False
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
default_role = "code"
napoleon_use_ivar = True
# Nobody needs another engine to read about how pyspec goes into it.
autodoc_mock_imports = ["llama_cpp", "lm_eval"]
pyspec.integrations.require = lambda package, first, beyond: None


def setup(app) -> None:
    app.connect("source-read", link_outside)


def link_outside(app, page: str, source: list[str]) -> None:
    """Makes links to Markdown outside docs/ downloads, as those to other files are; they would be taken for pages."""

    def link(match: re.Match) -> str:
        is_outside = not (DOCS / page).parent.joinpath(match[1]).resolve().is_relative_to(DOCS)
        return f"](path:{match[1]})" if is_outside else match[0]

    source[0] = re.sub(r"\]\((\.\./[^)#\s]*\.md)(#[^)\s]*)?\)", link, source[0])
