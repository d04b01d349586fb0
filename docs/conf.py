"""Settings of the site: `make docs` builds it from these pages and the docstrings into build/docs."""

import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import pyspec.integrations  # noqa: E402

project = "pyspec"
author = "the authors of pyspec"
version = release = pyspec.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "results"]
html_theme = "furo"
html_title = "pyspec"
html_copy_source = False

# Links and anchors are GitHub's, so that a page reads alike in both places.
myst_heading_anchors = 4
highlight_language = "none"
smartquotes = False
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
default_role = "code"
napoleon_use_ivar = True
# Nobody needs another engine to read about how pyspec goes into it.
autodoc_mock_imports = ["llama_cpp", "lm_eval"]
pyspec.integrations.require = lambda package, first, beyond: None


def setup(app):
    # A file outside docs/ is a download, Markdown too, which would be taken for a page that is missing.
    outside = re.compile(r"\]\((\.\./[^)#\s]*\.md)(#[^)\s]*)?\)")
    app.connect("source-read", lambda app, page, source: source.append(outside.sub(r"](path:\1)", source.pop())))
