"""All seven training scripts through every interruption: what a stop costs (nothing), bad steps, micro batches,
processes. Their loops are seven texts, so each test here runs with each of them."""

import importlib
import json
import multiprocessing
import os
import shutil
import signal
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import common
from demo.scenes import write_coco
from helpers import (assert_same_run, call, differences, finish, load, numbers, read_log, refused, sentence, start,
                     wait_for, write_images)

# Steps of 10 to 100 ms; the end of the schedule is far away. What a loop draws itself is on: drop path, mixup,
# dropout, proposals. `@` is the folder with all that is read.
STOP = 7
SHARED = "--batch_size=8 --workers=0 --device=cpu --compile=off --log_every=1 --save_every=3 --lr=0.002".split()
PRETRAIN = "--data=@images --model=vit_demo --epochs=200 --warmup_epochs=0.5"
TUNE = "--data=@classes --checkpoint=@encoder --epochs=200 --warmup_epochs=0.5"
SCRIPTS = {
    "mfm_mae": f"{PRETRAIN} --img_size=32 --patch_size=8",
    "beyond_masking": f"{PRETRAIN} --img_size=28 --patch_size=7",
    "cae_v2": f"{PRETRAIN} --img_size=32 --patch_size=8 --drop_path=0.3 --teacher=demo",
    "eval.finetune": f"{TUNE} --recipe=mae --drop_path=0.3 --ema=0.5",
    "eval.linear_probe": f"{TUNE} --attentive",
    "eval.segment": "--data=@maps --checkpoint=@encoder --img_size=32 --num_classes=3 --channels=16 --steps=600 "
                    "--warmup_steps=3 --drop_path=0.3",
    "eval.detect": f"{TUNE} --data=@coco --img_size=64 --window=4 --global_blocks=2 --channels=16 --rois=8 "
                   "--drop_path=0.3",
}


def each(quick=(), without=()):
    """All scripts; where it costs a process, those that are not `quick` are slow tests."""
    rows = [name if not quick or name in quick else pytest.param(name, marks=pytest.mark.slow)
            for name in SCRIPTS if name not in without]
    return pytest.mark.parametrize("script", rows, indirect=True)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    write_images(root / "images")
    for split, count in (("train", 12), ("val", 3)):
        for folder in (f"classes/{split}/a", f"classes/{split}/b", f"maps/images/{split}"):
            write_images(root / folder, count)
        (root / "maps/annotations" / split).mkdir(parents=True)
        for index in range(count):
            ids = torch.randint(3, (40, 48), generator=torch.Generator().manual_seed(index)).byte()
            Image.fromarray(ids.numpy()).save(root / f"maps/annotations/{split}/{index:02}.png")
    write_coco(root / "coco", train=8, val=2, size=64)
    torch.manual_seed(0)
    common.save_encoder(common.ViT(32, 8, embed_dim=32, depth=4, num_heads=2), root / "encoder/encoder.safetensors")
    return root


class Script:
    def __init__(self, name, places):
        self.name, self.main = name, importlib.import_module(name).main
        self.words = [*SHARED, *SCRIPTS[name].replace("@", f"{places}/").split()]

    def __call__(self, out, *more):
        return call(*self.words, f"--max_steps={STOP}", "--out", out, *more, main=self.main)

    def start(self, out, *more, **how):
        script = ["-m", self.name] if "." in self.name else f"{self.name}.py"
        return start(*self.words, "--out", out, *more, script=script, **how)


@pytest.fixture(scope="module")
def script(request, places):
    if request.param == "eval.detect":
        pytest.importorskip("pycocotools")
    return Script(request.param, places)


@pytest.fixture(scope="module")
def unbroken(script, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp(script.name) / "run"
    assert script(out) == 0
    return out


@pytest.fixture
def disturb(monkeypatch):
    """disturb(what): what(1), what(2), ... is called before each backward pass, and the loss is multiplied by
    what it gives; disturb(None) ends that."""
    backward = torch.Tensor.backward
    def disturb(what):
        count = iter(range(1, 10**6))
        def disturbed(loss):
            factor = what(next(count))
            backward(loss if factor is None else loss * factor)
        monkeypatch.setattr(torch.Tensor, "backward", disturbed if what else backward)
    return disturb


def steps(folder):
    """The steps in the log; fine-tuning's tests write lines without a rate."""
    return [line["step"] for line in read_log(folder) if "lr" in line]


@each()
def test_no_kind_of_stop_changes_a_bit(script, unbroken, tmp_path, disturb):
    """--max_steps, a crash, Ctrl-C, SIGTERM, SLURM's signal; afterwards with workers."""
    out = tmp_path / "run"
    assert script(out, "--max_steps=2") == 0 and load(out)["step"] == 2
    disturb(lambda number: None if number < 3 else 1 / 0)
    refused("division by zero", script, out, error=ZeroDivisionError)
    assert load(out)["step"] == 3 and steps(out) == [1, 2, 3, 4]
    with open(out / "log.jsonl", "a") as file:  # as if it had died within a line
        file.write('{"step": 99, "lo')
    for number, step in ((signal.SIGINT, 4), (signal.SIGTERM, 5), (signal.SIGUSR1, 6)):
        disturb(lambda count: signal.raise_signal(number))
        assert script(out, "--save_every=1000") == 128 + number  # the step is finished, and saved
        assert load(out)["step"] == steps(out)[-1] == step
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # put back
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    disturb(None)
    assert script(out, "--workers=2") == 0
    assert_same_run(out, unbroken)
    assert steps(out) == list(range(1, STOP + 1)) and sorted(os.listdir(out)) == sorted(os.listdir(unbroken))


@each(quick=("beyond_masking", "eval.segment"))
@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_killed_process_and_the_same_command_again_change_no_bit(script, tmp_path, number, code):
    """As a scheduler stops a job: the signal goes to the whole process group."""
    out, more = tmp_path / "killed", ["--workers=2"]
    more += ["--save_every=1000"] * (number == signal.SIGTERM)  # the only checkpoint is the one that it asks for
    process, log = script.start(out, *more, group=True), out / "log.jsonl"
    saved = number == signal.SIGTERM or (out / "last.pt").exists  # a thread writes it, while steps go on
    wait_for(process, lambda: log.exists() and log.read_text().count("\n") >= 5 and (saved is True or saved()))
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


@pytest.mark.slow
@pytest.mark.parametrize("script", ["cae_v2"], indirect=True)
def test_torchrun_hands_the_signal_on_and_all_processes_stop_together(script, tmp_path):
    process, log = script.start(tmp_path, "--workers=2", processes=2), tmp_path / "log.jsonl"
    wait_for(process, lambda: log.exists() and log.read_text().count("\n") >= 4)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    stopped = load(tmp_path)["step"]
    assert code != 0 and "SIGKILL" not in err and stopped == steps(tmp_path)[-1], err
    assert script(tmp_path, f"--max_steps={stopped + 2}") == 0  # one process goes on where two were
    assert steps(tmp_path) == list(range(1, stopped + 3))


@each()
def test_the_same_command_and_another_one(script, unbroken, tmp_path, capsys):
    out, state = tmp_path / "moved", load(unbroken)
    shutil.copytree(unbroken, out)
    assert script(out) == 0  # changes nothing, and says so; the probe is tested again
    assert_same_run(out, unbroken)
    assert script.name == "eval.linear_probe" or "--fresh" in capsys.readouterr().out
    assert script(out, "--lr=0.5", "--max_steps=9") == 1
    error = sentence(capsys.readouterr().err)
    assert "--lr was 0.002" in error and str(out) in error and "--fresh" in error
    torch.save({**state, "num_images": 999}, out / "last.pt")
    assert script(out, "--max_steps=9") == 1
    assert "started with 999 images" in sentence(capsys.readouterr().err) and load(out)["step"] == STOP
    torch.save(state, out / "last.pt")
    assert script(out, "--workers=1", "--log_every=2", "--save_every=5", "--micro_batch=4", "--max_steps=9") == 0
    assert load(out)["step"] == 9 and steps(out) == list(range(1, 10))
    for number in (2, 3):
        assert script(out, "--fresh", "--max_steps=1") == 0 and load(tmp_path / f"moved-{number}")["step"] == 1


@each(without=["eval.linear_probe"])  # which has no backward pass per micro batch
def test_a_signal_between_micro_batches_undoes_the_step(script, tmp_path, disturb):
    out, split = tmp_path / "cut", "--micro_batch=2"
    disturb(lambda number: signal.raise_signal(signal.SIGTERM) if number == 6 else None)  # in the second of four
    assert script(out, split) == 128 + signal.SIGTERM and load(out)["step"] == 1 and steps(out) == [1]
    disturb(None)
    assert script(out, split) == script(tmp_path / "whole", split) == 0
    assert_same_run(out, tmp_path / "whole")


@each(quick=("mfm_mae",))
def test_a_second_run_in_the_folder_stops_at_once(script, tmp_path):
    """While the first one goes on, and is not disturbed; a killed one leaves nothing to clean up."""
    first = script.start(tmp_path, "--workers=1")
    wait_for(first, (tmp_path / "last.pt").exists)
    code, _, err = finish(script.start(tmp_path))
    assert code == 1 and f"a run is going on in {tmp_path}, process {first.pid} on " in sentence(err)
    first.kill()
    first.communicate()
    stopped = load(tmp_path)["step"] + 2  # although a worker of it may live a little longer
    code, _, err = finish(script.start(tmp_path, f"--max_steps={stopped}"))
    assert code == 0 and steps(tmp_path) == list(range(1, stopped + 1)), err


def test_a_worker_that_outlives_its_run_holds_no_lock(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    run = common.Run("x", common.TrainConfig(), tmp_path)
    run.claim()
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    worker.start()
    with open(tmp_path / ".lock") as other:
        refused("unavailable", fcntl.flock, other, fcntl.LOCK_EX | fcntl.LOCK_NB, error=BlockingIOError)
        time.sleep(0.2)
        run.lock.close()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    worker.kill()


@each()
def test_what_is_written(script, unbroken):
    """Plain data, so that torch's default loader reads it; of the methods a ViT that is the trained encoder."""
    state, config = load(unbroken), json.loads((unbroken / "config.json").read_text())
    assert config["num_images"] == state["num_images"] and config["world"] == 1
    assert {"method", "lr", "torch", "commit", "command", "total_steps"} <= config.keys()
    lines = [line for line in read_log(unbroken) if {"loss", "lr", "grad_norm"} <= line.keys()]
    assert lines[-1]["epoch"] == pytest.approx(STOP / config["steps_per_epoch"], abs=1e-4)
    assert 0 < max(line["data_wait"] for line in lines) <= 1
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    if "." not in script.name:
        assert (unbroken / "preview.png").read_bytes()[1:4] == b"PNG"
        encoder = {name: state["model"][f"encoder.{name}"] for name in common.ViT(**state["encoder"]).state_dict()}
        assert differences(load_file(unbroken / "encoder.safetensors"), encoder) == []


@each()
def test_bad_steps_are_skipped_and_counted_and_ten_in_a_row_stop(script, unbroken, tmp_path, disturb, capsys):
    """They change no weight and no moment, and nothing is saved after one until the next good step."""
    out, before = tmp_path / "run", load(unbroken)
    shutil.copytree(unbroken, out)
    results = len((out.parent / "eval.jsonl").read_text().splitlines()) if (out.parent / "eval.jsonl").exists() else 0
    disturb(lambda number: float("nan"))
    assert script(out, "--max_steps=8", "--save_every=1") == 1
    assert "the last step was skipped" in sentence(capsys.readouterr().err) and load(out)["step"] == STOP
    last = [line for line in read_log(out) if "lr" in line][-1]
    assert (last["step"], last["skipped"], last["grad_norm"]) == (8, 1, None) and results == 0
    disturb(lambda number: float("inf") if number < 10 else None)  # nine, and a good one
    assert script(out, "--max_steps=17", "--save_every=12") in (0, 1)  # 1: more than half were skipped
    whole, after = (out / "last.pt").read_bytes(), load(out)
    assert (after["skipped"], after["step"], after["bad_steps"]) == (9, 17, list(range(7, 16)))
    assert after.get("ema", {}).get("n_averaged", 8) == 8
    counts = [{int(entry["step"]) for entry in state["optimizer"]["state"].values() if "step" in entry}
              for state in (before, after)]
    assert counts in ([{7}, {8}], [set(), set()])
    capsys.readouterr()
    disturb(lambda number: float("nan"))
    assert script(out, "--max_steps=1000", "--save_every=1") == 1
    error = sentence(capsys.readouterr().err)
    assert "ten steps" in error and "--lr" in error
    assert steps(out)[-1] == 26 and (out / "last.pt").read_bytes() == whole


def assert_equal_to_rounding(ours, theirs):
    """Logs, averages of gradients. Not weights: AdamW makes whole steps of rounding noise, as of a key's bias."""
    for one, other in zip(numbers(ours), numbers(theirs), strict=True):
        assert one == pytest.approx(other, rel=2e-4, abs=1e-6)
    states = [load(folder)["optimizer"]["state"].values() for folder in (ours, theirs)]
    averages = [[state.get("exp_avg", state.get("momentum")) for state in both] for both in states]
    scale = max(average.abs().max() for average in averages[0])
    for one, other in zip(*averages, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=float(3e-5 * scale))


# Off: what is drawn per micro batch, also UPerNet's dropout.
WHOLE = {"cae_v2": ["--drop_path=0"], "eval.finetune": ["--drop_path=0", "--mixup=0", "--cutmix=0"],
         "eval.segment": ["--drop_path=0", "--head=linear"]}


@each(without=["eval.detect"])  # its mask loss is a mean over the objects of a micro batch [D7]
def test_micro_batches_add_up_to_the_batch(script, tmp_path):
    for size in (8, 2):
        more = [*WHOLE.get(script.name, []), f"--micro_batch={size}", "--max_steps=4"]
        assert script(tmp_path / str(size), *more) == 0
    assert_equal_to_rounding(tmp_path / "8", tmp_path / "2")
    line, left = read_log(tmp_path / "2")[0], load(tmp_path / "2")["total_steps"] - 1
    assert line["eta_s"] == pytest.approx(8 * left / line["images_per_s"], rel=0.02, abs=1)


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
