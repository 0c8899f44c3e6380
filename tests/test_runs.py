"""All seven training scripts through every interruption: what a stop costs (nothing), bad steps, micro batches,
processes. Their loops are seven texts, so each test here runs with each of them."""

import importlib
import json
import os
import shutil
import signal

import pytest
import torch

import common
from demo.scenes import write_coco
from helpers import (assert_same_run, call, differences, finish, load, numbers, read_log, sentence, start, wait_for,
                     write_images)
from PIL import Image

# Steps of 10 to 100 ms; the end of the schedule is far away. What a loop draws itself is on: drop path, mixup,
# dropout, proposals.
SHARED = ("--batch_size=8 --workers=0 --device=cpu --compile=off --log_every=1 --save_every=3 "
          "--max_steps=7").split()
EPOCHS = "--epochs=200 --warmup_epochs=0.5 --lr=0.002"
SCRIPTS = {
    "mfm_mae": f"--data=images --model=vit_demo --img_size=32 --patch_size=8 {EPOCHS}",
    "beyond_masking": f"--data=images --model=vit_demo --img_size=28 --patch_size=7 {EPOCHS}",
    "cae_v2": f"--data=images --model=vit_demo --img_size=32 --patch_size=8 {EPOCHS} --drop_path=0.3 --teacher=demo",
    "eval.finetune": f"--data=classes --checkpoint=encoder {EPOCHS} --recipe=mae --drop_path=0.3 --ema=0.5",
    "eval.linear_probe": f"--data=classes --checkpoint=encoder {EPOCHS} --attentive",
    "eval.segment": "--data=maps --checkpoint=encoder --img_size=32 --num_classes=3 --channels=16 --steps=600 "
                    "--warmup_steps=3 --lr=0.002 --drop_path=0.3",
    "eval.detect": f"--data=coco --checkpoint=encoder {EPOCHS} --img_size=64 --window=4 --global_blocks=2 --channels=16 "
                   "--rois=8 --drop_path=0.3",
}
STOP = 7


def each(quick=()):
    """All scripts; where it costs a process, those that are not `quick` are slow tests."""
    return pytest.mark.parametrize("script", [
        name if not quick or name in quick else pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS],
        indirect=True)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with all that the scripts read."""
    root = tmp_path_factory.mktemp("places")
    write_images(root / "images")
    for split, count in (("train", 12), ("val", 3)):
        for name in "ab":
            write_images(root / "classes" / split / name, count)
        write_images(root / "maps" / "images" / split, count)
        (root / "maps" / "annotations" / split).mkdir(parents=True)
        for index in range(count):
            ids = torch.randint(3, (40, 48), generator=torch.Generator().manual_seed(index)).byte()
            Image.fromarray(ids.numpy()).save(root / "maps" / "annotations" / split / f"{index:02}.png")
    write_coco(root / "coco", train=8, val=2, size=64)
    torch.manual_seed(0)
    common.save_encoder(common.ViT(32, 8, embed_dim=32, depth=4, num_heads=2), root / "encoder" / "encoder.safetensors")
    return root


class Script:
    def __init__(self, name, places):
        self.name, self.places, self.module = name, places, importlib.import_module(name)

    def argv(self, out, *more):
        words = SCRIPTS[self.name].split()
        words = [word.replace("=", f"={self.places}/") if word.startswith(("--data", "--checkpoint")) else word
                 for word in words]
        return [*SHARED, *words, "--out", out, *more]

    def __call__(self, out, *more):
        return call(*self.argv(out, *more), main=self.module.main)

    def start(self, out, *more, **how):
        script = ["-m", self.name] if self.name.startswith("eval") else f"{self.name}.py"
        return start(*self.argv(out, *more), script=script, **how)


UNBROKEN = {}


@pytest.fixture
def script(request, places):
    if request.param == "eval.detect":
        pytest.importorskip("pycocotools")
    return Script(request.param, places)


@pytest.fixture
def unbroken(script, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    if script.name not in UNBROKEN:
        out = tmp_path_factory.mktemp(script.name) / "run"
        assert script(out) == 0
        UNBROKEN[script.name] = out
    return UNBROKEN[script.name]


@pytest.fixture
def disturb(monkeypatch):
    """disturb(what): what(1), what(2), ... is called before each backward pass, and the loss is multiplied by
    what it gives; disturb(None) ends that."""
    backward = torch.Tensor.backward

    def disturb(what):
        numbers = iter(range(1, 10**6))

        def disturbed(loss):
            factor = what(next(numbers))
            backward(loss if factor is None else loss * factor)

        monkeypatch.setattr(torch.Tensor, "backward", disturbed if what else backward)

    return disturb


def steps(folder):
    """The steps in the log; fine-tuning's tests write lines without a loss."""
    return [line["step"] for line in read_log(folder) if "lr" in line]


class Interrupt(Exception):
    pass


# -- interrupted equals unbroken


@each()
def test_stops_and_workers_change_no_bit(script, unbroken, tmp_path):
    for number, more in ((2, []), (4, ["--save_every=9", "--workers=2"]), (STOP, ["--workers=1"])):
        assert script(tmp_path / "run", *more, f"--max_steps={number}") == 0
        assert load(tmp_path / "run")["step"] == number
    assert steps(tmp_path / "run") == list(range(1, STOP + 1))
    assert_same_run(tmp_path / "run", unbroken)
    assert sorted(os.listdir(tmp_path / "run")) == sorted(os.listdir(unbroken))


@each()
def test_a_crash_between_checkpoints_changes_no_bit(script, unbroken, tmp_path, disturb):
    def crash(number):
        if number == 5:
            raise Interrupt

    disturb(crash)
    with pytest.raises(Interrupt):
        script(tmp_path / "run")
    disturb(None)
    assert load(tmp_path / "run")["step"] == 3 and steps(tmp_path / "run") == [1, 2, 3, 4]
    with open(tmp_path / "run" / "log.jsonl", "a") as file:  # as if it had died within a line
        file.write('{"step": 99, "lo')
    assert script(tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", unbroken)


@each()
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_within_a_step_finishes_that_step_and_saves(script, unbroken, tmp_path, disturb, number):
    disturb(lambda step: signal.raise_signal(number) if step == 5 else None)
    assert script(tmp_path / "run", "--save_every=1000") == 128 + number
    disturb(None)
    assert load(tmp_path / "run")["step"] == steps(tmp_path / "run")[-1] == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # put back
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert script(tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", unbroken)


@each(quick=("beyond_masking", "eval.segment"))
@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_killed_process_and_the_same_command_again_change_no_bit(script, tmp_path, number, code):
    """As a scheduler stops a job: the signal goes to the whole process group."""
    out, more = tmp_path / "killed", ["--max_steps=100000", "--workers=2"]
    more += ["--save_every=1000"] * (number == signal.SIGTERM)  # the only checkpoint is the one that the signal asks for
    process = script.start(out, *more, group=True)
    log = out / "log.jsonl"
    wait_for(process, lambda: log.exists() and log.read_text().count("\n") >= 5)
    os.killpg(process.pid, number)
    ended, _, err = finish(process)
    stopped = load(out)["step"]
    assert ended == code and stopped >= 3, err
    if number == signal.SIGTERM:
        assert "Traceback" not in err and stopped == steps(out)[-1], err
    for folder in (out, tmp_path / "whole"):
        assert script(folder, f"--max_steps={stopped + 2}") == 0
    assert_same_run(out, tmp_path / "whole")
    assert not [name for name in os.listdir(out) if "tmp" in name]


# -- the same command, another command


@each()
def test_finished_changed_and_allowed(script, unbroken, tmp_path, capsys):
    out, before = tmp_path / "moved", (unbroken / "last.pt").read_bytes()
    shutil.copytree(unbroken, out)
    assert script(out) == 0  # says so, and changes nothing
    assert (out / "last.pt").read_bytes() == before
    assert_same_run(out, unbroken)
    capsys.readouterr()
    assert script(out, "--lr=0.5", "--max_steps=9") == 1
    error = sentence(capsys.readouterr().err)
    assert "--lr was 0.002" in error and str(out) in error and "--fresh" in error
    assert (out / "last.pt").read_bytes() == before
    assert script(out, "--workers=1", "--log_every=2", "--save_every=5", "--micro_batch=4", "--max_steps=9") == 0
    assert load(out)["step"] == 9 and steps(out) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    for number in (2, 3):
        assert script(out, "--fresh", "--max_steps=1") == 0
        assert load(tmp_path / f"moved-{number}")["step"] == 1


# -- bad steps


@each()
def test_bad_steps_are_skipped_and_counted_and_ten_in_a_row_stop(script, unbroken, tmp_path, disturb, capsys):
    """Weights and optimiser stay as they were; only what the probe's BatchNorm has seen goes on."""
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    disturb(lambda number: float("nan"))
    assert script(out, "--max_steps=8", "--save_every=1000") == 0
    before, after = load(unbroken), load(out)
    assert (before["skipped"], after["skipped"]) == (0, 1)
    seen = {name for name in before["model"] if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert (seen != set()) == (script.name == "eval.linear_probe")
    models = [{name: x for name, x in state["model"].items() if name not in seen} for state in (before, after)]
    assert differences(*models) == []
    assert differences(before["optimizer"]["state"], after["optimizer"]["state"]) == []
    last = [line for line in read_log(out) if "lr" in line][-1]
    assert (last["step"], last["skipped"], last["grad_norm"]) == (8, 1, None)
    disturb(lambda number: float("inf") if number < 10 else None)  # nine are not ten; the next is good
    assert script(out, "--max_steps=18", "--save_every=1000") == 0
    whole = (out / "last.pt").read_bytes()
    assert load(out)["skipped"] == 10 and differences(load(out)["model"], after["model"])
    capsys.readouterr()
    disturb(lambda number: float("nan"))
    assert script(out, "--max_steps=1000", "--save_every=1000") == 1
    error = sentence(capsys.readouterr().err)
    assert "ten steps" in error and "--lr" in error
    assert steps(out)[-1] == 27 and (out / "last.pt").read_bytes() == whole


# -- micro batches and processes


def assert_equal_to_rounding(ours, theirs):
    """Logs and the optimisers' averages of gradients. AdamW makes whole steps of a gradient that is rounding
    noise, such as that of a key's bias, so weights cannot be compared."""
    for one, other in zip(numbers(ours), numbers(theirs), strict=True):
        assert one == pytest.approx(other, rel=2e-4, abs=1e-6)
    averages = [[state.get("exp_avg", state.get("momentum")) for state in load(folder)["optimizer"]["state"].values()]
                for folder in (ours, theirs)]
    scale = max(average.abs().max() for average in averages[0])
    for one, other in zip(*averages, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=float(2e-5 * scale))


# Left out: in detect the mask loss is a mean over the objects of a micro batch [D7]. Off: what is drawn per
# micro batch, also UPerNet's dropout.
WHOLE = {"cae_v2": ["--drop_path=0"], "eval.finetune": ["--drop_path=0", "--mixup=0", "--cutmix=0"],
         "eval.segment": ["--drop_path=0", "--head=linear"]}


@each()
def test_micro_batches_add_up_to_the_batch(script, tmp_path):
    if script.name == "eval.detect":
        return
    for size in (8, 2):
        assert script(tmp_path / str(size), *WHOLE.get(script.name, []), f"--micro_batch={size}", "--max_steps=4") == 0
    assert_equal_to_rounding(tmp_path / "8", tmp_path / "2")


@each(quick=("cae_v2", "eval.finetune"))
def test_two_processes_are_one_with_twice_the_micro_batches(script, tmp_path):
    """2 x 2 micro batches of 2 images against 1 x 4: what is drawn per micro batch is the same, too."""
    more = ["--micro_batch=2", "--max_steps=4"]
    two = script.start(tmp_path / "two", *more, processes=2)
    assert script(tmp_path / "one", *more) == 0
    code, out, err = finish(two)
    assert code == 0, err
    assert out.count("2 processes x 2 micro batches x 2 images") == 1  # the main process alone talks
    assert_equal_to_rounding(tmp_path / "one", tmp_path / "two")
    assert not any(name.startswith("module.") for name in load(tmp_path / "two")["model"])
    assert json.loads((tmp_path / "two" / "config.json").read_text())["world"] == 2
