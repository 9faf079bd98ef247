"""The Jinja environment of all templates: undefined names are errors, and statements leave no white space."""

from __future__ import annotations

import functools
import re

import jinja2
from jinja2.ext import Extension

from nsa_gen._resources import templates_dir
from nsa_gen.rendering.layout import fit, tuple_of
from nsa_gen.rendering.literals import number

_STATEMENT = re.compile(r"^[ \t]*#% (.*)$", re.MULTILINE)
_COMMENT = re.compile(r"^[ \t]*#%#.*$", re.MULTILINE)


class _LineStatements(Extension):
    """A line `#% if x` is the statement `{% if x %}`, and a line `#%# words` is a comment of the template.

    Both are comments to Python, so a template can be valid Python. Jinja's own line statements are not used because
    they also remove the blank lines after them.
    """

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        return _STATEMENT.sub(r"{% \1 %}", _COMMENT.sub("{# #}", source))


@functools.cache
def environment() -> jinja2.Environment:
    """The Jinja environment for the generator's templates, from the checkout or the installed package."""
    strict = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_dir()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
        optimized=False,  # folding constants takes a quarter of the time, and there are none
        extensions=["jinja2.ext.do", _LineStatements],
    )
    strict.globals.update(fit=fit, number=number, tuple_of=tuple_of)
    return strict
