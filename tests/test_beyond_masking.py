"""Beyond Masking against the authors' own numbers (golden/beyond_masking.pt), and proof that they can fail: each
`check_...` is called with `beyond_masking`, and with copies of it in which a line is wrong (the table)."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

import beyond_masking
import common
from beyond_masking import TASKS
from eval.official import load_official
from helpers import refused
from mutants import checks
from test_cae_v2 import gradients
from test_mfm_mae import FLAGS, IMAGES, LOOP, ONE, close, compare_loops, config_of, plain_run

GOLDEN = torch.load(Path(__file__).parent / "golden" / "beyond_masking.pt", weights_only=True)
CASES = GOLDEN["variants"]
IN, OUT, FISH, BLUR, GREY = NAMES = list(CASES)
TASK = dict(zip(NAMES, ("mask+zoom_in", "mask+zoom_out", "distort", "blur", "decolor")))
# A model for anything: 3 x 6 patches of 7 pixels; clean images of 27 x 54 and 15 x 30 in the zooms.
SMALL = dict(img_size=(21, 42), patch_size=7, embed_dim=16, depth=2, num_heads=2, decoder_dim=12,
             decoder_depth=1, decoder_heads=2)


def masked(task):
    return task.startswith("mask")


def params_of(case):
    """The golden file's draws under our names."""
    p = case["sampled_params"]
    if "center_x_center_y_magnitude" in p:
        return dict(centre=p["center_x_center_y_magnitude"][:, :2], magnitude=p["center_x_center_y_magnitude"][:, 2])
    names = dict(rgb_weights="weights", conv_weight_per_sample="weight", conv_bias_shared="bias")
    return {names.get(name, name): value for name, value in p.items() if name in ("left", "top", *names)}


def mask_of(case):
    return case["mask"]["mask_1_is_removed"].bool() if "mask" in case else None


def build(module, name):
    c = CASES[name]["config"]
    model = module.BeyondMasking(TASK[name], c["img_size"], c["patch_size"], c["encoder_embed_dim"],
                                 c["encoder_depth"], c["encoder_num_heads"], c["decoder_embed_dim"],
                                 c["decoder_depth"], c["decoder_num_heads"])
    load_official(model, CASES[name]["state_dict"])
    return model


def small(task, module=beyond_masking, **changes):
    torch.manual_seed(0)
    return module.BeyondMasking(task, **(SMALL | changes))


def inputs_of(task, batch=2):
    """(clean, params, mask) for `small`."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(batch, 3, *beyond_masking.clean_size(task, (21, 42)), generator=generator)
    params = beyond_masking.sample_params(task, batch, generator, img_size=(21, 42))
    return clean, params, common.random_masks(batch, 18, 12, generator) if masked(task) else None


def check_degraded(module, name):
    close(module.degrade(TASK[name], CASES[name]["clean"], params_of(CASES[name])), CASES[name]["degraded"], atol=1e-4)


def check_outputs(module, name):
    case, model, mask = CASES[name], build(module, name), mask_of(CASES[name])
    ids = common.mask_to_ids(mask, "cpu") if mask is not None else (None, None)
    theirs = case["outputs"]["encoder_tokens"]
    if mask is not None:  # the authors keep the tokens in the order of their noise
        theirs = common.gather(theirs, case["mask"]["ids_keep"].argsort(dim=1))
    close(model.encoder(case["degraded"], ids_keep=ids[0]), theirs, atol=2e-5)
    close(model.predict(case["degraded"], *ids), case["outputs"]["prediction_patches"], atol=2e-5)


def check_targets(module, name):
    case, params = CASES[name], params_of(CASES[name])
    size, patch, golden = (case["config"]["img_size"],) * 2, case["config"]["patch_size"], case["targets"]
    target = module.pixel_target(TASK[name], case["clean"], patch, size)
    images = module.area_resize(common.unpatchify(target["whole"], patch, 14), case["clean"].shape[-2:])
    assert set(target) == ({"whole", "centre"} if name == IN else {"whole"})
    if name == IN:
        close(target["centre"], golden["target_center_patches"], atol=1e-4)
        close(images, golden["target_overall_image_inp"], atol=1e-4)
    elif name == OUT:
        images = module.symmetric_pad(images, params)
        close(common.patchify(images, patch), golden["target_patches"], atol=1e-4)
    else:
        close(target["whole"], golden["target_patches"], atol=1e-4)


def check_losses(module, name):
    """The loss, its parts, and the norm of each gradient, or -1 where there is none."""
    case, model = CASES[name], build(module, name)
    loss, parts = model(case["clean"], params_of(case), mask_of(case))
    theirs = dict(centre="loss_mae_center", border="loss_edge") if name == IN else {}
    golden = {ours: pytest.approx(case["loss"][name], abs=1e-5) for ours, name in theirs.items()}
    assert {part: value.item() for part, value in parts.items()} == golden
    assert loss.item() == pytest.approx(case["loss"]["total"], abs=1e-5)
    loss.backward()
    ours = {name: grad.norm().item() for name, grad in gradients(model).items()}
    golden = {name: norm for name, norm in case["grad_l2"].items() if norm != -1}
    assert ours == {name: pytest.approx(norm, rel=1e-4, abs=1e-7) for name, norm in golden.items()}
    assert math.hypot(*ours.values()) == pytest.approx(case["grad_l2_total"], rel=1e-4)


def check_mirrors(module, name):
    """As in the golden file, and as numpy's symmetric padding has it."""
    golden = GOLDEN["zoomed_out_pad_examples"]
    for example in golden["examples"]:
        canvas = module.degrade("zoom_out", golden["input"], dict(left=example["left"], top=example["top"]))
        close(canvas, example["output"], atol=0)
    images, left, top = torch.randn(3, 3, 25, 50), torch.tensor([0, 5, 19]), torch.tensor([0, 2, 9])
    ours = module.degrade("mask+zoom_out", images, dict(left=left, top=top))
    for image, canvas, x, y in zip(images, ours, left, top):
        theirs = np.pad(image, [(0, 0), (y, 10 - y), (x, 20 - x)], mode="symmetric")
        assert np.array_equal(canvas, theirs)


def check_initialisation(module, name):
    """Blocks and head cut at one sigma of 0.02; convolution and bridge keep torch's uniform default."""
    torch.manual_seed(0)
    model = module.BeyondMasking("mask", 56, 8, 192, 2, 3, 96, 2, 3)
    conv, bridge = model.encoder.patch_embed.proj, model.encoder_to_decoder
    for layer in (layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer is not bridge):
        assert layer.weight.abs().max() <= 0.02 and (layer.bias == 0).all()
        assert layer.weight.std().item() == pytest.approx(0.0108, rel=0.05)
    assert 0.008 < model.mask_token.std() and model.mask_token.abs().max() <= 0.02 and bridge.bias is None
    for weight in (conv.weight, bridge.weight, conv.bias):
        bound = 192**-0.5
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def check_area(module, name):
    """torch's adaptive average pooling."""
    for old, new in ((7, 9), (9, 7), (5, 7), (7, 5), (36, 28), (28, 36), (288, 224), (224, 160), (13, 13)):
        images = torch.randn(2, 3, old, 2 * old)
        expected = F.adaptive_avg_pool2d(images, (new, 2 * new))
        close(module.area_resize(images, (new, 2 * new)), expected, atol=1e-6)


def check_blur(module, name):
    """One convolution per image; a batch of samples brings a bias per image, too [D2]."""
    images, params = torch.randn(3, 3, 14, 14), module.sample_params("blur", 3, torch.Generator().manual_seed(0))
    for bias in (params["bias"], torch.randn(3, 3)):
        ours = module.degrade("blur", images, params | dict(bias=bias))
        for image, weight, one, b in zip(images, params["weight"], ours, bias.expand(3, 3)):
            close(one, F.conv2d(image, weight, b, padding=3))


def check_draws(module, name):
    """Ranges and moments of what is drawn, and what is drawn for each task."""
    generator = torch.Generator().manual_seed(0)
    draw = {task: module.sample_params(task, 4000, generator) for task in TASKS}
    for task in ("zoom_out", "mask+zoom_out"):
        assert {(int(x.min()), int(x.max())) for x in draw[task].values()} == {(0, 63)}
        assert not torch.equal(draw[task]["left"], draw[task]["top"])
    wide = module.sample_params("zoom_out", 500, generator, img_size=(28, 42))
    assert wide["top"].unique().tolist() == list(range(8)) and wide["left"].unique().tolist() == list(range(12))
    centre, magnitude = draw["distort"]["centre"], draw["distort"]["magnitude"]
    assert centre.shape == (4000, 2) and -1 <= centre.min() < -0.99 and 0.99 < centre.max() <= 1
    assert 0.15 <= magnitude.min() < 0.151 and 0.249 < magnitude.max() <= 0.25
    weight, bias = draw["blur"]["weight"], draw["blur"]["bias"]
    assert weight.mean().item() == pytest.approx(1 / 49, abs=1e-4)
    assert weight.std().item() == pytest.approx(0.02, rel=0.01) and bias.shape == (3,) and bias.abs().max() <= 147**-0.5
    weights = draw["decolor"]["weights"]
    assert 0 <= weights.min() < 0.01 and 0.66 < weights.max() <= 0.667 and weights.sum(dim=1).std() > 0.2
    assert weights.sum(dim=1).mean().item() == pytest.approx(1, abs=0.02)
    assert [task for task in TASKS if not draw[task]] == ["mask", "zoom_in", "mask+zoom_in"]


def check_augment(module, task):
    """torchvision's crop and flip with the same draws; decolor has others [D3]. Each image has its own draws [D8],
    and a mask, whatever process makes it."""
    config = config_of(module, f"--task={task} --img_size=28 --patch_size=4")
    side, mode = {"zoom_in": 36, "zoom_out": 20}.get(task.removeprefix("mask+"), 28), v2.InterpolationMode
    theirs = v2.Compose([v2.RandomResizedCrop(side, (0.2, 1.0), interpolation=mode.BICUBIC), v2.RandomHorizontalFlip()])
    if task == "decolor":
        theirs = v2.RandomResizedCrop(side, (0.08, 1.0), interpolation=mode.BILINEAR)
    samples = common.Samples(IMAGES, module.Augment(config), seed=0)
    keys = [key for rank in (0, 1) for part in common.micro_batch_keys(
        16, common.make_plan(16, 8, 2, 2, 2), common.Dist(rank, 2, "cpu"), 0, 0, 4) for key in part]
    drawn = []
    for epoch, index in keys:
        clean, params, *mask = samples[epoch, index]
        torch.manual_seed(common.seed_for(0, "sample", epoch, index))
        assert clean.dtype == torch.uint8 and torch.equal(clean, theirs(IMAGES[index][0]))
        assert len(mask) == masked(task) and all(m.shape == (49,) and m.sum() == 37 for m in mask)
        drawn.append(str([*params.values(), *mask]))
    assert len(keys) == 32 and (len(set(drawn)) == 32 or task == "zoom_in")


def check_config(module, name):
    """int(N (1 - r)) are kept [code]: of 49 at 0.75, 12.25 become 12; of 100 at 0.9, in floating point, 9."""
    for flags, hidden in (("--img_size=112", 37), ("--img_size=160 --mask_ratio=0.9", 91)):
        assert config_of(module, f"--task=mask {flags}").num_masked == hidden
    for flags, end in (("--model=vit_s", "vit_s_mask+zoom_in"), ("--model=vit_b --task=blur", "vit_b_blur")):
        assert config_of(module, flags).run_name == end


def check_decay(module, name):
    model = small("mask", module)
    names = {id(p): name for name, p in model.named_parameters()}
    decay, rest = ({names[id(p)] for p in group["params"]}
                   for group in common.parameter_groups(model, 0.05, module.decays))
    assert "mask_token" in rest and all(name.endswith(("mask_token", "bias")) or "norm" in name for name in rest)
    assert decay == {n for n, p in model.named_parameters() if p.ndim > 1 and p.requires_grad and n != "mask_token"}


def check_counted(module, name):
    """`mask` is MAE's loss, with patches normalised per colour; mask+distort counts all patches [D5]; unmasked zooms
    all of the view [D1], so that their loss is the mean of the losses of each patch alone."""
    model, (clean, _, mask) = small("mask", module), inputs_of("mask")
    pred = model.predict(clean, *common.mask_to_ids(mask, "cpu"))
    pixels, errors = common.unnormalise(clean), []
    for b, k in mask.nonzero().tolist():
        patch = pixels[b, :, k // 6 * 7: k // 6 * 7 + 7, k % 6 * 7: k % 6 * 7 + 7]
        target = (patch - patch.mean(dim=(1, 2), keepdim=True)) / patch.std(dim=(1, 2), keepdim=True)
        errors.append((pred[b, k] - target.permute(1, 2, 0).flatten()).square().mean())
    close(model(clean, {}, mask)[0], sum(errors) / len(errors))
    model, (clean, params, mask) = small("mask+distort", module), inputs_of("mask+distort")
    pred = model.predict(module.degrade("distort", clean, params), *common.mask_to_ids(mask, "cpu"))
    target = module.pixel_target("mask+distort", clean, 7, (21, 42))["whole"]
    close(model(clean, params, mask)[0], F.mse_loss(pred, target))
    for task in ("zoom_in", "zoom_out"):
        clean, params, _ = inputs_of(task)
        target, pred = module.pixel_target(task, clean, 7, (21, 42)), torch.randn(2, 18, 147)
        losses = [module.recovery_loss(task, pred, target, params, ids, (7, 7), (3, 6))
                  for ids in [None, *(torch.full((2, 1), k) for k in range(18))]]
        whole, *single = [parts.get("centre", loss) for loss, parts in losses]
        close(whole, torch.stack(single).mean())


def check_places(module, class_token):
    """Visible tokens return to their places, mask tokens lie between; hidden pixels reach nothing but the loss."""
    model, (clean, _, mask) = small("mask", module, class_token=class_token), inputs_of("mask")
    ids = common.mask_to_ids(mask, "cpu")
    table = model.mask_token.repeat(2, 18, 1)
    table[~mask] = model.encoder_to_decoder(model.encoder(clean, mask)[:, -6:]).flatten(0, 1)
    close(model.predict(clean, *ids), model.decoder(table))
    hidden = common.unpatchify(mask[:, :, None].expand(-1, -1, 147), 7, (3, 6))
    other = torch.where(hidden, torch.randn_like(clean), clean)
    assert torch.equal(model.predict(clean, *ids), model.predict(other, *ids))
    assert not torch.equal(model(clean, {}, mask)[0], model(other, {}, mask)[0])


def check_rgb(module, name):
    """On grey images the RGB encoder gives the features of the one with one channel [D4]."""
    encoder, colour = small("decolor", module).encoder, torch.randn(2, 3, 21, 42)
    rgb, grey = module.rgb_encoder(encoder), colour.mean(dim=1, keepdim=True)
    close(rgb(grey.expand(-1, 3, -1, -1)), encoder(grey))
    close(rgb(colour), encoder(grey))
    encoder = small("blur", module).encoder
    assert module.rgb_encoder(encoder) is encoder


def check_preview(module, task):
    """clean | seen, hidden patches grey | target | a prediction that is right."""
    config, sheets = config_of(module, f"--task={task} --model=vit_demo --img_size=28 --patch_size=7"), []
    batch = common.preview_batch(common.Samples(IMAGES, module.Augment(config), 0), 2)
    truth = beyond_masking.pixel_target(task, beyond_masking.inputs(batch, ONE.device)[0], 7, (28, 28))["whole"]
    model = module.build(config)
    model.predict = lambda view, *ids: truth
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "save_panels", lambda path, rows, *_: sheets.extend(rows))
        module.preview("x.png", config, model, batch, ONE.device)
    for image, (clean, seen, target, pred) in zip(batch[0] / 255, sheets, strict=True):
        close(clean, image)
        close(target, F.adaptive_avg_pool2d(image, 28))
        close(pred, target, atol=1e-4)
        grey = (seen == 0.5).all(dim=0)
        assert seen.shape == (3, 28, 28) and grey.float().mean() == pytest.approx(0.75 if masked(task) else 0, abs=0.05)
        if task == "mask+zoom_in":
            close(seen[:, ~grey], clean[:, 4:32, 4:32][:, ~grey])


def check_loop(module, task):
    flags = f"{FLAGS} --task={task}"
    compare_loops(module, plain_run(beyond_masking, flags, end=1e-5), flags)


# Mistakes, {(check, case) that catches them: [(what is wrong, place, pattern, wrong, ...)]}, see mutants.py.
RESIZE, CUT = "rows @ images @ columns.T", "a=-0.02, b=0.02"
WEIGHTS, DRAWN = 'params["weights"][..., None, None]', "torch.randint(columns, (batch,), generator=generator)"
HIDDEN = "torch.zeros_like(view).scatter(1, ids_masked[:, :, None].expand(-1, -1, view.shape[2]), 1.0)"
test_checks = checks(beyond_masking, {
    (check_degraded, IN): [
        ("view not from the centre", "center_crop", "rows:-rows, columns:-columns", ":-2 * rows, :-2 * columns")],
    (check_degraded, OUT): [("left and top swapped", "symmetric_pad", '(2, params["top"]), (3, params["left"])',
         '(2, params["left"]), (3, params["top"])')],
    (check_degraded, FISH): [("linear displacement", "fish_eye", "* towards.norm(dim=-1, keepdim=True)", ""),
        ("displaced by the cube", "fish_eye", "norm(dim=-1, keepdim=True)", "square().sum(dim=-1, keepdim=True)"),
        ("away from the centre", "fish_eye", "q + magnitude", "q - magnitude"),
        ("x and y swapped", "fish_eye", '"xy"', '"ij"'),
        ("corners not aligned", "fish_eye", "align_corners=True", "align_corners=False")],
    (check_degraded, BLUR): [
        ("channel by channel", "degrade", 'params["weight"]', 'params["weight"] * torch.eye(3)[..., None, None]'),
        ("blur without bias", "degrade", "+ bias", "")],
    (check_degraded, GREY): [
        ("luma weights", "degrade", WEIGHTS, "clean.new_tensor([0.299, 0.587, 0.114])[:, None, None]"),
        ("weights that sum to one", "degrade", WEIGHTS, f"({WEIGHTS} / params['weights'].sum())")],
    (check_outputs, IN): [
        ("positions before the tokens return", "BeyondMasking.predict", "common.gather", "(lambda x, ids: x)"),
        ("keep and masked swapped", "BeyondMasking.predict", "[ids_keep, ids_masked]", "[ids_masked, ids_keep]")],
    (check_outputs, OUT): [("tokens return in the wrong order", "BeyondMasking.predict", ".argsort(dim=1)", "")],
    (check_outputs, FISH): [("the decoder has no positions", "Decoder.forward", "x = x + self.positions", "pass"),
        ("decoder without its norm", "Decoder.forward", "self.norm", ""),
        ("2-D table", "BeyondMasking.__init__", "sinusoid_1d(embed_dim, N)", "sincos_2d(embed_dim, (14, 14))")],
    (check_targets, IN): [("rim normalised on the view's patches", "pixel_target", "area_resize(clean, img_size)",
         "F.interpolate(center_crop(clean), size=tuple(img_size))")],
    (check_targets, OUT): [("nearest resize", "area_resize", RESIZE, "F.interpolate(images, size=tuple(size))")],
    (check_targets, FISH): [("one std for all colours", "patch_statistics", "dim=2", "dim=(2, 3)")],
    (check_targets, BLUR): [("colours first within a patch", "patch_statistics", "b n (pq c) ->", "b n (c pq) ->")],
    (check_targets, GREY): [("biased std", "patch_statistics", "dim=2", "dim=2, correction=0")],
    (check_losses, IN): [("zoom-in compared patch by patch", "recovery_loss", "area_resize",
         "(lambda images, size: F.pad(images, [size[0] // 9] * 4))"),
        ("bilinear resize", "area_resize", RESIZE, "F.interpolate(images, size=tuple(size), mode='bilinear')"),
        ("mean of the four strips", "recovery_loss", "0.2 * border", "0.05 * border"),
        ("corners counted twice", "recovery_loss", "h:-h, :w", ":, :w"),
        ("weights swapped", "recovery_loss", "0.8 * centre + 0.2 * border", "0.2 * centre + 0.8 * border"),
        ("border counts hidden patches only", "recovery_loss", "square()",
         f"square() * area_resize(common.unpatchify({HIDDEN}, patch_size, 14), pred.shape[-2:]) / 0.75"),
        ("loss of the visible patches", "BeyondMasking.forward", "params, ids_masked", "params, ids_keep"),
        ("ids swapped", "BeyondMasking.forward", "ids_keep, ids_masked =", "ids_masked, ids_keep ="),
        ("polarity of the mask", "common:mask_to_ids", "hidden.byte()", "(~hidden).byte()"),
        ("centre cut from the rim's reference", "recovery_loss", 'view, target["centre"]',
         "view, common.patchify(center_crop(whole), patch_size)")],
    (check_losses, OUT): [("zoom-out compared in the frame of pred", "recovery_loss", 'if "zoom" in task',
         'if "zoom_in" in task', "recovery_loss", '== "zoom_out"', '== ""'),
        ("area without shared pixels", "area_matrix", "-(-(i + 1) * old // new)",
         "torch.maximum((i + 1) * old // new, i * old // new + 1)"),
        ("loss of all patches", "patch_error", "ids_masked is not None", "False")], (check_outputs, BLUR): [],
    (check_outputs, GREY): [], (check_losses, FISH): [], (check_losses, BLUR): [],
    (check_losses, GREY): [("a key bias", "BeyondMasking.__init__", "common.freeze_key_bias(part)", "pass")],
    (check_mirrors, ""): [("mirror without the edge", "symmetric_pad", "0, -1 - place", "0, -place"),
        ("mirror without the far edge", "symmetric_pad", "2 * size - 1", "2 * size - 2")],
    (check_initialisation, ""): [
        ("convolution re-initialised", "BeyondMasking.__init__", "self.encoder.patch_embed.proj.reset_parameters()",
         f"nn.init.trunc_normal_(self.encoder.patch_embed.proj.weight, std=0.02, {CUT})"),
        ("bridge re-initialised", "BeyondMasking.__init__", "self.encoder.patch_embed.proj.reset_parameters()",
         f"nn.init.trunc_normal_(self.encoder_to_decoder.weight, std=0.02, {CUT})"),
        ("bridge with a bias", "BeyondMasking.__init__", ", bias=False", ""),
        ("cut at two sigma", "BeyondMasking.__init__", f"layer.weight, std=0.02, {CUT}",
         "layer.weight, std=0.02, a=-0.04, b=0.04")],
    (check_area, ""): [("centres of pixels", "area_matrix", "first <= pixel", "first < pixel + 0.5 * (old > new)")],
    (check_blur, ""): [
        ("one blur for all", "degrade", 'params["weight"]', 'params["weight"][:1].repeat(len(clean), 1, 1, 1, 1)')],
    (check_draws, ""): [
        ("offsets up to the whole margin", "sample_params", "torch.randint(rows", "torch.randint(rows + 1"),
        ("one offset for both directions", "sample_params", f"left={DRAWN}", f"left=(offset := {DRAWN})",
         "sample_params", DRAWN.replace("columns", "rows"), "offset"),
        ("weights drawn to sum to one", "sample_params", "uniform(0, 0.667, batch, 3)",
         "uniform(0, 1, batch, 3).softmax(dim=1)")],
    (check_augment, "decolor"): [("decolor cropped as all", "DEPENDS", '"decolor": 0.08', ""),
        ("decolor resized bicubic", "Augment.__call__", "kind.BILINEAR", "kind.BICUBIC"),
        ("decolor flipped", "Augment.__call__", "not grey and", ""),
        ("one grey for a batch", "sample_params", "uniform(0, 0.667, batch, 3)", "torch.full((batch, 3), 1 / 3)")],
    (check_augment, "mask"): [("bilinear", "Augment.__call__", "kind.BICUBIC", "kind.BILINEAR"),
        ("never flipped", "Augment.__call__", "< 0.5", "< 0"), ("smaller crops", "Config", "0.2,", "0.08,")],
    (check_augment, "zoom_in"): [("clean image of the view's size", "clean_size", "zoom_in=9", "zoom_in=7")],
    (check_augment, "mask+zoom_out"): [("unmasked", "is_masked", 'startswith("mask")', '__eq__("mask")')],
    (check_config, ""): [("rounded count of visible patches", "Config.num_masked", "int(", "round(")],
    (check_decay, ""): [("the mask token decays", "decays", 'and name != "mask_token"', "")],
    (check_counted, ""): [
        ("mask+distort counts hidden patches", "recovery_loss", 'None if task == "mask+distort" else', ""),
        ("sum over patches", "patch_error", "F.mse_loss(pred, target)", "F.mse_loss(pred, target) * pred.shape[1]")],
    (check_places, False): [
        ("zeros where patches are hidden", "BeyondMasking.predict", "self.mask_token", "0 * self.mask_token")],
    (check_places, True): [], (check_rgb, ""): [("the grey weights for each colour", "rgb_encoder", "/ 3", "")],
    (check_preview, "mask+zoom_in"): [("visible patches grey", "preview", "== 0", "> 0")],
    (check_preview, "decolor"): [("prediction in units of the std", "preview", "* std", "")],
    (check_preview, "zoom_out"): [],
    (check_loop, "mask+zoom_in"): [*LOOP, ("the cosine ends at 0", "train", "config.min_lr", "0"),
        ("torch's betas", "train", "betas=(0.9, 0.95)", "betas=(0.9, 0.999)")],
    (check_loop, "decolor"): [("a grey encoder exported", "train", "rgb_encoder(model.encoder)", "model.encoder")]})


@pytest.mark.parametrize("task", TASKS)
def test_every_task(task):
    """Trains all that it should, on images that are not square; autocast rounds the model alone, not pixels."""
    model, (clean, params, mask) = small(task), inputs_of(task)
    loss, parts = model(clean, params, mask)
    assert loss.ndim == 0 and set(parts) == ({"centre", "border"} if "zoom_in" in task else set())
    loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {"encoder.pos_embed", "decoder.positions", *["mask_token"] * (not masked(task))}
    seen, predict = [], model.predict
    model.predict = lambda view, *ids: seen.append(view) or predict(view, *ids).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = model(clean, params, mask)
    assert rounded.dtype == torch.float32 and rounded.item() == pytest.approx(loss.item(), rel=0.02)
    assert torch.equal(seen[0], beyond_masking.degrade(task, clean, params))
    for wrong in (clean[:, :1], clean[..., :-1]):
        refused("expects", model, wrong, params, mask)
    wrong, words = (None, "needs a mask") if masked(task) else (torch.ones(2, 18).bool(), "needs no mask")
    refused(words, model, clean, params, wrong)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no task 'zoom'.*mask, zoom_in, zoom_out, distort, blur, decolor, mask"):
        beyond_masking.BeyondMasking("zoom")
    for task, *size in (("zoom_in", 256), ("mask+zoom_out", 32, 4), ("blur", 30)):
        refused("multiple of", beyond_masking.BeyondMasking, task, *size)
    beyond_masking.BeyondMasking("blur", 32, 16, 16, 1, 2, 16, 1, 2)  # 7 matters to the zooms alone
    clean, params, mask = inputs_of("mask")
    refused("hides no patch", small("mask"), clean, params, torch.zeros_like(mask))
    for flags, match in (("--task=rotate", "rotate"), ("--task=blur --mask_ratio=0.5", "hides"),
                         ("--mask_ratio=0", "hides"), ("--mask_ratio=0.999", "hides"),
                         ("--crop_min=2", "crop"), ("--img_size=32", "multiple")):
        refused(match, config_of, beyond_masking, flags)


def test_the_recipe_is_the_authors():
    for size, task in itertools.product(("vit_ti", "vit_s", "vit_b", "vit_l"), TASKS):
        c = config_of(beyond_masking, f"--model={size} --task={task}")
        assert (c.epochs, c.batch_size, c.lr, c.min_lr, c.warmup_epochs) == (300, 2048, 1.5e-4, 1e-5, 20)
        assert (c.weight_decay, c.crop_min) == (0.05, 0.08 if task == "decolor" else 0.2)
        assert c.peak_lr == pytest.approx(1.2e-3) and c.num_masked == (147 if masked(task) else 0)
    assert beyond_masking.Config.task == "mask+zoom_in"
    g = GOLDEN["lr_schedule_example"]
    total, warmup = g["epochs"] * g["iters_per_epoch"], g["warmup_epochs"] * g["iters_per_epoch"]
    ours = [common.learning_rate(step, g["peak"], warmup, total, g["final"]) for step in range(total)]
    close(torch.tensor(ours, dtype=torch.float64), g["values"].double(), atol=1e-9)
    with torch.device("meta"):
        model = beyond_masking.BeyondMasking("mask+zoom_in")
    for part, more in dict(encoder=12 * 768 - 768, decoder=4 * 384, encoder_to_decoder=0).items():
        sizes = [p.numel() for n, p in getattr(model, part).named_parameters() if not n.startswith("pos")]
        assert sum(sizes) - more == GOLDEN["base_param_counts"][part]  # theirs: no key biases, but a class token
