"""Speed and memory on this machine, ours beside other libraries', in markdown. Nothing is asserted.

    python -m eval.speed --data ~/photos --out results/speed.md   what a CPU core can measure: an hour or so
    python -m eval.speed --gpu --data ~/photos                    a GPU: as many parts as fit nine minutes

  steps      forward, backward, AdamW of MAE (ViT-S, 224 pixels, 75 % hidden, decoder 512 x 8): others'
             beside ours, and timm's blocks with the work of the MAE authors' code, such as a loop as AdamW
  mfu        our methods' steps: images/s, operations against the rate of a square matrix product
  memory     what backward keeps per image, and the most that a process takes for one step (Linux)
  pipelines  images/s that a core reads, augments and collates (batches of 32), beside PIL's usual way
  colours    how far CAE v2's colour jitter, made after the crop, is from torchvision's before it
  startup    fresh processes beside `import torch` (Linux)
--gpu: steps with ViT-B, ours and transformers compiled; mae_b, mfm_b, mfm_l, cae_s, cae_b, cae_l, beyond_b
as in mfu; train_...: the real script for 90 seconds, kill -9, ten steps more. `--only PART,PART` chooses.

Both sides run in one process and in turns (a b, b a, a b ...), on a CPU in one thread. A ratio is the
median of pairs, their time / ours, with its range: above 1 ours is faster; within 3 % of 1 it is "not
established". Images are random but for the pipelines; our steps begin with uint8 images, the others' with
normalised ones.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import logging
import platform
import re
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision import transforms as T
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

if not __package__:  # started by its file name, Python does not find common.py
    raise SystemExit("error: start it in the folder of common.py as `python -m eval.speed`")
import cae_v2
import common
import mfm_mae
from common import flag
from eval import finetune

METHODS = dict(mae=("mfm_mae", "--fuse none --augment rrc"), mfm=("mfm_mae", ""),
               beyond=("beyond_masking", ""), cae=("cae_v2", ""))
WIDE = dict(decoder_dim=512, decoder_heads=16)  # MAE's decoder; our ViT-S has a narrower one
LIBRARIES = ("torch", "torchvision", "torchcodec", "timm", "transformers", "vit-pytorch", "pillow")
CPU = ("steps", "mfu", "memory", "pipelines", "colours", "startup")
GPU = ("steps", "mae_b", "mfm_b", "mfm_l", "cae_s", "cae_b", "cae_l", "beyond_b", "train_mfm_mae",
       "train_beyond_masking", "train_cae_v2")
ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole command line."""

    only: str = flag("", "which parts, such as steps,memory (default: all)")
    rounds: int = flag(7, "pairs of each comparison", positive=True)
    data: str = flag("", "a folder of photographs, for pipelines and the GPU's trainings")
    out: str = flag("", "write the tables to this file, too")
    gpu: bool = flag(False, "measure a CUDA GPU")
    tiny: bool = flag(False, "the smallest sizes: tries the code, the numbers mean nothing")
    __post_init__ = common.MachineConfig.__post_init__


def measure(runs, rounds, device):
    """`rounds` times in seconds of each run, after a warm-up, in turns whose order changes each round."""
    cuda, seconds = device.type == "cuda", [[] for _ in runs]
    wait, repeats = (torch.cuda.synchronize, 7) if cuda else (int, 1)
    for turn in range(-1, rounds):
        for index in range(len(runs))[:: -1 if turn % 2 else 1]:
            wait()
            start = time.perf_counter()
            for _ in range(repeats if turn >= 0 else 20 if cuda else 1):
                runs[index]()
            wait()
            seconds[index] += [(time.perf_counter() - start) / repeats] * (turn >= 0)
    return seconds


def ratio(theirs, ours):
    """The median of the ratios of pairs with its range, as text."""
    pairs = [a / b for a, b in zip(theirs, ours)]
    text = f"{median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"
    return text + ", not established" * (abs(median(pairs) - 1) < 0.03)


def child(code):
    """The most MiB that a fresh Python takes for `code`. Raises ValueError if that fails."""
    # Not getrusage: its figure begins with the size of the process that started this one.
    peak = "import atexit; atexit.register(lambda: print(open('/proc/self/status').read()))\n"
    done = subprocess.run([sys.executable, "-c", peak + code], cwd=ROOT, capture_output=True, text=True)
    found = re.search(r"VmHWM:\s*(\d+)", done.stdout)
    if done.returncode or not found:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    return int(found[1]) / 1024


# ---- sides: ours and other libraries' ------------------------------------------------------------
class TimmMAE(mfm_mae.MFMMAE):
    """MAE of timm's blocks with the work of the authors' code: a convolution embeds all patches, the
    decoder's norm and head see all of them, a float mask picks the loss."""

    def __init__(self, *args, fused, **size):
        from timm.models.vision_transformer import Block
        super().__init__(*args, **size, fuse=())
        for blocks in self.encoder.blocks, self.decoder_blocks:
            for index, ours in enumerate(blocks):
                blocks[index] = Block(ours.attn.proj.in_features, ours.attn.num_heads, qkv_bias=True,
                                      norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6))
                blocks[index].attn.fused_attn = fused

    def forward(self, images, noise=None):
        """The loss of images (B, 3, S, S); hidden are all patches but the quarter of least noise (B, N)."""
        x = self.encoder.patch_embed.proj(images).flatten(2).mT + self.encoder.pos_embed[:, 1:]
        noise = torch.rand(x.shape[:2], device=x.device) if noise is None else noise
        seen, hidden = noise.argsort(dim=1).tensor_split([x.shape[1] // 4], dim=1)
        cls = (self.encoder.cls_token + self.encoder.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, common.gather(x, seen)], dim=1)
        for block in self.encoder.blocks:
            x = block(x)
        x = self.decoder_embed(self.encoder.norm(x))
        x = torch.cat([x, self.mask_token.expand(*hidden.shape, -1)], dim=1)
        places = torch.cat([seen, hidden], dim=1).argsort(dim=1)
        x = torch.cat([x[:, :1], common.gather(x[:, 1:], places)], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        target = common.patchify(images, self.encoder.patch_size)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        mask = torch.zeros_like(noise).scatter(1, hidden, 1.0)
        return ((pred - target).square().mean(-1) * mask).sum() / mask.sum()


def transformers_mae(side, patch, embed_dim, depth, num_heads, decoder_dim, decoder_depth, decoder_heads):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    config = ViTMAEConfig(
        image_size=side, patch_size=patch, hidden_size=embed_dim, num_hidden_layers=depth,
        num_attention_heads=num_heads, intermediate_size=4 * embed_dim, decoder_hidden_size=decoder_dim,
        decoder_num_hidden_layers=decoder_depth, decoder_num_attention_heads=decoder_heads,
        decoder_intermediate_size=4 * decoder_dim, norm_pix_loss=True)
    return ViTMAEForPreTraining._from_config(config, attn_implementation="sdpa")


def vit_pytorch_mae(side, patch, embed_dim, depth, num_heads, decoder_dim, decoder_depth, decoder_heads):
    from vit_pytorch import MAE, ViT
    encoder = ViT(image_size=side, patch_size=patch, num_classes=1, dim=embed_dim, depth=depth,
                  heads=num_heads, dim_head=embed_dim // num_heads, mlp_dim=4 * embed_dim,
                  pool="mean")  # with its default MAE crashes
    return MAE(encoder=encoder, decoder_dim=decoder_dim, decoder_depth=decoder_depth,
               decoder_heads=decoder_heads, decoder_dim_head=decoder_dim // decoder_heads)


PEERS = {"timm, plain attention": functools.partial(TimmMAE, fused=False), "vit-pytorch": vit_pytorch_mae,
         "timm, SDPA": functools.partial(TimmMAE, fused=True), "transformers": transformers_mae}


def parse(name, tiny):
    """(module, configuration) of one of METHODS and a size, such as mae_b; a peer gets that of MAE."""
    kind, size = name.rsplit("_", 1)
    script, flags = METHODS.get(kind, METHODS["mae"])
    method = importlib.import_module(script)
    argv = [*flags.split(), "--demo" if tiny else f"--model=vit_{size}"]
    return method, common.parse_config(method.Config, "", method.SIZES, method.DEMO, argv, method.DEPENDS)


def random_teacher(config, dtype):
    """The image tower of CAE v2's teacher, with random weights."""
    import open_clip
    size = cae_v2.teacher_size(config.teacher, config.grid)
    logging.disable()  # it says that the weights are random
    clip = open_clip.create_model(cae_v2.teacher_config(config.teacher)[0], force_image_size=size)
    logging.disable(logging.NOTSET)
    return clip.visual.eval().requires_grad_(False).to(dtype)


def side(name, count, bf16, device, tiny, **decoder):
    """(step, loss, model, run of the teacher), functions without arguments, of a method or peer, such as
    mae_b, on `count` random images; `decoder` changes the sizes of MAE's."""
    (module, config), kind, teacher = parse(name, tiny), name.rsplit("_", 1)[0], []
    if kind == "cae":
        teacher = [random_teacher(config, torch.bfloat16 if bf16 else torch.float32).to(device)]
    augment = module.Augment(config, *(tower.image_size[0] for tower in teacher))
    pixels = torch.randint(256, (count, 3, 2 * config.img_size, 2 * config.img_size)).byte()
    samples = common.Samples(common.Images(pixels), augment, 0)
    batch = default_collate([samples[0, index] for index in range(count)])
    batch = [part.to(device) if getattr(part, "ndim", 0) == 4 else part for part in batch]
    normalised = module.inputs(batch, *teacher, device)
    if module is mfm_mae:
        make = PEERS.get(kind, functools.partial(mfm_mae.MFMMAE, fuse=config.out_indices))
        model = make(config.img_size, config.patch_size, **mfm_mae.SIZES[config.model] | decoder).to(device)
    else:
        model = module.build(config, *(tower.output_dim for tower in teacher)).to(device)
    if kind in METHODS:
        common.compile_blocks(config, device, model, *teacher)
    elif kind == "transformers" and device.type == "cuda":
        model.compile()
    # transformers' Trainer takes the fused one, others torch's default, a loop on a CPU.
    fused = kind in METHODS or kind == "transformers" or None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=fused)

    def loss():
        given = normalised[:1] if kind in PEERS else module.inputs(batch, *teacher, device)
        if teacher:
            given = given[0], given[2], cae_v2.clip_targets(*teacher, given[1])
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = model(*given)
        return output if torch.is_tensor(output) else output[0]

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, loss, model, lambda: cae_v2.clip_targets(*teacher, normalised[1])


def saved_bytes(model, loss):
    """Bytes that backward of `loss()` would need, parameters left out."""
    kept, weights = {}, {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss()
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


def cost(name, tiny):
    """As --dry_run counts: operations and bytes kept in bf16, per image, and bytes of weights and AdamW."""
    module, config = parse(name, tiny)
    model, inputs, *frozen = module.example(config)
    flops = sum(map(common.count_flops, [lambda: model(*inputs)[0].backward(), *frozen]))
    weights = sum(parameter.numel() for parameter in model.parameters())
    return flops, saved_bytes(model, lambda: model(*inputs)) / 2, 16 * weights


# ---- parts: each gives the head of a table and its rows ------------------------------------------
def table(title, *columns):
    return f"\n## {title}\n\n{row(*columns)}\n{'|---' * len(columns)}|"


def row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def steps(config, device):
    cuda, rows = device.type == "cuda", []
    count, size = 4 if config.tiny else 256 if cuda else 8, "b" if cuda else "s"
    labels = dict(mfm="our MFM: the price of the fusion", mae="our MAE again: the noise")
    for peer in [*PEERS, *labels]:
        cells = []
        with contextlib.suppress(ImportError):
            for bf16 in [False, True][cuda:]:
                theirs, ours = measure([side(f"{name}_{size}", count, bf16, device, config.tiny, **WIDE)[0]
                                        for name in (peer, "mae")], config.rounds, device)
                cells += [f"{1000 * median(theirs):.0f}", f"{1000 * median(ours):.0f}", ratio(theirs, ours)]
        cells = cells or ["not installed", *[""] * (2 if cuda else 5)]
        rows.append(row(labels.get(peer, peer), *cells))
    return table(f"Steps of {count} images beside our MAE, ViT-{size.upper()}", "", *(
        f"{kind}: {what}" for kind in ("fp32", "bf16")[cuda:] for what in ("ms", "MAE, ms", "ratio"))), rows


def mfu(config, device, names=("mae_s", "mfm_s", "beyond_s", "cae_s")):
    cuda, rows = device.type == "cuda", []
    count, n = (4, 64) if config.tiny else (256, 8192) if cuda else (8, 2048)
    card = next((card for card in common.PEAK_FLOPS if cuda and card in torch.cuda.get_device_name()), None)
    for name, bf16 in [(name, bf16) for name in names for bf16 in [False, True][cuda:]]:
        flops, kept, weights = cost(name, config.tiny)
        step, _, _, teacher = side(name, count, bf16, device, config.tiny)
        square = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
        runs = [step, lambda: square @ square, *[teacher] * name.startswith("cae")]
        seconds, products, *clip = measure(runs, config.rounds, device)
        of_product = median(count * flops / a / (2 * n**3 / b) for a, b in zip(seconds, products))
        cells = [f"{1000 * median(seconds):.0f}", f"{count / median(seconds):.1f}", f"{flops / 1e9:.1f}",
                 f"{of_product:.0%}", f"{median(clip[0]) / median(seconds):.0%}" if clip else "-"]
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            step()
            memory, rate = torch.cuda.max_memory_allocated(), count * flops / median(seconds)
            eager = torch.compiler.set_stance("force_eager")(step)
            cells += [f"{memory / 2**30:.1f}", f"{(weights + count * kept) / 2**30:.1f}",
                      f"{rate / common.PEAK_FLOPS[card]:.0%}" if card else "-",
                      ratio(*measure([eager, step], config.rounds, device))]
        rows.append(row(name, "bf16" if bf16 else "fp32", *cells))
    more = ["peak GiB", "GiB as in --dry_run", f"of the peak of {card}", "eager / compiled"] if cuda else []
    return table(f"Our steps of {count} images", "", "in", "ms", "images/s", "GFLOP per image",
                 f"of the rate of a product of {n} x {n}", "CLIP's share of the time", *more), rows


def memory(config, device):
    rows, ours = [], 0
    for name in ("mae_s", *(f"{peer}_s" for peer in PEERS)):
        try:  # the difference leaves out the bf16 copies of weights
            more, less = (saved_bytes(model, loss) for _, loss, model, _ in (
                side(name, count, True, device, config.tiny, **WIDE) for count in (8, 4)))
            code = ("import torch; from eval import speed; torch.set_num_threads(1); speed.side("
                    f"{name!r}, 8, True, torch.device('cpu'), {config.tiny}, **speed.WIDE)[0]()")
            ours = ours or more - less
            cells = f"{(more - less) / 4e6:.1f}", f"{ours / (more - less):.2f}", f"{child(code):.0f}"
        except ImportError:
            cells = "not installed", "", ""
        rows.append(row(name[:-2].replace("mae", "our MAE"), *cells))
    return table("Memory of a step in bf16, ViT-S", "", "MB that backward keeps per image",
                 "our MAE's / its", "peak MiB of a process, 8 images"), rows


def pipelines(config, device):
    if config.data in ("", "scenes", "cifar10"):
        raise ValueError("they need --data, a folder of photographs")
    images, size, rows, rates = common.find_data(config.data), 32 if config.tiny else 224, [], {}
    chosen = torch.linspace(0, len(images) - 1, 32 if config.tiny else 256).long().tolist()
    parsed = {kind: parse(f"{kind}_s", config.tiny) for kind in METHODS}
    wide, cae, flip = parsed["beyond"][1].img_size * 9 // 7, parsed["cae"][1], T.RandomHorizontalFlip()
    crop = functools.partial(T.RandomResizedCrop, interpolation=T.InterpolationMode.BICUBIC)
    end = T.Compose([T.ToTensor(), T.Normalize(common.IMAGENET_MEAN, common.IMAGENET_STD)])

    def for_two(image):  # student and teacher, each with its own normalisation
        return end(image), end(image), cae_v2.block_masks(1, cae.grid, cae.num_masked)[0]

    usual = dict(
        mae=[crop(size, (0.2, 1)), flip, end], beyond=[crop(wide, (0.2, 1)), flip, end],
        mfm=[T.Resize(size), T.RandomCrop(size, 4, padding_mode="reflect"), flip, end],
        cae=[T.ColorJitter(0.4, 0.4, 0.4), flip, crop(size, (0.4, 1)), for_two], decoding=[lambda image: 0])
    with contextlib.suppress(ImportError):
        from timm.data import create_transform
        # MAE's, but for mmax9: at 10 it would ask Pillow for posters of 0 bits, which Pillow 13 refuses.
        usual["tuning"] = [create_transform(
            size, is_training=True, auto_augment="rand-m9-mstd0.5-mmax9-inc1", re_prob=0.25,
            re_mode="pixel", interpolation="bicubic")]
    ours = {kind: module.Augment(recipe, *[size] * (kind == "cae"))
            for kind, (module, recipe) in parsed.items()}
    ours["tuning"] = finetune.Augment(types.SimpleNamespace(**finetune.SHARED), size)
    ours["decoding"] = lambda image, label: 0
    for kind in ours:
        if kind not in usual:
            rows.append(row(kind, "timm is not installed", "", ""))
            continue
        transform, samples = T.Compose(usual[kind]), common.Samples(images, ours[kind], 0)

        def batches(make):
            for start in range(0, len(chosen), 32):
                default_collate([make(index) for index in chosen[start: start + 32]])

        theirs, mine = measure([
            lambda: batches(lambda index: transform(Image.open(images.path(index)).convert("RGB"))),
            lambda: batches(lambda index: samples[0, index])], config.rounds, device)
        rates[kind] = len(chosen) / median(mine)
        rows.append(row(kind, f"{len(chosen) / median(theirs):.0f}", f"{rates[kind]:.0f}",
                        ratio(theirs, mine)))
    rows.append(table("Cores that feed one H100: an estimate, at 40 % of its bf16 peak", "",
                      "GFLOP per image", "images/s", "cores"))
    for name in [f"{kind}_{letter}" for kind in METHODS for letter in "sbl"[: 1 if config.tiny else 3]]:
        flops = cost(name, config.tiny)[0]
        need = 0.4 * common.PEAK_FLOPS["H100"] / flops
        rows.append(row(name, f"{flops / 1e9:.1f}", f"{need:.0f}", f"{need / rates[name[:-2]]:.1f}"))
    return table("Images/s of one core", "", "PIL", "ours", "ratio"), rows


def colours(config, device):
    """CAE v2's jitter of crops beside torchvision's of whole images, with equal draws, in grey levels."""
    if config.data in ("", "scenes", "cifar10"):
        raise ValueError("they need --data, a folder of photographs")
    images, found, size = common.find_data(config.data), [], [224, 224]
    chosen = torch.linspace(0, len(images) - 1, 8 if config.tiny else 500).long().tolist()
    adjust = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation]
    for index in tqdm(chosen, "colours", leave=False):
        image, wholes = images[index][0], []
        torch.manual_seed(index)
        ours = cae_v2.draw_colours(image, 0.4)
        box = T.RandomResizedCrop.get_params(image, (0.4, 1.0), (3 / 4, 4 / 3))
        for whole in image, image.float() / 255:  # bytes, as it is done; floats, as it is meant
            torch.manual_seed(index)
            for kind in torch.randperm(3).tolist():
                whole = adjust[kind](whole, torch.empty(()).uniform_(0.6, 1.4).item())
            wholes.append(TF.resized_crop(whole, *box, size, T.InterpolationMode.BICUBIC).float())
        crop = TF.resized_crop(image, *box, size, T.InterpolationMode.BICUBIC)
        ours, bias = cae_v2.recolour(crop[None].float(), ours[None])[0], 255 * wholes[1] - wholes[0]
        found.append([(ours - wholes[0]).abs().mean(), (ours - wholes[0]).mean(), bias.mean()])
    means = [f"{value:.2f}" for value in torch.tensor(found).mean(0).tolist()]
    return table("CAE v2's colours beside torchvision's, of 255", "images", "mean difference", "bias",
                 "bias of torchvision's bytes against its floats"), [row(len(chosen), *means)]


def startup(config, device):
    script = "import runpy, sys; sys.argv.append('--help'); runpy.run_path('mfm_mae.py', {}, '__main__')"
    codes = "import torch", "import mfm_mae", "import beyond_masking", "import cae_v2, open_clip", script
    peaks = {}
    runs = [lambda code=code: peaks.update({code: child(code)}) for code in codes]
    seconds = measure(runs, config.rounds, device)
    return table("Start-up of a process", "", "s", "beside `import torch`", "peak MiB"), [
        row(code.replace(script, "mfm_mae.py --help"), f"{median(times):.1f}", ratio(times, seconds[0]),
            f"{peaks[code]:.0f}") for code, times in zip(codes, seconds)]


def training(config, script, seconds=90):
    """Starts a script, kills it after `seconds`, and has it go on for ten steps."""
    flags = "--warmup_epochs 1 --epochs 9999 --log_every 10 --save_every 50"
    flags += " --demo" if config.tiny else " --model vit_s --batch_size 256"
    flags += " --teacher demo --lr 2e-4" * (script == "cae_v2")  # needs no network
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        command = [sys.executable, f"{script}.py", *flags.split(), "--data", config.data, "--out", str(run)]
        start = functools.partial(subprocess.run, cwd=ROOT, stdout=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            start(command, timeout=seconds)  # which ends in kill -9
        before = common.read_log(run)[0]
        if not before:
            raise ValueError(f"{script}.py wrote no line of its log in {seconds} seconds")
        if start([*command, "--max_steps", str(before[-1]["step"] + 10)]).returncode:
            raise ValueError(f"{script}.py did not go on after the kill")
        after = common.read_log(run)[0]
        resumed = common.json_or_none(run / "config.json")["starts"][-1]["step"]
    rate = f"{median(line['images_per_s'] for line in before):.0f}"
    ends = (f"{line['step']}: {line['loss']:.4f}" for line in (before[0], before[-1], after[-1]))
    return table(f"The real scripts: {seconds} seconds with their start, kill -9, ten steps more", "",
                 "step: loss, first", "last", "after that", "went on from step", "images/s",
                 "share of waiting for data"), [row(script, *ends, resumed, rate, before[-1]["data_wait"])]


# ---- main ----------------------------------------------------------------------------------------
def part(name, config, device):
    """The head and the rows of a part."""
    parts = dict(steps=steps, mfu=mfu, memory=memory, pipelines=pipelines, colours=colours, startup=startup)
    if name.startswith("train_"):
        return training(config, name.removeprefix("train_"))
    return parts[name](config, device) if name in parts else mfu(config, device, [name])


def heading(started, gpu):
    versions = {found.name: found.version for found in importlib.metadata.distributions()}
    found = ", ".join(f"{name} {versions[name]}" for name in LIBRARIES if name in versions)
    facts = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    cpu = (re.findall(r"model name\s*: (.*)", facts) or [platform.machine()])[0]
    where = torch.cuda.get_device_name() if gpu else f"one core of {cpu}"
    minutes, date = (time.perf_counter() - started) / 60, time.strftime("%d %B %Y")
    return (f"# Speed\n\n`python -m eval.speed {' '.join(sys.argv[1:])}`, commit {common.commit()}, "
            f"{date}, {minutes:.0f} minutes, {where}. Python {platform.python_version()}, {found}.\n\n"
            f"{__doc__[__doc__.index('Both sides'):]}")


def main(argv=None):
    config, started = common.parse_config(Config, __doc__, argv=argv), time.perf_counter()
    if config.gpu and not torch.cuda.is_available():
        raise ValueError("--gpu needs a CUDA GPU, and torch finds none on this machine")
    parts = GPU if config.gpu else CPU
    chosen = config.only.split(",") if config.only else list(parts)
    if set(chosen) - set(parts):
        raise ValueError(f"--only {config.only}: the parts are {', '.join(parts)}")
    if not config.gpu:
        torch.set_num_threads(1)
    text, before, late = "", "", []
    for name in chosen:
        needed = dict(steps=150, train=170, mfm_l=130, cae_l=130)  # seconds, a guess
        needed = needed.get(name) or needed.get(name.split("_")[0], 80)
        if config.gpu and time.perf_counter() - started + needed > 540:
            late.append(name)
            continue
        if config.gpu:  # programs of one model slow down the next, its memory is not free for a script
            torch.compiler.reset()
            torch.cuda.empty_cache()
        try:
            head, rows = part(name, config, torch.device("cuda" if config.gpu else "cpu"))
        except (ValueError, OSError, RuntimeError) as error:
            head, rows = table(name, "not measured"), [row(str(error).split("\n")[0])]
        common.say(new := "\n".join([head] * (head != before) + rows))
        text, before = f"{text}{new}\n", head
    if late:
        common.say(end := f"\nLeft out, to stay within nine minutes: `--only {','.join(late)}`")
        text += f"{end}\n"
    if config.out:
        text = heading(started, config.gpu) + text
        common.write_atomically(config.out, lambda path: path.write_text(text))


if __name__ == "__main__":
    common.run_main(main)
