"""The built-in data and teacher: what every demo, evaluation and test of this project stands on."""

import json

import open_clip
import pytest
import torch
import torch.nn.functional as F

import cae_v2
import mfm_mae
from demo.scenes import CLASSES, SEEDS, make_scenes
from demo.teacher import WORDS, normalise, ridge, tokenize, zero_shot
from eval import linear_probe
from helpers import ROOT, call, read_log

SCENES = make_scenes(1000)


def test_a_scene_depends_on_its_place_alone():
    for count in (1, 777):
        fewer = make_scenes(count)
        assert all(torch.equal(ours, whole[:count]) for ours, whole in zip(fewer[:4], SCENES[:4]))
        assert fewer.captions == SCENES.captions[:count]
    # 300 scenes of 64 pixels are two chunks; the first ends at 256.
    assert torch.equal(make_scenes(300, size=64).images[:256], make_scenes(256, size=64).images)
    assert len(torch.cat([make_scenes(100, seed=seed).images for seed in SEEDS.values()]).unique(dim=0)) == 400


def test_a_scene_is_the_same_at_each_size():
    large = make_scenes(100, size=64)
    assert torch.equal(large.labels, SCENES.labels[:100]) and large.captions == SCENES.captions[:100]
    assert (large.boxes / 2 - SCENES.boxes[:100]).abs().max() <= 2  # in pixels of 32
    shrunk = F.avg_pool2d(large.images.float(), 2)  # (n, 3, 32, 32)
    difference = (shrunk - SCENES.images[:100]).abs()  # in steps of 255
    assert difference.mean() < .6 and (difference > 40).float().mean() < .001
    # A shift by one pixel of 64 is what such a bound has to see.
    assert (shrunk.roll(1, -1) - SCENES.images[:100]).abs().mean() > 5


def test_maps_boxes_and_captions_fit_the_image():
    for label, label_map, box, words in list(zip(*SCENES[1:]))[:200]:
        y, x = torch.where(label_map == 2 + label)  # (k,) each
        assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1] and CLASSES[label] in words.split()
    assert not ((SCENES.maps >= 2) & (SCENES.maps != 2 + SCENES.labels[:, None, None])).any()
    assert SCENES.labels.bincount(minlength=10).min() > 60  # of 100 expected
    assert SCENES.maps.unique().tolist() == list(range(12))
    tokens = tokenize(SCENES.captions)
    ends = tokens.argmax(dim=1)  # open_clip pools at the largest id: that is the end token, once in each row
    assert [" ".join(WORDS[i] for i in row[1:end]) for row, end in zip(tokens, ends)] == SCENES.captions


def test_colour_does_not_give_the_class_away():
    """Ridge regression on the shares of 4 x 4 x 4 colours; ten classes."""
    def histogram(images):
        red, green, blue = (images.long() // 64).unbind(1)  # (n, S, S) each
        bins = (16 * red + 4 * green + blue).flatten(1)  # (n, S*S)
        return torch.stack([row.bincount(minlength=64) / len(row) for row in bins])

    train, val = (make_scenes(2000, seed=SEEDS[name]) for name in ("train", "val"))
    assert ridge(histogram(train.images), histogram(val.images), train.labels, val.labels) < .25


@torch.no_grad()
def test_the_teacher_names_the_scenes_and_loads_at_other_sizes():
    file = ROOT / "demo" / "tiny_clip.safetensors"
    open_clip.add_model_config(file.with_suffix(".json"))
    teacher = open_clip.create_model("tiny_clip", str(file)).eval()
    assert file.stat().st_size <= 3e6 and zero_shot(teacher, make_scenes(500, seed=SEEDS["val"])) >= .95
    for size, patches in ((28, 49), (64, 256)):
        visual = open_clip.create_model("tiny_clip", str(file), force_image_size=size).eval().visual
        visual.output_tokens = True
        pooled, tokens = visual(normalise(make_scenes(20, size=size).images, visual))
        assert tokens.shape[:2] == (20, patches)
        assert torch.allclose((tokens @ visual.proj).mean(dim=1), pooled, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("main, flags, least, gain", [
    (cae_v2.main, [], 80, 40), (mfm_mae.main, [], 0, 15), (mfm_mae.main, ["--fuse=none"], 0, 15)])
def test_the_demos_learn(tmp_path, main, flags, least, gain):
    """What the README promises of the probe: points, and points more than random weights give."""
    assert call("--demo", "--device=cpu", "--out", tmp_path, *flags, main=main) == 0
    linear_probe.main(["--checkpoint", str(tmp_path), "--data=scenes", "--protocol=ridge", "--device=cpu"])
    result, losses = json.loads((tmp_path / "eval.jsonl").read_text()), [line["loss"] for line in read_log(tmp_path)]
    assert result["random_init"] <= 40 and result["accuracy"] >= max(least, result["random_init"] + gain)
    assert losses[-1] < 0.5 * losses[0]
