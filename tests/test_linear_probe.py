"""eval/linear_probe.py and eval/ridge.py: the protocol against numpy, torch, timm and torchvision."""

import copy
import json
import math
import re
import runpy

import numpy as np
import pytest
import timm.optim
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

import common
from eval import linear_probe
from eval.data import find_labelled
from eval.encoders import export
from eval.linear_probe import AttentivePool, Config, CropAndFlip, Lars, Probe, main, random_box
from eval.protocol import random_encoder
from eval.ridge import fit_ridge, ridge_probe
from helpers import ROOT, call, differences, finish, load, read_log, sentence, start

ONE = common.Dist(0, 1, torch.device("cpu"))


def config(**changes):
    return Config(**dict(checkpoint="x", data="scenes", workers=0) | changes)


def tiny(**changes):
    torch.manual_seed(3)
    return common.ViT(**dict(img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=2) | changes)


def coloured(count, size=32, seed=0):
    """Images of three classes that their colour tells apart."""
    generator, labels = torch.Generator().manual_seed(seed), torch.arange(count) % 3
    pixels = torch.randint(0, 60, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(count), labels] += 180
    return common.Images(pixels, labels, ("blue", "green", "red"), "coloured")


def write_folder(root, train=24, val=9, size=32):
    for split, count, seed in (("train", train, 0), ("val", val, 1)):
        images = coloured(count, size, seed)
        for index, (pixels, label) in enumerate(images[index] for index in range(count)):
            folder = root / split / images.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            TF.to_pil_image(pixels).save(folder / f"{index:03}.png")
    return root


@pytest.fixture
def place(tmp_path):
    """(the folder of an encoder.safetensors, the flags of a small probe of it by LARS)."""
    export(tiny(), tmp_path / "encoder.safetensors")
    flags = ["--checkpoint", tmp_path, "--data", write_folder(tmp_path / "data"), "--device", "cpu",
             "--workers", 0, "--batch_size", 8, "--epochs", 3, "--warmup_epochs", 1, "--lr", 20]
    return tmp_path, flags


def results(folder):
    return [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]


def test_lars_is_timms_with_adaptation_of_matrices_alone():
    """Also of a matrix without a length, which takes plain steps until it has one, and of gradients without one."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape).double()) for shape in ((4, 3), (6,), (2, 2), (2, 3))]
    ours[2].data.zero_()
    theirs, before = copy.deepcopy(ours), ours[3].detach().clone()
    optimizers = [timm.optim.Lars([p], lr=0.0, momentum=0.9, always_adapt=p.ndim > 1) for p in theirs]
    optimizers.append(Lars(ours, lr=0.0))
    for step in range(6):
        for one, two in zip(ours, theirs):
            one.grad = torch.randn_like(one) * (step > 2 or one.shape != (2, 3))
            two.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 5.0 / (1 + step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    assert (ours[3] - before).abs().max() > 1e-4


def test_the_box_is_torchvisions_where_that_accepts_its_first_draw():
    same = 0
    for seed in range(200):
        torch.manual_seed(seed)
        top, left, height, width = random_box(500, 375)
        torch.manual_seed(seed)
        area, aspect = torch.rand(2).tolist()
        area, aspect = 500 * 375 * (0.08 + 0.92 * area), math.exp(math.log(0.75) + aspect * math.log(16 / 9))
        sides = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        assert (height, width) == (min(sides[0], 500), min(sides[1], 375))
        assert 0 <= top <= 500 - height and 0 <= left <= 375 - width
        torch.manual_seed(seed)
        theirs = RandomResizedCrop.get_params(torch.empty(3, 500, 375), (0.08, 1.0), (3 / 4, 4 / 3))
        same += theirs == (top, left, height, width)
        assert theirs == (top, left, height, width) or sides != (height, width)
    assert 100 < same < 200  # both cases were there


def test_the_view_is_the_box_resized_bicubically_and_flipped_half_of_the_time():
    small = torch.rand(1, 3, 12, 15, generator=torch.Generator().manual_seed(0))
    image = (F.interpolate(small, (120, 150), mode="bilinear")[0] * 255).byte()
    picture = TF.to_pil_image(image)
    for seed in range(40):  # of which half are flipped
        torch.manual_seed(seed)
        view, label = CropAndFlip((32, 48))(image, 7)
        torch.manual_seed(seed)
        top, left, height, width = random_box(120, 150)
        expected = picture.crop((left, top, left + width, top + height)).resize((48, 32), Image.BICUBIC)
        expected = TF.pil_to_tensor(TF.hflip(expected) if torch.rand(()) < 0.5 else expected)
        assert view.dtype == torch.uint8 and label == 7 and (view.int() - expected.int()).abs().max() <= 3


@torch.no_grad()
def test_recipe_is_the_papers_and_accuracy_is_of_all_test_images_by_the_running_statistics():
    paper = dict(protocol="lars", epochs=90, batch_size=16384, warmup_epochs=10, lr=0.1, pool="auto")
    assert paper.items() <= vars(config()).items()
    probes, val = torch.nn.ModuleList(Probe(tiny(), 3, False, seed) for seed in range(3)), coloured(40, seed=1)
    val.labels = torch.arange(40) % 7 % 3
    X, right = tiny().eval()(common.normalise(val.pixels))[:, 0].numpy(), []
    for probe in probes:
        mean, var = probe.norm.running_mean.uniform_(-1, 1), probe.norm.running_var.uniform_(0.01, 1)
        logits = (X - mean.numpy()) / np.sqrt(var.numpy() + 1e-6) @ probe.linear.weight.numpy().T
        right.append((logits.argmax(1) == val.labels.numpy()).mean())
    percent = linear_probe.accuracies(config(micro_batch=3), tiny(), "cls", probes, val, ONE)
    assert percent == pytest.approx([100 * share for share in right]) and len({0, 1, *right}) == 5
    assert probe.norm.eps == 1e-6


def attend(attention, tokens):
    """The attentive pool by torch's multi-head attention; the projections that ours has not are unit matrices."""
    one, tokens = torch.eye(24), tokens.transpose(0, 1)
    query = attention.query.flatten().expand(1, tokens.shape[1], 24)
    weights = torch.cat([one, attention.key.weight, attention.value.weight])
    return F.multi_head_attention_forward(query, tokens, tokens, 24, 2, weights, None, None, None, False, 0.0, one,
                                          None, need_weights=False)[0][0]


def reference(vit, images, epochs, batch_size, warmup_epochs, base_lr, seed, pool):
    """The same training written a second time: torch's layers, the formula of LARS, the schedule in numpy."""
    torch.manual_seed(common.seed_for(seed, "probe"))
    linear = torch.nn.Linear(24, 3)
    torch.nn.init.trunc_normal_(linear.weight, std=0.01)
    linear.bias.data[:] = 0
    attention = AttentivePool(24, 2)  # for its weights
    state = {f"linear.{name}": p for name, p in linear.named_parameters()}
    if pool == "attention":
        state |= {f"attention.{name}": p for name, p in attention.named_parameters()}
    samples = common.Samples(images, CropAndFlip(vit.img_size), seed)
    per_epoch, peak = len(images) // batch_size, base_lr * batch_size / 256
    warmup, total = warmup_epochs * per_epoch, epochs * per_epoch
    rates = np.concatenate([np.linspace(0, peak, warmup),
                            peak * (1 + np.cos(np.pi * np.arange(total - warmup) / (total - warmup))) / 2])
    running_mean, running_var, momenta = torch.zeros(24), torch.ones(24), dict.fromkeys(state, 0)
    for step in range(total):
        epoch = step // per_epoch
        generator = torch.Generator().manual_seed(common.seed_for(seed, "order", epoch))
        order = torch.randperm(len(images), generator=generator)
        rows = order[step % per_epoch * batch_size:][:batch_size].tolist()
        views, labels = zip(*(samples[epoch, row] for row in rows))
        with torch.no_grad():
            tokens = vit.eval()(common.normalise(torch.stack(views), vit.config["mean"], vit.config["std"]))
        x = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)
        if pool == "attention":
            x = attend(attention, tokens)
        x = F.batch_norm(x, running_mean, running_var, training=True, momentum=0.1, eps=1e-6)
        gradients = torch.autograd.grad(F.cross_entropy(linear(x), torch.tensor(labels)), list(state.values()))
        with torch.no_grad():
            for (name, p), g in zip(state.items(), gradients):
                momenta[name] = 0.9 * momenta[name] + (0.001 * p.norm() / g.norm() if p.ndim == 2 else 1) * g
                p -= rates[step] * momenta[name]
    return {**state, "norm.running_mean": running_mean, "norm.running_var": running_var}


@pytest.mark.parametrize("pool, more", [
    ("cls", ["--pool=cls"]), ("mean", ["--pool=mean", "--mean_std=half"]), ("attention", ["--attentive"])])
def test_training_is_that_of_a_second_writing(place, pool, more):
    folder, flags = place
    assert call(*flags, *more, "--seed", 5, main=main) == 0
    vit = tiny(**(dict(mean=(0.5,) * 3, std=(0.5,) * 3) if pool == "mean" else {}))
    images = find_labelled(str(folder / "data"), "train", 32)
    expected = reference(vit, images, 3, 8, 1, 20.0, seed=5, pool=pool)
    state = load(folder / "linear_probe")["model"]
    del state["0.norm.num_batches_tracked"]
    expected = {f"0.{name}": value.detach() for name, value in expected.items()}
    torch.testing.assert_close(dict(state), expected, rtol=1e-4, atol=1e-5)
    record, = results(folder)
    assert record["pool"] == pool and record["encoder"]["mean"] == pytest.approx(vit.config["mean"])


def test_colours_are_learnt_and_the_encoder_stays_as_it_is(place, capsys, monkeypatch):
    folder, flags = place
    before, compiled = (folder / "encoder.safetensors").read_bytes(), []
    monkeypatch.setattr(common, "compile_blocks", lambda config, *rest: compiled.append(config.compile))
    assert call(*flags, "--epochs", 30, "--lr", 60, "--seed", 3, "--compile", "on", main=main) == 0
    out, (record,) = capsys.readouterr().out, results(folder)
    assert record["accuracy"] > 85 and "lr       60 x 8 / 256 = 1.875" in out
    assert out.splitlines()[-1] == f"linear probe (lars): pre-trained {record['accuracy']:.1f} %"
    facts = dict(kind="linear_probe", protocol="lars", train_images=24, val_images=9, classes=3, seed=3, pool="cls",
                 features="augmented anew every epoch", base_lr=60, weights="pre-trained", step=90, total_steps=90)
    assert facts.items() <= record.items()
    assert (compiled, (folder / "encoder.safetensors").read_bytes()) == (["on"], before)


def test_a_sweep_is_each_of_its_runs(place, capsys):
    folder, flags = place
    assert call(*flags, "--sweep", "5,80", "--out", folder / "sweep", main=main) == 0
    line, sweep = capsys.readouterr().out.splitlines()[-1], load(folder / "sweep")["model"]
    for index, rate in enumerate(("5", "80")):
        assert call(*flags, "--lr", rate, "--out", folder / rate, main=main) == 0
        for name, value in load(folder / rate)["model"].items():
            assert torch.equal(value, sweep[name.replace("0.", f"{index}.", 1)])
    both, *single = results(folder)
    reached = {rate: result["accuracy"] for rate, result in zip(("5", "80"), single)}
    best = max(reached, key=reached.get)
    facts = dict(accuracies=reached, accuracy=reached[best], base_lr=float(best),
                 chosen="base_lr, on the validation images")
    assert facts.items() <= both.items() and "chosen" not in single[0]
    assert f"at base lr {best}, the best on the validation images of 5: " in line
    assert {"loss_5", "loss_80"} < read_log(folder / "sweep")[0].keys()


def test_random_init_is_the_encoder_of_the_seed_at_random(place):
    folder, flags = place
    assert call(*flags, "--random_init", "--seed", 2, "--out", folder / "baseline", main=main) == 0
    export(random_encoder(tiny(), 2), folder / "encoder.safetensors")
    assert call(*flags, "--seed", 2, "--out", folder / "same", main=main) == 0
    assert differences(load(folder / "baseline")["model"], load(folder / "same")["model"]) == []
    assert [record["weights"] for record in results(folder)] == ["random init", "pre-trained"]


def test_a_run_is_tested_where_it_stands_and_belongs_to_its_checkpoint(place, capsys):
    folder, flags = place
    last = folder / "linear_probe" / "last.pt"
    assert call(*flags, "--max_steps", 4, main=main) == 0
    torch.save({**load(last.parent), "kind": "linear probe"}, last)  # as earlier versions wrote it
    assert call(*flags, main=main) == call(*flags, main=main) == 0  # finished: it only tests again
    assert [(record["step"], record["total_steps"]) for record in results(folder)] == [(4, 9), (9, 9), (9, 9)]
    export(tiny(class_token=False), folder / "encoder.safetensors")
    assert call(*flags, main=main) == 1
    assert "the checkpoint has changed" in sentence(capsys.readouterr().err)
    assert call(*flags, "--fresh", main=main) == 0
    assert [record["pool"] for record in results(folder)] == ["cls", "cls", "cls", "mean"]  # [D3]
    vit = tiny()
    vit.norm.weight.data[0] = 3e38
    export(vit, folder / "encoder.safetensors")
    assert call(*flags, "--fresh", main=main) == 1
    assert "the encoder gives features that are not finite" in sentence(capsys.readouterr().err)


# -- ridge regression


def test_ridge_is_the_textbook_solution_in_pieces_and_by_two_processes():
    torch.manual_seed(0)
    x = torch.randn(123, 7).double() @ (torch.randn(7, 7) * torch.logspace(-2, 2, 7)).double() + 5
    labels, sums = torch.randint(0, 4, (123,)), []
    *mine, yours = zip(x.split((1, 69, 53)), labels.split((1, 69, 53)))
    fit_ridge([yours], 4, 0.03, lambda part: (sums.append(part), part)[1])
    theirs = iter(sums)
    weight, bias = fit_ridge(mine, 4, 0.03, lambda part: part + next(theirs))  # added before anything is solved
    X, Y = x.numpy(), np.eye(4)[labels.numpy()]
    Z = (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-6)
    W = np.linalg.solve(Z.T @ Z + 0.03 * len(Z) * np.eye(7), Z.T @ (Y - Y.mean(0)))
    np.testing.assert_allclose((x @ weight + bias).numpy(), Z @ W + Y.mean(0), atol=1e-9)
    x[:, 2] = 1.5  # a dead feature, and two classes that are absent
    weight, bias = fit_ridge([(x, labels)], num_classes=6)
    assert weight.isfinite().all() and bias.isfinite().all() and weight[2].abs().max() < 1e-5


def test_separable_classes_give_100_and_others_0(monkeypatch):
    added, val, swapped = [], coloured(60, seed=1), coloured(60, seed=1)
    swapped.labels = (swapped.labels + 1) % 3
    monkeypatch.setattr(common.Dist, "all_reduce", lambda self, x: added.append(x.tolist()) or x)
    assert ridge_probe(tiny(), coloured(90), val, "mean", config(micro_batch=32), ONE) == 100.0
    assert added[0] == 90 and len(added) == 6 and added[5] == 60  # the sums of `fit_ridge`, and what is right
    assert ridge_probe(tiny(), coloured(90), swapped, "cls", config(micro_batch=32), ONE) == 0.0


def test_the_fast_protocol_on_scenes(tmp_path, capsys):
    export(tiny(), tmp_path / "encoder.safetensors")
    flags = ["--checkpoint", str(tmp_path), "--data", "scenes", "--device", "cpu", "--micro-batch", 500, "--seed", 3]
    assert call(*flags, "--protocol", "ridge", main=main) == 0
    record, = results(tmp_path)
    percent = record["accuracy"]
    assert record["random_init"] == percent and 10 < percent < 35  # the encoder is the random one of this seed
    line = f"linear probe: random init {percent:.1f} %, pre-trained {percent:.1f} %"
    assert capsys.readouterr().out.splitlines()[-1] == line
    flags = vars(config(checkpoint=flags[1], device="cpu", micro_batch=500, seed=3, protocol="ridge", workers=-1))
    facts = dict(kind="linear_probe", protocol="ridge", train_images=3000, val_images=1500, classes=10, pool="mean",
                 ridge=0.01, features="cached features, no augmentation", flags=flags)
    assert facts.items() <= record.items()


def test_bad_flags(tmp_path, capsys):
    given = ["--checkpoint", tmp_path / "e.safetensors", "--data", "scenes"]
    export(tiny(class_token=False), given[1])
    bad = {f"--sweep={rates}": "must be different numbers above 0" for rates in ("0.1,-1", "0.1,0.1", "inf")}
    bad |= {f"--protocol=ridge {flag}": f"{flag.split('=')[0]} belongs to --protocol lars" for flag in
            "--lr=1 --attentive --sweep=1,2 --random_init --epochs=3 --batch_size=5 --max_steps=3 --out=x".split()}
    bad |= {"--sweep=0.1,x": "float: 'x'", "--attentive --pool=cls": "exclude each other",
            "--pool=cls": "no class token", "--seed=1": "less than one batch of 16384"}
    for words, match in bad.items():
        assert call(*given, *words.split(), main=main) == 1
        assert re.search(match, sentence(capsys.readouterr().err)), words
    assert [path.name for path in tmp_path.iterdir()] == ["e.safetensors"]


@pytest.mark.parametrize("name", ["linear_probe", "knn", "features", "frequency", "plot"])
def test_a_script_started_as_a_file_says_how_to_start_it(name):
    with pytest.raises(SystemExit, match=f"^error: start it in the folder of common.py as `python -m eval.{name}`$"):
        runpy.run_path(ROOT / "eval" / f"{name}.py", run_name="__main__")


def test_batch_norm_and_attention_see_the_images_of_both_processes(place):
    folder, flags = place
    flags += ["--attentive", "--sweep", "5,80", "--out"]
    script = ["-m", "eval.linear_probe"]
    code, out, err = finish(start(*flags, folder / "two", "--micro_batch", 2, script=script, processes=2))
    assert code == 0 and out.count("loaded ") == out.count("linear probe") == 1, err  # the main process alone speaks
    assert call(*flags, folder / "one", main=main) == 0
    torch.testing.assert_close(*(load(folder / name)["model"] for name in ("two", "one")), rtol=1e-4, atol=1e-6)
    two, one = results(folder)
    assert two["processes"] == 2 and (two["accuracy"], two["accuracies"]) == (one["accuracy"], one["accuracies"])
