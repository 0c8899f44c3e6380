"""MFM and MAE against the released code's own numbers (golden/mfm_mae.pt), and proof that these can fail: each
`check_...` is called with `mfm_mae`, and with copies of it in which a line is wrong (the table)."""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torchvision.transforms import v2

import common
import mfm_mae
from eval import official
from helpers import config_of, refused
from mutants import checks, mutant

GOLDEN = torch.load(Path(__file__).parent / "golden" / "mfm_mae.pt", weights_only=True)
TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, decoder_dim=16, decoder_depth=2,
            decoder_heads=2, fuse=(0, 1, 3))
close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=0)


def build(module, name, dtype=torch.float32, **changes):
    c = GOLDEN[name]["config"]
    options = dict(fuse=tuple(c.get("out_indices", ())), mlp_ratio=c["mlp_ratio"]) | changes
    model = module.MFMMAE(c["img_size"], c["patch_size"], c["embed_dim"], c["depth"], c["num_heads"],
                          c["decoder_embed_dim"], c["decoder_depth"], c["decoder_num_heads"], **options)
    getattr(module, "official", official).load_official(model, GOLDEN[name]["state_dict"])
    return model.to(dtype)


def tiny(**changes):
    torch.manual_seed(0)
    return mfm_mae.MFMMAE(**(TINY | changes))


def random_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 32, 32, generator=generator).to(dtype)
    return images, common.random_masks(4, 16, 12, generator)


def check_outputs(module, name):
    """Golden tensors are float32, so float64 is compared with them at float32's rounding."""
    case = GOLDEN[name]
    ids, kept = common.mask_to_ids(case["mask"].bool(), "cpu"), case["ids_keep"].argsort(dim=1)
    every = torch.arange(case["mask"].shape[1]).expand(len(kept), -1)
    for dtype in (torch.float32, torch.float64):
        model, images = build(module, name, dtype), case["images"].to(dtype)
        latent = model.encode(images, ids[0]).float()
        close(latent[:, :1], case["latent"][:, :1])  # theirs stand in a random order, ours ascend
        close(latent[:, 1:], common.gather(case["latent"][:, 1:], kept))
        close(model.predict(images, *ids, every).float(), case["pred"])
        close(model.fusion_weights.float(), case["fusion_weights"] if name == "mfm" else torch.ones(1))


def check_losses(module, name):
    """Losses and the norm of each gradient, with and without normalised patches; the golden ones are those of a
    float64 run."""
    case = GOLDEN[name]
    for dtype, loose, relative in ((torch.float32, 1e-5, 1e-4), (torch.float64, 1e-12, 1e-10)):
        for kind in ("raw", "norm_pix"):
            model = build(module, name, dtype, norm_pix=kind == "norm_pix")
            loss, parts = model(case["images"].to(dtype), case["mask"].bool())
            assert loss.item() == pytest.approx(case[f"loss_{kind}"], abs=loose)
            shares = [share.item() for share in parts.values()] or [1]
            assert shares == pytest.approx(model.fusion_weights.tolist())
            loss.backward()
            norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
            assert norms == {our_name(n): pytest.approx(norm, rel=relative, abs=1e-9)
                             for n, norm in case[f"grad_norm_{kind}"].items()}


def our_name(theirs):
    (name,) = official.renamed({theirs: 0}, official.MFM)
    return name if name.startswith(("encoder", "fusion", "mask_token", "decoder")) else f"encoder.{name}"


def check_downstream(module, name):
    """On whole images the bare encoder gives the last block alone, nothing of the fusion."""
    case, encoder = GOLDEN[name], build(module, name).encoder
    close(encoder(case["images"])[:, 0], case["vit_cls_feature"])
    close(encoder.layers(case["images"], [-1])[0][:, 1:].mean(dim=1), case["vit_patch_mean"])


def reference_low_pass(images, radius):
    """PixMIM's target by its formula, on numpy in float64, one image and channel after the other."""
    mean, std = np.array(common.IMAGENET_MEAN), np.array(common.IMAGENET_STD)
    result = np.empty(images.shape)
    for b, c in np.ndindex(*images.shape[:2]):
        pixels = images[b, c].double().numpy() * std[c] + mean[c]
        spectrum, (h, w) = np.fft.fftshift(np.fft.fft2(pixels)), pixels.shape
        for i, j in np.ndindex(h, w):
            if np.hypot(i - (h - 1) / 2, j - (w - 1) / 2) > radius:
                spectrum[i, j] = 0
        result[b, c] = (np.abs(np.fft.ifft2(spectrum)) - mean[c]) / std[c]
    return torch.from_numpy(result)


def check_low_pass(module, name):
    for size, radius in (((56, 56), 10), ((32, 48), 40 * 32 / 224)):
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).double()
        close(module.low_pass(images), reference_low_pass(images, radius), atol=1e-12)


def check_attention(module, name):
    """Against torch's own attention: the last block asks, all tokens of all blocks answer, no residual."""
    torch.manual_seed(0)
    fusion = module.AttentionFusion(32, 3, "linear", 4)
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    q, k, v = fusion.q, fusion.k, fusion.v
    theirs.load_state_dict({
        "in_proj_weight": torch.cat([q.weight, k.weight, v.weight]), "out_proj.weight": fusion.proj.weight,
        "in_proj_bias": torch.cat([q.bias, torch.zeros(32), v.bias]), "out_proj.bias": fusion.proj.bias})
    outputs = [torch.randn(2, 5, 32) for _ in range(3)]
    u = [F.linear(h, p.weight, p.bias) for h, p in zip(outputs, fusion.projections[:2])] + outputs[2:]
    u = [tokens + e.flatten() for tokens, e in zip(u, fusion.block_embed)]
    close(fusion(outputs), theirs(u[2], torch.cat(u, dim=1), torch.cat(u, dim=1))[0])


def check_config(module, name):
    """The count of visible patches is cut off in floating point, 9 of 100, not 10; blocks by depth [D1]."""
    for grid, ratio, kept in ((10, 0.9, 9), (20, 0.9, 39), (14, 0.75, 49), (8, 0.75, 16), (14, 0.6, 78)):
        config = module.Config(img_size=grid * 8, patch_size=8, mask_ratio=ratio)
        assert grid**2 - config.num_masked == kept
    for blocks in ("0,2,4,6,8,11", "0,4,8,12,16,23", "0,5,10,16,21,31", "0,1,2,3,4,5", "0,1,2,3", "0,1", "0"):
        blocks = tuple(map(int, blocks.split(",")))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(module.SIZES, "vit_s", dict(depth=1 + blocks[-1]))
            assert module.Config(model="vit_s").out_indices == blocks
    assert module.Config(fuse="3,5,11").out_indices == (3, 5, 11) and module.Config(fuse="none").out_indices == ()


def check_decay(module, name):
    """mmpretrain's rule by its words: ln, bias, pos_embed, mask_token, cls_token in a name: no decay."""
    model, theirs = build(module, "mfm"), GOLDEN["mfm"]["state_dict"].keys()
    names = {id(p): n for n, p in model.named_parameters()}
    decay, rest = ({names[id(p)] for p in group["params"]}
                   for group in common.parameter_groups(model, 0.05, module.decays))
    words = ("ln", "bias", "pos_embed", "mask_token", "cls_token")
    spared = {n for n in theirs if any(word in n for word in words)}
    assert rest == {our_name(n) for n in spared if "pos_embed" not in n}
    assert decay == {our_name(n) for n in theirs - spared} and "fusion.logits" in decay


def check_initialisation(module, name):
    """Xavier for every Linear, the fusion's too; the convolution keeps its own bias [D6]. The tables are MAE's [D3],
    of which mmpretrain's are the two halves swapped."""
    state, model = GOLDEN["mae"]["state_dict"], module.MFMMAE(64, 16, 48, 1, 4, 32, 1, 4, fuse=())
    close(model.encoder.pos_embed.data, state["pos_embed"])
    close(model.decoder_pos_embed.data, state["decoder_pos_embed"])
    close(GOLDEN["mfm"]["state_dict"]["backbone.pos_embed"], state["pos_embed"].roll(24, -1))
    torch.manual_seed(0)
    model = module.MFMMAE(32, 4, 192, 4, 4, 96, 2, 4, fuse=(0, 1, 3))
    linears = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    assert model.fusion.projections[1] in linears and model.decoder_embed in linears
    for layer in linears:
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound and (layer.bias == 0).all()
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    patch = model.encoder.patch_embed.proj
    for tensor, bound in ((patch.weight, (6 / (192 + 48)) ** 0.5), (patch.bias, 48**-0.5)):
        assert 0.9 * bound < tensor.abs().max() <= bound
    fusion = module.AttentionFusion(192, 3, "linear", 4)
    for token in (model.encoder.cls_token, model.mask_token, fusion.block_embed):
        assert token.std().item() == pytest.approx(0.02, rel=0.2)
    assert (model.fusion.logits == 1).all() and fusion.k.bias is None


def check_augment(module, name):
    """What torchvision makes of a PIL image with the same draws, up to rounding; resizing is bilinear [D2]."""
    config, bicubic = module.Config(img_size=64, patch_size=8, augment=name), v2.InterpolationMode.BICUBIC
    crops = dict(rrc=[v2.RandomResizedCrop(64, (0.2, 1.0), interpolation=bicubic)],
                 resize_crop=[v2.Resize(64), v2.RandomCrop(64, padding=4, padding_mode="reflect")])
    theirs = v2.Compose([v2.ToPILImage(), *crops[name], v2.RandomHorizontalFlip(), v2.PILToTensor()])
    for seed, size in enumerate([(90, 120), (64, 64), (40, 200), (64, 70), (90, 120), (70, 90)], 3):
        image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(seed)
        ours, mask = module.Augment(config)(image, -1)
        torch.manual_seed(seed)
        assert (ours.float() - theirs(image).float()).abs().mean() < 0.5
        assert ours.dtype == torch.uint8 and mask.shape == (64,) and mask.sum() == 48


def check_preview(module, name):
    """Where pred is the truth, both last columns show the image, but for the pasted side."""
    config, sheets = module.Config(img_size=32, patch_size=8), []
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    mask = common.random_masks(2, 16, 12, torch.Generator().manual_seed(0))
    shift = torch.where(mask, 0.0, 1.0)[:, :, None]  # wrong at visible patches alone
    hidden = mask.reshape(2, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)
    for norm_pix in (True, False):
        model = module.MFMMAE(**TINY, norm_pix=norm_pix)
        model.predict = lambda images, ids_keep, ids_masked, ids: shift + mfm_mae.pixel_target(
            images, ids, 8, norm_pix)[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common, "save_panels", lambda *a: sheets.append(a))
            module.preview("x.png", config, model, (images, mask), torch.device("cpu"))
        _, rows, _, note = sheets[-1]
        for (seen, masked, pred, pasted), image, where in zip(rows, images.float() / 255, hidden):
            for ours, expected in ((seen, image), (masked, torch.where(where, 0.5, image)), (pasted, image),
                                   (pred[:, where], image[:, where])):
                close(ours, expected)
            assert (pred[:, ~where] - image[:, ~where]).abs().min() > 0.01
        assert ("leaks" in note) == norm_pix


# The loop; up to LOOP for all three methods.
FLAGS = ("--demo --img_size=28 --patch_size=7 --device=cpu --workers=0 --batch_size=8 --micro_batch=4 --epochs=4 "
         "--warmup_epochs=1 --lr=0.01 --max_steps=5 --save_every=2 --log_every=1 ")
IMAGES = common.find_data("scenes", img_size=50, num_scenes=16)
ONE = common.Dist(0, 1, torch.device("cpu"))


def rates(peak, start=0.0, end=0.0):
    """Of the five steps: two of warm-up, then half a cosine over six."""
    return [start * peak, *(end + (peak - end) * (1 + np.cos(np.pi * k / 6)) / 2 for k in (0, 0, 1, 2))]


def plain_loop(config, augment, loss_of, optimizer, rates, clip=1e9):
    """What `train` should do, without its plumbing: [(loss, rate, norm of the gradient)], the optimiser."""
    samples, log = common.Samples(IMAGES, augment, config.seed), []
    keys = [*common.micro_batch_keys(16, common.make_plan(16, 8, 4, 4, 1), ONE, config.seed, 0, 5)]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        pair = [torch.utils.data.default_collate([samples[key] for key in keys[2 * step + k]]) for k in (0, 1)]
        loss = sum(loss_of(batch, step, 4 * k) for k, batch in enumerate(pair)) / 2
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        log.append((loss.item(), rate, norm.item()))
    return log, optimizer


@functools.cache
def plain_run(module, flags=FLAGS, **schedule):
    config = config_of(module, flags)
    model = module.build(config)
    optimizer = torch.optim.AdamW(common.parameter_groups(model, 0.05, module.decays), betas=(0.9, 0.95))
    return plain_loop(config, module.Augment(config), lambda batch, *_: model(*module.inputs(batch, ONE.device))[0],
                      optimizer, rates(0.01 * 8 / 256, **schedule))


def compare_loops(module, plain, flags=FLAGS):
    seen, models = [], []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        run = common.Run(module.METHOD, config_of(module, flags), Path(folder, "run"))
        patch.setattr(common, "find_data", lambda *_, **__: IMAGES)
        patch.setattr(module, "preview", lambda *_: models[0].eval())
        patch.setattr(module, "build", lambda *a, build=module.build: models.append(build(*a)) or models[0])
        patch.setattr(run, "record", lambda record=run.record, **values: record(**values) or seen.append(
            (models[0].require_backward_grad_sync, models[0].training)))
        module.train(run.config, run, ONE)
        state, log = torch.load(run.checkpoint), [*map(json.loads, open(run.folder / "log.jsonl"))]
        exported = load_file(run.folder / "encoder.safetensors")
    assert exported["patch_embed.proj.weight"].shape[1] == 3 and set(exported) == set(models[0].encoder.state_dict())
    # Processes would share their gradients in a step's last backward pass.
    assert seen == [(False, True), (True, True)] * 5 and state["step"] == 5
    for line, expected in zip(log, plain[0], strict=True):
        assert (line["loss"], line["lr"], line["grad_norm"]) == pytest.approx(expected, rel=1e-4)
    groups = zip(state["optimizer"]["param_groups"], plain[1].param_groups, strict=True)
    assert all((ours["betas"], ours["weight_decay"], len(ours["params"])) == (
        theirs["betas"], theirs["weight_decay"], len(theirs["params"])) for ours, theirs in groups)


LOOP = [(title, "train", *change) for title, *change in (
    ("the optimiser does not step", "optimizer.step()", "pass"),
    ("gradients add up over the steps", "optimizer.zero_grad(set_to_none=True)", "pass"),
    ("losses of micro batches are summed", "loss / plan.accumulation", "loss"),
    ("gradients are shared but for the last backward pass", "micro == plan", "micro != plan"),
    ("the learning rate is not set", 'group["lr"] = lr', "pass"),
    ("the schedule is a step ahead", "learning_rate(step,", "learning_rate(step + 1,"),
    ("warm-up in epochs", "config.warmup_epochs * plan.steps_per_epoch", "config.warmup_epochs"),
    ("all decay", "AdamW(groups,", "AdamW(model.parameters(),"),
    ("the checkpoint is a step behind", "optimizer, step + 1", "optimizer, step"),
    ("a picture ends training mode", "device)) model.train()", "device))"))]


def check_loop(module, name):
    compare_loops(module, plain_run(mfm_mae, start=1e-4))


# Mistakes, {(check, case) that catches them: [(what is wrong, place, pattern, wrong, ...)]}, see mutants.py.
FUSE, LAYERS = "self.fusion(outputs)", "self.encoder.layers(images, self.out_indices, ids_keep=ids_keep)"
TABLE = "load_state_dict(weights", "load_state_dict(weights | {name: own[name] for name in own if '%spos' in name}"
SWAP = "[(a, b.translate({49: 50, 50: 49}) if '%s' in b else b) for a, b in MMPRETRAIN]"  # 1 for 2, 2 for 1
TRUNK = """x, outputs, maps = self.encoder.embed(images, ids_keep=ids_keep), [], iter(self.fusion.projections)
        for i, block in enumerate(self.encoder.blocks):
            x = block(x)
            if i in self.out_indices:
                outputs, x = [*outputs, x], next(maps)(x)"""
TARGET, ALL = "pixel_target(images, %s", "torch.cat([ids_keep, ids_masked], dim=1)"
test_checks = checks(mfm_mae, {
    (check_outputs, "mfm"): [("each layer normed before the fusion", "MFMMAE.encode", "self.encoder.norm", "",
         "MFMMAE.encode", FUSE, "self.fusion([self.encoder.norm(h) for h in outputs])"),
        ("normed twice", "MFMMAE.encode", FUSE, f"self.encoder.norm({FUSE})"),
        ("class token not fused", "MFMMAE.encode", FUSE, f"torch.cat([outputs[-1][:, :1], {FUSE}[:, 1:]], dim=1)"),
        ("projections feed the trunk", "MFMMAE.encode", f"outputs = {LAYERS}", TRUNK),
        ("blocks counted from 1", "MFMMAE.encode", "self.out_indices", "[i - 1 for i in self.out_indices]"),
        ("last block mapped", "Fusion.forward", "self.projections", "[*self.projections][:-1] + [self.projections[0]]"),
        ("weights without softmax", "Fusion.weights", "softmax(dim=0)", "div(self.logits.sum())"),
        ("weights in reverse order", "Fusion.forward", "self.weights", "self.weights.flip(0)"),
        ("a plain mean", "Fusion.weights", "softmax(dim=0)", "mul(0).softmax(dim=0)"),
        ("encoder's table made anew", "eval.official:load_official", TABLE[0], TABLE[1] % "r."),
        ("decoder's table made anew", "eval.official:load_official", TABLE[0], TABLE[1] % "r_"),
        ("layers of the MLP swapped", "eval.official:MFM", "MMPRETRAIN", SWAP % "mlp"),
        ("norms swapped", "eval.official:MFM", "MMPRETRAIN", SWAP % ".norm")],
    (check_outputs, "mae"): [("not normed", "MFMMAE.encode", "self.encoder.norm", ""),
        ("tokens not put back", "MFMMAE.decode", ".argsort(dim=1)", ""),
        ("no positions in the decoder", "MFMMAE.decode", "+ self.decoder_pos_embed", ""),
        ("class token not in the decoder", "MFMMAE.decode", "[x[:, :1], patches]", "[0 * x[:, :1], patches]"),
        ("class token instead of the last patch", "MFMMAE.decode", "ids + 1", "ids"),
        ("no norm before the prediction", "MFMMAE.predict", "self.decoder_norm", "")],
    (check_losses, "mae"): [
        ("target in the order of the convolution", "pixel_target", "common.patchify(images, patch_size)",
         "rearrange(images, 'b c (h p) (w q) -> b (h w) (c p q)', p=patch_size[0], q=patch_size[1])"),
        ("biased variance", "pixel_target", "var(", "var(correction=0, "),
        ("epsilon outside the root", "pixel_target", "+ 1e-6).sqrt()", ").sqrt() + 1e-6"),
        ("no epsilon", "pixel_target", "+ 1e-6", ""),
        ("normalised though not asked for", "pixel_target", "not norm_pix", "False"),
        ("sum over the patch vector", "squared_error", "mean(", "sum("),
        ("absolute error", "squared_error", "square()", "abs()"),
        ("LayerNorm's own epsilon", "MFMMAE.__init__", "(decoder_dim, eps=1e-6)", "(decoder_dim)"),
        ("polarity of the mask", "common:mask_to_ids", "hidden.byte()", "(~hidden).byte()")],
    (check_losses, "mfm"): [("visible patches count too", "MFMMAE.forward", TARGET % "ids_masked", TARGET % ALL,
         "MFMMAE.forward", "ids_masked, ids_masked)", f"ids_masked, {ALL})"),
        ("visible patches instead", "MFMMAE.forward", TARGET % "ids_masked", TARGET % "ids_keep", "MFMMAE.forward",
         "ids_masked, ids_masked)", "ids_masked, ids_keep)"),
        ("ids swapped", "MFMMAE.forward", "ids_keep, ids_masked =", "ids_masked, ids_keep ="),
        ("shallow blocks not projected", "Fusion.forward", "project(h)", "h"),
        ("shallow blocks detached", "Fusion.forward", "project(h)", "project(h if h is outputs[-1] else h.detach())"),
        ("logits not learnt", "MFMMAE.__init__", 'learnable=fusion == "average"', "learnable=False")],
    (check_downstream, "mae"): [],
    (check_downstream, "mfm"): [("fused mixture downstream", "MFMMAE.__init__", "common.xavier_init(self)",
         "self.encoder.forward = lambda images: self.encode(images, None)")],
    (check_decay, ""): [("logits do not decay", "decays", 'name == "fusion.logits" or', ""),
        ("tokens decay", "decays", 'and "token" not in name', "")],
    (check_config, ""): [("rounded count of visible patches", "Config.num_masked", "int(", "round("),
        ("hidden patches cut off", "Config.num_masked", "return", "return int(self.num_patches * self.mask_ratio) or"),
        ("six blocks before the last", "Config.out_indices", "range(5)", "range(6)")],
    (check_low_pass, ""): [("centred on the zero frequency", "low_pass", "(size - 1) / 2", "size // 2"),
        ("real part", "low_pass", "abs()", "real"),
        ("of normalised values", "low_pass", "common.unnormalise(images)", "images"),
        ("the radius stays at 40", "low_pass", "* min(H, W) / 224", ""), ("high frequencies", "low_pass", "<=", ">")],
    (check_attention, ""): [("the first block asks", "AttentionFusion.forward", "projected[-1]", "projected[0]"),
        ("residual path", "AttentionFusion.forward", "return", "return projected[-1] +"),
        ("to the last block alone", "AttentionFusion.forward", "torch.cat(projected, dim=1)", "projected[-1]"),
        ("no block vectors", "AttentionFusion.forward", "+ e", "+ 0 * e")],
    (check_initialisation, ""): [
        ("decoder's table row first", "MFMMAE.__init__", "self.encoder.grid)", "self.encoder.grid, 'row')"),
        ("torch's own initialisation", "MFMMAE.__init__", "common.xavier_init(self)", "pass"),
        ("logits start at 0", "Fusion.__init__", "torch.ones", "torch.zeros")],
    (check_augment, "resize_crop"): [("resized bicubic", "Augment.__call__", "Mode.BILINEAR", "Mode.BICUBIC"),
        ("the edge repeated", "reflect", "size - 1 - (size - 1 - places.abs()).abs()", "places.clamp(0, size - 1)")],
    (check_augment, "rrc"): [("smaller crops", "Augment.__call__", "(0.2, 1.0)", "(0.08, 1.0)"),
        ("always flipped", "Augment.__call__", "torch.rand(()) < 0.5", "torch.rand(()) < 2")],
    (check_preview, ""): [("not brought back from norm_pix", "preview", "pred * std", "pred"),
        ("the visible patches grey", "preview", "~hidden, 0.5", "hidden, 0.5"),
        ("prediction pasted at visible patches", "preview", "~hidden, pred", "hidden, pred")],
    (check_loop, ""): [*LOOP, ("warm-up from 0", "train", "start=1e-4 * config.peak_lr", "start=0"),
        ("torch's betas", "train", "betas=(0.9, 0.95)", "betas=(0.9, 0.999)")]})


@pytest.mark.parametrize("place, right", [("decays", "which parameters"), ("decays", "[D4]"), ("Fusion.weigths", "x")])
def test_a_lost_anchor_is_named(place, right):
    """Prose does not count, and a place that is gone is as bad as a pattern."""
    refused(f"'tokens decay' has lost its anchor: .* 0 times in {place}", mutant, mfm_mae, "tokens decay", place, right,
            "", error=pytest.fail.Exception)


@pytest.mark.parametrize("changes", [
    dict(fuse=()), dict(fuse=(3,)), {}, dict(fusion="uniform"), dict(fusion="attention"), dict(projection="none"),
    dict(target="lowpass"), dict(norm_pix=False)], ids=str)
def test_savings_change_no_number(changes):
    """Loss and every gradient equal the plain path: all patches embedded, all predicted, a float mask. What is
    trained has a gradient, so shallow features are not detached; what is learnt of the fusion is logged."""
    model = tiny(**changes).double()
    images, mask = random_inputs(torch.float64)
    for name, parameter in model.named_parameters():
        parameter.data += torch.arange(3) if name == "fusion.logits" and parameter.requires_grad else 0
    loss, parts = model(images, mask)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    encoder, fusion, w = model.encoder, model.fusion, None
    x = encoder.patch_embed.proj(images).flatten(2).transpose(1, 2) + encoder.pos_embed[:, 1:]
    x = torch.stack([tokens[~row] for tokens, row in zip(x, mask)])
    x, outputs = torch.cat([encoder.cls_token.expand(4, -1, -1), x], dim=1), []
    for block in encoder.blocks:
        x = block(x)
        outputs.append(x)
    if changes.get("fusion") == "attention":
        x = fusion([outputs[k] for k in (0, 1, 3)])  # see check_attention
    elif fusion is not None:
        assert isinstance(fusion.projections[0], torch.nn.Linear) == ("projection" not in changes)
        w = fusion.logits.exp() / fusion.logits.exp().sum()
        x = w[0] * fusion.projections[0](outputs[0]) + w[1] * fusion.projections[1](outputs[1]) + w[2] * outputs[3]
    x = model.decoder_embed(encoder.norm(x))
    table = model.mask_token.repeat(4, 17, 1)
    table[torch.cat([torch.ones(4, 1).bool(), ~mask], dim=1)] = x.flatten(0, 1)
    x = table + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x = block(x)
    pred = model.decoder_pred(model.decoder_norm(x))[:, 1:]
    target = reference_low_pass(images, 40 * 32 / 224) if "target" in changes else images
    target = target.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(4, 16, 192)
    if "norm_pix" not in changes:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    plain = (((pred - target) ** 2).mean(dim=-1) * mask.double()).sum() / mask.double().sum()
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-12)
    for name, grad in ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None):
        close(ours[name], grad, atol=1e-12, msg=name)
    frozen = {n for n, _ in model.named_parameters()} - ours.keys() - {"encoder.pos_embed", "decoder_pos_embed"}
    assert frozen == ({"fusion.logits"} if changes.get("fusion") == "uniform" else set())
    learnt = 3 * ("fusion.logits" in ours)
    assert parts == {f"weight_{k}": pytest.approx(w[k].item()) for k in range(learnt)}
    assert not any(share.requires_grad for share in parts.values())


def test_constant_patches_and_what_cannot_be():
    images, mask = random_inputs()
    loss, _ = tiny()(torch.zeros_like(images), mask)
    loss.backward()
    assert loss.isfinite()
    for wrong, match in ((torch.zeros_like(mask), "hides no patch"), (mask ^ (torch.arange(4) == 0)[:, None], "same")):
        refused(match, tiny(), images, wrong)
    fused = [dict(fuse=fuse) for fuse in ((0, 2), (3, 1), (1, 1, 3), (-1, 3), (4,), (0, 1, 2, 3, 4))]
    for changes in (*fused, dict(fusion="mean"), dict(projection="mlp"), dict(target="clip")):
        refused("must rise" if "fuse" in changes else "is none of", tiny, **changes)


def test_parameter_counts():
    """Of the released code, both frozen position tables included."""
    counts = {("vit_b", "none"): 111_907_840, ("vit_b", ""): 114_860_806, ("vit_s", "none"): 36_381_696,
              ("vit_s", ""): 37_120_902, ("vit_l", "none"): 329_541_888}
    for (size, fuse), count in counts.items():
        with torch.device("meta"):
            model = mfm_mae.build(mfm_mae.Config(model=size, fuse=fuse))
        assert sum(p.numel() for p in model.parameters()) == count
        assert size != "vit_b" or sum(p.numel() for p in model.encoder.parameters()) == 85_798_656


def test_released_recipe():
    for size in mfm_mae.SIZES.keys() - {"vit_demo"}:  # the decoders: tests/test_readme.py
        c = config_of(mfm_mae, f"--model={size}")
        assert (c.epochs, c.batch_size, c.lr, c.warmup_epochs, c.weight_decay) == (300, 4096, 1.5e-4, 40, 0.05)
        assert (c.mask_ratio, c.augment, c.norm_pix, c.target) == (0.75, "resize_crop", "on", "pixels")
        assert (c.fusion, c.projection, c.patch_size) == ("average", "linear", 14 if size == "vit_h" else 16)
        assert c.peak_lr == pytest.approx(2.4e-3) and c.num_masked == (192 if size == "vit_h" else 147)
    rate = common.learning_rate(200, 2.4e-3, 400, 3000, start=1e-4 * 2.4e-3)  # mmengine's, in an epoch of 10 steps
    assert rate == pytest.approx(1.203127e-3, rel=1e-6)


def learn_by_heart(model, decays, inputs, lr, steps):
    """The first loss, and the last after so many steps on the same inputs."""
    optimizer, losses = torch.optim.AdamW(common.parameter_groups(model, 0.0, decays), lr=lr), []
    for step in range(steps):
        losses.append(model(*inputs)[0])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return losses[0].item(), losses[-1].item()
