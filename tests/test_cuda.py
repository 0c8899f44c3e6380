"""Scripts as they run on a GPU: on a pretended one (tests/pretended_cuda.py), compiled, in bf16, in eight processes."""

import collections
import functools
import importlib
import itertools
import json

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import beyond_masking
import cae_v2
import common
import mfm_mae
from helpers import QUICK, assert_same_run, call, finish, load, numbers, read_log, start
from pretended_cuda import pretended_cuda
from test_runs import SCRIPTS, SHARED, places  # noqa: F401 (places is a fixture)

TASKS = "mask+zoom_in", "zoom_out", "distort", "blur", "decolor"
METHODS = {
    "mfm": "mfm_mae --img_size=32 --patch_size=8",
    "mfm, attention": "mfm_mae --img_size=32 --patch_size=8 --fusion=attention --target=lowpass",
    "mae": "mfm_mae --img_size=32 --patch_size=8 --fuse=none",
    "cae_v2": "cae_v2 --img_size=32 --patch_size=8 --teacher=demo --lr=1e-3 --drop_path=0.3",
    **{task: f"beyond_masking --task={task} --img_size=28 --patch_size=7" for task in TASKS}}
METHODS = {name: f"{words} --data=#images {' '.join(QUICK)} --out=@run" for name, words in METHODS.items()}
READ = "--checkpoint=#encoder --workers=0 --data=#classes"
EVALUATIONS = {
    "lars": f"eval.linear_probe {READ} --out=@run --epochs=2 --warmup_epochs=1 --batch_size=8 --compile=off",
    "ridge": f"eval.linear_probe {READ} --protocol=ridge",
    "knn": f"eval.knn {READ}",
    "features": f"eval.features {READ} --out=@features.safetensors",
    "frequency": f"eval.frequency {READ}",
    **{name: f"eval.{name} {' '.join(SHARED)} {SCRIPTS[f'eval.{name}'].replace('@', '#')} --out=@run {more}"
       for name, more in (("finetune", "--epochs=2"), ("segment", "--steps=4"), ("detect", "--max_steps=2"))}}
ALL = METHODS | EVALUATIONS


def run(words, read, out, *more):
    """A script's main in this process: its exit code. `#` in its words is what is read, `@` where it writes."""
    name, *flags = words.replace("#", f"{read}/").replace("@", f"{out}/").split()
    return call(*flags, *more, main=importlib.import_module(name).main)


def test_the_tool():
    here, ids = torch.arange(6.0).view(2, 3), torch.tensor([1, 0])
    with pretended_cuda() as waits:
        there, layer = here.to("cuda"), nn.Linear(3, 2).cuda()
        assert [str(x.device) for x in (there, there.cpu(), there * torch.tensor(2.0))] == ["cuda:0", "cpu", "cuda:0"]
        for wrong in (lambda: there + here, lambda: here[ids.cuda()], lambda: torch.cat([there, here]),
                      lambda: there.gather(1, ids[:, None]), lambda: here.add_(there), lambda: there.where(here > 0, 0),
                      lambda: nn.Linear(3, 2)(there), lambda: layer(here), lambda: there.numpy(),
                      lambda: torch.rand(2, device="cuda", generator=torch.Generator())):
            with pytest.raises(RuntimeError):
                wrong()
        waits.clear()
        assert there[ids].tolist() == here[ids].tolist() and there[there > 2].sum().item() == 12
        assert [wait.kind for wait in waits] == ["blocking copy", "copy to the CPU", "nonzero", "item"]
        pinned, buffer = here.pin_memory(), torch.zeros(2, 3, pin_memory=True)
        assert pinned.is_pinned() and pinned[1:].is_pinned() and buffer.is_pinned() and not here.is_pinned()
        pinned.cuda(non_blocking=True), here.cuda(non_blocking=True), torch.tensor([1.0], device="cuda")
        assert buffer.copy_(there, non_blocking=True).count_nonzero() == 0  # it has not arrived
        torch.cuda.current_stream().synchronize()
        assert torch.equal(buffer, here)
        assert [wait.kind for wait in waits[4:]] == ["pageable copy", "blocking copy", "synchronize"]
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        with torch.autocast("cuda", torch.bfloat16):
            assert (answer := layer(there)).dtype == torch.bfloat16
        answer.float().sum().backward()
        for found, changed in ((1.0, False), (0.0, True)):
            before, optimizer.found_inf = layer.bias.detach().clone(), torch.tensor(found).cuda()
            optimizer.step()
            assert bool((layer.bias != before).all()) == changed


@pytest.mark.parametrize("name", METHODS)
def test_pretraining(name, places, tmp_path, capsys):
    """Steps, log, files, preview; and the same command again."""
    with pretended_cuda():
        for out, steps in (("cut", 3), ("cut", 6), ("whole", 6)):
            assert run(METHODS[name], places, tmp_path / out, "--device=cuda", f"--max_steps={steps}") == 0
    printed, out = capsys.readouterr(), tmp_path / "cut" / "run"
    assert_same_run(out, tmp_path / "whole" / "run")
    assert "cuda:0, bf16" in printed.out and "warning" not in printed.err
    assert [line["step"] for line in read_log(out)] == [1, 2, 3, 4, 5, 6] and (out / "preview.png").exists()
    assert common.read_about(out / "encoder.safetensors")["step"] == load(out)["step"] == 6
    assert {type(x) for x in load(out)["model"].values()} == {torch.Tensor}


@pytest.mark.parametrize("name", ["mfm", "cae_v2", "mask+zoom_in", "distort"])
def test_in_fp32_the_run_is_that_of_the_cpu(name, places, tmp_path):
    with pretended_cuda():
        assert run(METHODS[name], places, tmp_path / "cuda", "--device=cuda", "--max_steps=4", "--precision=fp32") == 0
    assert run(METHODS[name], places, tmp_path / "cpu", "--max_steps=4") == 0
    for ours, theirs in zip(*(numbers(tmp_path / device / "run") for device in ("cuda", "cpu")), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation(name, places, tmp_path, capsys):
    if name == "detect":
        pytest.importorskip("pycocotools")
    with pretended_cuda():
        assert run(EVALUATIONS[name], places, tmp_path, "--device=cuda") == 0
    result = json.loads((places / "encoder" / "eval.jsonl").read_text().splitlines()[-1])
    assert result["device"] == "cuda:0" and "warning" not in capsys.readouterr().err


# How often the host waits in one step of one micro batch, {what and where: count}; pageable memory is not pinned.
WAITS = {**dict.fromkeys([*METHODS, "segment"], {}),
         "finetune": {f"{wait}, eval/finetune.py:train": 1 for wait in ("item", "blocking copy")},  # for --ema
         "lars": {"item, common.py:may_step": 1, "item, eval/protocol.py:check_finite": 1,
                  "blocking copy, eval/linear_probe.py:train": 1}}  # the labels


def waits_of_a_step(name, places, out, monkeypatch):
    """{what and where: count} of the third step, which neither logs nor saves."""
    ends, log, more = [], common.Run.log, ["--max_steps=4"] * (name != "segment")
    with pretended_cuda() as waits:
        monkeypatch.setattr(common.Run, "log", lambda *args: (log(*args), ends.append(len(waits)))[0])
        assert run(ALL[name], places, out, "--device=cuda", "--log_every=9", "--save_every=9", *more) == 0
    return dict(collections.Counter(f"{wait.kind}, {wait.place}" for wait in waits[ends[1]: ends[2]]))


@pytest.mark.parametrize("name", [*METHODS, "finetune", "segment", "lars"])
def test_waits_of_a_step(name, places, tmp_path, monkeypatch):
    assert waits_of_a_step(name, places, tmp_path, monkeypatch) == WAITS[name]


def test_a_tensor_left_on_the_cpu_and_a_planted_wait_are_found(places, tmp_path, monkeypatch):
    normalise, record = common.normalise, common.Run.record
    monkeypatch.setattr(common.Run, "record", lambda self, loss, **parts: record(self, loss=loss, x=loss * loss.item()))
    found = waits_of_a_step("mfm", places, tmp_path / "wait", monkeypatch)
    assert found == {**WAITS["mfm"], "item, mfm_mae.py:train": 1}
    std = torch.tensor(common.IMAGENET_STD)[:, None, None]
    monkeypatch.setattr(common, "normalise", lambda images, *statistics: normalise(images, std=(1, 1, 1)) / std)
    with pretended_cuda(), pytest.raises(RuntimeError, match="must be on cuda:0"):
        run(METHODS["mfm"], places, tmp_path / "side", "--device=cuda", "--max_steps=1")


# Programs: in training, and after the first preview or test.
PROGRAMS = {"mfm": (2, 2), "cae_v2": (4, 4), "mask+zoom_in": (3, 3), "finetune": (2, 4)}


@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled_programs(name, places, tmp_path, monkeypatch):
    """No graph break; none is compiled later. On the CPU; its backend does nothing but count."""
    torch._dynamo.reset(), counters.clear()
    counter, log, counts = CompileCounter(), common.Run.log, []
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setattr(common.Run, "log", lambda *args: (log(*args), counts.append(counter.frame_count))[0])
    more = ["--epochs=4", "--ema=0", "--micro_batch=4"] if name == "finetune" else ["--max_steps=12"]
    assert run(ALL[name], places, tmp_path, "--compile=on", "--precision=bf16", "--save_every=3", *more) == 0
    assert counts == 3 * [PROGRAMS[name][0]] + 9 * [PROGRAMS[name][1]] and not counters["graph_break"]


@pytest.mark.parametrize("name", ["mfm", "mfm, attention", "cae_v2", "mask+zoom_in", "decolor"])
def test_gradients_in_bf16_point_where_those_in_fp32_do(name, places, tmp_path, monkeypatch):
    """Of all together, and of each parameter but one whose true gradient is zero. Measured: 0.99998 and 0.9999."""
    find_data, gradients = common.find_data, []
    monkeypatch.setattr(common, "find_data", lambda *args, **more: find_data(*args, num_scenes=32))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: gradients.append(
        [p.grad.cpu().double().flatten() for group in self.param_groups for p in group["params"]]))
    words = METHODS[name].replace("patch_size=8", "patch_size=4").replace("patch_size=7", "patch_size=4")
    more = ["--data=scenes", "--batch_size=32", "--max_steps=1", *["--drop_path=0"] * (name == "cae_v2")]
    assert run(words, places, tmp_path / "cpu", *more) == 0
    with pretended_cuda():
        assert run(words, places, tmp_path / "cuda", "--device=cuda", *more) == 0
    (exact, rounded), cosine = (torch.cat(part) for part in gradients), nn.CosineSimilarity(dim=0)
    assert 0.9999 < cosine(exact, rounded) < 1 - 1e-7 and abs(rounded.norm() / exact.norm() - 1) < 3e-3
    assert all(cosine(*pair) > 0.9998 for pair in zip(*gradients, strict=True) if pair[0].norm() > 1e-6 * exact.norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mfm", "cae_v2", "mask+zoom_in", "finetune"])
def test_eight_processes_are_one(name, places, tmp_path):
    more = ["--micro_batch=1", "--max_steps=3"]
    more += {"cae_v2": ["--drop_path=0"], "finetune": ["--drop_path=0", "--mixup=0", "--cutmix=0"]}.get(name, [])
    script, *flags = ALL[name].replace("#", f"{places}/").replace("@", f"{tmp_path}/eight/").split()
    code, out, err = finish(start(*flags, *more, script=["-m", script], processes=8), 300)
    assert code == 0 and "8 processes x 1 micro batches x 1 images" in out, err
    assert run(ALL[name], places, tmp_path / "one", *more) == 0
    for ours, theirs in zip(*(numbers(tmp_path / world / "run") for world in ("one", "eight")), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_each_parameter_gets_a_gradient(monkeypatch):
    """As DistributedDataParallel waits for it, with every combination of options."""
    small, images, cases = dict(model="vit_demo", img_size=28, patch_size=7), torch.randn(2, 3, 28, 28), []
    masks = [common.random_masks(2, 16, count) for count in (0, 8, 12)]
    for supervise, half, width, scale in itertools.product(("both", "visible", "masked"), (0, 1), (128, 64), (0.1, 0)):
        size = {**cae_v2.SIZES["vit_demo"], "regressor_dim": width, "init_values": scale}
        monkeypatch.setitem(cae_v2.SIZES, "vit_demo", size)
        if half or supervise != "masked":
            model = cae_v2.build(cae_v2.Config(**small, supervise=supervise, mask_ratio=half / 2), 24)
            cases.append((model, images, masks[half], torch.randn(2, 17, 24), supervise))
    for fuse, fusion, projection, target in itertools.product(
            ("", "none", "1,3"), ("average", "uniform", "attention"), ("linear", "none"), ("pixels", "lowpass")):
        config = mfm_mae.Config(**small, fuse=fuse, fusion=fusion, projection=projection, target=target)
        cases.append((mfm_mae.build(config), images, masks[2]))
    for task in beyond_masking.TASKS:
        clean, params = beyond_masking.clean_size(task, 28), beyond_masking.sample_params(task, 2, img_size=28)
        config = beyond_masking.Config(**small, task=task, mask_ratio=0.75 * task.startswith("mask"))
        inputs = torch.randn(2, 3, *clean), params, masks[2] if config.mask_ratio else None
        cases.append((beyond_masking.build(config), *inputs))
    for model, *inputs in cases:
        model(*inputs)[0].backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
