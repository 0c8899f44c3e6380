"""Linear probe: how well does a linear classifier read the classes from frozen features?

    python -m eval.linear_probe --checkpoint mae_pretrain_vit_base.pth --data ~/imagenet
    torchrun --nproc_per_node=8 -m eval.linear_probe --checkpoint runs/cae_v2_vit_b --sweep 0.05,0.1,0.2
    python -m eval.linear_probe --checkpoint runs/cae_v2_demo --data scenes --protocol ridge

`--protocol lars`, the default, is the papers' one. [code]: the authors' code of CAE v2; MFM and MAE agree.

    feature     class token after the encoder's final norm (`--pool mean`: mean of the patch tokens)
    classifier  BatchNorm without affine, eps 1e-6, then a linear layer, weights N(0, 0.01), biases 0
    training    LARS, momentum 0.9, trust 0.001, no weight decay; cross-entropy; batch 16384; 90 epochs,
                10 of warm-up; lr = 0.1 x batch / 256 = 6.4, cosine to 0, per step (CAE v2 S, B: 8192)
    images      a random crop of 8 to 100 % of the area, bicubic, and a flip; in tests `centre_view`

The encoder never changes. The run's folder is `--out`, or linear_probe beside the checkpoint: the same
command goes on after an interruption; a finished run is only tested again.
`--attentive` is CAE's attentive probe: one learnable query attends to all tokens, then the same classifier.
`--sweep` trains a classifier per base learning rate; the best is chosen on the validation images.
`--protocol ridge` takes seconds: no augmentation, a classifier in closed form (eval/ridge.py), by default
the mean of the patch tokens, the baseline beside it. Its numbers can be compared only with each other.

Our decisions, where the sources are silent:
  [D1] BatchNorm sees the whole global batch: every process gathers all features and computes the same step,
       so the number of processes or micro batches changes no result.
  [D2] Warm-up is linear, from 0 in its first step to the peak in its last one.
  [D3] An encoder without class token is probed by the mean of its patch tokens.
  [D4] Of the attentive probe only the idea is known. Ours has the encoder's heads, no biases, no output
       projection, and the recipe above. It keeps a step's tokens: 10 GB for ViT-B and 16384 images.
  [D5] One test, where training ends: no epoch is chosen by looking at the validation images.
Dimension key: B global batch, A micro batches of m images in each of R processes, N patches, D width,
H heads, d = D / H, K classes, n images, h x w size of an image."""

import dataclasses
import math
import time
import typing

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.transforms.v2 import functional as TF

if not __package__:  # started by its file name, Python does not find common.py
    raise SystemExit("error: start it in the folder of common.py as `python -m eval.linear_probe`")
import common
from common import flag
from eval.data import find_train_and_val
from eval.protocol import (
    EvalConfig, all_gather, append_result, check_finite, check_pool, frozen_tokens, look_through, normalise,
    only_main_prints, open_checkpoint, pool_tokens, random_encoder, sha256)
from eval.ridge import RIDGE, ridge_probe


@dataclasses.dataclass(frozen=True)
class Config(EvalConfig, common.TrainConfig):
    """The whole command line."""
    protocol: typing.Literal["lars", "ridge"] = flag("lars", "the papers', or the fast one in closed form")
    pool: typing.Literal["auto", "cls", "mean"] = flag(
        "auto", "class token or mean of the patch tokens; auto: lars class token [code], ridge mean")
    attentive: bool = flag(False, "attention with a learnable query over all tokens before the classifier")
    sweep: str = flag("", "several base learning rates at once, as in 0.05,0.1,0.2")
    random_init: bool = flag(False, "probe a random encoder of the same shape: the baseline")
    epochs: int = flag(90, "passes over the images [code]", positive=True)
    batch_size: int = flag(16384, "global batch of a training step [code]", positive=True)
    lr: float = flag(0.1, "base learning rate, for a batch of 256 [code]", positive=True)
    warmup_epochs: float = flag(10.0, "epochs of linear warm-up [code]")

    def __post_init__(self):
        super().__post_init__()
        training = ("attentive", "sweep", "random_init", "epochs", "batch_size", "lr", "warmup_epochs",
                    "out", "compile", "save_every", "max_steps", "log_every", "fresh")
        given = [name for name in training if getattr(self, name) != getattr(Config, name)]
        if self.protocol == "ridge" and given:
            raise ValueError(f"--{given[0]} belongs to --protocol lars, ridge has nothing to set")
        if self.attentive and self.pool != "auto":
            raise ValueError(f"--pool {self.pool} and --attentive exclude each other: attention pools")
        rates = self.base_rates
        if not all(0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
            raise ValueError(f"--sweep {self.sweep} must be different numbers above 0, as in 0.05,0.1,0.2")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"--warmup_epochs {self.warmup_epochs:g} must be below --epochs {self.epochs}")

    @property
    def base_rates(self):
        """The base learning rate of each probe."""
        return [float(word) for word in self.sweep.split(",")] if self.sweep else [self.lr]


class CropAndFlip:
    """A training view: uint8 (3, h, w) and label to (3, *size) and label."""

    def __init__(self, size):
        self.size = list(size)

    def __call__(self, image, label):
        box = random_box(*image.shape[1:])
        view = TF.resized_crop(image, *box, self.size, TF.InterpolationMode.BICUBIC, antialias=True)
        return (TF.horizontal_flip(view) if torch.rand(()) < 0.5 else view), label


def random_box(height, width, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """(top, left, height, width) of a random crop: its share of the area and the logarithm of its aspect
    are uniform. One draw: where torchvision would draw again, a side that is too long is cut [code]."""
    area = height * width * torch.empty(1).uniform_(*scale).item()
    aspect = math.exp(torch.empty(1).uniform_(math.log(ratio[0]), math.log(ratio[1])).item())
    w, h = min(round(math.sqrt(area * aspect)), width), min(round(math.sqrt(area / aspect)), height)
    top, left = (torch.randint(0, space + 1, (1,)).item() for space in (height - h, width - w))
    return top, left, h, w


class AttentivePool(nn.Module):
    """Tokens (..., [1+]N, D) to (..., D): cross-attention of one learnable query, with H heads [D4]. One
    query needs no keys and values of single tokens: q (K x) = (K^T q) x and sum a (V x) = V (sum a x)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.query = nn.Parameter(torch.empty(num_heads, dim // num_heads))  # (H, d)
        self.key, self.value = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        common.xavier_init(self)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, tokens):
        H, d = self.query.shape
        key, value = (rearrange(layer.weight, "(h d) c -> h d c", h=H)
                      for layer in (self.key, self.value))  # (H, d, D)
        query = torch.einsum("hd,hdc->hc", self.query, key) / math.sqrt(d)  # (H, D)
        attention = (tokens @ query.T).softmax(dim=-2)  # (..., [1+]N, H)
        means = attention.transpose(-1, -2) @ tokens  # (..., H, D)
        return torch.einsum("...hc,hdc->...hd", means, value).flatten(-2)  # (..., D)


class Probe(nn.Module):
    """The classifier: [attention,] BatchNorm without affine, linear layer [code]."""

    def __init__(self, vit, num_classes, attentive, seed):
        super().__init__()
        dim = vit.config["embed_dim"]
        torch.manual_seed(common.seed_for(seed, "probe"))  # the probes of a sweep start alike
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        self.attention = AttentivePool(dim, vit.config["num_heads"]) if attentive else nn.Identity()

    def forward(self, features, dist):
        """Features (A, m, D), or tokens (A, m, [1+]N, D), to the logits (B, K) of all processes [D1]."""
        features = self.attention(features)  # (A, m, D)
        A, R = len(features), dist.world
        with torch.no_grad():
            gathered = all_gather(features, A * R, dist).clone()  # (A*R, m, D)
        gathered[dist.rank::R] = features  # through its own rows the gradient reaches the attention
        return self.linear(self.norm(gathered.flatten(0, 1)))  # (B, K)

    def predict(self, features):
        """Features (n, D), or tokens (n, [1+]N, D) for attention, to classes (n,)."""
        return self.linear(self.norm(self.attention(features))).argmax(dim=1)


class Lars(torch.optim.Optimizer):
    """LARS [code]: SGD with momentum, in which a matrix's gradient is scaled to its own length,

        g <- g * trust |p| / |g|    for matrices, where neither length is zero; vectors keep theirs
        m <- momentum m + g,        p <- p - lr m

    The |g| + weight decay |p| of the paper's formula is |g| here: the probe has no weight decay."""

    def __init__(self, params, lr, momentum=0.9, trust=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                g, momentum = p.grad, self.state[p].setdefault("momentum", torch.zeros_like(p))
                if p.ndim > 1:
                    ratio = group["trust"] * p.norm() / g.norm()  # zero, infinite or NaN without a length
                    g = g * torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0)
                momentum.mul_(group["momentum"]).add_(g)
                p.sub_(group["lr"] * momentum)


def train(config, vit, pool, probes, images, run, dist, digest):
    """Trains one probe per base learning rate on the same features; goes on after an interruption."""
    if run.state and run.state["sha256"] != digest:
        raise ValueError(f"the checkpoint has changed since {run.folder} started: give --fresh or --out")
    plan = common.make_plan(len(images), config.batch_size, config.micro_batch, config.epochs, dist.world)
    peaks = [rate * plan.batch_size / 256 for rate in config.base_rates]
    names = [f"loss_{rate:g}" for rate in config.base_rates] if config.sweep else ["loss"]
    optimizer = Lars([dict(params=probe.parameters()) for probe in probes], lr=0.0)
    lr = ", ".join(f"{rate:g} x {plan.batch_size} / 256 = {peak:g}"
                   for rate, peak in zip(config.base_rates, peaks))
    print(f"probe    {'random' if config.random_init else 'pre-trained'} encoder, pool {pool}\n"
          f"lr       {lr}\nbatch    {plan.batch_size} = {dist.world} processes x {plan.accumulation} micro "
          f"batches x {plan.micro_batch} images\nsteps    {plan.total_steps} = {config.epochs} epochs x "
          f"{plan.steps_per_epoch}\nfiles    {run.folder}/: config.json, log.jsonl, last.pt", flush=True)
    run.begin(dist, plan, common.Samples(images, CropAndFlip(vit.img_size), config.seed), probes, optimizer)
    warmup_steps = round(config.warmup_epochs * plan.steps_per_epoch)
    vit.eval().to(dist.device)
    common.compile_blocks(config, dist.device, vit)
    probes.train()

    for step in run.steps():
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = common.learning_rate(step, peak, warmup_steps, plan.total_steps)  # [D2]
        features, labels = [], []
        for views, micro_labels in run.micro_batches(whole=True):
            with torch.no_grad(), common.autocast(dist.device, config.precision):
                tokens = vit(normalise(views, vit, dist.device))  # (m, [1+]N, D)
            features.append(check_finite(pool_tokens(tokens.float(), pool, math.prod(vit.grid))))
            labels.append(micro_labels)
        features = torch.stack(features)  # (A, m, D) or (A, m, [1+]N, D)
        labels = torch.stack(labels).to(dist.device)  # (A, m)
        labels = all_gather(labels, plan.accumulation * dist.world, dist).flatten()  # (B,)
        losses = [F.cross_entropy(probe(features, dist), labels) for probe in probes]
        sum(losses).backward()  # no probe's loss depends on another's weights
        for name, parameter in probes.named_parameters():
            if "attention" in name:  # its gradient is of this process's images, the linear layer's of all
                dist.all_reduce(parameter.grad)
        run.record(**dict(zip(names, losses)))
        grad_norm = nn.utils.get_total_norm([p.grad for p in probes.parameters()])
        if run.may_step(optimizer, grad_norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if run.log(step + 1, optimizer.param_groups[0]["lr"], grad_norm) and dist.is_main:
            run.save(probes, optimizer, step + 1, sha256=digest)


@torch.no_grad()
def accuracies(config, vit, pool, probes, images, dist):
    """Per cent of `images` that each probe gets right."""
    probes.eval()
    right = torch.zeros(len(probes), device=dist.device)
    for features, labels in frozen_tokens(vit, images, config.micro_batch or 256, config, dist, pool):
        labels = labels.to(dist.device)
        right += torch.stack([probe.predict(features).eq(labels).sum() for probe in probes])
    return [100 * count / len(images) for count in dist.all_reduce(right).tolist()]


def lars_probe(config, vit, pool, digest, images, val, run, dist):
    """Trains and tests; returns the facts for the result line, and a line to print."""
    probes = nn.ModuleList(Probe(vit, len(images.classes), config.attentive, config.seed)
                           for _ in config.base_rates).to(dist.device)
    train(config, vit, pool, probes, images, run, dist, digest)
    reached = accuracies(config, vit, pool, probes, val, dist)  # [D5]
    percent = {f"{rate:g}": value for rate, value in zip(config.base_rates, reached)}
    best, weights = max(percent, key=percent.get), "random init" if config.random_init else "pre-trained"
    facts = dict(features="augmented anew every epoch", weights=weights, accuracy=percent[best],
                 base_lr=float(best), step=run.stop, total_steps=run.plan.total_steps)
    line = f"linear probe (lars): {weights} {percent[best]:.1f} %"
    if config.sweep:
        facts |= dict(accuracies=percent, chosen="base_lr, on the validation images")
        each = ", ".join(f"{rate}: {value:.1f} %" for rate, value in percent.items())
        line += f" at base lr {best}, the best on the validation images of {each}"
    return facts, line


def main(argv=None):
    config, started = common.parse_config(Config, __doc__, argv=argv), time.perf_counter()
    checkpoint, vit = open_checkpoint(config)
    lars, folder = config.protocol == "lars", config.out or checkpoint.parent / "linear_probe"
    run = common.Run("linear_probe", config, folder, "linear_probe") if lars else None
    check_pool(config.pool, vit, checkpoint)
    usual = "cls" if lars and vit.cls_token is not None else "mean"  # [D3]
    pool = "attention" if config.attentive else usual if config.pool == "auto" else config.pool
    images, val, sets = find_train_and_val(config.data, vit.img_size[0])
    with common.distributed(config.device) as dist, only_main_prints(dist):
        common.say(f"data     {sets}")
        if lars:
            if not run.start:  # a bad test image is told before the training
                look_through(val, "reading", config, dist)
            encoder = random_encoder(vit, config.seed) if config.random_init else vit
            facts, line = lars_probe(config, encoder, pool, sha256(checkpoint), images, val, run, dist)
        else:
            random, ours = (ridge_probe(encoder, images, val, pool, config, dist)
                            for encoder in (random_encoder(vit, config.seed), vit))
            facts = dict(features="cached features, no augmentation", ridge=RIDGE, random_init=random,
                         accuracy=ours)
            line = f"linear probe: random init {random:.1f} %, pre-trained {ours:.1f} %"
        if dist.is_main:
            append_result(
                "linear_probe", checkpoint, vit, config, started, protocol=config.protocol, pool=pool,
                data=config.data, train=images.name, val=val.name, train_images=len(images),
                val_images=len(val), classes=len(val.classes), **facts, device=str(dist.device))
            print(line)


if __name__ == "__main__":
    common.run_main(main)
