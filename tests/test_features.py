"""eval/features.py: the file against the encoder itself, names row by row, what is refused in time."""

import json
import re

import pytest
import torch
from safetensors import safe_open

import common
from eval import features
from eval.encoders import export
from eval.features import Config, main
from eval.protocol import centre_view, sha256
from helpers import call, finish, sentence, start, write_images
from test_linear_probe import ONE, coloured, results, tiny


def read(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["about"])


@pytest.fixture
def place(tmp_path):
    """A folder with an encoder of three blocks and photos of three classes, one of them deeper."""
    export(tiny(depth=3), tmp_path / "encoder.safetensors")
    write_images(tmp_path / "photos" / "b", 3)
    write_images(tmp_path / "photos" / "a" / "deep", 2, size=(40, 70))
    write_images(tmp_path / "photos" / "c", 2, size=(32, 32), kind=".jpg")
    return tmp_path, ["--checkpoint", tmp_path, "--data", tmp_path / "photos", "--out", tmp_path / "f.safetensors",
                      "--workers", 0, "--device", "cpu", "--batch_size", 3]


NAMES = ["a/deep/00.png", "a/deep/01.png", "b/00.png", "b/01.png", "b/02.png", "c/00.jpg", "c/01.jpg"]


def views(folder):
    images = [common.read_image(folder / "photos" / name) for name in NAMES]
    return common.normalise(torch.stack([centre_view(image, (32, 32)) for image in images]))


@pytest.mark.parametrize("tokens, layers", [("mean", ""), ("cls", ""), ("patches", ""), ("all", ""), ("all", "0,-1")])
@torch.no_grad()
def test_the_file_holds_what_the_encoder_or_its_blocks_give_for_each_name(place, tokens, layers):
    folder, flags = place
    assert call(*flags, "--tokens", tokens, "--layers", layers, main=main) == 0
    found, about = read(folder / "f.safetensors")
    vit = tiny(depth=3).eval()
    first = vit.blocks[0](vit.embed(views(folder)))
    last = vit.blocks[2](vit.blocks[1](first))
    x = vit.norm(last)
    expected = dict(features=dict(mean=x[:, 1:].mean(1), cls=x[:, 0], patches=x[:, 1:], all=x)[tokens])
    expected = dict(layer_0=first, layer_2=last) if layers else expected  # before any norm
    assert found.pop("labels").tolist() == [0, 0, 1, 1, 1, 2, 2]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    facts = dict(kind="features", names=NAMES, classes=["a", "b", "c"], tokens=tokens, layers=list(expected),
                 sha256=sha256(folder / "encoder.safetensors"))
    assert facts.items() <= about.items()
    facts = dict(kind="features", images=7, out=str(folder / "f.safetensors"))
    assert facts.items() <= results(folder)[0].items()


@pytest.mark.slow
def test_two_processes_write_the_same_file(place):
    folder, flags = place
    code, out, err = finish(start(*flags, "--layers=1", script=["-m", "eval.features"], processes=2))
    assert code == 0 and out.count("wrote ") == 1, err
    together, about = read(folder / "f.safetensors")
    assert call(*flags, "--layers=1", main=main) == 0
    torch.testing.assert_close(together, read(folder / "f.safetensors")[0], rtol=0, atol=1e-6)
    assert about["names"] == NAMES


def test_an_image_that_cannot_be_read_is_told_and_its_row_is_nan(place, capsys):
    folder, flags = place
    assert call(*flags, main=main) == 0
    whole = read(folder / "f.safetensors")[0]["features"]
    for name in ("b/01.png", "a/deep/00.png"):  # also the first of all
        path = folder / "photos" / name
        path.write_bytes(path.read_bytes()[:300])
    assert call(*flags, main=main) == 0
    captured, (found, about) = capsys.readouterr(), read(folder / "f.safetensors")
    assert "warning: " in captured.err and "01.png cannot be read" in captured.err
    assert "2 rows are NaN" in captured.out and about["unreadable"] == ["a/deep/00.png", "b/01.png"]
    assert found["features"].isnan().all(1).tolist() == [True, False, False, True, False, False, False]
    good = [1, 2, 4, 5, 6]
    torch.testing.assert_close(found["features"][good], whole[good], rtol=0, atol=1e-6)
    assert found["labels"].tolist() == [0, 0, 1, 1, 1, 2, 2]


def test_a_flat_folder_has_no_labels_and_another_size_is_a_flag(place, capsys):
    folder, flags = place
    flags[3] = write_images(folder / "flat", 4)
    assert call(*flags, "--img_size", 64, "--tokens", "patches", main=main) == 0
    found, about = read(folder / "f.safetensors")
    assert found.keys() == {"features"} and found["features"].shape == (4, 16, 24)
    assert about["names"] == ["00.png", "01.png", "02.png", "03.png"] and about["classes"] == []
    assert "4 x 16 x 24 float32 for features: 0.00 GiB" in capsys.readouterr().out


def test_built_in_images_keep_their_labels():
    images = coloured(5)
    names, labels, classes = features.names_and_classes(images, "coloured")
    assert (names, labels.tolist(), classes) == ([*"01234"], [0, 1, 2, 0, 1], ("blue", "green", "red"))
    config = Config(checkpoint="x", data="scenes", out="x.safetensors", batch_size=2)
    vit = tiny(class_token=False)
    found = features.extract(vit, images, {"features": None}, config, ONE)["features"]
    with torch.no_grad():
        torch.testing.assert_close(found, vit(common.normalise(images.pixels)).mean(1), rtol=0, atol=1e-5)


def test_bad_input_is_one_sentence_and_leaves_no_file(place, capsys, monkeypatch):
    folder, flags = place

    def fails(words, match):
        assert call(*words, main=main) == 1
        assert re.search(match, sentence(capsys.readouterr().err))
        assert not (folder / "f.safetensors").exists() and not (folder / "eval.jsonl").exists()

    before = (folder / "encoder.safetensors").read_bytes()
    fails([*flags, "--out", folder / "encoder.safetensors"], "exists and holds no features")
    assert (folder / "encoder.safetensors").read_bytes() == before
    fails([*flags, "--out", folder / "f.npy"], "--out must name the file to write, ending in .safetensors")
    for layers in ("1,x", "3", "-4", "1,"):
        fails([*flags, f"--layers={layers}"], f"--layers {layers}: the encoder has blocks 0 to 2, given as in 0,-1")
    for name, limit in (("LIMIT", 7 * 24 * 4 - 1), ("NAMES_LIMIT", 50)):
        with monkeypatch.context() as patch:
            patch.setattr(features, name, limit)
            fails(flags, "7 x 24 float32 for features: .* too much, take fewer layers")
    vit = tiny(class_token=False)
    vit.norm.weight.data[0] = 3e38
    export(vit, folder / "encoder.safetensors")
    fails([*flags, "--tokens", "cls"], "no class token")
    fails(flags, "features that are not finite")
