"""What the README promises, held against the code."""

import dataclasses
import importlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

import common
from helpers import ROOT, TINY, config_of, environment, finish, start

README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLE = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|\n").split("|")]
                                           for line in README.splitlines() if line.startswith("|"))}
METHODS = {"MFM": "mfm_mae", "Beyond Masking": "beyond_masking", "CAE v2": "cae_v2"}
MODELS = dict(vit_ti=3, vit_s=6, vit_b=12, vit_l=16, vit_h=16)  # with timm's heads
EVALS = ["detect", "features", "finetune", "frequency", "knn", "linear_probe", "robustness", "segment", "shrink", "speed"]


def test_flags_files_and_commands_exist():
    scripts = map(importlib.import_module, [*METHODS.values(), *(f"eval.{name}" for name in EVALS)])
    flags = {field.name for script in scripts for field in dataclasses.fields(script.Config)}
    others = re.sub(r"(?m)^#SBATCH.*|--max-restarts", "", README)  # SLURM's and torchrun's
    torchrun = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}
    named = set(re.findall(r"--([a-z_]+)", others)) - {"form", "reference"} - torchrun
    assert len(named) > 10 and named - flags == set()
    made = {"preview.png", "log.jsonl", "encoder.safetensors", "last.pt", "previous.pt", "eval.jsonl"}
    files = set(re.findall(r"[`(\"]([\w/-]+\.(?:py|md|cff|png|jsonl|safetensors|pt))[`)\"]", README)) - made
    assert len(files) > 5 and [file for file in files if not (ROOT / file).exists() and file[:5] != "runs/"] == []
    for target in re.findall(r"^make ([\w-]+)", README, re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    for name, flags in re.findall(r"`(?:python|torchrun --nproc_per_node=8) (\w+)\.py ([^`]*)`", README):
        config_of(importlib.import_module(name), flags)


@pytest.mark.parametrize("title, size", [(title, size) for title in METHODS for size in MODELS
                                         if size != "vit_h" or title == "MFM"])
def test_sizes_and_costs_are_those_of_the_code(title, size, capsys):
    cells = {name.removeprefix(f"{title}: "): row[TABLE[""].index(size)] for name, row in TABLE.items()
             if name.startswith(f"{title}: ")}
    module = importlib.import_module(METHODS[title])
    s, inner = module.SIZES[size], "regressor" if title == "CAE v2" else "decoder"
    numbers = " / ".join(str(s[f"{inner}_{name}"]) for name in ("dim", "depth", "heads"))
    assert [cell for name, cell in cells.items() if name.startswith(inner)] == [numbers]
    module.main(["--model", size, "--dry_run"])
    cost = re.search(r"cost +([\d.]+) GFLOP", capsys.readouterr().out)[1]
    assert [cell for name, cell in cells.items() if name.startswith("GFLOP")] == [cost]
    assert s["num_heads"] == (12 if title == "CAE v2" and size in ("vit_ti", "vit_s") else MODELS[size])
    hidden = config_of(module, f"--model {size}").num_masked
    assert title != "CAE v2" or cells["hidden patches of 196"] == str(hidden)


def test_the_snippet_runs_and_wrong_lines_are_counted(tmp_path):
    snippet, path = re.search(r"```python\n(.*?)```", README, re.S)[1], "runs/cae_v2_demo/encoder.safetensors"
    common.save_encoder(common.ViT(32, 4, embed_dim=32, depth=2, num_heads=2), tmp_path / "encoder.safetensors")
    assert path in snippet
    exec(snippet.replace(path, str(tmp_path / "encoder.safetensors")), names := {})
    assert names["tokens"].shape == (2, 65, 32)
    torch.testing.assert_close(names["vit"].norm(names["features"][1]), names["tokens"])
    # Rows with a mistake of the tests of the methods; the others are true copies.
    modules = [importlib.import_module(f"test_{name}") for name in METHODS.values()]
    rows = [row for module in modules for row in module.test_checks.pytestmark[0].args[1]]
    assert f"{sum(len(mistake) > 1 for *_, mistake in rows)} wrong lines" in README


def test_importing_does_nothing_but_define(tmp_path):
    """Importing a method neither draws a number nor writes a file, and only teachers need open_clip."""
    code = ("import torch; before = torch.get_rng_state(); import beyond_masking, cae_v2, mfm_mae, sys; "
            "assert torch.equal(before, torch.get_rng_state()); assert 'open_clip' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("script, more, words", [
    ("mfm_mae", "", "done"), ("mfm_mae", "--data=scenes", "demo/"), ("cae_v2", "--teacher=demo", "demo/")])
def test_a_method_and_common_are_all_that_it_needs(tmp_path, data, script, more, words):
    """Copied away they run on any folder of images; what needs demo/ says so."""
    for file in (f"{script}.py", "common.py"):
        shutil.copy(ROOT / file, tmp_path)
    argv = [*(word for word in TINY if "teacher" not in word), "--data", data, "--max_steps=1", *more.split()]
    code, out, err = finish(start(*argv, "--out", tmp_path / "run", script=[tmp_path / f"{script}.py"]))
    assert words in out + err and code == (words != "done"), err
