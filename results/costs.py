"""Writes results/costs.md: what the papers' runs would cost, computed by `--dry_run`.

    python -m results.costs [OUT.md]"""

import contextlib
import importlib
import io
import os
import re
import sys
from pathlib import Path
from unittest import mock

import common

RUNS = ["cae_v2 --model vit_ti", "cae_v2 --model vit_s", "cae_v2 --model vit_b", "cae_v2 --model vit_l",
        "beyond_masking --model vit_b --task mask", "beyond_masking --model vit_b",
        "beyond_masking --model vit_l", "mfm_mae --model vit_b", "mfm_mae --model vit_b --epochs 800",
        "mfm_mae --model vit_b --fuse none --augment rrc", "mfm_mae --model vit_l"]
HEAD = """# What the papers' runs would cost: an estimate

`python -m results.costs` wrote this from `torchrun --nproc_per_node=8 FILE.py ... --dry_run`: ImageNet-1K (1,281,167
images), the recipe's epochs and batch, eight GPUs. Operations are those of torch's counter for forward and backward
pass, the teacher's included. Hours are for 40 % of the dense bf16 peak (A100 312, H100 and H200 989 TFLOP/s) and count
neither the reading of images nor evaluations. Memory is the weights, gradients and moments in fp32 and half of what
an fp32 pass keeps, on one of the GPUs. Nothing of it was measured.

| run | GFLOP per image | EFLOP in all | hours on 8 A100 | 8 H100 | 8 H200 | GiB of memory per GPU | last.pt, GiB |
|---|---|---|---|---|---|---|---|
"""
PATTERNS = (r"cost +([\d.]+) GFLOP", r"([\d.]+) EFLOP", r"A100 ([\d.]+)", r"H100 ([\d.]+)", r"H200 ([\d.]+)",
            r"roughly ([\d.]+) GiB", r"previous.pt ([\d.]+) GiB")


def row(command):
    """The row of one run."""
    name, *flags = command.split()
    with contextlib.redirect_stdout(io.StringIO()) as out, mock.patch.dict(os.environ, WORLD_SIZE="8"):
        importlib.import_module(name).main([*flags, "--dry_run"])
    values = [re.search(pattern, out.getvalue())[1] for pattern in PATTERNS]
    return f"| `{name}.py {' '.join(flags)}` | {' | '.join(values)} |\n"


def main(path=Path(__file__).with_name("costs.md")):
    text = HEAD + "".join(map(row, RUNS))
    common.write_atomically(path, lambda file: file.write_text(text))


if __name__ == "__main__":
    common.run_main(lambda: main(*sys.argv[1:]))
