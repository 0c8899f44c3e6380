"""The built-in data and teacher: what every demo, evaluation and test of this project stands on."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from demo.scenes import (CLASSES, MAP_CLASSES, PAINTS, PALETTE, SEEDS, make_scenes, pick,
                         pick_colours)
from demo.teacher import CONTEXT, WORDS, clip_loss, normalise, ridge, tokenize, write, zero_shot

DEMO = Path(__file__).parents[1] / "demo"


@pytest.fixture(scope="module")
def scenes():
    return make_scenes(1000)


@pytest.fixture(scope="module")
def open_clip():
    module = pytest.importorskip("open_clip")
    module.add_model_config(DEMO / "tiny_clip.json")
    return module


# ------------------------------------------------------------------------------------- scenes

@pytest.mark.parametrize("count", [1, 10, 777])
def test_a_scene_does_not_depend_on_how_many_follow(scenes, count):
    fewer = make_scenes(count)
    for name in ("images", "labels", "maps", "boxes"):
        assert torch.equal(getattr(fewer, name), getattr(scenes, name)[:count]), name
    assert fewer.captions == scenes.captions[:count]


def test_chunks_leave_no_trace():
    # 300 scenes of 64 pixels are two chunks; the first chunk alone ends at 256.
    whole, part = make_scenes(300, size=64), make_scenes(256, size=64)
    assert torch.equal(whole.images[:256], part.images)
    assert torch.equal(make_scenes(1, size=64).images, whole.images[:1])


def test_a_scene_is_the_same_at_each_size(scenes):
    large = make_scenes(100, size=64)
    assert torch.equal(large.labels, scenes.labels[:100])
    assert large.captions == scenes.captions[:100]
    assert (large.boxes / 2 - scenes.boxes[:100]).abs().max() <= 2  # in pixels of 32
    shrunk = F.avg_pool2d(large.images.float(), 2)  # (n, 3, 32, 32)
    difference = (shrunk - scenes.images[:100]).abs()  # in steps of 255
    assert difference.mean() < .6
    assert (difference > 40).float().mean() < .001
    # A shift of the axis by one pixel of 64 is what such a bound has to see.
    assert (shrunk.roll(1, -1) - scenes.images[:100]).abs().mean() > 5


def test_shapes_and_types():
    images, labels, maps, boxes, captions = make_scenes(5, size=28, seed=9)
    assert (images.shape, images.dtype) == ((5, 3, 28, 28), torch.uint8)
    assert (labels.shape, labels.dtype) == ((5,), torch.int64)
    assert (maps.shape, maps.dtype) == ((5, 28, 28), torch.uint8)
    assert (boxes.shape, boxes.dtype) == ((5, 4), torch.float32)
    assert len(captions) == 5 and len(PALETTE) == len(MAP_CLASSES) == 12


def test_the_box_is_tight_around_the_map(scenes):
    for label, label_map, box in zip(scenes.labels[:200], scenes.maps, scenes.boxes):
        y, x = torch.where(label_map == 2 + label)  # (k,) each
        assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    objects = scenes.maps.flatten(1).clone()  # (n, S*S)
    assert not ((objects >= 2) & (objects != 2 + scenes.labels[:, None])).any()


def test_every_class_and_every_part_of_the_map_appears(scenes):
    assert scenes.labels.bincount(minlength=10).min() > 60  # of 100 expected
    assert scenes.maps.unique().tolist() == list(range(12))
    assert (scenes.maps == 0).float().mean() > .2 and (scenes.maps == 1).float().mean() > .2


def test_the_map_follows_the_image(scenes):
    # A sky is one colour with a weak gradient, so the pixels under label 0 are alike; under a map
    # moved by a quarter of the image they are not.
    def spread(maps):
        return sum(image[:, sky].std(dim=1).mean() for image, sky in zip(images, maps == 0)) / 300
    images = scenes.images[:300] / 255
    assert spread(scenes.maps[:300]) < .05
    assert spread(scenes.maps[:300].roll(8, 2)) > .1


def test_the_seeds_share_no_scene():
    assert len(set(SEEDS.values())) == 4
    first = [make_scenes(100, seed=seed).images for seed in SEEDS.values()]
    assert len(torch.cat(first).flatten(1).unique(dim=0)) == 400


def histogram(images):
    """Share of an image's pixels in each of 4 x 4 x 4 colours: (n, 3, S, S) -> (n, 64)."""
    red, green, blue = (images.long() // 64).unbind(1)  # (n, S, S) each
    bins = (16 * red + 4 * green + blue).flatten(1)  # (n, S*S)
    return torch.stack([row.bincount(minlength=64) / len(row) for row in bins])


def test_colour_does_not_give_the_class_away(monkeypatch):
    def score():
        train, val = (make_scenes(2000, seed=SEEDS[name]) for name in ("train", "val"))
        return ridge(histogram(train.images), histogram(val.images), train.labels, val.labels)
    assert score() < .25
    # The measure sees what it is there to see: paint each class in a colour of its own.
    def give_away(d):
        colours = pick_colours(d)  # (n, 5, 3)
        colours[:, 2] = torch.tensor(list(PAINTS.values()))[pick(d["label"], CLASSES)]
        return colours
    monkeypatch.setattr("demo.scenes.pick_colours", give_away)
    assert score() > .7


def test_captions_name_the_class_and_now_and_then_colour_and_place(scenes):
    assert all(CLASSES[label] in words.split()
               for label, words in zip(scenes.labels, scenes.captions))
    coloured = sum(len(words.split(" on ")[0].split()) == 3 for words in scenes.captions)
    placed = sum(words.endswith("sky") for words in scenes.captions)
    assert 440 < coloured < 560 and 280 < placed < 390
    assert not any("a orange" in words or "a evening" in words for words in scenes.captions)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"count": -1}, {"count": 3, "size": 15}])
def test_bad_arguments_are_named(wrong):
    with pytest.raises(ValueError, match="count must|size must"):
        make_scenes(**wrong)


# ------------------------------------------------------------------------------------- teacher

def test_tokens(scenes):
    tokens = tokenize(scenes.captions)
    assert (tokens.shape, tokens.dtype) == ((1000, CONTEXT), torch.int64)
    # open_clip pools at the largest id: that is the end token, once in each row, then padding.
    ends = tokens.argmax(dim=1)
    assert ends.tolist() == [len(words.split()) + 1 for words in scenes.captions]
    assert (tokens.max(dim=1).values == len(WORDS) - 1).all()
    read_back = [" ".join(WORDS[i] for i in row[1:end]) for row, end in zip(tokens, ends)]
    assert read_back == scenes.captions
    assert len(set(WORDS)) == len(WORDS)


@pytest.mark.parametrize("caption", ["a unicorn", "a car " * 7])
def test_captions_that_do_not_fit_are_refused(caption):
    with pytest.raises(ValueError, match="lacks 'unicorn'|more than 12 words"):
        tokenize([caption])


def test_a_pair_with_the_same_caption_is_no_negative():
    features = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    images, texts, scale = features, features[[0, 0, 2]], torch.tensor(5.)
    tokens = tokenize(["a car", "a car", "a fish"])
    loss = clip_loss(lambda *_: (images, texts, scale), None, tokens)
    # Written out: each car against its own caption and the fish's, the fish against all.
    logits = scale * images @ texts.T  # (3, 3)
    rows = [logits[0, [0, 2]], logits[1, [1, 2]], logits[2, [2, 0, 1]]]
    columns = [logits[[0, 2], 0], logits[[1, 2], 1], logits[[2, 0, 1], 2]]
    expected = sum(x.logsumexp(0) - x[0] for x in rows + columns) / 6
    assert torch.allclose(loss, expected)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "weights"
    write(file, lambda path: path.write_text("old"))
    with pytest.raises(KeyboardInterrupt):
        def killed(path):
            path.write_text("ne")
            raise KeyboardInterrupt
        write(file, killed)
    assert file.read_text() == "old"


def test_the_architecture_fits_the_vocabulary():
    text = json.loads((DEMO / "tiny_clip.json").read_text())["text_cfg"]
    assert (text["vocab_size"], text["context_length"]) == (len(WORDS), CONTEXT)


def test_the_teacher_names_the_scenes(open_clip):
    file = DEMO / "tiny_clip.safetensors"
    assert file.stat().st_size <= 3e6
    model = open_clip.create_model("tiny_clip", pretrained=str(file)).eval()
    val = make_scenes(500, seed=SEEDS["val"])
    assert zero_shot(model, val) >= .95


@pytest.mark.parametrize("size, patches", [(28, 49), (32, 64), (64, 256)])
def test_the_teacher_loads_at_other_sizes(open_clip, size, patches):
    model = open_clip.create_model("tiny_clip", pretrained=str(DEMO / "tiny_clip.safetensors"),
                                   force_image_size=size).eval()
    model.visual.output_tokens = True
    val = make_scenes(200, size=size, seed=SEEDS["val"])
    with torch.no_grad():
        pooled, tokens = model.visual(normalise(val.images, model.visual))
    tokens = tokens @ model.visual.proj  # (n, N, 64)
    assert pooled.shape == (200, 64) and tokens.shape == (200, patches, 64)
    assert torch.allclose(tokens.mean(dim=1), pooled, atol=1e-4)


def test_the_log_ends_with_the_score():
    last = json.loads((DEMO / "tiny_clip.log.jsonl").read_text().splitlines()[-1])
    assert last["zero_shot"] >= .99
