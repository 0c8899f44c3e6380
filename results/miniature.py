"""What results/claims.py runs: pre-training, probes and fine-tuning of small ViTs on images held in memory.

The models, targets, masks and losses are those of the methods' files; the loop is shorter than theirs, since all
images are one tensor and a run takes a minute. Flips are the only augmentation.
B images of a step, n images, N patches, D width, C width of the teacher's tokens."""

import contextlib
import functools
import io
import json
import os
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import beyond_masking
import cae_v2
import common
import mfm_mae
from eval import frequency, knn, ridge, segment
from eval.data import find_labelled
from eval.encoders import load_encoder

SIZES = dict(S=dict(embed_dim=64, depth=3, num_heads=2), L=dict(embed_dim=128, depth=6, num_heads=4))
# Steps of pre-training, of claim 4, of fine-tuning by share of the labels; how many labels, how many to choose on.
TIERS = dict(
    smoke=dict(seeds=2, steps=2, long=3, tune={"0.01": 1, "0.1": 1, "1": 2}, batch=8, labelled=200, chosen_on=50),
    cpu=dict(seeds=3, steps=1000, long=3000, tune={"0.01": 100, "0.1": 250, "1": 500}, batch=64, labelled=10_000,
             chosen_on=2000),
    gpu=dict(seeds=5, steps=5000, long=15_000, tune={"0.01": 300, "0.1": 1000, "1": 3000}, batch=256,
             labelled=20_000, chosen_on=2000))
METHODS = {"CAE v2": "cae_v2/both/0.15", "Beyond Masking": "beyond_masking/mask+zoom_in/steps",
           "MFM": "mfm_mae/mfm/steps", "MAE": "mfm_mae/mae/steps"}  # in claim 5
CAMVID = "--num_classes 11 --ignore_index 11 --img_size 64 --batch_size 8 --steps 120 --warmup_steps 10 --lr 5e-3"
PENALTIES, NEIGHBOURS = (1e-3, 1e-2, 1e-1, 1.0), (5, 10, 20, 50)


class Data:
    """All images as tensors (n, 3, 32, 32) uint8 on the device, and what the teacher says of them."""

    def __init__(self, args):
        self.args, self.tier, self.folder = args, TIERS[args.tier], Path(args.runs) / args.tier
        self.device = torch.device("cuda" if args.tier == "gpu" else "cpu")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("--tier gpu needs a GPU, and torch finds none: take --tier cpu")
        sets = self.keep("images", args.data, lambda: [
            (torch.stack([image for image, _ in part]), torch.as_tensor(part.labels))
            for part in (find_labelled(args.data, split, 32) for split in ("train", "val"))])
        (self.train, self.labels), (self.test, self.test_labels) = ([x.to(self.device) for x in part] for part in sets)
        if args.tier == "smoke":
            self.test, self.test_labels = self.test[:200], self.test_labels[:200]
        self.classes = int(self.labels.max()) + 1
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0)).to(self.device)
        self.chosen_on, self.others = order[:self.tier["chosen_on"]], order[self.tier["chosen_on"]:]
        self.labelled = order[:self.tier["labelled"]]  # of the probes: `chosen_on` first

    def keep(self, name, spec, make):
        """What `make()` gives for the flag `spec`, from a file if it was made before."""
        path = self.folder / f"{name}-{zlib.crc32(str(spec).encode()):08x}.pt"
        if not path.exists():
            common.write_atomically(path, functools.partial(torch.save, make()))
        return torch.load(path, mmap=True)

    @functools.cached_property
    def teacher(self):
        return cae_v2.load_teacher(self.args.teacher, 32).to(self.device)

    @functools.cached_property
    def tokens(self):
        """(2, n, 1+N, C) float16: of the images and of their mirror images."""
        cfg = self.teacher.preprocess_cfg
        return self.keep("tokens", [self.args.data, self.args.teacher], lambda: torch.stack([torch.cat([
            cae_v2.clip_targets(self.teacher, common.normalise(part, cfg["mean"], cfg["std"])).half().cpu()
            for part in images.split(500)]) for images in (self.train, self.train.flip(-1))])).to(self.device)


def fit(model, groups, loss_of, steps, rate, after=lambda step: None):
    """AdamW with 10 % warm-up, then a cosine to 0. Returns the mean loss of the last tenth."""
    optimizer, losses = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True), []
    for step in range(steps):
        for group in groups:
            group["lr"] = common.learning_rate(step, rate, steps // 10, steps)
        model.train()
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        after(step + 1)
    return round(torch.stack(losses[-(steps // 10 + 1):]).mean().item(), 4)


def mirror(images, flip):
    """Images (B, 3, H, W), those mirrored where `flip` (B,) is True."""
    return torch.where(flip.to(images.device)[:, None, None, None], images.flip(-1), images)


def resize(images, size):
    """Images (B, 3, h, w) to (B, 3, *size), bilinear."""
    return F.interpolate(images, list(common.pair(size)), mode="bilinear", antialias=True)


def pretrain(name, rate, data):
    """Trains one model; returns its encoder and what there is to say about it."""
    kind, what, much, size, seed = name.split("/")[:5]
    width = data.tokens.shape[-1] if kind == "cae_v2" else 0  # before the seed: loading a teacher draws numbers
    torch.manual_seed(int(seed))
    shape, batch, steps = SIZES[size], data.tier["batch"], data.tier[much if much == "long" else "steps"]
    D, depth, heads = shape.values()
    decoder = dict(decoder_dim=D // 2, decoder_depth=1, decoder_heads=2)
    fuse = () if what == "mae" else sorted({*(k * depth // 6 for k in range(5)), depth - 1})
    model, module = {
        "cae_v2": lambda: (cae_v2.CAEv2(32, 4, **shape, target_dim=width, regressor_depth=1,
                                        regressor_heads=heads), common),
        "beyond_masking": lambda: (beyond_masking.BeyondMasking(what, 28, 4, **shape, **decoder), beyond_masking),
        "mfm_mae": lambda: (mfm_mae.MFMMAE(32, 4, **shape, **decoder, fuse=fuse), mfm_mae)}[kind]()
    draw, other = (torch.Generator().manual_seed(int(seed)) for _ in range(2))  # images and flips; the rest

    def loss_of():
        ids, flip = torch.randint(len(data.train), (batch,), generator=draw), torch.rand(batch, generator=draw) < 0.5
        images = common.normalise(mirror(data.train[ids.to(data.device)], flip))
        with common.autocast(data.device, "bf16"):
            if kind == "cae_v2":
                mask = cae_v2.block_masks(batch, 8, round(float(much) * 64), other)
                return model(images, mask, data.tokens[flip.long(), ids].float(), what)[0]
            if kind == "mfm_mae":
                return model(images, common.random_masks(batch, 64, 48, other))[0]
            params = beyond_masking.sample_params(what, batch, other, 28)
            mask = common.random_masks(batch, 49, 37, other) if beyond_masking.is_masked(what) else None
            return model(resize(images, beyond_masking.clean_size(what, 28)),
                         {key: value.to(data.device) for key, value in params.items()}, mask)[0]

    def after(step):
        if much == "long" and step in (steps // 3, steps * 2 // 3):
            probes.append(probe(model.encoder, data)["accuracy"])

    probes, groups = [], common.parameter_groups(model.to(data.device), 0.05, module.decays)
    loss, encoder = fit(model, groups, loss_of, steps, rate, after), model.encoder
    if kind == "beyond_masking":
        encoder = beyond_masking.rgb_encoder(encoder).to(data.device)
    result = dict(loss=loss, **probe(encoder, data))
    if kind == "mfm_mae":
        last = encoder.layers(common.normalise(data.test[:1000]), [-1])[0][:, 1:].detach().float()
        result.update(probes=probes, frequency=frequency.relative_log_amplitude(last, 8)[-1].item(),
                      weights=[round(share, 4) for share in model.fusion_weights.tolist()])
    return encoder, result


def pooled(encoder, images):
    """The mean patch token (B, D) float32 of uint8 images; the teacher is an open_clip tower."""
    if cfg := getattr(encoder, "preprocess_cfg", None):
        return cae_v2.clip_targets(encoder, common.normalise(images, cfg["mean"], cfg["std"]))[:, 1:].mean(dim=1)
    with common.autocast(images.device, "bf16"):
        tokens = encoder(resize(common.normalise(images), encoder.img_size))
    return tokens[:, -encoder.grid[0] * encoder.grid[1]:].float().mean(dim=1)


@torch.no_grad()
def probe(encoder, data, neighbours=False):
    """Per cent of the test images that ridge regression, and kNN if asked for, get right on frozen features. The
    penalty, or k, is the best on `chosen_on` after a fit on the other labelled images."""
    x, test = (torch.cat([pooled(encoder.eval(), part) for part in images.split(500)]).cpu()
               for images in (data.train[data.labelled], data.test))
    y, cut, test_y = data.labels[data.labelled].cpu(), len(data.chosen_on), data.test_labels.cpu()

    def linear(fit_x, fit_y, ask, ask_y, penalty):
        weights = ridge.fit_ridge([(fit_x.double(), fit_y)], data.classes, penalty)
        return 100 * int(ridge.count_right([(ask.double(), ask_y)], *weights)) / len(ask)

    def nearest(fit_x, fit_y, ask, ask_y, k):
        near, ids = (F.normalize(ask, dim=1) @ F.normalize(fit_x, dim=1).T).topk(k, dim=1)
        return 100 * knn.vote(near, fit_y[ids], data.classes, [k])[k].eq(ask_y).float().mean().item()

    result = {}
    for key, score, choices in (("accuracy", linear, PENALTIES), ("knn", nearest, NEIGHBOURS))[:1 + neighbours]:
        held_out, best = max((score(x[cut:], y[cut:], x[:cut], y[:cut], choice), choice) for choice in choices)
        result |= {key: round(score(x, y, test, test_y, best), 2), f"{key}_chosen": [best, round(held_out, 2)]}
    return result


def tune(encoder, share, rate, seed, data, choosing):
    """Trains encoder and a linear layer with a share of the labels; per cent right of the images."""
    torch.manual_seed(seed)
    model = nn.Sequential(encoder, nn.LayerNorm(encoder.config["embed_dim"]),
                          nn.Linear(encoder.config["embed_dim"], data.classes)).to(data.device)
    ids = data.others[torch.randperm(len(data.others))[:max(1, round(float(share) * len(data.others)))]]

    def loss_of():
        batch = ids[torch.randint(len(ids), (data.tier["batch"],))].to(data.device)
        images = mirror(data.train[batch], torch.rand(len(batch)) < 0.5)
        return F.cross_entropy(model[1:](pooled(encoder, images)), data.labels[batch])

    loss = fit(model, common.parameter_groups(model, 0.05), loss_of, data.tier["tune"][share], rate)
    images, labels = data.test, data.test_labels
    if choosing:
        images, labels = data.train[data.chosen_on], data.labels[data.chosen_on]
    with torch.no_grad():
        right = torch.cat([model.eval()[1:](pooled(encoder, part)).argmax(1) for part in images.split(500)]) == labels
    return dict(loss=loss, accuracy=round(100 * right.float().mean().item(), 2))


def execute(name, rate, args):
    """The line of one run, in a process of its own with all that it reads."""
    global DATA
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.jobs))
    DATA, started = globals().get("DATA") or Data(args), time.time()
    kind, what, much, size, seed = name.split("/")[:5]
    home = DATA.folder / name
    if kind not in ("frozen", "tune"):
        encoder, result = pretrain(name, rate, DATA)
        common.save_encoder(encoder, home / "encoder.safetensors")
    else:
        seed, choosing = int(seed), seed == "100"
        torch.manual_seed(seed)
        if what in METHODS:
            home = DATA.folder / METHODS[what] / size / str(0 if choosing else seed)
            encoder = load_encoder(home / "encoder.safetensors")
        else:
            encoder = DATA.teacher if what == "teacher" else mfm_mae.MFMMAE(32, 4, **SIZES[size], fuse=()).encoder
        encoder = encoder.to(DATA.device)
        result = tune(encoder, much, rate, seed, DATA, choosing) if kind == "tune" else probe(encoder, DATA, True)
        if kind == "frozen" and what != "teacher" and args.camvid:
            common.save_encoder(encoder, home / "encoder.safetensors")
            flags = CAMVID if args.camvid != "scenes" else "--img_size 32 --batch_size 4 --steps 2 --warmup_steps 1"
            with contextlib.redirect_stdout(io.StringIO()):
                segment.main(["--fresh", "--head=linear", "--workers=0", f"--data={args.camvid}",
                              f"--checkpoint={home}", *flags.split()])
            result["mIoU"] = round(json.loads((home / "eval.jsonl").read_text().splitlines()[-1])["miou"], 2)
    where = torch.cuda.get_device_name() if DATA.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return dict(name=name, tier=args.tier, rate=rate, **result, seconds=round(time.time() - started),
                commit=common.commit(), torch=torch.__version__, hardware=where)
