"""What the text says is executed: shapes in comments (docs/shapes.py) while all scripts run; tags, decisions, recipes."""

import ast
import importlib
import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from demo.scenes import write_coco
from docs.shapes import Trace, comments, false_lines, letters, read
from helpers import ROOT, write_images
from test_segment import write_maps

METHODS = ["beyond_masking", "cae_v2", "mfm_mae"]
NAMES = ["common", *METHODS, *(f"eval.{path.stem}" for path in sorted((ROOT / "eval").glob("*.py")))]
MODULES = {name: importlib.import_module(name) for name in NAMES}
SOURCES = {name: Path(module.__file__).read_text(encoding="utf-8") for name, module in MODULES.items()}


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
