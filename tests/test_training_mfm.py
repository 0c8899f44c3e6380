"""Runs of mfm_mae.py from start to end: what is learnt, what a stop costs (nothing), what is written, and
what the command line refuses. What common.py does for all methods alike is tested in test_training.py."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import common
import mfm_mae
from eval import linear_probe
from eval.encoders import load_encoder
from helpers import (assert_same_run, call, differences, finish, load, numbers, read_log, start,
                     write_images)

# 16 patches of 8 pixels, and 3 steps an epoch on 24 images.
TINY = ("--model=vit_demo --img_size=32 --patch_size=8 --embed_dim=32 --depth=3 --num_heads=2 --decoder_dim=16 "
        "--decoder_depth=1 --decoder_heads=2 --batch_size=8 --epochs=4 --warmup_epochs=0.5 --lr=3e-2 --workers=0 "
        "--device=cpu --compile=off --log_every=1").split()
LONG = [*TINY, "--epochs=200", "--warmup_epochs=2"]
STOP = 20


def run_mfm(*argv):
    return call(*argv, main=mfm_mae.main)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """The folder of a run of 20 steps that nothing disturbed; a checkpoint every three steps."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    assert run_mfm(*LONG, "--data", data, "--out", out, "--max_steps", STOP) == 0
    return out


# -- learning


@pytest.mark.parametrize("fuse", [(), (0, 1, 3)], ids=["mae", "mfm"])
def test_eight_images_are_learnt_by_heart(fuse):
    torch.manual_seed(0)
    images = common.normalise(common.find_data("scenes", "pretrain", 32, num_scenes=8).pixels)
    mask = common.random_masks(8, 64, 48, torch.Generator().manual_seed(0))
    model = mfm_mae.MFMMAE(32, 4, 64, 4, 4, 64, 1, 4, fuse=fuse, norm_pix=False)
    optimizer = torch.optim.AdamW(common.parameter_groups(model, 0.05, mfm_mae.decays), lr=3e-3, betas=(0.9, 0.95))
    first = model(images, mask)[0].item()
    for step in range(120):
        loss, _ = model(images, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first > 0.8 and loss < 0.15 * first


@pytest.mark.parametrize("flags, weights", [
    ([], 3), (["--fuse=none"], 0), (["--fuse=0,2", "--projection=none"], 2), (["--fusion=uniform"], 0),
    (["--fusion=attention"], 0), (["--target=lowpass", "--norm_pix=off", "--augment=rrc"], 3),
], ids=["default", "mae", "no projection", "uniform", "attention", "low-pass"])
def test_each_variant_trains_what_it_should(tmp_path, data, flags, weights):
    argv = [*TINY, "--data", str(data), "--out", str(tmp_path / "run"), *flags]
    assert run_mfm(*argv) == 0
    config = common.parse_config(mfm_mae.Config, "", mfm_mae.SIZES, mfm_mae.DEMO, argv)
    before, after = mfm_mae.build(config).state_dict(), load(tmp_path / "run")["model"]
    same = {name for name in before if torch.equal(before[name], after[name])}
    tables = {"encoder.pos_embed", "decoder_pos_embed"}
    assert same == tables | ({"fusion.logits"} if "--fusion=uniform" in flags else set())
    lines = read_log(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line in lines:
        shares = [value for name, value in line.items() if name.startswith("weight_")]
        assert len(shares) == weights and (not shares or sum(shares) == pytest.approx(1, abs=1e-5))
    if weights:
        assert lines[0]["weight_0"] == pytest.approx(1 / weights)  # equal at the start
        assert lines[-1]["weight_0"] != lines[0]["weight_0"]
    assert lines[-1]["loss"] < lines[0]["loss"]
    # The released warm-up: from 1e-4 of the peak; base lr 3e-2 for 256 images, here are 8.
    assert lines[0]["lr"] == pytest.approx(1e-4 * 3e-2 * 8 / 256)
    assert max(line["lr"] for line in lines) == pytest.approx(3e-2 * 8 / 256)


def test_only_the_plain_encoder_is_kept(tmp_path, data, unbroken):
    """encoder.safetensors is a ViT that gives the last block's features, nothing of the fusion."""
    state = load(unbroken)["model"]
    vit = load_encoder(unbroken)
    assert load_file(unbroken / "encoder.safetensors").keys() == common.ViT(32, 8, embed_dim=32, depth=3, num_heads=2).state_dict().keys()
    assert all(torch.equal(tensor, state[f"encoder.{name}"]) for name, tensor in vit.state_dict().items())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(vit(images), vit.norm(vit.layers(images, [-1])[0]))
    assert differences(load_encoder(unbroken / "last.pt").state_dict(), vit.state_dict()) == []
    names = {"config.json", "log.jsonl", "last.pt", "encoder.safetensors", "preview.png"}
    assert set(os.listdir(unbroken)) == names


def test_the_optimiser_is_that_of_the_recipe(tmp_path, data, unbroken):
    """AdamW 0.9, 0.95; the logits decay, tokens and vectors do not; the cosine ends near 0."""
    decay, rest = load(unbroken)["optimizer"]["param_groups"]
    assert decay["betas"] == rest["betas"] == (0.9, 0.95) and decay["eps"] == 1e-8
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.05, 0.0)
    # Matrices: patch embedding, 4 for each of 3 + 1 blocks, 2 projections, 2 of the decoder; and the logits.
    assert len(decay["params"]) == 1 + 4 * 4 + 2 + 2 + 1
    assert run_mfm(*TINY, "--data", data, "--out", tmp_path / "run", "--fuse=none") == 0
    peak, lines = 3e-2 * 8 / 256, read_log(tmp_path / "run")
    assert lines[-1]["lr"] == pytest.approx(peak * 0.5 * (1 + math.cos(math.pi * 9 / 10)))  # 2 steps of warm-up
    assert len({line["grad_norm"] for line in lines}) == 12 and max(line["grad_norm"] for line in lines) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--fuse=none"], []], ids=["mae", "mfm"])
def test_the_demo_learns(tmp_path, flags):
    """What `make demo-mfm` promises: at least 15 points more than random weights."""
    assert run_mfm("--demo", "--device=cpu", "--out", tmp_path / "demo", *flags) == 0
    linear_probe.main(["--checkpoint", str(tmp_path / "demo"), "--data", "scenes", "--protocol", "ridge", "--device", "cpu"])
    result = json.loads((tmp_path / "demo" / "eval.jsonl").read_text())
    assert result["accuracy"] >= result["random_init"] + 15


# -- one process, two processes, micro batches


def assert_close_weights(ours, theirs):
    for name, tensor in ours.items():
        # A key bias adds the same number to all logits of a query: its gradient is rounding noise, which
        # AdamW blows up to whole steps.
        if name.endswith("qkv.bias"):
            tensor, other = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (tensor, theirs[name]))
        else:
            other = theirs[name]
        torch.testing.assert_close(tensor, other, atol=1e-5, rtol=0, msg=lambda text: f"{name}: {text}")


def test_accumulation_changes_nothing_but_memory(tmp_path, data):
    for micro in (8, 2):
        assert run_mfm(*TINY, "--lr=3e-3", "--data", data, "--out", tmp_path / str(micro), "--micro_batch", micro) == 0
    for one, other in zip(numbers(tmp_path / "8"), numbers(tmp_path / "2"), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert_close_weights(load(tmp_path / "8")["model"], load(tmp_path / "2")["model"])


def test_two_processes_equal_one_with_accumulation(tmp_path, data):
    """2 x 2 micro batches of 2 images against 1 x 2 of 4: gradients, weights and logged numbers."""
    flags = [*TINY, "--lr=3e-3", "--data", data, "--log_every=3"]
    two = start(*flags, "--out", tmp_path / "two", "--micro_batch=2", script="mfm_mae.py", processes=2)
    assert run_mfm(*flags, "--out", tmp_path / "one", "--micro_batch=4") == 0
    code, out, err = finish(two)
    assert code == 0, err
    assert out.count("MFM  ") == 1 and "2 processes x 2 micro batches x 2 images" in out  # rank 0 alone talks
    for one, other in zip(numbers(tmp_path / "one"), numbers(tmp_path / "two"), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert_close_weights(load(tmp_path / "one")["model"], load(tmp_path / "two")["model"])


# -- interrupted equals unbroken


@pytest.mark.parametrize("stops, flags", [([7], []), ([3, 4, 11], ["--save_every=2"]), ([7], ["--workers=2"])],
                         ids=["one stop", "three stops", "two workers"])
def test_stopping_and_going_on_changes_no_bit(tmp_path, data, unbroken, stops, flags):
    for stop in [*stops, STOP]:
        assert run_mfm(*LONG, "--data", data, "--out", tmp_path / "run", "--max_steps", stop, *flags) == 0
        assert load(tmp_path / "run")["step"] == stop
    assert_same_run(tmp_path / "run", unbroken)


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("step", [2, 8, 19])
def test_a_crash_between_checkpoints_changes_no_bit(tmp_path, data, unbroken, monkeypatch, step):
    argv, forward, count = [*LONG, "--data", data, "--out", tmp_path / "run", "--max_steps", STOP], mfm_mae.MFMMAE.forward, [0]

    def crash(self, *arguments):
        count[0] += 1
        if count[0] == step:
            raise Interrupt
        return forward(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(mfm_mae.MFMMAE, "forward", crash)
        with pytest.raises(Interrupt):
            run_mfm(*argv)
    assert run_mfm(*argv) == 0
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_signal_and_the_same_command_again_change_no_bit(tmp_path, data, unbroken, number, code):
    out, argv = tmp_path / "run", [*LONG, "--data", data, "--out", tmp_path / "run"]
    process, end = start(*argv, script="mfm_mae.py"), time.time() + 90
    while time.time() < end and not ((out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count("\n") >= 5):
        time.sleep(0.02)
    process.send_signal(number)
    assert finish(process)[0] == code
    assert 3 <= load(out)["step"] < STOP, "the machine is too slow or too quick for this test"
    assert run_mfm(*argv, "--max_steps", STOP) == 0
    assert_same_run(out, unbroken)


def test_steps_without_a_finite_gradient_are_skipped(tmp_path, data, monkeypatch):
    forward, count = mfm_mae.MFMMAE.forward, [0]

    def break_two(self, *arguments):
        loss, parts = forward(self, *arguments)
        count[0] += 1
        return loss * float("nan") if count[0] in (4, 6) else loss, parts

    monkeypatch.setattr(mfm_mae.MFMMAE, "forward", break_two)
    assert run_mfm(*TINY, "--data", data, "--out", tmp_path / "run") == 0
    state = load(tmp_path / "run")
    assert state["skipped"] == 2 and all(tensor.isfinite().all() for tensor in state["model"].values())


def test_a_finished_run_says_so_and_a_changed_field_stops(tmp_path, data, unbroken, capsys):
    argv = [*TINY, "--data", data, "--out", tmp_path / "run"]
    assert run_mfm(*argv) == 0
    capsys.readouterr()
    assert run_mfm(*argv) == 0
    assert "finished" in capsys.readouterr().out
    for changed in ("--fuse=none", "--fusion=uniform", "--target=lowpass", "--norm_pix=off", "--augment=rrc", "--lr=1e-3"):
        assert run_mfm(*LONG, "--data", data, "--out", unbroken, changed) == 1
        assert changed.split("=")[0] in capsys.readouterr().err


# -- the command line


@pytest.fixture
def fails(tmp_path, data, capsys):
    """A run that must end with one sentence: gives that sentence."""
    def attempt(*flags):
        capsys.readouterr()
        assert run_mfm(*TINY, "--data", data, "--out", tmp_path / "run", *flags) == 1
        err = capsys.readouterr().err
        assert "Traceback" not in err and err.startswith("error: ") and err.count("\n") == 1, err
        assert not (tmp_path / "run").exists()
        return err
    return attempt


@pytest.mark.parametrize("flags, words", [
    ("--fuse 0,1", "0,1 must rise .* 2, the last of 3"), ("--fuse 2,0,2", "must rise"), ("--fuse 0,3", "must rise"),
    ("--fuse all", "--fuse all should read like"), ("--fuse -1,2", "--fuse"), ("--fuse 0,,2", "should read like"),
    ("--fusion sum", "--fusion"), ("--projection mlp", "--projection"), ("--target clip", "--target"),
    ("--augment crop", "--augment"), ("--norm_pix yes", "--norm_pix"), ("--mask_ratio 1", "hides 16 of 16"),
    ("--mask_ratio 0", "--mask_ratio"), ("--mask_ratio -1", "--mask_ratio"), ("--mask_ratio 0.95", "hides 16 of 16"),
    ("--img_size 30", "--img_size 30.*--patch_size 8"), ("--img_size 4 --patch_size 2", "--img_size 4 must be at least 5"),
    ("--warmup_epochs 4", "--warmup_epochs 4.*4 epochs"), ("--lr 0", "--lr"), ("--decoder_heads 3", "3 heads"),
    ("--num_heads 3", "3 heads"), ("--decoder_dim 10 --decoder_heads 2", "multiple of 4"), ("--depth 0", "--depth"),
    ("--batch_size 25", "24 images"), ("--clip_grad 3", "unknown argument --clip_grad"), ("--model vit_x", "vit_x"),
])
def test_flags_that_cannot_be(fails, flags, words):
    assert re.search(words, fails(*flags.split()))


def test_bad_init_is_a_sentence_before_anything_is_written(fails, tmp_path):
    common.save_encoder(common.ViT(32, 8, embed_dim=16, depth=3, num_heads=2), tmp_path / "small.safetensors")
    torch.save({"model": {"weight": torch.zeros(3)}}, tmp_path / "other.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for file, words in (("small.safetensors", "does not fit.*size mismatch"), ("other.pt", "does not fit"),
                        ("junk.pt", "cannot be read"), ("none.pt", "no checkpoint file"), ("none.safetensors", "no file")):
        assert re.search(words, fails("--init", tmp_path / file))


def test_init_starts_from_the_weights(tmp_path, data, unbroken, capsys):
    first = load(unbroken)["model"]
    assert run_mfm(*TINY, "--data", data, "--out", tmp_path / "run", "--init", unbroken / "last.pt", "--lr=1e-9", "--max_steps=1") == 0
    after = load(tmp_path / "run")["model"]
    assert all(torch.allclose(tensor, first[name], atol=1e-6) for name, tensor in after.items())
    assert run_mfm(*TINY, "--data", data, "--out", tmp_path / "two", "--init", unbroken / "encoder.safetensors", "--lr=1e-9", "--max_steps=1") == 0
    assert "holds an encoder alone" in capsys.readouterr().out
    after = load(tmp_path / "two")["model"]
    assert torch.allclose(after["encoder.norm.weight"], first["encoder.norm.weight"], atol=1e-6)
    assert not torch.allclose(after["decoder_pred.weight"], first["decoder_pred.weight"], atol=1e-3)


def test_preview_from_a_run_from_init_and_from_nothing(tmp_path, data, unbroken, capsys):
    pictures = []
    for flags, source in ((["--out", unbroken], "last.pt"), (["--out", tmp_path / "none", "--init", unbroken / "last.pt"], "last.pt"),
                          (["--out", tmp_path / "none"], "untrained")):
        words = LONG if unbroken in flags else TINY
        assert run_mfm(*words, "--data", data, *flags, "--preview", tmp_path / "p.png") == 0
        assert source in capsys.readouterr().out
        pictures.append(Image.open(tmp_path / "p.png").convert("RGB"))
    assert all(picture.size == (4 * 174 + 6, 22 + 6 * 174 + 22) for picture in pictures)
    assert pictures[0].tobytes() == pictures[1].tobytes() != pictures[2].tobytes()
    assert pictures[0].tobytes() == Image.open(unbroken / "preview.png").convert("RGB").tobytes()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("size, millions, low, high", [("vit_s", "37,120,902", 20, 30), ("vit_b", "114,860,806", 50, 65)])
def test_dry_run(tmp_path, monkeypatch, capsys, size, millions, low, high):
    monkeypatch.chdir(tmp_path)
    assert run_mfm("--model", size, "--dry_run", "--data=nowhere") == 0
    out = capsys.readouterr().out
    assert os.listdir(tmp_path) == [] and f"{millions} parameters" in out and "147 of 196 patches" in out
    assert "lr       2.40e-03 = 1.50e-04 x 4096 / 256" in out and "93600 = 300 epochs x 312" in out
    assert low < float(re.search(r"([\d.]+) GFLOP", out)[1]) < high
    assert "average of blocks 0,2,4,6,8,11, projection linear" in out and "fp32" in out
    assert run_mfm("--model", size, "--dry_run", "--fuse=none") == 0
    out = capsys.readouterr().out
    assert out.startswith("MAE") and "fusion   none" in out


def test_help_names_every_flag(capsys):
    assert run_mfm("--help") == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(mfm_mae.Config):
        assert re.search(rf"--{field.name}\b", text), field.name
    assert "2308.00261" in text and "torchrun" in text


@pytest.mark.slow
def test_copied_away_without_demo(tmp_path, data):
    """The file and common.py alone are enough for any folder of images; `scenes` says what it lacks."""
    for file in ("mfm_mae.py", "common.py"):
        shutil.copy(os.path.join(os.path.dirname(mfm_mae.__file__), file), tmp_path)
    for flags, code, words in ((["--data", data], 0, "done"), (["--data", "scenes"], 1, "demo/")):
        process = start(*TINY, *flags, "--out", tmp_path / "run", "--max_steps=1", script=[tmp_path / "mfm_mae.py"])
        assert finish(process)[0] == code
