"""Detection and instance masks: Mask R-CNN on any encoder, fine-tuned whole, measured as COCO AP.

    python -m eval.detect --checkpoint runs/cae_v2_vit_b --data COCO
    python -m eval.detect --checkpoint runs/detect --eval_only --data COCO
    python -m demo.scenes runs/coco_scenes;  python -m eval.detect --demo --checkpoint runs/cae_v2_demo

The same command resumes; the run's folder is runs/detect. Needs pycocotools (our extra `det`). COCO is a
folder with annotations/instances_{train,val}*.json and the images in train*/ and val*/. Photos are turned
upright, unless their height and width there fit only the stored one.

    image (B, 3, S, S) -- ViT, in most blocks attention within windows -- (B, D, S/P, S/P)
      -- simple feature pyramid: strides P/4, P/2, P, 2P, 4P, each of C channels
      -- RPN: proposals -- box head: class and box -- mask head: 28 x 28 pixels -- five losses, summed

Sources: [F] ViTDet-B as an author of the MFM line of papers ran it; [code] heads of CAE's detector (with
FPN and 12 epochs: do not compare the numbers). Where [F] is silent, we decided:
  [D1] Pyramid: the last map alone, made finer by transposed convolutions and coarser by pooling, then a
       1 x 1 and a 3 x 3 convolution with LayerNorm over channels. Heads are torchvision's, with the sizes
       of [code] and LayerNorm, and an RPN of 2 convolutions. Anchors are 8 strides wide.
  [D2] Windows tile the grid, so nothing is padded or masked: 16 x 16 patches in COCO's grid of 64 x 64.
  [D3] The class token is dropped; the position table is resized (bicubic) and fixed; the final norm stays.
  [D4] Warm-up of 0.14 epochs (about 250 steps), gradient norm clipped at 1.
  [D5] Jitter: 0.1 to 2 times the size that fits, then a random square of it, padded in the mean colour, and
       flip. An object that is cut gets the box of the mask that is left. A test pads below and to the right
       to a square whose side is the long one's. Crowds are no targets; training needs images with objects.
  [D6] bf16 in encoder and pyramid alone: boxes coded in it could not tell pixel 1001 from pixel 1003.
  [D7] Anchors and proposals are drawn by the seed of the micro batch, so a stop changes nothing (but a GPU
       adds up RoIAlign's gradient in no fixed order). The mask loss is a mean over a micro batch's objects.
Dimension key: B batch, S input side, P patch side, N patches, D width, C channels, n objects, h x w map."""

import collections
import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import json
import re
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision import tv_tensors
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign, box_convert, masks_to_boxes
from torchvision.ops.poolers import LevelMapper
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

if not __package__:  # started by its file name, Python does not find common.py
    raise SystemExit("error: start it in the folder of common.py as `python -m eval.detect`")
import common
from common import flag
from eval.protocol import (
    MEAN_COLOUR, EvalConfig, append_result, check_classes, fit, layer_groups, look_through, normalise,
    open_checkpoint, open_run, random_encoder, read_annotated, set_drop_path, share_loader)

BICUBIC, NEAREST = TF.InterpolationMode.BICUBIC, TF.InterpolationMode.NEAREST
DEMO = dict(
    data="runs/coco_scenes", img_size=64, window=8, global_blocks=2, channels=32, rois=32, batch_size=8,
    epochs=5, lr=1e-3, warmup_epochs=0.5, drop_path=0.0, scale_min=0.8, scale_max=1.25, workers=0)


@dataclasses.dataclass(frozen=True)
class Config(EvalConfig, common.TrainConfig):
    """The whole command line; flags that are not here come from these two classes."""
    data: str = flag("data/coco", "folder in COCO's layout")
    random_init: bool = flag(False, "random weights in the same encoder: the baseline")
    eval_only: bool = flag(False, "measure the detector of the run --checkpoint, under its own recipe")
    demo: bool = flag(False, "a small recipe for the 64-pixel images of demo/scenes.py")
    dry_run: bool = flag(False, "print the recipe and its cost")
    epochs: int = flag(100, "passes over the data [F]", positive=True)
    batch_size: int = flag(64, "images per step over all processes [F]", positive=True)
    lr: float = flag(1e-4, "peak learning rate [F]", positive=True)
    warmup_epochs: float = flag(0.14, "epochs of linear warm-up from 0 [D4]")
    weight_decay: float = flag(0.1, "AdamW, not on vectors [F]")
    layer_decay: float = flag(0.75, "lr of a block in units of the next one's [F]", positive=True)
    drop_path: float = flag(0.1, "stochastic depth of the last block, rising linearly to it [F]")
    clip_grad: float = flag(1.0, "largest global L2 norm of the gradient [D4]", positive=True)
    img_size: int = flag(1024, "side of the square input [F]", positive=True)
    scale_min: float = flag(0.1, "smallest scale of the jitter [D5]", positive=True)
    scale_max: float = flag(2.0, "largest scale of the jitter [D5]", positive=True)
    window: int = flag(16, "patches on the side of an attention window [D2]", positive=True)
    global_blocks: int = flag(4, "evenly spaced blocks that attend to all patches [D1]", positive=True)
    channels: int = flag(256, "channels of pyramid and heads [D1]", positive=True)
    rois: int = flag(512, "the box head's proposals per image, a quarter of the RPN's [D1]", positive=True)

    def __post_init__(self):
        super().__post_init__()
        if self.scale_min > self.scale_max or self.drop_path >= 1:
            raise ValueError("--scale_min is at most --scale_max, and --drop_path below 1")


def coco_tools():
    """(COCO, COCOeval, mask functions) of pycocotools, which nothing else needs."""
    try:
        from pycocotools import coco, cocoeval, mask
    except ImportError as error:
        raise ValueError("detection needs pycocotools: pip install pycocotools") from error
    return coco.COCO, cocoeval.COCOeval, mask


# ---- data ------------------------------------------------------------------------------------------------
def decode_mask(code, height, width):
    """COCO's polygons, or run lengths plain or compressed, as (h, w) uint8 of 0 and 1."""
    mask = coco_tools()[2]
    if isinstance(code, list) or isinstance(code["counts"], list):
        code = mask.frPyObjects(code, height, width)
    return mask.decode(mask.merge(code) if isinstance(code, list) else code)


def unpacked(text):
    """The run lengths in COCO's compressed text: 5 bits a character, the low ones first, then a sign; from
    the fourth on, differences to the last but one. Empty for any other text."""
    counts, words = [], re.findall("[P-o]*[0-O]", text)
    for word in words:
        value = sum((ord(sign) - 48 & 31) << 5 * place for place, sign in enumerate(word))
        value -= (word[-1] >= "@") << 5 * len(word)
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts if "".join(words) == text else []


def clean_mask(code, height, width):
    """COCO's code of a mask without the polygons of fewer than 3 points, which pycocotools refuses or, of
    4 numbers, takes for a box. None for what is no mask of height x width pixels."""
    with contextlib.suppress(TypeError, ValueError, KeyError):
        if isinstance(code, list):
            code = [polygon[: len(polygon) // 2 * 2] for polygon in code if len(polygon) >= 6]
            points = [np.abs(polygon) for polygon in code]
            return code if all(p.ndim == 1 and (p < 1e6).all() for p in points) and code else None
        counts = unpacked(code["counts"]) if isinstance(code["counts"], str) else code["counts"]
        if code["size"] == [height, width] and sum(counts) == height * width:
            return code if all(type(count) is int and count >= 0 for count in counts) else None


class CocoImages(torch.utils.data.Dataset):
    """The split "train" or "val" of a COCO set: `[index]` is (image (3, h, w) uint8, target).
    target: image_id, boxes (n, 4) float32 as x0 y0 x1 y1 in pixels, labels (n,) int64 from 1 (0 is the
    background) in the order of the category ids, masks (n, h, w) uint8. Errors name file and entry."""

    def __init__(self, root, split):
        found = sorted(Path(root).expanduser().glob(f"annotations/instances_{split}*.json"))
        if len(found) != 1:
            raise FileNotFoundError(f"{root}: {len(found)} files annotations/instances_{split}*.json")
        path = found[0]
        self.name, self.folder = str(path), path.parents[1] / path.stem.removeprefix("instances_")
        try:
            self.index(json.loads(path.read_bytes()), split)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            why = error if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"{path} cannot be used as COCO annotations: {why}") from error

    def index(self, content, split):
        """Checks the whole content of an annotation file and makes a record per image."""
        for part, key in (("categories", "id"), ("images", "id"), ("images", "file_name")):
            counts = collections.Counter(one[key] for one in content[part])
            if len(counts) < len(content[part]):
                raise ValueError(f"several {part} have the {key} {counts.most_common(1)[0][0]!r}")
            if len({*map(type, counts)}) > 1:  # COCOeval sorts them
                raise ValueError(f"the {key} of some {part} is a number, of others a text")
        names = {category["id"]: category["name"] for category in content["categories"]}
        self.category_ids = sorted(names)
        self.classes = tuple(names[category_id] for category_id in self.category_ids)
        for image in content["images"]:
            height, width = sides = image.get("height"), image.get("width")
            if not all(type(side) is int and side > 0 for side in sides):
                raise ValueError(f"{image['file_name']} has the height {height!r} and the width {width!r}: "
                                 "numbers of pixels are expected")
        lost = [name for name in counts if not (self.folder / str(name)).is_file()]
        if lost:
            raise FileNotFoundError(f"no file {self.folder}/{lost[0]}: of the {len(counts)} images that "
                                    f"{self.name} lists, {len(lost)} are not there")
        images = {image["id"]: image for image in content["images"]}
        objects = {image_id: [] for image_id in images}
        for number, one in enumerate(content["annotations"], start=1):
            name, code, crowd = one.get("id", number), one.get("segmentation"), one.get("iscrowd") or 0
            try:
                image, box = images[one["image_id"]], one["bbox"]
                label = 1 + self.category_ids.index(one["category_id"])
                area = one.get("area") or box[2] * box[3]
                good = len(box) == 4 and np.isfinite([*box, area]).all() and min(box[2:]) >= 0
            except (ValueError, TypeError, LookupError):
                good = False
            if not good or crowd not in (0, 1):
                raise ValueError(f"annotation {name} is no object: image and category of the file, bbox, "
                                 f"area, and iscrowd 0 or 1 are expected, not {str(one)[:200]}")
            height, width = image["height"], image["width"]
            mask = clean_mask(code, height, width)
            if mask is None:
                raise ValueError(
                    f"annotation {name} of {image['file_name']} has no mask of {height} x {width} pixels: "
                    f"polygons of 3 points and more, or run lengths, are expected, not {str(code)[:80]}")
            # COCOeval takes the number 0 for "not found".
            one.update(id=number, iscrowd=crowd, area=area, segmentation=mask)
            if not crowd:
                objects[one["image_id"]].append((box, label, mask))
        if not any(objects.values()):
            raise ValueError("there is no object in it")
        # Bytes in one tensor: each worker would copy Python objects.
        records = [json.dumps([image["id"], image["file_name"], image["height"], image["width"],
                               objects[image["id"]]]).encode()
                   for image in content["images"] if split == "val" or objects[image["id"]]]
        self.records = torch.frombuffer(bytearray(b"".join(records)), dtype=torch.uint8)
        self.ends = torch.tensor([0] + [len(record) for record in records]).cumsum(0)
        self.truth = content if split == "val" else None

    def __len__(self):
        return len(self.ends) - 1

    def fingerprint(self):  # as of `common.Images`: of the entries of all images
        return hashlib.blake2b(self.records.numpy(), digest_size=16).hexdigest()

    def __getitem__(self, index):
        record = self.records[self.ends[index]: self.ends[index + 1]].numpy().tobytes()
        image_id, file_name, height, width, objects = json.loads(record)
        image = read_annotated(self.folder / file_name, (height, width), f"its entry in {self.name}")
        try:
            masks = [decode_mask(code, height, width) for _, _, code in objects]
        except Exception as error:  # whatever C and numpy raise
            raise ValueError(f"a mask of {file_name} in {self.name} cannot be decoded: {error}") from error
        boxes = torch.tensor([box for box, _, _ in objects]).float().reshape(-1, 4)  # (n, 4)
        return image, dict(
            image_id=image_id, boxes=box_convert(boxes, "xywh", "xyxy"),
            labels=torch.tensor([label for _, label, _ in objects], dtype=torch.int64),
            masks=torch.from_numpy(np.array(masks, dtype=np.uint8).reshape(-1, height, width)))


def jitter(config, image, target):
    """Large-scale jitter to a square (3, S, S), and flip [D5]."""
    size, (h, w) = (config.img_size, config.img_size), image.shape[1:]
    scale = config.scale_min + torch.rand(1) * (config.scale_max - config.scale_min)
    scale = scale * min(size[0] / h, size[0] / w)
    transform = v2.Compose([
        v2.Resize([max(1, int(side * scale)) for side in (h, w)], BICUBIC),  # ScaleJitter would give 0 rows
        v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Image: MEAN_COLOUR, "others": 0}),
        v2.RandomHorizontalFlip()])
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[1:],
                                     clamping_mode=None)  # what lies outside shows who was cut
    moved = transform(tv_tensors.Image(image), boxes, tv_tensors.Mask(target["masks"]))
    image, boxes, masks = (tensor.as_subclass(torch.Tensor) for tensor in moved)
    inside = boxes.clamp(0, size[0])  # (n, 4)
    keep = (masks > 0).flatten(1).any(dim=1) & (inside[:, 2:] - inside[:, :2] >= 1).all(dim=1)  # (n,)
    inside, boxes, masks, labels = inside[keep], boxes[keep], masks[keep], target["labels"][keep]
    tight = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])  # its last pixel is inclusive
    boxes = torch.where((inside != boxes).any(dim=1, keepdim=True), tight, inside)
    return image, dict(size=size, boxes=boxes, labels=labels, masks=masks)


def whole(S, samples):
    """Samples of `CocoImages` as a batch to test: the long side is S, padded to a square [D5]."""
    batch = []
    for image, target in samples:
        original = tuple(image.shape[1:])
        h, w = (max(1, round(side * S / max(original))) for side in original)
        image = TF.pad(TF.resize(image, [h, w], BICUBIC), [0, 0, S - w, S - h], MEAN_COLOUR)  # (3, S, S)
        batch.append((image, dict(image_id=target["image_id"], size=(h, w), original=original)))
    return collate(batch)


def collate(samples):
    """Samples as images (B, 3, S, S) uint8 and a list of targets."""
    images, targets = zip(*samples)
    return torch.stack(images), list(targets)


# ---- model -----------------------------------------------------------------------------------------------
def windowed(block, x, grid, window):
    """A ViT block on the tokens x (B, N, D) of a `grid` with attention inside windows of window^2 patches.
    Drop path, applied outside the windows, still drops whole samples."""
    h, w = (side // window for side in grid)
    tiles = rearrange(block.norm1(x), "b (h p w q) d -> (b h w) (p q) d", h=h, w=w, p=window, q=window)
    seen = rearrange(block.attn(tiles), "(b h w) (p q) d -> b (h p w q) d", h=h, w=w, p=window)  # (B, N, D)
    x = x + block.drop_path(block.ls1(seen))
    return x + block.drop_path(block.ls2(block.mlp(block.norm2(x))))


class Pyramid(nn.Module):
    """Simple feature pyramid [D1]: a map (B, D, h, w) to five, (B, C, 4h, 4w) and, by halves, smaller."""

    def __init__(self, dim, channels):
        super().__init__()

        def double(width):
            return nn.ConvTranspose2d(width, width // 2, 2, stride=2)

        def smooth(width):
            return [nn.Conv2d(width, channels, 1, bias=False), LayerNorm2d(channels),
                    nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels)]

        finest = [double(dim), LayerNorm2d(dim // 2), nn.GELU(), double(dim // 2)]
        self.levels = nn.ModuleList(nn.Sequential(*layers) for layers in (
            [*finest, *smooth(dim // 4)], [double(dim), *smooth(dim // 2)], smooth(dim),
            [nn.MaxPool2d(2), *smooth(dim)]))

    def forward(self, x):
        maps = {str(index): level(x) for index, level in enumerate(self.levels)}
        return {**maps, "pool": F.max_pool2d(maps["3"], 1, stride=2)}


class ViTDet(nn.Module):
    """Images (B, 3, S, S) to the maps of `Pyramid`. Raises ValueError for a grid that it cannot work on."""

    def __init__(self, vit, channels, window, global_blocks):
        super().__init__()
        (side, width), (P, Q), depth = vit.grid, vit.patch_size, len(vit.blocks)
        if (side, P) != (width, Q) or P % 4 or side % 4 or side % min(window, side):
            raise ValueError("patches must be squares of 4, 8, 12 ... pixels, in a square grid that 4 and "
                             f"--window {window} divide; they are {P} x {Q}, and the grid {side} x {width}")
        last = {round((number + 1) * depth / global_blocks) - 1 for number in range(global_blocks)}
        self.windows = [side if index in last else min(window, side) for index in range(depth)]
        self.vit, self.pyramid = vit, Pyramid(vit.config["embed_dim"], channels)
        self.out_channels = channels  # torchvision asks for it
        if vit.cls_token is not None:
            vit.cls_token.requires_grad_(False)  # it leads nowhere [D3]

    def forward(self, images):
        h, w = self.vit.grid
        x = self.vit.embed(images)[:, -h * w:]  # (B, N, D)
        for block, window in zip(self.vit.blocks, self.windows):
            x = windowed(block, x, (h, w), window)
        return self.pyramid(rearrange(self.vit.norm(x), "b (h w) d -> b d h w", h=h))


def roi_align(output_size, patch):
    """RoIAlign on the pyramid's first four maps: a box of 14 x 14 patches reads the map of stride P, for
    P = 16 torchvision's own rule. It would guess the strides from the size of the images before padding."""
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size, sampling_ratio=2)
    pool.scales = [4 / patch, 2 / patch, 1 / patch, 0.5 / patch]
    pool.map_levels = LevelMapper(0, 3, canonical_scale=14 * patch, canonical_level=2)
    return pool


class Detector(MaskRCNN):
    """torchvision's Mask R-CNN on `ViTDet`, for images that are squares already; `encoder` is the ViT."""

    def __init__(self, vit, num_classes, config):
        C, P, K, rois = config.channels, vit.patch_size[0], 1 + num_classes, config.rois
        body = ViTDet(vit, C, config.window, config.global_blocks)
        anchors = AnchorGenerator(tuple((2 * P * 2**level,) for level in range(5)), ((0.5, 1.0, 2.0),) * 5)
        super().__init__(
            body, rpn_anchor_generator=anchors, rpn_head=RPNHead(C, 3, conv_depth=2),
            rpn_pre_nms_top_n_train=4 * rois, rpn_post_nms_top_n_train=4 * rois,
            rpn_pre_nms_top_n_test=2 * rois, rpn_post_nms_top_n_test=2 * rois,
            box_roi_pool=roi_align(7, P), box_predictor=FastRCNNPredictor(4 * C, K),
            box_head=FastRCNNConvFCHead((C, 7, 7), [C] * 4, [4 * C], LayerNorm2d),
            box_batch_size_per_image=rois, box_detections_per_img=min(100, rois),
            mask_roi_pool=roi_align(14, P), mask_head=MaskRCNNHeads(C, [C] * 4, 1, LayerNorm2d),
            mask_predictor=MaskRCNNPredictor(C, C, K))

    @property
    def encoder(self):
        return self.backbone.vit

    def forward(self, images, targets):
        """Normalised images (B, 3, S, S) and targets to losses by name in training; in tests to boxes
        (n, 4), labels, scores (n,), masks (n, 1, h, w) in 0..1, in pixels of each original image."""
        features, sizes = self.backbone(images), [target["size"] for target in targets]
        known = targets if self.training else None
        with torch.autocast(images.device.type, enabled=False):  # [D6]
            features = {name: value.float() for name, value in features.items()}
            proposals, losses = self.rpn(ImageList(images, sizes), features, known)
            detections, more = self.roi_heads(features, proposals, sizes, known)
        if self.training:
            return {name.removeprefix("loss_"): loss for name, loss in {**losses, **more}.items()}
        return self.transform.postprocess(detections, sizes, [target["original"] for target in targets])


# ---- test ------------------------------------------------------------------------------------------------
@torch.no_grad()
def detect(model, images, indices, config, dist):
    """Yields (target, what was detected, on the CPU) for this process's share of the images `indices`."""
    model.eval()
    chosen, view = torch.utils.data.Subset(images, indices), functools.partial(whole, config.img_size)
    for inputs, targets in share_loader(chosen, config.micro_batch or 8, config, dist, view):
        with common.autocast(dist.device, config.precision):
            detections = model(normalise(inputs, model.encoder, dist.device), targets)
        for target, found in zip(targets, detections):
            yield target, {name: value.cpu() for name, value in found.items()}


def coco_results(target, found, category_ids):
    """What was detected in one image as COCO's list of results."""
    pixels = rearrange(found["masks"] > 0.5, "n 1 h w -> h w n").byte().numpy()
    codes = coco_tools()[2].encode(np.asfortranarray(pixels))
    boxes = box_convert(found["boxes"], "xyxy", "xywh").tolist()
    return [dict(image_id=target["image_id"], category_id=category_ids[label - 1], bbox=box, score=score,
                 segmentation=code) for label, box, score, code
            in zip(found["labels"].tolist(), boxes, found["scores"].tolist(), codes)]


def coco_ap(truth, results):
    """COCO's AP, AP50 and AP75 in per cent, of boxes and of masks, from annotations and results."""
    COCO, COCOeval, _ = coco_tools()
    names = [f"{kind}_{measure}" for kind in ("box", "mask") for measure in ("ap", "ap50", "ap75")]
    if not results:  # pycocotools takes no empty list
        return dict.fromkeys(names, 0.0)
    values = []
    with contextlib.redirect_stdout(io.StringIO()):  # it prints tables
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        found = coco.loadRes(results)
        for kind in ("bbox", "segm"):
            evaluation = COCOeval(coco, found, kind)
            evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
            values += [100 * float(value) for value in evaluation.stats[:3]]
    return dict(zip(names, values))


def evaluate(model, images, config, dist):
    """`coco_ap` of a whole set in the main process, None in the others; each detects in its share."""
    results = [result for target, found in detect(model, images, range(len(images)), config, dist)
               for result in coco_results(target, found, images.category_ids)]
    if dist.world > 1:
        gathered = [None] * dist.world
        torch.distributed.all_gather_object(gathered, results)
        results = sum(gathered, [])
    return coco_ap(images.truth, results) if dist.is_main else None


def draw(path, model, images, config, device, count=6):
    """Draws images from all over the set: the truth above, detections of score 0.25 and more below."""
    chosen = range(0, len(images), max(1, len(images) // count))[:count]
    config, alone = dataclasses.replace(config, workers=0), common.Dist(0, 1, device)
    above, below = [], []
    for index, (_, found) in zip(chosen, detect(model, images, chosen, config, alone)):
        image, truth = images[index]
        sure = {name: value[found["scores"] >= 0.25] for name, value in found.items()}
        above.append(panel(image, truth, truth["masks"] > 0, images.classes))
        below.append(panel(image, sure, sure["masks"][:, 0] > 0.5, images.classes))
    common.save_panels(path, [above, below], [""] * len(chosen), "truth above, detections below", 256)


def panel(image, objects, masks, classes, side=256):
    """An image (3, h, w) uint8 with its objects drawn on it, as (3, side, side) in 0..1."""
    scale = side / max(image.shape[1:])
    size = [max(1, round(length * scale)) for length in image.shape[1:]]
    canvas, labels = TF.resize(image, size, NEAREST if scale > 1 else BICUBIC), objects["labels"].tolist()
    if labels:
        colours = [f"hsv({137.5 * label % 360}, 80%, 100%)" for label in labels]
        words = [classes[label - 1] for label in labels]
        canvas = draw_segmentation_masks(canvas, TF.resize(masks, size, NEAREST), 0.4, colours)
        canvas = draw_bounding_boxes(canvas, objects["boxes"] * scale, words, colours, width=2)
    return TF.pad(canvas, [0, 0, side - size[1], side - size[0]], 255) / 255


def report(config, model, val, dist, path, started, step, **facts):
    """Evaluates, appends the result and `facts` to eval.jsonl beside the checkpoint `path`, prints it."""
    ap = evaluate(model, val, config, dist)
    if dist.is_main:
        append_result("detect", path, model.encoder, config, started, protocol="Mask R-CNN, ViTDet",
                      data=config.data, val=val.name, val_images=len(val), classes=len(val.classes),
                      step=step, random_init=config.random_init, **ap, **facts,
                      device=str(dist.device), pycocotools=version("pycocotools"))
        print(f"detection: box AP {ap['box_ap']:.1f}, AP50 {ap['box_ap50']:.1f}, AP75 {ap['box_ap75']:.1f}"
              f"; mask AP {ap['mask_ap']:.1f}, AP50 {ap['mask_ap50']:.1f}, AP75 {ap['mask_ap75']:.1f}")


# ---- train -----------------------------------------------------------------------------------------------
def learning_rate(step, peak, warmup_steps, total_steps):
    """Linear from 0 to `peak`, a tenth of it after 8/9 and a hundredth after 26/27 of the run [F]."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * 0.1 ** ((step >= round(total_steps * 8 / 9)) + (step >= round(total_steps * 26 / 27)))


def train(config, run, dist, started):
    """Fine-tuning from start to end, then the evaluation."""
    path, vit = open_checkpoint(config, own_norm=True)  # a new one trains along
    images, val = CocoImages(config.data, "train"), CocoImages(config.data, "val")
    check_classes(images, val)
    plan = common.make_plan(len(images), config.batch_size, config.micro_batch, config.epochs, dist.world)
    torch.manual_seed(config.seed)
    vit = random_encoder(vit, config.seed) if config.random_init else vit
    set_drop_path(vit.blocks, config.drop_path)
    model = Detector(vit, len(images.classes), config).to(dist.device)
    meta, shape = copy.deepcopy(model.backbone).to("meta"), (1, 3, config.img_size, config.img_size)
    flops = common.count_flops(lambda: meta(torch.empty(shape, device="meta")))
    facts = dict(
        model=f"Mask R-CNN on {'random weights' if config.random_init else path}",
        lr=f"{config.lr:g} after {config.warmup_epochs:g} epochs, x {config.layer_decay:g} per block down",
        cost=f"{flops / 1e9:,.1f} GFLOP per image, forward, in encoder and pyramid")
    sets = f"{len(images):,} images with objects of {len(images.classes)} classes, {len(val):,} to test"
    common.describe(facts, config, model, plan, dist, sets, run.folder)
    if config.dry_run:
        return
    if common.compiles(config, dist.device):
        model.backbone.compile()  # whole, as `windowed` does not call the blocks
    groups = layer_groups(model, vit, config.weight_decay, config.layer_decay)
    optimizer = torch.optim.AdamW(groups, config.lr, fused=True)
    samples = common.Samples(images, functools.partial(jitter, config), config.seed)
    if not run.start:  # raises now, not after days
        look_through(val, "test images", config, dist)
    run.begin(dist, plan, samples, model, optimizer, collate)
    warmup_steps = round(config.warmup_epochs * plan.steps_per_epoch)

    def compute_loss(model, batch):
        inputs = normalise(batch[0], vit, dist.device)
        targets = [{name: x.to(dist.device) if torch.is_tensor(x) else x for name, x in target.items()}
                   for target in batch[1]]
        with common.autocast(dist.device, config.precision):
            parts = model(inputs, targets)  # draws anchors and proposals [D7]
        return sum(parts.values()), parts

    for step, lr, grad_norm in fit(
            config, run, dist, plan, model, optimizer, compute_loss,
            lambda step: learning_rate(step, config.lr, warmup_steps, plan.total_steps), config.clip_grad):
        if run.log(step, lr, grad_norm) and dist.is_main:
            # The last two are what --eval_only needs to build the detector again.
            run.save(model, optimizer, step, vit, encoder=vit.config, classes=list(images.classes))
            run.draw(lambda path: draw(path, model, val, config, dist.device))
    report(config, model, val, dist, path, started, run.stop, train=images.name, train_images=len(images))


def evaluate_only(config, dist, started):
    """--eval_only: the detector of a run, under the recipe in its last.pt, on the val images of --data."""
    state, path = open_run(config.checkpoint, "detection")
    own = common.MAY_CHANGE | {"checkpoint", "data", "eval_only", "precision", "compile"}
    kept = {field.name for field in dataclasses.fields(Config)} & state["config"].keys() - own
    config = dataclasses.replace(config, **{name: state["config"][name] for name in kept})
    val = CocoImages(config.data, "val")
    check_classes(val, common.Images([], classes=state["classes"], name=str(path)))
    model = Detector(common.ViT(**state["encoder"]), len(val.classes), config).to(dist.device)
    model.load_state_dict(state["model"])
    if dist.is_main:
        draw(path.with_name("detections.png"), model, val, config, dist.device)
    report(config, model, val, dist, path, started, state["step"])


def main(argv=None):
    config, started = common.parse_config(Config, __doc__, demo=DEMO, argv=argv), time.perf_counter()
    coco_tools()  # raises now, not after the training
    with common.distributed(config.device) as dist:
        if config.eval_only:
            return evaluate_only(config, dist, started)
        run = common.Run("detect", config, config.out or "runs/detect", "detection")
        if not run.finished:
            return train(config, run, dist, started)
        if dist.is_main:
            print(f"the run in {run.folder}/ is finished, step {run.start}: --eval_only --checkpoint "
                  f"{run.checkpoint} measures it again, --fresh starts anew")


if __name__ == "__main__":
    common.run_main(main)
