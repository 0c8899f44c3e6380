"""eval/segment.py: scores by hand, windows, UPerNet against transformers', crops, whole commands."""

import dataclasses
import functools
from collections import defaultdict

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
from eval.protocol import MEAN_COLOUR, look_through
from eval.segment import (IGNORE, Config, LabelMaps, Segmenter, UPerNet, augment, confusion_matrix, distort,
                          draw_overlays, evaluate, find_maps, learning_rate, main, norm_layer, out_indices,
                          predict, scaled_size, scores, to_labels, with_recipe)
from helpers import call, differences, load, numbers, sentence
from test_linear_probe import ONE, results

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, mean=MEAN, std=STD)
FLAGS = ("--img_size=32 --batch_size=4 --steps=6 --warmup_steps=2 --lr=1e-3 --workers=0 --device=cpu "
         "--log_every=1 --channels=16").split()
SIZES = ((40, 48), (48, 40), (36, 60), (32, 32)) * 2
GIVEN = ["--num_classes=3", "--ignore_index=11", "--drop_path=0.3", "--micro_batch=2"]


def config(**changes):
    return Config(**dict(checkpoint="x", num_classes=5, img_size=32, steps=10, warmup_steps=2, workers=0,
                         layer_decay=0.5, lr=1e-3, drop_path=0.0) | changes)


def tiny(**changes):
    torch.manual_seed(3)
    return common.ViT(**{**TINY, **changes})


def integers(high, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, shape, generator=generator, dtype=torch.uint8)


def write_maps(root, count=3, names=("train", "val"), kind="jpg"):
    """Images whose colour shows the label, 0 to 2, and label maps with some ids 11, which flags ignore."""
    for split in names:
        for index, size in enumerate(SIZES[:count]):
            ids = F.interpolate(integers(3, 1, 1, 4, 4, seed=index + 10 * len(split)), size)[0, 0]
            pixels = torch.stack([ids * 80 + 20, 220 - ids * 80, 90 + 0 * ids], dim=-1)
            ids[:3] = 11
            save(root / "images" / split / "town" / f"{index}.{kind}", pixels.numpy())
            save(root / "annotations" / split / "town" / f"{index}.png", ids.numpy())
    return root


def save(path, pixels, turn=1):
    """An array as an image file, stored so that its EXIF tag `turn` turns it to what the array is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}[turn]  # PIL's numbers of what undoes it
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = turn
    (image.transpose(stored[0]) if stored else image).save(path, exif=exif)
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    export(tiny(), path)
    return path


@pytest.fixture(scope="module")
def trained(encoder, tmp_path_factory):
    """The folder of a run on label maps, its result, and the folder of the maps."""
    maps, out = (tmp_path_factory.mktemp(name) for name in ("maps", "trained"))
    assert run(encoder, *GIVEN, out=out, data=write_maps(maps, 8)) == 0
    return out, results(encoder.parent)[-1], maps


def run(encoder, *flags, out, data="scenes"):
    return call("--checkpoint", encoder, "--data", data, "--out", out, *FLAGS, *flags, main=main)


def test_scores_of_a_confusion_matrix_by_hand():
    """Truth: 6 of class 0, 4 of 1, none of 2; class 3 occurs nowhere, class 2 in predictions alone."""
    result = scores(torch.tensor([[4, 1, 1, 0], [2, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    assert result.pop("iou") == [50.0, 40.0, 0.0, None]  # 4 / 8, 2 / 5, 0 / 1
    assert result == pytest.approx(dict(miou=(50 + 40 + 0) / 3, aacc=60, macc=(100 * 4 / 6 + 50) / 2,
                                        commonest_aacc=60, commonest_miou=30))
    labels, predicted = integers(7, 30, 20), integers(7, 30, 20, seed=1)
    labels[:2], expected = IGNORE, np.zeros((7, 7), int)
    np.add.at(expected, (labels[2:].numpy().ravel(), predicted[2:].numpy().ravel()), 1)
    assert confusion_matrix(labels, predicted.long(), 7).tolist() == expected.tolist()
    with pytest.raises(ValueError, match="has a label"):
        scores(torch.zeros(7, 7))


def test_evaluation_drops_nothing_and_shares_the_images(monkeypatch):
    settings = config(num_classes=12, drop_path=0.5, data="scenes")
    model, data = Segmenter(tiny(), settings, "group").train(), find_maps(settings, "val")
    data.images.pixels, data.maps = data.images.pixels[:7], data.maps[:7]
    whole = evaluate(model, data, settings, ONE)
    assert whole.sum() == 7 * 32 * 32 and torch.equal(whole, evaluate(model.train(), data, settings, ONE))
    parts = []
    monkeypatch.setattr(common.Dist, "all_reduce", lambda self, tensor: parts.append(tensor) or tensor)
    for rank in range(3):
        evaluate(model, data, settings, common.Dist(rank, 3, ONE.device))
    assert [int(part.sum()) for part in parts] == [3 * 1024, 2 * 1024, 2 * 1024]
    assert torch.equal(sum(parts), whole)


def position(images):
    """Stands in for a model: its logits are the window's own colours and a ramp inside the window."""
    ramp = torch.arange(32)[:, None] * 100.0 + torch.arange(32)
    return torch.cat([images, ramp.expand(len(images), 1, 32, 32)], dim=1), []


position.encoder = tiny()


def starts(length, window, stride):
    """mmsegmentation's slide_inference: a grid of windows, of which those that reach out are moved back."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(index * stride + window, length) - window, 0) for index in range(count)]


@pytest.mark.parametrize("size, shown, batch", [
    ((32, 32), (32, 32), 0), ((64, 150), (32, 75), 2), ((85, 32), (85, 32), 1), ((20, 128), (20, 128), 0),
    ((16, 400), (5, 128), 0)])
def test_logits_are_the_mean_over_windows(size, shown, batch):
    """Of the resized image, in strides of two thirds of 32 pixels and batches of any size, resized back."""
    image = integers(256, 3, *size)
    view = v2.functional.resize(image, shown, antialias=True).numpy() / 255
    view = (view - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    total, count = np.zeros((4, *shown)), np.zeros(shown)
    for top in starts(shown[0], 32, 21):
        for left in starts(shown[1], 32, 21):
            rows, columns = np.mgrid[top: min(top + 32, shown[0]), left: min(left + 32, shown[1])]
            total[:3, rows, columns] += view[:, rows, columns]
            total[3, rows, columns] += 100 * (rows - top) + columns - left
            count[rows, columns] += 1
    expected = F.interpolate(torch.from_numpy(total / count)[None].float(), size, mode="bilinear")[0]
    logits = predict(position, image, config(num_classes=4, micro_batch=batch), ONE.device)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)


def test_overlays_paint_truth_and_prediction_but_no_ignored_pixel(tmp_path):
    """Label 1 on the left, none on the right; predicted: label 0 everywhere."""
    image, zero = integers(256, 1, 3, 240, 240), torch.eye(5)[:1, :, None, None]
    ids = torch.where(torch.arange(240) < 120, 1, 255).expand(1, 240, 240)
    model = Segmenter(tiny(), config(), "group")
    model.forward = lambda images: (zero.expand(-1, 5, 32, 32), [])
    draw_overlays(tmp_path / "o.png", model,
                  LabelMaps(common.Images(image), ids, "abcde", "one"), config(), ONE.device)
    sheet = v2.functional.pil_to_tensor(Image.open(tmp_path / "o.png"))[:, 22: 262]
    shown, truth, found = sheet[..., 6: 246], sheet[..., 252: 492], sheet[..., 498: 738]
    grey = v2.functional.rgb_to_grayscale(image[0], 3)
    assert torch.equal(shown, image[0]) and torch.equal(truth[..., 120:], grey[..., 120:])
    assert ((truth != grey) & (truth != found)).any(dim=0)[:, :120].all()
    assert (found != grey).any(dim=0).all()


def fill(module, seed):
    """Random weights and statistics, so that no two layers are alike."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(*(-0.03, 0.05) if tensor.ndim == 4 else (0.2, 1), generator=generator)


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
    for mine, other in [*pairs, (ours.auxiliary[0], fcn.convs[0])]:
        mine[0].load_state_dict(other.conv.state_dict())
        mine[1].load_state_dict(other.batch_norm.state_dict())
    # They fuse from fine to coarse, we from coarse to fine.
    parts = theirs.fpn_bottleneck.conv.weight.data.chunk(4, dim=1)
    ours.fuse[0].weight.data = torch.cat(parts[::-1], dim=1)
    ours.classify[1].load_state_dict(theirs.classifier.state_dict())
    ours.auxiliary[2].load_state_dict(fcn.classifier.state_dict())
    outputs, (four, two, _, _) = [torch.randn(2, 12, *grid) for _ in range(4)], ours.rescale
    blocks = four[1](F.conv_transpose2d(outputs[0], four[0].weight, four[0].bias, stride=2))
    levels = [F.conv_transpose2d(F.gelu(blocks), four[3].weight, four[3].bias, stride=2),
              F.conv_transpose2d(outputs[1], two.weight, two.bias, stride=2), outputs[2], F.max_pool2d(outputs[3], 2)]
    with torch.no_grad():
        logits, auxiliary = ours(outputs)
        torch.testing.assert_close(logits, theirs(levels), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(auxiliary, fcn(levels), rtol=1e-4, atol=1e-4)
    assert logits.std() > 0.01 and auxiliary.std() > 0.01


@pytest.mark.parametrize("class_token", [True, False])
def test_what_the_heads_are_given(class_token):
    """UPerNet: patch tokens of the four blocks without a norm. The linear head: the last ones, normed."""
    vit, seen = tiny(class_token=class_token, img_size=(32, 48)).eval(), []
    images = torch.randn(2, 3, 32, 48)
    vit.norm.weight.data.uniform_(0.5, 2)
    model = Segmenter(vit, config(), "group").eval()
    model.head.register_forward_pre_hook(lambda module, given: seen.extend(given[0]))
    logits, (auxiliary,) = model(images)
    assert logits.shape == auxiliary.shape == (2, 5, 32, 48)
    for x, tokens in zip(seen, vit.layers(images, [0, 1, 2, 3])):
        torch.testing.assert_close(x[1, :, 2, 3], tokens[1, class_token + 2 * 6 + 3])
    model = Segmenter(vit, config(head="linear"), "group").eval()
    small = F.linear(vit(images)[:, class_token:], model.head.weight[:, :, 0, 0], model.head.bias)
    small, (logits, auxiliary) = small.transpose(1, 2).reshape(2, 5, 4, 6), model(images)
    torch.testing.assert_close(logits, F.interpolate(small, (32, 48), mode="bilinear", align_corners=False))
    assert auxiliary == []


def test_who_is_trained():
    model = Segmenter(tiny(), config(), "group")
    logits, auxiliary = model(torch.randn(2, 3, 32, 32))
    (logits.square().mean() + auxiliary[0].square().mean()).backward()
    frozen = {"encoder.pos_embed", "encoder.norm.weight", "encoder.norm.bias"}  # for DDP they must not ask
    for name, p in model.named_parameters():
        assert (name in frozen) == (p.grad is None) == (not p.requires_grad)
        assert name in frozen or name.endswith("qkv.bias") or p.grad.abs().sum() > 0


def test_blocks_norms_drop_path_and_seed():
    assert out_indices(12) == [3, 5, 7, 11] and out_indices(24) == [7, 11, 15, 23]
    assert out_indices(32) == [10, 15, 20, 31] and out_indices(4) == [0, 1, 2, 3]
    groups = {768: 32, 256: 32, 128: 32, 48: 12, 16: 4, 6: 1, 3: 1, 30: 6}
    assert {channels: norm_layer("group", channels).num_groups for channels in groups} == groups
    model, *others = (Segmenter(tiny(), config(drop_path=0.3, seed=seed), "batch") for seed in (0, 0, 1))
    assert [round(block.drop_path.rate, 6) for block in model.encoder.blocks] == [0.0, 0.1, 0.2, 0.3]
    heads = [other.head.state_dict() for other in (model, *others)]
    assert differences(heads[0], heads[1]) == [] != differences(heads[0], heads[2])
    assert [module.p for module in model.head.modules() if isinstance(module, nn.Dropout2d)] == [0.1, 0.1]


def test_learning_rate_and_recipes_of_the_papers():
    papers = config(steps=160_000, warmup_steps=1500, lr=1e-4)
    for step, factor in ((0, 1e-6), (750, 0.5 * (1 - 750 / 160_000)), (1500, 1 - 1500 / 160_000),
                         (159_999, 1 / 160_000)):
        assert learning_rate(step, papers) == pytest.approx(1e-4 * factor, rel=1e-5)

    def recipe(depth, **flags):
        found = with_recipe(Config(checkpoint="x", **flags), 7, depth)
        assert (found.num_classes, found.batch_size, found.img_size) == (7, 16, 512)
        return found.steps, found.lr, found.layer_decay, found.drop_path

    assert recipe(12) == (160_000, 1e-4, 0.65, 0.1) and recipe(24) == (160_000, 4e-5, 0.95, 0.15)
    assert recipe(24, lr=1.0, drop_path=0.0) == (160_000, 1.0, 0.95, 0.0)
    assert recipe(24, head="linear") == (10_000, 1e-3, 1.0, 0.0)
    for wrong in (dict(lr=0.0), dict(steps=1500), dict(layer_decay=1.1), dict(drop_path=1.0)):
        pytest.raises(ValueError, recipe, 12, **wrong)


def test_ids_become_labels():
    image, ids = torch.zeros(3, 1, 6), torch.tensor([[0, 1, 2, 4, 255, 3]])
    four, zero = dict(num_classes=4, ignore_index=4), dict(num_classes=4, reduce_zero_label=True)
    for given, flags, expected in ((ids, {}, [0, 1, 2, 4, 255, 3]), (ids, zero, [255, 0, 1, 3, 255, 2]),
                                   (ids.clamp(max=4), four, [0, 1, 2, 255, 255, 3])):
        labels = to_labels(image, given, "f", config(**flags))
        assert labels.tolist() == [expected] and labels.dtype == torch.uint8
    for bad, flags in ((5, {}), (5, zero), (300, {})):
        with pytest.raises(ValueError, match=f"^f holds the id {bad}, which is none of the"):
            to_labels(image, torch.full((1, 6), bad), "f", config(**flags))
    with pytest.raises(ValueError, match="f has the shape"):
        to_labels(image, torch.zeros(3, 1, 6), "f", config())


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
        assert image.shape == (3, 32, 32) and crop.shape == (32, 32) and crop.dtype == torch.uint8
        kept = crop != IGNORE
        assert ((image[0].float() - 10 * crop.float()).abs() <= 3)[kept].float().mean() > 0.85
        assert (image[:, ~kept] == torch.tensor(MEAN_COLOUR)[:, None]).all()
        height, width = (int(kept.any(dim=dim).sum()) for dim in (1, 0))
        assert kept[:height, :width].all() and kept.sum() == height * width  # padded below and to the right
        flips += (int(crop[0, 0]) % 2) - (int(crop[0, width - 1]) % 2)
        shapes.add((height, width))
    assert abs(flips) < 30 and (len(shapes) > 10 if max(size) < 40 else (32, 32) in shapes)
    assert differences(first[3, 0], first[3, 0]) == [] != differences(first[3, 0], other[3, 0])


def test_crops_have_half_to_twice_the_scale_and_at_most_three_quarters_of_a_class(monkeypatch):
    """One class fills 70 % of the left half and 80 % of the right one: places at the left are taken."""
    assert scaled_size((480, 640), 512) == [512, 683] and scaled_size((640, 480), 256) == [341, 256]
    assert scaled_size((100, 800), 512) == [256, 2048]  # 2048 x 512 bounds the long side too
    asked, shares, image = [], [], torch.zeros(3, 100, 200, dtype=torch.uint8)
    monkeypatch.setattr(segment, "scaled_size", lambda size, short: asked.append(short) or [100, 200])
    labels = image[0].clone()
    labels[70:, :100] = labels[80:, 100:] = 1
    for seed in range(200):
        torch.manual_seed(seed)
        shares.append(float((augment(config(img_size=100), image, labels, "f")[1] == 0).float().mean()))
    assert sum(share <= 0.75 for share in shares) >= 198 and max(shares[:100]) > 0.745  # ten tries may fail
    assert 50 <= min(asked) < 53 and 197 < max(asked) <= 200 and abs(np.mean(asked) - 125) < 8
    assert augment(config(img_size=100), image, 0 * labels, "f")[1].unique().tolist() == [0]  # gives up


def test_distortion_is_torchvisions(monkeypatch):
    """Ranges, shares, and orders: brightness first, contrast before or after saturation and hue."""
    orders, factors = set(), defaultdict(list)
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(segment.TF, f"adjust_{name}", lambda image, by, name=name: (
            factors[name].append(by) or [*image, name]))
    for seed in range(400):
        torch.manual_seed(seed)
        orders.add(" ".join(distort([])))
    assert {"brightness contrast saturation hue", "brightness saturation hue contrast", ""} < orders
    assert len(orders) == 16 + 6  # subsets, and the other place of contrast where there is a colour step
    for name, found in factors.items():
        (low, high), near = getattr(v2.RandomPhotometricDistort(), name), (max(found) - min(found)) / 20
        assert low <= min(found) < low + near and high - near < max(found) <= high, name
        assert 160 < len(found) < 240, name


def test_folders_are_read_with_partners_in_order(tmp_path):
    root = write_maps(tmp_path, names=("training", "validation"), kind="JPEG")
    data = find_maps(config(data=str(root)), "train")
    assert len(data) == 3 and data.classes == tuple("01234")
    for size, (image, ids, path) in zip(SIZES, [data[0], data[1], data[2]]):
        assert image.shape == (3, *size) and ids.shape == size
    assert path.endswith("annotations/training/town/2.png")
    coloured = Image.fromarray((ids := integers(3, 36, 60)).numpy(), mode="P")
    coloured.putpalette([200, 1, 2, 3, 100, 5, 6, 7, 50] + [0] * 759)
    for picture, more in ((coloured, 0), (Image.fromarray(ids.numpy().astype(np.uint16) + 1000), 1000)):
        picture.save(path)
        assert torch.equal(data[2][1], ids.int() + more)
    (root / "classes.txt").write_text("road\nsky\n\ncar park\n")
    assert find_maps(config(data=str(root), num_classes=0), "val").classes == ("road", "sky", "car park")


def test_bad_data_is_named(encoder, tmp_path, capsys):
    root, out = write_maps(tmp_path / "a"), tmp_path / "run"
    town, test = (root / "annotations" / split / "town" for split in ("train", "val"))
    def refuses(words, *more):
        assert run(encoder, *GIVEN, "--batch_size=2", *more, out=out, data=root) == 1
        assert words in capsys.readouterr().err.splitlines()[-1] and not (out / "last.pt").exists()
    refuses("--num_classes is 256", "--num_classes=256")
    (test / "0.png").write_bytes(b"junk")
    refuses("val/town/0.png cannot be read as a label map")
    (town / "1.png").write_bytes((town / "0.png").read_bytes())
    refuses("train/town/1.png 40 x 48: they must be equal", "--steps=20")
    (town / "2.png").rename(town / "3.png")
    refuses("images/train/town/2.jpg has no partner")


@pytest.mark.parametrize("turn", range(1, 9))
def test_photos_are_turned_with_their_label_maps(tmp_path, turn):
    """Both upright, both with the tag, or, where only that fits, the map of the photo as it is stored."""
    ids = np.zeros((40, 64), np.uint8)
    ids[5:20, 8:24] = 1
    photo = save(tmp_path / "photo.png", np.stack([ids * 200] * 3, axis=-1), turn)
    maps = [save(tmp_path / "map.png", ids), save(tmp_path / "tagged.png", ids, turn)]
    if turn > 4:
        Image.fromarray(np.asarray(Image.open(photo))[..., 0] // 200).save(tmp_path / "stored.png")
        maps.append(tmp_path / "stored.png")
    for path, size in zip(maps, ((40, 64), (40, 64), (64, 40))):
        image, found, _ = LabelMaps(common.Images([photo]), common.Images([path]), "ab", "x")[0]
        assert found.shape == size and found.sum() == 240 and torch.equal(image[0], 200 * found)
    save(tmp_path / "map.png", ids[:30])
    with pytest.raises(ValueError, match="photo.png.* has 40 x 64 pixels, its label map .*map.png 30 x 64") as error:
        LabelMaps(common.Images([photo]), common.Images(maps[:1]), "ab", "x")[0]
    assert ("EXIF" in str(error)) == (turn > 1)


@pytest.mark.parametrize("ids, flags, words", [
    ((255, 255), "", "(train) has pixels of 1 of 2 classes, none of lesion, and id 255 (--ignore_index) has 10.0 %"),
    ((1, 0), "", "(val) has pixels of 1 of 2 classes, none of lesion, and id 255 (--ignore_index) has 0.0 %"),
    ((1, 1), "--ignore_index=1", "none of lesion, and id 1 (--ignore_index) has 10.0 % of the pixels"),
    ((1, 1), "--reduce_zero_label", "(--ignore_index) and 0 (--reduce_zero_label) has 90.0 % of the pixels"),
    ((1, 7), "", "annotations/val/4.png holds the id 7")])
def test_label_maps_are_looked_at_before_the_first_step(encoder, tmp_path, capsys, ids, flags, words):
    """Four to train with and two to test, a tenth of which is a lesion, with an id per split."""
    for index in range(6):
        split, labels = "train" if index < 4 else "val", np.zeros((40, 50), np.uint8)
        labels[10:20, :20] = ids[index > 3]
        save(tmp_path / "images" / split / f"{index}.png", np.stack([labels] * 3, axis=-1))
        save(tmp_path / "annotations" / split / f"{index}.png", labels)
    (tmp_path / "classes.txt").write_text("background\nlesion\n", "utf-16")
    assert run(encoder, *flags.split(), out=tmp_path / "run", data=tmp_path) == 1
    assert words in sentence(capsys.readouterr().err) and not (tmp_path / "run/last.pt").exists()


def test_counts_of_label_maps_are_shared_kept_and_told(tmp_path, capsys, monkeypatch):
    """In three processes, and again for another file, another flag and another set."""
    looked, parts, one = [], [], config(data=str(write_maps(tmp_path)), num_classes=9, ignore_index=11)
    monkeypatch.setattr(common.Dist, "all_reduce", lambda self, tensor: parts.append(tensor) or tensor)
    monkeypatch.setattr(segment, "look_through", lambda dataset, *given: looked.append(dataset) or look_through(
        dataset, *given))

    def look(split="train", rank=0, world=1, **flags):
        settings = dataclasses.replace(one, **flags)
        segment.check_maps(find_maps(settings, split), split, settings, tmp_path, common.Dist(rank, world, ONE.device))
        return len(looked)

    maps = [torch.from_numpy(np.array(Image.open(path))) for path in sorted(tmp_path.glob("annotations/train/*/*"))]
    counts = sum(labels.flatten().bincount(minlength=12) for labels in maps)
    assert [look(), look(), look("val"), look(), look("val")] == [1, 1, 2, 2, 2]
    assert parts[1].tolist() == parts[3].tolist() == [*counts[:9].tolist(), int(counts[11])]
    out, err = capsys.readouterr()
    assert f"labels   train: 3 maps, {100 * counts[11] / counts.sum():.1f} % of the pixels ignored\n" in out
    assert err.startswith("warning: no pixel of 3, 4, 5, 6, 7 and 1 more in the label maps of ")
    Image.fromarray(maps[0].numpy()).save(tmp_path / "annotations/train/town/0.png", compress_level=0)
    assert [look(), look(), look(reduce_zero_label=True)] == [3, 3, 4]
    parts.clear()
    for rank in (1, 2):
        look(rank=rank, world=3)
    assert [part.tolist()[:3] for part in parts[1::2]] == [row.flatten().bincount()[:3].tolist() for row in maps[1:]]


@pytest.mark.parametrize("size", [(1, 12000), (12000, 1)])
def test_thin_images_are_cut_and_tested(tmp_path, size):
    photo, path = (save(tmp_path / name, integers(2, *size).numpy()) for name in ("photo.png", "map.png"))
    settings, data = config(num_classes=2), LabelMaps(common.Images([photo]), common.Images([path]), "ab", "thin")
    crop, labels = augment(settings, *data[0])
    assert crop.shape == (3, 32, 32) and (labels != IGNORE).sum() == 32
    assert evaluate(Segmenter(tiny(), settings, "group"), data, settings, ONE).sum() == 12000


@pytest.mark.parametrize("head, code", [("upernet", 0), ("linear", 1)])
def test_a_file_without_the_final_norm_has_a_head_that_reads_none(tmp_path, head, code):
    state = tiny().state_dict()
    torch.save({"fc_" * name.startswith("norm.") + name: value for name, value in state.items()}, tmp_path / "t.pth")
    assert run(tmp_path / "t.pth", f"--head={head}", "--num_heads=2", "--max_steps=1", out=tmp_path / "run") == code


def test_a_run_writes_model_encoder_and_result(trained):
    (out, line, _), state = trained, load(trained[0])
    assert (state["kind"], state["step"], state["config"]["num_classes"]) == ("segmentation", 6, 3)
    last = learning_rate(5, Config(**state["config"]))
    rates = sorted({group["lr"] / last for group in state["optimizer"]["param_groups"]})
    assert rates == pytest.approx([0.65**power for power in (5, 4, 3, 2, 1, 0)])
    assert line["kind"] == "segment" and line["protocol"] == "upernet" and line["val_images"] == 8
    assert (line["train_images"], line["norm"], line["step"], line["device"]) == (8, "group", 6, "cpu")
    assert len(line["iou"]) == 3 and 0 < line["miou"] <= line["aacc"] < 100
    assert "blocks.3.norm1.weight" in load_file(out / "encoder.safetensors")


def test_the_first_loss_is_that_of_the_formula(trained):
    """Cross-entropy of the head and 0.4 of the auxiliary one's, in the order and crops of the seed."""
    settings, losses = Config(**load(trained[0])["config"]), []
    samples = common.Samples(find_maps(settings, "train"), functools.partial(augment, settings), 0)
    model = Segmenter(tiny(), settings, "group").train()
    for micro, keys in enumerate(common.micro_batch_keys(8, common.make_plan(8, 4, 2, 1, 1), ONE, 0, 0, 1)):
        images, labels = torch.utils.data.default_collate([samples[key] for key in keys])
        torch.manual_seed(common.seed_for(0, "step", 0, 2 * micro))
        logits, (auxiliary,) = model(common.normalise(images, MEAN, STD))
        for x, weight in ((logits, 1.0), (auxiliary, 0.4)):
            p = x.log_softmax(dim=1).gather(1, labels.long().clamp(max=2)[:, None])[:, 0][labels < IGNORE]
            losses.append(-weight * float(p.detach().sum()) / labels.numel())
    assert numbers(trained[0])[0]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_eval_only_needs_nothing_but_last_pt(trained, tmp_path, norm):
    """Of several GPUs, too, whose batch norm is tested anywhere with the statistics that it learnt."""
    state, (_, expected, maps) = load(trained[0]), trained
    if norm == "batch":
        settings = Config(**state["config"])
        model = nn.SyncBatchNorm.convert_sync_batchnorm(Segmenter(tiny(), settings, "batch"))
        fill(model.head, 4)
        state |= dict(norm="batch", model=model.state_dict())
        expected = scores(evaluate(model, find_maps(settings, "val"), settings, ONE))
    torch.save(state, tmp_path / "last.pt")
    given = ["--eval_only", "--data", maps, "--device=cpu", "--workers=0", "--micro_batch=2"]
    assert call(*given, "--checkpoint", tmp_path, main=main) == 0
    assert results(tmp_path)[0]["iou"] == expected["iou"] and (tmp_path / "overlays.png").exists()


@pytest.mark.parametrize("more", [[], ["--random_init"]])
def test_linear_head_leaves_the_encoder_alone(encoder, tmp_path, more):
    assert run(encoder, "--head=linear", "--max_steps=3", *more, out=tmp_path) == 0
    torch.manual_seed(0)
    expected = common.ViT(**TINY).state_dict() if more else load_file(encoder)
    assert differences(dict(expected), load_file(tmp_path / "encoder.safetensors")) == []
    assert set(load(tmp_path)["optimizer"]["state"]) == {0, 1}
