"""Sphinx: the pages of this folder and the docstrings, as one site (``make docs``)."""

from configparser import ConfigParser
from pathlib import Path

metadata = ConfigParser()
metadata.read(Path(__file__).parent.parent / "setup.cfg")

project = "raco_optim"
author = "The raco_optim authors"
copyright = author
version = release = metadata["metadata"]["version"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "raco_optim"
html_static_path = ["_static"]
html_css_files = ["site.css"]
pygments_style = "default"  # what a diff takes away is red, what it adds green
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_use_rtype = False
default_role = "py:obj"  # `names` in docstrings
