"""Copies of a method, each with a mistake that a reader might make, which a check must catch: (what is wrong, place,
pattern, what stands there instead, and maybe more places), as in ("not put back", "MFMMAE.decode", ".argsort(dim=1)",
""). A place is a function, a class, or a name that is set at the top of the file, or of another ("common:gather").
The pattern is in its code once, wherever that is broken into lines; comments and docstrings do not count."""

import ast
import contextlib
import inspect
import re
import sys
import tokenize

import pytest


def code_of(name):
    """(lines without comments and docstrings, syntax tree) of a module."""
    source = inspect.getsource(sys.modules[name])
    lines = source.splitlines()
    for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__):
        (row, column), (last, _) = token.start, token.end
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column]
        elif token.string.startswith('"""'):
            lines[row - 1: last] = [column * " " + '""', *[""] * (last - row)]
    return lines, ast.parse(source)


def mutant(module, title, *changes):
    """A copy of `module` with a mistake."""
    sources = {module.__name__: code_of(module.__name__)}
    for place, pattern, wrong in zip(*[iter(changes)] * 3, strict=True):
        name, path = place.split(":") if ":" in place else (module.__name__, place)
        lines, node = sources.setdefault(name, code_of(name))
        for word in path.split("."):
            node = next((child for child in getattr(node, "body", ()) if word in (
                getattr(child, "name", ""), *map(ast.unparse, getattr(child, "targets", ())))), None)
        first, last = (node.lineno - 1, node.end_lineno) if node else (0, 0)
        words = r"\s*".join(map(re.escape, re.findall(r"\w+|[^\w\s]", pattern)))
        text, count = re.subn(words, lambda _: wrong, "\n".join(lines[first:last]))
        if count != 1:
            pytest.fail(f"{title!r} has lost its anchor: {pattern!r} is {count} times in {place}, not once")
        lines[first:last] = [text, *[""] * (last - first - 1)]
    copies = {name: type(sys)(f"{name}_mutant") for name in sources}
    for name, copy in copies.items():
        copy.__file__ = sys.modules[name].__file__
        exec(compile("\n".join(sources[name][0]), copy.__file__, "exec"), copy.__dict__)
        setattr(copies[module.__name__], name.split(".")[-1], copy)
    return copies[module.__name__]


def checks(module, mistakes):
    """The test that the checks {(check, case): mistakes} pass with a true copy of `module`, and fail with others."""
    rows = [(*key, row) for key, rows in mistakes.items() for row in [("true",), *rows]]
    @pytest.mark.parametrize("check, case, mistake", rows, ids=[f"{row[0].__name__}: {row[2][0]}" for row in rows])
    def test(check, case, mistake):
        copy = mutant(module, *mistake)
        with pytest.raises((AssertionError, ValueError)) if len(mistake) > 1 else contextlib.nullcontext():
            check(copy, case)
    return test
