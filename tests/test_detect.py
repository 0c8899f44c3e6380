"""eval/detect.py: AP against hand-made boxes, the parts against torchvision, whole runs on a tiny COCO set."""

import dataclasses
import json
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.swin_transformer import shifted_window_attention
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms.v2 import functional as TF

import common
from demo.scenes import CLASSES, SEEDS, make_scenes, run_lengths, write_coco
from eval import detect
from eval.encoders import export
from eval.protocol import layer_groups
from helpers import assert_same_run, call, differences, finish, load, read_log, start

try:
    from pycocotools import mask as coco_mask
except ImportError:
    coco_mask = None

needs_coco = pytest.mark.skipif(coco_mask is None, reason="pycocotools is missing: pip install '.[det]'")
CPU = torch.device("cpu")
ONE = common.Processes(0, 1, CPU)
# 8 x 8 patches of 4 pixels in windows of 4; a step of 4 images takes some 0.2 s.
TINY = ("--img_size=32 --window=4 --global_blocks=1 --channels=8 --rois=8 --batch_size=4 --epochs=20 --lr=1e-3 "
        "--warmup_epochs=0.5 --drop_path=0.2 --scale_min=0.8 --scale_max=1.25 --workers=0 --device=cpu "
        "--compile=off --log_every=1").split()


def config(**changes):
    tiny = dict(checkpoint="x", img_size=32, window=4, global_blocks=1, channels=8, rois=8, workers=0)
    return detect.Config(**{**tiny, **changes})


def tiny_vit(**changes):
    torch.manual_seed(0)
    return common.ViT(**{**dict(img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2), **changes})


def tiny_detector(classes=10, **changes):
    vit = tiny_vit()
    return detect.Detector(vit, classes, config(**changes))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder, train=8, val=5, size=32)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    export(tiny_vit(img_size=16), path)
    return path


def rectangle(height, width, x, y, w, h):
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[y: y + h, x: x + w] = True
    return mask


def write_set(folder, split="train", categories=((7, "b"), (3, "a"), (90, "c")), year="2017"):
    """Three images of 20 x 30: one with a polygon, a plain run-length mask and a crowd, one empty, one more."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / f"{split}{year}").mkdir(exist_ok=True)
    images = [dict(id=10 * n, file_name=f"{n}.png", height=20, width=30) for n in range(3)]
    for image in images:
        pixels = np.random.default_rng(image["id"]).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{split}{year}" / image["file_name"])
    runs = dict(size=[20, 30], counts=run_lengths(rectangle(20, 30, 5, 6, 10, 4)))
    annotations = [
        dict(id=0, image_id=0, category_id=90, bbox=[2, 3, 8, 10], iscrowd=0, area=80,
             segmentation=[[2, 3, 10, 3, 10, 13, 2, 13]]),
        dict(id=1, image_id=0, category_id=3, bbox=[5, 6, 10, 4], iscrowd=0, area=40, segmentation=runs),
        dict(id=2, image_id=0, category_id=3, bbox=[0, 0, 30, 20], iscrowd=1, area=600, segmentation=runs),
        dict(id=3, image_id=20, category_id=7, bbox=[5, 6, 10, 4], segmentation=runs)]
    content = dict(images=images, annotations=annotations,
                   categories=[dict(id=number, name=name) for number, name in categories])
    path = folder / "annotations" / f"instances_{split}{year}.json"
    path.write_text(json.dumps(content))
    return path, content


# -- AP


def truth(*boxes, crowd=()):
    """One image of 200 x 200 with an object of category 5 in each box, as `read_annotations` gives it."""
    annotations = [dict(id=number, image_id=1, category_id=5, bbox=list(box), area=box[2] * box[3],
                        iscrowd=int(box in crowd), segmentation=code(box))
                   for number, box in enumerate(boxes, start=1)]
    return dict(images=[dict(id=1, height=200, width=200)], annotations=annotations,
                categories=[dict(id=5, name="x")])


def code(box):
    return coco_mask.encode(np.asfortranarray(rectangle(200, 200, *box).byte().numpy()))


def result(box, score, mask=None):
    return dict(image_id=1, category_id=5, bbox=list(box), score=score, segmentation=code(mask or box))


A, B = (10, 10, 100, 100), (120, 120, 50, 50)


@needs_coco
@pytest.mark.parametrize("boxes, results, expected", [
    ([A, B], [(A, .9), (B, .8)], (100, 100, 100)),
    # Recall ends at 1/2: of the 101 places on the recall axis, those from 0 to 0.5 have precision 1.
    ([A, B], [(A, .9)], (5100 / 101,) * 3),
    ([A], [(B, .9), (A, .8)], (50, 50, 50)),  # a false one first: precision 1/2 at each recall
    ([A], [(A, .9), (B, .8)], (100, 100, 100)),  # and after it: no harm
    ([A], [(A, .9), (A, .8)], (100, 100, 100)),
    # IoU 0.62: right for the three thresholds 0.5, 0.55, 0.6 of ten.
    ([A], [((10, 10, 100, 62), .9)], (30, 100, 0)),
    ([A], [((10, 10, 80, 100), .9)], (60 + 10, 100, 100)),  # IoU 0.8: 0.5 ... 0.8
    ([A, B], [], (0, 0, 0))])
def test_ap_of_hand_made_boxes(boxes, results, expected):
    ap = detect.coco_ap(truth(*boxes), [result(*one) for one in results])
    for kind in ("box", "mask"):
        assert [ap[f"{kind}_{name}"] for name in ("ap", "ap50", "ap75")] == pytest.approx(expected, abs=1e-6)


@needs_coco
def test_masks_are_measured_by_themselves_and_crowds_cost_nothing(capsys):
    ap = detect.coco_ap(truth(A), [result(A, .9, mask=(10, 10, 100, 62))])
    assert (ap["box_ap"], ap["mask_ap"]) == pytest.approx((100, 30))
    ap = detect.coco_ap(truth(A, B, crowd=[B]), [result(B, .9), result(A, .8)])
    assert ap["box_ap"] == pytest.approx(100)
    assert capsys.readouterr().out == ""


def perfect(model, images, indices, config, device):
    """In place of `detect`: the truth with masks of 0.7 in 0..1, and a wrong guess that is less sure."""
    for index in indices:
        target = images[index][1]
        n, masks = len(target["labels"]), target["masks"][:, None]
        yield target, dict(
            boxes=torch.cat([target["boxes"], torch.tensor([[0.0, 0, 2, 2]])]),
            labels=torch.cat([target["labels"], torch.tensor([1])]),
            scores=torch.tensor([0.7] * n + [0.2]),
            masks=torch.cat([0.7 * masks + 0.3 * (1 - masks), torch.zeros(1, *masks.shape[1:])]))


@needs_coco
def test_what_is_true_scores_100(tmp_path, scenes, monkeypatch):
    """The whole way from a target to the AP, with category ids that have gaps and annotations from number 0."""
    write_set(tmp_path, "val")
    monkeypatch.setattr(detect, "detect", perfect)
    for folder in (tmp_path, scenes):
        ap = detect.evaluate(None, detect.CocoImages(folder, "val"), config(), ONE)
        assert ap["box_ap"] == pytest.approx(100) and ap["mask_ap"] == pytest.approx(100)


@needs_coco
def test_each_process_detects_in_its_share_and_all_shares_are_measured(scenes, monkeypatch):
    images, shares = detect.CocoImages(scenes, "val"), []

    def recorded(model, images, indices, *rest):
        shares.append(list(indices))
        return perfect(model, images, indices, *rest)

    def gather(parts, mine):
        other = perfect(None, images, range(1, 5, 2), None, None)
        parts[:] = mine, [one for seen in other for one in detect.coco_results(*seen, images.category_ids)]

    monkeypatch.setattr(detect, "detect", recorded)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    ap = detect.evaluate(None, images, config(), common.Processes(0, 2, CPU))
    assert shares == [[0, 2, 4]] and ap["box_ap"] == pytest.approx(100)
    assert detect.evaluate(None, images, config(), common.Processes(1, 2, CPU)) is None


# -- data


@needs_coco
def test_masks_in_all_three_codes():
    mask = rectangle(20, 30, 5, 6, 10, 4)
    runs = dict(size=[20, 30], counts=run_lengths(mask))
    packed = coco_mask.encode(np.asfortranarray(mask.byte().numpy()))
    polygons = [[5, 6, 11, 6, 11, 10, 5, 10], [11, 6, 15, 6, 15, 10, 11, 10]]  # an object in two pieces
    for one in (runs, packed, dict(packed, counts=packed["counts"].decode()), polygons):
        assert (detect.decode_mask(one, 20, 30) == mask.numpy()).all()


def test_run_lengths_are_cocos():
    mask = torch.tensor([[1, 0, 0], [1, 0, 1]])
    assert run_lengths(mask) == [0, 2, 3, 1]
    assert run_lengths(torch.tensor([[0, 1], [0, 1]])) == [2, 2]
    assert run_lengths(torch.zeros(2, 2)) == [4]


@needs_coco
def test_a_coco_set_is_read(tmp_path):
    for split in ("train", "val"):
        write_set(tmp_path, split)
    train, val = (detect.CocoImages(tmp_path, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (2, 3)  # without objects: in tests alone
    assert train.classes == ("a", "b", "c") and train.category_ids == [3, 7, 90]
    image, target = train[0]
    assert torch.equal(image, common.read_image(tmp_path / "train2017" / "0.png"))
    assert target["boxes"].tolist() == [[2, 3, 10, 13], [5, 6, 15, 10]]  # and not the crowd
    assert target["labels"].tolist() == [3, 1] and target["image_id"] == 0
    expected = [rectangle(20, 30, 2, 3, 8, 10), rectangle(20, 30, 5, 6, 10, 4)]
    assert torch.equal(target["masks"], torch.stack(expected).byte())
    assert train[1][1]["image_id"] == 20 and train[1][1]["labels"].tolist() == [2]
    empty = val[1][1]
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 20, 30)
    assert [one["id"] for one in val.truth["annotations"]] == [1, 2, 3, 4]
    assert val.truth["annotations"][3]["area"] == 40 and val.truth["annotations"][3]["iscrowd"] == 0


@needs_coco
def test_scenes_in_cocos_format(scenes):
    images = detect.CocoImages(scenes, "val")
    assert len(images) == 5 and images.classes == CLASSES
    drawn = make_scenes(20, 16, SEEDS["val"])
    image, target = images[3]
    for quarter, (y, x) in enumerate(((0, 0), (0, 16), (16, 0), (16, 16))):
        scene = 12 + quarter
        assert torch.equal(image[:, y: y + 16, x: x + 16], drawn.images[scene])
        assert target["labels"][quarter] == drawn.labels[scene] + 1
        assert target["boxes"][quarter].tolist() == (drawn.boxes[scene] + torch.tensor([x, y, x, y])).tolist()
        mask = torch.zeros(32, 32)
        mask[y: y + 16, x: x + 16] = drawn.maps[scene] >= 2
        assert torch.equal(target["masks"][quarter], mask.byte())
        assert images.truth["annotations"][scene]["area"] == mask.sum()
    with pytest.raises(ValueError, match="even"):
        write_coco(scenes, size=33)


def planted(height=40, width=60, box=(20, 10, 24, 16)):
    """A black image with a white rectangle, which is the object."""
    mask = rectangle(height, width, *box)
    x, y, w, h = box
    target = dict(image_id=3, boxes=torch.tensor([[x, y, x + w, y + h]]).float(), labels=torch.tensor([4]),
                  masks=mask.byte()[None])
    return (255 * mask).byte().expand(3, -1, -1).contiguous(), target


@pytest.mark.parametrize("low, high", [(0.3, 0.9), (1.5, 2.5)])
def test_jitter_moves_image_box_and_mask_alike(low, high):
    jitter = detect.Jitter(config(img_size=64, scale_min=low, scale_max=high))
    image, target = planted(box=(4, 4, 24, 16))
    widths, sides, cut, gone = [], [], 0, 0
    for seed in range(60):
        torch.manual_seed(seed)
        out, new = jitter(image, target)
        assert out.shape == (3, 64, 64) and out.dtype == torch.uint8 and new["size"] == (64, 64)
        if not len(new["boxes"]):
            assert new["masks"].shape == (0, 64, 64) and new["labels"].shape == (0,)
            gone += 1
            continue
        white, mask = (out > 200).all(dim=0), new["masks"][0].bool()
        assert (white != mask).sum() <= mask.sum() * 0.25 + 8  # they differ at the edge at most
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert (new["boxes"][0] - torch.tensor(around)).abs().max() <= 1.01
        x0, y0, x1, y1 = new["boxes"][0].tolist()
        touches = min(x0, y0) == 0 or max(x1, y1) == 64
        cut += touches and abs((x1 - x0) / (y1 - y0) - 1.5) > 0.1
        if not touches:
            widths.append((x1 - x0) / 24 / (64 / 60))
            padding = (out == torch.tensor(detect.MEAN_COLOUR)[:, None, None]).all(dim=0)
            assert high > 1 or padding.float().mean() > 1 - high**2 * 2 / 3 - 0.05
            sides.append(bool(padding[:, 0].all()))
    assert low - 0.06 <= min(widths) and max(widths) <= high + 0.06 and max(widths) - min(widths) > 0.15
    assert (cut > 5 and gone > 0) if low > 1 else (cut == gone == 0 and 0 < sum(sides) < len(sides))


def test_jitter_flips_and_boxes_of_cut_objects_are_tight():
    image, target = planted(64, 64, (0, 8, 20, 16))
    jitter = detect.Jitter(config(img_size=64, scale_min=1, scale_max=1))
    boxes = []
    for seed in range(40):
        torch.manual_seed(seed)
        out, new = jitter(image, target)
        boxes.append(tuple(new["boxes"][0].tolist()))
        assert torch.equal(out[0] > 0, new["masks"][0] > 0)
    assert set(boxes) == {(0, 8, 20, 24), (44, 8, 64, 24)} and 8 < boxes.count((0, 8, 20, 24)) < 32
    # An L whose long arm is cut away: the box of what is left is the box of its stem.
    mask = rectangle(64, 128, 4, 4, 8, 40) | rectangle(64, 128, 4, 36, 100, 8)
    image = torch.zeros(3, 64, 128, dtype=torch.uint8)
    target = dict(image_id=0, boxes=torch.tensor([[4.0, 4, 104, 44]]), labels=torch.tensor([1]),
                  masks=mask.byte()[None])
    jitter = detect.Jitter(config(img_size=64, scale_min=2, scale_max=2))  # 1:1, half of the width is seen
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        _, new = jitter(image, target)
        rows, columns = (new["masks"][0].any(dim=side).nonzero() for side in (1, 0))
        if len(rows):
            x0, y0, x1, y1 = new["boxes"][0].tolist()
            assert (x0, y0, x1, y1) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            seen.add(y1 - y0)
    assert seen == {8.0, 40.0}


def test_the_view_of_tests_keeps_the_aspect_and_pads_below_and_right():
    image, target = planted(40, 60)
    (out, about), = detect.Whole([(image, target)], range(1), 90)
    assert about == dict(image_id=3, size=(60, 90), original=(40, 60))
    assert torch.equal(out[:, :60], TF.resize(image, [60, 90], TF.InterpolationMode.BICUBIC, antialias=True))
    assert (out[:, 60:] == torch.tensor(detect.MEAN_COLOUR)[:, None, None]).all()
    normalised, _ = detect.to_device(detect.collate([(out, about)]), CPU)
    assert normalised[:, :, 60:].abs().max() < 0.01
    (out, about), = detect.Whole([(image.transpose(1, 2), target)], range(1), 30)
    assert about["size"] == (30, 20) and out.shape == (3, 30, 30)


# -- the model


def test_one_window_is_full_attention():
    vit = tiny_vit(init_values=0.3).double()
    x = torch.randn(2, 64, 16, dtype=torch.float64)
    for block in vit.blocks:
        torch.testing.assert_close(detect.windowed(block, x, (8, 8), 8), block(x), rtol=0, atol=1e-14)


def test_windows_are_torchvisions():
    block, x = tiny_vit().blocks[0], torch.randn(2, 64, 16)
    torch.nn.init.normal_(block.attn.qkv.bias)
    seen = shifted_window_attention(
        block.norm1(x).reshape(2, 8, 8, 16), block.attn.qkv.weight, block.attn.proj.weight,
        torch.zeros(1, 2, 16, 16), window_size=[4, 4], num_heads=2, shift_size=[0, 0],
        qkv_bias=block.attn.qkv.bias, proj_bias=block.attn.proj.bias).flatten(1, 2)
    expected = x + seen
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(detect.windowed(block, x, (8, 8), 4), expected, rtol=0, atol=1e-5)


def test_drop_path_drops_whole_samples_in_windows_too():
    block = tiny_vit(drop_path_rate=0.5).blocks[1].train()
    x = torch.randn(40, 64, 16)
    torch.manual_seed(0)
    with torch.no_grad():
        changed = (detect.windowed(block, x, (8, 8), 4) != x).any(dim=2)  # (B, N)
    assert torch.equal(changed.all(dim=1), changed.any(dim=1))
    assert 2 <= (~changed.any(dim=1)).sum() <= 20  # about a quarter keeps neither branch


def test_blocks_that_see_everything():
    def windows(**changes):
        vit = tiny_vit(img_size=64, depth=changes.pop("depth", 12))
        given = dict(window=4, global_blocks=4, channels=8) | changes
        return detect.ViTDet(vit, **given).windows

    assert [index for index, window in enumerate(windows()) if window == 16] == [2, 5, 8, 11]
    assert [index for index, window in enumerate(windows(depth=24)) if window == 16] == [5, 11, 17, 23]
    assert windows(depth=4, global_blocks=2, window=8) == [8, 16, 8, 16]
    assert windows(depth=4, window=64) == [16] * 4
    with pytest.raises(ValueError, match=r"windows of 5 x 5 .* grid of 16 x 16: give --window 2 or 4 or 8 or 16$"):
        windows(window=5)
    for vit in (tiny_vit(img_size=56, patch_size=14), tiny_vit(img_size=36, patch_size=6),
                tiny_vit(img_size=24), tiny_vit(img_size=(32, 64))):
        with pytest.raises(ValueError, match="square patches of 4, 8, 12"):
            detect.ViTDet(vit, 8, 4, 1)


def test_layer_norm_over_channels():
    ours, theirs = detect.LayerNorm2d(6), LayerNorm2d(6, eps=1e-5)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 3, 5)
    torch.testing.assert_close(ours(x), theirs(x))


def test_pyramid_shapes_strides_and_anchors():
    model = tiny_detector()
    images = torch.randn(2, 3, 32, 32)
    maps = model.backbone(images)
    assert {name: tuple(value.shape) for name, value in maps.items()} == {
        "0": (2, 8, 32, 32), "1": (2, 8, 16, 16), "2": (2, 8, 8, 8), "3": (2, 8, 4, 4), "pool": (2, 8, 2, 2)}
    assert torch.equal(maps["pool"], maps["3"][:, :, ::2, ::2])
    anchors = model.rpn.anchor_generator(ImageList(images, [(32, 32)] * 2), list(maps.values()))[0]
    levels = anchors.split([3 * side**2 for side in (32, 16, 8, 4, 2)])
    for level, stride in zip(levels, (1, 2, 4, 8, 16)):
        squares = level[1::3]  # ratios 0.5, 1, 2
        assert (squares[1] - squares[0]).tolist() == [stride, 0, stride, 0]
        assert squares[0].tolist() == [-4 * stride, -4 * stride, 4 * stride, 4 * stride]


def test_pyramid_looks_where_it_should():
    """One token changed: what changes in each map lies around it, at the map's own stride."""
    pyramid, x = detect.Pyramid(16, 8).eval(), torch.randn(1, 16, 8, 8)
    y = x.clone()
    y[0, :, 5, 2] += 1
    for (name, before), after, stride in zip(pyramid(x).items(), pyramid(y).values(), (.25, .5, 1, 2)):
        rows, columns = ((before != after).any(dim=1)[0].any(dim=side).nonzero()[:, 0] for side in (1, 0))
        for found, place in ((rows, 5), (columns, 2)):  # the 3 x 3 convolution reaches one place further
            low, high = int(place / stride), int(-(-(place + 1) // stride))
            assert (found.min(), found.max() + 1) == (max(low - 1, 0), min(high + 1, 8 / stride)), name


def test_the_encoder_in_one_window_is_the_encoder():
    vit = tiny_vit(class_token=False).eval()
    body = detect.ViTDet(vit, 8, 8, 1)
    body.pyramid = nn.Identity()
    images = torch.randn(2, 3, 32, 32)
    expected = vit(images).transpose(1, 2).reshape(2, 16, 8, 8)
    torch.testing.assert_close(body(images), expected, rtol=0, atol=1e-5)
    with_token = tiny_vit(class_token=True).eval()  # it is dropped: the same features without it
    state = {**with_token.state_dict(), **{k: v for k, v in vit.state_dict().items() if k != "pos_embed"}}
    with_token.load_state_dict(state)
    body = detect.ViTDet(with_token, 8, 8, 1)
    body.pyramid = nn.Identity()
    torch.testing.assert_close(body(images), expected, rtol=0, atol=1e-5)


def test_roi_align_reads_the_map_that_fits_the_box():
    torch.manual_seed(0)
    features = {str(level): torch.randn(1, 3, 128 // 2**level, 128 // 2**level) for level in range(4)}
    corner, side = torch.rand(40, 2) * 250, torch.logspace(0.5, 2.4, 40)[:, None]
    boxes = [torch.cat([corner, corner + side], dim=1)]
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)(features, boxes, [(512, 512)])
    # The same, though the image fills only part of the square.
    ours = detect.roi_align(7, 16)(features, boxes, [(200, 512)])
    torch.testing.assert_close(ours, theirs)
    # For patches of 12 pixels: each map holds its stride and its columns' centres in pixels.
    maps = {}
    for level, stride in enumerate((3, 6, 12, 24)):
        side = 384 // stride
        columns = (torch.arange(side) + 0.5) * stride
        maps[str(level)] = torch.stack([columns.expand(side, -1), torch.full((side, side), float(stride))])[None]
    boxes = [torch.tensor([[60., 60, 60 + w, 60 + w] for w in (20, 83, 85, 167, 169, 300)])]
    pooled = detect.roi_align(7, 12)(maps, boxes, [(384, 384)]).mean(dim=(2, 3))
    assert pooled[:, 1].tolist() == [3, 3, 6, 6, 12, 12]
    # RoIAlign counts pixels from their corner here: half a stride, which torchvision's models share.
    torch.testing.assert_close(pooled[:, 0], boxes[0][:, [0, 2]].mean(1) + pooled[:, 1] / 2, rtol=0, atol=0.01)


@needs_coco
def test_detector_is_torchvisions_mask_rcnn(scenes):
    """Our forward, on padded squares, gives what torchvision's own gives for the images as they are."""
    model = tiny_detector()
    images = detect.CocoImages(scenes, "train")
    samples = [images[index] for index in range(3)]
    samples[1] = samples[1][0][:, :20], {**samples[1][1], "masks": samples[1][1]["masks"][:, :20]}
    samples[1][1]["boxes"][:, 1::2].clamp_(max=20)
    samples[1] = samples[1][0], {key: value[:2] if key in ("boxes", "labels", "masks") else value
                                 for key, value in samples[1][1].items()}
    model.transform = GeneralizedRCNNTransform(32, 32, common.IMAGENET_MEAN, common.IMAGENET_STD,
                                               size_divisible=32)
    floats = [image / 255 for image, _ in samples]
    squares = common.normalise(torch.stack([TF.pad(image, [0, 0, 0, 32 - image.shape[1]], detect.MEAN_COLOUR)
                                            for image, _ in samples]))
    squares[1, :, 20:] = 0  # torchvision pads after normalising
    targets = [dict(target, size=tuple(image.shape[1:]), original=tuple(image.shape[1:]))
               for image, target in samples]
    for target in targets:
        height = 32 - target["masks"].shape[1]
        target["masks"] = TF.pad(target["masks"], [0, 0, 0, height])
    model.eval()
    with torch.no_grad():
        ours, theirs = model(squares, targets), MaskRCNN.forward(model, floats)
    assert sum(len(one["boxes"]) for one in ours) > 0
    for one, other in zip(ours, theirs):
        for name in ("boxes", "labels", "scores", "masks"):
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-4)
    model.train()
    torch.manual_seed(1)
    ours = model(squares, targets)
    model.transform.torch_choice = lambda sizes: sizes[0]  # it draws a size from a list of one
    torch.manual_seed(1)
    theirs = MaskRCNN.forward(model, floats, [dict(target) for _, target in samples])
    assert set(ours) == {"objectness", "rpn_box_reg", "classifier", "box_reg", "mask"}
    for name, loss in ours.items():
        torch.testing.assert_close(loss, theirs[f"loss_{name}"], rtol=1e-4, atol=1e-5)


def test_detections_come_back_in_pixels_of_the_original(monkeypatch):
    model = tiny_detector().eval()
    found = dict(boxes=torch.tensor([[4.0, 2, 12, 10]]), labels=torch.tensor([1]), scores=torch.tensor([0.9]),
                 masks=torch.ones(1, 1, 28, 28))
    monkeypatch.setattr(model.roi_heads, "forward", lambda *given: ([found], {}))
    with torch.no_grad():
        out, = model(torch.zeros(1, 3, 32, 32), [dict(size=(24, 32), original=(48, 64))])
    assert out["boxes"].tolist() == [[8, 4, 24, 20]] and out["masks"].shape == (1, 1, 48, 64)
    inside = out["masks"][0, 0] > 0.5
    assert inside[5:19, 9:23].all() and inside.sum() <= 18 * 18


def batch(objects=True):
    image, target = planted(32, 32, (4, 4, 20, 16))
    if not objects:
        target = {name: value[:0] if isinstance(value, torch.Tensor) else value for name, value in target.items()}
    return detect.to_device(detect.collate([(image, dict(target, size=(32, 32)))] * 2), CPU)


@pytest.mark.parametrize("objects", [True, False])
def test_each_parameter_gets_a_gradient_with_and_without_objects(objects):
    """DDP waits for the gradient of each parameter that it knows."""
    model = tiny_detector().train()
    losses = model(*batch(objects))
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["backbone.vit.cls_token", "backbone.vit.pos_embed"]
    assert all(loss.isfinite() for loss in losses.values()) and (objects or losses["mask"] == 0)


def test_heads_compute_in_fp32_under_bf16():
    model, seen = tiny_detector().train(), {}
    model.rpn.register_forward_pre_hook(lambda module, given: seen.update(given[1]))
    model.roi_heads.box_head.register_forward_hook(lambda module, given, out: seen.update(head=out))
    model.backbone.pyramid.register_forward_hook(lambda module, given, out: seen.update(body=out["2"]))
    with common.autocast(CPU, "bf16"):
        attended = model.backbone.vit.blocks[0].attn(torch.randn(1, 4, 16))
        losses = model(*batch())
    assert attended.dtype == torch.bfloat16
    assert {value.dtype for name, value in seen.items() if name != "body"} == {torch.float32}
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


# -- the recipe


def test_learning_rate_is_the_authors():
    total, warm = 184_375, 250
    rates = {step: detect.learning_rate(step, 1e-4, warm, total)
             for step in (0, 125, 250, 163_888, 163_889, 177_545, 177_546, 184_374)}
    expected = [0, 5e-5, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6]
    assert list(rates.values()) == pytest.approx(expected)
    assert round(config().warmup_epochs * total / 100) == 258  # "about 250"


def test_layer_decay_and_weight_decay():
    vit = tiny_vit(depth=12)
    model = detect.Detector(vit, 3, config(global_blocks=4))
    groups = layer_groups(model, vit, 0.1, 0.75)
    assert len(groups) == 2 * 14
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
             for group in groups for parameter in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    assert set(found) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    scales = {name: scale for name, (scale, _) in found.items()}
    assert scales["backbone.vit.patch_embed.proj.weight"] == pytest.approx(0.75**13)
    assert scales["backbone.vit.blocks.0.norm1.weight"] == pytest.approx(0.75**12)
    assert scales["backbone.vit.blocks.11.mlp.fc2.bias"] == pytest.approx(0.75)
    assert {scales[name] for name in scales if not name.startswith("backbone.vit.")} == {1}
    assert scales["backbone.vit.norm.weight"] == 1
    for name, parameter in model.named_parameters():
        assert name not in found or (found[name][1] == 0.1) == (parameter.ndim > 1)


def test_the_recipe_is_the_authors():
    defaults = {field.name: field.default for field in dataclasses.fields(detect.Config)}
    recipe = dict(epochs=100, batch_size=64, lr=1e-4, weight_decay=0.1, layer_decay=0.75, drop_path=0.1,
                  img_size=1024)
    assert {name: defaults[name] for name in recipe} == recipe
    # And the windows tile the grid of the recipe.
    assert 1024 // 16 % defaults["window"] == 0


def test_cost_counts_what_a_step_computes():
    model = tiny_detector(rois=8)
    macs = lambda *sizes: int(np.prod(sizes))
    encoder = 64 * 48 * 16 + 2 * 64 * 16 * (3 * 16 + 16 + 8 * 16)  # embedding; qkv, projection, MLP
    attention = 4 * (16 * 16 * 16 * 2) + 64 * 64 * 16 * 2  # four windows of 16 tokens, then one of 64
    pyramid = (64 * 16 * 8 * 4 + 256 * 8 * 4 * 4 + 1024 * 4 * 8 + 1024 * 72 * 8  # stride 1
               + 64 * 16 * 8 * 4 + 256 * 8 * 8 + 256 * 72 * 8 + 64 * 16 * 8 + 64 * 72 * 8 + 16 * 16 * 8 + 16 * 72 * 8)
    places = 1024 + 256 + 64 + 16 + 4
    rpn = places * (2 * 72 * 8 + 8 * 15)
    box = 8 * (4 * 49 * 72 * 8 + 49 * 8 * 32)
    mask = 2 * (4 * 196 * 72 * 8 + 196 * 8 * 8 * 4 + 784 * 8 * 11)
    expected = 2 * sum(map(macs, (encoder, attention, pyramid, rpn, box, mask)))
    assert detect.count_flops(model, config()) == expected
    assert next(model.parameters()).device == CPU


# -- the command


def run(encoder, data, *more):
    return call("--checkpoint", encoder, "--data", data, *TINY, *more, main=detect.main)


@pytest.fixture(scope="module")
def unbroken(scenes, encoder, tmp_path_factory):
    """The folder of a run of 5 steps, and the line of its result."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    assert run(encoder, scenes, "--out", out, "--max_steps", 5) == 0
    return out, json.loads((encoder.parent / "eval.jsonl").read_text().splitlines()[-1])


@needs_coco
def test_a_run_writes_what_it_says(unbroken, scenes, encoder):
    out, record = unbroken
    log = read_log(out)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5]
    for line in log:
        parts = [line[name] for name in ("objectness", "rpn_box_reg", "classifier", "box_reg", "mask")]
        assert line["loss"] == pytest.approx(sum(parts), rel=1e-5)
    assert [line["lr"] for line in log] == pytest.approx([0, 1e-3, 1e-3, 1e-3, 1e-3])
    state = load(out)
    assert (state["kind"], state["method"], state["step"]) == ("detection", "detect", 5)
    assert state["classes"] == list(CLASSES) and state["encoder"]["img_size"] == [32, 32]
    assert [group["lr"] for group in state["optimizer"]["param_groups"]] == pytest.approx(
        [1e-3 * group["lr_scale"] for group in state["optimizer"]["param_groups"]])
    assert Image.open(out / "preview.png").size == (5 * 258 + 2, 2 * 258 + 2)
    assert record["kind"] == "detect" and record["checkpoint"] == str(encoder) and record["step"] == 5
    assert record["train_images"] == 8 and record["pycocotools"]
    assert record["val_images"] == 5 and not record["random_init"] and 0 <= record["box_ap"] <= 100


@needs_coco
def test_training_moves_the_encoder_and_the_heads(unbroken, scenes, encoder, tmp_path):
    before = common.read_safetensors(encoder)
    after = common.read_safetensors(unbroken[0] / "encoder.safetensors")
    same = [name for name in before if before[name].shape == after[name].shape
            and torch.equal(before[name], after[name])]
    assert same == ["cls_token"]  # and the position table was resized
    assert run(encoder, scenes, "--random_init", "--seed", 5, "--out", tmp_path / "r", "--max_steps", 1) == 0
    random = load(tmp_path / "r")["model"]["backbone.vit.blocks.0.attn.qkv.weight"]
    assert (random - before["blocks.0.attn.qkv.weight"]).abs().mean() > 0.05


@needs_coco
def test_each_micro_batch_draws_anew_and_gradients_are_clipped(scenes, encoder, tmp_path, monkeypatch):
    seeds, norms = [], []
    forward, update = detect.Detector.forward, common.Run.update

    def spy(self, images, targets):
        if self.training:
            seeds.append(torch.initial_seed())
        return forward(self, images, targets)

    def measured(self, optimizer, grad_norm):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append((float(grad_norm), float(nn.utils.get_total_norm(gradients))))
        update(self, optimizer, grad_norm)

    monkeypatch.setattr(detect.Detector, "forward", spy)
    monkeypatch.setattr(common.Run, "update", measured)
    given = ["--out", tmp_path / "run", "--micro_batch=2", "--clip_grad=0.5", "--max_steps=2"]
    assert run(encoder, scenes, *given) == 0
    assert seeds == [common.seed_for(0, "step", step, row) for step in range(2) for row in (0, 2)]
    assert all(before > 0.5 and after == pytest.approx(0.5, rel=1e-4) for before, after in norms)


@needs_coco
def test_a_stop_changes_nothing(unbroken, scenes, encoder, tmp_path):
    out = tmp_path / "run"
    assert run(encoder, scenes, "--out", out, "--max_steps", 2) == 0
    assert run(encoder, scenes, "--out", out, "--max_steps", 5) == 0
    assert_same_run(out, unbroken[0])
    assert (out / "preview.png").read_bytes() == (unbroken[0] / "preview.png").read_bytes()


@needs_coco
def test_eval_only_needs_last_pt_alone(unbroken, scenes, tmp_path, capsys):
    out, trained = unbroken
    shutil.copy(out / "last.pt", tmp_path)
    for given in (tmp_path, tmp_path / "last.pt"):
        assert call("--eval_only", "--checkpoint", given, "--data", scenes, "--workers", 0, "--micro_batch", 3,
                    main=detect.main) == 0
        record = json.loads((tmp_path / "eval.jsonl").read_text().splitlines()[-1])
        for name in ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"):
            assert record[name] == pytest.approx(trained[name], abs=1e-6)
        assert record["flags"]["window"] == 4 and record["step"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["detections.png", "eval.jsonl", "last.pt"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("detection: box AP ")


@needs_coco
def test_a_finished_run_says_so_and_a_dry_run_writes_nothing(unbroken, scenes, encoder, tmp_path, capsys):
    assert run(encoder, scenes, "--out", unbroken[0], "--max_steps", 5) == 0
    assert "is finished, step 5: --eval_only" in capsys.readouterr().out
    assert run(encoder, scenes, "--out", tmp_path / "x", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "GFLOP per image" in out and "8 images with objects of 10 classes" in out
    assert "attention in windows of 4 x 4 but for blocks 1\n" in out and not (tmp_path / "x").exists()
    assert run(encoder, scenes, "--out", unbroken[0], "--max_steps", 6, "--rois", 9) == 1
    assert "--rois was 8" in capsys.readouterr().err


@needs_coco
def test_tests_run_in_eval_mode_and_training_does_not(scenes):
    model = tiny_detector()
    images = detect.CocoImages(scenes, "val")
    model.backbone.vit.blocks[1].drop_path.rate = 0.9
    first, second = ([found["scores"] for _, found in detect.detect(model.train(), images, range(3), config(), CPU)]
                     for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@needs_coco
def test_an_image_may_have_any_aspect_and_no_object(tmp_path):
    path, content = write_set(tmp_path, "val")
    model = detect.Detector(tiny_vit(), 3, config())
    images = detect.CocoImages(tmp_path, "val")
    found = dict((target["image_id"], out) for target, out in
                 detect.detect(model, images, range(3), config(), CPU))
    assert set(found) == {0, 10, 20}
    for out in found.values():
        assert out["masks"].shape[2:] == (20, 30) and (out["boxes"][:, 2:] <= torch.tensor([30, 20])).all()
    detect.draw(tmp_path / "d.png", model, images, config(), CPU, count=3)
    assert Image.open(tmp_path / "d.png").size == (3 * 258 + 2, 2 * 258 + 2)


@needs_coco
def test_pictures_show_the_objects(scenes):
    images = detect.CocoImages(scenes, "val")
    image, target = images[0]
    plain = detect.panel(image, dict(labels=torch.tensor([])), None, CLASSES)
    assert torch.equal(plain, TF.resize(image, [256, 256], TF.InterpolationMode.NEAREST))
    drawn = detect.panel(image, target, target["masks"] > 0, CLASSES)
    changed = (drawn != plain).any(dim=0)
    mask = TF.resize(target["masks"], [256, 256], TF.InterpolationMode.NEAREST).any(dim=0)
    assert changed[mask].float().mean() > 0.95 and 0 < changed[~mask].float().mean() < 0.6
    x0, y0, x1, y1 = (target["boxes"][3] * 8).int().tolist()
    assert changed[y0 + 40: y1 - 2, x0].all() and changed[y1 - 1, x0 + 2: x1 - 2].all()
    dark = torch.zeros(3, 10, 20, dtype=torch.uint8)
    panel = detect.panel(dark, dict(labels=torch.tensor([])), None, CLASSES)
    assert panel.shape == (3, 256, 256) and (panel[:, :128] == 0).all() and (panel[:, 128:] == 255).all()


# -- bad input


def says(capsys, folder, *more, encoder="unused"):
    assert run(encoder, folder, "--out", folder / "run", *more) == 1
    error = capsys.readouterr().err.splitlines()
    assert not (folder / "run").exists()
    return error[-1]


@needs_coco
@pytest.mark.parametrize("change, expected", [
    (lambda c: c["annotations"][1].update(image_id=77), "annotation 1 belongs to image 77"),
    (lambda c: c["annotations"][3].update(category_id=91),
     "annotation 3 is of category 91, the 3 that the file lists run from 3 to 90"),
    (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "annotation 0 needs a bbox"),
    (lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 4]), "annotation 0 needs a bbox"),
    (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("nan")]), "annotation 0 needs a bbox"),
    (lambda c: c["annotations"][0].update(bbox=None), "cannot be used as COCO annotations"),
    (lambda c: c["annotations"][0].pop("segmentation"), "'segmentation' is missing"),
    (lambda c: c["annotations"][0].update(segmentation=[]), "annotation 0 needs a bbox"),
    (lambda c: c["annotations"][0].update(segmentation=[[1, 2]]), "a mask of 0.png in .* cannot be decoded"),
    (lambda c: c["annotations"][1]["segmentation"].update(size=[30, 20]), "0.png or one of its masks has not"),
    (lambda c: c.pop("categories"), "'categories' is missing"),
    (lambda c: c.update(annotations=[]), "lists no object"),
    (lambda c: c["images"][0].update(height=21), "0.png"),
    (lambda c: c["images"][0].pop("width"), "width"),
    (lambda c: c["images"][0].update(file_name="gone.png"), "gone.png cannot be read as an image")])
def test_wrong_annotations_are_one_sentence_with_the_file(tmp_path, capsys, encoder, change, expected):
    path, content = write_set(tmp_path)
    write_set(tmp_path, "val")
    change(content)
    path.write_text(json.dumps(content))
    error = says(capsys, tmp_path, encoder=encoder)
    assert ("instances_train2017.json" in error or "train2017/" in error) and re.search(expected, error), error


@needs_coco
def test_damaged_and_missing_files(tmp_path, capsys, encoder):
    path, content = write_set(tmp_path)
    write_set(tmp_path, "val")
    for damage in (path.read_bytes()[:-40], b"", b"[]", b"\xff\xfe\x00", b'{"images": 3}'):
        path.write_bytes(damage)
        assert f"{path} cannot be used as COCO annotations" in says(capsys, tmp_path, encoder=encoder)
    path.write_text(json.dumps(content))
    copy = path.with_name("instances_train2014.json")
    copy.write_bytes(path.read_bytes())
    assert "and 2 are there" in says(capsys, tmp_path, encoder=encoder)
    copy.unlink()
    (tmp_path / "train2017").rename(tmp_path / "elsewhere")
    assert "train2017/, which is not there" in says(capsys, tmp_path, encoder=encoder)
    (tmp_path / "elsewhere").rename(tmp_path / "train2017")
    write_set(tmp_path, "val", categories=((7, "b"), (3, "a"), (90, "d")))
    assert "c, d" in says(capsys, tmp_path, encoder=encoder)
    (tmp_path / "annotations" / "instances_val2017.json").unlink()
    assert "instances_val*.json is expected" in says(capsys, tmp_path, encoder=encoder)


def test_wrong_flags(tmp_path, capsys, encoder):
    def error(*argv):
        assert call(*argv, main=detect.main) == 1
        return capsys.readouterr().err

    assert "--checkpoint is missing" in error("--data", "x")
    assert "have no use here" in error("--checkpoint", "x", "--init", "y")
    assert "have no use here" in error("--checkpoint", "x", "--model", "vit_l")
    assert "--scale_min" in error("--checkpoint", "x", "--scale_min", 3)
    assert "--rois 0 must be at least 1" in error("--checkpoint", "x", "--rois", 0)


@needs_coco
def test_eval_only_refuses_what_is_no_detector(unbroken, scenes, encoder, tmp_path, capsys):
    def error(*argv):
        assert call("--eval_only", "--data", scenes, *argv, main=detect.main) == 1
        return capsys.readouterr().err

    assert "no checkpoint file at" in error("--checkpoint", tmp_path)
    torch.save(dict(kind="pretraining"), tmp_path / "last.pt")
    assert "holds no detector" in error("--checkpoint", tmp_path)
    write_set(tmp_path, "val")
    assert "3 classes of" in error("--checkpoint", unbroken[0], "--data", tmp_path)


def test_without_pycocotools_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert call("--checkpoint", "x", "--data", "x", main=detect.main) == 1
    error = capsys.readouterr().err
    assert error.splitlines() == [error.strip()] and "pip install pycocotools" in error


# -- several processes, signals


@pytest.mark.slow
@needs_coco
def test_two_processes_are_one(scenes, encoder, tmp_path):
    """The draws belong to rows of the global batch: 2 processes x 1 micro batch is 1 process x 2."""
    given = ["--checkpoint", encoder, "--data", scenes, *TINY, "--drop_path=0", "--max_steps", 3]
    code, out, err = finish(start(*given, "--out", tmp_path / "two", script=["-m", "eval.detect"], processes=2), 300)
    assert code == 0, err
    two = json.loads((encoder.parent / "eval.jsonl").read_text().splitlines()[-1])
    assert call(*given, "--out", tmp_path / "one", "--micro_batch", 2, main=detect.main) == 0
    one = json.loads((encoder.parent / "eval.jsonl").read_text().splitlines()[-1])
    assert one["box_ap"] == pytest.approx(two["box_ap"], abs=0.5)
    for a, b in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert out.count("loaded ") == 1 and out.count("detection: ") == 1


@pytest.mark.slow
@needs_coco
def test_a_signal_saves_and_the_same_command_goes_on(scenes, encoder, tmp_path, unbroken):
    given = ["--checkpoint", encoder, "--data", scenes, *TINY, "--out", tmp_path / "run", "--save_every", 100]
    process = start(*given, script=["-m", "eval.detect"])
    while not (tmp_path / "run" / "log.jsonl").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, out, _ = finish(process, 300)
    assert code == 128 + signal.SIGTERM and "the same command goes on" in out
    step = load(tmp_path / "run")["step"]
    if step < 5:
        assert call(*given, "--max_steps", 5, main=detect.main) == 0
        assert differences(load(tmp_path / "run")["model"], load(unbroken[0])["model"]) == []


@pytest.mark.slow
@needs_coco
def test_eight_images_are_learnt(scenes, encoder, tmp_path):
    given = ["--checkpoint", encoder, "--data", scenes, *TINY, "--out", tmp_path / "run", "--channels=32"]
    assert call(*given, "--epochs=120", "--rois=32", "--lr=2e-3", "--scale_min=1", "--scale_max=1", "--drop_path=0",
                "--log_every=20", main=detect.main) == 0
    log = read_log(tmp_path / "run")
    assert log[-1]["loss"] < 0.4 * log[0]["loss"]
