"""What README and cards promise, held against the code."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import beyond_masking
import cae_v2
import common
import mfm_mae
from eval import detect, features, finetune, frequency, knn, linear_probe, robustness, segment

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
METHODS = ["cae_v2.py", "beyond_masking.py", "mfm_mae.py"]


def test_every_flag_in_the_readme_exists():
    scripts = (beyond_masking, cae_v2, mfm_mae, detect, features, finetune, frequency, knn, linear_probe, robustness, segment)
    known = {field.name for script in scripts for field in dataclasses.fields(script.Config)}
    launchers = {"nproc_per_node"}
    named = set(re.findall(r"--([a-z_]+)", README))
    assert len(named) > 10 and named - known - launchers == set()


def test_every_file_in_the_readme_exists():
    made = {"preview.png", "log.jsonl", "encoder.safetensors", "last.pt", "eval.jsonl", "config.json"}
    named = set(re.findall(r"`([\w/]+\.(?:py|md|cff|png|jsonl|safetensors|pt|json))`", README))
    named |= set(re.findall(r"\]\(([\w/]+\.\w+)\)", README))
    missing = {name for name in named - made if not (ROOT / name).exists()}
    assert len(named) > 5 and missing == set()


def test_the_table_of_sizes_is_that_of_the_code():
    rows = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|\n").split("|")]
                                              for line in README.splitlines() if line.startswith("|"))}
    sizes = rows[""] if "vit_ti" in rows.get("", []) else ["vit_ti", "vit_s", "vit_b", "vit_l"]
    for column, size in enumerate(sizes):
        s, config = cae_v2.SIZES[size], cae_v2.Config(**cae_v2.SIZES[size])
        assert rows["width / blocks / heads"][column] == f"{s['embed_dim']} / {s['depth']} / {s['num_heads']}"
        assert rows["regressor width / blocks / heads"][column] == \
            f"{s['regressor_dim']} / {s['regressor_depth']} / {s['regressor_heads']}"
        assert rows["hidden patches of 196"][column] == str(config.num_masked)
        assert rows["layer scale"][column] == str(s["init_values"])


@pytest.mark.parametrize("column, size", [(0, "vit_ti"), (1, "vit_s"), (2, "vit_b"), (3, "vit_l")])
def test_the_cost_in_the_readme_is_that_of_the_dry_run(column, size, capsys, tmp_path):
    cae_v2.main(["--model", size, "--dry_run", "--out", str(tmp_path / "run")])
    out = capsys.readouterr().out
    cost = re.search(r"cost +([\d.]+) GFLOP", out)[1]
    row = next(line for line in README.splitlines() if line.startswith("| GFLOP"))
    assert cost == row.strip("|").split("|")[1 + column].strip()
    assert not (tmp_path / "run").exists()


def test_the_python_snippet_runs(tmp_path):
    snippet = re.search(r"```python\n(.*?)```", README, re.S)[1]
    path = "runs/cae_v2_demo/encoder.safetensors"
    assert path in snippet
    common.save_encoder(common.ViT(32, 4, embed_dim=32, depth=2, num_heads=2), tmp_path / "encoder.safetensors")
    names = {}
    exec(snippet.replace(path, str(tmp_path / "encoder.safetensors")), names)
    assert names["tokens"].shape == (2, 65, 32)
    torch.testing.assert_close(names["vit"].norm(names["features"][1]), names["tokens"])


@pytest.mark.parametrize("module, size, row", [
    *((beyond_masking, size, "Beyond Masking") for size in ("vit_ti", "vit_s", "vit_b", "vit_l")),
    *((mfm_mae, size, "MFM") for size in ("vit_ti", "vit_s", "vit_b", "vit_l", "vit_h"))])
def test_decoders_and_costs_of_the_others(module, size, row, capsys, tmp_path):
    """The second table of sizes, against the code and its dry run."""
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:]] for line in README.splitlines()
             if line.startswith(f"| {row}: ")}
    column = ["vit_ti", "vit_s", "vit_b", "vit_l", "vit_h"].index(size)
    s = module.SIZES[size]
    assert cells[f"{row}: decoder"][column] == f"{s['decoder_dim']} / {s['decoder_depth']} / {s['decoder_heads']}"
    module.main(["--model", size, "--dry_run", "--out", str(tmp_path / "run")])
    cost = re.search(r"cost +([\d.]+) GFLOP", capsys.readouterr().out)[1]
    assert cost == next(values for name, values in cells.items() if "GFLOP" in name)[column]
    assert s["num_heads"] == [3, 6, 12, 16, 16][column]


def test_number_of_mistakes_in_the_readme():
    from tests import test_beyond_masking, test_cae_v2, test_mfm_mae
    count = sum(len(module.MISTAKES) for module in (test_beyond_masking, test_cae_v2, test_mfm_mae))
    assert re.search(rf"{count}\s+wrong lines", README)


@pytest.mark.parametrize("file", METHODS)
def test_every_decision_is_explained_and_used(file):
    """No orphan either way: each [D..] in the code is in the card, each in the card is in the code or says what is not there."""
    source = (ROOT / file).read_text(encoding="utf-8")
    card, code = source.split('"""', 2)[1:]
    explained, used = set(re.findall(r"^  \[(D\d+)\]", card, re.M)), set(re.findall(r"\[(D\d+)\]", code))
    assert explained == used
    assert len(re.findall("Δ", code)) >= 5
    sections = re.findall(r"^# -+\n# (\w+)", source, re.M)
    assert sections == ["Config", "Corrupt", "Target", "Model", "Loss", "Preview", "Train", "Main"]


@pytest.mark.parametrize("file", ["common.py", *METHODS])
def test_lines_fit_the_page(file):
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 100] == []


def test_importing_does_nothing_but_define(tmp_path):
    """Importing a method neither draws a number nor writes a file, and only teachers need open_clip."""
    import subprocess
    import sys
    code = ("import torch; before = torch.get_rng_state(); import beyond_masking, cae_v2, mfm_mae, sys; "
            "assert torch.equal(before, torch.get_rng_state()); assert 'open_clip' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
                   check=True)
    assert list(tmp_path.iterdir()) == []
