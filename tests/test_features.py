"""eval/features.py: the file against the encoder itself, names row by row, what is refused in time."""

import hashlib
import json
import re

import pytest
import torch
from safetensors import safe_open

import common
from eval import features
from eval.encoders import export
from eval.features import Config, main
from eval.protocol import centre_view
from helpers import call, finish, start, write_images
from test_linear_probe import ONE, coloured, tiny


def read(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["about"])


@pytest.fixture
def place(tmp_path):
    """A folder with an encoder of two blocks and photos of three classes, one of them deeper."""
    export(tiny(depth=2), tmp_path / "encoder.safetensors")
    write_images(tmp_path / "photos" / "b", 3)
    write_images(tmp_path / "photos" / "a" / "deep", 2, size=(40, 70))
    write_images(tmp_path / "photos" / "c", 2, size=(32, 32), kind=".jpg")
    flags = ["--checkpoint", tmp_path, "--data", tmp_path / "photos", "--out", tmp_path / "f.safetensors",
             "--workers", 0, "--device", "cpu", "--batch_size", 3]
    return tmp_path, flags


NAMES = ["a/deep/00.png", "a/deep/01.png", "b/00.png", "b/01.png", "b/02.png", "c/00.jpg", "c/01.jpg"]


def views(folder):
    return common.normalise(torch.stack([centre_view(common.read_image(folder / "photos" / name), (32, 32))
                                         for name in NAMES]))


@pytest.mark.parametrize("tokens", ["mean", "cls", "patches", "all"])
@torch.no_grad()
def test_the_file_holds_what_the_encoder_gives_for_each_name(place, tokens):
    folder, flags = place
    before = (folder / "encoder.safetensors").read_bytes()
    assert call(*flags, "--tokens", tokens, main=main) == 0
    found, about = read(folder / "f.safetensors")
    expected = tiny(depth=2).eval()(views(folder))
    expected = dict(mean=expected[:, 1:].mean(1), cls=expected[:, 0], patches=expected[:, 1:],
                    all=expected)[tokens]
    assert found.keys() == {"features", "labels"} and found["features"].dtype == torch.float32
    torch.testing.assert_close(found["features"], expected, rtol=0, atol=1e-5)
    assert about["names"] == NAMES and about["classes"] == ["a", "b", "c"]
    assert found["labels"].tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert about["sha256"] == hashlib.sha256(before).hexdigest() and about["tokens"] == tokens
    record = json.loads((folder / "eval.jsonl").read_text())
    assert (record["kind"], record["images"], record["out"]) == ("features", 7, str(folder / "f.safetensors"))
    assert (folder / "encoder.safetensors").read_bytes() == before


@torch.no_grad()
def test_layers_are_outputs_of_blocks_before_any_norm(place):
    folder, flags = place
    assert call(*flags, "--tokens", "all", "--layers", "0,-1", main=main) == 0
    found, about = read(folder / "f.safetensors")
    vit = tiny(depth=2).eval()
    first = vit.blocks[0](vit.embed(views(folder)))
    assert about["layers"] == ["layer_0", "layer_1"] and found.keys() == {"layer_0", "layer_1", "labels"}
    torch.testing.assert_close(found["layer_0"], first, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["layer_1"], vit.blocks[1](first), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_two_processes_write_the_same_file(place):
    folder, flags = place
    code, out, err = finish(start(*flags, "--layers=1", script=["-m", "eval.features"], processes=2))
    assert code == 0, err
    assert out.count("wrote ") == 1
    together, about = read(folder / "f.safetensors")
    assert call(*flags, "--layers=1", main=main) == 0
    alone, _ = read(folder / "f.safetensors")
    assert about["names"] == NAMES and together.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=1e-6)


def test_a_flat_folder_has_no_labels_and_another_size_is_a_flag(place, capsys):
    folder, flags = place
    flags[3] = write_images(folder / "flat", 4)
    assert call(*flags, "--img_size", 64, "--tokens", "patches", main=main) == 0
    found, about = read(folder / "f.safetensors")
    assert found.keys() == {"features"} and found["features"].shape == (4, 16, 24)
    assert about["names"] == ["00.png", "01.png", "02.png", "03.png"] and about["classes"] == []
    assert "4 x 16 x 24 float32 for each of features: 0.00 GiB" in capsys.readouterr().out


def test_built_in_images_keep_their_labels():
    images = coloured(5)
    names, labels, classes = features.names_and_classes(images, "coloured")
    assert names == ["0", "1", "2", "3", "4"]
    assert (labels.tolist(), classes) == ([0, 1, 2, 0, 1], ("blue", "green", "red"))
    config = Config(checkpoint="x", data="scenes", out="x.safetensors", batch_size=2)
    vit = tiny(class_token=False)
    found = features.extract(vit, images, {"features": None}, config, ONE)["features"]
    with torch.no_grad():
        torch.testing.assert_close(found, vit(common.normalise(images.pixels)).mean(1), rtol=0, atol=1e-5)


def test_bad_input_is_one_sentence_and_leaves_no_file(place, capsys, monkeypatch):
    folder, flags = place

    def fails(words, match):
        assert call(*words, main=main) == 1
        out, err = capsys.readouterr()
        assert re.search(match, err.splitlines()[-1]) and "Traceback" not in err
        assert not (folder / "f.safetensors").exists() and not (folder / "eval.jsonl").exists()

    fails(flags[:4], "--out must name the file to write, ending in .safetensors, not ''")
    fails([*flags, "--out", folder / "f.npy"], "ending in .safetensors")
    fails([*flags, "--layers", "1,x"], "--layers 1,x must be whole numbers")
    fails([*flags, "--layers", "2"], "--layers 2: the encoder has 2 blocks, 0 to 1")
    fails([*flags, "--layers=-3"], "the encoder has 2 blocks")
    monkeypatch.setattr(features, "LIMIT", 7 * 24 * 4 - 1)
    fails(flags, "7 x 24 float32 .* more than the .* GiB .* take fewer layers")
    monkeypatch.setattr(features, "LIMIT", 7 * 24 * 4)
    with monkeypatch.context() as patch:
        patch.setattr(features, "NAMES_LIMIT", 50)
        fails(flags, "the names of 7 files take more than the 0 MB")
    (folder / "photos" / "b" / "02.png").write_bytes(b"junk")
    fails(flags, "b/02.png cannot be read as an image")
    export(tiny(class_token=False), folder / "encoder.safetensors")
    fails([*flags, "--tokens", "cls"], "no class token")
    fails([*flags[:2], "--data", folder / "x", *flags[4:]], "no data folder")
