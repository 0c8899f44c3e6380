"""results/: claims.py from its runs to its tables, its plots and costs.md; that a number on a page is one of a log."""

import json
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import Future

import pytest
import torch

import common
from docs import exercises
from helpers import ROOT, environment
from results import claims, costs, miniature


def run(*argv, code=0, **more):
    """`python -m results.claims`: what it printed."""
    done = subprocess.run([sys.executable, "-m", "results.claims", *map(str, argv)], cwd=ROOT, text=True,
                          capture_output=True, env=environment(**more))
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_what_is_published_is_what_the_log_says(tmp_path):
    """Tables and plots are made anew from the log alone, byte for byte, and so is costs.md."""
    (tmp_path / "logs").mkdir()
    shutil.copy(ROOT / "results/logs/claims.jsonl", tmp_path / "logs")
    claims.report(tmp_path / "logs/claims.jsonl", "cpu", tmp_path)
    costs.main(tmp_path / "costs.md")
    text = (tmp_path / "claims.md").read_text()
    made = sorted(path.name for path in tmp_path.glob("*.*"))
    assert [name for name in made if (tmp_path / name).read_bytes() != (ROOT / "results" / name).read_bytes()] == []
    svgs = sorted(path.name for path in (ROOT / "results").glob("*.svg"))
    assert made == [*svgs, "claims.md", "costs.md"] and re.findall(r"\((claim\d\.svg)\)", text) == svgs


def test_smoke(tmp_path):
    """Every run of every claim, then again: nothing is left to do. A cut line is done anew; a run can be repeated."""
    smoke = ["--tier=smoke", "--data=scenes", f"--runs={tmp_path / 'runs'}", f"--out={tmp_path}"]
    run("all", "--camvid=scenes", "--rebuild", *smoke)
    log = tmp_path / "logs/claims.jsonl"
    lines, pages = log.read_text().splitlines(True), {path: path.read_bytes() for path in tmp_path.glob("claim*")}
    names = [json.loads(line)["name"] for line in lines]
    wanted = {name for claim in range(1, 6) for name in claims.runs(claim, 2)}
    assert len(pages) == 6 and len(names) == len(set(names))
    assert set(names) == wanted | {other for name in wanted for other in claims.rate_runs(name)}
    assert all({"accuracy", "seconds", "commit", "hardware"} <= json.loads(line).keys() for line in lines)
    assert "Not run" not in pages[tmp_path / "claims.md"].decode()
    log.write_text("".join(lines[:-1]) + lines[-1][:20])  # as after a kill, were it not written atomically
    out = run("all", "--camvid=scenes", "--rebuild", *smoke)
    assert json.loads(lines[-1])["name"] in out and len(re.findall(r"%$", out, re.M)) == 1
    assert {path: path.read_bytes() for path in pages} == pages
    first, second = re.findall(r"^(?:logged|again): +(.*)$", run("cae_v2/masked/0.5/S/1", *smoke), re.M)
    for key in ("accuracy", "loss", "rate"):
        assert re.search(rf"'{key}': ([\d.]+)", first)[1] == re.search(rf"'{key}': ([\d.]+)", second)[1]
    assert "no claim and no run" in run("6", *smoke, code=1)
    log.unlink()
    assert "has no line in" in run("cae_v2/masked/0.5/S/1", *smoke, code=1)
    lost = run("3", "--tier=smoke", "--data=nowhere", f"--runs={tmp_path / 'new'}", f"--out={tmp_path}", code=1)
    assert re.search("^error: .*nowhere", lost, re.M) and "Traceback" not in lost


def test_verdicts():
    """95 % of Student's t over the seeds, by scipy's table: 4.30 for three."""
    assert claims.judged("x", [1.0, 2.0, 3.0])[1:] == ["+2.00", "0.58", "does not show"]  # 2 < 4.30 x 0.58
    assert claims.judged("x", [2.0, 3.0, 4.0])[3] == "shows" and claims.judged("x", [-2.0, -3.0, -4.0])[3] == "opposite"
    assert claims.spread([1, 2, 3]) == f"2.0 ± {statistics.stdev([1, 2, 3]):.1f}"


def test_no_choice_sees_a_test_image(tmp_path, monkeypatch):
    """Settings and rates come from the labelled training images that are set apart; fine-tuning never learns them."""
    torch.manual_seed(0)
    monkeypatch.setitem(miniature.TIERS, "smoke", dict(miniature.TIERS["smoke"], labelled=80, chosen_on=20))
    images = [(torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8), torch.arange(count) % 2) for count in (100, 30)]
    common.write_atomically(tmp_path / "smoke/images-00000000.pt", lambda path: torch.save(images, path))
    data = miniature.Data(type("Args", (), dict(tier="smoke", runs=tmp_path, data="", teacher="demo")))
    assert not set(data.chosen_on.tolist()) & set(data.others.tolist())
    assert data.labelled[:20].equal(data.chosen_on) and len(data.labelled) == 80
    vit = common.ViT(32, 4, embed_dim=32, depth=1, num_heads=2)
    first = miniature.probe(vit, data, neighbours=True)
    data.test_labels = 1 - data.test_labels  # other answers, and the same choice
    second = miniature.probe(vit, data, neighbours=True)
    assert first["accuracy_chosen"] == second["accuracy_chosen"] and first["knn_chosen"] == second["knn_chosen"]
    assert first["accuracy"] == pytest.approx(100 - second["accuracy"], abs=0.02)


def test_the_rate_is_the_best_on_the_images_set_apart(tmp_path, monkeypatch):
    """Of three rates at seed 100; the later run gets it."""
    used, ended = {}, []

    def execute(name, rate, args):
        used[name] = rate
        return dict(name=name, tier="smoke", rate=rate, accuracy=-rate, accuracy_chosen=[1, 50 - abs(rate - 2e-3)])

    class Pool:
        def __init__(self, *_):
            pass

        def shutdown(self, cancel_futures):
            ended.append(cancel_futures)

        def submit(self, *call):
            (future := Future()).set_result(call[0](*call[1:]))
            return future

    monkeypatch.setattr(claims, "execute", execute)
    monkeypatch.setattr(claims, "ProcessPoolExecutor", Pool)
    claims.run(["mfm_mae/mae/long/S/0"], type("Args", (), dict(tier="smoke", jobs=1)), tmp_path / "log.jsonl")
    assert used == {**{f"mfm_mae/mae/long/S/100/{rate:g}": rate for rate in claims.RATES}, "mfm_mae/mae/long/S/0": 2e-3}
    assert ended == [True]  # after an error, too, nothing is left in the queue


def test_the_pages_of_exercises_are_those_of_their_log():
    """Each mistake still fits its line; the pages' numbers are those of the runs."""
    done = {line["name"]: line for line in map(json.loads, exercises.LOG.read_text().splitlines())}
    for path, text in exercises.pages(done).items():
        assert path.read_text() == text
    for method, *edit, _, _ in exercises.EXERCISES:
        source = (ROOT / f"{method}.py").read_text()
        compile(wrong := exercises.put_in(source, *edit), method, "exec")
        assert len(wrong.splitlines()) == len(source.splitlines()) and wrong != source


def test_the_readme_quotes_the_claims():
    found = re.findall(r"([+-]\d+\.\d\d) \(s\.e\. (\d\.\d\d)\)", (ROOT / "README.md").read_text())
    page = (ROOT / "results/claims.md").read_text()
    assert len(found) >= 6 and [cell for cell in found if f"| {cell[0]} | {cell[1]} |" not in page] == []


def test_the_ladder_has_the_losses_of_its_logs():
    """README's rows of 10,000 steps."""
    for method in ("mfm_mae", "beyond_masking", "cae_v2"):
        lines = common.read_log(ROOT / "results/reference" / method)[0]
        losses = {line["step"]: line["loss"] for line in lines}
        command = json.loads((ROOT / "results/reference" / method / "config.json").read_text())["command"]
        row = next(line for line in (ROOT / "README.md").read_text().splitlines() if "10,000 steps, " in line
                   and command.split(" --out")[0] in line)
        assert ", ".join(f"{losses[step]:.2f}" for step in (100, 1000, 10_000)) in row
