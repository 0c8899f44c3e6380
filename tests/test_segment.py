"""eval/segment.py: scores by hand, windows, UPerNet against transformers', crops, whole commands."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms import v2

import common
from eval import segment
from eval.encoders import export
from eval.protocol import MEAN_COLOUR, layer_groups
from eval.segment import (IGNORE, Config, LabelMaps, Segmenter, UPerNet, augment, confusion_matrix, distort,
                          draw_overlays, evaluate, find_maps, learning_rate, main, norm_layer, out_indices, pad,
                          pixel_loss, predict, scaled_size, scores, to_labels, with_recipe)
from helpers import call, differences, load, numbers, read_log

CPU = torch.device("cpu")
ONE = common.Dist(0, 1, CPU)
TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)
FLAGS = ("--img_size=32 --batch_size=4 --steps=6 --warmup_steps=2 --lr=1e-3 --workers=0 --device=cpu "
         "--log_every=1 --channels=16").split()
GIVEN = ["--num_classes=3", "--ignore_index=11"]


def config(**changes):
    values = dict(checkpoint="x", num_classes=5, img_size=32, steps=10, warmup_steps=2, workers=0,
                  layer_decay=0.5, lr=1e-3, drop_path=0.0)
    return Config(**{**values, **changes})


def tiny(**changes):
    torch.manual_seed(3)
    return common.ViT(**{**TINY, **changes})


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(high, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, shape, generator=generator, dtype=torch.uint8)


def write_maps(root, sizes=((40, 48), (48, 40), (36, 60)), names=("train", "val"), kind="jpg"):
    """A folder of images whose colour shows the label, 0 to 2; some pixels are 11, which the flags ignore."""
    for split in names:
        for folder in ("images", "annotations"):
            (root / folder / split / "town").mkdir(parents=True, exist_ok=True)
        for index, size in enumerate(sizes):
            coarse = integers(3, 1, 1, 4, 4, seed=index + 10 * len(split)).float()
            ids = F.interpolate(coarse, size, mode="nearest")[0, 0].byte()
            pixels = torch.stack([ids * 80 + 20, 220 - ids * 80, 90 + 0 * ids], dim=-1)
            ids[:3] = 11
            Image.fromarray(pixels.numpy()).save(root / "images" / split / "town" / f"{index}.{kind}")
            Image.fromarray(ids.numpy()).save(root / "annotations" / split / "town" / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    export(tiny(), path)
    return path


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    return write_maps(tmp_path_factory.mktemp("maps"), sizes=((40, 48), (48, 40), (36, 60), (32, 32)) * 2)


# -- scores


def test_scores_of_a_matrix_by_hand():
    """Truth: 6 of class 0, 4 of 1, none of 2; class 3 occurs nowhere, class 2 in predictions alone."""
    result = scores(torch.tensor([[4, 1, 1, 0], [2, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    assert result["iou"] == [50.0, 40.0, 0.0, None]  # 4 / 8, 2 / 5, 0 / 1
    assert result["miou"] == pytest.approx((50 + 40 + 0) / 3)
    assert result["aacc"] == pytest.approx(60)
    assert result["macc"] == pytest.approx((100 * 4 / 6 + 50) / 2)
    assert result["commonest_aacc"] == pytest.approx(60) and result["commonest_miou"] == pytest.approx(30)
    json.dumps(result, allow_nan=False)


def test_commonest_is_what_that_prediction_scores():
    labels = integers(4, 1000).clamp(max=2)
    everywhere = torch.full((1000,), int(labels.bincount().argmax()))
    expected = scores(confusion_matrix(labels, everywhere, 4))
    real = scores(confusion_matrix(labels, integers(4, 1000, seed=1), 4))
    for name in ("miou", "aacc"):
        assert real[f"commonest_{name}"] == pytest.approx(expected[name])


def test_confusion_matrix_counts_pairs():
    labels, predicted = integers(7, 30, 20), integers(7, 30, 20, seed=1)
    labels[:2] = IGNORE
    expected = np.zeros((7, 7), int)
    np.add.at(expected, (labels[2:].numpy().ravel(), predicted[2:].numpy().ravel()), 1)
    matrix = confusion_matrix(labels, predicted.long(), 7)
    assert matrix.dtype == torch.int64 and np.array_equal(matrix.numpy(), expected)
    with pytest.raises(ValueError, match="has a label"):
        scores(confusion_matrix(torch.full_like(labels, IGNORE), predicted.long(), 7))


def test_evaluation_drops_nothing_and_shares_the_images():
    model = Segmenter(tiny(), config(num_classes=12, drop_path=0.5), "group").train()
    settings = config(num_classes=12, data="scenes")
    data = find_maps(settings, "val")
    data.images.pixels, data.maps = data.images.pixels[:7], data.maps[:7]
    whole = evaluate(model, data, settings, ONE)
    assert whole.sum() == 7 * 32 * 32 and torch.equal(whole, evaluate(model.train(), data, settings, ONE))

    class Part(common.Dist):
        def all_reduce(self, tensor):
            return tensor

    parts = [evaluate(model, data, settings, Part(rank, 3, CPU)) for rank in range(3)]
    assert [int(part.sum()) for part in parts] == [3 * 1024, 2 * 1024, 2 * 1024]
    assert torch.equal(sum(parts), whole)


# -- windows


class Position(nn.Module):
    """Stands in for a model: its logits are the window's own colours and a ramp inside the window."""

    def forward(self, images):
        H, W = images.shape[2:]
        ramp = torch.arange(H)[:, None] * 100.0 + torch.arange(W)
        return torch.cat([images, ramp.expand(len(images), 1, H, W)], dim=1), []


def starts(length, window, stride):
    """mmsegmentation's slide_inference: a grid of windows, of which those that reach out are moved back."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(index * stride + window, length) - window, 0) for index in range(count)]


@pytest.mark.parametrize("size, batch", [((32, 32), 0), ((32, 75), 2), ((85, 32), 1), ((20, 128), 0)])
def test_logits_are_the_mean_over_windows(size, batch):
    """Of images that need no resizing; strides of two thirds of 32 pixels, batches of any size."""
    image, settings = integers(256, 3, *size), config(num_classes=4, micro_batch=batch)
    total, count = np.zeros((4, *size)), np.zeros(size)
    normed = common.normalise(image[None])[0].numpy()
    for top in starts(size[0], 32, 21):
        for left in starts(size[1], 32, 21):
            rows, columns = np.mgrid[top: min(top + 32, size[0]), left: min(left + 32, size[1])]
            total[:3, rows, columns] += normed[:, rows, columns]
            total[3, rows, columns] += 100 * (rows - top) + columns - left
            count[rows, columns] += 1
    logits = predict(Position(), image, settings, CPU)
    np.testing.assert_allclose(logits.numpy(), total / count, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", ["upernet", "linear"])
def test_a_window_that_covers_the_image_is_whole_image_inference(head):
    model, image = Segmenter(tiny(), config(head=head), "group").eval(), integers(256, 3, 48, 48)
    view = v2.functional.resize(image, [32, 32], antialias=True)
    with torch.no_grad():
        whole = model(common.normalise(view[None]))[0]
    larger = F.interpolate(whole, (48, 48), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(predict(model, image, config(), CPU), larger)


def test_sizes_keep_the_aspect():
    assert scaled_size((480, 640), 512) == [512, 683] and scaled_size((640, 480), 256) == [341, 256]
    assert scaled_size((100, 800), 512) == [256, 2048]  # 2048 x 512 bounds the long side too
    assert scaled_size((1, 1000), 32) == [1, 128]


def test_padding_below_and_right_is_black_after_normalising():
    image = integers(256, 3, 5, 9)
    padded = pad(image, 8, MEAN_COLOUR)
    assert padded.shape == (3, 8, 9) and torch.equal(padded[:, :5], image)
    assert common.normalise(padded[None])[0, :, 5:].abs().max() < 0.01


# -- model


def test_outputs_of_the_papers_blocks():
    assert out_indices(12) == [3, 5, 7, 11] and out_indices(24) == [7, 11, 15, 23]
    assert out_indices(32) == [10, 15, 20, 31] and out_indices(4) == [0, 1, 2, 3] and out_indices(1) == [0] * 4


def fill(module, seed):
    """Random weights and statistics, so that no two layers are alike."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.data.copy_(0.08 * noise - 0.03 if tensor.ndim == 4 else 0.2 + 0.8 * noise)


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (8, 6)])
def test_upernet_is_transformers_upernet(grid):
    pytest.importorskip("transformers")
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead
    ours = UPerNet(12, 5, 8, "batch").eval()
    settings = UperNetConfig(backbone_config=dict(model_type="resnet"), hidden_size=8, num_labels=5)
    theirs, fcn = (Head(settings, in_channels=[12] * 4).eval() for Head in (UperNetHead, UperNetFCNHead))
    assert list(settings.pool_scales) == [1, 2, 3, 6] and settings.auxiliary_loss_weight == 0.4
    fill(theirs, 1), fill(fcn, 2), fill(ours.rescale, 3)
    pairs = [(pool[1], block.layers[1]) for pool, block in zip(ours.pools, theirs.psp_modules.blocks)]
    pairs += [(ours.bottleneck, theirs.bottleneck), (ours.fuse, theirs.fpn_bottleneck)]
    pairs += [*zip(ours.laterals, theirs.lateral_convs[::-1]), *zip(ours.smooth, theirs.fpn_convs[::-1])]
    pairs += [(ours.auxiliary[0], fcn.convs[0])]
    for mine, other in pairs:
        mine[0].load_state_dict(other.conv.state_dict())
        mine[1].load_state_dict(other.batch_norm.state_dict())
    # They fuse from fine to coarse, we from coarse to fine.
    ours.fuse[0].weight.data = torch.cat(theirs.fpn_bottleneck.conv.weight.data.chunk(4, dim=1)[::-1], dim=1)
    ours.classify[1].load_state_dict(theirs.classifier.state_dict())
    ours.auxiliary[2].load_state_dict(fcn.classifier.state_dict())
    outputs, (h, w) = [random(2, 12, *grid, seed=seed) for seed in range(4)], grid
    levels = [rescale(x) for rescale, x in zip(ours.rescale, outputs)]
    assert [tuple(level.shape[2:]) for level in levels] == [(4 * h, 4 * w), (2 * h, 2 * w), (h, w), (h // 2, w // 2)]
    with torch.no_grad():
        logits, auxiliary = ours(outputs)
        torch.testing.assert_close(logits, theirs(levels), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(auxiliary, fcn(levels), rtol=1e-4, atol=1e-4)
    assert logits.shape == (2, 5, 4 * h, 4 * w) and auxiliary.shape == (2, 5, h, w)
    assert logits.std() > 0.01 and auxiliary.std() > 0.01


def test_rescaling_is_four_two_one_and_half():
    rescale, x = UPerNet(8, 5, 8, "group").rescale, random(1, 8, 4, 4)
    first, norm, gelu, second = rescale[0]
    assert isinstance(norm, nn.GroupNorm) and isinstance(gelu, nn.GELU)
    blocks = F.conv_transpose2d(x, first.weight, first.bias, stride=2)
    expected = F.conv_transpose2d(F.gelu(norm(blocks)), second.weight, second.bias, stride=2)
    torch.testing.assert_close(rescale[0](x), expected)
    assert first.weight.shape[2:] == second.weight.shape[2:] == rescale[1].weight.shape[2:] == (2, 2)
    assert torch.equal(rescale[2](x), x) and torch.equal(rescale[3](x)[0, 0, 1, 0], x[0, 0, 2:, :2].max())


@pytest.mark.parametrize("class_token", [True, False])
def test_what_the_heads_are_given(class_token):
    """UPerNet: patch tokens of the four blocks without a norm. The linear head: the last ones, normed."""
    vit, images, seen = tiny(class_token=class_token, img_size=(32, 48)).eval(), random(2, 3, 32, 48), []
    vit.norm.weight.data.uniform_(0.5, 2)
    model = Segmenter(vit, config(), "group").eval()
    model.head.register_forward_pre_hook(lambda module, given: seen.extend(given[0]))
    logits, auxiliary = model(images)
    assert logits.shape == auxiliary[0].shape == (2, 5, 32, 48) and len(auxiliary) == 1
    for x, tokens in zip(seen, vit.layers(images, [0, 1, 2, 3])):
        assert x.shape == (2, 32, 4, 6)
        torch.testing.assert_close(x[1, :, 2, 3], tokens[1, class_token + 2 * 6 + 3])
    model = Segmenter(vit, config(head="linear"), "group").eval()
    small = F.linear(vit(images)[:, class_token:], model.head.weight[:, :, 0, 0], model.head.bias)
    small = small.transpose(1, 2).reshape(2, 5, 4, 6)
    logits, auxiliary = model(images)
    torch.testing.assert_close(logits, F.interpolate(small, (32, 48), mode="bilinear", align_corners=False))
    assert auxiliary == []


def test_who_is_trained():
    model = Segmenter(tiny(), config(head="linear"), "group")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    model = Segmenter(tiny(), config(), "group")
    logits, auxiliary = model(random(2, 3, 32, 32))
    (logits.square().mean() + auxiliary[0].square().mean()).backward()
    frozen = {"encoder.pos_embed", "encoder.norm.weight", "encoder.norm.bias"}
    assert {name for name, p in model.named_parameters() if p.grad is None} == frozen
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen  # as DDP asks for
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if name not in frozen
               and not name.endswith("qkv.bias"))


def test_norms_drop_path_and_seed():
    groups = {768: 32, 256: 32, 128: 32, 48: 12, 16: 4, 6: 1, 3: 1, 30: 6}
    assert {channels: norm_layer("group", channels).num_groups for channels in groups} == groups
    model, *others = (Segmenter(tiny(), config(drop_path=0.3, seed=seed), "batch") for seed in (0, 0, 1))
    assert [round(block.drop_path.p, 6) for block in model.encoder.blocks] == [0.0, 0.1, 0.2, 0.3]
    assert [differences(model.head.state_dict(), other.head.state_dict()) == [] for other in others] == [True, False]
    kinds = {type(module) for module in model.head.modules()}
    assert nn.BatchNorm2d in kinds and nn.GroupNorm not in kinds
    grouped = Segmenter(tiny(), config(), "group").head
    assert not any(isinstance(module, nn.BatchNorm2d) for module in grouped.modules())
    assert [module.p for module in grouped.modules() if isinstance(module, nn.Dropout2d)] == [0.1, 0.1]


# -- optimisation


def test_loss_is_the_sum_over_all_pixels():
    logits, labels = random(4, 5, 6, 7).double(), integers(5, 4, 6, 7).long()
    labels[0, :3], labels[2] = IGNORE, IGNORE
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    total = sum(-np.log(p[b, labels[b, y, x], y, x]) for b in range(4) for y in range(6) for x in range(7)
                if labels[b, y, x] != IGNORE)
    assert float(pixel_loss(logits, labels)) == pytest.approx(total / (4 * 6 * 7))


def test_layer_decay_is_timms():
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay
    theirs, model = timm.models.VisionTransformer(**TINY, num_classes=3), Segmenter(tiny(), config(), "group")

    def rates(module, groups):
        names = {id(p): name for name, p in module.named_parameters()}
        return {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}

    groups = param_groups_layer_decay(theirs, 0.05, theirs.no_weight_decay(), layer_decay=0.5)
    expected, found = rates(theirs, groups), rates(model, layer_groups(model, model.encoder, 0.05, 0.5))
    for name in expected:
        if name.split(".")[0] in ("blocks", "patch_embed", "cls_token"):
            assert found[f"encoder.{name}"] == expected[name], name
    assert found["head.fuse.0.weight"] == (1.0, 0.05) and found["head.fuse.1.weight"] == (1.0, 0.0)
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}


def test_learning_rate_warms_up_and_falls_to_zero():
    papers = config(steps=160_000, warmup_steps=1500, lr=1e-4)
    assert learning_rate(0, papers) == pytest.approx(1e-10)
    assert learning_rate(750, papers) == pytest.approx(1e-4 * 0.5 * (1 - 750 / 160_000), rel=1e-5)
    assert learning_rate(1500, papers) == pytest.approx(1e-4 * (1 - 1500 / 160_000))
    assert learning_rate(80_000, papers) == pytest.approx(5e-5)
    assert learning_rate(159_999, papers) == pytest.approx(1e-4 / 160_000)
    assert learning_rate(0, config(warmup_steps=0, lr=1.0)) == pytest.approx(1e-6)


def test_recipes_of_the_papers():
    facts = dict(batch_size=16, img_size=512, warmup_steps=1500, weight_decay=0.05)
    assert {name: getattr(Config(checkpoint="x"), name) for name in facts} == facts

    def recipe(depth, **flags):
        resolved = with_recipe(Config(checkpoint="x", **flags), 7, depth)
        assert resolved.num_classes == 7
        return resolved.steps, resolved.lr, resolved.layer_decay, resolved.drop_path

    assert recipe(12) == (160_000, 1e-4, 0.65, 0.1) and recipe(24) == (160_000, 4e-5, 0.95, 0.15)
    assert recipe(24, lr=1.0, drop_path=0.0) == (160_000, 1.0, 0.95, 0.0)
    assert recipe(24, head="linear") == (10_000, 1e-3, 1.0, 0.0)
    for wrong in (dict(lr=0.0), dict(lr=-3.0), dict(steps=1500), dict(layer_decay=1.1), dict(drop_path=1.0),
                  dict(drop_path=-0.5)):
        with pytest.raises(ValueError, match="--"):
            recipe(12, **wrong)


# -- data


def test_ids_become_labels():
    image, ids = torch.zeros(3, 1, 6), torch.tensor([[0, 1, 2, 4, 255, 3]])
    assert to_labels(image, ids, "f", config()).tolist() == [[0, 1, 2, 4, IGNORE, 3]]
    reduced = to_labels(image, ids, "f", config(reduce_zero_label=True, num_classes=4))
    assert reduced.tolist() == [[IGNORE, 0, 1, 3, IGNORE, 2]] and reduced.dtype == torch.uint8
    assert to_labels(image, ids.clamp(max=4), "f", config(ignore_index=4, num_classes=4)).tolist() == [
        [0, 1, 2, IGNORE, IGNORE, 3]]
    for bad, flags in ((5, {}), (5, dict(reduce_zero_label=True, num_classes=4)), (300, {})):
        with pytest.raises(ValueError, match=f"^f holds the id {bad}, which is none of the"):
            to_labels(image, torch.full((1, 6), bad), "f", config(**flags))
    for shape in ((1, 5), (3, 1, 6)):
        with pytest.raises(ValueError, match="f has the shape"):
            to_labels(image, torch.zeros(shape), "f", config())


@pytest.mark.parametrize("size", [(40, 90), (90, 40), (20, 24)])
def test_crops_keep_labels_on_their_pixels(monkeypatch, size):
    """Four flat quarters, whose red is ten times the label, however scaled, cut and flipped."""
    monkeypatch.setattr(segment, "distort", lambda image: image)
    labels = torch.arange(size[0])[:, None] * 2 // size[0] * 2 + torch.arange(size[1]) * 2 // size[1]
    pixels = torch.stack([labels * 10, 255 - labels, labels * 0])[None].byte()
    data = LabelMaps(common.Images(pixels), labels[None], map(str, range(5)), "quarters")
    first, other = (common.Samples(data, functools.partial(augment, config()), seed) for seed in (0, 1))
    flips, shapes = 0, set()
    for epoch in range(60):
        image, crop = first[epoch, 0]
        assert image.shape == (3, 32, 32) and crop.shape == (32, 32)
        assert image.dtype == crop.dtype == torch.uint8
        kept = crop != IGNORE
        near = (image[0].float() - 10 * crop.float()).abs() <= 3
        assert near[kept].float().mean() > 0.85
        assert (image[:, ~kept] == torch.tensor(MEAN_COLOUR)[:, None]).all()
        rows, columns = kept.any(dim=1), kept.any(dim=0)
        assert kept.sum() == rows.sum() * columns.sum() and kept[0, 0]  # padded below and to the right
        left, right = crop[0, 0] % 2, crop[0, columns.sum() - 1] % 2
        flips += int(left > right) - int(left < right)
        shapes.add((int(rows.sum()), int(columns.sum())))
    assert abs(flips) < 30 and (len(shapes) > 10 if max(size) < 40 else (32, 32) in shapes)
    assert differences(first[3, 0], first[3, 0]) == [] and differences(first[3, 0], other[3, 0]) != []


def test_scale_is_from_half_to_twice_the_crop(monkeypatch):
    asked = []
    monkeypatch.setattr(segment, "scaled_size", lambda size, short: asked.append(short) or [64, 64])
    for seed in range(200):
        torch.manual_seed(seed)
        augment(config(), torch.zeros(3, 40, 40, dtype=torch.uint8), integers(5, 40, 40), "f")
    assert 16 <= min(asked) < 18 and 62 < max(asked) <= 64 and abs(np.mean(asked) - 40) < 3


def test_no_class_fills_more_than_three_quarters_of_a_crop():
    """Three quarters of the map are one class: ten tries nearly always find the rest, one seldom would."""
    image, fine = torch.zeros(3, 100, 400, dtype=torch.uint8), 0
    labels = image[0].clone()
    labels[:, 300:] = integers(5, 5, 5).repeat_interleave(20, 0).repeat_interleave(20, 1)
    for seed in range(60):
        torch.manual_seed(seed)
        crop = augment(config(), image, labels, "f")[1]
        counts = crop[crop != IGNORE].int().bincount()
        fine += bool(counts.max() <= 0.75 * counts.sum())
    assert 48 < fine < 60
    assert augment(config(), image, 0 * labels, "f")[1].unique().tolist() == [0]  # gives up


def test_distortion_is_torchvisions_in_range_and_share():
    """On single colours each step shows on its own: how often it acts, and how far."""
    theirs = v2.RandomPhotometricDistort()
    assert theirs.brightness == (0.875, 1.125) and theirs.contrast == theirs.saturation == (0.5, 1.5)
    assert theirs.hue == (-0.05, 0.05) and theirs.p == 0.5
    torch.manual_seed(0)
    grey = torch.full((3, 4, 4), 160, dtype=torch.uint8)  # brightness alone changes it, but for rounding
    values = [distort(grey).float().mean().item() for _ in range(400)]
    changed = [value for value in values if abs(value - 160) > 1]
    assert 0.4 < len(changed) / 400 < 0.6
    assert 138 <= min(changed) < 144 and 176 < max(changed) <= 180
    edge = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    edge[:, :2] = 140  # contrast changes the difference
    distorted = [distort(edge).float() for _ in range(400)]
    gaps = [float(image[0, 0, 0] - image[0, 3, 0]) for image in distorted]
    assert 20 * 0.875 - 1 <= min(gaps) < 24 and 56 < max(gaps) <= 60 * 1.125 + 1
    coloured = torch.tensor([200, 100, 100], dtype=torch.uint8)[:, None, None].expand(3, 4, 4).contiguous()
    spreads, turned = [], 0
    for _ in range(400):
        red, green, blue = distort(coloured)[:, 0, 0].tolist()
        spreads.append((red - max(green, blue)) / red)
        turned += abs(green - blue) > 2
        assert red >= max(green, blue) - 1  # no channel is swapped
    assert min(spreads) < 0.3 and max(spreads) > 0.6 and 120 < turned < 280


def test_distortion_has_brightness_first_and_contrast_before_or_after_colour(monkeypatch):
    orders, called = set(), []
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(segment.TF, f"adjust_{name}", lambda image, by, name=name: called.append(name))
    for seed in range(400):
        torch.manual_seed(seed)
        called.clear()
        distort(None)
        orders.add(" ".join(called))
    assert {"brightness contrast saturation hue", "brightness saturation hue contrast", ""} < orders
    assert len(orders) == 16 + 6  # subsets, and the other place of contrast where there is a colour step


def test_folders_are_read_with_partners_in_order(tmp_path):
    root = write_maps(tmp_path, names=("training", "validation"), kind="JPEG")
    data = find_maps(config(data=str(root)), "train")
    assert len(data) == 3 and data.classes == ("0", "1", "2", "3", "4")
    for index, size in enumerate([(40, 48), (48, 40), (36, 60)]):
        image, ids, name = data[index]
        assert image.shape == (3, *size) and ids.shape == size and name.endswith(f"training/town/{index}.png")
    path = root / "annotations" / "training" / "town" / "0.png"
    ids = integers(3, 40, 48)
    coloured = Image.fromarray(ids.numpy(), mode="P")
    coloured.putpalette([200, 1, 2, 3, 100, 5, 6, 7, 50] + [0] * 759)
    coloured.save(path)  # of a palette the indices count
    assert torch.equal(find_maps(config(data=str(root)), "train")[0][1], ids.int())
    Image.fromarray(ids.numpy().astype(np.uint16) + 1000).save(path)
    assert torch.equal(find_maps(config(data=str(root)), "train")[0][1], ids.int() + 1000)
    (root / "classes.txt").write_text("road\nsky\n\ncar park\n")
    assert find_maps(config(data=str(root), num_classes=0), "val").classes == ("road", "sky", "car park")
    assert find_maps(config(data="scenes"), "val").classes[:3] == ("sky", "ground", "house")


def test_bad_data_is_named(encoder, tmp_path, capsys):
    root = write_maps(tmp_path / "a")

    def refuses(pattern, *more):
        assert run(encoder, "--batch_size=3", *GIVEN, *more, out=tmp_path / "run", data=root) == 1
        assert pattern in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "run" / "last.pt").exists()

    annotation, test = (root / "annotations" / split / "town" / "1.png" for split in ("train", "val"))
    image, whole = root / "images" / "train" / "town" / "1.jpg", annotation.read_bytes()
    annotation.write_bytes((root / "annotations" / "train" / "town" / "0.png").read_bytes())
    refuses("train/town/1.png has the shape (40, 48), its image (48, 40)")
    annotation.unlink()
    refuses("images/train/town/1.jpg has no partner")
    annotation.write_bytes(whole)
    image.rename(image.with_name("2b.jpg"))
    refuses("has no partner")
    image.with_name("2b.jpg").rename(image)
    test.with_name("0.png").write_bytes(b"junk")
    refuses("val/town/0.png cannot be read as a label map")
    (root / "classes.txt").write_text("a\nb\n")
    refuses("classes.txt has 2 names")
    (root / "classes.txt").unlink()
    for count in (0, 256):
        refuses(f"--num_classes is {count}", f"--num_classes={count}")


def test_overlays_paint_truth_and_prediction_but_no_ignored_pixel(tmp_path):
    """Label 1 on the left, none on the right; predicted: label 0 everywhere."""
    image, ids = integers(256, 1, 3, 240, 240), torch.ones(1, 240, 240)
    ids[..., 120:] = 255

    class Zero(nn.Module):
        def forward(self, images):
            return F.one_hot(torch.zeros(len(images), 32, 32).long(), 5).permute(0, 3, 1, 2).float(), []

    data = LabelMaps(common.Images(image), ids, "abcde", "one")
    draw_overlays(tmp_path / "o.png", Zero(), data, config(), CPU)
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "o.png"))).permute(2, 0, 1).float()
    shown, truth, predicted, names = (sheet[:, 22: 262, 6 + 246 * place: 246 + 246 * place] for place in range(4))
    grey = v2.functional.rgb_to_grayscale(image[0], 3).float()
    assert torch.equal(shown.byte(), image[0]) and torch.equal(truth[..., 120:], grey[..., 120:])
    paint = [((panel - 0.4 * grey)[..., :120] / 0.6).mean(dim=(1, 2)) for panel in (truth, predicted)]
    assert (paint[0] - paint[1]).abs().max() > 50 and (predicted - grey).abs().mean() > 20
    assert set(names.flatten(1).unique(dim=1).sum(dim=0).bool().tolist()) == {False, True}  # text on black


# -- runs


def run(encoder, *flags, out, data="scenes"):
    return call("--checkpoint", encoder, "--data", data, "--out", out, *FLAGS, *flags, main=main)


def results(folder):
    return [json.loads(line) for line in (Path(folder) / "eval.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(encoder, maps, tmp_path_factory):
    """The folder of a run on the maps."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert run(encoder, *GIVEN, "--drop_path=0.3", "--micro_batch=2", out=out, data=maps) == 0
    return out


def test_a_run_writes_model_encoder_result_and_pictures(trained, encoder, maps):
    state = load(trained)
    assert (state["kind"], state["method"], state["step"]) == ("segmentation", "segment", 6)
    assert state["config"]["layer_decay"] == 0.65 and state["config"]["num_classes"] == 3  # resolved
    last = learning_rate(5, Config(**state["config"]))
    groups = state["optimizer"]["param_groups"]
    assert {round(group["lr_scale"], 6) for group in groups} == {round(0.65**power, 6) for power in range(6)}
    assert all(group["lr"] == pytest.approx(last * group["lr_scale"]) for group in groups)
    line = next(line for line in results(encoder.parent) if line["data"] == str(maps))
    assert line["kind"] == "segment" and line["protocol"] == "upernet" and line["val_images"] == 8
    assert (line["train_images"], line["norm"], line["step"], line["device"]) == (8, "group", 6, "cpu")
    assert len(line["iou"]) == 3 and 0 < line["miou"] <= line["aacc"] < 100
    assert (trained / "overlays.png").exists() and "blocks.3.norm1.weight" in load_file(trained / "encoder.safetensors")


def test_the_first_loss_is_that_of_the_formula(trained, maps):
    """Cross-entropy of the head and 0.4 of the auxiliary one's, in the order and crops of the seed."""
    settings, losses = Config(**load(trained)["config"]), []
    samples = common.Samples(find_maps(settings, "train"), functools.partial(augment, settings), 0)
    model = Segmenter(tiny(), settings, "group").train()
    for micro, keys in enumerate(common.micro_batch_keys(8, common.make_plan(8, 4, 2, 1, 1), ONE, 0, 0, 1)):
        images, labels = torch.utils.data.default_collate([samples[key] for key in keys])
        torch.manual_seed(common.seed_for(0, "step", 0, 2 * micro))
        mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        logits, (auxiliary,) = model((images / 255 - mean) / std)
        for x, weight in ((logits, 1.0), (auxiliary, 0.4)):
            p = x.log_softmax(dim=1).gather(1, labels.long().clamp(max=2)[:, None])[:, 0][labels < IGNORE]
            losses.append(-weight * float(p.detach().sum()) / labels.numel())
    assert numbers(trained)[0]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_eval_only_needs_nothing_but_last_pt(trained, encoder, maps, tmp_path, capsys):
    (tmp_path / "last.pt").write_bytes((trained / "last.pt").read_bytes())
    given = ["--eval_only", "--data", maps, "--device=cpu", "--workers=0", "--checkpoint"]
    assert call(*given, tmp_path, main=main) == 0
    first = next(line for line in results(encoder.parent) if line["data"] == str(maps))
    (again,) = results(tmp_path)
    assert all(again[name] == first[name] for name in ("miou", "aacc", "macc", "iou"))
    assert (tmp_path / "overlays.png").read_bytes() == (trained / "overlays.png").read_bytes()
    torch.save(dict(kind="pretraining"), tmp_path / "other.pt")
    assert call(*given, tmp_path / "other.pt", main=main) == 1
    assert "not from a segmentation run" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--random_init"]])
def test_linear_head_leaves_the_encoder_alone(encoder, tmp_path, more):
    assert run(encoder, "--head=linear", "--max_steps=3", *more, out=tmp_path) == 0
    torch.manual_seed(0)
    expected = common.ViT(**TINY).state_dict() if more else load_file(encoder)
    assert differences(dict(expected), load_file(tmp_path / "encoder.safetensors")) == []
    assert set(load(tmp_path)["optimizer"]["state"]) == {0, 1}


def test_the_scenes_are_learnt(tmp_path):
    """Forty steps are enough to tell sky and ground apart, which the commonest class cannot."""
    export(tiny(), tmp_path / "encoder.safetensors")
    given = ["--steps=40", "--batch_size=8", "--lr=2e-3", "--layer_decay=0.9"]
    assert call("--checkpoint", tmp_path, "--data", "scenes", *FLAGS, *given, main=main) == 0
    (line,) = results(tmp_path)
    assert line["aacc"] > line["commonest_aacc"] + 10 and line["miou"] > 2 * line["commonest_miou"]
    losses = [entry["loss"] for entry in read_log(tmp_path / "segment_upernet")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_batch_norm_is_rebuilt_for_testing(maps, tmp_path):
    """A last.pt of several GPUs is tested anywhere, with the statistics it learnt."""
    settings = config(num_classes=3, ignore_index=11, data=str(maps), channels=16)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Segmenter(tiny(), settings, "batch"))
    fill(model.head, 4)
    torch.save(dict(kind="segmentation", step=3, config=dataclasses.asdict(settings), norm="batch",
                    encoder=model.encoder.config, model=model.state_dict()), tmp_path / "last.pt")
    given = ["--eval_only", "--checkpoint", tmp_path, "--data", maps, "--device=cpu", "--workers=0"]
    assert call(*given, main=main) == 0
    expected = scores(evaluate(model, find_maps(settings, "val"), settings, ONE))
    assert results(tmp_path)[0]["iou"] == expected["iou"]
