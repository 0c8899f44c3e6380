"""eval/knn.py: votes against numpy, the whole command, two processes."""

import re

import numpy as np
import pytest
import torch

import common
from eval import knn
from eval.encoders import export
from eval.knn import Config, main
from eval.protocol import random_encoder
from helpers import call, differences, finish, sentence, start
from test_linear_probe import ONE, coloured, results, tiny, write_folder


def brute_force(queries, bank, labels, num_classes, k):
    """Sort all, add up the weights of the first k, one query after another."""
    queries, bank = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, bank))
    winners = []
    for query in queries:
        similarity = bank @ query
        votes = np.zeros(num_classes)
        for index in np.argsort(-similarity)[:k]:
            votes[labels[index]] += np.exp(similarity[index] / 0.07)
        winners.append(votes.argmax())
    return winners


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_accuracy_is_that_of_brute_force_on_the_encoders_features(pool, monkeypatch):
    monkeypatch.setattr(knn, "BLOCK", 7)
    vit, train, val = tiny(), coloured(210), coloured(300, seed=1)
    generator = torch.Generator().manual_seed(0)
    for images in (train, val):  # hard enough that k matters
        noise = torch.randint(0, 200, images.pixels.shape, generator=generator, dtype=torch.uint8)
        images.pixels = images.pixels // 16 + noise
    config = Config(checkpoint="x", data="scenes", pool=pool, batch_size=16)
    percent = knn.knn(vit, train, val, config, ONE)
    with torch.no_grad():
        tokens = [tiny().eval()(common.normalise(images.pixels)).double().numpy() for images in (train, val)]
    bank, queries = (x[:, 0] if pool == "cls" else x[:, 1:].mean(1) for x in tokens)
    expected = {k: 100 * np.mean(brute_force(queries, bank, train.labels.numpy(), 3, k) == val.labels.numpy())
                for k in (10, 20, 100, 200)}
    assert percent == pytest.approx(expected) and len({*expected.values()}) > 2
    with pytest.raises(ValueError, match="9 images, fewer than 10 neighbours"):
        knn.knn(vit, coloured(9), val, config, ONE)


def test_command_alone_and_by_two_processes(tmp_path, capsys):
    export(tiny(), tmp_path / "encoder.safetensors")
    flags = ["--checkpoint", tmp_path, "--data", write_folder(tmp_path / "data", 25, 13), "--device", "cpu",
             "--workers", 0, "--batch_size", 4]
    code, out, err = finish(start(*flags, script=["-m", "eval.knn"], processes=2))
    assert code == call(*flags, main=main) == 0, err
    two, one = results(tmp_path)
    assert two["accuracy"] == one["accuracy"] and (two["processes"], one["processes"]) == (2, 1)
    ten, twenty = one["accuracy"].values()
    line = f"kNN, pre-trained: {ten:.1f} % with 10, {twenty:.1f} % with 20 neighbours"
    assert f"data     25 images of 3 classes in {tmp_path}/data/train, 13 to test in {tmp_path}/data/val" in out
    assert capsys.readouterr().out.splitlines()[-1] == line
    assert out.count(line) == out.count("kNN") == out.count("loaded ") == 1  # the main process alone speaks
    facts = dict(kind="knn", train_images=25, val_images=13, classes=3, pool="mean", temperature=0.07,
                 features="cached features, no augmentation", weights="pre-trained")
    assert facts.items() <= one.items()


def test_random_init_is_the_encoder_of_the_seed_at_random(tmp_path, monkeypatch, capsys):
    seen = []
    export(tiny(), tmp_path / "encoder.safetensors")
    monkeypatch.setattr(knn, "knn", lambda vit, *rest: seen.append(vit) or {10: 12.5})
    flags = ["--checkpoint", tmp_path, "--data", write_folder(tmp_path / "data"), "--workers", 0, "--seed", 2]
    rows = (["--random_init"], "random init", random_encoder(tiny(), 2)), ([], "pre-trained", tiny())
    for more, weights, encoder in rows:
        assert call(*flags, *more, main=main) == 0
        assert f"kNN, {weights}: 12.5 % with 10 neighbours" in capsys.readouterr().out
        assert results(tmp_path)[-1]["weights"] == weights
        assert differences(seen.pop().state_dict(), encoder.state_dict()) == []


def test_bad_input_is_one_sentence(tmp_path, capsys):
    export(tiny(class_token=False), tmp_path / "encoder.safetensors")
    given = ["--checkpoint", tmp_path, "--data", write_folder(tmp_path / "data"), "--workers", 0]

    def fails(words, match):
        assert call(*words, main=main) == 1
        assert re.search(match, sentence(capsys.readouterr().err))

    fails([*given, "--pool", "cls"], "no class token")
    red = tmp_path / "data" / "val" / "red"
    (red / "002.png").write_bytes(b"junk")
    fails(given, "val/red/002.png cannot be read as an image")
    red.rename(red.parent / "pink")
    fails(given, "3 classes of .*train and the 3 of .*val .*: pink, red")
    assert not (tmp_path / "eval.jsonl").exists()
