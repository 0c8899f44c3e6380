"""What disks, machines and people do to a run: every operation of a save fails once, a power cut, random SIGKILLs,
damaged states. `make faults` runs all, the slow part too, and prints ROWS: fault, tries, lost."""

import argparse
import builtins
import contextlib
import errno
import itertools
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import common
from helpers import assert_same_run, differences, load, read_log, refused, sentence
from test_runs import SCRIPTS, each, places, script, steps, unbroken  # noqa: F401 (fixtures)

ROWS, KILLS = [], int(os.environ.get("KILLS", 50))


class Disk:
    """Counts what is done to files, writes it down, and may fail: `fails(n)` for the n-th operation."""

    def __init__(self, monkeypatch, fails=lambda number: False):
        self.events = []

        def watched(name, function):
            def operation(*arguments, **more):
                mode = (arguments[1:2] or [more.get("mode", "r")])[0]
                if name != "open" or any(letter in str(mode) for letter in "wa+x"):
                    self.events.append((name, *map(str, arguments[:2])))
                    if fails(len(self.events)):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
                return function(*arguments, **more)
            return operation

        for place, name in ((os, "replace"), (os, "link"), (os, "fsync"), (os, "unlink"), (builtins, "open")):
            monkeypatch.setattr(place, name, watched(name, getattr(place, name)))
        save = torch.save
        monkeypatch.setattr(torch, "save", watched("save", lambda state, path: save(state, path)))


def tiny_run(folder, steps, save_every=1):
    """A run of one layer that has saved `steps` times."""
    config = common.TrainConfig(device="cpu", workers=0, save_every=save_every, log_every=1)
    run = common.Run("tiny", config, folder, "test")
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    images = common.Images(torch.zeros(8, 3, 4, 4, dtype=torch.uint8))
    samples = common.Samples(images, lambda image, label: torch.ones(4), 0)
    vit = common.ViT(8, 4, embed_dim=8, depth=1, num_heads=1)
    plan = common.make_plan(8, 4, 0, 100, 1)
    run.begin(common.Dist(0, 1, torch.device("cpu")), plan, samples, model, optimizer)
    run.stop = min(run.start + steps, plan.total_steps)
    for step in run.steps():
        for batch in run.micro_batches():
            loss = model(batch.float()).square().mean()
            loss.backward()
            run.record(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
        if run.log(step + 1, 0.1, torch.tensor(1.0)):
            run.save(model, optimizer, step + 1, vit)
    return run


@pytest.mark.parametrize("forever", [False, True])  # once, or from then on: a disk that became read-only
def test_every_operation_of_a_save_fails_once(tmp_path, monkeypatch, capsys, forever):
    lost = tries = 0
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        tiny_run(folder, 2)
        with monkeypatch.context() as patch:
            disk = Disk(patch, lambda count: count == number or forever and count > number)
            with contextlib.suppress(OSError):
                tiny_run(folder, 1)
        if len(disk.events) < number:
            break
        tries += 1
        state = common.Run("tiny", common.TrainConfig(), folder, "test").state
        lost += state.get("step") not in (2, 3)
        lost += not forever and bool(list(folder.glob(".*.tmp.*")))  # nothing stays behind
        if (folder / "previous.pt").exists():
            lost += common.read_checkpoint(folder / "previous.pt")["step"] not in (1, 2)
        tiny_run(folder, 1)  # goes on
    ROWS.append((f"an operation of a start and a save fails, {'and all after it' if forever else 'once'}", tries, lost))
    assert lost == 0 and tries > 20


def test_a_power_cut_at_any_moment_finds_a_whole_state(tmp_path, monkeypatch):
    """Of what is renamed the content must be on the disk before, and the name soon after: what is not synced may be
    lost in any order."""
    tiny_run(tmp_path, 2)
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        tiny_run(tmp_path, 1)
    kinds = [event[0] for event in disk.events]
    renames = {number: event for number, event in enumerate(disk.events) if event[0] == "replace"}
    for number in renames:  # its content; then the folder's
        before = [kind for kind in kinds[:number] if kind in ("fsync", "replace", "save", "open")]
        assert before[-1] == kinds[number + 1] == "fsync", renames[number]
    ROWS.append(("power cut before or after a rename: the content was synced, the name is", len(renames), 0))
    assert len(renames) >= 3
    assert {Path(event[2]).name for event in renames.values()} >= {"last.pt", "encoder.safetensors"}


def test_a_clock_that_jumps(tmp_path, monkeypatch):
    clock = itertools.cycle([5.0, 1e9, 5.0, 5.0, -3.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    tiny_run(tmp_path, 6)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]


def damage(path, kind):
    content = bytearray(path.read_bytes())
    if kind == "flip":
        content[random.randrange(len(content) // 4, 3 * len(content) // 4)] ^= 1 << random.randrange(8)
    path.write_bytes(dict(empty=b"", cut=content[: random.randrange(1, len(content))], text=b"<html>",
                          zeros=bytes(len(content))).get(kind, content))


@pytest.mark.parametrize("kind", ["empty", "cut", "zeros", "text", "flip", "missing"])
def test_a_damaged_state_is_told_and_the_one_before_goes_on(tmp_path, capsys, kind):
    """To the same bits; only where both are bad it stops. What was damaged never becomes previous.pt."""
    random.seed(0)
    tiny_run(tmp_path / "whole", 4)
    lost = tries = 0
    for number in range(40 if kind == "flip" else 5):
        out = tmp_path / f"{kind}{number}"
        tiny_run(out, 3)
        if kind == "missing":
            (out / "last.pt").unlink()
        else:
            damage(out / "last.pt", kind)
            if kind == "flip":  # where only padding was hit nothing is wrong
                with contextlib.suppress(ValueError):
                    common.read_checkpoint(out / "last.pt")
                    continue
        capsys.readouterr()
        tiny_run(out, 1)
        assert "the run goes on from previous.pt, step 2" in capsys.readouterr().err
        assert common.read_checkpoint(out / "previous.pt")["step"] == 2  # not the damaged one
        tiny_run(out, 1)
        tries += 1
        lost += bool(load(out)["step"] != 4 or (out / "log.jsonl").read_text().count("\n") != 4)
        assert common.read_checkpoint(out / "previous.pt")["step"] == 3
        for name in ("last.pt", "previous.pt"):
            (out / name).write_bytes(b"")
        refused("last.pt .* and .*previous.pt .* there is nothing to go on from, --fresh", tiny_run, out, 1)
    ROWS.append((f"last.pt {kind}", tries, lost))
    assert lost == 0 and tries >= 3


@pytest.mark.parametrize("change, words", [
    (lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)), "an optimiser that does not fit"),
    (lambda s: s["optimizer"].update(state={}), "an optimiser that does not fit"),
    (lambda s: s["optimizer"]["state"][0].pop("exp_avg_sq"), "an optimiser that does not fit"),
    (lambda s: s["optimizer"]["state"][0]["exp_avg_sq"].fill_(float("inf")), "or is not finite"),
    (lambda s: s["model"].update(weight=torch.zeros(3, 4)), r"weight is \(3, 4\) there and \(4, 4\) here"),
    (lambda s: s["model"].update(weight=torch.zeros(4, 4, dtype=torch.int8)), "or of another type"),
    (lambda s: s["model"].pop("bias"), "bias is None there"), (lambda s: s["model"].update(x=torch.zeros(1)), "x is"),
    (lambda s: s.update(version=9), "the version 9"), (lambda s: s.pop("step"), "it has no step"),
    (lambda s: s.update(skipped="x"), "it has no skipped"), (lambda s: s.pop("optimizer"), "it has no optimizer"),
    (lambda s: s["model"]["bias"].fill_(float("nan")), "weights that are not finite")])
def test_a_state_that_does_not_fit_is_one_sentence(tmp_path, change, words):
    tiny_run(tmp_path, 1)
    state = load(tmp_path)
    change(state)
    torch.save(state, tmp_path / "last.pt")
    refused(words, tiny_run, tmp_path, 1)


@pytest.mark.parametrize("name, read", [("x.pt", torch.load), ("x.safetensors", load_file)])
def test_a_flipped_bit_in_the_middle_of_a_tensor_is_seen(tmp_path, name, read):
    """By us: torch and safetensors do not look."""
    vit, path = common.ViT(8, 4, embed_dim=8, depth=1, num_heads=1), tmp_path / name
    common.save_encoder(vit, path) if name == "x.safetensors" else torch.save(dict(vit.state_dict()), path)
    content = bytearray(path.read_bytes())
    content[content.index(vit.blocks[0].mlp.fc1.weight.detach().numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert differences(dict(vit.state_dict()), read(path)) == ["/blocks.0.mlp.fc1.weight"]
    refused(f"{name} cannot be read as a checkpoint: it is cut off, damaged", common.read_checkpoint, path)


@pytest.mark.parametrize("moment", [False, True])
def test_nothing_that_is_not_finite_is_saved(tmp_path, monkeypatch, moment):
    tiny_run(tmp_path, 2)
    before, step = (tmp_path / "last.pt").read_bytes(), torch.optim.AdamW.step
    def spoiled(optimizer):
        step(optimizer)
        p = optimizer.param_groups[0]["params"][0]
        (optimizer.state[p]["exp_avg_sq"] if moment else p.data)[0, 0] = math.inf
    monkeypatch.setattr(torch.optim.AdamW, "step", spoiled)
    refused("not finite after step 3, which is not saved", tiny_run, tmp_path, 1)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_nothing_is_replaced_by_a_new_run(tmp_path):
    """But the folder of a run that was killed before it first saved is its own."""
    old, killed, tested = (tmp_path / name for name in ("old", "killed", "tested"))
    tiny_run(old, 3)
    (old / "notes.txt").touch()
    encoder, log, config = files = ["encoder.safetensors", "log.jsonl", "config.json"]
    for number, left in enumerate((files, [log, config], [encoder], ["notes.txt"])):
        new = tmp_path / str(number)
        shutil.copytree(old, new, ignore=lambda folder, names: {*names} - {*left})
        refused("holds .* no last.pt .* --fresh", tiny_run, new, 1)
        assert {name: (new / name).read_bytes() for name in left} == {name: (old / name).read_bytes() for name in left}
    tested.mkdir(), (tested / "eval.jsonl").touch()
    tiny_run(tested, 1)
    vit = common.ViT(8, 4, embed_dim=8, depth=1, num_heads=1)
    killed.mkdir(), shutil.copy(old / config, killed)
    common.save_encoder(vit, killed / encoder, step=1)  # between the two files of a save
    tiny_run(killed, 1)
    (killed / "last.pt").unlink(), (killed / log).unlink()
    common.save_encoder(vit, killed / encoder, step=9)
    refused("no last.pt", tiny_run, killed, 1)


def test_a_damaged_log_is_set_aside_and_a_full_disk_costs_no_line(tmp_path, capsys, monkeypatch):
    tiny_run(tmp_path, 2)
    whole = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(b"\xff\x00}\n" + whole + b'{}\n[1]\n{"step": "x"}\n{"step": 1, "lo')
    with monkeypatch.context() as patch:
        real, count = builtins.open, itertools.count()
        def full(path, mode="r", *rest, **more):
            if str(path).endswith("log.jsonl") and mode == "a" and next(count) < 2:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return real(path, mode, *rest, **more)
        patch.setattr(builtins, "open", full)
        tiny_run(tmp_path, 3)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4, 5]
    assert (tmp_path / "log.jsonl").read_bytes().startswith(whole)
    assert (tmp_path / "log.jsonl.broken").read_bytes() == b'\xff\x00}\n{}\n[1]\n{"step": "x"}\n'
    assert "4 damaged lines" in (err := capsys.readouterr().err) and err.count("No space left on device") == 2


def test_averages_of_the_log_go_on_bit_for_bit(tmp_path, monkeypatch):
    """Whatever steps a stop and --log_every have in common."""
    parse = common.TrainConfig
    monkeypatch.setattr(common, "TrainConfig", lambda **more: parse(**{**more, "log_every": 5}))
    tiny_run(tmp_path / "one", 15)
    for stop in (3, 4, 1, 7):
        tiny_run(tmp_path / "two", stop)
    lines = [{line["step"]: line["loss"] for line in read_log(tmp_path / name)} for name in ("one", "two")]
    assert {step: lines[1][step] for step in (5, 10, 15)} == lines[0]


@each(without=[*SCRIPTS][1:])
def test_other_data_stop_and_are_accepted_knowingly(script, unbroken, places, tmp_path, capsys):  # noqa: F811
    """Of equal count as well; the same elsewhere goes on."""
    out, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(unbroken, out), shutil.copytree(places / "images", data)
    assert script(out, f"--data={data}/", "--max_steps=8") == 0
    (data / "03.png").rename(data / "99.png")
    assert script(out, f"--data={data}", "--max_steps=9") == 1
    assert "started with 24 images, now there are 24, or others" in sentence(capsys.readouterr().err)
    (data / "99.png").unlink()
    assert script(out, f"--data={data}", "--max_steps=9") == 1
    assert script(out, f"--data={data}", "--max_steps=9", "--data_changed") == 0
    assert {"step": 8, "data_changed": 23} in read_log(out)
    assert script(out, f"--data={data}", "--max_steps=10") == 0 and steps(out) == [*range(1, 11)]


def test_replaced_images_are_counted_told_once_and_too_many_stop(tmp_path, capsys):
    class Some(common.Images):
        def __getitem__(self, index):
            if index % 4 == 1:
                raise ValueError(f"file {index} cannot be read")
            return super().__getitem__(index)
    images = Some(torch.zeros(48, 3, 4, 4, dtype=torch.uint8))
    samples = common.Samples(images, lambda image, label: torch.ones(4), 0)
    for epoch in range(3):
        for index in range(48):
            samples[epoch, index]
    assert samples.replaced() == 12 and capsys.readouterr().err.count("cannot be read") == 12
    run = common.Run("x", common.TrainConfig(), tmp_path)
    run.samples, run.num_images = samples, 48
    for allowed in ({}, dict(max_bad=0.2), dict(max_bad=0.0)):
        run.config = common.TrainConfig(**allowed)
        refused("12 of 48 images cannot be read.*--max_bad", run.check_images)
    run.config = common.TrainConfig(max_bad=0.25)
    run.check_images()


def test_a_picture_is_no_reason_to_stop_and_control_characters_reach_no_terminal(tmp_path, capsys, monkeypatch):
    run = common.Run("x", common.TrainConfig(), tmp_path)
    run.draw(lambda path: 1 / 0)
    assert "warning: no preview.png (ZeroDivisionError" in capsys.readouterr().err
    common.say("a\x1b[31mred\x07\n b\x9b1m")
    assert capsys.readouterr().out == "a?[31mred?\n b?1m\n"
    closed = open(os.devnull)
    monkeypatch.setattr(sys, "stdout", closed)  # not open for writing
    common.say("nobody hears it")


def test_a_second_signal_ends_at_once_but_not_torchruns_own(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    run = common.Run("x", common.TrainConfig(), tmp_path)
    run.signal, run.saved = None, 0.0
    for number in (signal.SIGINT, signal.SIGTERM):
        run._remember(number, None)
    assert ended == [128 + signal.SIGTERM] and run.signal == signal.SIGINT
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    run._remember(signal.SIGTERM, None)
    assert len(ended) == 1
    run.signalled -= 2
    run._remember(signal.SIGTERM, None)
    assert len(ended) == 2
    run.dist, run.signal, run.parent = common.Dist(0, 1, None), None, -1  # torchrun is gone
    assert run._agreed() == [1, 1] and run.signal == signal.SIGTERM


def test_a_save_is_of_its_step_however_slow_the_disk_and_a_full_one_is_told(tmp_path, monkeypatch):
    run = tiny_run(tmp_path, 2)
    model, event, save = torch.nn.Linear(4, 4), threading.Event(), torch.save
    optimizer, before = torch.optim.AdamW(model.parameters()), model.weight.detach().clone()
    monkeypatch.setattr(torch, "save", lambda *a: event.wait(30) and save(*a))
    run.save(model, optimizer, 3)
    with torch.no_grad():
        model.weight.zero_()
    assert load(tmp_path)["step"] == 2  # the thread still waits for its disk, and the loop went on
    event.set()
    run.finish_saving()
    assert load(tmp_path)["step"] == 3 and torch.equal(load(tmp_path)["model"]["weight"], before)
    monkeypatch.setattr(torch, "save", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    model.weight.data.copy_(before)
    run.save(model, optimizer, 4)
    futures.wait([run.saving])
    refused("No space left", run.log, 5, 0.1, torch.tensor(1.0), error=OSError)
    assert load(tmp_path)["step"] == 3


@pytest.mark.parametrize("seconds, steps", [(0, [2, 4, 5]), (600, [5])])
def test_without_save_every_an_epochs_end_saves_if_the_last_time_is_ten_minutes_ago(tmp_path, monkeypatch, seconds,
                                                                                  steps):
    saved, save = [], common.Run.save
    monkeypatch.setattr(common, "SAVE_SECONDS", seconds)
    monkeypatch.setattr(common.Run, "save", lambda self, *a, **k: saved.append(a[2]) or save(self, *a, **k))
    tiny_run(tmp_path, 5, save_every=0)
    assert saved == steps


def test_processes_agree_a_step_later_and_wait_for_no_answer(tmp_path, monkeypatch):
    run, asked = tiny_run(tmp_path, 1), []
    run.dist = common.Dist(0, 2, run.dist.device)
    def all_reduce(tensor, async_op):
        assert async_op
        asked.append(tensor)
        first = len(asked) == 1  # it finds a signal elsewhere
        return argparse.Namespace(wait=lambda: tensor.add_(torch.tensor([first, 0])))
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert [run._agreed() for _ in range(3)] == [[0, 0], [1, 0], [0, 0]] and len(asked) == 3


def test_a_run_that_waits_for_images_says_so_once(tmp_path, monkeypatch, capsys):
    run = tiny_run(tmp_path, 2)
    for step in (3, 4, 5):
        run.waited, run.sums, run.count = 1e9, dict(loss=torch.tensor(1.0)), 1
        run._write_line(step, 0.1, torch.tensor(1.0))
    text = capsys.readouterr().out
    assert text.count("waiting  for images") == 1 and "--workers" in text and "eval.shrink" in text


@pytest.mark.parametrize("change", [dict(seed=1), dict(step=3), dict(images="y"), dict(commit="z"), dict(out="r1")])
def test_processes_that_see_different_things_stop_together(tmp_path, monkeypatch, change):
    def gather(everyone, facts):
        everyone[:] = [facts, {**facts, **change}]
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    run = common.Run("x", common.TrainConfig(), tmp_path)
    samples = common.Samples(common.Images(torch.zeros(8, 3, 4, 4, dtype=torch.uint8)), None, 0)
    with pytest.raises(ValueError, match=f"process 1 has another {[*change][0]} than process 0"):
        run.begin(common.Dist(0, 2, None), None, samples, None, None)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]  # nothing is written before
    change = {}
    run._compare_processes()


def test_fresh_was_for_the_first_start_of_a_job_that_torchrun_restarts(tmp_path, monkeypatch):
    config = common.TrainConfig(fresh=True)
    for name in ("run", "run-2"):
        (tmp_path / name).mkdir()
    assert common.Run("x", config, tmp_path / "run").folder.name == "run-3"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert common.Run("x", config, tmp_path / "run").folder.name == "run-2"


def test_a_link_at_a_temporary_name_is_not_followed(tmp_path):
    (tmp_path / "other").write_text("kept")
    (tmp_path / f".x.{os.getpid()}.tmp.json").symlink_to(tmp_path / "other")
    common.write_atomically(tmp_path / "x.json", lambda path: path.write_text("new"))
    assert ((tmp_path / "other").read_text(), (tmp_path / "x.json").read_text()) == ("kept", "new")


def test_a_pipe_is_no_image_and_nothing_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    refused("a.png cannot be read", common.read_image, tmp_path / "a.png")
    refused("holds no image", common.list_images, tmp_path, error=FileNotFoundError)


@pytest.mark.slow
@each()
def test_random_kills_lose_nothing(script, places, tmp_path):  # noqa: F811
    """SIGKILL at random moments of forked processes, until a chain of them ends; equal bits each time."""
    flags, lost, kills, chains = ["--max_steps=15", "--save_every=2"], 0, 0, 0
    random.seed(script.name)
    begin = time.time()
    assert script(tmp_path / "whole", *flags) == 0
    whole = time.time() - begin
    while kills < KILLS:
        out, killed, chains = tmp_path / f"chain{chains}", True, chains + 1
        while killed:
            child = multiprocessing.get_context("fork").Process(target=script, args=(out, *flags))
            child.start()
            child.join(random.uniform(0, 2 * whole + 0.3))
            child.kill()
            child.join()
            killed = child.exitcode == -signal.SIGKILL
            kills += killed
        try:
            assert_same_run(out, tmp_path / "whole")
        except (AssertionError, FileNotFoundError):
            lost += 1
        shutil.rmtree(out)
    ROWS.append((f"SIGKILL at a random moment, {script.name}, {chains} runs", kills, lost))
    assert lost == 0
