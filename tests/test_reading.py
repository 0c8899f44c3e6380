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
from PIL import Image
from safetensors.torch import load_file

from demo.scenes import write_coco
from helpers import write_images

ROOT = Path(__file__).parents[1]
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
    for ours, python in (("'", "_"), (r" x (?=\()", " @ "), (r"\) and \(", "), ("),
                         (r"\[([^]]*)\](\w+)", r"(\2 or \1\2)"), (r"\[(\w+)\]", r"(0 or \1)"),
                         (r"(\d)([A-Za-z])", r"\1*\2")):
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
        if type(value) is int:
            return False
        if type(value) is list and not any(isinstance(place, ast.Tuple) for place in places):
            return value != [] and all(holds(tree, shape, known) for shape in value)
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
                    tree = None if alone and text[:1] != "(" else read(text)
                except SyntaxError:
                    self.problems.append(f"{texts[line]}: cannot be read")
                else:
                    trees |= {line: tree} if tree else {}
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
        except Exception as error:  # one script must not hide what is to be said of the others
            self.problems.append(f"{main.__module__} {flags}: {error!r}")
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


def write_data():
    """Six classes of images, four images with label maps, and a detection set."""
    for split, count in (("train", 4), ("val", 2)):
        for name in "abcdef":
            write_images(Path("data", split, name), count)
        write_images(Path("maps/images", split), 2)
        Path("maps/annotations", split).mkdir(parents=True)
        for index in range(2):
            ids = torch.randint(6, (40, 48), dtype=torch.uint8).numpy()
            Image.fromarray(ids).save(f"maps/annotations/{split}/0{index}.png")
    write_coco("coco", train=4, val=2, size=64)


def pretrain(trace):
    """The methods, in all that changes what is computed; sizes differ where they can."""
    beyond, cae, mfm = (MODULES[name].main for name in METHODS)
    flags = ("--data data/train --model vit_demo --epochs 2 --warmup_epochs 0.5 --batch_size 7 --max_steps 1 "
             "--workers 0 --device cpu --img_size {} --patch_size {} {} --out {}")
    for L, name, more in ((2, "two", "--fuse 1,3 --target lowpass"), (1, "mae", "--fuse none --augment rrc"),
                          (3, "three", "--fuse 0,1,3 --fusion attention"),
                          (2, "again", "--fuse 1,3 --init two/last.pt")):
        trace.run(mfm, flags.format(40, 8, "--mask_ratio 0.6", f"{name} {more}"),
                  L=L, N=25, V=10, M=15, D=128, E=64, P=8, C=3, h=4, d=32)
    for name, mask in (("both", "block"), ("visible", "block"), ("masked", "random")):
        more = f"{name} --supervise {name} --mask {mask} --teacher demo"
        trace.run(cae, flags.format(40, 8, "--mask_ratio 0.4", more),
                  N=25, V=15, M=10, D=128, R=96, C=64, P=8, d=24)
    for task in MODULES["beyond_masking"].TASKS:
        ratio, hidden = ("--mask_ratio 0.6", dict(V=19, M=30)) if "mask" in task else ("", dict(V=49))
        R = dict(zoom_in=36, zoom_out=20).get(task.removeprefix("mask+"), 28)
        trace.run(beyond, flags.format(28, 4, ratio, f"{task} --task {task}"),
                  **hidden, N=49, D=128, E=64, P=4, S=28, R=R)
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
        for kind in ("r", "sketch"):
            run("robustness", f"tuned_{name} --data data/val --batch_size 6 --kind {kind}")
    # From here on, the position tables get another size.
    for head in ("upernet", "linear"):
        run("segment", f"two --data maps --img_size 32 --num_classes 6 --channels 24 --head {head} "
            "--batch_size 2 --steps 1 --warmup_steps 0", N=16, V=16, H=32, W=32, others="VDP")
    run("detect", "two --data coco --out detect --img_size 64 --window 4 --channels 24 --global_blocks 2 "
        "--rois 8 --batch_size 2 --epochs 1 --warmup_epochs 0.5", N=64, V=64, S=64, others="VDP")
    # As the authors of Beyond Masking save an encoder of grey images: without positions, which are 14 x 14.
    state = load_file("decolor/encoder.safetensors")
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :1]
    state |= {name.replace("qkv.", f"{part}_"): state[name][:128] for name in [*state] for part in "qv"
              if name.endswith("qkv.bias")}
    state = {name: state[name] for name in state if not name.endswith(("qkv.bias", "pos_embed"))}
    torch.save(state, "theirs.pth")
    run("features", "theirs.pth --data data --img_size 28 --out g.safetensors", P=4, V=49, others="VDP")


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """What was seen when all scripts ran."""
    trace = Trace({MODULES[name].__file__: SOURCES[name] for name in NAMES})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("reading"))
        # Another width than the encoder's, so that a layer lies between.
        patch.setitem(MODULES["cae_v2"].SIZES["vit_demo"], "regressor_dim", 96)
        write_data()
        pretrain(trace)
        evaluate(trace)
    return trace


def test_every_shape_comment_is_true(trace):
    found = trace.report()
    assert not found, "\n".join(["", *found])


def mutants(text):
    """Other shapes: a number more, one place less, no class token, two letters swapped."""
    yield re.sub(r"\d+(?=\D*$)", lambda number: str(int(number[0]) + 1), text)
    yield re.sub(r"\(\s*[^(),]+, (?=[^()]*,)", "(", text)
    yield re.sub(r"1\+(\w)", r"\1", text)
    for one, other in itertools.combinations(sorted(letters(read(text))), 2):
        if one + other not in ("hw", "HW", "PQ") and f"{one} or {other}" not in text:  # these are equal
            yield re.sub(r"[A-Za-z]+", lambda word: {one: other, other: one}.get(word[0], word[0]), text)


def test_a_false_shape_comment_is_found(trace):
    """Each comment, made false in several ways, is reported, but for a few whose letters occur only there."""
    missed, count = [], 0
    for file, (texts, trees, _, key) in trace.files.items():
        for line in trees:
            comment = texts[line].split("# ", 1)[1]
            comment = comment[:comment.rindex(")") + 1]
            calls = [call for call in trace.calls[file].values() if line in {event[0] for event in call[1]}]
            if not calls or any(false_lines(call, trees, key) for call in calls):
                continue
            for other in {*mutants(comment)} - {comment}:
                count += 1
                if not any(false_lines(call, trees | {line: read(other)}, key) for call in calls):
                    missed.append(f"{texts[line]} could as well be {other}")
    assert count > 200 and len(missed) < count / 40, "\n".join(["", *missed])


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


def prose(name):
    """(the card, all comments and strings below)."""
    card = MODULES[name].__doc__
    strings = [node.value for node in ast.walk(ast.parse(SOURCES[name])) if isinstance(node, ast.Constant)]
    texts = [text for text in strings if isinstance(text, str) and text != card]
    return card, "\n".join(texts + [text for _, text, _ in comments(SOURCES[name])])


@pytest.mark.parametrize("name", NAMES)
def test_every_tag_has_a_legend(name):
    """The card explains the tags of the file, and no others: in a paragraph
    `Sources: [code] the authors' code, ...`, or as in `[F] is a fork` and `[F]: a fork`."""
    card, rest = prose(name)
    sources = (re.findall(r"Sources?:.*?(?=\n *\n|\n  \[D|\Z)", card, re.S) or [""])[0]
    tag = r"(?<![\w\]).'\"`])\[([a-z]+|[A-Z])\]"
    explained = re.findall(tag, sources) + re.findall(f"{tag}(?=:| is )", card)
    used = re.findall(tag, card.replace(sources, "") + rest)
    assert sorted(set(explained)) == sorted(set(used))


@pytest.mark.parametrize("name", NAMES)
def test_every_decision_is_declared_and_used(name):
    card, rest = prose(name)
    declared = re.findall(r"^  \[(D\d+)\] \S", card, re.M)
    assert sorted(declared) == sorted(set(re.findall(r"\[(D\d+)\]", rest)))


def wrong_recipe(card, config, numeric):
    """What is wrong with the paragraph `Recipe ...: field value, field value` of a card."""
    text = re.search(r"^ *Recipe\b[^:]*:(.*?)(?=\n *\n|\Z)", card, re.S | re.M)
    text = re.sub(r"\[\w+\]", "", text[1]).strip(" .\n") if text else ""
    pairs = dict(pair.split() for pair in text.split(",") if pair)
    return [f"{name} is {config.get(name)}, not {pairs.get(name, 'said')}"
            for name in sorted(pairs.keys() | numeric) if name not in pairs or name not in config
            or type(config[name])(pairs[name]) != config[name]]


@pytest.mark.parametrize("name", METHODS)
def test_every_recipe_is_that_of_the_card(name, capsys, tmp_path):
    """The numbers in the card are those that the dry run of ViT-B prints."""
    MODULES[name].main(["--model", "vit_b", "--dry_run", "--out", str(tmp_path / "run")])
    config = json.loads(re.search(r"^recipe +(\{.*\})$", capsys.readouterr().out, re.M)[1])
    numeric = {field for field in MODULES[name].Config.__annotations__ if type(config[field]) in (int, float)}
    assert len(numeric) >= 6 and wrong_recipe(MODULES[name].__doc__, config, numeric) == []


def test_a_wrong_recipe_is_found():
    card = "MIM.\n\nRecipe (ViT-B): epochs 300 [code],\n  lr 1.5e-3, mask block.\n\nMore."
    config = dict(epochs=300, lr=0.0015, mask="block", clip=3.0)
    assert wrong_recipe(card, config, {"epochs", "lr"}) == []
    assert wrong_recipe(card, config, {"clip"}) == ["clip is 3.0, not said"]
    assert wrong_recipe(card, config | dict(lr=0.1), {"lr"}) == ["lr is 0.1, not 1.5e-3"]
    assert wrong_recipe(card, dict(epochs=300, lr=0.0015), {"lr"}) == ["mask is None, not block"]
    assert wrong_recipe("MIM.", config, {"lr"}) == ["lr is 0.0015, not said"]


@pytest.mark.parametrize("name", METHODS)
def test_the_sections_are_the_same(name):
    sections = ["Config", "Corrupt", "Target", "Model", "Loss", "Preview", "Train", "Main"]
    assert re.findall(r"^# -+\n# (\w+)", SOURCES[name], re.M) == sections
    assert SOURCES[name].split('"""', 2)[2].count("Δ") >= 5


@pytest.mark.parametrize("name", ["common", *METHODS])
def test_lines_fit_the_page(name):
    assert [number for number, line in enumerate(SOURCES[name].splitlines(), 1) if len(line) > 100] == []
