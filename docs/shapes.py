"""Shapes in comments, read and held against what runs: for the tests, and for the pages of docs/build.py.

A shape comment ends a statement, with or without words around it, and is about what is assigned, returned,
appended or looped over. `# (B, 1+V, D)` is a tensor, or each tensor of a tuple or list; `(B, V), (B, M)` a
tuple of two; `L x (B, D)` a list of L; `(3,) or (B, 3)`, `M or N` and `[1+]N` leave a choice; `(..., D)` ends
in D. A letter is the int variable of that name, if the function has one. Otherwise it is a word of the file's
dimension key, and has one value during a call of the function.
"""

import ast
import io
import os
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def comments(source):
    """(line, text, whether it stands alone) of all comments."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(token.start[0], token.string.lstrip("# "), token.line.lstrip().startswith("#"))
            for token in tokens if token.type == tokenize.COMMENT]


def read(text):
    """A shape comment as a Python expression, None for any other. Raises SyntaxError."""
    spans = [found.span() for found in re.finditer(r"(?<![\w\]])\((?:[^()]|\([^()]*\))*\)", text)
             if "," in found[0] and re.search(r"\b[A-Zb-z]\b|\d|\.\.\.|,\)", found[0])
             or found.start() == 0 and not re.search("[a-z]{2}", found[0])]
    if not spans:
        return None
    text = text[0 if re.match(r"(\w+|\([^()]*\)) x \(", text) else spans[0][0]: spans[-1][1]]
    for ours, python in (("'", "_"), (r" x (?=\()", " @ "), (r"\) and \(", "), ("), (r"(\d)([A-Za-z])", r"\1*\2"),
                         (r"\[([^]]*)\](\w+)", r"(\2 or \1\2)"), (r"\[(\w+)\]", r"(0 or \1)")):
        text = re.sub(ours, python, text)
    return ast.parse(text, mode="eval").body


def letters(tree):
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def holds(tree, value, known):
    """Whether a size, a shape (a tuple) or a list of shapes is what the comment says. A letter that is not in
    `known` gets its value where it is the only one of a size."""
    if isinstance(tree, ast.BoolOp):
        return any(holds(option, value, known) for option in tree.values)
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.MatMult):
        return type(value) is list and holds(tree.left, len(value), known) and holds(tree.right, value, known)
    if isinstance(tree, ast.Tuple):
        places = tree.elts
        if type(value) is list and not any(isinstance(place, ast.Tuple) for place in places):
            return value != [] and all(holds(tree, shape, known) for shape in value)
        if type(value) is int:
            return False
        if ast.unparse(places[0]) == "...":
            places, value = places[1:], value[max(0, len(value) + 1 - len(places)):]
        return len(places) == len(value) and all(holds(*pair, known) for pair in zip(places, value))
    new, code = letters(tree) - known.keys(), compile(ast.Expression(tree), "size", "eval")
    if type(value) is int and len(new) < 2:
        for number in [*range(1, 8 * value + 9), 0] if new else [0]:
            trial = known | dict.fromkeys(new, number)
            if eval(code, {}, trial) == value:
                known.update(trial)
                return True
    return False


def false_lines(call, trees, key):
    """{line: what is there} of a call's false comments; a call: known sizes, [(line, value, variables)]."""
    known, wrong = dict(call[0]), {}
    for line, value, variables in call[1]:
        known |= variables
        names = letters(trees[line])
        if strangers := names - key - variables.keys():
            wrong[line] = f"{', '.join(strangers)} is no word of the dimension key"
        elif not holds(trees[line], value, known):
            wrong[line] = f"is {value}, with {({name: known[name] for name in names & known.keys()})}"
    return wrong


def outcome(node):
    """(last line, code for what a statement gives, lines where that is looked at: none for all).
    `return` has no code, other statements have no last line."""
    match node:
        case ast.For(iter=ast.expr(end_lineno=end)):
            return end, ast.unparse(node.target), range(end + 1, node.end_lineno + 1)
        case ast.Assign() | ast.AugAssign():
            return node.end_lineno, ast.unparse(getattr(node, "target", None) or node.targets[0]), ()
        case ast.Expr(value=ast.Call(func=ast.Attribute(attr="append", value=appended))):
            return node.end_lineno, f"{ast.unparse(appended)}[-1]", ()
    return node.end_lineno if isinstance(node, ast.Return) else 0, "", ()


class Trace:
    """Looks at the shape comments of {file: source} while functions run."""
    def __init__(self, sources):
        self.problems, self.files, self.calls = [], {}, {file: {} for file in sources}
        for file, source in sources.items():
            texts, trees = {}, {}
            for line, text, alone in comments(source):
                texts[line] = f"{os.path.relpath(file, ROOT)}:{line}: # {text}"
                try:
                    if (not alone or text[:1] == "(") and (tree := read(text)):
                        trees[line] = tree
                except SyntaxError:
                    self.problems.append(f"{texts[line]}: cannot be read")
            places = {line: found for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)
                      and (found := outcome(node))[0] in trees for line in range(node.lineno, found[0] + 1)}
            key = re.search(r"Dimension key:(.*?)(\n *\n|\Z)", source.split('"""')[1], re.S)
            key = set(re.findall(r"[A-Za-z]\w*", key[1].replace("'", "_"))) if key else set()
            self.files[file] = texts, trees, places, key

    def run(self, main, flags="", others="NVMDP", own="", **known):
        """main(argv), watched; `known` is what the letters of its file, or of `own`, are, `others` those of all."""
        def enter(frame, event, arg):
            file = frame.f_code.co_filename
            if file in self.files and frame.f_code.co_name[0] != "<":  # "<listcomp>" is part of its function
                letters = known if file == (own or main.__code__.co_filename) else known.keys() & set(others)
                return self.watch(file, {name: known[name] for name in letters})
        before = sys.gettrace()
        sys.settrace(enter)
        try:
            main(flags.split())
        finally:
            sys.settrace(before)

    def watch(self, file, known):
        """What Python calls at each line of a function: once a statement is over, it notes what that gave."""
        (_, trees, places, key), events, now = self.files[file], [], None
        known = {name: known[name] for name in known.keys() & key}
        def note(line, value, variables):
            many, names = isinstance(value, (list, tuple)), letters(trees[line])
            shapes = [tuple(x.shape) for x in (value if many else [value]) if hasattr(x, "shape")]
            ints = {name: x for name, x in variables.items() if name in names and type(x) is int}
            events.append((line, shapes if many else (*shapes, ())[0], ints))
        def step(frame, event, arg):
            nonlocal now
            end, code, lines = now or (0, "", ())
            here = places.get(frame.f_lineno) if event == "line" else None
            if event == "return" and now and not code:
                note(end, arg, frame.f_locals)
            elif event in ("line", "return") and code and here != now:
                if not lines or frame.f_lineno in lines:
                    note(end, eval(code, frame.f_globals, frame.f_locals), frame.f_locals)
                now = None
            now = None if event == "exception" else here or now
            if event == "return" and events:
                self.calls[file][repr((known, events))] = known, events
            return step
        return step

    def report(self, unseen=True):
        """What failed, cannot be read, is false, or (`unseen`) did not run, as FILE:LINE: # COMMENT: WHAT."""
        found = list(self.problems)
        for file, (texts, trees, _, key) in self.files.items():
            seen, wrong = set(), {}
            for call in self.calls[file].values():
                seen |= {event[0] for event in call[1]}
                wrong = false_lines(call, trees, key) | wrong
            if unseen:
                wrong |= dict.fromkeys(trees.keys() - seen, "was not executed, or ends no statement with a value")
            found += [f"{texts[line]}: {wrong[line]}" for line in sorted(wrong)]
        return found
