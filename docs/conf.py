"""Sphinx: the pages of this folder and the docstrings, as one site (``make docs``)."""

import re
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

metadata = ConfigParser()
metadata.read(Path(__file__).parent.parent / "setup.cfg")

project = "raco_optim"
author = "The raco_optim authors"
copyright = author
version = release = metadata["metadata"]["version"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "notebooks"]
html_theme = "furo"
html_title = "raco_optim"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
pygments_style = "default"  # what a diff takes away is red, what it adds green
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_use_rtype = False
default_role = "py:obj"  # `names` in docstrings

# docutils would put the index of an accented letter below it; the empty group prevents that.
ACCENT = re.compile(r"(\\(?:hat|tilde)\s*(?:\\?[a-zA-Z]+|\{[^{}]*\}))(?=[_^])")


def formula(writer: HTML5Translator, node: nodes.Element, block: bool) -> None:
    """Writes a formula as MathML, which browsers draw without a script and without a network."""
    try:
        shown = tex2mathml(ACCENT.sub(r"{\1{}}", node.astext()), as_block=block)
        # A bar is part of a norm or a condition; browsers set it as an operator, with space.
        shown = shown.replace('stretchy="false">|', 'stretchy="false" lspace="0" rspace="0">|')
        # Of \langle and \rangle, which TeX draws as high as the text.
        shown = re.sub("<mo>([⟨⟩])</mo>", r'<mo stretchy="false">\1</mo>', shown)
    except MathError as error:
        logging.getLogger(__name__).warning(
            "The formula %r cannot be shown: %s", node.astext(), error, location=node
        )
    else:
        writer.body.append(f'<div class="formula">{shown}</div>' if block else shown)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Registers the renderer of formulas."""
    app.add_html_math_renderer(
        "mathml",
        (lambda writer, node: formula(writer, node, block=False), None),
        (lambda writer, node: formula(writer, node, block=True), None),
    )
