"""What tests share: a tiny run in this process or in its own, what a run wrote, images, a CLIP model."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import cae_v2
import common

ROOT = Path(__file__).parents[1]

# 3 steps an epoch on 24 images, some 30 ms each, of 16 patches (the demo's teacher sees the crop in 16 pixels).
QUICK = ("--model=vit_demo --batch_size=8 --epochs=4 --warmup_epochs=0.5 --workers=0 --device=cpu --compile=off "
         "--log_every=1").split()
TINY = [*QUICK, "--teacher=demo", "--img_size=32", "--patch_size=8", "--lr=1e-3"]


def write_images(folder, count=24, size=(48, 40), kind=".png"):
    """A folder of `count` images of noise over a gradient, each another one."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        noise = torch.randint(100, (size[1], size[0], 3), generator=generator)
        ramp = torch.arange(size[0])[:, None] * torch.randint(3, (3,), generator=generator)
        Image.fromarray((noise + ramp).byte().numpy()).save(folder / f"{index:02}{kind}")
    return folder


def config_of(module, flags=""):
    return common.parse_config(module.Config, "", module.SIZES, module.DEMO, flags.split(), module.DEPENDS)


def call(*argv, main=cae_v2.main):
    """A script's main in this process, as `python cae_v2.py` runs it: its exit code."""
    try:
        common.run_main(lambda: main([str(word) for word in argv]))
    except SystemExit as stop:
        return stop.code or 0
    return 0


def refused(match, call, *arguments, error=ValueError, **more):
    """The call ends with this error and these words."""
    with pytest.raises(error, match=match):
        call(*arguments, **more)


def sentence(text):
    """The line of stderr that begins with error: there is no other, nothing follows it, and no traceback."""
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in text and len(lines) == 1 and text.endswith(lines[0] + "\n"), text
    return lines[0]


def environment(**changes):
    """The environment for a process of its own: one thread, and nothing of a surrounding torchrun."""
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in torchrun}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **changes}


def start(*argv, script="cae_v2.py", processes=1, group=False, **changes):
    """A script (a file of the repository, or the list `-m`, `eval.NAME`) in a process of its own, or in several
    under torchrun; `group`: in a process group of its own; `changes` of the environment."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = [ROOT / script] if isinstance(script, str) else script
    command = [sys.executable, *(launcher if processes > 1 else []), *script, *argv]
    return subprocess.Popen([str(word) for word in command], cwd=ROOT, env=environment(**changes), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=group)


def finish(process, seconds=120):
    """(exit code, stdout, stderr) of `start`'s process; none outlives its test."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            process.kill()
    return process.returncode, out, err


def wait_for(process, happened, seconds=90):
    """Until `happened()`; fails, and ends the process, if that does not come while the process runs."""
    end = time.time() + seconds
    while not happened():
        if time.time() > end or process.poll() is not None:
            process.kill()
            raise AssertionError(f"it did not happen: {process.communicate()}")
        time.sleep(0.02)


def read_log(folder):
    """The lines of log.jsonl, which must be JSON in the strict sense: `int` refuses NaN and Infinity."""
    text = (Path(folder) / "log.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=int) for line in text.splitlines()]


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
    one, two = (dict(enumerate(x)) if isinstance(x, (list, tuple)) else x for x in (left, right))
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return [place for name in one for place in differences(one[name], two[name], f"{path}/{name}")]
    return [] if type(one) is type(two) and not isinstance(one, dict) and one == two else [path]


def assert_same_run(ours, theirs):
    """Checkpoint, encoder file (if any) and log of two runs are equal bit for bit; flags may differ."""
    left, right = ({**load(folder), "config": None} for folder in (ours, theirs))
    assert differences(left, right) == []
    assert numbers(ours) == numbers(theirs)
    files = [folder / "encoder.safetensors" for folder in (ours, theirs)]
    assert len({file.read_bytes() if file.exists() else None for file in files}) == 1


def teacher_file(folder, name="test_clip", embed_dim=24, quick_gelu=False, **vision):
    """Registers an open_clip model, writes random weights for it, and gives its `--teacher` value."""
    import open_clip
    vision = dict(image_size=32, patch_size=8, width=32, layers=2, head_width=16) | vision
    text = dict(context_length=8, vocab_size=16, width=16, heads=2, layers=1)
    config = dict(embed_dim=embed_dim, quick_gelu=quick_gelu, vision_cfg=vision, text_cfg=text)
    Path(folder).mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model(name).state_dict(), folder / f"{name}.pt")
    return f"{name}:{folder / name}.pt"
