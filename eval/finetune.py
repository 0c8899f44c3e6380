"""Fine-tuning: the encoder and a linear classifier on top, trained together by the recipe of each paper.

    python -m eval.finetune --checkpoint runs/cae_v2_vit_b --data ~/imagenet         one process
    torchrun --nproc_per_node=8 -m eval.finetune --checkpoint runs/cae_v2_vit_b      eight, the same recipe
    python -m eval.finetune --checkpoint mae_pretrain_vit_base.pth --recipe mae      any encoder's file
    python -m eval.finetune --checkpoint runs/cae_v2_vit_b --fraction 0.1            low-shot
    python -m eval.finetune --checkpoint runs/finetune_cae_v2_vit_b --eval_only      tests a run again

    image - crop, flip, RandAugment, erasing - mixup, cutmix - encoder - mean of patches, LayerNorm - linear

The recipe is the row of RECIPES for the checkpoint's method and width. Each of its values is also a flag,
which wins. The same command again resumes, on a CPU bit for bit. The accuracy on the validation images
(centre view, fp32) is in log.jsonl after each epoch, and at the end in eval.jsonl beside the checkpoint.

Sources: [C] Atten4Vis/CAE, [M] mmpretrain's MFF, [F] MFM's author's fork, [E] facebookresearch/mae,
[B] Beyond Masking's released code, [T] timm. Where they are silent or cannot be followed:
  [D1] CAE v2 ViT-L has no script: CAE v1's for ViT-L, the rest as CAE v2 ViT-B.
  [D2] MFM ViT-L and ViT-H, and all of `mae`: MAE's, which for ViT-B is MFM's own.
  [D3] Beyond Masking: 100 epochs (its default of 30 is almost surely overridden), batch 1024 (64 per GPU on
       its launcher's 16), mean of patches (no class token), positions trained (all that runs there).
  [D4] A width outside the table takes the row of the nearest width; the printed recipe says which.
  [D5] RandAugment is torchvision's on timm's scale (9 of 10): two operations, each with probability 1/2.
       Not as in timm: no noise on the strength (std 0.5 there), Identity instead of Invert and SolarizeAdd,
       a milder Posterize, bilinear moves.
  [D6] Mixup or cutmix is drawn per micro batch (theirs: per GPU) from (seed, step, row), like drop path:
       nothing else changes with the number of processes and --micro_batch.
  [D7] No gradient clipping and no EMA, as in all sources; with --ema the average is tested.
  [D8] A fraction is drawn within each class, from the seed, at least one image.
Dimension key: B batch, N patches, T tokens (N or 1+N), D width, K classes, H heads d wide, grid h x w."""

import dataclasses
import json
import time
import typing

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

if not __package__:  # started by its file name, Python does not find common.py
    raise SystemExit("error: start it in the folder of common.py as `python -m eval.finetune`")
import common
from common import flag
from eval.data import find_labelled, find_train_and_val
from eval.encoders import read_state
from eval.protocol import (
    MEAN_COLOUR, CentreViews, EvalConfig, append_result, centre_view, check_classes, check_finite,
    check_pool, fit, layer_groups, look_through, normalise, only_main_prints, open_checkpoint, open_run,
    random_encoder, set_drop_path, sha256, share_loader)

# ---- recipes: `lr` is absolute, `base_lr` is per 256 images --------------------------------------
SHARED = dict(batch_size=1024, min_lr=1e-6, warmup_epochs=5, weight_decay=0.05, drop_path=0.1, mixup=0.8,
              cutmix=1.0, smoothing=0.1, randaugment=9, erasing=0.25, crop_min=0.08, pool="mean",
              fc_norm="fresh", rel_pos_bias="off", positions="learned")
CAE = dict(SHARED, fc_norm="encoder", rel_pos_bias="on", positions="fixed")  # [C]
RECIPES = {
    "cae_v2": {
        "vit_ti": dict(CAE, lr=4e-3, epochs=100, layer_decay=0.85, drop_path=0.0, mixup=0.2, cutmix=0.0,
                       smoothing=0.0),  # [C]
        "vit_s": dict(CAE, lr=4e-4, epochs=200, warmup_epochs=20, layer_decay=0.75),  # [C]
        "vit_b": dict(CAE, lr=2e-4, epochs=100, layer_decay=0.75),  # [C]
        "vit_l": dict(CAE, lr=2e-3, epochs=50, batch_size=4096, layer_decay=0.75, drop_path=0.2)},  # [D1]
    "mfm_mae": {
        "vit_s": dict(SHARED, base_lr=5e-4, epochs=100, layer_decay=0.65),  # [F]
        "vit_b": dict(SHARED, base_lr=5e-4, epochs=100, layer_decay=0.65),  # [M] [E]
        "vit_l": dict(SHARED, base_lr=1e-3, epochs=50, layer_decay=0.75, drop_path=0.2),  # [E] [D2]
        "vit_h": dict(SHARED, base_lr=1e-3, epochs=50, layer_decay=0.75, drop_path=0.3)},  # [E] [D2]
    "beyond_masking": {"vit_b": dict(SHARED, base_lr=1e-3, epochs=100, layer_decay=0.75)}}  # [B] [D3]
RECIPES["mae"] = RECIPES["mfm_mae"]  # [D2]
WIDTHS = dict(vit_ti=192, vit_s=384, vit_b=768, vit_l=1024, vit_h=1280)


@dataclasses.dataclass(frozen=True)
class Config(EvalConfig, common.TrainConfig):
    """The whole command line; -1 and `recipe` stand for the recipe's value."""
    recipe: typing.Literal[("auto", *RECIPES)] = flag("auto", "whose; auto: as the checkpoint says")
    fraction: float = flag(1.0, "share of the training images of each class [D8]", positive=True)
    random_init: bool = flag(False, "random weights in an encoder of that shape: the baseline")
    out: str = flag("", "folder of the run (default: runs/finetune_NAME)")
    epochs: int = flag(-1, "passes over the data (default: by recipe, like the following)", positive=True)
    batch_size: int = flag(-1, "images per step over all processes", positive=True)
    lr: float = flag(-1, "peak learning rate, absolute", positive=True)
    min_lr: float = flag(-1, "learning rate at the end of the cosine")
    warmup_epochs: float = flag(-1, "epochs of linear warm-up from 0")
    layer_decay: float = flag(-1, "the rate of each layer, as a share of that of the next", positive=True)
    weight_decay: float = flag(-1, "AdamW; none on vectors, class token and positions")
    drop_path: float = flag(-1, "stochastic depth of the last block, rising linearly to it")
    mixup: float = flag(-1, "alpha of mixup; 0: none")
    cutmix: float = flag(-1, "alpha of cutmix; 0: none; with both, each has probability 1/2")
    smoothing: float = flag(-1, "label smoothing")
    randaugment: int = flag(-1, "strength of RandAugment, 1 to 10; 0: none [D5]")
    erasing: float = flag(-1, "probability that a rectangle is replaced by noise")
    crop_min: float = flag(-1, "smallest area of a random crop, as a share of the image", positive=True)
    pool: typing.Literal["recipe", "mean", "cls"] = flag("recipe", "patches, or class token")
    fc_norm: typing.Literal["recipe", "encoder", "fresh"] = flag("recipe", "where it starts")
    rel_pos_bias: typing.Literal["recipe", "on", "off"] = flag("recipe", "learnt, per block and offset")
    positions: typing.Literal["recipe", "fixed", "learned"] = flag("recipe", "whether the table is trained")
    ema: float = flag(0.0, "decay of an average of the weights, such as 0.9999; 0: none [D7]")
    eval_only: bool = flag(False, "only test the fine-tuned run that --checkpoint names")

    def __post_init__(self):
        super().__post_init__()
        for name in ("fraction", "layer_decay", "crop_min", "erasing", "smoothing"):
            if getattr(self, name) > 1:
                raise ValueError(f"--{name} {getattr(self, name):g} must be at most 1")
        if self.drop_path >= 1 or self.ema >= 1 or self.randaugment > 10:
            raise ValueError("--drop_path and --ema must be below 1, --randaugment at most 10")


def with_recipe(config, path, vit):
    """(config with the recipe's values where none were typed, name of the recipe, origin of the lr)."""
    method = read_state(path, config.key)[-1] if config.recipe == "auto" else config.recipe
    if method not in RECIPES:
        raise ValueError(f"{path} does not say which method trained it: give --recipe {', '.join(RECIPES)}")
    size = min(RECIPES[method], key=lambda size: abs(WIDTHS[size] - vit.config["embed_dim"]))  # [D4]
    recipe, origin = dict(RECIPES[method][size]), "absolute"
    typed = {name: getattr(config, name) for name in {*recipe, "lr"} - {"base_lr"}
             if getattr(config, name) not in (-1, "recipe")}
    base_lr, values = recipe.pop("base_lr", None), {**recipe, **typed}
    if "lr" not in values:
        values["lr"] = base_lr * values["batch_size"] / 256
        origin = f"{base_lr:g} x batch {values['batch_size']} / 256"
    config = dataclasses.replace(config, recipe=method, num_heads=vit.config["num_heads"], **values)
    if config.warmup_epochs >= config.epochs:
        raise ValueError(f"--warmup_epochs {config.warmup_epochs:g} is not shorter than the run")
    check_pool(config.pool, vit, path)
    return config, f"{method}, {size}", origin


# ---- model ---------------------------------------------------------------------------------------
class Classifier(nn.Module):
    """An encoder with a linear classifier: images (B, C, H, W) to logits (B, K).
    `pool="mean"`: mean of the last block's patch tokens, then `fc_norm`, which starts as a copy of the
    encoder's final norm (`fc_norm="encoder"`) or new; the final norm itself is not used. `pool="cls"`: the
    class token after the final norm. The head starts at N(0, 2e-5), which is the sources' truncated normal
    of 0.02 times 0.001 [C] [B] or of 2e-5 [M] [E]: they cut too far out to matter."""

    def __init__(self, vit, num_classes, pool="mean", fc_norm="fresh", rel_pos_bias=False):
        super().__init__()
        self.encoder, self.pool = vit, pool
        dim = vit.config["embed_dim"]
        if rel_pos_bias:
            for block in vit.blocks:
                block.attn = BiasedAttention(block.attn, vit.grid, vit.cls_token is not None)
        if pool == "mean":
            self.fc_norm = nn.LayerNorm(dim, eps=1e-6)
            if fc_norm == "encoder":
                self.fc_norm.load_state_dict(vit.norm.state_dict())
            vit.norm.requires_grad_(False)
        self.head = nn.Linear(dim, num_classes)
        nn.init.normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def features(self, images):
        """Images to the (B, D) vectors that the head reads."""
        if self.pool == "cls":
            return self.encoder(images)[:, 0]  # (B, D)
        N = self.encoder.grid[0] * self.encoder.grid[1]
        [tokens] = self.encoder.layers(images, [-1])  # (B, T, D)
        return self.fc_norm(tokens[:, -N:].mean(dim=1))  # (B, D)

    def forward(self, images):
        return self.head(self.features(images))  # (B, K)


class BiasedAttention(nn.Module):
    """An encoder's attention with a relative position bias: softmax(q k^T / sqrt(d) + bias) v [C].
    The bias is a learnt number per head and offset, zero at the start. `load_encoder` refuses its table."""

    def __init__(self, attention, grid, class_token):
        super().__init__()
        self.num_heads, self.qkv, self.proj = attention.num_heads, attention.qkv, attention.proj
        self.index = relative_positions(grid, class_token)  # (T, T)
        rows = int(self.index.max()) + 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, self.num_heads))

    def _apply(self, move, recurse=True):  # the index goes along, but is no buffer for processes to share
        self.index = move(self.index)
        return super()._apply(move, recurse)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.num_heads)
        bias = rearrange(self.relative_position_bias_table[self.index], "q k h -> h q k")  # (H, T, T)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))  # (B, H, T, d)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


def relative_positions(grid, class_token):
    """(T, T) row of the bias table for each (query, key) pair: the (2h-1)(2w-1) offsets of two patches in
    raster order, then, with a class token: from it to a patch, from a patch to it, from it to itself."""
    h, w = grid
    ids = torch.arange(h * w)
    down, right = (x[:, None] - x for x in (ids // w, ids % w))  # (N, N)
    index = (down + h - 1) * (2 * w - 1) + right + w - 1
    if class_token:
        offsets = (2 * h - 1) * (2 * w - 1)
        index = F.pad(index, (1, 0, 1, 0), value=offsets)  # (1+N, 1+N)
        index[1:, 0], index[0, 0] = offsets + 1, offsets + 2
    return index


def build(config, vit, num_classes):
    """The `Classifier` of a resolved configuration, its head drawn from the seed."""
    torch.manual_seed(config.seed)
    model = Classifier(vit, num_classes, config.pool, config.fc_norm, config.rel_pos_bias == "on")
    vit.pos_embed.requires_grad_(config.positions == "learned")
    set_drop_path(vit.blocks, config.drop_path)
    return model


def load_classifier(path):
    """(model, class names, content of last.pt, its path) of a run; with --ema the model is the average."""
    state, path = open_run(path, "finetuning")
    config = state["config"]
    model = Classifier(common.ViT(**state["encoder"]), len(state["classes"]), config["pool"],
                       rel_pos_bias=config["rel_pos_bias"] == "on")
    average = {name.removeprefix("module."): tensor for name, tensor in state.get("ema", {}).items()
               if name != "n_averaged"}
    model.load_state_dict(average or state["model"])
    return model.eval(), state["classes"], state, path


# ---- data and tests ------------------------------------------------------------------------------
class Augment:
    """A training sample: a uint8 image to a normalised float32 one of the encoder's size, and its label.
    Erasing writes N(0, 1) per pixel and channel [T], so images are normalised here already."""

    def __init__(self, config, size, mean=common.IMAGENET_MEAN, std=common.IMAGENET_STD):
        bicubic, bilinear = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
        steps = [v2.RandomResizedCrop(size, (config.crop_min, 1.0), interpolation=bicubic, antialias=True),
                 v2.RandomHorizontalFlip()]
        if config.randaugment:  # 11 steps from none to the largest strength: timm's scale [D5]
            operation = v2.RandAugment(1, config.randaugment, 11, interpolation=bilinear, fill=MEAN_COLOUR)
            steps += [v2.RandomApply([operation], p=0.5)] * 2
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std, inplace=True),
                  v2.RandomErasing(config.erasing, (0.02, 1 / 3), (0.3, 1 / 0.3), value="random")]
        self.steps = v2.Compose(steps)

    def __call__(self, image, label):
        return self.steps(image), label


def make_mix(config, num_classes):
    """A function of images (B, 3, H, W), labels (B,) to mixed images and targets, soft (B, K) if mixed."""
    kinds = [kind(alpha=alpha, num_classes=num_classes)
             for kind, alpha in ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)) if alpha]
    return v2.RandomChoice(kinds) if kinds else lambda images, labels: (images, labels)


def low_shot(images, config):
    """The training images that --fraction chooses, as an `Images` [D8]."""
    if config.fraction == 1:
        return images
    ids = []
    for label, name in enumerate(images.classes):
        members = (images.labels == label).nonzero()[:, 0]
        generator = torch.Generator().manual_seed(common.seed_for(config.seed, "fraction", name))
        order = torch.randperm(len(members), generator=generator)
        ids += members[order[: max(1, round(config.fraction * len(members)))]].tolist()
    ids.sort()
    source = images.files[ids] if images.pixels is None else images.pixels[ids]
    return common.Images(source, images.labels[ids], images.classes, images.name)


@torch.no_grad()
def predictions(model, views, batch_size, config, dist):
    """Yields (logits (B, K), labels (B,)) on the device for this process's share of uint8 `views`."""
    model.eval()
    for images, labels in share_loader(views, batch_size, config, dist):
        logits = model(normalise(images, model.encoder, dist.device))  # (B, K)
        yield check_finite(logits, "the classifier gives numbers"), labels.to(dist.device)


def evaluate(model, images, batch_size, config, dist):
    """Per cent of `images` with the right class first, and among the first five, over all processes."""
    counts = torch.zeros(3, dtype=torch.long, device=dist.device)
    views = CentreViews(images, model.encoder.img_size)
    for logits, labels in predictions(model, views, batch_size, config, dist):
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (B, 5)
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), torch.ones_like(labels).sum()])
    first, five, total = dist.all_reduce(counts).tolist()
    return dict(accuracy=100 * first / total, top5=100 * five / total)


def measured(folder):
    """{step: line} of the tests in a run's log.jsonl."""
    return {line["step"]: line for line in common.read_log(folder)[0] if "accuracy" in line}


# ---- train, main ---------------------------------------------------------------------------------
def preview(path, samples, mix, vit):
    """Draws a few training images as rows: centre view | augmented | augmented and mixed."""
    plain = common.Samples(samples.images, lambda image, _: (centre_view(image, vit.img_size), 0), seed=0)
    views, (images, labels) = common.preview_batch(plain)[0] / 255, common.preview_batch(samples)
    torch.manual_seed(0)
    augmented = (common.unnormalise(batch, vit.config["mean"], vit.config["std"])
                 for batch in (images, mix(images, labels)[0]))
    common.save_panels(path, list(zip(views, *augmented)), ["centre view", "augmented", "and mixed"],
                       "1st: as in tests.  3rd: as in training.")


def train(config, run, dist, vit, digest):
    """Fine-tuning with tests after each epoch. Returns the facts of the result line, at the end."""
    images, val, sets = find_train_and_val(config.data, vit.img_size[0])
    if not run.start:  # a bad test image is told before the training
        look_through(val, "reading", config, dist)
    images = low_shot(images, config)
    plan = common.make_plan(len(images), config.batch_size, config.micro_batch, config.epochs, dist.world)
    augment = Augment(config, vit.img_size, vit.config["mean"], vit.config["std"])
    samples, mix = common.Samples(images, augment, config.seed), make_mix(config, len(val.classes))
    criterion = nn.CrossEntropyLoss(label_smoothing=config.smoothing)
    model = build(config, vit, len(val.classes)).to(dist.device)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema else None
    if ema and run.state:
        ema.load_state_dict(run.state["ema"])
    tested = ema.module if ema else model  # [D7]
    common.compile_blocks(config, dist.device, vit.blocks)
    groups = layer_groups(model, vit, config.weight_decay, config.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
    data = sets if config.fraction == 1 else f"{len(images):,} of {sets}"
    common.describe(dict(model=f"{len(val.classes)} classes"), config, model, plan, dist, data, run.folder)
    run.begin(dist, plan, samples, model, optimizer)
    if dist.is_main:
        run.draw(lambda path: preview(path, samples, mix, vit))
    warmup_steps = round(config.warmup_epochs * plan.steps_per_epoch)
    if run.start and run.start % plan.steps_per_epoch == 0 and run.start not in measured(run.folder):
        test(tested, val, run.start, plan, config, run, dist)  # the run was killed between save and test

    def compute_loss(model, batch):
        views, labels = (part.to(dist.device, non_blocking=True) for part in batch)
        views, targets = mix(views, labels)  # [D6]
        with common.autocast(dist.device, config.precision):
            logits = model(views)  # (B, K)
        return criterion(logits.float(), targets), {}

    for step, lr, grad_norm in fit(
            config, run, dist, plan, model, optimizer, compute_loss, lambda step: common.learning_rate(
                step, config.lr, warmup_steps, plan.total_steps, config.min_lr)):
        if ema and not run.cut and grad_norm.isfinite():  # a step that was skipped changes nothing
            ema.update_parameters(model)
        if run.log(step, lr, grad_norm) and dist.is_main:
            run.save(model, optimizer, step, vit, classes=list(val.classes), encoder=vit.config,
                     encoder_sha256=digest, **(dict(ema=ema.state_dict()) if ema else {}))
        if step % plan.steps_per_epoch == 0 and not run.stopping:
            test(tested, val, step, plan, config, run, dist)
    last = measured(run.folder).get(plan.total_steps)
    return last and dict(
        accuracy=last["accuracy"], top5=last["top5"], train=images.name, val=val.name, world=dist.world,
        train_images=len(images), val_images=len(val), classes=len(val.classes), steps=plan.total_steps,
        micro_batch=plan.micro_batch, encoder_sha256=digest)


def test(model, val, step, plan, config, run, dist):
    """Tests after `step`; the main process writes a line to the log."""
    result = evaluate(model, val, plan.micro_batch, config, dist)
    line = dict(step=step, epoch=step / plan.steps_per_epoch, **result)
    if dist.is_main:
        with open(run.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        tqdm.write(f"epoch {line['epoch']:g}: top 1 {line['accuracy']:.2f} %, top 5 {line['top5']:.2f} % "
                   f"of {len(val):,} validation images")


def eval_only(config, dist, started):
    """--eval_only: the accuracy of a finished run, as a line of eval.jsonl beside its last.pt."""
    model, classes, state, path = load_classifier(config.checkpoint)
    val = find_labelled(config.data, "val", model.encoder.img_size[0], classes)
    check_classes(common.Images([], classes=classes, name=f"the classifier {path}"), val)
    result = evaluate(model.to(dist.device), val, config.micro_batch or 256, config, dist)
    if dist.is_main:
        append_result(
            "finetune", path, model.encoder, config, started, **result, step=state["step"], val=val.name,
            val_images=len(val), trained_as=state["config"], device=str(dist.device))
        print(f"fine-tuned classifier: {result['accuracy']:.2f} %, top 5 {result['top5']:.2f} % of "
              f"{len(val):,} images in {val.name}")


def run_or_resume(config, dist, started):
    """Fine-tunes, from the start or from where the run in --out stopped; appends the result line."""
    path, vit = open_checkpoint(config, own_norm=True)
    config, row, origin = with_recipe(config, path, vit)
    if "norm" in vit.assumed and (config.pool == "cls" or config.fc_norm == "encoder"):
        raise ValueError(f"{path} is a fine-tuned classifier without the encoder's final norm: give --pool "
                         "mean --fc_norm fresh, which need none")
    name = path.parent.name if path.name in ("encoder.safetensors", "last.pt") else path.stem
    if config.random_init:
        vit, name = random_encoder(vit, config.seed), name + "_random"
    run = common.Run("finetune", config, config.out or f"runs/finetune_{name}", kind="finetuning")
    digest = sha256(path)
    if run.state and run.state["encoder_sha256"] != digest:
        raise ValueError(f"{path} is not the file any more that the run in {run.folder} started from: "
                         "restore it, or give --fresh or --out")
    if run.finished and (run.start < run.state["total_steps"] or run.start in measured(run.folder)):
        return print(f"the run in {run.folder}/ is finished, step {run.start}; --fresh starts anew, "
                     f"--eval_only --checkpoint {run.folder} tests it again")
    print(f"recipe   {row}: lr {config.lr:.2e} ({origin}), times {config.layer_decay:g} per layer down\n"
          f"         {'  '.join(f'{name} {getattr(config, name)}' for name in SHARED)}")
    facts = train(config, run, dist, vit, digest)
    if dist.is_main and facts:
        append_result("finetune", path, vit, config, started, **facts, recipe=row, run=str(run.folder),
                      random_init=config.random_init, device=str(dist.device))
        print(f"{'trained from random weights' if config.random_init else 'fine-tuned'} on "
              f"{facts['train_images']:,} images: {facts['accuracy']:.2f} %, top 5 {facts['top5']:.2f} %")


def main(argv=None):
    config, started = common.parse_config(Config, __doc__, argv=argv), time.perf_counter()
    with common.distributed(config.device) as dist, only_main_prints(dist):
        (eval_only if config.eval_only else run_or_resume)(config, dist, started)


if __name__ == "__main__":
    common.run_main(main)
