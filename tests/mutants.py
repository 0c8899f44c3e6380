"""Copies of a method, each with a mistake that a reader might make, which a check must catch: a place and a
pattern, as in ("mask swapped", "MFMMAE.decode", "ids_keep, ids_masked", "ids_masked, ids_keep").

A place is a function, a class, or a name that is set at the top of the file, or of another ("common:gather").
The pattern is in its code once, however that is broken into lines; comments and docstrings do not count.
"""

import ast
import functools
import io
import re
import sys
import tokenize
import types
from pathlib import Path

import pytest


@functools.cache
def code_of(file):
    """(lines without comments and docstrings, syntax tree) of a file."""
    source = Path(file).read_text(encoding="utf-8")
    lines, tree = source.splitlines(), ast.parse(source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = token.line[: token.start[1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            first, last = node.lineno - 1, node.end_lineno
            lines[first:last] = [node.col_offset * " " + '""', *[""] * (last - first - 1)]
    return lines, tree


def mutant(module, title, *changes):
    """A copy of `module` with all changes: (place, pattern, what stands there instead, place, ...)."""
    sources = {module: list(code_of(module.__file__)[0])}
    for place, pattern, wrong in zip(*[iter(changes)] * 3, strict=True):
        name, _, path = place.rpartition(":")
        home = sys.modules[name or module.__name__]
        lines, node = sources.setdefault(home, list(code_of(home.__file__)[0])), code_of(home.__file__)[1]
        for word in path.split("."):
            node = next((child for child in getattr(node, "body", ()) if word in (
                getattr(child, "name", ""), *map(ast.unparse, getattr(child, "targets", ())))), None)
        first, last = (node.lineno - 1, node.end_lineno) if node else (0, 0)
        words = r"\s*".join(map(re.escape, re.findall(r"\w+|[^\w\s]", pattern)))
        text, count = re.subn(words, lambda _: wrong, "\n".join(lines[first:last]))
        if count != 1:
            pytest.fail(f"{title!r} has lost its anchor: {pattern!r} is {count} times in {place}, not once")
        lines[first:last] = [text, *[""] * (last - first - 1)]
    copies = {home: types.ModuleType(f"{home.__name__}_mutant") for home in sources}
    for home, copy in copies.items():
        copy.__file__ = home.__file__
        exec(compile("\n".join(sources[home]), title, "exec"), copy.__dict__)
        setattr(copies[module], home.__name__.split(".")[-1], copy)
    return copies[module]


def are_caught(module, mistakes):
    """The test of {(check, case): [(what is wrong, changes ...)]}."""
    @pytest.mark.parametrize("check, case, mistake", [
        pytest.param(*key, row, id=row[0]) for key, rows in mistakes.items() for row in rows])
    def test(check, case, mistake):
        wrong = mutant(module, *mistake)
        with pytest.raises((AssertionError, ValueError)):
            check(wrong, case)
    return test
