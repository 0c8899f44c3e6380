"""Detection and instance masks: Mask R-CNN on any of our encoders, fine-tuned whole, measured as COCO AP.

    python -m eval.detect --checkpoint runs/cae_v2_vit_b --data COCO
    torchrun --nproc_per_node=8 -m eval.detect --checkpoint mae_pretrain_vit_base.pth --data COCO
    python -m eval.detect --checkpoint runs/detect --eval_only --data COCO      (runs/detect/last.pt suffices)
    python -m demo.scenes runs/coco_scenes;  python -m eval.detect --demo --checkpoint runs/cae_v2_demo

The same command again resumes. COCO is a folder with annotations/instances_{train,val}*.json and the images in
train*/ and val*/. `--random_init` is the floor: the same encoder with random weights, trained alike. Needs
pycocotools (extra `det`).

    image (B, 3, S, S) -- ViT, attention in windows but for a few blocks -- (B, D, S/P, S/P)
        -- simple feature pyramid: strides P/4, P/2, P, 2P, 4P, each of C channels
        -- torchvision's RPN: proposals -- box head: class, box -- mask head: 28 x 28 mask -- five losses

Recipe: [F] is ViTDet-B as an author of MFM's code base ran it (1024-pixel large-scale jitter, batch 64, AdamW
1e-4, weight decay 0.1, layer decay 0.75, drop path 0.1, 100 epochs with two steps of 0.1). CAE's own numbers
come from another framework (FPN on four taps, multi-scale training, 12 epochs, box head of 4 conv + 1 fc [code]):
do not compare across the two. [F] says nothing of what is inside a ViTDet; where it is silent, we decided:
  [D1] Pyramid: the last map alone, made finer by transposed convolutions and coarser by pooling, then a 1 x 1
       and a 3 x 3 convolution with LayerNorm over channels. RPN of 2 convolutions, box head of 4 and a linear
       layer, mask head of 4, all torchvision's, with its thresholds. Anchors are 8 strides wide.
  [D2] Windows tile the grid, so that nothing is padded or masked: 16 x 16 patches in COCO's grid of 64 x 64.
  [D3] The class token is dropped, the position table resized (bicubic) and fixed, the final norm kept.
  [D4] Warm-up over 0.14 epochs (about 250 steps), gradient norm clipped at 1.
  [D5] Jitter: scale 0.1 to 2 of the size that fits, then a random square of it, padded with the mean colour on
       whatever side; flip. Objects that are cut get the box of the mask that is left. Tests: the long side is
       S, padded below and to the right. Crowds are no targets; training leaves out images without objects.
  [D6] bf16 in encoder and pyramid alone: torchvision codes boxes in the features' type, and bf16 cannot tell
       the pixels 1001 and 1004 apart.
  [D7] Which anchors and proposals count is drawn from (seed, step, first row), so a stop changes nothing; on
       a GPU up to the order of its sums (RoIAlign's gradient). The mask loss is the mean over a micro batch's
       own objects, as torchvision has it, so another --micro_batch is another, equally good, run.

Dimension key: B batch, S side of the square input, P patch side, N patches, D width, C pyramid channels,
h x w an image as it is, n objects.
"""

import contextlib
import copy
import dataclasses
import io
import json
import time
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
from eval.protocol import append_result, check_classes, open_checkpoint

BICUBIC = TF.InterpolationMode.BICUBIC
MEAN_COLOUR = tuple(round(255 * value) for value in common.IMAGENET_MEAN)  # of padding: 0 once normalised

# For sets of small images such as demo/scenes.py writes: a small pyramid, few proposals, mild jitter.
DEMO = dict(data="runs/coco_scenes", img_size=64, window=8, global_blocks=2, channels=32, rois=32, batch_size=8,
            epochs=5, lr=1e-3, warmup_epochs=0.5, drop_path=0.0, scale_min=0.8, scale_max=1.25, workers=0)


@dataclasses.dataclass(frozen=True)
class Config(common.RunConfig):
    """The whole command line; flags that change no number come from common.RunConfig."""

    checkpoint: str = flag("", "the encoder: a file (ours, timm, MAE, CAE v2 ...), or the folder of a run")
    num_heads: int = flag(0, "heads of the encoder (default: what the file says, else the usual)")
    data: str = flag("data/coco", "folder in COCO's layout")
    random_init: bool = flag(False, "the same encoder with random weights: the floor")
    eval_only: bool = flag(False, "measure a finished detector: --checkpoint is its last.pt or folder")
    demo: bool = flag(False, "settings for a small run on 64-pixel images (see the top of this file)")
    epochs: int = flag(100, "passes over the data [F]")
    batch_size: int = flag(64, "images per step over all processes [F]")
    lr: float = flag(1e-4, "peak learning rate [F]")
    warmup_epochs: float = flag(0.14, "epochs of linear warm-up from 0 [D4]")
    weight_decay: float = flag(0.1, "AdamW, not on norms and biases [F]")
    layer_decay: float = flag(0.75, "lr of a block in units of the next one's [F]")
    drop_path: float = flag(0.1, "stochastic depth of the last block, rising linearly to it [F]")
    clip_grad: float = flag(1.0, "largest global L2 norm of the gradient [D4]")
    img_size: int = flag(1024, "side of the square input [F]")
    scale_min: float = flag(0.1, "smallest scale of the jitter [D5]")
    scale_max: float = flag(2.0, "largest scale of the jitter [D5]")
    window: int = flag(16, "patches on the side of an attention window [D2]")
    global_blocks: int = flag(4, "evenly spaced blocks whose attention sees all patches [D1]")
    channels: int = flag(256, "channels of the pyramid and the heads [D1]")
    rois: int = flag(512, "proposals per image that the box head learns from [D1]")

    def __post_init__(self):
        super().__post_init__()
        if self.init or self.preview or self.model != "vit_b":
            raise ValueError("--model, --init and --preview have no use here: --checkpoint names the encoder, "
                             "pictures are drawn at each checkpoint and by --eval_only")
        if not self.checkpoint:
            raise ValueError("--checkpoint is missing: give the encoder's file, or the folder of a run")
        common.check_range(self, 1, "epochs", "batch_size", "img_size", "window", "global_blocks", "channels",
                           "rois")
        common.check_range(self, None, "lr", "clip_grad", "layer_decay", "scale_min")
        common.check_range(self, 0, "warmup_epochs", "weight_decay", "drop_path", "num_heads")
        if not self.scale_min <= self.scale_max or self.drop_path >= 1:
            raise ValueError("--scale_min is at most --scale_max, and --drop_path below 1")


def coco_tools():
    """(COCO, COCOeval, mask functions) of pycocotools, imported here since no other file needs it."""
    try:
        from pycocotools import mask
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ValueError("detection needs pycocotools: pip install pycocotools, or this project's extra with "
                         "pip install '.[det]'") from error
    return COCO, COCOeval, mask


# ------------------------------------------------------------------------------------------------------------
# Data


def coco_files(root, split):
    """(annotation file, image folder) of "train" or "val" below a folder in COCO's layout."""
    found = sorted(Path(root).expanduser().glob(f"annotations/instances_{split}*.json"))
    if len(found) != 1:
        what = "there are " + " and ".join(path.name for path in found) if found else "there is none"
        raise FileNotFoundError(f"{root} must hold one file annotations/instances_{split}*.json, {what}: give "
                                "a folder in COCO's layout with --data FOLDER")
    folder = found[0].parents[1] / found[0].stem.removeprefix("instances_")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no image folder {folder} for {found[0]}")
    return found[0], folder


def read_annotations(path):
    """A COCO annotation file as a dict, checked. Raises ValueError that names the file and the entry.

    Annotations are numbered anew from 1, because COCOeval takes the number 0 for "not found".
    """
    try:
        content = json.loads(path.read_bytes())
        images = {image["id"]: image for image in content["images"]}
        categories = {category["id"] for category in content["categories"]}
        annotations = content["annotations"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as COCO annotations ({type(error).__name__}: {error}): fetch "
                         "or write it again") from error
    for number, annotation in enumerate(annotations, start=1):
        name = f"{path}: annotation {annotation.get('id', number)}"
        missing = {"image_id", "category_id", "bbox", "segmentation"} - annotation.keys()
        if missing:
            raise ValueError(f"{name} has no {', '.join(sorted(missing))}")
        if annotation["image_id"] not in images:
            raise ValueError(f"{name} belongs to image {annotation['image_id']}, which the file does not list")
        if annotation["category_id"] not in categories:
            raise ValueError(f"{name} is of category {annotation['category_id']}, the file lists "
                             f"{len(categories)} categories from {min(categories)} to {max(categories)}")
        box = annotation["bbox"]
        if len(box) != 4 or not np.isfinite(box).all() or min(box[2:]) < 0:
            raise ValueError(f"{name} has the box {box}: four numbers x, y, width, height are expected")
        annotation.update(id=number, iscrowd=annotation.get("iscrowd", 0))
        annotation.setdefault("area", box[2] * box[3])
    return content


def decode_mask(segmentation, height, width):
    """COCO's polygons, or run lengths plain or compressed, as (height, width) uint8 of 0 and 1."""
    mask = coco_tools()[2]
    if isinstance(segmentation, list):
        segmentation = mask.merge(mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask.frPyObjects(segmentation, height, width)
    decoded = mask.decode(segmentation)
    if decoded.shape != (height, width):
        raise ValueError(f"a mask of {decoded.shape} lies on an image of {(height, width)}")
    return decoded


class CocoImages(torch.utils.data.Dataset):
    """One split of a COCO set: `[index]` is (image (3, h, w) uint8, target).

    target: image_id, boxes (n, 4) float32 as x0 y0 x1 y1 in pixels, labels (n,) int64 from 1 (0 is the
    background) in the order of the category ids, masks (n, h, w) uint8. The records are held as bytes in one
    tensor: Python objects would be copied into every worker. Raises ValueError or FileNotFoundError.
    """

    def __init__(self, root, split):
        path, self.folder = coco_files(root, split)
        content = read_annotations(path)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.category_ids = [category["id"] for category in categories]
        self.classes, self.name = tuple(category["name"] for category in categories), str(path)
        labels = {category_id: label for label, category_id in enumerate(self.category_ids, start=1)}
        objects = {image["id"]: [] for image in content["images"]}
        for one in content["annotations"]:
            if not one["iscrowd"]:
                objects[one["image_id"]].append([one["bbox"], labels[one["category_id"]], one["segmentation"]])
        if not any(objects.values()):
            raise ValueError(f"{path} lists no object to {'learn from' if split == 'train' else 'find'}")
        records = [json.dumps([image["id"], image["file_name"], image["height"], image["width"],
                               objects[image["id"]]]).encode()
                   for image in content["images"] if split == "val" or objects[image["id"]]]
        self.records = torch.frombuffer(bytearray(b"".join(records)), dtype=torch.uint8)
        self.ends = torch.tensor([len(record) for record in records]).cumsum(0)
        self.truth = content if split == "val" else None
        self[0]  # says at the start that images are missing or masks are broken

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, index):
        start = int(self.ends[index - 1]) if index else 0
        record = self.records[start: int(self.ends[index])].numpy().tobytes()
        image_id, file_name, height, width, objects = json.loads(record)
        image = common.read_image(self.folder / file_name)
        try:
            if image.shape[1:] != (height, width):
                raise ValueError(f"it is {tuple(image.shape[1:])} pixels and not {(height, width)}")
            masks = [decode_mask(segmentation, height, width) for _, _, segmentation in objects]
        except Exception as error:  # pycocotools raises whatever C and numpy do
            raise ValueError(f"{self.folder / file_name} and its annotation in {self.name} do not fit "
                             f"({error})") from error
        boxes = torch.tensor([box for box, _, _ in objects]).float().reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = torch.from_numpy(np.array(masks, dtype=np.uint8).reshape(-1, height, width))
        labels = torch.tensor([label for _, label, _ in objects], dtype=torch.int64)
        return image, dict(image_id=image_id, boxes=boxes, labels=labels, masks=masks)


class Jitter:
    """Large-scale jitter, crop or padding to (3, S, S), flip [D5]; for `common.Samples`."""

    def __init__(self, config):
        size = (config.img_size, config.img_size)
        self.transform = v2.Compose([
            v2.ScaleJitter(size, (config.scale_min, config.scale_max), BICUBIC),
            v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Image: MEAN_COLOUR, "others": 0}),
            v2.RandomHorizontalFlip()])

    def __call__(self, image, target):
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[1:],
                                         clamping_mode=None)  # where they lie outside tells what was cut
        wrapped = self.transform(tv_tensors.Image(image), boxes, tv_tensors.Mask(target["masks"]))
        image, boxes, masks = (tensor.as_subclass(torch.Tensor) for tensor in wrapped)
        inside = boxes.clamp(0, image.shape[1])  # (n, 4)
        shown = (masks > 0).flatten(1).any(dim=1)  # (n,)
        tight = inside.clone()
        tight[shown] = masks_to_boxes(masks[shown]) + torch.tensor([0, 0, 1, 1])  # its last pixel is inclusive
        boxes = torch.where((inside != boxes).any(dim=1, keepdim=True), tight, inside)  # (n, 4)
        keep = shown & (boxes[:, 2:] - boxes[:, :2] >= 1).all(dim=1)
        size = tuple(image.shape[1:])
        return image, dict(image_id=target["image_id"], size=size, original=size, boxes=boxes[keep],
                           labels=target["labels"][keep], masks=masks[keep])


class Whole(torch.utils.data.Dataset):
    """Images `indices` as they are tested: the long side is S, padded below and to the right [D5]."""

    def __init__(self, images, indices, size):
        self.images, self.indices, self.size = images, list(indices), size

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, place):
        image, target = self.images[self.indices[place]]
        h, w = image.shape[1:]
        size = tuple(max(1, round(side * self.size / max(h, w))) for side in (h, w))
        image = TF.resize(image, size, BICUBIC, antialias=True)
        image = v2.Pad((0, 0, self.size - size[1], self.size - size[0]), fill=MEAN_COLOUR)(image)  # (3, S, S)
        return image, dict(image_id=target["image_id"], size=size, original=(h, w))


def collate(samples):
    """Samples to images (B, 3, S, S) uint8 and a list of targets, which differ in length."""
    images, targets = zip(*samples)
    return torch.stack(images), list(targets)


def to_device(batch, device):
    """A collated batch on the device: images normalised, tensors of the targets moved."""
    images, targets = batch
    targets = [{name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                for name, value in target.items()} for target in targets]
    return common.normalise(images.to(device, non_blocking=True)), targets


# ------------------------------------------------------------------------------------------------------------
# Model


def windowed(block, x, grid, window):
    """A ViT block on tokens x (B, N, D) of a `grid`, its attention confined to windows of window^2 patches.

    Stochastic depth, outside the windows, still drops whole samples. One window is the block itself.
    """
    h, w = (side // window for side in grid)
    tiles = rearrange(block.norm1(x), "b (h p w q) d -> (b h w) (p q) d", h=h, w=w, p=window, q=window)
    seen = rearrange(block.attn(tiles), "(b h w) (p q) d -> b (h p w q) d", h=h, w=w, p=window)  # (B, N, D)
    x = x + block.drop_path(block.ls1(seen))
    return x + block.drop_path(block.ls2(block.mlp(block.norm2(x))))


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, h, w)."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-6)

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Pyramid(nn.Module):
    """Simple feature pyramid [D1]: one map (B, D, h, w) to five of C channels, each half as fine as the last,
    from (B, C, 4h, 4w) to (B, C, h/4, w/4), under torchvision's names 0, 1, 2, 3, pool."""

    def __init__(self, dim, channels):
        super().__init__()

        def smooth(width):
            return [nn.Conv2d(width, channels, 1, bias=False), LayerNorm2d(channels),
                    nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels)]

        def double(width):
            return nn.ConvTranspose2d(width, width // 2, 2, stride=2)

        finest = [double(dim), LayerNorm2d(dim // 2), nn.GELU(), double(dim // 2)]
        self.levels = nn.ModuleList(nn.Sequential(*layers) for layers in (
            [*finest, *smooth(dim // 4)], [double(dim), *smooth(dim // 2)], smooth(dim),
            [nn.MaxPool2d(2), *smooth(dim)]))

    def forward(self, x):
        maps = {str(index): level(x) for index, level in enumerate(self.levels)}
        return {**maps, "pool": F.max_pool2d(maps["3"], 1, stride=2)}


class ViTDet(nn.Module):
    """Images (B, 3, S, S) to the maps of `Pyramid`. Raises ValueError for a grid that windows cannot tile."""

    def __init__(self, vit, channels, window, global_blocks):
        super().__init__()
        (side, _), (P, Q), depth = vit.grid, vit.patch_size, len(vit.blocks)
        if P != Q or P % 4 or side % 4 or side != vit.grid[1]:
            raise ValueError(f"strides from a quarter of a patch to four patches need square patches of 4, 8, "
                             f"12 ... pixels and --img_size a multiple of 4 patches, not patches of {P} x {Q} "
                             f"and {vit.img_size[0]} x {vit.img_size[1]} pixels")
        if side > window and side % window:
            fits = [size for size in range(2, side + 1) if side % size == 0]
            raise ValueError(f"windows of {window} do not tile the grid of {side} x {side} patches: give "
                             f"--window {' or '.join(map(str, fits))}")
        if vit.cls_token is not None:
            vit.cls_token.requires_grad_(False)  # it goes nowhere [D3]
        last = {round((number + 1) * depth / global_blocks) - 1 for number in range(global_blocks)}
        self.windows = [side if index in last else min(window, side) for index in range(depth)]
        self.vit, self.pyramid, self.out_channels = vit, Pyramid(vit.norm.weight.numel(), channels), channels

    def forward(self, images):
        grid = self.vit.grid
        x = self.vit.embed(images)[:, -grid[0] * grid[1]:]  # (B, N, D)
        for block, window in zip(self.vit.blocks, self.windows):
            x = windowed(block, x, grid, window)
        return self.pyramid(rearrange(self.vit.norm(x), "b (h w) d -> b d h w", h=grid[0]))


def roi_align(output_size, patch):
    """RoIAlign from the pyramid's first four maps: a box of 14 patches reads the map of stride P, and so on.

    For P = 16 that is torchvision's rule, which would guess strides from the images' sizes before padding.
    """
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size, sampling_ratio=2)
    pool.scales = [4 / patch, 2 / patch, 1 / patch, 0.5 / patch]
    pool.map_levels = LevelMapper(0, 3, canonical_scale=14 * patch, canonical_level=2)
    return pool


class Detector(MaskRCNN):
    """torchvision's Mask R-CNN on `ViTDet`, for images that are squares already; `encoder` is the ViT."""

    def __init__(self, vit, num_classes, config):
        C, P, K = config.channels, vit.patch_size[0], 1 + num_classes
        anchors = AnchorGenerator(tuple((8 * P * 2**level // 4,) for level in range(5)), ((0.5, 1.0, 2.0),) * 5)
        super().__init__(
            ViTDet(vit, C, config.window, config.global_blocks), rpn_anchor_generator=anchors,
            rpn_head=RPNHead(C, 3, conv_depth=2), box_roi_pool=roi_align(7, P),
            box_head=FastRCNNConvFCHead((C, 7, 7), [C] * 4, [4 * C], LayerNorm2d),
            box_predictor=FastRCNNPredictor(4 * C, K), box_batch_size_per_image=config.rois,
            rpn_post_nms_top_n_train=4 * config.rois, rpn_post_nms_top_n_test=2 * config.rois,
            rpn_pre_nms_top_n_train=4 * config.rois, rpn_pre_nms_top_n_test=2 * config.rois,
            box_detections_per_img=min(100, config.rois),
            mask_roi_pool=roi_align(14, P), mask_head=MaskRCNNHeads(C, [C] * 4, 1, LayerNorm2d),
            mask_predictor=MaskRCNNPredictor(C, C, K))

    @property
    def encoder(self):
        return self.backbone.vit

    def forward(self, images, targets):
        """Normalised images (B, 3, S, S) and their targets to losses by name (training), or to a list of
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
    """Linear from 0 to `peak`, then a tenth after 8/9 and a hundredth after 26/27 of the run: steps 163,889
    and 177,546 of 184,375 [F]."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * 0.1 ** ((step >= round(total_steps * 8 / 9)) + (step >= round(total_steps * 26 / 27)))


def layer_scales(model, decay):
    """{parameter name: factor of its learning rate}: decay^(depth + 1 - id), where the patch embedding has id
    0, block i has i + 1, and all after the blocks has depth + 1."""
    depth, scales = len(model.encoder.blocks), {}
    for name, _ in model.named_parameters():
        part, *rest = name.removeprefix("backbone.vit.").split(".")
        first = part in ("patch_embed", "cls_token", "pos_embed")
        scales[name] = decay ** (depth + 1 - (int(rest[0]) + 1 if part == "blocks" else 0 if first else depth + 1))
    return scales


def parameter_groups(model, weight_decay, layer_decay):
    """AdamW groups of the trainable parameters with equal weight decay and equal "scale" of the lr."""
    groups, scales = {}, layer_scales(model, layer_decay)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if common.decays(name, parameter) else 0.0
            group = groups.setdefault((scales[name], decay),
                                      dict(params=[], scale=scales[name], weight_decay=decay))
            group["params"].append(parameter)
    return list(groups.values())


# ------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def detect(model, images, indices, config, device):
    """Yields (target, detections on the CPU) for the images `indices` of a `CocoImages`."""
    model.eval()
    loader = torch.utils.data.DataLoader(Whole(images, indices, config.img_size), config.micro_batch or 8,
                                         num_workers=config.workers, collate_fn=collate)
    for batch in loader:
        inputs, targets = to_device(batch, device)
        with common.autocast(device, config.precision):
            detections = model(inputs, targets)
        for target, found in zip(targets, detections):
            yield target, {name: value.cpu() for name, value in found.items()}


def coco_results(target, found, category_ids):
    """The detections of one image as COCO's list of results."""
    mask = coco_tools()[2]
    pixels = rearrange(found["masks"] > 0.5, "n 1 h w -> h w n").byte().numpy()
    boxes = torch.cat([found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]], dim=1)  # (n, 4)
    return [dict(image_id=target["image_id"], category_id=category_ids[label - 1], bbox=box, score=score,
                 segmentation=code)
            for label, box, score, code in zip(found["labels"].tolist(), boxes.tolist(), found["scores"].tolist(),
                                               mask.encode(np.asfortranarray(pixels)))]


def coco_ap(truth, results):
    """COCO's AP, AP50 and AP75 in per cent, of boxes and of masks, by pycocotools."""
    COCO, COCOeval, _ = coco_tools()
    scores = {}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a table of everything
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        found = coco.loadRes(results) if results else None  # which takes no empty list
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            if found:
                evaluation = COCOeval(coco, found, kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            for place, measure in enumerate(("ap", "ap50", "ap75")):
                scores[f"{name}_{measure}"] = 100 * float(evaluation.stats[place]) if found else 0.0
    return scores


def evaluate(model, images, config, processes):
    """`coco_ap` of the whole set in the main process, None in the others; each detects in its share."""
    indices = range(processes.rank, len(images), processes.world)
    results = [result for target, found in detect(model, images, indices, config, processes.device)
               for result in coco_results(target, found, images.category_ids)]
    if processes.world > 1:
        shares = [None] * processes.world
        torch.distributed.all_gather_object(shares, results)
        results = [result for share in shares for result in share]
    return coco_ap(images.truth, results) if processes.main else None


def draw(path, model, images, config, device, count=6, side=256):
    """Draws a few images, evenly spaced over the set: truth above, detections of score 0.5 and more below."""
    indices, rows = range(0, len(images), max(1, len(images) // count))[:count], ([], [])
    for index, (_, found) in zip(indices, detect(model, images, indices, config, device)):
        image, truth = images[index]
        sure = found["scores"] >= 0.5
        boxes, labels, masks = (found[name][sure] for name in ("boxes", "labels", "masks"))
        scores = [f" {score:.2f}" for score in found["scores"][sure].tolist()]
        rows[0].append(panel(image, truth["boxes"], truth["labels"], truth["masks"] > 0, images.classes, side))
        rows[1].append(panel(image, boxes, labels, masks[:, 0] > 0.5, images.classes, side, scores))
    picture = TF.to_pil_image(make_grid(torch.stack(rows[0] + rows[1]), nrow=len(indices), pad_value=255))
    common.write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def panel(image, boxes, labels, masks, classes, side, notes=None):
    """One image (3, h, w) with its objects drawn on it, as (3, side, side), white where it has no pixels."""
    scale = side / max(image.shape[1:])
    size = [max(1, round(length * scale)) for length in image.shape[1:]]
    nearest = TF.InterpolationMode.NEAREST
    canvas = TF.resize(image, size, nearest if scale > 1 else BICUBIC, antialias=True)
    if len(boxes):
        colours = [tuple(int(255 * part) for part in common.colour_map(torch.tensor([[label / len(classes)]]))
                         .flatten()) for label in labels.tolist()]
        words = [classes[label - 1] + note
                 for label, note in zip(labels.tolist(), notes or [""] * len(labels))]
        canvas = draw_segmentation_masks(canvas, TF.resize(masks, size, nearest), alpha=0.4, colors=colours)
        canvas = draw_bounding_boxes(canvas, boxes * scale, words, colours, width=2, label_colors="white",
                                     fill_labels=True)
    return v2.Pad((0, 0, side - size[1], side - size[0]), fill=255)(canvas)


# ------------------------------------------------------------------------------------------------------------
# Train


def prepare(config, processes):
    """(path of the encoder's file, the ViT for this input size); only the main process reports on it."""
    with contextlib.nullcontext() if processes.main else contextlib.redirect_stdout(io.StringIO()):
        checkpoint, vit = open_checkpoint(config, drop_path_rate=config.drop_path)
    torch.manual_seed(config.seed)
    if config.random_init:
        vit = common.ViT(**vit.config, drop_path_rate=config.drop_path)
    return checkpoint, vit


def train(config, run, processes, started):
    """Fine-tuning from start to end, lr, forward, backward, step, log, save; then the evaluation."""
    device = processes.device
    checkpoint, vit = prepare(config, processes)
    images, val = CocoImages(config.data, "train"), CocoImages(config.data, "val")
    check_classes(images, val)
    plan = common.make_plan(len(images), config.batch_size, config.micro_batch, config.epochs, processes.world)
    model = Detector(vit, len(images.classes), config)
    if processes.main:
        describe(config, model, plan, processes, f"{images.name}: {len(images):,} images with objects of "
                 f"{len(images.classes)} classes; {val.name}: {len(val):,}", run.folder)
    if config.dry_run:
        return
    model.to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay, config.layer_decay), config.lr)
    samples = common.Samples(images, Jitter(config), config.seed)
    if common.uses_compile(device, config.compile):
        model.backbone.compile()
    start = run.begin(processes, plan, model, optimizer, len(images))
    parallel = model if processes.world == 1 else nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=True)
    warmup_steps = round(config.warmup_epochs * plan.steps_per_epoch)
    save_every = config.save_every or plan.steps_per_epoch
    batches = iter(common.training_loader(samples, plan, processes, config, start, run.stop, collate))

    model.train()
    for step in range(start, run.stop):
        lr = learning_rate(step, config.lr, warmup_steps, plan.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]

        for micro in range(plan.accumulation):
            inputs, targets = to_device(run.next_batch(batches), device)
            # torchvision draws anchors and proposals from the global generator; drop path draws too [D7].
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
            # With these, last.pt is all that --eval_only needs.
            run.save(model, optimizer, step + 1, encoder=vit.config, classes=list(images.classes))
            if processes.main:
                draw(run.folder / "preview.png", model, val, config, device)
            model.train()
        if stopping:
            break
    run.close()
    finish(model, val, config, processes, checkpoint, started, step=run.stop, train=images.name,
           train_images=len(images), random_init=config.random_init)


def finish(model, val, config, processes, checkpoint, started, **facts):
    """Evaluates, prints the result, and appends it to eval.jsonl beside `checkpoint`."""
    scores = evaluate(model, val, config, processes)
    if processes.main:
        append_result("detect", checkpoint, model.encoder, config, started, protocol="mask_rcnn_vitdet",
                      data=config.data, val=val.name, val_images=len(val), classes=len(val.classes), **facts,
                      **scores, seed=config.seed, device=str(processes.device))
        print("detection: " + ", ".join(
            f"{name} AP {scores[f'{name}_ap']:.1f}, AP50 {scores[f'{name}_ap50']:.1f}, AP75 "
            f"{scores[f'{name}_ap75']:.1f}" for name in ("box", "mask")))


# ------------------------------------------------------------------------------------------------------------
# Main


def gflops(model, config):
    """(GFLOP of encoder and pyramid, GFLOP of the heads) of a forward pass of one image in training."""
    meta, S, C = copy.deepcopy(model).to("meta").eval(), config.img_size, config.channels
    boxes, masks = (torch.empty(count, C, side, side, device="meta")
                    for count, side in ((config.rois, 7), (max(1, config.rois // 4), 14)))
    features = meta.backbone(torch.empty(1, 3, S, S, device="meta"))
    heads = meta.roi_heads
    return (common.count_flops(lambda: meta.backbone(torch.empty(1, 3, S, S, device="meta"))) / 1e9,
            common.count_flops(lambda: (meta.rpn.head(list(features.values())), heads.box_head(boxes),
                                        heads.mask_predictor(heads.mask_head(masks)))) / 1e9)


def describe(config, model, plan, processes, data, folder):
    """Prints the resolved recipe and its cost before anything is computed."""
    total, encoder = (sum(p.numel() for p in part.parameters()) for part in (model, model.encoder))
    body, heads = gflops(model, config)
    windows, side = model.backbone.windows, model.encoder.grid[0]
    print(f"model    {total:,} parameters, {encoder:,} of them in the encoder"
          f"{' (random weights)' if config.random_init else ''}; {side} x {side} patches, attention in windows "
          f"of {min(windows)} but for blocks {', '.join(str(i) for i, w in enumerate(windows) if w == side)}\n"
          f"data     {data}\n"
          f"lr       {config.lr:.2e} at the peak, times {config.layer_decay:g} per block below the heads\n"
          f"{common.describe(config, plan, processes, folder)}\n"
          f"cost     {body + heads:.1f} GFLOP per image forward, {heads:.1f} of them in the heads; a step "
          f"takes about {3 * plan.batch_size * (body + heads) / 1e3:,.1f} TFLOP", flush=True)


def restore(config):
    """--eval_only: (path, detector, its class names, config) of a last.pt, which holds all that is needed."""
    path = Path(config.checkpoint).expanduser()
    path = path / "last.pt" if path.is_dir() else path
    state = common.read_checkpoint(path)
    if state.get("kind") != "detection":
        raise ValueError(f"{path} is no detector: --eval_only takes the last.pt of a run of this script")
    own = {"checkpoint", "data", "out", "micro_batch", "workers", "precision", "device", "eval_only", "compile"}
    kept = {name: value for name, value in state["config"].items() if name not in own}
    for field in dataclasses.fields(config):
        given = getattr(config, field.name)
        if field.name in kept and given not in (field.default, kept[field.name]):
            raise ValueError(f"--{field.name} {given} was given, but the detector in {path} was trained with "
                             f"{kept[field.name]}: leave the flag out")
    config = dataclasses.replace(config, **kept)
    model = Detector(common.ViT(**state["encoder"]), len(state["classes"]), config)
    model.load_state_dict(state["model"])
    return path, model, state, config


def evaluate_file(config, processes, started):
    path, model, state, config = restore(config)
    val = CocoImages(config.data, "val")
    if list(val.classes) != state["classes"]:
        raise ValueError(f"the {len(val.classes)} classes of {val.name} are not the {len(state['classes'])} that "
                         f"{path} was trained on")
    model.to(processes.device)
    if processes.main:
        print(f"model    {path}, step {state['step']}\ndata     {val.name}: {len(val):,} images", flush=True)
        draw(path.with_name("detections.png"), model, val, config, processes.device)
    finish(model, val, config, processes, path, started, step=state["step"],
           random_init=config.random_init)


def main(argv=None):
    config, started = common.parse_config(Config, __doc__, demo=DEMO, argv=argv), time.perf_counter()
    coco_tools()  # says at once what is missing
    if config.eval_only:
        with common.processes(config.device) as processes:
            return evaluate_file(config, processes, started)
    run = common.Run("detect", config, config.out or "runs/detect", kind="detection")
    if run.finished:
        return print(f"the run in {run.folder}/ is finished, step {run.start}: --eval_only with --checkpoint "
                     f"{run.checkpoint} measures it again, --fresh starts anew")
    with common.processes(config.device) as processes:
        train(config, run, processes, started)


if __name__ == "__main__":
    common.run_main(main)
