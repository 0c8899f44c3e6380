"""eval/linear_probe.py and eval/ridge.py: the protocol against numpy, torch, timm and torchvision."""

import dataclasses
import hashlib
import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torchvision.transforms import RandomResizedCrop

import common
from eval import linear_probe
from eval.encoders import export
from eval.linear_probe import AttentivePool, Config, CropAndFlip, Lars, Probe, main, random_box
from eval.protocol import random_encoder
from eval.ridge import count_right, extract, fit_ridge, ridge_probe
from helpers import call, differences, finish, load, read_log, start

ROOT = Path(__file__).parent.parent
TINY = dict(img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=2)
CPU = torch.device("cpu")
ONE = common.Processes(0, 1, CPU)


def config(**changes):
    return Config(**{"checkpoint": "x", "data": "scenes", "workers": 0, **changes})


def tiny(**changes):
    torch.manual_seed(3)
    return common.ViT(**{**TINY, **changes})


def coloured(count, size=32, seed=0):
    """Images of three classes that their colour tells apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    pixels = torch.randint(0, 60, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(count), labels] += 180
    return common.Images(pixels, labels, ("blue", "green", "red"), "coloured")


def write_folder(root, train=24, val=9, size=32):
    """The coloured images as a folder with train/ and val/."""
    for split, count, seed in (("train", train, 0), ("val", val, 1)):
        images = coloured(count, size, seed)
        for index, (pixels, label) in enumerate(images[index] for index in range(count)):
            folder = root / split / images.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(rearrange(pixels, "c h w -> h w c").contiguous().numpy())
            picture.save(folder / f"{index:03}.png")
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


# -- LARS


def some_gradients(steps, *shapes):
    generator = np.random.default_rng(0)
    return [[generator.normal(size=shape) for shape in shapes] for _ in range(steps)]


def test_lars_follows_the_trajectory_of_the_formula_in_numpy():
    shapes = (3, 4), (5,), (2, 2), (2, 3)
    start = [np.random.default_rng(1).normal(size=shape) for shape in shapes]
    start[2][:] = 0  # a matrix without a length takes plain steps until it has one
    gradients = some_gradients(6, *shapes)
    for step in range(3):
        gradients[step][3][:] = 0  # a gradient without one
    parameters = [torch.nn.Parameter(torch.tensor(value)) for value in start]
    optimizer = Lars(parameters, lr=0.0)
    expected, momenta = [value.copy() for value in start], [0.0, 0.0, 0.0, 0.0]
    for step, values in enumerate(gradients):
        lr = 5.0 / (1 + step)
        optimizer.param_groups[0]["lr"] = lr
        for parameter, value in zip(parameters, values):
            parameter.grad = torch.tensor(value)
        optimizer.step()
        for i, g in enumerate(values):
            lengths = np.sqrt((expected[i] ** 2).sum()), np.sqrt((g ** 2).sum())
            rate = 0.001 * lengths[0] / lengths[1] if g.ndim == 2 and min(lengths) > 0 else 1.0
            momenta[i] = 0.9 * momenta[i] + rate * g
            expected[i] = expected[i] - lr * momenta[i]
    for parameter, value in zip(parameters, expected):
        np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-12, atol=1e-14)
    assert np.abs(expected[3] - start[3]).max() > 1e-4


def test_lars_is_timms_with_adaptation_of_matrices_alone():
    timm_optim = pytest.importorskip("timm.optim")
    torch.manual_seed(0)
    start = [torch.randn(4, 3), torch.randn(6)]
    ours, matrix, vector = ([torch.nn.Parameter(value.clone()) for value in start] for _ in range(3))
    optimizers = [Lars(ours, lr=6.4), timm_optim.Lars(matrix, lr=6.4, momentum=0.9, always_adapt=True),
                  timm_optim.Lars(vector, lr=6.4, momentum=0.9, always_adapt=False)]
    for _ in range(5):
        gradients = [torch.randn_like(value) for value in start]
        for parameters, optimizer in zip((ours, matrix, vector), optimizers):
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours[0], matrix[0])
    torch.testing.assert_close(ours[1], vector[1])
    assert not torch.allclose(ours[0], vector[0])  # timm's own default adapts nothing without weight decay


def test_lars_of_vectors_is_sgd():
    parameters = [[torch.nn.Parameter(torch.ones(4))] for _ in range(2)]
    optimizers = Lars(parameters[0], lr=0.3), torch.optim.SGD(parameters[1], lr=0.3, momentum=0.9)
    for (gradient,) in some_gradients(4, (4,)):
        for (parameter,), optimizer in zip(parameters, optimizers):
            parameter.grad = torch.tensor(gradient).float()
            optimizer.step()
    torch.testing.assert_close(*(parameter for (parameter,) in parameters))


# -- images


def test_the_box_is_torchvisions_where_that_accepts_its_first_draw():
    image, same = torch.empty(3, 500, 375), 0
    for seed in range(200):
        torch.manual_seed(seed)
        box = random_box(500, 375)
        torch.manual_seed(seed)
        area, aspect = torch.rand(2).tolist()
        area, aspect = 500 * 375 * (0.08 + 0.92 * area), math.exp(math.log(0.75) + aspect * math.log(16 / 9))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        assert box[2:] == (min(height, 500), min(width, 375))
        assert 0 <= box[0] <= 500 - box[2] and 0 <= box[1] <= 375 - box[3]
        if width <= 375 and height <= 500:
            torch.manual_seed(seed)
            assert box == tuple(RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)))
            same += 1
    assert 100 < same < 200  # both cases were there


def test_the_view_is_the_box_resized_bicubically_and_flipped_half_of_the_time():
    generator = torch.Generator().manual_seed(0)
    image = F.interpolate(torch.rand(1, 3, 12, 15, generator=generator), (120, 150), mode="bilinear")[0]
    image = (image * 255).byte()
    picture = Image.fromarray(rearrange(image, "c h w -> h w c").contiguous().numpy())
    flips = 0
    for seed in range(40):
        torch.manual_seed(seed)
        view, label = CropAndFlip((32, 48))(image, 7)
        torch.manual_seed(seed)
        top, left, height, width = random_box(120, 150)
        expected = picture.crop((left, top, left + width, top + height)).resize((48, 32), Image.BICUBIC)
        expected = rearrange(torch.from_numpy(np.array(expected)), "h w c -> c h w").int()
        flipped = torch.rand(()).item() < 0.5
        flips += flipped
        expected = expected.flip(2) if flipped else expected
        assert view.dtype == torch.uint8 and label == 7
        assert (view.int() - expected).abs().max() <= 3
    assert 10 < flips < 30


# -- the classifier


def test_attention_is_multi_head_attention_with_one_query():
    torch.manual_seed(0)
    pool, oracle = AttentivePool(24, 3), torch.nn.MultiheadAttention(24, 3, bias=False, batch_first=True)
    torch.nn.init.normal_(pool.query)
    tokens = torch.randn(2, 5, 9, 24)
    oracle.in_proj_weight.data = torch.cat([torch.eye(24), pool.key.weight, pool.value.weight])
    oracle.out_proj.weight.data = torch.eye(24)
    flat = tokens.flatten(0, 1)
    query = pool.query.flatten().expand(10, 1, 24)
    expected, weights = oracle(query, flat, flat)
    assert weights.std() > 0.01
    torch.testing.assert_close(pool(tokens), expected[:, 0].unflatten(0, (2, 5)))


def test_classifier_is_batch_norm_without_affine_and_a_small_linear_layer():
    torch.manual_seed(1)
    probe = Probe(tiny(embed_dim=768, num_heads=12), 1000, attentive=False, seed=0)
    assert [name for name, _ in probe.named_parameters()] == ["linear.weight", "linear.bias"]
    assert (probe.norm.eps, probe.norm.affine, probe.norm.momentum) == (1e-6, False, 0.1)
    assert abs(probe.linear.weight.std().item() - 0.01) < 1e-4 and probe.linear.bias.eq(0).all()
    x = torch.randn(4, 8, 768) * 5 + 3
    logits = probe(x, ONE)
    X = x.flatten(0, 1).double().numpy()
    expected = (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-6) @ probe.linear.weight.detach().double().numpy().T
    np.testing.assert_allclose(logits.detach().numpy(), expected, atol=1e-4)
    # Tests use the running statistics: 0.9 of what was, 0.1 of the batch, with its unbiased variance.
    probe.eval()
    mean, variance = 0.1 * X.mean(0), 0.9 + 0.1 * X.var(0, ddof=1)
    expected = (X - mean) / np.sqrt(variance + 1e-6) @ probe.linear.weight.detach().double().numpy().T
    assert probe.predict(x.flatten(0, 1)).tolist() == expected.argmax(1).tolist()


def test_recipe_is_the_papers():
    paper = dict(protocol="lars", epochs=90, batch_size=16384, warmup_epochs=10, lr=0.1, pool="auto")
    ours = dataclasses.asdict(config())
    assert {name: ours[name] for name in paper} == paper
    assert ours["lr"] * ours["batch_size"] / 256 == 6.4


# -- training


def reference(vit, images, epochs, batch_size, warmup_epochs, base_lr, seed, pool):
    """The same training written a second time: torch's layers, the formula of LARS, the schedule in numpy."""
    torch.manual_seed(common.seed_for(seed, "probe"))
    linear = torch.nn.Linear(24, 3)
    torch.nn.init.trunc_normal_(linear.weight, std=0.01)
    bias_momentum, weight_momentum, linear.bias.data[:] = torch.zeros(3), torch.zeros(3, 24), 0
    samples = common.Samples(images, CropAndFlip(vit.img_size), seed)
    per_epoch = len(images) // batch_size
    warmup, total = warmup_epochs * per_epoch, epochs * per_epoch
    peak = base_lr * batch_size / 256
    rates = np.concatenate([np.linspace(0, peak, warmup),
                            peak * (1 + np.cos(np.pi * np.arange(total - warmup) / (total - warmup))) / 2])
    running_mean, running_var = torch.zeros(24), torch.ones(24)
    for step in range(total):
        epoch = step // per_epoch
        generator = torch.Generator().manual_seed(common.seed_for(seed, "order", epoch))
        order = torch.randperm(len(images), generator=generator)
        rows = order[step % per_epoch * batch_size:][:batch_size].tolist()
        views, labels = zip(*(samples[epoch, row] for row in rows))
        with torch.no_grad():
            tokens = vit.eval()(common.normalise(torch.stack(views)))
        x = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)
        x = F.batch_norm(x, running_mean, running_var, training=True, momentum=0.1, eps=1e-6)
        linear.zero_grad()
        F.cross_entropy(linear(x), torch.tensor(labels)).backward()
        with torch.no_grad():
            g = linear.weight.grad
            weight_momentum = 0.9 * weight_momentum + 0.001 * linear.weight.norm() / g.norm() * g
            bias_momentum = 0.9 * bias_momentum + linear.bias.grad
            linear.weight -= rates[step] * weight_momentum
            linear.bias -= rates[step] * bias_momentum
    return linear, running_mean, running_var


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_training_is_that_of_a_second_writing(place, pool):
    folder, flags = place
    assert call(*flags, "--pool", pool, "--seed", 5, main=main) == 0
    state = load(folder / "linear_probe")["model"]
    images = common.find_data(str(folder / "data"), "train")
    linear, mean, variance = reference(tiny(), images, 3, 8, 1, 20.0, seed=5, pool=pool)
    torch.testing.assert_close(state["0.linear.weight"], linear.weight.data, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state["0.linear.bias"], linear.bias.data, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state["0.norm.running_mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["0.norm.running_var"], variance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", [[], ["--attentive"]])
def test_micro_batches_change_nothing(place, more):
    folder, flags = place
    for size in (8, 2):
        assert call(*flags, *more, "--micro_batch", size, "--out", folder / f"m{size}", main=main) == 0
    states = [load(folder / f"m{size}")["model"] for size in (8, 2)]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-6)
    assert ("0.attention.query" in states[0]) == bool(more)


def test_attention_trains_all_of_itself(place):
    folder, flags = place
    assert call(*flags, "--attentive", main=main) == 0
    torch.manual_seed(0)
    fresh = Probe(tiny(), 3, True, common.seed_for(0, "probe")).state_dict()
    state = load(folder / "linear_probe")["model"]
    for name in ("attention.query", "attention.key.weight", "attention.value.weight", "linear.weight"):
        assert (state[f"0.{name}"] - fresh[name]).abs().max() > 1e-7, name
    assert results(folder)[0]["pool"] == "attention"


@pytest.mark.parametrize("more", [[], ["--attentive"]])
def test_colours_are_learnt_and_the_encoder_stays_as_it_is(place, capsys, monkeypatch, more):
    folder, flags = place
    before, seen = (folder / "encoder.safetensors").read_bytes(), {}
    original = linear_probe.train

    def watched(config, vit, *rest):
        vit.train()  # must not matter
        state = {name: value.clone() for name, value in vit.state_dict().items()}
        original(config, vit, *rest)
        seen["same"] = all(torch.equal(value, vit.state_dict()[name]) for name, value in state.items())
        seen["quiet"] = not vit.training and all(p.grad is None for p in vit.parameters())

    monkeypatch.setattr(linear_probe, "train", watched)
    assert call(*flags, *more, "--epochs", 30, "--lr", 60, "--seed", 3, main=main) == 0
    assert seen == dict(same=True, quiet=True) and (folder / "encoder.safetensors").read_bytes() == before
    out = capsys.readouterr().out
    percent = float(re.fullmatch(r"linear probe \(lars\): pre-trained (\d+\.\d) %", out.splitlines()[-1])[1])
    record, = results(folder)
    assert percent > 85 and round(record["accuracy"], 1) == percent
    facts = dict(kind="linear_probe", protocol="lars", train_images=24, val_images=9, classes=3, seed=3,
                 features="augmented anew every epoch", base_lr=60, device="cpu",
                 sha256=hashlib.sha256(before).hexdigest(), pool="attention" if more else "cls",
                 weights="pre-trained")
    assert {name: record[name] for name in facts} == facts
    assert (record["flags"]["epochs"], record["flags"]["batch_size"]) == (30, 8)
    losses = [line["loss"] for line in read_log(folder / "linear_probe")]
    assert losses[-1] < 0.9 * losses[0] and "lr       60 x 8 / 256 = 1.875" in out


def test_accuracy_is_of_all_test_images_by_class(place, monkeypatch):
    folder, flags = place
    vit, val = tiny(), coloured(7, seed=1)
    probe = Probe(vit, 3, False, 0)
    with torch.no_grad():
        probe.linear.weight.zero_()
        probe.linear.bias[:] = torch.tensor([0.0, 1.0, 0.0])  # always the second class: 2 of 7
    for micro in (0, 3):
        probes = torch.nn.ModuleList([probe])
        percent = linear_probe.accuracies(config(micro_batch=micro), vit, "cls", probes, val, ONE)
        assert percent == pytest.approx([200 / 7])
    assert not probe.training


def test_a_sweep_is_each_of_its_runs(place, capsys):
    folder, flags = place
    assert call(*flags, "--sweep", "5,80", "--out", folder / "sweep", main=main) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    sweep = load(folder / "sweep")["model"]
    for index, rate in enumerate(("5", "80")):
        assert call(*flags, "--lr", rate, "--out", folder / rate, main=main) == 0
        state = load(folder / rate)["model"]
        same = {name.replace("0.", f"{index}.", 1): value for name, value in state.items()}
        assert all(torch.equal(value, sweep[name]) for name, value in same.items())
    both, *single = results(folder)
    assert both["accuracies"] == {rate: result["accuracy"] for rate, result in zip(("5", "80"), single)}
    best = max(both["accuracies"], key=both["accuracies"].get)
    assert both["accuracy"] == both["accuracies"][best] and both["base_lr"] == float(best)
    assert both["chosen"] == "base_lr, on the validation images" and "chosen" not in single[0]
    assert f"at base lr {best}, the best on the validation images of 5: " in line
    assert {"loss_5", "loss_80"} < read_log(folder / "sweep")[0].keys()


def test_random_init_is_the_encoder_of_the_seed_at_random(place, capsys):
    folder, flags = place
    assert call(*flags, "--random_init", "--seed", 2, "--out", folder / "floor", main=main) == 0
    assert "linear probe (lars): random init" in capsys.readouterr().out
    assert results(folder)[0]["weights"] == "random init"
    export(random_encoder(tiny(), 2), folder / "random.safetensors")
    flags[1] = folder / "random.safetensors"
    assert call(*flags, "--seed", 2, "--out", folder / "same", main=main) == 0
    assert differences(load(folder / "floor")["model"], load(folder / "same")["model"]) == []


def test_without_class_token_the_patches_are_probed(place):
    folder, flags = place
    export(tiny(class_token=False), folder / "encoder.safetensors")
    assert call(*flags, "--epochs", 1, "--warmup_epochs", 0, main=main) == 0
    assert results(folder)[0]["pool"] == "mean"


def test_an_interrupted_probe_goes_on_bit_for_bit(place, monkeypatch, capsys):
    folder, flags = place
    flags = [*flags, "--attentive", "--sweep", "5,80"]
    assert call(*flags, "--out", folder / "straight", main=main) == 0
    steps, stopping = [], common.Run.stopping

    def stop_after_four(run):  # in the middle of the second epoch
        steps.append(0)
        run.signal = signal.SIGTERM if len(steps) == 4 else None
        return stopping(run)

    monkeypatch.setattr(common.Run, "stopping", stop_after_four)
    assert call(*flags, "--out", folder / "cut", main=main) == 128 + signal.SIGTERM
    assert load(folder / "cut")["step"] == 4 and len(results(folder)) == 1
    assert call(*flags, "--out", folder / "cut", main=main) == 0
    monkeypatch.undo()
    assert len(steps) == 9
    assert differences(load(folder / "cut")["model"], load(folder / "straight")["model"]) == []
    assert differences(load(folder / "cut")["optimizer"], load(folder / "straight")["optimizer"]) == []
    straight, cut = results(folder)
    assert straight["accuracies"] == cut["accuracies"]
    # Finished: the same command tests it again and trains nothing.
    before = (folder / "cut" / "last.pt").read_bytes()
    assert call(*flags, "--out", folder / "cut", main=main) == 0
    assert (folder / "cut" / "last.pt").read_bytes() == before
    assert results(folder)[2]["accuracies"] == cut["accuracies"]
    # Another flag is another run, and so is another file under the same name.
    assert call(*flags, "--out", folder / "cut", "--seed", 1, main=main) == 1
    assert "--seed was 0" in capsys.readouterr().err
    export(tiny(class_token=False), folder / "encoder.safetensors")
    assert call(*flags, "--out", folder / "cut", main=main) == 1
    assert "the checkpoint has changed" in capsys.readouterr().err


# -- ridge regression


def some_batches(sizes, dim=7, classes=4):
    generator = torch.Generator().manual_seed(0)
    n = sum(sizes)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    features = torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mixing
    features = features * torch.logspace(-2, 2, dim, dtype=torch.float64) + 5
    labels = torch.randint(0, classes, (n,), generator=generator)
    return features, labels, list(zip(features.split(sizes), labels.split(sizes)))


def test_ridge_is_the_textbook_solution():
    x, labels, batches = some_batches([50, 50, 23])
    weight, bias = fit_ridge(batches, num_classes=4, ridge=0.03)
    X, Y = x.numpy(), np.eye(4)[labels.numpy()]
    Z = (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-6)
    W = np.linalg.solve(Z.T @ Z + 0.03 * len(Z) * np.eye(7), Z.T @ (Y - Y.mean(0)))
    np.testing.assert_allclose((x @ weight + bias).numpy(), Z @ W + Y.mean(0), atol=1e-10)
    # The other way to write a ridge: least squares with sqrt(ridge n) I stacked below.
    stacked = np.linalg.lstsq(np.vstack([Z, np.sqrt(0.03 * len(Z)) * np.eye(7)]),
                              np.vstack([Y - Y.mean(0), np.zeros((7, 4))]), rcond=None)[0]
    np.testing.assert_allclose((x @ weight + bias).numpy(), Z @ stacked + Y.mean(0), atol=1e-10)


def test_ridge_in_pieces_is_ridge_at_once():
    x, labels, pieces = some_batches([1, 60, 62])
    for piece, whole in zip(fit_ridge(pieces, 4), fit_ridge([(x, labels)], 4)):
        torch.testing.assert_close(piece, whole, rtol=1e-9, atol=1e-12)


def test_ridge_of_two_processes_is_that_of_all_images():
    """Every sum is taken over both before anything is solved."""
    x, labels, (mine, yours) = some_batches([70, 53])
    sums = []
    fit_ridge([yours], 4, total=lambda part: (sums.append(part), part)[1])
    theirs = iter(sums)
    both = fit_ridge([mine], 4, total=lambda part: part + next(theirs))
    for ours, whole in zip(both, fit_ridge([(x, labels)], 4)):
        torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-12)


def test_ridge_with_a_dead_feature_and_an_absent_class():
    x, labels, _ = some_batches([100])
    x[:, 2] = 1.5
    weight, bias = fit_ridge([(x, labels)], num_classes=6)
    assert weight.isfinite().all() and bias.isfinite().all()
    assert weight[2].abs().max() < 1e-6


def test_right_answers_are_counted():
    features, labels = torch.eye(4).double(), torch.tensor([0, 1, 2, 0])
    batches = [(features[:3], labels[:3]), (features[3:], labels[3:])]
    assert count_right(batches, torch.eye(4).double(), torch.zeros(4).double()) == 3
    assert count_right(batches, torch.zeros(4, 4).double(), torch.tensor([1.0, 0, 0, 0]).double()) == 2


def test_separable_classes_give_100_and_the_encoder_stays_as_it_is():
    vit = tiny()
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    setting = config(protocol="ridge", micro_batch=32)
    assert ridge_probe(vit, coloured(90), coloured(60, seed=1), "mean", setting, ONE) == 100.0
    assert all(torch.equal(before[key], value) for key, value in vit.state_dict().items())
    swapped = coloured(60, seed=1)
    swapped.labels = (swapped.labels + 1) % 3
    assert ridge_probe(vit, coloured(90), swapped, "cls", setting, ONE) == 0.0


def test_batch_size_and_workers_change_no_number(tmp_path):
    images = common.find_data(str(write_folder(tmp_path)), "train")
    vit = tiny()
    settings = config(micro_batch=6, workers=0), config(micro_batch=2, workers=1)
    first, second = (torch.cat([x for x, _ in extract(vit, images, "mean", setting, ONE)])
                     for setting in settings)
    assert first.dtype == torch.float64 and first.shape == (24, 24)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


RESULT = re.compile(r"linear probe: random init (\d+\.\d) %, pre-trained (\d+\.\d) %")


def test_the_fast_protocol_on_scenes(tmp_path, capsys):
    export(tiny(), tmp_path / "encoder.safetensors")
    before = (tmp_path / "encoder.safetensors").read_bytes()
    main(["--checkpoint", str(tmp_path), "--data", "scenes", "--device", "cpu", "--micro-batch", "500",
          "--seed", "3", "--protocol", "ridge"])
    floor, reached = map(float, RESULT.fullmatch(capsys.readouterr().out.splitlines()[-1]).groups())
    record, = results(tmp_path)
    assert round(record["random_init"], 1) == floor and round(record["accuracy"], 1) == reached
    assert floor == reached  # the "pre-trained" encoder is the random one of this seed
    assert 10 < floor < 35
    assert (tmp_path / "encoder.safetensors").read_bytes() == before
    assert record["checkpoint"] == str(tmp_path / "encoder.safetensors")
    assert (record["train_images"], record["val_images"], record["classes"]) == (3000, 1500, 10)
    assert (record["kind"], record["protocol"]) == ("linear_probe", "ridge")
    assert (record["pool"], record["ridge"]) == ("mean", 0.01)
    assert record["features"] == "cached features, no augmentation"
    flags = config(checkpoint=str(tmp_path), device="cpu", micro_batch=500, seed=3, protocol="ridge")
    assert record["flags"] == dataclasses.asdict(flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder.safetensors", "eval.jsonl"]


# -- what goes wrong


def fails(capsys, arguments, match, error=ValueError):
    with pytest.raises(error, match=match) as caught:
        main([str(argument) for argument in arguments])
    assert "\n" not in str(caught.value)
    assert "linear probe" not in capsys.readouterr().out


def test_bad_flags_and_checkpoints(tmp_path, capsys):
    fails(capsys, ["--data", "scenes"], "--checkpoint is missing")
    given = ["--checkpoint", tmp_path / "e.safetensors"]
    fails(capsys, given + ["--poll", "cls"], "unknown argument --poll, did you mean --pool")
    fails(capsys, given + ["--pool", "max"], "max")
    fails(capsys, given + ["--batch_size", "0"], "at least 1")
    fails(capsys, given + ["--lr", "0"], "greater than 0")
    for words in ("0.1,x", "0.1,", "0.1,-1", "0.1,0.1", "inf"):
        fails(capsys, given + ["--sweep", words], "--sweep .* must be different numbers above 0")
    for flag in ("--lr=1", "--attentive", "--sweep=1,2", "--random_init", "--epochs=3", "--batch_size=5"):
        name = flag.split("=")[0]
        fails(capsys, given + ["--protocol", "ridge", flag], f"{name} belongs to --protocol lars")
    fails(capsys, given + ["--attentive", "--pool", "cls"], "exclude each other")
    fails(capsys, ["--checkpoint", tmp_path / "x.pth"], "there is no checkpoint", FileNotFoundError)
    export(tiny(class_token=False), tmp_path / "e.safetensors")
    fails(capsys, given + ["--pool", "cls", "--data", "scenes"], "no class token")
    fails(capsys, given + ["--num_heads", "7"], "7 heads")
    fails(capsys, given + ["--data", tmp_path / "x"], "no data folder", FileNotFoundError)
    fails(capsys, given + ["--data", "scenes"], "3000 images, less than one batch of 16384: .* 3000 or less")
    assert not (tmp_path / "eval.jsonl").exists() and not (tmp_path / "linear_probe").exists()


@pytest.mark.parametrize("protocol", ["lars", "ridge"])
def test_class_lists_must_be_equal(place, capsys, protocol):
    folder, flags = place
    (folder / "data" / "val" / "red").rename(folder / "data" / "val" / "yellow")
    flags = flags if protocol == "lars" else [*flags[:4], "--protocol", "ridge"]
    fails(capsys, flags, "3 classes of .*train and the 3 of .*val .* red, yellow$")
    (folder / "data" / "val").rename(folder / "data" / "elsewhere")
    fails(capsys, flags, "has no folder val/ or validation/ or test/", FileNotFoundError)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(place, capsys, workers):
    folder, flags = place
    (folder / "data" / "val" / "red" / "005.png").write_bytes(b"junk")
    assert call(*flags[:4], "--protocol", "ridge", "--device", "cpu", "--workers", workers, main=main) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match("error: [^ ]*val/red/005.png cannot be read as an image", error)
    assert not (folder / "eval.jsonl").exists()


@pytest.mark.parametrize("protocol", ["lars", "ridge"])
def test_features_that_are_not_finite(place, capsys, protocol):
    folder, flags = place
    vit = tiny()
    vit.norm.weight.data[0] = float("nan")
    export(vit, folder / "encoder.safetensors")
    flags = flags if protocol == "lars" else [*flags[:4], "--protocol", "ridge"]
    assert call(*flags, main=main) == 1
    assert "error: the encoder gives features that are not finite" in capsys.readouterr().err


def test_the_script_says_one_sentence(tmp_path):
    command = [sys.executable, "-m", "eval.linear_probe", "--checkpoint", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "neither encoder.safetensors nor last.pt" in done.stderr


# -- several processes


def test_two_processes_are_one(place):
    """All modes in one launch: LARS, attention with a sweep, ridge; each against this one process."""
    folder, flags = place
    flags, ridge = [*flags, "--micro_batch", 2], [*flags[:8], "--protocol", "ridge"]
    runs = dict(cls=flags, attentive=[*flags, "--attentive", "--sweep", "5,80"], ridge=ridge)
    script = folder / "all.py"
    lines = [[str(word) for word in words] + ([f"--out={folder / name}-2"] if name != "ridge" else [])
             for name, words in runs.items()]
    script.write_text(f"""import contextlib, sys
sys.path.insert(0, {str(ROOT)!r})
import common
from eval.linear_probe import main
with common.processes("cpu") as both:  # joined once, for three runs
    common.processes = lambda device: contextlib.nullcontext(both)
    for words in {lines!r}:
        common.run_main(lambda: main(words))
""")
    code, out, err = finish(start(script=[script], processes=2))
    assert code == 0, err
    assert out.count("loaded ") == 3 and out.count("linear probe") == 3  # the main process alone speaks
    for name, words in runs.items():
        assert call(*words, *([f"--out={folder / name}"] if name != "ridge" else []), main=main) == 0
    together, alone = results(folder)[:3], results(folder)[3:]
    assert [record["processes"] for record in together + alone] == [2, 2, 2, 1, 1, 1]
    for one, two in zip(alone, together):
        assert one["accuracy"] == two["accuracy"] and one.get("accuracies") == two.get("accuracies")
    for name in ("cls", "attentive"):
        one, two = load(folder / name)["model"], load(folder / f"{name}-2")["model"]
        for key, value in one.items():
            torch.testing.assert_close(value, two[key], rtol=1e-4, atol=1e-6)
