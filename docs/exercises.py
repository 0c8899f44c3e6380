"""Eight one-line mistakes that stop nothing and spoil the result: docs/exercises.md asks, docs/answers.md tells.

    python -m docs.exercises            (from the top of the repository)

Each mistake is put into a copy of the code, which then runs the first part of its demo and the linear probe. What
is missing in results/logs/exercises.jsonl is run; both pages are written from that log and from the code."""

import ast
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

ROOT = Path(__file__).resolve().parents[1]
LOG = ROOT / "results/logs/exercises.jsonl"
STEPS = dict(cae_v2=150, mfm_mae=400, beyond_masking=400)  # of the demo; the schedule stays the demo's
TITLES = dict(cae_v2="CAE v2", mfm_mae="MFM", beyond_masking="Beyond Masking")
# Of each: method, function, the right and the wrong text, a hint, the answer.
EXERCISES = [
    ("cae_v2", "CAEv2.forward", "common.mask_to_ids(mask, images", "common.mask_to_ids(~mask, images",
     "How many patches does the encoder see?",
     "In a mask True means hidden. Turned round, the encoder sees the 13 patches that should be hidden and must "
     "guess the other 51."),
    ("cae_v2", "inputs", 'common.normalise(crops[-1], cfg["mean"], cfg["std"])', "crops[-1] / 255",
     "What is the teacher used to?",
     "The teacher was trained on normalised images. With others it still gives features, of a darker, flatter "
     "world, and nothing complains: targets that tell less are even easier to match."),
    ("cae_v2", "CAEv2.forward", "visible=common.gather(targets[:, 1:], ids_keep)",
     "visible=common.gather(targets[:, :-1], ids_keep)", "Which token is the first?",
     "The teacher's class token comes first. Without leaving it out each visible patch gets the target of its left "
     "neighbour. Neighbours look alike, so the loss still falls."),
    ("mfm_mae", "MFMMAE.encode", "ids_keep=ids_keep)\n", "ids_keep=ids_keep, norm=True)\n",
     "How often is a token normed?",
     "The blocks' outputs are fused first and normed once. Here each is normed before the fusion, and the result "
     "once more: the blocks lose their own scales, and shallow ones count as much as deep ones. This demo does not "
     "notice it. The authors' numbers do: `tests/test_mfm_mae.py` fails."),
    ("mfm_mae", "MFMMAE.decode", "dim=1).argsort(dim=1)", "dim=1)",
     "What does `gather` want: where from, or where to?",
     "`cat` lists the place of each token; `gather` wants the token of each place, which is the inverse permutation, "
     "`argsort`. Without it patches stand in wrong places, in another way for each image. The loss stays higher; the "
     "probe of this short run shows nothing."),
    ("mfm_mae", "MFMMAE.decode", "dim=1) + self.decoder_pos_embed", "dim=1)", "What tells two hidden patches apart?",
     "All mask tokens are the same vector; only the position says which patch is meant. Without it all hidden patches "
     "of an image get one and the same prediction, and the loss stands still."),
    ("beyond_masking", "pixel_target", "normalise_patches(center_crop(clean), patch_size)",
     'target["whole"]',
     "In which frame is the prediction of the centre?",
     "The centre of the prediction is compared with the whole image, squeezed: the same shape, another frame. "
     "The loss falls, from a higher start; the probe loses little."),
    ("beyond_masking", "patch_statistics", "pixels, dim=2,", "pixels, dim=3,", "Over what is the mean taken?",
     "Mean and std are those of a patch and colour, over its pixels. Along the last axis they are those of a pixel "
     "over its three colours: what is left to predict is the hue, without light and shade. That is far easier, and "
     "what is easy teaches little: a lower loss is no better loss."),
]


def run(method, edit=None):
    """The line of one run: losses on its way and the probe after it."""
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder, f"{method}.py"), Path(folder, "out")
        for name in ("demo", "eval"):
            shutil.copytree(ROOT / name, Path(folder, name))
        for name in ("common.py", file.name):
            shutil.copy(ROOT / name, folder)
        if edit:
            file.write_text(put_in(file.read_text(), *edit))
        for command in ([file, "--demo", "--max_steps", STEPS[method], "--log_every", "50", "--out", out],
                        ["-m", "eval.linear_probe", "--checkpoint", out, "--data=scenes", "--protocol=ridge"]):
            subprocess.run([sys.executable, *map(str, command)], cwd=folder, check=True, capture_output=True)
        losses = {line["step"]: round(line["loss"], 3) for line in common.read_log(out)[0]}
        probe = json.loads((out / "eval.jsonl").read_text())["accuracy"]
    return dict(losses=losses, probe=round(probe, 1), seconds=round(time.time() - started), commit=common.commit())


def place(source, function):
    """(first, last) line of a function or method, counted from 1."""
    body = ast.parse(source)
    for name in function.split("."):
        body = next(node for node in body.body if getattr(node, "name", "") == name)
    return body.lineno, body.end_lineno


def put_in(source, function, right, wrong):
    """The source with the mistake. Raises ValueError unless the text occurs once in the function."""
    first, last = place(source, function)
    lines = source.splitlines(True)
    text = "".join(lines[first - 1:last])
    if text.count(right) != 1:
        raise ValueError(f"{right!r} occurs {text.count(right)} times in {function}")
    return "".join(lines[:first - 1]) + text.replace(right, wrong) + "".join(lines[last:])


def points(line):
    """{step: loss} of the two to four steps that a table has."""
    return dict(list(line["losses"].items())[1::max(1, len(line["losses"]) // 4)])


def main():
    done = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []
    done = {line["name"]: line for line in done}
    names = [(method, method, None) for method in STEPS] + [
        (f"{number}", method, edit[:3]) for number, (method, *edit) in enumerate(EXERCISES, 1)]
    for name, method, edit in names:
        if name not in done:
            done[name] = dict(name=name, method=method, **run(method, edit))
            common.write_atomically(LOG, lambda path: path.write_text("".join(
                json.dumps(line) + "\n" for line in done.values())))
            print(done[name], flush=True)
    for path, text in pages(done).items():
        common.write_atomically(path, lambda file: file.write_text(text))


def pages(done):
    """{path: text} of the two pages."""
    asked = """# Find the bug

In each of these functions one line is wrong. Nothing stops, nothing warns. The tables show what the mistake does to
the first part of the demo (150 steps of CAE v2, 400 of the others): the loss on its way and the linear probe at its
end, beside those of the right code. One run each, seed 0, so a point or two in the probe mean nothing. Which line is
it, and why does the curve look so? The [answers](answers.md) are on a page of their own. `python -m docs.exercises`
made both pages; its runs are in `results/logs/exercises.jsonl`.
"""
    told = "# Answers\n\nThe questions are in [exercises.md](exercises.md).\n"
    for number, (method, function, right, wrong, hint, answer) in enumerate(EXERCISES, 1):
        source = (ROOT / f"{method}.py").read_text()
        first, last = place(source, function)
        code = "".join(put_in(source, function, right, wrong).splitlines(True)[first - 1:last])
        good, bad = done[method], done[str(number)]
        rows = [["", *(f"loss at {step}" for step in points(good)), "linear probe"], ["---"] * (len(points(good)) + 2)]
        rows += [[name, *(f"{loss:.2f}" for loss in points(line).values()), f"{line['probe']} %"]
                 for name, line in (("right", good), ("with the bug", bad))]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        asked += (f"\n## {number}. {TITLES[method]}, `{function}`\n\n```python\n{code.rstrip()}\n```\n\n{table}\n\n"
                  f"Hint: {hint}\n")
        line = next(line for line in source.splitlines(True)[first - 1:last] if right in line)
        told += (f"\n## {number}. {TITLES[method]}, `{function}`\n\n```diff\n- {line.replace(right, wrong).strip()}\n"
                 f"+ {line.strip()}\n```\n\n{answer} Probe: {good['probe']} % becomes {bad['probe']} %.\n")
    return {ROOT / "docs/exercises.md": asked, ROOT / "docs/answers.md": told}


if __name__ == "__main__":
    common.run_main(main)
