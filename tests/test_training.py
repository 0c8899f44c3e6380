"""Training runs from start to end: what is learnt, what a stop costs (nothing), what is written."""

import argparse
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

import cae_v2
import common
from eval import linear_probe
from helpers import (TINY, assert_same_run, call, differences, finish, load, numbers, read_log, start,
                     teacher_file, write_images)

GOLDEN = torch.load(Path(__file__).parent / "golden" / "cae_v2.pt")["cases"]
# Stochastic depth is on: it is the one draw that the training process itself makes.
LONG = [*TINY, "--epochs=200", "--warmup_epochs=2", "--drop_path=0.3", "--batch_size=8"]
STOP = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """The folder of a run of 20 steps that nothing disturbed; a checkpoint every three steps."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    assert call(*LONG, "--data", data, "--out", out, "--max_steps", STOP) == 0
    return out


def weights(out):
    return load(out)["model"]


class Interrupt(Exception):
    pass


def disturb(monkeypatch, disturbance):
    """Calls `disturbance(number, loss)` in place of returning the loss of training step 1, 2, ..."""
    forward, count = cae_v2.CAEv2.forward, [0]

    def disturbed(self, *arguments):
        loss, parts = forward(self, *arguments)
        count[0] += 1
        return disturbance(count[0], loss), parts

    monkeypatch.setattr(cae_v2.CAEv2, "forward", disturbed)


def crash_at(step):
    def crash(number, loss):
        if number == step:
            raise Interrupt
        return loss

    return crash


# -- learning


def test_eight_images_are_learnt_by_heart():
    torch.manual_seed(0)
    teacher = cae_v2.load_teacher("demo", 32)
    images = common.find_data("scenes", "pretrain", 32, num_scenes=8).pixels
    student = common.normalise(images)
    targets = cae_v2.clip_targets(
        teacher, common.normalise(images, teacher.preprocess_cfg["mean"], teacher.preprocess_cfg["std"])
    )
    mask = cae_v2.block_masks(8, 8, 32, torch.Generator().manual_seed(0))
    model = cae_v2.CAEv2(32, 4, 64, 2, 4, targets.shape[-1], regressor_depth=1, regressor_heads=4)
    optimizer = torch.optim.AdamW(common.parameter_groups(model, 0.05), lr=3e-3)
    first, parts = model(student, mask, targets)
    assert first > 0.8
    for step in range(150):
        loss, parts = model(student, mask, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert all(part < 0.15 for part in parts.values()), parts  # class token, visible and masked alike


def test_the_loss_falls_on_the_built_in_images(tmp_path):
    flags = [*TINY, "--data=scenes", "--epochs=1", "--warmup_epochs=0", "--batch_size=32", "--lr=2e-3"]
    assert call(*flags, "--out", tmp_path / "run", "--max_steps=30") == 0
    losses = [line["loss"] for line in read_log(tmp_path / "run")]
    assert len(losses) == 30 and losses[0] > 0.85
    assert sum(losses[-5:]) / 5 < 0.85 * losses[0]


@pytest.mark.slow
def test_the_demo_learns(tmp_path):
    """The README promises what the probe finds: random init at most 40 %, pre-trained at least 80 %."""
    assert call("--demo", "--device=cpu", "--out", tmp_path / "demo") == 0
    linear_probe.main(["--checkpoint", str(tmp_path / "demo"), "--data", "scenes", "--protocol", "ridge",
                       "--device", "cpu"])
    result = json.loads((tmp_path / "demo" / "eval.jsonl").read_text())
    assert result["random_init"] <= 40 and result["accuracy"] >= max(80, result["random_init"] + 40)
    losses = [line["loss"] for line in read_log(tmp_path / "demo")]
    assert losses[0] < 1.1 and losses[-1] < 0.5


# What must be bit for bit as it was drawn from the seed. The position tables are never trained.
TABLES = {"encoder.pos_embed", "positions"}


@pytest.mark.parametrize(
    "flags, parts, untouched",
    [
        ([], {"cls", "visible", "masked"}, ()),
        (["--supervise=masked"], {"masked"}, ()),
        (["--mask=random"], {"cls", "visible", "masked"}, ()),
        (["--supervise=visible"], {"cls", "visible"}, ("regressor.", "mask_token")),
        (["--mask_ratio=0"], {"cls", "visible"}, ("regressor.", "mask_token")),
    ],
    ids=["both", "masked", "random masks", "visible", "no mask"],
)
def test_each_way_of_supervision_trains_what_it_should(tmp_path, data, flags, parts, untouched):
    argv = [*TINY, "--data", str(data), "--out", str(tmp_path / "run"), *flags]
    assert call(*argv) == 0
    config = common.parse_config(cae_v2.Config, "", cae_v2.SIZES, cae_v2.DEMO, argv)
    before, after = cae_v2.build(config, 64).state_dict(), weights(tmp_path / "run")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == TABLES | {name for name in before if name.startswith(untouched or "?")}
    lines = read_log(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line in lines:
        assert {"cls", "visible", "masked"} & set(line) == parts
    tokens = dict(cls=1, visible=16 - config.num_masked, masked=config.num_masked)
    total = sum(tokens[name] for name in parts)
    flat_mean = sum(lines[-1][name] * tokens[name] for name in parts) / total
    assert lines[-1]["loss"] == pytest.approx(flat_mean, abs=1e-6)


def test_the_teacher_gets_no_gradient_and_keeps_every_byte(tmp_path, data, monkeypatch):
    teachers, load_teacher = [], cae_v2.load_teacher

    def remember(*arguments):
        teacher = load_teacher(*arguments)
        teachers.append((teacher, {name: tensor.clone() for name, tensor in teacher.state_dict().items()}))
        return teacher

    monkeypatch.setattr(cae_v2, "load_teacher", remember)
    assert call(*TINY, "--data", data, "--out", tmp_path / "run", "--max_steps=4") == 0
    [(teacher, before)] = teachers
    assert differences(dict(teacher.state_dict()), before) == []
    assert not teacher.training
    for parameter in teacher.parameters():
        assert parameter.grad is None and not parameter.requires_grad
    trained = {tuple(tensor.shape) for tensor in weights(tmp_path / "run").values()}
    assert len(load(tmp_path / "run")["optimizer"]["param_groups"]) == 2 and (64, 128) not in trained


def test_accumulation_changes_nothing_but_memory(tmp_path, data):
    for micro in (8, 2):
        assert (
            call(
                *TINY, "--data", data, "--out", tmp_path / str(micro), "--micro_batch", micro, "--drop_path=0"
            )
            == 0
        )
    whole, parts = numbers(tmp_path / "8"), numbers(tmp_path / "2")
    for one, other in zip(whole, parts, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert_close_weights(weights(tmp_path / "8"), weights(tmp_path / "2"))


def assert_close_weights(ours, theirs, atol=1e-6):
    """AdamW divides by the gradient's size, so where that is rounding noise the update is noise too.

    By mathematics this is so for the bias of the keys' LayerNorm: it moves all logits of a query alike.
    """
    for name, tensor in ours.items():
        if not name.endswith("norm_k.bias"):
            torch.testing.assert_close(
                tensor, theirs[name], atol=atol, rtol=0, msg=lambda text: f"{name}: {text}"
            )


def test_two_processes_equal_one_with_accumulation(tmp_path, data):
    """2 x 2 micro batches of 2 images against 1 x 2 of 4: gradients, weights and logged losses."""
    flags = [*TINY, "--data", data, "--drop_path=0", "--log_every=3"]
    two = start(*flags, "--out", tmp_path / "two", "--micro_batch=2", processes=2)
    assert call(*flags, "--out", tmp_path / "one", "--micro_batch=4") == 0
    code, out, err = finish(two)
    assert code == 0, err
    assert (
        out.count("CAE v2") == 1 and "2 processes x 2 micro batches x 2 images" in out
    )  # rank 0 alone talks
    lines = read_log(tmp_path / "two")
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    for one, other in zip(read_log(tmp_path / "one"), lines, strict=True):
        for name in ("loss", "cls", "visible", "masked", "grad_norm"):
            assert one[name] == pytest.approx(other[name], abs=2e-6), name
    assert_close_weights(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert not any(name.startswith("module.") for name in weights(tmp_path / "two"))


# -- interrupted equals unbroken


@pytest.mark.parametrize(
    "stops, flags",
    [
        ([7], []),
        ([3, 4, 11], []),
        ([7], ["--save_every=2"]),
        ([7], ["--workers=2"]),
        ([], ["--workers=2"]),
        ([], ["--save_every=4", "--workers=1"]),
    ],
    ids=[
        "one stop",
        "three stops",
        "own checkpoints",
        "two workers",
        "unbroken, two workers",
        "unbroken, one worker",
    ],
)
def test_stopping_at_max_steps_and_going_on_changes_no_bit(tmp_path, data, unbroken, stops, flags):
    for stop in [*stops, STOP]:
        assert call(*LONG, "--data", data, "--out", tmp_path / "run", "--max_steps", stop, *flags) == 0
        assert load(tmp_path / "run")["step"] == stop
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.parametrize("step", [2, 8, 19])
def test_a_crash_between_checkpoints_changes_no_bit(tmp_path, data, unbroken, monkeypatch, step):
    argv = [*LONG, "--data", data, "--out", tmp_path / "run", "--max_steps", STOP]
    with monkeypatch.context() as patch:
        disturb(patch, crash_at(step))
        with pytest.raises(Interrupt):
            call(*argv)
    assert len(read_log(tmp_path / "run")) == step - 1
    assert (tmp_path / "run" / "last.pt").exists() == (step > 3)
    assert call(*argv, "--workers", step % 3) == 0  # 2, 2 and 1 workers instead of none
    assert_same_run(tmp_path / "run", unbroken)


def test_a_crash_while_writing_the_checkpoint_leaves_the_one_before(tmp_path, data, unbroken, monkeypatch):
    argv, save, count = (
        [*LONG, "--data", data, "--out", tmp_path / "run", "--max_steps", STOP],
        torch.save,
        [0],
    )

    def half(state, path):
        count[0] += 1
        save(state, path)
        if count[0] == 3:
            with open(path, "r+b") as file:
                file.truncate(1000)
            raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(Interrupt):
            call(*argv)
    assert load(tmp_path / "run")["step"] == 6
    assert call(*argv) == 0
    assert_same_run(tmp_path / "run", unbroken)


def wait_for_steps(folder, steps, process, seconds=60):
    """Until the run has logged that many steps."""
    end = time.time() + seconds
    while time.time() < end and process.poll() is None:
        log = folder / "log.jsonl"
        if log.exists() and log.read_text().count("\n") >= steps:
            return
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"no {steps} steps: {process.communicate()}")


def test_kill_9_and_the_same_command_again_change_no_bit(tmp_path, data, unbroken):
    out, argv = tmp_path / "run", [*LONG, "--data", data, "--out", tmp_path / "run"]
    process = start(*argv)
    wait_for_steps(out, 5, process)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    assert load(out)["step"] >= 3
    with open(out / "log.jsonl", "a") as file:  # as if it had died within a line
        file.write('{"step": 99, "lo')
    assert load(out)["step"] < STOP, "the machine is too slow or too quick for this test"
    assert call(*argv, "--max_steps", STOP) == 0
    assert_same_run(out, unbroken)
    assert not [name for name in os.listdir(out) if "tmp" in name]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_polite_stop_saves_at_the_next_step_and_says_143(tmp_path, data, unbroken, workers):
    """As a scheduler stops a job: the signal goes to the whole group, the workers included."""
    out, argv = tmp_path / "run", [*LONG, "--data", data, "--out", tmp_path / "run", "--workers", workers]
    # --save_every 1000: the only checkpoint is the one that the signal asks for.
    process = start(*argv, "--save_every=1000", group=True)
    wait_for_steps(out, 4, process)
    os.killpg(process.pid, signal.SIGTERM)
    code, _, err = finish(process)
    assert "Traceback" not in err, err
    assert code == 143
    assert load(out)["step"] == read_log(out)[-1]["step"] >= 4
    assert load(out)["step"] < STOP, "the machine is too slow or too quick for this test"
    assert call(*argv, "--max_steps", STOP) == 0
    assert_same_run(out, unbroken)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_within_a_step_finishes_that_step(tmp_path, data, unbroken, monkeypatch, number, code):
    def press(step, loss):
        if step == 5:
            signal.raise_signal(number)
        return loss

    argv = [*LONG, "--data", data, "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        disturb(patch, press)
        assert call(*argv) == code
    assert load(tmp_path / "run")["step"] == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # put back after the run
    assert call(*argv, "--max_steps", STOP) == 0
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.slow
def test_torchrun_hands_the_signal_on_and_all_processes_stop_together(tmp_path, data):
    out = tmp_path / "run"
    argv = [*LONG, "--data", data, "--out", out, "--drop_path=0", "--workers=2"]
    process = start(*argv, processes=2)
    wait_for_steps(out, 4, process, seconds=120)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code != 0 and "killed by signal" not in err
    assert load(out)["step"] == read_log(out)[-1]["step"] >= 4
    stopped = load(out)["step"]
    assert call(*argv, "--max_steps", stopped + 2) == 0  # one process goes on where two were
    assert [line["step"] for line in read_log(out)] == list(range(1, stopped + 3))


def test_a_log_with_junk_at_its_end_is_mended(tmp_path, data, unbroken):
    """A half line, and lines after the checkpoint, as a killed process leaves them."""
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    clean = (out / "log.jsonl").read_text()
    for junk in (
        '{"step": 21, "loss": 0.5}\n{"step": 22, "lo',
        '{"st',
        '{"step": 21, "loss": 0.5}',
        "\0" * 40,
        "\n",
    ):
        (out / "log.jsonl").write_text(clean + junk)
        assert call(*LONG, "--data", data, "--out", out, "--max_steps", STOP + 1) == 0, junk
        lines = read_log(out)
        assert [line["step"] for line in lines] == list(range(1, STOP + 2)), junk
        shutil.rmtree(out)
        shutil.copytree(unbroken, out)


# -- bad numbers, no memory, no room


def test_steps_without_a_finite_gradient_are_skipped_and_counted(tmp_path, data, monkeypatch):
    argv, out = [*TINY, "--data", data, "--out", tmp_path / "run"], tmp_path / "run"
    with monkeypatch.context() as patch:
        disturb(patch, lambda number, loss: loss * float("nan") if number in (4, 6) else loss)
        assert call(*argv, "--max_steps=8") == 0
    assert load(out)["skipped"] == 2
    assert call(*argv) == 0
    assert load(out)["skipped"] == 2  # the count survives a stop
    assert all(tensor.isfinite().all() for tensor in weights(out).values())
    assert [line["skipped"] for line in read_log(out)] == [0, 0, 0, 1, 1] + 7 * [2]


def test_a_skipped_step_leaves_weights_and_optimiser_as_they_were(tmp_path, data, monkeypatch):
    argv = [*TINY, "--data", data]
    assert call(*argv, "--out", tmp_path / "good", "--max_steps=5") == 0
    disturb(monkeypatch, lambda number, loss: loss * float("inf") if number == 6 else loss)
    assert call(*argv, "--out", tmp_path / "bad", "--max_steps=6") == 0
    good, bad = load(tmp_path / "good"), load(tmp_path / "bad")
    assert differences(good["model"], bad["model"]) == []
    assert differences(good["optimizer"]["state"], bad["optimizer"]["state"]) == []


def test_ten_bad_steps_in_a_row_stop_the_run_and_spare_the_checkpoint(tmp_path, data, monkeypatch, capsys):
    argv = [*TINY, "--data", data]
    assert call(*argv, "--out", tmp_path / "good", "--max_steps=2") == 0
    disturb(monkeypatch, lambda number, loss: loss * float("nan") if number > 2 else loss)
    capsys.readouterr()
    assert call(*argv, "--out", tmp_path / "bad") == 1
    err = capsys.readouterr().err
    assert sentence(err).startswith("error:") and "ten" in err and "--lr" in err
    assert differences(weights(tmp_path / "good"), weights(tmp_path / "bad")) == []
    assert [line["skipped"] for line in read_log(tmp_path / "bad")][-1] == 9


def test_bad_steps_that_are_not_in_a_row_do_not_stop_the_run(tmp_path, data, monkeypatch):
    disturb(monkeypatch, lambda number, loss: loss * float("nan") if number % 10 else loss)
    assert call(*TINY, "--epochs=10", "--data", data, "--out", tmp_path / "run", "--log_every=10") == 0
    assert load(tmp_path / "run")["skipped"] == 27


def test_ten_bad_steps_before_the_first_checkpoint_name_no_file_that_is_not_there(
    tmp_path, data, monkeypatch, capsys
):
    disturb(monkeypatch, lambda number, loss: loss * float("nan"))
    assert call(*TINY, "--data", data, "--out", tmp_path / "run", "--save_every=100") == 1
    err = sentence(capsys.readouterr().err)
    assert "last.pt" not in err and "--lr" in err


def sentence(text):
    """The one line of stderr that begins with error: there must be no other, and no traceback."""
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, text
    assert text.endswith(lines[0] + "\n"), text  # nothing follows it
    return lines[0]


def test_out_of_memory_names_the_flag_that_helps(tmp_path, data, monkeypatch, capsys):
    def full(number, loss):
        if number == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss

    argv = [*TINY, "--data", data, "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        disturb(patch, full)
        assert call(*argv) == 1
    assert "--micro_batch" in sentence(capsys.readouterr().err)
    assert call(*argv, "--micro_batch=4") == 0  # as the sentence says, the run goes on
    assert [line["step"] for line in read_log(tmp_path / "run")] == list(range(1, 13))


def test_a_full_disk_is_a_sentence_and_spares_the_checkpoint(tmp_path, data, capsys):
    argv = [*TINY, "--data", data, "--out", tmp_path / "run"]
    assert call(*argv, "--max_steps=3") == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    capsys.readouterr()
    resource = pytest.importorskip("resource", reason="POSIX limits")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # no file may grow beyond 50 kB
    try:
        code = call(*argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    assert str(tmp_path / "run") in sentence(capsys.readouterr().err)
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert call(*argv) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_files_that_break_during_the_run(tmp_path, workers):
    """One is replaced by its neighbour, with a warning; ten in a row end the run with a sentence.

    In a process of its own: its workers must not keep it from ending, either.
    """
    data = write_images(tmp_path / "images")
    argv = [*TINY, "--data", data, "--out", tmp_path / "run", "--workers", workers]
    for index in range(11, 24):
        (data / f"{index:02}.png").write_bytes(b"")
    code, _, err = finish(start(*argv), seconds=60)
    assert code == 1
    # With workers, the warnings of files read ahead stand before and after the sentence.
    assert len(re.findall("error: .*cannot be read as an image", err)) == 1 and "Traceback" not in err
    assert err.count("the next file stands in for it") >= 9
    assert not [name for name in os.listdir(tmp_path / "run") if "tmp" in name]


# -- the same command, another command


def test_a_finished_run_says_so(tmp_path, data, capsys):
    argv = [*TINY, "--data", data, "--out", tmp_path / "run"]
    assert call(*argv) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    for more in ([], ["--max_steps=5"], ["--max_steps=1000"]):
        assert call(*argv, *more) == 0
        out, err = capsys.readouterr()
        assert "finished" in out and "--fresh" in out and not err, more
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize(
    "changed",
    [
        "--lr=0.002",
        "--seed=1",
        "--mask_ratio=0.25",
        "--supervise=visible",
        "--batch_size=12",
        "--epochs=5",
        "--drop_path=0.5",
        "--precision=bf16",
        "--mask=random",
        "--depth=3",
    ],
)
def test_a_changed_field_stops_with_its_name(data, unbroken, capsys, changed):
    before = (unbroken / "last.pt").read_bytes()
    assert call(*LONG, "--data", data, "--out", unbroken, changed) == 1
    err = sentence(capsys.readouterr().err)
    assert changed.split("=")[0] in err and str(unbroken) in err and "--fresh" in err
    assert (unbroken / "last.pt").read_bytes() == before


def test_other_data_stop_with_their_name_and_their_count(tmp_path, data, unbroken, capsys):
    other = tmp_path / "images"
    shutil.copytree(data, other)
    assert call(*LONG, "--data", other, "--out", unbroken) == 1
    assert "--data" in sentence(capsys.readouterr().err)
    shutil.copytree(unbroken, tmp_path / "run")
    moved = data.rename(data.with_name("moved"))
    try:
        shutil.copytree(moved, data)
        (data / "00.png").unlink()
        assert call(*LONG, "--data", data, "--out", tmp_path / "run") == 1
        err = sentence(capsys.readouterr().err)
        assert "24 images" in err and "23" in err
    finally:
        shutil.rmtree(data)
        moved.rename(data)


def test_what_may_change_does(tmp_path, data, unbroken):
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    for path in (out, out.with_name("elsewhere")):  # a folder may be moved, too
        if path != out:
            out.rename(path)
        before = load(path)["step"]
        assert (
            call(
                *LONG,
                "--data",
                data,
                "--out",
                path,
                "--workers=1",
                "--log_every=2",
                "--save_every=5",
                "--micro_batch=4",
                "--device=auto" if not torch.cuda.is_available() else "--device=cpu",
                "--max_steps",
                before + 4,
            )
            == 0
        )
        assert load(path)["step"] == before + 4


def test_fresh_starts_in_a_folder_of_its_own(tmp_path, data):
    argv = [*TINY, "--data", data, "--out", tmp_path / "run", "--max_steps=2"]
    for names in (["run"], ["run", "run-2"], ["run", "run-2", "run-3"]):
        assert call(*argv, "--fresh") == 0
        assert sorted(os.listdir(tmp_path)) == names
    assert differences(weights(tmp_path / "run"), weights(tmp_path / "run-3")) == []
    assert call(*argv, "--fresh", "--seed=1") == 0
    assert differences(weights(tmp_path / "run"), weights(tmp_path / "run-4"))


# -- what is written


def test_everything_written_can_be_read_by_others(unbroken):
    names = {"config.json", "log.jsonl", "last.pt", "encoder.safetensors", "preview.png"}
    assert set(os.listdir(unbroken)) == names
    config = json.loads((unbroken / "config.json").read_text())
    assert (config["method"], config["num_images"], config["batch_size"], config["total_steps"]) == (
        "cae_v2",
        24,
        8,
        600,
    )
    assert config["lr"] == 1e-3 and config["teacher"] == "demo" and "command" in config and "commit" in config
    lines = read_log(unbroken)
    assert [line["step"] for line in lines] == list(range(1, STOP + 1))
    assert {"loss", "lr", "grad_norm", "images_per_s", "data_wait", "memory_gb", "eta_s"} <= set(lines[0])
    rates = [common.learning_rate(step, 1e-3, 6, 600, 1e-5) for step in range(STOP)]
    assert [line["lr"] for line in lines] == pytest.approx(rates, rel=1e-9)
    state = load(unbroken)  # torch's default loader takes plain data only
    assert state["method"] == "cae_v2" and state["config"]["epochs"] == 200
    assert all(type(value) in (str, int, float, bool) for value in state["config"].values())


def test_the_exported_encoder_is_timms_vision_transformer(unbroken, data):
    with safe_open(unbroken / "encoder.safetensors", "pt") as file:
        config = json.loads(file.metadata()["about"])["config"]
    theirs = VisionTransformer(**config, num_classes=0, global_pool="").eval()
    theirs.load_state_dict(load_file(unbroken / "encoder.safetensors"), strict=True)
    trained = {
        name.removeprefix("encoder."): tensor
        for name, tensor in weights(unbroken).items()
        if name.startswith("encoder.")
    }
    ours = common.ViT(**config).eval()
    ours.load_state_dict(trained)
    images = common.normalise(torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            ours(images)[:, 0], theirs.forward_head(theirs.forward_features(images), pre_logits=True)[:, 0]
        )


def picture(path):
    from PIL import Image

    with Image.open(path) as image:
        assert image.format == "PNG"
        return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)


def test_previews_of_untrained_given_and_trained_weights(tmp_path, data, unbroken, capsys):
    argv = [*LONG, "--data", data]
    absent = tmp_path / "no run"
    assert call(*argv, "--out", absent, "--preview", tmp_path / "untrained.png") == 0
    assert "untrained" in capsys.readouterr().out
    assert (
        call(*argv, "--out", absent, "--preview", tmp_path / "init.png", "--init", unbroken / "last.pt") == 0
    )
    assert "last.pt" in capsys.readouterr().out
    assert call(*argv, "--out", unbroken, "--preview", tmp_path / "trained.png") == 0
    assert str(unbroken) in capsys.readouterr().out
    assert not absent.exists()
    untrained, init, trained = (
        picture(tmp_path / f"{name}.png") for name in ("untrained", "init", "trained")
    )
    assert torch.equal(init, trained) and not torch.equal(untrained, trained)
    assert torch.equal(trained, picture(unbroken / "preview.png"))  # as the run itself draws it
    assert load(unbroken)["step"] == STOP


# -- --init


def first_weights(out, *argv):
    """The weights that a run starts from: the rate of the first step of a warm-up is zero."""
    assert call(*TINY, *argv, "--out", out, "--warmup_epochs=2", "--max_steps=1") == 0
    return weights(out)


def test_init_from_a_checkpoint_and_from_an_encoder(tmp_path, data, unbroken):
    trained, fresh = weights(unbroken), first_weights(tmp_path / "0", "--data", data)
    whole = first_weights(tmp_path / "1", "--data", data, "--init", unbroken / "last.pt")
    assert differences(whole, trained) == []
    encoder = first_weights(tmp_path / "2", "--data", data, "--init", unbroken / "encoder.safetensors")
    for name, tensor in encoder.items():
        assert torch.equal(tensor, (trained if name.startswith("encoder.") else fresh)[name]), name


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize(
    "wrap",
    [lambda state: state, lambda state: {"model": state, "args": argparse.Namespace(lr=1), "epoch": 3}],
    ids=["bare", "as released"],
)
def test_init_from_the_authors_checkpoint(tmp_path, data, name, wrap):
    case = GOLDEN[name]
    c = case["config"]
    torch.save(wrap(case["state_dict"]), tmp_path / "official.pth")
    teacher = teacher_file(tmp_path, f"init_{name}", embed_dim=c["num_out_dim"])
    sizes = {
        "img_size": 64,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 4,
        "regressor_dim": c["decoder_embed_dim"],
        "regressor_depth": c["regressor_depth"],
        "regressor_heads": c["decoder_num_heads"],
        "init_values": c["init_values"],
    }
    flags = [f"--{flag}={value}" for flag, value in sizes.items()]
    ours = first_weights(
        tmp_path / "run", "--data", data, *flags, "--teacher", teacher, "--init", tmp_path / "official.pth"
    )
    expected = cae_v2.CAEv2(
        64,
        8,
        48,
        3,
        4,
        c["num_out_dim"],
        c["decoder_embed_dim"],
        c["regressor_depth"],
        c["decoder_num_heads"],
        c["init_values"],
    )
    cae_v2.load_official(expected, case["state_dict"])
    assert differences(ours, dict(expected.state_dict())) == []


def test_init_of_another_size_names_the_file_and_the_tensor(tmp_path, data, unbroken, capsys):
    for file in ("last.pt", "encoder.safetensors"):
        argv = [
            *TINY,
            "--embed_dim=64",
            "--regressor_dim=64",
            "--data",
            data,
            "--out",
            tmp_path / "run",
            "--init",
            unbroken / file,
        ]
        assert call(*argv) == 1
        err = sentence(capsys.readouterr().err)
        assert file in err and "size mismatch" in err
    assert not (tmp_path / "run").exists()
