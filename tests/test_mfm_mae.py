"""MFM and MAE against the released code's own numbers (golden/mfm_mae.pt), and proof that these can fail.

Each `check_...` compares one part of a module with the golden file or with a formula. The tests call them with
`mfm_mae`, and with copies in which a line is wrong (MISTAKES). The loop's are those of all three methods (LOOP).
"""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torchvision import transforms
from torchvision.transforms import functional as pil

import common
import mfm_mae
from eval import official
from mutants import assert_caught, cases, mutant

GOLDEN = torch.load(Path(__file__).parent / "golden" / "mfm_mae.pt", weights_only=True)
TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, decoder_dim=16, decoder_depth=2,
            decoder_heads=2, fuse=(0, 1, 3))


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


def config_of(module, flags=""):
    return common.parse_config(module.Config, "", module.SIZES, module.DEMO, flags.split(), module.DEPENDS)


def random_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 32, 32, generator=generator).to(dtype)
    return images, common.random_masks(4, 16, 12, generator)


def predictions(model, images, mask):
    """The pred of all patches."""
    ids = torch.arange(mask.shape[1]).expand(len(mask), -1)
    return model.predict(images, *common.mask_to_ids(mask, images.device), ids)


# -- against the released numbers


def check_outputs(module, name, dtype=torch.float32):
    """Golden tensors are float32, so float64 is compared with them at float32's rounding."""
    case, model = GOLDEN[name], build(module, name, dtype).eval()
    images, mask = case["images"].to(dtype), case["mask"].bool()
    with torch.no_grad():
        latent = model.encode(images, common.mask_to_ids(mask, "cpu")[0])
        pred = predictions(model, images, mask)
    kept = case["ids_keep"].argsort(dim=1)  # theirs stand in a random order, ours ascend
    golden = torch.cat([case["latent"][:, :1], common.gather(case["latent"][:, 1:], kept)], dim=1)
    torch.testing.assert_close(latent.float(), golden, atol=1e-5, rtol=0)
    torch.testing.assert_close(pred.float(), case["pred"], atol=1e-5, rtol=0)
    weights = case["fusion_weights"] if name == "mfm" else torch.ones(1)
    torch.testing.assert_close(model.fusion_weights.float(), weights, atol=1e-6, rtol=0)


def losses(module, name, result):
    """Yields (dtype, model, loss, golden `result`), with and without normalised patches; the golden numbers are
    those of a float64 run."""
    case = GOLDEN[name]
    for dtype in (torch.float32, torch.float64):
        for kind, norm_pix in (("raw", False), ("norm_pix", True)):
            model = build(module, name, dtype, norm_pix=norm_pix)
            loss, parts = model(case["images"].to(dtype), case["mask"].bool())
            shares = torch.stack(list(parts.values())) if parts else torch.ones(1)
            assert shares.tolist() == pytest.approx(model.fusion_weights.tolist())
            yield dtype == torch.float64, model, loss, case[f"{result}_{kind}"]


def check_losses(module, name):
    for precise, _, loss, golden in losses(module, name, "loss"):
        assert loss.item() == pytest.approx(golden, abs=1e-12 if precise else 1e-5)


def our_name(theirs):
    (name,) = official.renamed({theirs: 0}, official.MFM)
    return name if name.startswith(("encoder", "fusion", "mask_token", "decoder")) else f"encoder.{name}"


def check_gradients(module, name):
    for precise, model, loss, golden in losses(module, name, "grad_norm"):
        loss.backward()
        ours = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
        relative = 1e-10 if precise else 1e-4
        assert ours == {our_name(n): pytest.approx(x, rel=relative, abs=1e-9) for n, x in golden.items()}


def check_downstream(module, name):
    """The bare encoder on whole images: the last block alone, nothing of the fusion."""
    case, encoder = GOLDEN[name], build(module, name).encoder
    torch.testing.assert_close(encoder(case["images"])[:, 0], case["vit_cls_feature"], atol=1e-5, rtol=0)
    last = encoder.layers(case["images"], [-1])[0][:, 1:].mean(dim=1)
    torch.testing.assert_close(last, case["vit_patch_mean"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["mae", "mfm"])
@pytest.mark.parametrize("check", [check_outputs, check_losses, check_gradients, check_downstream])
def test_matches_the_released_code(check, name):
    check(mfm_mae, name)
    if check == check_outputs:
        check(mfm_mae, name, torch.float64)


# -- by formulas


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
        expected = reference_low_pass(images, radius)
        torch.testing.assert_close(module.low_pass(images), expected, atol=1e-12, rtol=0)


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
    expected = theirs(u[2], torch.cat(u, dim=1), torch.cat(u, dim=1))[0]
    torch.testing.assert_close(fusion(outputs), expected, atol=1e-5, rtol=0)


def check_config(module, name):
    """The count of visible patches is cut off in floating point, 9 of 100, not 10; blocks by depth [D1]."""
    for grid, ratio, kept in ((10, 0.9, 9), (20, 0.9, 39), (14, 0.75, 49), (8, 0.75, 16), (14, 0.6, 78)):
        config = module.Config(img_size=grid * 8, patch_size=8, mask_ratio=ratio)
        assert grid**2 - config.num_masked == kept
    blocks = {12: (0, 2, 4, 6, 8, 11), 24: (0, 4, 8, 12, 16, 23), 32: (0, 5, 10, 16, 21, 31), 4: (0, 1, 2, 3),
              6: (0, 1, 2, 3, 4, 5), 2: (0, 1), 1: (0,)}
    for depth, expected in blocks.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(module.SIZES, "vit_s", dict(depth=depth))
            assert module.Config(model="vit_s").out_indices == expected
    assert module.Config(fuse="3,5,11").out_indices == (3, 5, 11) and module.Config(fuse="none").out_indices == ()


def check_decay(module, name):
    """mmpretrain's rule by its words: ln, bias, pos_embed, mask_token, cls_token in a name: no weight decay."""
    model, theirs = build(module, "mfm"), GOLDEN["mfm"]["state_dict"].keys()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {g["weight_decay"]: {names[id(p)] for p in g["params"]}
              for g in common.parameter_groups(model, 0.05, module.decays)}
    spared = {n for n in theirs if any(
        word in n for word in ("ln", "bias", "pos_embed", "mask_token", "cls_token"))}
    assert groups[0.0] == {our_name(n) for n in spared if "pos_embed" not in n}
    assert groups[0.05] == {our_name(n) for n in theirs - spared}
    assert "fusion.logits" in groups[0.05] and len(groups[0.05]) == 2 + 4 * 14 + 5 + 2


def check_positions(module, name):
    """Those of a new model are MAE's [D3], of which mmpretrain's are the two halves swapped."""
    state, model = GOLDEN["mae"]["state_dict"], module.MFMMAE(64, 16, 48, 1, 4, 32, 1, 4, fuse=())
    torch.testing.assert_close(model.encoder.pos_embed.data, state["pos_embed"], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decoder_pos_embed.data, state["decoder_pos_embed"], atol=1e-5, rtol=0)
    theirs = GOLDEN["mfm"]["state_dict"]["backbone.pos_embed"]
    torch.testing.assert_close(theirs, state["pos_embed"].roll(24, -1), atol=1e-5, rtol=0)


def check_initialisation(module, name):
    """Xavier for every Linear, the fusion's too; the convolution keeps its own bias [D6]."""
    torch.manual_seed(0)
    model = module.MFMMAE(32, 4, 192, 4, 4, 96, 2, 4, fuse=(0, 1, 3))
    linears = {n: layer for n, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert "fusion.projections.1" in linears and "decoder_embed" in linears
    for layer in linears.values():
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
    """Bit for bit up to rounding what torchvision makes of a PIL image, with the same draws."""
    config = module.Config(img_size=64, patch_size=8, augment=name)
    rrc = transforms.RandomResizedCrop(64, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    crop = transforms.RandomCrop(64, padding=4, padding_mode="reflect")
    for seed, size in enumerate([(90, 120), (64, 64), (40, 200), (64, 70), (90, 120), (70, 90)], 3):
        image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(seed)
        ours, mask = module.Augment(config)(image, -1)
        torch.manual_seed(seed)
        theirs = pil.to_pil_image(image)  # `resize` is bilinear unless told otherwise
        theirs = rrc(theirs) if name == "rrc" else crop(pil.resize(theirs, 64))
        theirs = pil.hflip(theirs) if torch.rand(()) < 0.5 else theirs
        assert (ours.int() - pil.pil_to_tensor(theirs).int()).abs().max() <= 1
        assert ours.dtype == torch.uint8 and mask.shape == (64,) and mask.sum() == 48


def check_preview(module, name):
    """Where pred is the truth, both last columns show the image, but for the pasted side."""
    config, device = module.Config(img_size=32, patch_size=8), torch.device("cpu")
    sheets, images = [], torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    mask = common.random_masks(2, 16, 12, torch.Generator().manual_seed(0))
    shift = torch.where(mask, 0.0, 1.0)[:, :, None]  # wrong at visible patches alone
    for norm_pix in (True, False):
        model = module.MFMMAE(**TINY, norm_pix=norm_pix)
        model.predict = lambda images, ids_keep, ids_masked, ids: shift + mfm_mae.pixel_target(
            images, ids, 8, norm_pix)[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common, "save_panels", lambda *a: sheets.append(a))
            module.preview("x.png", config, model, (images, mask), device)
        _, rows, captions, note = sheets[-1]
        hidden = mask.reshape(2, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)
        for (seen, masked, pred, pasted), image, where in zip(rows, images.float() / 255, hidden):
            for ours, expected in ((seen, image), (masked, torch.where(where, 0.5, image)), (pasted, image),
                                   (pred[:, where], image[:, where])):
                torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
            assert (pred[:, ~where] - image[:, ~where]).abs().min() > 0.01
        assert len(captions) == 4 and ("leaks" in note) == norm_pix


# -- the loop, for all three methods

FLAGS = ("--demo --device=cpu --workers=0 --batch_size=8 --micro_batch=4 --epochs=4 --warmup_epochs=1 --lr=0.01 "
         "--max_steps=5 --save_every=2 --log_every=1 ")
PIXELS = torch.randint(256, (16, 3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
ONE = common.Dist(0, 1, torch.device("cpu"))


class WatchedRun(common.Run):
    """Notes at each micro batch whether gradients would be shared, and whether the model is in training."""

    def load(self, model):
        self.model, self.seen = super().load(model), []
        return self.model

    def record(self, **values):
        self.seen.append((self.model.require_backward_grad_sync, self.model.training))
        super().record(**values)


def batches(config, augment):
    """The batches of the five steps of FLAGS, each as two micro batches."""
    samples = common.Samples(common.Images(PIXELS), augment, config.seed)
    plan = common.make_plan(16, 8, 4, 4, 1)
    keys = [*common.micro_batch_keys(16, plan, ONE, config.seed, 0, 5)]
    made = [torch.utils.data.default_collate([samples[key] for key in micro]) for micro in keys]
    return [made[step: step + 2] for step in range(0, 10, 2)]


@functools.cache
def plain_loop(module, start=0.0, end=0.0):
    """What `train` should do, without its plumbing: [(loss, rate, norm of the gradient)], the optimiser."""
    config, log = config_of(module, FLAGS), []
    model, peak = module.build(config), 0.01 * 8 / 256
    optimizer = torch.optim.AdamW(common.parameter_groups(model, 0.05, module.decays), betas=(0.9, 0.95))
    for k, pair in zip((None, 0, 0, 1, 2), batches(config, module.Augment(config))):  # warm-up: two steps
        rate = peak * start if k is None else end + (peak - end) * (1 + np.cos(np.pi * k / 6)) / 2
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = rate
        loss = sum(model(*module.inputs(batch, ONE.device))[0] for batch in pair) / 2
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        optimizer.step()
        log.append((loss.item(), rate, norm.item()))
    return log, optimizer


def compare_loops(module, plain, flags=FLAGS):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "find_data", lambda *_: common.Images(PIXELS))
        patch.setattr(module, "preview", lambda path, config, model, *_: model.eval())
        run = WatchedRun(module.METHOD, config_of(module, flags), Path(folder, "run"))
        module.train(run.config, run, ONE)
        state, log = torch.load(run.checkpoint), [*map(json.loads, open(run.folder / "log.jsonl"))]
    assert run.seen == [(False, True), (True, True)] * 5 and state["step"] == len(log) == 5
    for line, expected in zip(log, plain[0]):
        assert (line["loss"], line["lr"], line["grad_norm"]) == pytest.approx(expected, rel=1e-4)
    groups = zip(state["optimizer"]["param_groups"], plain[1].param_groups, strict=True)
    assert all((ours["betas"], ours["weight_decay"], len(ours["params"])) == (
        theirs["betas"], theirs["weight_decay"], len(theirs["params"])) for ours, theirs in groups)


def check_loop(module, name):
    compare_loops(module, plain_loop(mfm_mae, start=1e-4))


LOOP = [(title, "train", *change) for title, *change in (
    ("the optimiser does not step", "optimizer.step()", "pass"),
    ("gradients add up over the steps", "optimizer.zero_grad(set_to_none=True)", "pass"),
    ("the micro batches' losses are summed", "loss / plan.accumulation", "loss"),
    ("gradients are shared but for the last backward pass", "micro == plan", "micro != plan"),
    ("the learning rate is not set", 'group["lr"] = lr', "pass"),
    ("the schedule is a step ahead", "learning_rate(step,", "learning_rate(step + 1,"),
    ("warm-up in epochs", "config.warmup_epochs * plan.steps_per_epoch", "config.warmup_epochs"),
    ("all decay", "AdamW(groups,", "AdamW(model.parameters(),"),
    ("the checkpoint is a step behind", "optimizer, step + 1", "optimizer, step"),
    ("a picture ends training mode", "device) model.train()", "device)"),
)]


@pytest.mark.parametrize("check, name", [
    *((check, "") for check in (check_low_pass, check_attention, check_config, check_decay, check_positions,
                                check_initialisation, check_preview, check_loop)),
    (check_augment, "resize_crop"), (check_augment, "rrc")])
def test_matches_the_specification(check, name):
    check(mfm_mae, name)


# -- mistakes, {(check, case that catches it): [(what is wrong, place, pattern, wrong, ...)]}, see mutants.py

FUSE, ALL = "self.fusion(outputs)", "torch.cat([ids_keep, ids_masked], dim=1)"
SWAP = "[(a, b.translate({49: 50, 50: 49}) if %s in b else b) for a, b in MMPRETRAIN]"  # 1 for 2, 2 for 1
TRUNK = """x, outputs, maps = self.encoder.embed(images, ids_keep=ids_keep), [], iter(self.fusion.projections)
        for i, block in enumerate(self.encoder.blocks):
            x = block(x)
            if i in self.out_indices:
                outputs, x = [*outputs, x], next(maps)(x)"""
MISTAKES = {
    (check_outputs, "mfm"): [
        ("each layer normed before the fusion", "MFMMAE.encode", "self.encoder.norm", "",
         "MFMMAE.encode", FUSE, "self.fusion([self.encoder.norm(h) for h in outputs])"),
        ("normed twice", "MFMMAE.encode", FUSE, f"self.encoder.norm({FUSE})"),
        ("the last block projected", "Fusion.forward", "self.projections", "self.projections[:-1].append(self.projections[0])"),
        ("class token not fused", "MFMMAE.encode", FUSE, f"torch.cat([outputs[-1][:, :1], {FUSE}[:, 1:]], dim=1)"),
        ("projections feed the trunk", "MFMMAE.encode",
         "outputs = self.encoder.layers(images, self.out_indices, ids_keep=ids_keep)", TRUNK),
        ("blocks counted from 1", "MFMMAE.encode", "self.out_indices", "[i - 1 for i in self.out_indices]"),
        ("weights without softmax", "Fusion.weights", "softmax(dim=0)", "div(self.logits.sum())"),
        ("weights in reverse order", "Fusion.forward", "self.weights", "self.weights.flip(0)"),
        ("a plain mean", "Fusion.weights", "softmax(dim=0)", "mul(0).softmax(dim=0)"),
        ("encoder's table computed anew", "eval.official:load_official", "load_state_dict(weights",
         "load_state_dict(weights | {'encoder.pos_embed': own['encoder.pos_embed']}"),
        ("decoder's table computed anew", "eval.official:load_official", "load_state_dict(weights",
         "load_state_dict(weights | {'decoder_pos_embed': own['decoder_pos_embed']}"),
        ("layers of the MLP swapped", "eval.official:MFM", "MMPRETRAIN", SWAP % "'mlp'"),
        ("norms swapped", "eval.official:MFM", "MMPRETRAIN", SWAP % "'.norm'")],
    (check_outputs, "mae"): [
        ("not normed", "MFMMAE.encode", "self.encoder.norm", ""),
        ("tokens not put back", "MFMMAE.decode", ".argsort(dim=1)", ""),
        ("no positions in the decoder", "MFMMAE.decode", "+ self.decoder_pos_embed", ""),
        ("class token not in the decoder", "MFMMAE.decode", "[x[:, :1], patches]", "[0 * x[:, :1], patches]"),
        ("class token instead of the last patch", "MFMMAE.decode", "return x[:, 1:]", "return x[:, :-1]"),
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
        ("polarity of the mask", "common:mask_to_ids", "mask.byte()", "(~mask).byte()")],
    (check_losses, "mfm"): [
        ("visible patches count too", "MFMMAE.forward", "pixel_target(images, ids_masked",
         f"pixel_target(images, {ALL}", "MFMMAE.forward", "ids_masked, ids_masked)", f"ids_masked, {ALL})"),
        ("visible patches instead", "MFMMAE.forward", "pixel_target(images, ids_masked", "pixel_target(images, ids_keep",
         "MFMMAE.forward", "ids_masked, ids_masked)", "ids_masked, ids_keep)"),
        ("ids swapped", "MFMMAE.forward", "ids_keep, ids_masked =", "ids_masked, ids_keep ="),
        ("shallow blocks not projected", "Fusion.forward", "project(h)", "h")],
    (check_gradients, "mfm"): [
        ("shallow blocks detached", "MFMMAE.encode", FUSE, "self.fusion([h.detach() for h in outputs[:-1]] + outputs[-1:])"),
        ("logits not learnt", "MFMMAE.__init__", 'learnable=fusion == "average"', "learnable=False")],
    (check_downstream, "mfm"): [
        ("fused mixture downstream", "MFMMAE.__init__", "common.xavier_init(self)",
         "self.encoder.forward = lambda images: self.encode(images, None)")],
    (check_decay, ""): [
        ("logits do not decay", "decays", 'name == "fusion.logits" or', ""),
        ("tokens decay", "decays", 'and "token" not in name', "")],
    (check_config, ""): [
        ("rounded count of visible patches", "Config.num_masked", "int(", "round("),
        ("truncated count of hidden patches", "Config.num_masked",
         "self.num_patches - int(self.num_patches * (1 - self.mask_ratio))", "int(self.num_patches * self.mask_ratio)"),
        ("six blocks before the last", "Config.out_indices", "range(5)", "range(6)")],
    (check_low_pass, ""): [
        ("centred on the zero frequency", "low_pass", "(size - 1) / 2", "size // 2"),
        ("real part", "low_pass", "abs()", "real"),
        ("of normalised values", "low_pass", "common.unnormalise(images)", "images"),
        ("the radius stays at 40", "low_pass", "* min(H, W) / 224", ""),
        ("high frequencies", "low_pass", "<=", ">")],
    (check_attention, ""): [
        ("the first block asks", "AttentionFusion.forward", "projected[-1]", "projected[0]"),
        ("residual path", "AttentionFusion.forward", "return", "return projected[-1] +"),
        ("to the last block alone", "AttentionFusion.forward", "torch.cat(projected, dim=1)", "projected[-1]"),
        ("no block vectors", "AttentionFusion.forward", "+ e", "+ 0 * e")],
    (check_positions, ""): [
        ("table row first", "MFMMAE.__init__", "(decoder_dim, self.encoder.grid", "(decoder_dim, self.encoder.grid, 'row'")],
    (check_initialisation, ""): [
        ("torch's own initialisation", "MFMMAE.__init__", "common.xavier_init(self)", "pass"),
        ("logits start at 0", "Fusion.__init__", "torch.ones", "torch.zeros")],
    (check_augment, "resize_crop"): [
        ("resized bicubic", "Augment.__call__", "Mode.BILINEAR", "Mode.BICUBIC"),
        ("zeros around", "Augment.__call__", '"reflect"', '"constant"')],
    (check_augment, "rrc"): [
        ("smaller crops", "Augment.__call__", "(0.2, 1.0)", "(0.08, 1.0)"),
        ("always flipped", "Augment.__call__", "torch.rand(()) < 0.5", "torch.rand(()) < 2")],
    (check_preview, ""): [
        ("not brought back from norm_pix", "preview", "pred * std", "pred"),
        ("the visible patches grey", "preview", "~hidden, 0.5", "hidden, 0.5"),
        ("prediction pasted at visible patches", "preview", "~hidden, pred", "hidden, pred")],
    (check_loop, ""): [
        *LOOP, ("warm-up from 0", "train", "start=1e-4 * config.peak_lr", "start=0"),
        ("torch's betas", "train", "betas=(0.9, 0.95)", "betas=(0.9, 0.999)")],
}


@pytest.mark.parametrize("mistake", cases(MISTAKES))
def test_mistake_is_caught(mistake):
    assert_caught(mfm_mae, *mistake)


@pytest.mark.parametrize("place, right", [("decays", "which parameters"), ("decays", "[D4]"), ("Fusion.weigths", "x")])
def test_a_lost_anchor_is_named(place, right):
    """Prose does not count, and a place that is gone is as bad as a pattern."""
    with pytest.raises(pytest.fail.Exception, match=f"'tokens decay' has lost its anchor: {place} holds .* 0 times"):
        mutant(mfm_mae, "tokens decay", place, right, "")


# -- against other implementations


@pytest.mark.parametrize("name", ["mae", "mfm"])
def test_vit_matches_timm(name):
    """With and without fusion in training, the encoder is timm's ViT, strictly loaded."""
    c, model = GOLDEN[name]["config"], build(mfm_mae, name)
    theirs = VisionTransformer(c["img_size"], c["patch_size"], embed_dim=c["embed_dim"], depth=c["depth"],
                               num_heads=c["num_heads"], num_classes=0).eval()
    theirs.load_state_dict(model.encoder.state_dict())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.encoder(images), theirs.forward_features(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [
    dict(fuse=()), {}, dict(fusion="uniform"), dict(fusion="attention"), dict(projection="none"),
    dict(target="lowpass"), dict(norm_pix=False)], ids=str)
def test_savings_change_no_number(changes):
    """Loss and every gradient equal the plain path: all patches embedded, all predicted, a float mask. All that
    is trained has a gradient, so shallow features are not detached."""
    model = tiny(**changes).double()
    images, mask = random_inputs(torch.float64)
    loss, _ = model(images, mask)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    encoder, fusion = model.encoder, model.fusion
    x = encoder.patch_embed.proj(images).flatten(2).transpose(1, 2) + encoder.pos_embed[:, 1:]
    x = torch.stack([tokens[~row] for tokens, row in zip(x, mask)])
    x, outputs = torch.cat([encoder.cls_token.expand(4, -1, -1), x], dim=1), []
    for block in encoder.blocks:
        x = block(x)
        outputs.append(x)
    if changes.get("fusion") == "attention":
        x = fusion([outputs[k] for k in (0, 1, 3)])  # see check_attention
    elif fusion is not None:
        assert isinstance(fusion.projections[0], torch.nn.Linear) == (changes.get("projection") != "none")
        w = fusion.logits.exp() / fusion.logits.exp().sum()
        assert w.tolist() == pytest.approx([1 / 3] * 3)  # at the start
        x = w[0] * fusion.projections[0](outputs[0]) + w[1] * fusion.projections[1](outputs[1]) + w[2] * outputs[3]
    x = model.decoder_embed(encoder.norm(x))
    table = model.mask_token.repeat(4, 17, 1)
    table[torch.cat([torch.ones(4, 1).bool(), ~mask], dim=1)] = x.flatten(0, 1)
    x = table + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x = block(x)
    pred = model.decoder_pred(model.decoder_norm(x))[:, 1:]
    target = reference_low_pass(images, 40 * 32 / 224) if changes.get("target") == "lowpass" else images
    target = target.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(4, 16, 192)
    if changes.get("norm_pix", True):
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    plain = (((pred - target) ** 2).mean(dim=-1) * mask.double()).sum() / mask.double().sum()
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-12)
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    frozen = {n for n, _ in model.named_parameters()} - ours.keys()
    assert frozen == {"encoder.pos_embed", "decoder_pos_embed", *(["fusion.logits"] * (changes.get("fusion") == "uniform"))}
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, atol=1e-12, rtol=0, msg=name)


# -- the fusion


def test_all_weight_on_the_last_block_is_mae_bit_for_bit():
    (images, mask), fused, plain, one = random_inputs(), tiny(), tiny(fuse=()), tiny(fuse=(3,))
    plain.load_state_dict(fused.state_dict(), strict=False)
    one.load_state_dict(plain.state_dict())  # the same parameters
    with torch.no_grad():
        fused.fusion.logits.copy_(torch.tensor([-1e4, -1e4, 1.0]))
    assert fused.fusion_weights.tolist() == [0, 0, 1]
    losses = [model(images, mask)[0] for model in (fused, plain, one)]
    assert losses[0] == losses[1] == losses[2]
    for loss in losses:
        loss.backward()
    grads = {name: parameter.grad for name, parameter in fused.named_parameters()}
    assert all(torch.equal(p.grad, grads[name]) for name, p in plain.named_parameters() if p.requires_grad)


def test_the_log_shows_the_weights_that_are_learnt():
    images, mask = random_inputs()
    model = tiny()
    with torch.no_grad():
        model.fusion.logits.copy_(torch.tensor([0.0, 1.0, 2.0]))
    parts = model(images, mask)[1]
    shares = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    assert {n: w.item() for n, w in parts.items()} == {f"weight_{k}": pytest.approx(w) for k, w in enumerate(shares)}
    assert not any(w.requires_grad for w in parts.values())
    for changes in (dict(fuse=()), dict(fuse=(3,)), dict(fusion="uniform"), dict(fusion="attention")):
        assert tiny(**changes)(images, mask)[1] == {}


@pytest.mark.parametrize("changes", [
    *(dict(fuse=fuse) for fuse in ((0, 2), (3, 1), (1, 1, 3), (-1, 3), (4,), (0, 1, 2, 3, 4))),
    dict(fusion="mean"), dict(projection="mlp"), dict(target="clip")])
def test_what_cannot_be_fused_or_asked_for(changes):
    with pytest.raises(ValueError, match="must rise" if "fuse" in changes else "is none of"):
        tiny(**changes)


def test_constant_patches_and_masks_that_cannot_be():
    images, mask = random_inputs()
    loss, _ = tiny()(torch.zeros_like(images), mask)
    loss.backward()
    assert loss.isfinite()
    with pytest.raises(ValueError, match="hides no patch"):
        tiny()(images, torch.zeros_like(mask))
    mask[0] = ~mask[0]
    with pytest.raises(ValueError, match="same number"):
        tiny()(images, mask)


# -- sizes and learning


def test_parameter_counts():
    """Of the released code, both frozen position tables included."""
    counts = {("vit_b", "none"): 111_907_840, ("vit_b", ""): 114_860_806, ("vit_s", "none"): 36_381_696,
              ("vit_s", ""): 37_120_902, ("vit_l", "none"): 329_541_888}
    for (size, fuse), count in counts.items():
        with torch.device("meta"):
            model = mfm_mae.build(mfm_mae.Config(model=size, fuse=fuse))
        assert sum(p.numel() for p in model.parameters()) == count
    with torch.device("meta"):
        defaults = mfm_mae.MFMMAE()
    assert sum(p.numel() for p in defaults.parameters()) == 114_860_806
    assert sum(p.numel() for p in defaults.encoder.parameters()) == 85_798_656


def test_released_recipe():
    for size in ("vit_ti", "vit_s", "vit_b", "vit_l", "vit_h"):
        c = config_of(mfm_mae, f"--model={size}")
        assert (c.epochs, c.batch_size, c.lr, c.warmup_epochs, c.weight_decay) == (300, 4096, 1.5e-4, 40, 0.05)
        assert (c.mask_ratio, c.augment, c.norm_pix, c.target) == (0.75, "resize_crop", "on", "pixels")
        assert (c.fusion, c.projection, c.patch_size) == ("average", "linear", 14 if size == "vit_h" else 16)
        assert c.peak_lr == pytest.approx(2.4e-3) and c.num_masked == (192 if size == "vit_h" else 147)
        assert mfm_mae.SIZES[size]["decoder_depth"] == 8
    assert [mfm_mae.SIZES[f"vit_{size}"]["decoder_dim"] for size in ("ti", "s", "b")] == [192, 384, 512]


def test_learning_rate_of_the_released_schedule():
    """300 epochs of 10 steps, 40 of warm-up: mmengine's numbers, then the cosine of MAE's epochs."""
    rate = lambda step: common.learning_rate(step, 2.4e-3, 400, 3000, start=1e-4 * 2.4e-3)
    assert rate(0) == pytest.approx(2.4e-7) and rate(200) == pytest.approx(1.203127e-3, rel=1e-6)
    assert rate(399) == pytest.approx(2.4e-3, rel=1e-12) and rate(400) == pytest.approx(2.4e-3)
    for step in (401, 1700, 2999):
        cosine = np.cos(np.pi * (step / 10 - 40) / 260)
        assert rate(step) == pytest.approx(2.4e-3 * 0.5 * (1 + cosine), rel=1e-9)


@pytest.mark.parametrize("fuse", [(), (0, 1, 3)], ids=["mae", "mfm"])
def test_eight_images_are_learnt_by_heart(fuse):
    images = common.normalise(common.find_data("scenes", "pretrain", 32, num_scenes=8).pixels)
    mask = common.random_masks(8, 64, 48, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = mfm_mae.MFMMAE(32, 4, 64, 4, 4, 64, 1, 4, fuse=fuse, norm_pix=False)
    groups = common.parameter_groups(model, 0.05, mfm_mae.decays)
    optimizer, losses = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95)), []
    for step in range(120):
        losses.append(model(images, mask)[0])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 0.8 and losses[-1] < 0.15 * losses[0]
