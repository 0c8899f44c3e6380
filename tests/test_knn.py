"""eval/knn.py: neighbours and votes against numpy, the whole command, two processes."""

import json
import re

import numpy as np
import pytest
import torch

import common
from eval import knn
from eval.encoders import export
from eval.knn import Config, main, nearest, vote
from eval.protocol import random_encoder
from helpers import call, differences, finish, start
from test_linear_probe import ONE, coloured, tiny, write_folder


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


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_neighbours_and_votes_are_those_of_brute_force(block):
    generator = np.random.default_rng(0)
    bank, queries = (generator.normal(2, size=(n, 16)) for n in (300, 40))  # all rather similar
    labels = generator.integers(0, 5, size=300)
    unit = [torch.nn.functional.normalize(torch.tensor(x), dim=1) for x in (queries, bank)]
    similarities, ids = nearest(*unit, 200, block)
    assert similarities.shape == ids.shape == (40, 200)
    order = np.argsort(-(unit[0] @ unit[1].T).numpy(), axis=1)
    assert ids.tolist() == order[:, :200].tolist()
    winners = vote(similarities, torch.tensor(labels)[ids], 5)
    assert list(winners) == [10, 20, 100, 200]
    for k, found in winners.items():
        assert found.tolist() == brute_force(queries, bank, labels, 5, k)
    assert len({tuple(found.tolist()) for found in winners.values()}) == 4  # each k has its own answer


def test_one_near_neighbour_outvotes_two_far_ones():
    similarities, labels = torch.tensor([[0.9, 0.7, 0.7]]), torch.tensor([[2, 0, 0]])
    assert vote(similarities, labels, 3, counts=[3])[3].tolist() == [2]  # exp(0.2 / 0.07) = 17 > 2
    assert vote(torch.tensor([[0.9, 0.88, 0.88]]), labels, 3, counts=[3])[3].tolist() == [0]


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_accuracy_is_that_of_brute_force_on_the_encoders_features(pool, monkeypatch):
    monkeypatch.setattr(knn, "BLOCK", 17)
    vit, train, val = tiny(), coloured(40), coloured(30, seed=1)
    generator = torch.Generator().manual_seed(0)
    for images in (train, val):  # hard enough that k matters
        noise = torch.randint(0, 200, images.pixels.shape, generator=generator, dtype=torch.uint8)
        images.pixels = images.pixels // 8 + noise
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    config = Config(checkpoint="x", data="scenes", pool=pool, batch_size=16)
    percent = knn.knn(vit.train(), train, val, config, ONE)
    with torch.no_grad():
        tokens = [vit.eval()(common.normalise(images.pixels)).double().numpy() for images in (train, val)]
    bank, queries = (x[:, 0] if pool == "cls" else x[:, 1:].mean(1) for x in tokens)
    expected = {k: 100 * np.mean(brute_force(queries, bank, train.labels.numpy(), 3, k) == val.labels.numpy())
                for k in (10, 20)}
    assert percent == pytest.approx(expected)  # 100 and 200 neighbours are more than there are images
    assert all(30 < value < 100 for value in expected.values())
    assert all(torch.equal(before[name], value) for name, value in vit.state_dict().items())
    with pytest.raises(ValueError, match="coloured holds 9 images, fewer than 10 neighbours"):
        knn.knn(vit, coloured(9), val, config, ONE)


RESULT = re.compile(r"kNN, (pre-trained|random init): (\d+\.\d) % with 10, (\d+\.\d) % with 20 neighbours")


def test_command_alone_and_by_two_processes(tmp_path, capsys):
    export(tiny(), tmp_path / "encoder.safetensors")
    before = (tmp_path / "encoder.safetensors").read_bytes()
    flags = ["--checkpoint", tmp_path, "--data", write_folder(tmp_path / "data", 25, 13), "--device", "cpu",
             "--workers", 0, "--batch_size", 4]
    code, out, err = finish(start(*flags, script=["-m", "eval.knn"], processes=2))
    assert code == 0, err
    assert len(RESULT.findall(out)) == 1 and out.count("loaded ") == 1  # the main process alone speaks
    assert call(*flags, main=main) == 0
    line = RESULT.fullmatch(capsys.readouterr().out.splitlines()[-1])
    assert line[0] == RESULT.search(out)[0] and line[1] == "pre-trained"
    two, one = (json.loads(text) for text in (tmp_path / "eval.jsonl").read_text().splitlines())
    assert two["accuracy"] == one["accuracy"] and (two["processes"], one["processes"]) == (2, 1)
    facts = dict(kind="knn", train_images=25, val_images=13, classes=3, pool="mean", temperature=0.07,
                 features="cached features, no augmentation", weights="pre-trained")
    assert {name: one[name] for name in facts} == facts
    assert [round(value, 1) for value in one["accuracy"].values()] == [float(line[2]), float(line[3])]
    assert (tmp_path / "encoder.safetensors").read_bytes() == before


def test_random_init_is_the_encoder_of_the_seed_at_random(tmp_path, monkeypatch, capsys):
    export(tiny(), tmp_path / "encoder.safetensors")
    seen = []
    monkeypatch.setattr(knn, "knn", lambda vit, *rest: seen.append(vit) or {10: 12.5})
    flags = ["--checkpoint", tmp_path, "--data", write_folder(tmp_path / "data"), "--workers", 0, "--seed", 2]
    for more, weights in (["--random_init"], "random init"), ([], "pre-trained"):
        assert call(*flags, *more, main=main) == 0
        assert f"kNN, {weights}: 12.5 % with 10 neighbours" in capsys.readouterr().out
        assert json.loads((tmp_path / "eval.jsonl").read_text().splitlines()[-1])["weights"] == weights
    for vit, expected in zip(seen, (random_encoder(tiny(), 2), tiny()), strict=True):
        assert differences(vit.state_dict(), expected.state_dict()) == []


def test_bad_input_is_one_sentence(tmp_path, capsys):
    export(tiny(class_token=False), tmp_path / "encoder.safetensors")
    data = write_folder(tmp_path / "data")
    given = ["--checkpoint", tmp_path, "--data", data, "--workers", 0]

    def fails(words, match):
        assert call(*words, main=main) == 1
        out, err = capsys.readouterr()
        assert re.search(match, err.splitlines()[-1]) and "Traceback" not in err and "kNN" not in out

    fails(["--data", data], "--checkpoint is missing")
    fails([*given, "--pool", "cls"], "no class token")
    fails([*given[:2], "--data", tmp_path / "x"], "no data folder at")
    (data / "val" / "red" / "002.png").write_bytes(b"junk")
    fails(given, "val/red/002.png cannot be read as an image")
    (data / "val" / "red").rename(data / "val" / "pink")
    fails(given, "3 classes of .*train and the 3 of .*val .*: pink, red")
