"""Detection and instance masks: Mask R-CNN on any encoder, fine-tuned whole, measured as COCO AP.

    python -m eval.detect --checkpoint runs/cae_v2_vit_b --data COCO
    torchrun --nproc_per_node=8 -m eval.detect --checkpoint mae_pretrain_vit_base.pth --data COCO
    python -m eval.detect --checkpoint runs/detect/last.pt --eval_only --data COCO
    python -m demo.scenes runs/coco_scenes;  python -m eval.detect --demo --checkpoint runs/cae_v2_demo

The same command again resumes. COCO is a folder with annotations/instances_{train,val}*.json and the images
in train*/ and val*/. `--random_init` is the floor: random weights in the same encoder, trained alike. last.pt
of a run is all that `--eval_only` needs. Needs pycocotools (extra `det`).

    image (B, 3, S, S) -- ViT, in most blocks attention within windows -- (B, D, S/P, S/P)
      -- simple feature pyramid: strides P/4, P/2, P, 2P, 4P, each of C channels
      -- RPN: proposals -- box head: class and box -- mask head: 28 x 28 pixels -- five losses, summed

Recipe: [F] is ViTDet-B as an author of the MFM line of papers ran it. CAE's numbers are of another framework
(FPN on four taps, multi-scale training, 12 epochs; box head of 4 conv + 1 fc, mask head of 4 conv [code]): do
not compare across the two. [F] does not say what is inside a ViTDet; where it is silent, we decided:
  [D1] Pyramid: the last map alone, made finer by transposed convolutions and coarser by pooling, then a 1 x 1
       and a 3 x 3 convolution with LayerNorm over channels. Heads are torchvision's, with the sizes of [code]
       and LayerNorm, and an RPN of 2 convolutions. Anchors are 8 strides wide.
  [D2] Windows tile the grid, so nothing is padded or masked: 16 x 16 patches in COCO's grid of 64 x 64.
  [D3] The class token is dropped; the position table is resized (bicubic) and fixed; the final norm stays.
  [D4] Warm-up of 0.14 epochs (about 250 steps), gradient norm clipped at 1.
  [D5] Jitter: 0.1 to 2 times the size that fits, then a random square of it, with padding in the mean colour;
       flip. An object that is cut gets the box of the mask that is left. In tests the long side is S, padded
       below and to the right. Crowds are no targets; training leaves out images without objects.
  [D6] bf16 in encoder and pyramid alone: torchvision codes boxes in the type of the features, and bf16 cannot
       tell pixel 1001 from pixel 1003.
  [D7] Which anchors and proposals count is drawn from (seed, step, first row of the micro batch), so a stop
       changes nothing (on a GPU up to the order of sums in RoIAlign's gradient). torchvision's mask loss is a
       mean over the objects of a micro batch, so another --micro_batch is another, equally good, run.

Dimension key: B batch, S side of the square input, P patch side, N patches, D width, C pyramid channels,
h x w an image as it is (in the model: a map), n objects.
"""

import contextlib
import copy
import dataclasses
import io
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision import tv_tensors
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign, masks_to_boxes
from torchvision.ops.poolers import LevelMapper
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

import common
from common import flag
from eval.protocol import append_result, check_classes, check_writable, layer_groups, open_checkpoint

BICUBIC, NEAREST = TF.InterpolationMode.BICUBIC, TF.InterpolationMode.NEAREST
MEAN_COLOUR = tuple(round(255 * value) for value in common.IMAGENET_MEAN)  # of padding: 0 once normalised

# For the small images that demo/scenes.py writes.
DEMO = dict(data="runs/coco_scenes", img_size=64, window=8, global_blocks=2, channels=32, rois=32,
            batch_size=8, epochs=5, lr=1e-3, warmup_epochs=0.5, drop_path=0.0, scale_min=0.8, scale_max=1.25,
            workers=0)


@dataclasses.dataclass(frozen=True)
class Config(common.RunConfig):
    """The whole command line; flags that change no number come from common.RunConfig."""

    checkpoint: str = flag("", "the encoder: a file (ours, timm, MAE, CAE v2 ...), or the folder of a run")
    num_heads: int = flag(0, "heads of the encoder (default: what the file says, else the usual)")
    data: str = flag("data/coco", "folder in COCO's layout")
    random_init: bool = flag(False, "random weights in the same encoder: the floor")
    eval_only: bool = flag(False, "measure the detector in --checkpoint, a last.pt of this script, whose "
                                  "recipe is kept: only flags of data, folder and machine count")
    demo: bool = flag(False, "a small recipe for the 64-pixel images of demo/scenes.py")
    epochs: int = flag(100, "passes over the data [F]")
    batch_size: int = flag(64, "images per step over all processes [F]")
    lr: float = flag(1e-4, "peak learning rate [F]")
    warmup_epochs: float = flag(0.14, "epochs of linear warm-up from 0 [D4]")
    weight_decay: float = flag(0.1, "AdamW, not on vectors [F]")
    layer_decay: float = flag(0.75, "lr of a block in units of the next one's [F]")
    drop_path: float = flag(0.1, "stochastic depth of the last block, rising linearly to it [F]")
    clip_grad: float = flag(1.0, "largest global L2 norm of the gradient [D4]")
    img_size: int = flag(1024, "side of the square input [F]")
    scale_min: float = flag(0.1, "smallest scale of the jitter [D5]")
    scale_max: float = flag(2.0, "largest scale of the jitter [D5]")
    window: int = flag(16, "patches on the side of an attention window [D2]")
    global_blocks: int = flag(4, "evenly spaced blocks whose attention sees all patches [D1]")
    channels: int = flag(256, "channels of pyramid and heads [D1]")
    rois: int = flag(512, "proposals per image that the box head learns from; of the RPN's, 4 times as many "
                          "survive in training, twice in tests [D1]")

    def __post_init__(self):
        super().__post_init__()
        if self.init or self.preview or self.model != "vit_b":
            raise ValueError("--model, --init and --preview have no use here: --checkpoint names the "
                             "encoder, and a picture is drawn with each checkpoint")
        if not self.checkpoint:
            raise ValueError("--checkpoint is missing: give the encoder's file, or the folder of a run")
        common.check_range(self, 1, "epochs", "batch_size", "img_size", "window", "global_blocks", "channels",
                           "rois")
        common.check_range(self, None, "lr", "clip_grad", "layer_decay", "scale_min")
        common.check_range(self, 0, "warmup_epochs", "weight_decay", "drop_path", "num_heads")
        if self.scale_min > self.scale_max or self.drop_path >= 1:
            raise ValueError("--scale_min is at most --scale_max, and --drop_path below 1")


def coco_tools():
    """(COCO, COCOeval, mask functions) of pycocotools; imported here, as nothing else needs them."""
    try:
        from pycocotools import mask
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
        version("pycocotools")  # for the result line: better missed now than after the training
    except ImportError as error:
        raise ValueError("detection needs pycocotools: pip install pycocotools (this project's extra `det`)"
                         ) from error
    return COCO, COCOeval, mask


# ------------------------------------------------------------------------------------------------------------
# Data


def coco_files(root, split):
    """(annotation file, image folder) of "train" or "val" in a folder of COCO's layout."""
    found = sorted(Path(root).expanduser().glob(f"annotations/instances_{split}*.json"))
    if len(found) != 1:
        raise FileNotFoundError(f"one file annotations/instances_{split}*.json is expected in {root} and "
                                f"{len(found)} are there: give a folder of COCO's layout with --data FOLDER")
    folder = found[0].parents[1] / found[0].stem.removeprefix("instances_")
    if not folder.is_dir():
        raise FileNotFoundError(f"the images of {found[0]} are expected in {folder}/, which is not there")
    return found[0], folder


def read_annotations(path):
    """A COCO annotation file as a dict, checked. Raises ValueError that names the file and the entry.

    Annotations are numbered anew from 1, because COCOeval takes the number 0 for "not found".
    """
    try:
        content = json.loads(path.read_bytes())
        images = {one["id"]: (one["file_name"], one["height"], one["width"]) for one in content["images"]}
        categories = {one["id"]: one["name"] for one in content["categories"]}
        for number, one in enumerate(content["annotations"], start=1):
            place, box = f"annotation {one.get('id', number)}", one["bbox"]
            if one["image_id"] not in images:
                raise ValueError(f"{place} belongs to image {one['image_id']}, which the file does not list")
            if one["category_id"] not in categories:
                raise ValueError(f"{place} is of category {one['category_id']}, the {len(categories)} that "
                                 f"the file lists run from {min(categories)} to {max(categories)}")
            if len(box) != 4 or not np.isfinite(box).all() or min(box[2:]) < 0 or not one["segmentation"]:
                raise ValueError(f"{place} needs a bbox (x, y, width, height) and a segmentation, not {box} "
                                 f"and {str(one['segmentation'])[:20]}")
            one.update(id=number, iscrowd=one.get("iscrowd", 0), area=one.get("area", box[2] * box[3]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} cannot be used as COCO annotations: {what}") from error
    return content


def decode_mask(code, height, width):
    """COCO's polygons, or run lengths plain or compressed, as (h, w) uint8 of 0 and 1."""
    mask = coco_tools()[2]
    if isinstance(code, list) or isinstance(code["counts"], list):
        code = mask.frPyObjects(code, height, width)
    return mask.decode(mask.merge(code) if isinstance(code, list) else code)


class CocoImages(torch.utils.data.Dataset):
    """One split of a COCO set: `[index]` is (image (3, h, w) uint8, target).

    target: image_id, boxes (n, 4) float32 as x0 y0 x1 y1 in pixels, labels (n,) int64 from 1 (0 is the
    background) in the order of the category ids, masks (n, h, w) uint8. Records are bytes in one tensor: each
    worker would copy Python objects. Raises ValueError or FileNotFoundError, also for the first image.
    """

    def __init__(self, root, split):
        path, self.folder = coco_files(root, split)
        self.name, content = str(path), read_annotations(path)
        names = {category["id"]: category["name"] for category in content["categories"]}
        self.category_ids = sorted(names)
        self.classes = tuple(names[category_id] for category_id in self.category_ids)
        labels = {category_id: label for label, category_id in enumerate(self.category_ids, start=1)}
        objects = {image["id"]: [] for image in content["images"]}
        for one in content["annotations"]:
            if not one["iscrowd"]:
                item = one["bbox"], labels[one["category_id"]], one["segmentation"]
                objects[one["image_id"]].append(item)
        if not any(objects.values()):
            raise ValueError(f"{path} lists no object")
        records = [json.dumps([*(image[key] for key in ("id", "file_name", "height", "width")),
                               objects[image["id"]]]).encode()
                   for image in content["images"] if split == "val" or objects[image["id"]]]
        self.records = torch.frombuffer(bytearray(b"".join(records)), dtype=torch.uint8)
        self.ends = torch.tensor([0] + [len(record) for record in records]).cumsum(0)
        self.truth = content if split == "val" else None
        self[0]

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        record = self.records[self.ends[index]: self.ends[index + 1]].numpy().tobytes()
        image_id, file_name, height, width, objects = json.loads(record)
        image = common.read_image(self.folder / file_name)
        try:
            masks = [decode_mask(code, height, width) for _, _, code in objects]
        except Exception as error:  # whatever C and numpy raise
            raise ValueError(f"a mask of {file_name} in {self.name} cannot be decoded: {error}") from error
        if {image.shape[1:], *(mask.shape for mask in masks)} != {(height, width)}:
            raise ValueError(f"{self.folder / file_name} or one of its masks has not the {height} x {width} "
                             f"pixels that {self.name} states")
        boxes = torch.tensor([box for box, _, _ in objects]).float().reshape(-1, 4)
        return image, dict(
            image_id=image_id, boxes=torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1),
            labels=torch.tensor([label for _, label, _ in objects], dtype=torch.int64),
            masks=torch.from_numpy(np.array(masks, dtype=np.uint8).reshape(-1, height, width)))


class Jitter:
    """Large-scale jitter to a square (3, S, S), and flip [D5]; for `common.Samples`."""

    def __init__(self, config):
        self.size = (config.img_size, config.img_size)
        self.transform = v2.Compose([
            v2.ScaleJitter(self.size, (config.scale_min, config.scale_max), BICUBIC),
            v2.RandomCrop(self.size, pad_if_needed=True, fill={tv_tensors.Image: MEAN_COLOUR, "others": 0}),
            v2.RandomHorizontalFlip()])

    def __call__(self, image, target):
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[1:],
                                         clamping_mode=None)  # what lies outside tells who was cut
        wrapped = self.transform(tv_tensors.Image(image), boxes, tv_tensors.Mask(target["masks"]))
        image, boxes, masks = (tensor.as_subclass(torch.Tensor) for tensor in wrapped)
        inside = boxes.clamp(0, self.size[0])  # (n, 4)
        keep = (masks > 0).flatten(1).any(dim=1) & (inside[:, 2:] - inside[:, :2] >= 1).all(dim=1)  # (n,)
        inside, boxes, masks, labels = inside[keep], boxes[keep], masks[keep], target["labels"][keep]
        tight = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])  # its last pixel is inclusive
        boxes = torch.where((inside != boxes).any(dim=1, keepdim=True), tight, inside)  # (n, 4)
        return image, dict(size=self.size, boxes=boxes, labels=labels, masks=masks)


class Whole(torch.utils.data.Dataset):
    """Images `indices` of a `CocoImages` as they are tested: the long side is S, padded to a square [D5]."""

    def __init__(self, images, indices, size):
        self.images, self.indices, self.size = images, indices, size

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, place):
        image, target = self.images[self.indices[place]]
        original, S = tuple(image.shape[1:]), self.size
        h, w = (max(1, round(side * S / max(original))) for side in original)
        image = TF.pad(TF.resize(image, [h, w], BICUBIC), [0, 0, S - w, S - h], MEAN_COLOUR)  # (3, S, S)
        return image, dict(image_id=target["image_id"], size=(h, w), original=original)


def collate(samples):
    """Samples as images (B, 3, S, S) uint8 and a list of targets."""
    images, targets = zip(*samples)
    return torch.stack(images), list(targets)


def to_device(batch, device):
    """A collated batch with normalised images and the tensors of its targets on the device."""
    images, targets = batch
    moved = [{name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
              for name, value in target.items()} for target in targets]
    return common.normalise(images.to(device, non_blocking=True)), moved


# ------------------------------------------------------------------------------------------------------------
# Model


def windowed(block, x, grid, window):
    """A ViT block on the tokens x (B, N, D) of a `grid` whose attention stays in windows of window^2 patches.

    Drop path, applied outside the windows, still drops whole samples. A single window is the block itself.
    """
    h, w = (side // window for side in grid)
    tiles = rearrange(block.norm1(x), "b (h p w q) d -> (b h w) (p q) d", h=h, w=w, p=window, q=window)
    seen = rearrange(block.attn(tiles), "(b h w) (p q) d -> b (h p w q) d", h=h, w=w, p=window)  # (B, N, D)
    x = x + block.drop_path(block.ls1(seen))
    return x + block.drop_path(block.ls2(block.mlp(block.norm2(x))))


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, h, w)."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Pyramid(nn.Module):
    """Simple feature pyramid [D1]: a map (B, D, h, w) to five of C channels, from (B, C, 4h, 4w) by halves to
    (B, C, h/4, w/4), under torchvision's names 0, 1, 2, 3, pool."""

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
    """Images (B, 3, S, S) to the maps of `Pyramid`. Raises ValueError for a grid that windows do not tile."""

    def __init__(self, vit, channels, window, global_blocks):
        super().__init__()
        (side, width), (P, Q), depth = vit.grid, vit.patch_size, len(vit.blocks)
        if (side, P) != (width, Q) or P % 4 or side % 4:
            raise ValueError(f"the pyramid needs square patches of 4, 8, 12 ... pixels and --img_size a "
                             f"multiple of 4 patches, not {vit.img_size[0]} and patches of {P} x {Q}")
        if side > window and side % window:
            fits = [str(size) for size in range(2, side + 1) if side % size == 0]
            raise ValueError(f"windows of {window} x {window} patches do not tile a grid of {side} x {side}: "
                             f"give --window {' or '.join(fits)}")
        last = {round((number + 1) * depth / global_blocks) - 1 for number in range(global_blocks)}
        self.windows = [side if index in last else min(window, side) for index in range(depth)]
        self.vit, self.pyramid, self.out_channels = vit, Pyramid(vit.config["embed_dim"], channels), channels
        if vit.cls_token is not None:
            vit.cls_token.requires_grad_(False)  # it leads nowhere [D3]

    def forward(self, images):
        h, w = self.vit.grid
        x = self.vit.embed(images)[:, -h * w:]  # (B, N, D)
        for block, window in zip(self.vit.blocks, self.windows):
            x = windowed(block, x, (h, w), window)
        return self.pyramid(rearrange(self.vit.norm(x), "b (h w) d -> b d h w", h=h))


def roi_align(output_size, patch):
    """RoIAlign on the pyramid's first four maps: a box of 14 x 14 patches reads the map of stride P.

    For P = 16 that is torchvision's own rule. The strides are stated, as it would guess them from the size of
    the images before padding, and only powers of two.
    """
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
        """Normalised images (B, 3, S, S) and their targets to losses by name (in training), or else a list of
        boxes (n, 4), labels, scores (n,), masks (n, 1, h, w) in 0..1, in pixels of the original images."""
        features, sizes = self.backbone(images), [target["size"] for target in targets]
        known = targets if self.training else None
        with torch.autocast(images.device.type, enabled=False):  # [D6]
            features = {name: value.float() for name, value in features.items()}
            proposals, losses = self.rpn(ImageList(images, sizes), features, known)
            detections, more = self.roi_heads(features, proposals, sizes, known)
        if self.training:
            return {name.removeprefix("loss_"): loss for name, loss in {**losses, **more}.items()}
        return self.transform.postprocess(detections, sizes, [target["original"] for target in targets])


# ------------------------------------------------------------------------------------------------------------
# Optimisation


def learning_rate(step, peak, warmup_steps, total_steps):
    """Linear from 0 to `peak`, a tenth of it after 8/9 and a hundredth after 26/27 of the run: steps 163,889
    and 177,546 of 184,375 [F]."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * 0.1 ** ((step >= round(total_steps * 8 / 9)) + (step >= round(total_steps * 26 / 27)))


# ------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def detect(model, images, indices, config, device):
    """Yields (target, what was detected, on the CPU) for the images `indices` of a `CocoImages`."""
    model.eval()
    batch_size = config.micro_batch or 8
    loader = torch.utils.data.DataLoader(Whole(images, indices, config.img_size), batch_size,
                                         num_workers=min(config.workers, len(indices) // batch_size),
                                         collate_fn=collate, worker_init_fn=common.own_group)
    for batch in loader:
        inputs, targets = to_device(batch, device)
        with common.autocast(device, config.precision):
            detections = model(inputs, targets)
        for target, found in zip(targets, detections):
            yield target, {name: value.cpu() for name, value in found.items()}


def coco_results(target, found, category_ids):
    """What was detected in one image as COCO's list of results."""
    pixels = rearrange(found["masks"] > 0.5, "n 1 h w -> h w n").byte().numpy()
    codes = coco_tools()[2].encode(np.asfortranarray(pixels))
    boxes = torch.cat([found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]], dim=1)  # (n, 4)
    return [dict(image_id=target["image_id"], category_id=category_ids[label - 1], bbox=box, score=score,
                 segmentation=code) for label, box, score, code
            in zip(found["labels"].tolist(), boxes.tolist(), found["scores"].tolist(), codes)]


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
            for stage in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
                stage()
            values += [100 * float(value) for value in evaluation.stats[:3]]
    return dict(zip(names, values))


def evaluate(model, images, config, processes):
    """`coco_ap` of a whole set in the main process, None in the others; each detects in its share."""
    share = range(processes.rank, len(images), processes.world)
    results = [result for target, found in detect(model, images, share, config, processes.device)
               for result in coco_results(target, found, images.category_ids)]
    if processes.world > 1:
        gathered = [None] * processes.world
        torch.distributed.all_gather_object(gathered, results)
        results = sum(gathered, [])
    return coco_ap(images.truth, results) if processes.main else None


def draw(path, model, images, config, device, count=6):
    """Draws a few images from all over the set: the truth above, detections of score 0.25 and more below."""
    chosen = range(0, len(images), max(1, len(images) // count))[:count]
    above, below = [], []
    for index, (_, found) in zip(chosen, detect(model, images, chosen, config, device)):
        image, truth = images[index]
        sure = {name: value[found["scores"] >= 0.25] for name, value in found.items()}
        above.append(panel(image, truth, truth["masks"] > 0, images.classes))
        below.append(panel(image, sure, sure["masks"][:, 0] > 0.5, images.classes))
    sheet = TF.to_pil_image(make_grid(torch.stack(above + below), nrow=len(chosen), pad_value=255))
    common.write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))


def panel(image, objects, masks, classes, side=256):
    """An image (3, h, w) with its objects drawn on it, as (3, side, side)."""
    scale = side / max(image.shape[1:])
    size = [max(1, round(length * scale)) for length in image.shape[1:]]
    canvas, labels = TF.resize(image, size, NEAREST if scale > 1 else BICUBIC), objects["labels"].tolist()
    if labels:
        shades = common.colour_map(torch.tensor(labels)[None] / len(classes))[:, 0].T  # (n, 3)
        colours = [tuple(shade) for shade in (255 * shades).int().tolist()]
        words = [classes[label - 1] for label in labels]
        if "scores" in objects:
            words = [f"{word} {score:.2f}" for word, score in zip(words, objects["scores"].tolist())]
        canvas = draw_segmentation_masks(canvas, TF.resize(masks, size, NEAREST), alpha=0.4, colors=colours)
        canvas = draw_bounding_boxes(canvas, objects["boxes"] * scale, words, colours, width=2,
                                     label_colors="white", fill_labels=True)
    return TF.pad(canvas, [0, 0, side - size[1], side - size[0]], 255)


# ------------------------------------------------------------------------------------------------------------
# Train


def train(config, run, processes, started):
    """Fine-tuning from start to end: lr, forward, backward, step, log, save; then the evaluation."""
    device = processes.device
    with contextlib.nullcontext() if processes.main else contextlib.redirect_stdout(io.StringIO()):
        checkpoint, vit = open_checkpoint(config, drop_path_rate=config.drop_path)
    images, val = CocoImages(config.data, "train"), CocoImages(config.data, "val")
    check_classes(images, val)
    plan = common.make_plan(len(images), config.batch_size, config.micro_batch, config.epochs,
                            processes.world)
    torch.manual_seed(config.seed)
    if config.random_init:
        vit = common.ViT(**vit.config, drop_path_rate=config.drop_path)
    model = Detector(vit, len(images.classes), config)
    if processes.main:
        describe(config, model, plan, processes, images, val, run.folder)
    if config.dry_run:
        return
    model.to(device)
    if common.uses_compile(device, config.compile):
        model.backbone.compile()
    groups = layer_groups(model, vit, config.weight_decay, config.layer_decay)
    optimizer = torch.optim.AdamW(groups, config.lr)
    start = run.begin(processes, plan, model, optimizer, len(images))
    parallel = model if processes.world == 1 else nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=True)
    warmup_steps = round(config.warmup_epochs * plan.steps_per_epoch)
    save_every = config.save_every or plan.steps_per_epoch
    samples = common.Samples(images, Jitter(config), config.seed)
    batches = iter(common.training_loader(samples, plan, processes, config, start, run.stop, collate))

    model.train()
    for step in range(start, run.stop):
        lr = learning_rate(step, config.lr, warmup_steps, plan.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        for micro in range(plan.accumulation):
            inputs, targets = to_device(run.next_batch(batches), device)
            # torchvision picks anchors and proposals by the global generator; drop path draws too [D7].
            row = plan.first_row(micro, processes)
            torch.manual_seed(common.seed_for(config.seed, "step", step, row))
            more_to_come = processes.world > 1 and micro < plan.accumulation - 1
            with parallel.no_sync() if more_to_come else contextlib.nullcontext():
                with common.autocast(device, config.precision):
                    parts = parallel(inputs, targets)
                loss = sum(parts.values())
                (loss / plan.accumulation).backward()
            run.record(loss=loss, **parts)

        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        run.update(optimizer, grad_norm)

        run.log(step + 1, lr, grad_norm)
        stopping = run.stopping()
        if (step + 1) % save_every == 0 or step + 1 == run.stop or stopping:
            # The last two are what --eval_only needs to build the detector again.
            run.save(model, optimizer, step + 1, encoder=vit.config, classes=list(images.classes))
            if processes.main:
                draw(run.folder / "preview.png", model, val, config, device)
            model.train()
        if stopping:
            run.close()
            sys.exit(1)  # in a process that agreed to stop and has not been asked itself
    run.close()
    report(config, model, val, processes, checkpoint, started, run.stop, train=images.name,
           train_images=len(images))


# ------------------------------------------------------------------------------------------------------------
# Main


def describe(config, model, plan, processes, images, val, folder):
    """Prints the resolved recipe and its cost, before anything is computed."""
    total, encoder = (sum(p.numel() for p in part.parameters()) for part in (model, model.encoder))
    windows, side = model.backbone.windows, model.encoder.grid[0]
    print(f"model    {total:,} parameters, {encoder:,} of them in the encoder"
          f"{' (random weights)' if config.random_init else ''}\n"
          f"blocks   {side} x {side} patches, attention in windows of {min(windows)} x {min(windows)} but "
          f"for blocks {', '.join(str(index) for index, window in enumerate(windows) if window == side)}\n"
          f"data     {len(images):,} images with objects of {len(images.classes)} classes ({images.name}), "
          f"{len(val):,} to test on\n"
          f"lr       {config.lr:.2e} at the peak, times {config.layer_decay:g} per block below the heads\n"
          f"{common.describe(config, plan, processes, folder)}")
    flops = count_flops(model, config)
    step = 3 * flops * plan.batch_size  # a backward pass costs two forward passes
    print(f"cost     {flops / 1e9:,.1f} GFLOP per image forward, about {step / 1e9:,.0f} per step and "
          f"{step * plan.total_steps / 1e15:,.3g} PFLOP in all", flush=True)


def count_flops(model, config):
    """Floating-point operations of a training image's forward pass, a quarter of its proposals on objects."""
    meta = copy.deepcopy(model).to("meta")
    image, boxes, objects = (torch.empty(shape, device="meta") for shape in (
        (1, 3, config.img_size, config.img_size), (config.rois, config.channels, 7, 7),
        (max(1, config.rois // 4), config.channels, 14, 14)))

    def forward():
        meta.rpn.head(list(meta.backbone(image).values()))
        meta.roi_heads.box_head(boxes)
        meta.roi_heads.mask_predictor(meta.roi_heads.mask_head(objects))

    return common.count_flops(forward)


def report(config, model, val, processes, checkpoint, started, step, **facts):
    """Evaluates, appends the result and `facts` to eval.jsonl beside `checkpoint`, prints it."""
    ap = evaluate(model, val, config, processes)
    if processes.main:
        append_result("detect", checkpoint, model.encoder, config, started, protocol="Mask R-CNN, ViTDet",
                      data=config.data, val=val.name, val_images=len(val), classes=len(val.classes),
                      step=step, random_init=config.random_init, **ap, **facts, seed=config.seed,
                      device=str(processes.device), pycocotools=version("pycocotools"))
        print(f"detection: box AP {ap['box_ap']:.1f}, AP50 {ap['box_ap50']:.1f}, AP75 {ap['box_ap75']:.1f}; "
              f"mask AP {ap['mask_ap']:.1f}, AP50 {ap['mask_ap50']:.1f}, AP75 {ap['mask_ap75']:.1f}")


def evaluate_only(config, processes, started):
    """--eval_only: the detector in a last.pt, under the recipe in it, on the val images of --data."""
    path = Path(config.checkpoint).expanduser()
    path = path / "last.pt" if path.is_dir() else path
    state = common.read_checkpoint(path)
    check_writable(path)
    if state.get("kind") != "detection":
        raise ValueError(f"{path} holds no detector: --eval_only takes the last.pt of a run of this script")
    free = {"checkpoint", "data", "eval_only", *common.MAY_CHANGE, "precision", "compile"}
    config = dataclasses.replace(config, **{name: value for name, value in state["config"].items()
                                            if name not in free})
    val = CocoImages(config.data, "val")
    if list(val.classes) != state["classes"]:
        raise ValueError(f"the {len(val.classes)} classes of {val.name} are not the {len(state['classes'])} "
                         f"that {path} was trained for")
    model = Detector(common.ViT(**state["encoder"]), len(val.classes), config)
    model.load_state_dict(state["model"])
    model.to(processes.device)
    if processes.main:
        print(f"model    {path}, step {state['step']}\ndata     {len(val):,} images ({val.name})", flush=True)
        draw(path.with_name("detections.png"), model, val, config, processes.device)
    report(config, model, val, processes, path, started, state["step"])


def main(argv=None):
    config, started = common.parse_config(Config, __doc__, demo=DEMO, argv=argv), time.perf_counter()
    coco_tools()
    run = None if config.eval_only else common.Run("detect", config, config.out or "runs/detect", "detection")
    if run and run.finished:
        return print(f"the run in {run.folder}/ is finished, step {run.start}: --eval_only --checkpoint "
                     f"{run.checkpoint} measures it again, --fresh starts anew")
    with common.processes(config.device) as processes:
        if config.eval_only:
            return evaluate_only(config, processes, started)
        train(config, run, processes, started)


if __name__ == "__main__":
    common.run_main(main)
