"""The site: `make docs`. Pages are Markdown (MyST); the reference comes from docstrings."""

import sys
from pathlib import Path

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

sys.path[:0] = [str(Path(__file__).parent / "_ext"), str(Path(__file__).parents[1])]

project = "FoMoE on Flower"
author = "The FoMoE on Flower authors"
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml"]
exclude_patterns = ["_build", "_ext"]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "description"
autodoc_member_order = "bysource"
# The default is the value and not the expression, which may be long.
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_rtype = False
html_math_renderer = "mathml"

html_theme = "furo"
html_title = project
html_copy_source = False
html_show_sphinx = False
# Furo's only scripts are its own, and nothing is fetched from elsewhere.
html_theme_options = {"top_of_page_buttons": []}


def _drop_empty_patterns(app: Sphinx, name: str, source: list[str]) -> None:
    """Leave out a page of the navigation, written with a star, that is not here (yet)."""
    here = Path(__file__).parent
    source[0] = "\n".join(
        line
        for line in source[0].splitlines()
        if not (line.endswith("*") and " " not in line and not list(here.glob(line)))
    )


def setup(app: Sphinx) -> None:
    """Connect what this site does beside its extensions."""
    app.connect("source-read", _drop_empty_patterns)
    # GitHub draws these; the site, which fetches no script, shows their text.
    app.add_lexer("mermaid", TextLexer)
