"""Runs of beyond_masking.py: what a stop costs (nothing), two processes, bad input, what is written."""

import os
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import beyond_masking
import common
from beyond_masking import TASKS
from eval.encoders import load_encoder
from helpers import assert_same_run, call, finish, load, read_log, start, write_images

# 16 patches of 7 pixels: a step takes some 20 ms.
TINY = (
    "--model=vit_demo --img_size=28 --patch_size=7 --embed_dim=32 --depth=2 --num_heads=2 --decoder_dim=16 "
    "--decoder_depth=1 --decoder_heads=2 --batch_size=8 --epochs=4 --warmup_epochs=0.5 --lr=0.03 --workers=0 "
    "--device=cpu --compile=off --log_every=1"
).split()
STOP = 12  # steps of a whole run: 24 images, 4 epochs


def run(*argv):
    return call(*TINY, *argv, main=beyond_masking.main)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture
def fails(tmp_path, data, capfd):
    """Runs the script in this process and gives the one sentence with which it must end."""

    def fail(*argv):
        assert run("--data", data, "--out", tmp_path / "run", *argv) == 1
        text = capfd.readouterr().err
        assert text.startswith("error: ") and text.count("\n") == 1, text
        assert not (tmp_path / "run").exists()
        return text

    return fail


@pytest.mark.parametrize("task", TASKS)
def test_a_stop_costs_nothing_for_any_task(tmp_path, data, task):
    """Stopped twice and resumed with two workers: weights, optimiser, encoder and log are equal bit for bit."""
    argv = ["--data", data, "--task", task, "--seed=3"]
    assert run(*argv, "--out", tmp_path / "whole") == 0
    for more in (["--max_steps=5"], ["--max_steps=7", "--save_every=2"], ["--workers=2"]):
        assert run(*argv, "--out", tmp_path / "parts", *more) == 0
    assert load(tmp_path / "whole")["step"] == STOP
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert {"config.json", "log.jsonl", "last.pt", "encoder.safetensors", "preview.png"} <= set(os.listdir(tmp_path / "whole"))
    assert ("centre" in read_log(tmp_path / "whole")[0]) == ("zoom_in" in task)


def test_kill_9_and_the_same_command_again_change_no_bit(tmp_path, data):
    argv = ["--data", data, "--epochs=200", "--save_every=3"]
    process = start(*TINY, *argv, "--out", tmp_path / "killed", script="beyond_masking.py")
    log = tmp_path / "killed" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 5):
        pass
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    stop = load(tmp_path / "killed")["step"] + 4
    for name in ("killed", "whole"):
        assert run(*argv, "--out", tmp_path / name, "--max_steps", stop) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


SOME = ["mask+zoom_in", "blur"]  # the others take as long again
EACH = [*SOME, *(pytest.param(task, marks=pytest.mark.slow) for task in TASKS if task not in SOME)]


@pytest.mark.parametrize("task", EACH)
def test_accumulation_changes_nothing_but_memory(tmp_path, data, task):
    for micro in (8, 2):
        assert run("--data", data, "--task", task, "--out", tmp_path / str(micro), "--micro_batch", micro) == 0
    assert_equal_runs(tmp_path / "8", tmp_path / "2")


def assert_equal_runs(ours, theirs):
    for one, other in zip(read_log(ours), read_log(theirs), strict=True):
        for name in {"loss", "centre", "border", "grad_norm"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=2e-6), name
    for name, tensor in load(ours)["model"].items():
        torch.testing.assert_close(tensor, load(theirs)["model"][name], atol=5e-6, rtol=0, msg=name)


@pytest.mark.parametrize("task", [EACH[0], *(pytest.param(task, marks=pytest.mark.slow) for task in TASKS[:-3]),
                                  *(pytest.param(task, marks=pytest.mark.slow) for task in TASKS[-2:])])
def test_two_processes_equal_one_with_accumulation(tmp_path, data, task):
    flags = ["--data", data, "--task", task, "--log_every=3"]
    two = start(*TINY, *flags, "--out", tmp_path / "two", "--micro_batch=2", processes=2, script="beyond_masking.py")
    assert run(*flags, "--out", tmp_path / "one", "--micro_batch=4") == 0
    code, out, err = finish(two)
    assert code == 0, err
    assert out.count("Beyond Masking") == 1 and "2 processes x 2 micro batches x 2 images" in out
    assert_equal_runs(tmp_path / "one", tmp_path / "two")


def test_bf16_computes_pixels_in_fp32(data, tmp_path):
    """Degradation, target and loss stay exact under autocast: only the model in between is rounded."""
    torch.manual_seed(0)
    for task in TASKS:
        model = beyond_masking.BeyondMasking(task, 28, 7, 32, 2, 2, 16, 1, 2)
        clean = torch.randn(4, 3, *beyond_masking.clean_size(task, 28))
        params = beyond_masking.sample_params(task, 4, img_size=28)
        mask = common.random_masks(4, 16, 12) if task.startswith("mask") else None
        seen, model.answer = [], (lambda view, mask, answer=model.answer: seen.append(view) or answer(view, mask).bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = model(clean, params, mask)
        assert loss.dtype == seen[0].dtype == torch.float32
        assert torch.equal(seen[0], beyond_masking.degrade(task, clean, params)), task
    assert run("--data", data, "--out", tmp_path / "run", "--precision=bf16", "--max_steps=2") == 0


def test_a_step_without_a_finite_gradient_is_skipped(tmp_path, data, monkeypatch):
    forward, calls = beyond_masking.BeyondMasking.forward, []

    def disturbed(self, *arguments):
        loss, parts = forward(self, *arguments)
        calls.append(loss)
        return (loss * float("nan") if len(calls) == 3 else loss), parts

    monkeypatch.setattr(beyond_masking.BeyondMasking, "forward", disturbed)
    assert run("--data", data, "--out", tmp_path / "run") == 0
    assert load(tmp_path / "run")["skipped"] == 1
    assert all(tensor.isfinite().all() for tensor in load(tmp_path / "run")["model"].values())


# -- what is written


def test_the_exported_encoder_gives_the_models_features(tmp_path, data):
    for task in ("mask+zoom_in", "decolor"):
        assert run("--data", data, "--task", task, "--out", tmp_path / task) == 0
        model = beyond_masking.BeyondMasking(task, 28, 7, 32, 2, 2, 16, 1, 2)
        model.load_state_dict(load(tmp_path / task)["model"])
        exported = load_encoder(tmp_path / task / "encoder.safetensors")
        grey = torch.randn(2, 1, 28, 28)
        view = grey if task == "decolor" else grey.expand(-1, 3, -1, -1)
        torch.testing.assert_close(exported(grey.expand(-1, 3, -1, -1)), model.encoder(view), atol=1e-5, rtol=0)
    for file in ("last.pt", "encoder.safetensors"):
        assert load_encoder(tmp_path / "decolor" / file, in_chans=3).config["in_chans"] == 3


def test_init_from_our_files_and_the_authors(tmp_path, data):
    first = ["--data", data, "--max_steps=1", "--lr=1e-30"]
    assert run("--data", data, "--out", tmp_path / "run") == 0
    trained = load(tmp_path / "run")["model"]
    assert run(*first, "--out", tmp_path / "a", "--init", tmp_path / "run" / "last.pt") == 0
    for name, tensor in load(tmp_path / "a")["model"].items():
        torch.testing.assert_close(tensor, trained[name])
    assert run(*first, "--out", tmp_path / "b", "--init", tmp_path / "run" / "encoder.safetensors") == 0
    weights = load_file(tmp_path / "b" / "encoder.safetensors")
    assert all(torch.allclose(tensor, trained[f"encoder.{name}"]) for name, tensor in weights.items())
    official = {}
    for name, tensor in trained.items():
        if name.endswith("qkv.bias"):
            q, _, v = tensor.chunk(3)
            official[name.replace("qkv.bias", "q_bias")], official[name.replace("qkv.bias", "v_bias")] = q, v
        elif "pos" not in name:
            official[name] = tensor
    torch.save({"model": official, "epoch": 299}, tmp_path / "checkpoint-299.pth")
    assert run(*first, "--out", tmp_path / "c", "--init", tmp_path / "checkpoint-299.pth") == 0
    for name, tensor in load(tmp_path / "c")["model"].items():
        torch.testing.assert_close(tensor, trained[name])


def test_init_that_does_not_fit(fails, tmp_path):
    common.save_encoder(common.ViT(28, 7, embed_dim=48, depth=2, num_heads=2), tmp_path / "e.safetensors")
    assert "e.safetensors does not fit this model" in fails("--init", tmp_path / "e.safetensors")
    torch.save({"model": {"encoder.blocks.0.attn.q_bias": torch.ones(3)}}, tmp_path / "x.pth")
    assert "not the weights of this Beyond Masking model" in fails("--init", tmp_path / "x.pth")


@pytest.mark.parametrize("task", TASKS)
def test_previews_show_each_task(tmp_path, data, task):
    """Untrained, in four columns; hidden patches are grey, and what is seen is the degraded image."""
    assert run("--data", data, "--task", task, "--preview", tmp_path / "p.png", "--out", tmp_path / "run") == 0
    picture = Image.open(tmp_path / "p.png")
    assert picture.size[0] == 4 * 174 + 6 and not (tmp_path / "run").exists()
    config = common.parse_config(beyond_masking.Config, "", beyond_masking.SIZES, {}, [*TINY, f"--task={task}"])
    samples = common.Samples(beyond_masking.find_images(config.__class__(**{**vars(config), "data": str(data)})),
                             beyond_masking.Augment(config), 0)
    batch = common.preview_batch(samples, 2)
    rows = beyond_masking.preview_rows(config, beyond_masking.build(config), batch, torch.device("cpu"))
    clean, seen, target, answer = rows[0]
    assert clean.shape[1:] == beyond_masking.clean_size(task, 28)
    assert seen.shape == target.shape == answer.shape == (3, 28, 28)
    torch.testing.assert_close(clean, batch[0][0] / 255, atol=1e-5, rtol=0)
    grey = (seen == 0.5).all(dim=0).float()
    assert grey.mean() == pytest.approx(0.75 if task.startswith("mask") else 0, abs=0.05)
    if task == "zoom_in":
        torch.testing.assert_close(seen, clean[:, 4:32, 4:32])


# -- bad input


def test_flags_that_cannot_be(fails):
    assert "invalid choice: 'rotate'" in (text := fails("--task=rotate")) and all(task in text for task in TASKS)
    text = fails("--img_size=32", "--patch_size=4")
    assert "img_size 32 is not a multiple of patch_size 4 and of 7" in text and "28 or 56" in text
    assert "is 24 or 32" in fails("--img_size=30", "--patch_size=8", "--task=blur")
    assert "--task blur hides no patches: --mask_ratio belongs to mask, mask+zoom_in" in fails("--task=blur", "--mask_ratio=0.5")
    assert "leaves no patch visible" in fails("--mask_ratio=0.99")
    assert "--warmup_epochs 4 must be shorter" in fails("--warmup_epochs=4")
    assert "--crop_min is at most 1" in fails("--crop_min=2")
    assert "did you mean --decoder_dim?" in fails("--decoder_dims=3")


def test_a_changed_task_stops_with_its_name(tmp_path, data, capsys):
    assert run("--data", data, "--out", tmp_path / "run", "--max_steps=1") == 0
    assert run("--data", data, "--out", tmp_path / "run", "--task=blur") == 1
    assert "--task was 'mask+zoom_in' when the run" in capsys.readouterr().err


def test_dry_run_needs_no_data(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for task in TASKS:
        assert call("--model=vit_b", "--dry_run", "--task", task, main=beyond_masking.main) == 0
        out = capsys.readouterr().out
        assert "lr       1.20e-03 = 1.50e-04 x 2048 / 256" in out and "187500 = 300 epochs x 625" in out
        assert ("147 of 196 patches hidden" in out) == task.startswith("mask")
        assert f"runs/beyond_masking_vit_b_{task}/" in out and "GFLOP" in out
    assert os.listdir(tmp_path) == []
    assert call("--demo", "--dry_run", main=beyond_masking.main) == 0
    assert "runs/beyond_masking_demo/" in capsys.readouterr().out
    assert call("--demo", "--dry_run", "--task=blur", main=beyond_masking.main) == 0
    assert "runs/beyond_masking_demo_blur/" in capsys.readouterr().out
