"""eval/linear_probe.py: the classifier against numpy, the view against torchvision, the whole command."""

import contextlib
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

import common
from eval.encoders import export
from eval.linear_probe import Config, accuracy, extract, fit_ridge, main, probe
from eval.protocol import centre_view, check_classes

ROOT = Path(__file__).parent.parent
TINY = dict(img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=2)
CPU = torch.device("cpu")


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


def write_folder(root, classes=("a", "b"), count=3, size=(40, 48)):
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


# -- the classifier


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


def test_ridge_with_a_dead_feature_and_an_absent_class():
    x, labels, _ = some_batches([100])
    x[:, 2] = 1.5
    weight, bias = fit_ridge([(x, labels)], num_classes=6)
    assert weight.isfinite().all() and bias.isfinite().all()
    assert weight[2].abs().max() < 1e-6


def test_accuracy_counts():
    features, labels = torch.eye(4).double(), torch.tensor([0, 1, 2, 0])
    batches = [(features[:3], labels[:3]), (features[3:], labels[3:])]
    assert accuracy(batches, torch.eye(4).double(), torch.zeros(4).double()) == 75.0
    assert accuracy(batches, torch.zeros(4, 4).double(), torch.tensor([1.0, 0, 0, 0]).double()) == 50.0


# -- the view and the features


@pytest.mark.parametrize("size", [(300, 400), (400, 365), (365, 400), (256, 256), (30, 47), (80, 71)])
def test_view_is_resize_256_crop_224(size):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    papers = v2.Compose([v2.Resize(256, InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(224)])
    assert torch.equal(centre_view(image, (224, 224)), papers(image))


def test_view_keeps_what_has_the_size_and_fits_other_shapes():
    image = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8)
    assert centre_view(image, (32, 48)) is image
    assert centre_view(image, (16, 64)).shape == (3, 16, 64)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_features_are_those_of_the_encoder_in_eval_mode(pool):
    vit, images = tiny(depth=2, drop_path_rate=0.5).train(), coloured(10)
    features = torch.cat([x for x, _ in extract(vit, images, config(pool=pool, batch_size=4), CPU)])
    labels = torch.cat([y for _, y in extract(vit, images, config(pool=pool, batch_size=3), CPU)])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        tokens = vit.eval()((images.pixels / 255 - mean) / std)
    expected = tokens[:, 0] if pool == "cls" else sum(tokens[:, i] for i in (1, 2, 3, 4)) / 4
    assert features.dtype == torch.float64
    torch.testing.assert_close(features, expected.double(), rtol=0, atol=1e-5)
    assert labels.tolist() == images.labels.tolist()


def test_mean_without_class_token_takes_all_tokens():
    vit, images = tiny(class_token=False), coloured(4)
    (features, _), = extract(vit, images, config(), CPU)
    with torch.no_grad():
        expected = vit(common.normalise(images.pixels)).mean(1)
    torch.testing.assert_close(features, expected.double(), rtol=0, atol=1e-6)


def test_separable_classes_give_100_and_the_encoder_stays_as_it_is():
    vit = tiny()
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    assert probe(vit, coloured(90), coloured(60, seed=1), config(batch_size=32), CPU) == 100.0
    assert all(torch.equal(before[key], value) for key, value in vit.state_dict().items())
    assert not any(parameter.grad is not None for parameter in vit.parameters())
    swapped = coloured(60, seed=1)
    swapped.labels = (swapped.labels + 1) % 3
    assert probe(vit, coloured(90), swapped, config(), CPU) == 0.0


def test_batch_size_and_workers_change_no_number(tmp_path):
    images = common.find_data(str(write_folder(tmp_path)), "train")
    vit = tiny()
    settings = config(batch_size=6, workers=0), config(batch_size=2, workers=1)
    first, second = (torch.cat([x for x, _ in extract(vit, images, setting, CPU)]) for setting in settings)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


# -- the command


RESULT = re.compile(r"linear probe: random init (\d+\.\d) %, pre-trained (\d+\.\d) %")


def test_command_on_scenes(tmp_path, capsys):
    export(tiny(), tmp_path / "encoder.safetensors")
    before = (tmp_path / "encoder.safetensors").read_bytes()
    main(["--checkpoint", str(tmp_path), "--data", "scenes", "--device", "cpu", "--batch-size", "500",
          "--seed", "3"])
    floor, reached = map(float, RESULT.fullmatch(capsys.readouterr().out.splitlines()[-1]).groups())
    record, = map(json.loads, (tmp_path / "eval.jsonl").read_text().splitlines())
    assert round(record["random_init"], 1) == floor and round(record["accuracy"], 1) == reached
    assert floor == reached  # the "pre-trained" encoder is the random one of this seed
    assert 10 < floor < 35
    assert (tmp_path / "encoder.safetensors").read_bytes() == before
    assert record["sha256"] == hashlib.sha256(before).hexdigest()
    assert record["checkpoint"] == str(tmp_path / "encoder.safetensors")
    assert (record["train_images"], record["val_images"], record["classes"]) == (3000, 1500, 10)
    assert (record["kind"], record["protocol"]) == ("linear_probe", "ridge")
    assert (record["pool"], record["ridge"]) == ("mean", 0.01)
    assert (record["data"], record["device"], record["seed"]) == ("scenes", "cpu", 3)
    flags = config(checkpoint=str(tmp_path), device="cpu", batch_size=500, seed=3)
    assert record["flags"] == dataclasses.asdict(flags)
    assert record["torch"] == torch.__version__ and record["encoder"]["num_heads"] == 2
    assert record["seconds"] > 0 and record["torchvision"] and record["command"]


def test_command_on_a_folder_appends(tmp_path, capsys):
    export(tiny(), tmp_path / "e.safetensors")
    folder = write_folder(tmp_path / "data")
    for pool in ("cls", "mean"):
        main(["--checkpoint", str(tmp_path / "e.safetensors"), "--data", str(folder), "--pool", pool,
              "--workers", "0"])
    lines = (tmp_path / "eval.jsonl").read_text().splitlines()
    assert [json.loads(line)["pool"] for line in lines] == ["cls", "mean"]


def fails(capsys, arguments, match, error=ValueError):
    with pytest.raises(error, match=match) as caught:
        main([str(argument) for argument in arguments])
    assert "\n" not in str(caught.value)
    assert "linear probe:" not in capsys.readouterr().out


def test_bad_flags_and_checkpoints(tmp_path, capsys):
    fails(capsys, ["--data", "scenes"], "--checkpoint is missing")
    fails(capsys, ["--checkpoint", "x", "--poll", "cls"], "unknown argument --poll, did you mean --pool")
    fails(capsys, ["--checkpoint", "x", "--pool", "max"], "max")
    fails(capsys, ["--checkpoint", "x", "--batch_size", "0"], "at least 1")
    fails(capsys, ["--checkpoint", tmp_path / "x.pth"], "there is no checkpoint", FileNotFoundError)
    given = ["--checkpoint", tmp_path / "e.safetensors"]
    export(tiny(class_token=False), tmp_path / "e.safetensors")
    fails(capsys, given + ["--pool", "cls", "--data", "scenes"], "no class token")
    fails(capsys, given + ["--num_heads", "7"], "7 heads")
    fails(capsys, given + ["--data", tmp_path / "x"], "no data folder", FileNotFoundError)
    assert not (tmp_path / "eval.jsonl").exists()


def test_class_lists_must_be_equal(tmp_path, capsys):
    export(tiny(), tmp_path / "e.safetensors")
    folder = write_folder(tmp_path / "data")
    (folder / "val" / "b").rename(folder / "val" / "c")
    fails(capsys, ["--checkpoint", tmp_path / "e.safetensors", "--data", folder],
          "2 classes of .*train and the 2 of .*val .* b, c$")
    check_classes(coloured(3), coloured(3))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(tmp_path, capsys, workers):
    export(tiny(), tmp_path / "e.safetensors")
    folder = write_folder(tmp_path / "data")
    (folder / "val" / "b" / "1.png").write_bytes(b"junk")
    given = ["--checkpoint", tmp_path / "e.safetensors", "--data", folder, "--device", "cpu", "--workers", workers]
    with pytest.raises(SystemExit) as exit:
        common.run_main(lambda: main([str(word) for word in given]))
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 1 and re.match("error: [^ ]*val/b/1.png cannot be read as an image", error)


def test_features_that_are_not_finite(tmp_path, capsys):
    vit = tiny()
    vit.norm.weight.data[0] = float("nan")
    export(vit, tmp_path / "e.safetensors")
    folder = write_folder(tmp_path / "data")
    given = ["--checkpoint", tmp_path / "e.safetensors", "--data", folder, "--device", "cpu"]
    fails(capsys, given, "not finite")


def test_one_process_only(tmp_path, capsys, monkeypatch):
    export(tiny(), tmp_path / "e.safetensors")
    two = common.Processes(rank=0, world=2, device=CPU)
    monkeypatch.setattr(common, "processes", lambda device: contextlib.nullcontext(two))
    fails(capsys, ["--checkpoint", tmp_path / "e.safetensors", "--data", "scenes"], "not torchrun")


def test_the_script_says_one_sentence(tmp_path):
    command = [sys.executable, "-m", "eval.linear_probe", "--checkpoint", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "neither encoder.safetensors nor last.pt" in done.stderr
