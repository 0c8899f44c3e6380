"""What the text says is executed: shapes in comments while all scripts run; tags, decisions and recipes.

A shape comment ends a statement, with or without words around it, and is about what is assigned, returned,
appended or looped over. `# (B, 1+V, D)` is a tensor, or each tensor of a tuple or list; `(B, V), (B, M)` a
tuple of two; `L x (B, D)` a list of L; `(3,) or (B, 3)`, `M or N` and `[1+]N` leave a choice; `(..., D)` ends
in D. A letter is the int variable of that name, if the function has one. Otherwise it is a word of the file's
dimension key, and has one value during a call of the function.
"""

import ast
import importlib
import io
import itertools
import json
import os
import re
import sys
import tokenize
from pathlib import Path

import pytest
import torch

from demo.scenes import write_coco
from helpers import ROOT, write_images
from test_segment import write_maps

METHODS = ["beyond_masking", "cae_v2", "mfm_mae"]
NAMES = ["common", *METHODS, *(f"eval.{path.stem}" for path in sorted((ROOT / "eval").glob("*.py")))]
MODULES = {name: importlib.import_module(name) for name in NAMES}
SOURCES = {name: Path(module.__file__).read_text(encoding="utf-8") for name, module in MODULES.items()}


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

    def run(self, main, flags="", others="NVMDP", **known):
        """main(argv), watched; `known` is what the letters of its file are, `others` those of all files."""
        def enter(frame, event, arg):
            file = frame.f_code.co_filename
            if file in self.files and frame.f_code.co_name[0] != "<":  # "<listcomp>" is part of its function
                own = file == main.__code__.co_filename
                return self.watch(file, {name: size for name, size in known.items() if own or name in others})
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

    def report(self):
        """What failed, cannot be read, was not executed, or is false, as FILE:LINE: # COMMENT: WHAT."""
        found = list(self.problems)
        for file, (texts, trees, _, key) in self.files.items():
            seen, wrong = set(), {}
            for call in self.calls[file].values():
                seen |= {event[0] for event in call[1]}
                wrong = false_lines(call, trees, key) | wrong
            wrong |= dict.fromkeys(trees.keys() - seen, "was not executed, or ends no statement with a value")
            found += [f"{texts[line]}: {wrong[line]}" for line in sorted(wrong)]
        return found


def pretrain(trace):
    """The methods, in all that changes what is computed; sizes differ where they can."""
    beyond, cae, mfm = (MODULES[name].main for name in METHODS)
    flags = ("--data data/train --model vit_demo --epochs 2 --warmup_epochs 0.5 --batch_size 7 --max_steps 1 "
             "--workers 0 --device cpu --img_size {} --patch_size {} {} --out {}")
    for L, name, more in ((2, "two", "--fuse 1,3 --target lowpass"), (1, "mae", "--fuse none --augment rrc"),
                          (3, "three", "--fuse 0,1,3 --fusion attention")):
        trace.run(mfm, flags.format(40, 8, "--mask_ratio 0.6", f"{name} {more}"),
                  L=L, N=25, V=10, M=15, D=128, E=64, P=8, C=3, h=4, d=32)
    for name, mask in (("both", "block"), ("visible", "block"), ("masked", "random")):
        more = f"{name} --supervise {name} --mask {mask} --teacher demo"
        trace.run(cae, flags.format(40, 8, "--mask_ratio 0.4", more), N=25, V=15, M=10, D=128, R=96, C=64, P=8, d=24)
    for task in MODULES["beyond_masking"].TASKS:
        hide, size = ("--mask_ratio 0.6", dict(V=19, M=30)) if "mask" in task else ("", dict(V=49))
        R = dict(zoom_in=36, zoom_out=20).get(task.removeprefix("mask+"), 28)
        trace.run(beyond, flags.format(28, 4, hide, f"{task} --task {task}"), N=49, D=128, E=64, P=4, S=28, R=R, **size)
    # As other projects call the encoder.
    vit, mask = MODULES["common"].ViT(40, 8, embed_dim=128, depth=1, num_heads=4), torch.arange(25) < 15
    trace.run(lambda argv: vit(torch.zeros(7, 3, 40, 40), mask.expand(7, -1)), N=25, V=10, M=15, D=128, P=8)


def evaluate(trace):
    """The evaluations, of encoders that `pretrain` made."""
    def run(name, flags, **changes):
        known = dict(D=128, N=25, V=25, K=6, P=8, H=4, d=32) | changes
        trace.run(MODULES[f"eval.{name}"].main, f"--workers 0 --device cpu --checkpoint {flags}", **known)
    run("knn", "two --data data --batch_size 12", k=20)
    run("frequency", "two --data data --batch_size 12")
    run("features", "two --data data --batch_size 8 --tokens patches --layers 1,-1 --out f.safetensors")
    run("linear_probe", "two --data data --protocol ridge")
    short = "two --data data --epochs 1 --warmup_epochs 0"
    for more in ("", "--attentive"):
        run("linear_probe", f"{short} --batch_size 8 --micro_batch 4 --fresh {more}")
    for name, more in (("cae_v2", "--pool mean"), ("mae", "--pool cls")):
        run("finetune", f"{short} --batch_size 6 --micro_batch 3 --out tuned_{name} --recipe {name} {more}")
        run("robustness", f"tuned_{name} --data data/val --batch_size 6 --kind r")
    # From here on, the position tables get another size.
    for head in ("upernet", "linear"):
        run("segment", f"two --data maps --img_size 32 --num_classes 6 --ignore_index 11 --channels 24 --head {head} "
            "--batch_size 2 --steps 1 --warmup_steps 0", N=16, V=16, H=32, W=32, others="VDP")
    run("detect", "two --data coco --out detect --img_size 64 --window 4 --channels 24 --global_blocks 2 "
        "--rois 8 --batch_size 2 --epochs 1 --warmup_epochs 0.5", N=64, V=64, S=64, others="VDP")
    run("features", "theirs.pth --data data --img_size 28 --num_heads 4 --out g.safetensors", P=4, V=49, D=48, d=12,
        others="VDP")


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """What was seen when all scripts ran: with six classes of images, four images with label maps, a detection set, and
    an encoder of grey images with neither positions nor key biases, as the authors of Beyond Masking save it."""
    trace = Trace({MODULES[name].__file__: SOURCES[name] for name in NAMES})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("reading"))
        # Another width than the encoder's, so that a layer lies between.
        patch.setitem(MODULES["cae_v2"].SIZES["vit_demo"], "regressor_dim", 96)
        for split, name in itertools.product(("train", "val"), "abcdef"):
            write_images(Path("data", split, name), 4)
        write_maps(Path("maps"), 2)
        write_coco("coco", train=4, val=2, size=64)
        variants = torch.load(ROOT / "tests/golden/beyond_masking.pt")["variants"]
        torch.save(variants["decolorized"]["state_dict"], "theirs.pth")
        pretrain(trace)
        evaluate(trace)
    return trace


def test_every_shape_comment_is_true(trace):
    found = trace.report()
    assert not found, "\n".join(["", *found])


def test_a_false_shape_comment_is_found(trace):
    """Each comment, made false in several ways, is reported, but for a few whose letters occur only there: a number
    more, one place less, no class token, two letters swapped, but for those that are equal."""
    found = {}
    for file, (texts, trees, _, key) in trace.files.items():
        for line in trees:
            calls = [call for call in trace.calls[file].values() if line in {event[0] for event in call[1]}]
            if calls and not any(false_lines(call, trees, key) for call in calls):
                text = texts[line].split("# ", 1)[1]
                text = text[:text.rindex(")") + 1]
                others = {re.sub(r"\d+(?=\D*$)", lambda number: str(int(number[0]) + 1), text),
                          re.sub(r"\(\s*[^(),]+, (?=[^()]*,)", "(", text), re.sub(r"1\+(\w)", r"\1", text)}
                for one, other in itertools.combinations(sorted(letters(read(text))), 2):
                    if one + other not in ("hw", "HW", "PQ") and f"{one} or {other}" not in text:
                        swap = {one: other, other: one}
                        others.add(re.sub(r"[A-Za-z]+", lambda word: swap.get(word[0], word[0]), text))
                found |= {f"{texts[line]} could as well be {other}": any(
                    false_lines(call, trees | {line: read(other)}, key) for call in calls)
                    for other in others - {text}}
    missed = [text for text in found if not found[text]]
    assert len(found) > 200 and len(missed) < len(found) / 40, "\n".join(["", *missed])


PLANTED = '''"""Dimension key: B batch, N patches, D width, P side, Q other side."""
def shapes(x, dim):
    a, b = x, x.sum(2)  # (B, N, D), (B, N)
    a, b = x, x.sum(2)  # (B, N, D), (N, B): false
    b = x.sum(2)  # (B, N), (B, N): false
    for y in (x, x):  # (B, N, dim)
        y = y[:, 1:]  # (B, D, N): false
    both = [x, x]  # B x (B, N, D)
    both.append(x[0])  # (1+N, D): false
    both.append(x[0])  # (P*P, 2*P-2)
    a = x  # (B, N, Z): false
    a = x  # (B, N, Q*Q*Q): false
    if dim == 5:
        a = x  # (B, N): not executed
    if b is not None:  # (B, N, D): no value
        a = x  # (B N, D): cannot be read
    return x.sum(0)  # (..., N, D) or (N,), and this is text (see above)
'''


def test_planted_comments():
    scope, trace = {}, Trace({"planted.py": PLANTED})
    exec(compile(PLANTED, "planted.py", "exec"), scope)
    trace.run(lambda argv: scope["shapes"](torch.zeros(2, 9, 4), 4))
    planted = [line for line, text in enumerate(PLANTED.splitlines(), 1) if re.search(r"# .*\): ", text)]
    assert sorted(int(message.split(":")[1]) for message in trace.report()) == planted


@pytest.mark.parametrize("name", NAMES)
def test_every_tag_and_decision_is_explained_and_used(name):
    """The card explains the tags of the file, and no others: in a paragraph `Sources: [code] the authors' code, ...`,
    or as in `[F] is a fork` and `[F]: a fork`. Decisions are declared as `  [D1] Text`."""
    card, strings = MODULES[name].__doc__, [getattr(node, "value", "") for node in ast.walk(ast.parse(SOURCES[name]))]
    rest = [text for text in strings if isinstance(text, str) and text != card]
    rest = "\n".join(rest + [text for _, text, _ in comments(SOURCES[name])])
    sources = (re.findall(r"Sources?:.*?(?=\n *\n|\n  \[D|\Z)", card, re.S) or [""])[0]
    tag = r"(?<![\w\]).'\"`])\[([a-z]+|[A-Z])\]"
    explained = re.findall(tag, sources) + re.findall(f"{tag}(?=:| is )", card)
    assert sorted(set(explained)) == sorted({*re.findall(tag, card.replace(sources, "") + rest)})
    declared = re.findall(r"^  \[(D\d+)\] \S", card, re.M)
    assert sorted(declared) == sorted({*re.findall(r"\[(D\d+)\]", rest)})


@pytest.mark.parametrize("name", METHODS)
def test_every_recipe_is_that_of_the_card(name, capsys, tmp_path):
    """`Recipe ...: field value, field value` in the card: all numbers of the dry run of ViT-B, and equal to them."""
    MODULES[name].main(["--model", "vit_b", "--dry_run", "--out", str(tmp_path / "run")])
    config = json.loads(re.search(r"^recipe +(\{.*\})$", capsys.readouterr().out, re.M)[1])
    said = re.search(r"^Recipe\b[^:]*:(.*?)\n *\n", MODULES[name].__doc__, re.S | re.M)[1]
    said = {field: type(config[field])(value) for field, value in map(str.split, said.split(","))}
    numeric = {field for field in MODULES[name].Config.__annotations__ if type(config[field]) in (int, float)}
    assert said == {field: config[field] for field in said} and numeric <= said.keys() and len(numeric) >= 6


@pytest.mark.parametrize("name", ["common", *METHODS])
def test_the_sections_are_the_same_and_lines_fit_the_page(name):
    assert [number for number, line in enumerate(SOURCES[name].splitlines(), 1) if len(line) > 100] == []
    if name in METHODS:
        sections = ["Config", "Corrupt", "Target", "Model", "Loss", "Preview", "Train", "Main"]
        assert re.findall(r"^# -+\n# (\w+)", SOURCES[name], re.M) == sections
        assert SOURCES[name].split('"""', 2)[2].count("Δ") >= 5
