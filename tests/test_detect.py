"""eval/detect.py: AP against hand-made boxes, parts against torchvision, whole runs on a tiny COCO set."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.swin_transformer import shifted_window_attention
from torchvision.ops import MultiScaleRoIAlign, masks_to_boxes
from torchvision.transforms.v2 import functional as TF

import common
from demo.scenes import CLASSES, SEEDS, make_scenes, run_lengths, write_coco
from eval import detect
from eval.encoders import export
from eval.protocol import MEAN_COLOUR
from helpers import call, load, read_log, sentence
from test_segment import save

coco_mask = pytest.importorskip("pycocotools.mask")  # our extra `det`
ONE = common.Dist(0, 1, torch.device("cpu"))
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
# 8 x 8 patches of 4 pixels in windows of 4; a step of 4 images takes some 0.2 s.
TINY = ("--img_size=32 --window=4 --global_blocks=1 --channels=8 --rois=8 --batch_size=4 --epochs=20 "
        "--lr=1e-3 --warmup_epochs=0.5 --drop_path=0.2 --scale_min=0.8 --scale_max=1.25 --workers=0 "
        "--device=cpu --compile=off --log_every=1").split()


def config(**changes):
    tiny = dict(checkpoint="x", img_size=32, window=4, global_blocks=1, channels=8, rois=8, workers=0)
    return detect.Config(**{**tiny, **changes})


def tiny_vit(**changes):
    torch.manual_seed(0)
    return common.ViT(**{**dict(img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2, mean=MEAN, std=STD),
                         **changes})


def tiny_detector(classes=10):
    return detect.Detector(tiny_vit(), classes, config())


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


def write_set(folder, split="train", change=None):
    """Three images of 20 x 30: one with a polygon, a run-length mask and a crowd, one empty, one more.
    `change` is made to the annotations before they are written. Gives the `CocoImages`, or its error."""
    path, pictures = folder / "annotations" / f"instances_{split}2017.json", folder / f"{split}2017"
    path.parent.mkdir(exist_ok=True)
    for n, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (3, 20, 30, 3), dtype=np.uint8)):
        if not (pictures / f"{n}.png").exists():
            save(pictures / f"{n}.png", pixels)
    runs = dict(size=[20, 30], counts=run_lengths(rectangle(20, 30, 5, 6, 10, 4)))
    annotations = [
        dict(image_id=0, category_id=90, bbox=[2, 3, 8, 10], iscrowd=0, segmentation=[[2, 3, 10, 3, 10, 13, 2, 13]]),
        dict(image_id=0, category_id=3, bbox=[5, 6, 10, 4], iscrowd=0, area=40, segmentation=runs),
        dict(image_id=0, category_id=3, bbox=[0, 0, 30, 20], iscrowd=1, area=600, segmentation=runs),
        dict(image_id=20, category_id=7, bbox=[5, 6, 10, 4], segmentation=runs)]
    content = dict(annotations=[dict(one, id=number) for number, one in enumerate(annotations)],
                   categories=[dict(id=7, name="b"), dict(id=3, name="a"), dict(id=90, name="c")],
                   images=[dict(id=10 * n, file_name=f"{n}.png", height=20, width=30) for n in range(3)])
    if change:
        change(content)
    path.write_text(json.dumps(content))
    return detect.CocoImages(folder, split)


def truth(*boxes, crowd=()):
    """One image of 200 x 200 with an object of category 5 in each box, as `CocoImages.truth` has it."""
    annotations = [dict(result(box, 1), id=number, area=box[2] * box[3], iscrowd=int(box in crowd))
                   for number, box in enumerate(boxes, start=1)]
    return dict(images=[dict(id=1, height=200, width=200)], annotations=annotations, categories=[dict(id=5, name="x")])


def result(box, score, mask=None):
    pixels = rectangle(200, 200, *(mask or box)).byte().numpy()
    return dict(image_id=1, category_id=5, bbox=list(box), score=score,
                segmentation=coco_mask.encode(np.asfortranarray(pixels)))


A, B, LOW = (10, 10, 100, 100), (120, 120, 50, 50), (10, 10, 100, 62)


@pytest.mark.parametrize("boxes, crowd, results, expected", [
    # Recall ends at 1/2: of the 101 places on the recall axis, those from 0 to 0.5 have precision 1.
    ([A, B], [], [(A, .9)], (5100 / 101,) * 6),
    ([A], [], [(B, .9), (A, .8)], (50,) * 6),  # a false one first: precision 1/2 at each recall
    ([A, B], [B], [(B, .9), (A, .8)], (100,) * 6),  # one of a crowd costs nothing
    ([A], [], [(A, .9, LOW)], (100, 100, 100, 30, 100, 0)),  # a mask of IoU 0.62: right for three thresholds of ten
    ([A, B], [], [], (0,) * 6)])
def test_ap_of_hand_made_boxes_and_masks(capsys, boxes, crowd, results, expected):
    ap = detect.coco_ap(truth(*boxes, crowd=crowd), [result(*one) for one in results])
    assert [*ap] == ["box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"]
    assert [*ap.values()] == pytest.approx(expected, abs=1e-6) and capsys.readouterr().out == ""


def perfect(model, images, indices, config, dist):
    """In place of `detect`: the truth with masks of 0.7 in 0..1, and a wrong guess that is less sure."""
    for index in indices[dist.rank:: dist.world]:
        target = images[index][1]
        n, masks = len(target["labels"]), target["masks"][:, None]
        yield target, dict(
            boxes=torch.cat([target["boxes"], torch.tensor([[0.0, 0, 2, 2]])]),
            labels=torch.cat([target["labels"], torch.tensor([1])]), scores=torch.tensor([0.7] * n + [0.2]),
            masks=torch.cat([0.7 * masks + 0.3 * (1 - masks), torch.zeros(1, *masks.shape[1:])]))


def test_what_is_true_scores_100_in_one_and_in_two_processes(tmp_path, scenes, monkeypatch):
    """The whole way from a target to the AP, with ids of categories that have gaps."""
    seen = []
    monkeypatch.setattr(detect, "detect", perfect)
    for images in (write_set(tmp_path, "val"), detect.CocoImages(scenes, "val")):
        ap = detect.evaluate(None, images, config(), ONE)
        assert ap["box_ap"] == pytest.approx(100) and ap["mask_ap"] == pytest.approx(100)

    def gather(parts, mine):
        other = perfect(None, images, range(5), None, common.Dist(1, 2, ONE.device))
        parts[:] = mine, [one for seen in other for one in detect.coco_results(*seen, images.category_ids)]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    first, other = (detect.evaluate(None, images, config(), common.Dist(rank, 2, ONE.device)) for rank in (0, 1))
    assert first["box_ap"] == pytest.approx(100) and other is None
    # Pictures show what is surely detected, beside the truth.
    monkeypatch.setattr(detect, "panel", lambda image, found, *_: seen.append(found["labels"].tolist()) or image)
    detect.draw(tmp_path / "p.png", None, images, config(), ONE.device)
    assert seen[::2] == seen[1::2] != []


def test_masks_in_all_three_codes():
    mask = rectangle(20, 30, 5, 6, 10, 4)
    runs = dict(size=[20, 30], counts=run_lengths(mask))
    packed = coco_mask.encode(np.asfortranarray(mask.byte()))
    polygons = [[5, 6, 11, 6, 11, 10, 5, 10], [11, 6, 15, 6, 15, 10, 11, 10]]  # an object in two pieces
    for one in (runs, packed, dict(packed, counts=packed["counts"].decode()), polygons):
        assert (detect.decode_mask(one, 20, 30) == mask.numpy()).all()
    assert run_lengths(torch.tensor([[1, 0, 0], [1, 0, 1]])) == [0, 2, 3, 1]  # as COCO has it: by columns
    assert detect.unpacked(PACKED) == RUNS
    for seed in range(30):
        mask = torch.rand(23, 31, generator=torch.Generator().manual_seed(seed)) < (seed + 1) / 31
        mask[:, seed:] = seed % 2  # a long run
        packed = coco_mask.encode(np.asfortranarray(mask.byte()))
        assert detect.unpacked(packed["counts"].decode()) == run_lengths(mask)


def test_a_coco_set_is_read(tmp_path):
    train, val = (write_set(tmp_path, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (2, 3)  # without objects: in tests alone
    assert train.classes == ("a", "b", "c") and train.category_ids == [3, 7, 90]
    image, target = train[0]
    assert torch.equal(image, common.read_image(tmp_path / "train2017" / "0.png"))
    assert target["boxes"].tolist() == [[2, 3, 10, 13], [5, 6, 15, 10]]  # and not the crowd
    assert target["labels"].tolist() == [3, 1] and target["image_id"] == 0
    expected = [rectangle(20, 30, 2, 3, 8, 10), rectangle(20, 30, 5, 6, 10, 4)]
    assert torch.equal(target["masks"], torch.stack(expected).byte())
    other, empty = train[1][1], val[1][1]
    assert other["image_id"] == 20 and other["labels"].tolist() == [2]
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 20, 30)
    assert [one["id"] for one in val.truth["annotations"]] == [1, 2, 3, 4]
    assert val.truth["annotations"][3]["area"] == 40 and val.truth["annotations"][3]["iscrowd"] == 0


def test_scenes_in_cocos_format(scenes):
    images, drawn = detect.CocoImages(scenes, "val"), make_scenes(20, 16, SEEDS["val"])
    image, target = images[3]
    for quarter, (y, x) in enumerate(((0, 0), (0, 16), (16, 0), (16, 16))):
        scene = 12 + quarter
        assert torch.equal(image[:, y: y + 16, x: x + 16], drawn.images[scene])
        assert target["labels"][quarter] == drawn.labels[scene] + 1
        assert torch.equal(target["boxes"][quarter], drawn.boxes[scene] + torch.tensor([x, y, x, y]))
        mask = TF.pad((drawn.maps[scene: scene + 1] >= 2).byte(), [x, y, 16 - x, 16 - y])[0]
        assert torch.equal(target["masks"][quarter], mask)
        assert images.truth["annotations"][scene]["area"] == mask.sum()


@pytest.mark.parametrize("change, expected", [
    (lambda c: c["annotations"][1].update(image_id=77), "annotation 1 is no object"),
    (lambda c: c["annotations"][3].update(category_id=91), "annotation 3 is no object"),
    (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("nan")]), "annotation 0 is no object"),
    (lambda c: c["annotations"][0].pop("bbox"), "annotation 0 is no object"),
    (lambda c: c["annotations"][0].update(area="10"), "annotation 0 is no object"),
    (lambda c: c["annotations"][0].update(iscrowd="0"), "annotation 0 is no object"),
    (lambda c: c["images"][0].pop("width"), "0.png has the height 20 and the width None"),
    (lambda c: c["images"][0].update(height=20.5), "0.png has the height 20.5 and the width 30"),
    (lambda c: c["images"][1].update(id=0), "several images have the id 0"),
    (lambda c: c["images"][1].update(id="5"), "the id of some images is a number, of others a text"),
    (lambda c: c["images"][1].update(file_name="2.png"), "several images have the file_name '2.png'"),
    (lambda c: c["categories"][1].update(id=7), "several categories have the id 7"),
    (lambda c: c.pop("images"), "cannot be used as COCO annotations: KeyError.'images'"),
    (lambda c: c.update(annotations=[]), "cannot be used as COCO annotations: there is no object in it"),
    (lambda c: c["images"][1].update(file_name="gone.png"), "gone.png: of the 3 images .* 1 are not there")])
def test_wrong_annotations_are_one_sentence_with_the_file(tmp_path, change, expected):
    with pytest.raises((ValueError, FileNotFoundError), match=expected) as error:
        write_set(tmp_path, change=change)
    assert "train2017" in str(error)


POLYGON, NAN, INF = [2, 3, 10, 3, 10, 13, 2, 13], float("nan"), float("inf")
RUNS, PACKED = [106, 4, 490], "Z34Z?"  # in 20 x 30 pixels


@pytest.mark.parametrize("number", [1, 2])  # of an object, and of a crowd
@pytest.mark.parametrize("code", [
    None, "", 3, [], [[]], [[], [1, 2]], [[1, 2, 5, 9]], POLYGON, [POLYGON, None], [[POLYGON] * 6], [[*"123456"]],
    [[1, 2, 3, 4, 5, NAN]], [POLYGON, [1, 2, INF, 4, 5, 6]], [[1, 2, 1e12, 4, 5, 6]], {}, dict(size=[20, 30]),
    [dict(size=[20, 30], counts=RUNS)], dict(counts=RUNS), *(dict(size=[20, 30], counts=counts) for counts in (
        None, [], [599], [601], [700, -100], [300, 300.0], "", "0", "Z34", "Z34Z", "Z34Z?0", "Z34Z?o", "Z34Z? ", "é")),
    *(dict(size=[30, 20], counts=counts) for counts in (RUNS, PACKED))])
def test_what_is_no_mask_is_named(tmp_path, number, code):
    with pytest.raises(ValueError, match=f"train2017.json.* annotation {number} of 0.png has no mask of 20 x 30 pix"):
        write_set(tmp_path, change=lambda content: content["annotations"][number].update(segmentation=code))


def test_of_an_object_in_parts_the_good_ones_are_kept(tmp_path, monkeypatch):
    """Ids that are strings and no iscrowd or area are no fault; what COCOeval reads is cleaned too."""
    images = write_set(tmp_path, "val", lambda content: content.update(
        annotations=[dict(image_id="x", category_id="k", bbox=[2, 3, 8, 10], iscrowd=None, area=None, ignore=0,
                          segmentation=[[], POLYGON + [7], [1, 1, 30, 20], [4, 4], [4]])],
        categories=[dict(id="k", name="k")],
        images=[dict(image, id=name) for image, name in zip(content["images"], "xyz")]))
    assert torch.equal(images[0][1]["masks"][0], rectangle(20, 30, 2, 3, 8, 10).byte())
    assert images.truth["annotations"][0]["segmentation"] == [POLYGON]
    monkeypatch.setattr(detect, "detect", perfect)
    assert detect.evaluate(None, images, config(), ONE)["mask_ap"] == pytest.approx(100)


def test_photos_are_turned_as_their_height_and_width_say(tmp_path):
    """All ways to turn one are in tests/test_segment.py."""
    shown = np.random.default_rng(1).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    photo = save(tmp_path / "train2017" / "0.png", shown, turn=6)
    images = write_set(tmp_path)
    assert torch.equal(images[0][0], torch.from_numpy(shown).movedim(2, 0))
    save(photo, shown[:19])
    with pytest.raises(ValueError, match="0.png has 19 x 30 pixels, its entry in .*json 20 x 30"):
        images[0]


def planted(height=40, width=60, box=(20, 10, 24, 16)):
    """A black image with a white rectangle, which is the object."""
    mask, (x, y, w, h) = rectangle(height, width, *box), box
    target = dict(image_id=3, boxes=torch.tensor([[x, y, x + w, y + h]]).float(), labels=torch.tensor([4]),
                  masks=mask.byte()[None])
    return (255 * mask).byte().expand(3, -1, -1).contiguous(), target


def jitters(count, low, high, image, target):
    for seed in range(count):
        torch.manual_seed(seed)
        yield detect.jitter(config(img_size=64, scale_min=low, scale_max=high), image, target)


def around(masks):
    """The box of what is left of an object; its last pixel is inclusive."""
    return (masks_to_boxes(masks)[0] + torch.tensor([0, 0, 1, 1])).tolist()


@pytest.mark.parametrize("low, high", [(0.3, 0.9), (1.5, 2.5)])
def test_jitter_moves_image_box_and_mask_alike(low, high):
    widths, sides, cut, gone = [], set(), 0, 0
    for out, new in jitters(60, low, high, *planted(box=(4, 4, 24, 16))):
        white, mask = (out > 200).all(dim=0), new["masks"].any(dim=0)
        assert out.shape == (3, 64, 64) and out.dtype == torch.uint8 and new["size"] == (64, 64)
        assert (white != mask).sum() <= mask.sum() * 0.25 + 8  # they differ at the edge at most
        assert len(new["boxes"]) == len(new["masks"]) == len(new["labels"])
        if not len(new["boxes"]):
            gone += 1
            continue
        x0, y0, x1, y1 = box = new["boxes"][0].tolist()
        assert box == pytest.approx(around(new["masks"]), abs=1.01)
        if min(x0, y0) == 0 or max(x1, y1) == 64:
            cut += abs((x1 - x0) / (y1 - y0) - 1.5) > 0.1
        else:
            widths.append((x1 - x0) / 24 / (64 / 60))
            padding = (out == torch.tensor(MEAN_COLOUR)[:, None, None]).all(dim=0)
            assert high > 1 or padding.float().mean() > 1 - high**2 * 2 / 3 - 0.05
            sides.add(bool(padding[:, 0].all()))
    assert low - 0.06 <= min(widths) and max(widths) <= high + 0.06 and max(widths) - min(widths) > 0.15
    assert (cut > 5 and gone > 0) if low > 1 else (cut == gone == 0 and len(sides) == 2)


def test_jitter_flips_and_boxes_of_cut_objects_are_tight():
    boxes, heights = [], set()
    for out, new in jitters(40, 1, 1, *planted(64, 64, (0, 8, 20, 16))):
        boxes.append(tuple(new["boxes"][0].tolist()))
        assert torch.equal(out[0] > 0, new["masks"][0] > 0)
    assert set(boxes) == {(0, 8, 20, 24), (44, 8, 64, 24)} and 8 < boxes.count((0, 8, 20, 24)) < 32
    # An L whose long arm is cut away: the box of what is left is the box of its stem.
    mask = rectangle(64, 128, 4, 4, 8, 40) | rectangle(64, 128, 4, 36, 100, 8)
    target = planted()[1] | dict(boxes=torch.tensor([[4.0, 4, 104, 44]]), masks=mask.byte()[None])
    for _, new in jitters(40, 2, 2, mask.byte().expand(3, -1, -1), target):  # half of the width is seen
        if new["masks"].any():
            assert new["boxes"][0].tolist() == around(new["masks"])
            heights.add(new["boxes"][0, 3].item() - new["boxes"][0, 1].item())
    assert heights == {8.0, 40.0}


def test_the_view_of_tests_keeps_the_aspect_and_pads_below_and_right():
    image, target = planted()
    (out,), (about,) = detect.whole(90, [(image, target)])
    assert about == dict(image_id=3, size=(60, 90), original=(40, 60))
    assert torch.equal(out[:, :60], TF.resize(image, [60, 90], detect.BICUBIC))
    assert common.normalise(out[None])[:, :, 60:].abs().max() < 0.01  # the mean colour
    assert detect.whole(30, [(image.transpose(1, 2), target)])[1][0]["size"] == (30, 20)


def test_windows_are_torchvisions_and_drop_path_drops_whole_samples():
    block, x = tiny_vit().blocks[0], torch.randn(2, 64, 16)
    nn.init.normal_(block.attn.qkv.bias)
    expected = x + shifted_window_attention(
        block.norm1(x).reshape(2, 8, 8, 16), block.attn.qkv.weight, block.attn.proj.weight,
        torch.zeros(1, 2, 16, 16), window_size=[4, 4], num_heads=2, shift_size=[0, 0],
        qkv_bias=block.attn.qkv.bias, proj_bias=block.attn.proj.bias).flatten(1, 2)
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(detect.windowed(block, x, (8, 8), 4), expected, rtol=0, atol=1e-5)
    block, x = tiny_vit(drop_path_rate=0.5).blocks[1].train(), torch.randn(40, 64, 16)
    changed = (detect.windowed(block, x, (8, 8), 4) != x).any(dim=2)  # (B, N)
    assert torch.equal(changed.all(dim=1), changed.any(dim=1))
    assert 2 <= (~changed.any(dim=1)).sum() <= 20  # about a quarter keeps neither branch


def test_blocks_that_see_everything():
    def windows(depth=12, window=4, global_blocks=4):
        return detect.ViTDet(tiny_vit(img_size=64, depth=depth), 8, window, global_blocks).windows

    assert [index for index, window in enumerate(windows()) if window == 16] == [2, 5, 8, 11]
    assert [index for index, window in enumerate(windows(depth=24)) if window == 16] == [5, 11, 17, 23]
    assert windows(4, 8, global_blocks=2) == [8, 16, 8, 16] and windows(4, window=64) == [16] * 4
    for window, vit in ((5, tiny_vit(img_size=64)), (4, tiny_vit(img_size=56, patch_size=14)),
                        (4, tiny_vit(img_size=24)), (4, tiny_vit(img_size=(32, 64)))):
        with pytest.raises(ValueError, match="squares of 4, 8, 12"):
            detect.ViTDet(vit, 8, window, 1)


def test_pyramid_shapes_strides_and_anchors():
    model, images = tiny_detector(), torch.randn(2, 3, 32, 32)
    maps = model.backbone(images)
    sides = {"0": 32, "1": 16, "2": 8, "3": 4, "pool": 2}
    assert {name: x.shape for name, x in maps.items()} == {name: (2, 8, S, S) for name, S in sides.items()}
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


@pytest.mark.parametrize("class_token", [False, True])
def test_the_encoder_in_one_window_is_the_encoder_without_a_class_token(class_token):
    vit, images = tiny_vit(class_token=False, init_values=0.3).eval(), torch.randn(2, 3, 32, 32)
    expected = vit(images).transpose(1, 2).reshape(2, 16, 8, 8)
    same = tiny_vit(class_token=class_token, init_values=0.3).eval()
    same.load_state_dict({name: p for name, p in vit.state_dict().items() if name != "pos_embed"}, strict=False)
    body = detect.ViTDet(same, 8, 8, 1)
    body.pyramid = nn.Identity()
    torch.testing.assert_close(body(images), expected, rtol=0, atol=1e-5)


def test_roi_align_reads_the_map_that_fits_the_box():
    torch.manual_seed(0)
    features = {str(level): torch.randn(1, 3, 128 // 2**level, 128 // 2**level) for level in range(4)}
    corner, side = torch.rand(40, 2) * 250, torch.logspace(0.5, 2.4, 40)[:, None]
    boxes = [torch.cat([corner, corner + side], dim=1)]
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)(features, boxes, [(512, 512)])
    # The same, though the image fills only part of the square.
    torch.testing.assert_close(detect.roi_align(7, 16)(features, boxes, [(200, 512)]), theirs)
    # For patches of 12 pixels: each map holds its stride and its columns' centres in pixels.
    maps = {}
    for level, stride in enumerate((3, 6, 12, 24)):
        columns = ((torch.arange(384 // stride) + 0.5) * stride).expand(384 // stride, -1)
        maps[str(level)] = torch.stack([columns, torch.full_like(columns, stride)])[None]
    boxes = [torch.tensor([[60., 60, 60 + w, 60 + w] for w in (20, 83, 85, 167, 169, 300)])]
    pooled = detect.roi_align(7, 12)(maps, boxes, [(384, 384)]).mean(dim=(2, 3))
    assert pooled[:, 1].tolist() == [3, 3, 6, 6, 12, 12]
    # RoIAlign counts pixels from their corner here: half a stride, which torchvision's models share.
    centres = boxes[0][:, [0, 2]].mean(1) + pooled[:, 1] / 2
    torch.testing.assert_close(pooled[:, 0], centres, rtol=0, atol=0.01)


def test_detector_is_torchvisions_mask_rcnn(scenes):
    """Our forward, on padded squares, gives what torchvision's own gives for the images as they are."""
    model, images = tiny_detector(), detect.CocoImages(scenes, "train")
    samples = [images[index] for index in range(3)]
    image, target = samples[1]  # now of 20 x 32 pixels, with the two objects of its upper half
    target.update(boxes=target["boxes"][:2].clamp(max=torch.tensor([32, 20, 32, 20])),
                  labels=target["labels"][:2], masks=target["masks"][:2, :20])
    samples[1] = image[:, :20], target
    model.transform = GeneralizedRCNNTransform(32, 32, common.IMAGENET_MEAN, common.IMAGENET_STD, size_divisible=32)
    floats = [image / 255 for image, _ in samples]
    squares = common.normalise(torch.stack([
        TF.pad(image, [0, 0, 0, 32 - image.shape[1]], MEAN_COLOUR) for image, _ in samples]))
    squares[1, :, 20:] = 0  # torchvision pads after normalising
    targets = [dict(target, size=image.shape[1:], original=image.shape[1:],
                    masks=TF.pad(target["masks"], [0, 0, 0, 32 - image.shape[1]])) for image, target in samples]
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
    found = dict(boxes=torch.tensor([[4.0, 2, 12, 10]]), labels=torch.tensor([1]),
                 scores=torch.tensor([0.9]), masks=torch.ones(1, 1, 28, 28))
    monkeypatch.setattr(model.roi_heads, "forward", lambda *given: ([found], {}))
    with torch.no_grad():
        out, = model(torch.zeros(1, 3, 32, 32), [dict(size=(24, 32), original=(48, 64))])
    assert out["boxes"].tolist() == [[8, 4, 24, 20]] and out["masks"].shape == (1, 1, 48, 64)
    inside = out["masks"][0, 0] > 0.5
    assert inside[5:19, 9:23].all() and inside.sum() <= 18 * 18


def batch(objects=True):
    image, target = planted(32, 32, (4, 4, 20, 16))
    if not objects:
        target = {name: value[:0] if torch.is_tensor(value) else value for name, value in target.items()}
    return common.normalise(torch.stack([image] * 2)), [dict(target, size=(32, 32))] * 2


@pytest.mark.parametrize("objects", [True, False])
def test_each_parameter_gets_a_gradient_with_and_without_objects(objects):
    """DDP waits for the gradient of each parameter that it knows."""
    model = tiny_detector().train()
    losses = model(*batch(objects))
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.requires_grad == (not name.endswith(("cls_token", "pos_embed"))), name
    assert all(loss.isfinite() for loss in losses.values()) and (objects or losses["mask"] == 0)


def test_heads_compute_in_fp32_under_bf16():
    model, seen = tiny_detector().train(), {}
    model.rpn.register_forward_pre_hook(lambda module, given: seen.update(given[1]))
    model.roi_heads.box_head.register_forward_hook(lambda module, given, out: seen.update(head=out))
    with common.autocast(ONE.device, "bf16"):
        attended = model.backbone.vit.blocks[0].attn(torch.randn(1, 4, 16))
        losses = model(*batch())
    assert attended.dtype == torch.bfloat16 and {value.dtype for value in seen.values()} == {torch.float32}
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


def test_the_recipe_is_the_authors():
    recipe = dict(epochs=100, batch_size=64, lr=1e-4, weight_decay=0.1, layer_decay=0.75, drop_path=0.1, img_size=1024)
    defaults = vars(detect.Config(checkpoint="x"))
    assert {name: defaults[name] for name in recipe} == recipe
    rates = [detect.learning_rate(step, 1e-4, 250, 184_375)
             for step in (0, 125, 250, 163_888, 163_889, 177_545, 177_546, 184_374)]
    assert rates == pytest.approx([0, 5e-5, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6])


def run(encoder, data, *more):
    return call("--checkpoint", encoder, "--data", data, *TINY, *more, main=detect.main)


@pytest.fixture(scope="module")
def trained(scenes, encoder, tmp_path_factory):
    """The folder of a run of 5 steps, and the line of its result."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert run(encoder, scenes, "--out", out, "--max_steps", 5) == 0
    return out, json.loads((encoder.parent / "eval.jsonl").read_text().splitlines()[-1])


def test_a_run_writes_what_it_says_and_moves_the_encoder(trained, encoder):
    out, record = trained
    log, state = read_log(out), load(out)
    parts = "objectness", "rpn_box_reg", "classifier", "box_reg", "mask"
    assert all(line["loss"] == pytest.approx(sum(line[part] for part in parts), rel=1e-5) for line in log)
    assert [line["lr"] for line in log] == pytest.approx([0, 1e-3, 1e-3, 1e-3, 1e-3])
    assert (state["kind"], state["method"], state["step"]) == ("detection", "detect", 5)
    assert state["classes"] == list(CLASSES) and state["encoder"]["img_size"] == [32, 32]
    assert Image.open(out / "preview.png").size == (5 * 262 + 6, 2 * 262 + 6 + 36)
    assert (record["kind"], record["checkpoint"], record["step"]) == ("detect", str(encoder), 5)
    assert (record["train_images"], record["val_images"], record["random_init"]) == (8, 5, False)
    before, after = load_file(encoder), load_file(out / "encoder.safetensors")
    assert [name for name in before if before[name].shape == after[name].shape
            and torch.equal(before[name], after[name])] == ["cls_token"]  # the position table was resized


def test_flags_reach_the_training(scenes, encoder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(detect, "fit", lambda *given: seen.append(given) or [])
    monkeypatch.setattr(detect, "report", lambda *given, **facts: None)
    given = ["--out", tmp_path / "run", "--random_init", "--seed=5", "--max_steps=1", "--clip_grad=0.7"]
    assert run(encoder, scenes, *given) == 0
    *_, model, optimizer, compute_loss, rate, clip_grad = seen[0]
    assert clip_grad == 0.7 and [rate(step) for step in (0, 1)] == pytest.approx([0, 1e-3])
    assert {group["lr_scale"] for group in optimizer.param_groups} == {0.75**power for power in range(4)}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0, 0.1}
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    assert trained == {p for p in model.parameters() if p.requires_grad}
    assert [block.drop_path.rate for block in model.encoder.blocks] == pytest.approx([0, 0.2])
    torch.manual_seed(5)
    assert torch.equal(common.ViT(**model.encoder.config).cls_token, model.encoder.cls_token.detach())
    pixels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 16, 256)
    compute_loss(lambda inputs, targets: seen.append(inputs) or dict(loss=inputs.mean()), (pixels, []))
    for channel, mean, std in zip(seen[1][0], MEAN, STD):
        torch.testing.assert_close(channel[0], (torch.arange(256) / 255 - mean) / std)


def test_a_file_without_the_final_norm_gets_one_that_trains(scenes, tmp_path):
    state = tiny_vit().state_dict()
    torch.save({"fc_" * name.startswith("norm.") + name: value for name, value in state.items()}, tmp_path / "t.pth")
    assert run(tmp_path / "t.pth", scenes, "--num_heads=2", "--max_steps=2", "--out", tmp_path / "run") == 0
    norm = load_file(tmp_path / "run/encoder.safetensors")["norm.weight"]
    assert 0 < (norm - 1).abs().max() < 0.1


@pytest.mark.parametrize("size", [(1, 12000), (12000, 1)])
def test_thin_images_are_jittered_and_detected(size):
    images = [planted(*size, box=(0, 0, *size[::-1]))]
    for image, target in jitters(5, 0.1, 2, *images[0]):
        assert image.shape == (3, 64, 64) and target["masks"].shape[1:] == (64, 64)
    (target, found), = detect.detect(tiny_detector(3), images, [0], config(), ONE)
    assert target["original"] == size and found["masks"].shape[2:] == size


def test_eval_only_needs_last_pt_alone(trained, scenes, tmp_path, capsys):
    out, record = trained
    (tmp_path / "last.pt").write_bytes((out / "last.pt").read_bytes())
    given = ["--eval_only", "--checkpoint", tmp_path, "--workers", 0, "--micro_batch", 3, "--data"]
    assert call(*given, scenes, main=detect.main) == 0
    again = json.loads((tmp_path / "eval.jsonl").read_text())
    ap, expected = ({name: line[name] for name in line if "_ap" in name} for line in (again, record))
    assert len(ap) == 6 and ap == pytest.approx(expected, abs=1e-6)
    assert again["flags"]["window"] == 4 and again["step"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["detections.png", "eval.jsonl", "last.pt"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("detection: box AP ")
    write_set(tmp_path, "val")
    assert call(*given, tmp_path, main=detect.main) == 1
    assert "the 3 classes of" in capsys.readouterr().err


def test_a_dry_run_writes_nothing_and_pycocotools_is_asked_for(scenes, encoder, tmp_path, capsys, monkeypatch):
    assert run(encoder, scenes, "--out", tmp_path / "x", "--dry_run") == 0 and not (tmp_path / "x").exists()
    assert "GFLOP per image" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert run("x", "x", "--out", tmp_path / "x") == 1
    assert sentence(capsys.readouterr().err).endswith("pip install pycocotools")


def test_detection_is_in_eval_mode_on_any_aspect_of_its_share(tmp_path):
    model, images = tiny_detector(3), write_set(tmp_path, "val")
    model.backbone.vit.blocks[1].drop_path.rate = 0.9
    first, second = ([*detect.detect(model.train(), images, range(3), config(), ONE)] for _ in range(2))
    assert [target["image_id"] for target, _ in first] == [0, 10, 20]
    for (_, found), (_, again) in zip(first, second):
        assert torch.equal(found["scores"], again["scores"]) and found["masks"].shape[2:] == (20, 30)
        assert (found["boxes"][:, 2:] <= torch.tensor([30, 20])).all()
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    share = detect.detect(model, images, range(3), config(), common.Dist(1, 2, ONE.device))
    assert [target["image_id"] for target, _ in share] == [10]
    pixels = detect.whole(32, [images[1]])[0] / 255
    torch.testing.assert_close(seen[0], (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])
