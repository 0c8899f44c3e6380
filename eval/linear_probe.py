"""Linear probe: how well a linear classifier reads the classes off frozen features.

    python -m eval.linear_probe --checkpoint mae_pretrain_vit_base.pth --data ~/imagenet
    torchrun --nproc_per_node=8 -m eval.linear_probe --checkpoint runs/cae_v2_vit_b --sweep 0.05,0.1,0.2
    python -m eval.linear_probe --checkpoint runs/cae_v2_demo --data scenes --protocol ridge

`--protocol lars`, the default, is the papers' protocol ([code] of CAE v2; MFM and MAE have the same):

    feature     class token after the encoder's final norm (`--pool mean`: mean of the patch tokens)
    classifier  BatchNorm without affine, eps 1e-6, then a linear layer, weights N(0, 0.01), biases 0
    training    LARS, momentum 0.9, trust 0.001, no weight decay; cross-entropy; batch 16384; 90 epochs, 10 of
                warm-up; lr = 0.1 x batch / 256 = 6.4, cosine to 0, per step (CAE v2 S, B: batch 8192)
    images      a random crop of 8 to 100 % of the area, bicubic, and a flip; in tests `protocol.centre_view`

The encoder is in eval mode and no byte of it changes. A run is a folder (`--out`) like one of pre-training:
killed, it goes on from its last epoch by the same command; finished, the same command only tests it again.

`--attentive` is CAE's attentive probe: one learnable query attends to all tokens, then the same classifier.
`--sweep 0.05,0.1,0.2` trains a classifier for each of these base rates on the same features; the best of
them is chosen on the validation images, and the result line says so. `--random_init` probes a random
encoder of the same shape: the floor.

`--protocol ridge` takes seconds where that takes hours: cached features, no augmentation, a classifier in
closed form (eval/ridge.py), of the random encoder too. Its numbers compare with one another only. There the
mean of the patch tokens is the default, which every encoder has and every method trains.

Where the sources are silent:

  [D1] BatchNorm sees the whole global batch: all processes gather all features and compute the same step, so
       a number of processes or micro batches changes no result. (Of the authors' it is only known that the
       statistics are those of a training batch.)
  [D2] Warm-up is `common.learning_rate`'s: zero in the first step, the peak in the last one of the warm-up.
  [D3] An encoder without class token is probed by the mean of its patch tokens.
  [D4] Of CAE's attentive probe only the idea is at hand: a cross-attention with a learnable query before the
       classifier. Here it has the encoder's number of heads, keys and values without bias, no output
       projection (the classifier is one), sees the class token too, and trains by the recipe above. The
       tokens of a step stay in memory, at ViT-B 10 GB for 16384 images, shared by the processes.
  [D5] Tested once, after the last epoch: no epoch is chosen by looking at the validation images.

Dimension key: B global batch, A micro batches of m images, N patches, D width, H heads, d = D / H, K classes,
n images.
"""

import dataclasses
import math
import sys
import time
import typing

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.transforms.v2 import functional as TF

import common
from common import flag
from eval.protocol import (EvalConfig, append_result, check_classes, check_finite, check_pool, frozen_tokens,
                           gather, open_checkpoint, pool_tokens, random_encoder, sha256)
from eval.ridge import RIDGE, ridge_probe

# Flags of the papers' protocol, in which the fast one has no part.
LARS_FLAGS = ("attentive", "sweep", "random_init", "out", "fresh", "epochs", "batch_size", "lr",
              "warmup_epochs")


@dataclasses.dataclass(frozen=True)
class Config(EvalConfig):
    """The whole command line."""

    protocol: typing.Literal["lars", "ridge"] = flag("lars", "the papers', or the fast one in closed form")
    pool: typing.Literal["auto", "cls", "mean"] = flag(
        "auto", "class token or mean of the patch tokens; auto: lars class token [code], ridge mean")
    attentive: bool = flag(False, "attention with a learnable query over all tokens before the classifier")
    sweep: str = flag("", "several base learning rates at once, as in 0.05,0.1,0.2")
    random_init: bool = flag(False, "probe a random encoder of the same shape: the floor")
    out: str = flag("", "folder of the run (default: linear_probe beside the checkpoint)")
    fresh: bool = flag(False, "start a new numbered folder instead of going on with the run")
    epochs: int = flag(90, "passes over the images [code]")
    batch_size: int = flag(16384, "global batch of a training step [code]")
    micro_batch: int = flag(0, "images encoded at once (default: a process's share, at most 256)")
    lr: float = flag(0.1, "base learning rate, for a batch of 256 [code]")
    warmup_epochs: float = flag(10.0, "epochs of linear warm-up [code]")

    # What `common.Run` asks for and a probe has no flag for.
    max_steps = 0
    log_every = 10

    def __post_init__(self):
        super().__post_init__()
        common.check_range(self, 1, "epochs")
        common.check_range(self, 0, "micro_batch", "warmup_epochs")
        common.check_range(self, None, "lr")
        given = [name for name in LARS_FLAGS if getattr(self, name) != getattr(Config, name)]
        if self.protocol == "ridge" and given:
            raise ValueError(f"--{given[0]} belongs to --protocol lars, ridge has nothing to set")
        if self.attentive and self.pool != "auto":
            raise ValueError(f"--pool {self.pool} and --attentive exclude each other: attention pools")
        self.base_rates  # read once, so that a wrong one is told now

    @property
    def base_rates(self):
        try:
            rates = [float(word) for word in self.sweep.split(",")] if self.sweep else [self.lr]
        except ValueError:
            rates = [0.0]
        if not all(0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
            raise ValueError(f"--sweep {self.sweep} must be different numbers above 0, as in 0.05,0.1,0.2")
        return rates


# --------------------------------------------------------------------------------------------------
# the papers' protocol: images, classifier, optimiser


class CropAndFlip:
    """A training view: uint8 (3, h, w) and label to (3, *size) and label."""

    def __init__(self, size):
        self.size = list(size)

    def __call__(self, image, label):
        view = TF.resized_crop(image, *random_box(*image.shape[1:]), self.size,
                               TF.InterpolationMode.BICUBIC, antialias=True)
        return (TF.horizontal_flip(view) if torch.rand(()) < 0.5 else view), label


def random_box(height, width, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """(top, left, height, width) of a random crop: its share of the area and the logarithm of its aspect are
    uniform. One draw: where torchvision would draw again, a side that is too long is cut [code]."""
    area = height * width * torch.empty(1).uniform_(*scale).item()
    aspect = math.exp(torch.empty(1).uniform_(math.log(ratio[0]), math.log(ratio[1])).item())
    w = min(round(math.sqrt(area * aspect)), width)
    h = min(round(math.sqrt(area / aspect)), height)
    top = torch.randint(0, height - h + 1, (1,)).item()
    left = torch.randint(0, width - w + 1, (1,)).item()
    return top, left, h, w


class AttentivePool(nn.Module):
    """Tokens (..., 1+N, D) to (..., D): cross-attention of one learnable query, with H heads [D4].

    One query needs no keys or values of single tokens: per head q (K x) = (K^T q) x, sum a V x = V sum a x.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        self.query = nn.Parameter(torch.empty(num_heads, dim // num_heads))  # (H, d)
        self.key, self.value = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        common.xavier_init(self)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, tokens):
        H, d = self.query.shape
        key, value = (rearrange(layer.weight, "(h d) c -> h d c", h=H) for layer in (self.key, self.value))
        question = torch.einsum("hd,hdc->hc", self.query, key) / math.sqrt(d)  # (H, D)
        attention = (tokens @ question.T).softmax(dim=-2)  # (..., 1+N, H)
        means = attention.transpose(-1, -2) @ tokens  # (..., H, D)
        return torch.einsum("...hc,hdc->...hd", means, value).flatten(-2)  # (..., D)


class Probe(nn.Module):
    """The classifier: [attention,] BatchNorm without affine, linear layer [code]."""

    def __init__(self, vit, num_classes, attentive, seed):
        super().__init__()
        dim = vit.config["embed_dim"]
        torch.manual_seed(seed)  # so the probes of a sweep start alike, and as without a sweep
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        self.attention = AttentivePool(dim, vit.config["num_heads"]) if attentive else None

    def forward(self, features, processes):
        """This process's features (A, m, D), tokens (A, m, 1+N, D) if attentive, to the logits (B, K) of all
        processes' images [D1]."""
        if self.attention is not None:
            features = self.attention(features)  # (A, m, D)
        A = len(features)
        with torch.no_grad():
            everything = gather(features, A * processes.world, processes).clone()  # (A * world, m, D)
        everything[processes.rank::processes.world] = features  # these rows lead back to the attention
        return self.linear(self.norm(everything.flatten(0, 1)))  # (B, K)

    def share_gradients(self, processes):
        """The classifier's gradients are whole in every process; the attention's are of its own images."""
        if self.attention is not None:
            for parameter in self.attention.parameters():
                processes.sum(parameter.grad)

    def predict(self, features):
        """Features (B, D), or tokens (B, 1+N, D) if attentive, to classes (B,)."""
        features = features if self.attention is None else self.attention(features)
        return self.linear(self.norm(features)).argmax(dim=1)


class Lars(torch.optim.Optimizer):
    """LARS [code]: SGD with momentum, in which a matrix's gradient is scaled to its own length,

        g <- g * trust |p| / |g|    for matrices, where neither length is zero; vectors keep theirs
        m <- momentum m + g
        p <- p - lr m

    The |g| + weight decay |p| of the paper's formula is |g| here: the probe has no weight decay.
    """

    def __init__(self, params, lr, momentum=0.9, trust=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                g, state = p.grad, self.state[p]
                if p.ndim > 1:
                    ratio = group["trust"] * p.norm() / g.norm()  # zero, infinite or NaN without a length
                    g = g * torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0)
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(g)
                p.sub_(group["lr"] * state["momentum"])


# --------------------------------------------------------------------------------------------------
# the papers' protocol: training and testing


def encode(vit, batch, pool, config, processes):
    """uint8 views (m, 3, H, W) to features (m, D), or tokens (m, 1+N, D) for attention; without gradient."""
    with torch.no_grad(), common.autocast(processes.device, config.precision):
        tokens = vit(common.normalise(batch.to(processes.device, non_blocking=True)))  # (m, [1+]N, D)
    return check_finite(pool_tokens(tokens.float(), pool, math.prod(vit.grid)))


def train(config, vit, pool, probes, images, run, processes, digest):
    """Trains one probe per base learning rate on the same features; goes on where a run was interrupted."""
    plan = common.make_plan(len(images), config.batch_size, config.micro_batch, config.epochs,
                            processes.world)
    if run.state and run.state["sha256"] != digest:
        raise ValueError(f"the checkpoint has changed since the run in {run.folder} started: give --fresh, "
                         "or another --out, for a new run")
    peaks = [rate * plan.batch_size / 256 for rate in config.base_rates]
    optimizer = Lars([dict(params=probe.parameters()) for probe in probes], lr=0.0)
    if processes.main:
        describe(config, plan, pool, images, peaks, processes, run.folder)
    start = run.begin(processes, plan, probes, optimizer, len(images))
    samples = common.Samples(images, CropAndFlip(vit.img_size), config.seed)
    batches = iter(common.training_loader(samples, plan, processes, config, start, plan.total_steps))
    warmup_steps = round(config.warmup_epochs * plan.steps_per_epoch)
    names = [f"loss_{rate:g}" for rate in config.base_rates] if config.sweep else ["loss"]

    vit.eval().to(processes.device)
    probes.train()
    for step in range(start, plan.total_steps):
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = common.learning_rate(step, peak, warmup_steps, plan.total_steps)

        features, labels = [], []
        for _ in range(plan.accumulation):
            views, some = run.next_batch(batches)
            features.append(encode(vit, views, pool, config, processes))
            labels.append(some)
        features = torch.stack(features)  # (A, m, D), for attention (A, m, 1+N, D)
        labels = torch.stack(labels).to(processes.device)  # (A, m)
        labels = gather(labels, plan.accumulation * processes.world, processes).flatten()  # (B,)
        losses = [F.cross_entropy(probe(features, processes), labels) for probe in probes]
        sum(losses).backward()  # no probe's loss depends on another's weights
        for probe in probes:
            probe.share_gradients(processes)
        run.record(**dict(zip(names, losses)))

        grad_norm = nn.utils.get_total_norm([p.grad for p in probes.parameters()])
        run.update(optimizer, grad_norm)
        run.log(step + 1, optimizer.param_groups[0]["lr"], grad_norm)
        stopping = run.stopping()
        if (step + 1) % plan.steps_per_epoch == 0 or stopping:
            run.save(probes, optimizer, step + 1, sha256=digest)
        if stopping:
            run.close()
            sys.exit(1)  # in a process that agreed to stop and has not been asked itself
    run.close()


def describe(config, plan, pool, images, peaks, processes, folder):
    """Prints the resolved recipe, with its numbers as equations."""
    rates = ", ".join(f"{rate:g} x {plan.batch_size} / 256 = {peak:g}"
                      for rate, peak in zip(config.base_rates, peaks))
    print(f"probe    LARS, pool {pool}, {'random' if config.random_init else 'pre-trained'} encoder\n"
          f"data     {len(images):,} images of {len(images.classes)} classes in {images.name}\n"
          f"lr       {rates}\n"
          f"batch    {plan.batch_size} = {processes.world} processes x {plan.accumulation} micro batches x "
          f"{plan.micro_batch} images\n"
          f"steps    {plan.total_steps} = {config.epochs} epochs x {plan.steps_per_epoch}, "
          f"{config.warmup_epochs:g} epochs of warm-up\n"
          f"files    {folder}/: config.json, log.jsonl, last.pt", flush=True)


@torch.no_grad()
def accuracies(config, vit, pool, probes, images, processes):
    """Per cent of `images` that each probe gets right."""
    probes.eval()
    right = torch.zeros(len(probes), device=processes.device)
    for tokens, labels in frozen_tokens(vit, images, config.micro_batch or 256, config, processes):
        features, labels = pool_tokens(tokens, pool, math.prod(vit.grid)), labels.to(processes.device)
        right += torch.stack([probe.predict(features).eq(labels).sum() for probe in probes])
    return [100 * count / len(images) for count in processes.sum(right).tolist()]


def lars_probe(config, vit, pool, digest, images, val, run, processes):
    """Trains and tests; gives the facts for the result line, and a line to print."""
    seed = common.seed_for(config.seed, "probe")
    probes = nn.ModuleList(Probe(vit, len(images.classes), pool == "attention", seed)
                           for _ in config.base_rates).to(processes.device)
    train(config, vit, pool, probes, images, run, processes, digest)
    reached = accuracies(config, vit, pool, probes, val, processes)
    percent = {f"{rate:g}": value for rate, value in zip(config.base_rates, reached)}
    best = max(percent, key=percent.get)
    weights = "random init" if config.random_init else "pre-trained"
    facts = dict(features="augmented anew every epoch", weights=weights, accuracy=percent[best],
                 base_lr=float(best))
    line = f"linear probe (lars): {weights} {percent[best]:.1f} %"
    if config.sweep:
        facts.update(accuracies=percent, chosen="base_lr, on the validation images")
        each = ", ".join(f"{rate}: {value:.1f} %" for rate, value in percent.items())
        line += f" at base lr {best}, the best on the validation images of {each}"
    return facts, line


# --------------------------------------------------------------------------------------------------


def main(argv=None):
    config, started = common.parse_config(Config, __doc__, argv=argv), time.perf_counter()
    checkpoint, vit = open_checkpoint(config)
    lars = config.protocol == "lars"
    folder = config.out or checkpoint.parent / "linear_probe"
    run = common.Run("linear_probe", config, folder, "linear probe") if lars else None
    check_pool(config.pool, vit, checkpoint)
    usual = "cls" if lars and vit.cls_token is not None else "mean"  # [D3]
    pool = "attention" if config.attentive else usual if config.pool == "auto" else config.pool
    images, val = (common.find_data(config.data, split, vit.img_size[0]) for split in ("train", "val"))
    check_classes(images, val)
    floor = random_encoder(vit, config.seed)
    with common.processes(config.device) as processes:
        if lars:
            encoder = floor if config.random_init else vit
            facts, line = lars_probe(config, encoder, pool, sha256(checkpoint), images, val, run, processes)
        else:
            lowest, reached = (ridge_probe(encoder, images, val, pool, config, processes)
                               for encoder in (floor, vit))
            facts = dict(features="cached features, no augmentation", ridge=RIDGE, random_init=lowest,
                         accuracy=reached)
            line = f"linear probe: random init {lowest:.1f} %, pre-trained {reached:.1f} %"
        if processes.main:
            append_result("linear_probe", checkpoint, vit, config, started, protocol=config.protocol,
                          data=config.data, train=images.name, val=val.name, train_images=len(images),
                          val_images=len(val), classes=len(val.classes), pool=pool, seed=config.seed, **facts,
                          device=str(processes.device))
            print(line)


if __name__ == "__main__":
    common.run_main(main)
