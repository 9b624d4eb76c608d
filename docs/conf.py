"""Sphinx builds the site with this: `make docs` writes it to docs/_build."""

from __future__ import annotations

import importlib
import inspect
import os
import shutil
import sys
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))
# argparse breaks its lines at the width of the terminal.
os.environ["COLUMNS"] = "88"
os.environ["NO_COLOR"] = "1"

from cudagraph_jax.version import __version__  # noqa: E402

project = "cudagraph_jax"
author = copyright = "the cudagraph_jax authors"
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"cudagraph_jax {__version__}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
# The outputs that are committed are shown; `make notebooks` is what executes.
nb_execution_mode = "off"
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
# Docstrings have names in single backticks.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_preprocess_types = True


def copy_notebooks() -> None:
    """Notebooks stand outside this folder, and Sphinx reads only what is inside."""
    folder = DOCS / "notebooks"
    folder.mkdir(exist_ok=True)
    sources = {path.name: path for path in (DOCS.parent / "notebooks").glob("*.ipynb")}
    for name, source in sources.items():
        copy = folder / name
        # A copy that is the same stays as it is, so that Sphinx does not read it again.
        if not copy.is_file() or copy.read_bytes() != source.read_bytes():
            shutil.copyfile(source, copy)
    for copy in folder.glob("*.ipynb"):
        if copy.name not in sources:
            copy.unlink()


copy_notebooks()


def link_to_copies(app: Sphinx, docname: str, source: list[str]) -> None:
    """Links to notebooks work in the repository, and here lead to the rendered copies."""
    if not docname.startswith("notebooks/"):
        source[0] = source[0].replace("](../notebooks/", "](/notebooks/")
        source[0] = source[0].replace("](../../notebooks/", "](/notebooks/")


def forget_overloads(app: Sphinx) -> None:
    """One signature is shown, the implementation's: overloads are for type checkers."""
    analyzer = ModuleAnalyzer.for_module("cudagraph_jax.dispatch.bucket_jit")
    analyzer.analyze()
    analyzer.overloads.clear()


class ModuleText(SphinxDirective):
    """The docstring of a module, which is Markdown, or a part of it.

    Options:
        The argument is the module's name.
    """

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The paragraphs and tables."""
        module = importlib.import_module(self.arguments[0])
        lines = inspect.cleandoc(module.__doc__ or "").splitlines()
        parent = nodes.container()
        self.state.nested_parse(StringList(lines, module.__file__), 0, parent)
        return list(parent.children)


class CommandHelp(SphinxDirective):
    """What `cudagraph-jax … --help` prints; the arguments are the command's words."""

    optional_arguments = 2

    def run(self) -> list[nodes.Node]:
        """The text, as it is printed."""
        from cudagraph_jax.cli import _parser

        parser = _parser()
        for word in self.arguments:
            (commands,) = parser._subparsers._group_actions
            parser = commands.choices[word]
        text = parser.format_help()
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Sphinx) -> None:
    """Adds what is above."""
    app.add_directive("module-text", ModuleText)
    app.add_directive("command-help", CommandHelp)
    app.connect("builder-inited", forget_overloads)
    app.connect("source-read", link_to_copies)
