"""What the tests of training and of the command line share: a tiny run, in this process or its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

import cae_v2
import common

ROOT = Path(__file__).parents[1]

# 16 patches of 8 pixels, and 3 steps an epoch on 24 images: a step takes some 20 ms. The demo's
# teacher has patches of 4 pixels, so it looks at the same crop in 16 pixels.
TINY = (
    "--model=vit_demo --teacher=demo --img_size=32 --patch_size=8 --embed_dim=32 --depth=2 "
    "--num_heads=2 --regressor_dim=32 --regressor_depth=1 --regressor_heads=2 --batch_size=8 "
    "--epochs=4 --warmup_epochs=0.5 --lr=1e-3 --workers=0 --device=cpu --compile=off "
    "--log_every=1"
).split()


def write_images(folder, count=24, size=(48, 40), kind=".png"):
    """A folder of `count` images of noise over a gradient, each another one."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        noise = torch.randint(100, (size[1], size[0], 3), generator=generator)
        ramp = torch.arange(size[0])[:, None] * torch.randint(3, (3,), generator=generator)
        Image.fromarray((noise + ramp).byte().numpy()).save(folder / f"{index:02}{kind}")
    return folder


def call(*argv, main=cae_v2.main):
    """A script's main in this process, as `python cae_v2.py` runs it: its exit code."""
    try:
        common.run_main(lambda: main([str(word) for word in argv]))
    except SystemExit as stop:
        return stop.code or 0
    return 0


def environment(**changes):
    """The environment for a process of its own: one thread, and nothing of a surrounding torchrun."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    }
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **changes}


def start(*argv, script="cae_v2.py", processes=1, group=False, **changes):
    """A script in a process of its own, or in several under torchrun; `group`: in a group of its own.

    `script` is a file of the repository, or `-m eval.NAME` as a list of two words.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = [ROOT / script] if isinstance(script, str) else script
    command = [sys.executable, *(launcher if processes > 1 else []), *script, *argv]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=group,
    )


def finish(process, seconds=120):
    """(exit code, stdout, stderr) of `start`'s process; none outlives its test."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            process.kill()
    return process.returncode, out, err


def read_log(folder):
    """The lines of log.jsonl, which must be JSON in the strict sense: no NaN, no Infinity."""

    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    text = (Path(folder) / "log.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def numbers(folder):
    """What the log says about learning, line by line: without speed and memory."""
    machine = {"images_per_s", "data_wait", "memory_gb", "eta_s"}
    return [{name: line[name] for name in line.keys() - machine} for line in read_log(folder)]


def load(folder):
    """last.pt, by torch's default loader, which takes plain data only."""
    return torch.load(Path(folder) / "last.pt")


def differences(left, right, path=""):
    """The places at which two nested structures of tensors and plain values differ in any bit."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return [] if left.dtype == right.dtype and torch.equal(left, right) else [path]
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        pairs = [(name, left[name], right[name]) for name in left]
    elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)) and len(left) == len(right):
        pairs = [(index, *both) for index, both in enumerate(zip(left, right))]
    else:
        return [] if left == right else [path]
    return [place for name, a, b in pairs for place in differences(a, b, f"{path}/{name}")]


def assert_same_run(ours, theirs):
    """Checkpoint, exported encoder and log of two runs are equal bit for bit; flags may differ."""
    left, right = ({**load(folder), "config": None} for folder in (ours, theirs))
    assert differences(left, right) == []
    assert numbers(ours) == numbers(theirs)
    files = [folder / "encoder.safetensors" for folder in (ours, theirs)]
    assert files[0].read_bytes() == files[1].read_bytes()


def teacher_file(folder, name="test_clip", embed_dim=24, quick_gelu=False, **vision):
    """Registers an open_clip model, writes random weights for it, and gives its `--teacher` value."""
    import open_clip

    vision = dict(image_size=32, patch_size=8, width=32, layers=2, head_width=16) | vision
    config = dict(
        embed_dim=embed_dim,
        quick_gelu=quick_gelu,
        vision_cfg=vision,
        text_cfg=dict(context_length=8, vocab_size=16, width=16, heads=2, layers=1),
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    torch.save(model.state_dict(), folder / f"{name}.pt")
    return f"{name}:{folder / name}.pt"
