"""Copies of a method, each with a mistake that a reader might make, which a check must catch: a place and a
pattern, as in ("mask swapped", "MFMMAE.decode", "ids_keep, ids_masked", "ids_masked, ids_keep").

A place is a function, a class, or a name that is set at the top of the file, or of another ("common:gather").
The pattern is in its code once, however that is broken into lines; comments and docstrings do not count.
"""

import ast
import contextlib
import io
import re
import sys
import tokenize
import types
from pathlib import Path

import pytest


def code_of(module):
    """(lines without comments and docstrings, syntax tree) of a module's file."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (row, column), (last, _) = token.start, token.end
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column]
        elif token.string.startswith('"""'):
            lines[row - 1: last] = [column * " " + '""', *[""] * (last - row)]
    return lines, ast.parse(source)


def mutant(module, title, *changes):
    """A copy of `module` with all changes: (place, pattern, what stands there instead, place, ...)."""
    sources = {module: code_of(module)}
    for place, pattern, wrong in zip(*[iter(changes)] * 3, strict=True):
        name, _, path = place.rpartition(":")
        home = sys.modules[name or module.__name__]
        lines, node = sources.setdefault(home, code_of(home))
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
        exec(compile("\n".join(sources[home][0]), title, "exec"), copy.__dict__)
        setattr(copies[module], home.__name__.split(".")[-1], copy)
    return copies[module]


def checks(module, mistakes):
    """The test that the checks {(check, case): [(what is wrong, changes ...)]} pass, and that each mistake fails."""
    rows = [(*key, row) for key, rows in mistakes.items() for row in [("true", ), *rows]]
    @pytest.mark.parametrize("check, case, mistake", rows, ids=[f"{row[0].__name__}: {row[2][0]}" for row in rows])
    def test(check, case, mistake):
        copy = mutant(module, *mistake)
        with pytest.raises((AssertionError, ValueError)) if len(mistake) > 1 else contextlib.nullcontext():
            check(copy, case)
    return test
