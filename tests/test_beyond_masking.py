"""Beyond Masking against the authors' own numbers (golden/beyond_masking.pt), and proof that they can fail.

Each `check_...` compares one part of a module with the golden file or with a formula. The tests call them
with `beyond_masking`; `test_mistake_is_caught` with copies of its source in which one line is wrong.
"""

import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import beyond_masking
import common
from beyond_masking import TASKS

GOLDEN = torch.load(Path(__file__).parent / "golden" / "beyond_masking.pt", weights_only=True)
CASES = GOLDEN["variants"]
# The authors' folders and our tasks.
TASK = dict(zoomed_in_masked="mask+zoom_in", zoomed_out_masked="mask+zoom_out", distorted="distort",
            blurred="blur", decolorized="decolor")
NAMES = list(TASK)
# A model for anything: 9 patches of 7 pixels, references of 27 and 15.
SMALL = dict(img_size=21, patch_size=7, embed_dim=16, depth=2, num_heads=2, decoder_dim=12, decoder_depth=1,
             decoder_heads=2)


def params_of(case):
    """The golden file's draws under our names."""
    p = case["sampled_params"]
    if "left" in p:
        return dict(left=p["left"], top=p["top"])
    if "center_x_center_y_magnitude" in p:
        return dict(centre=p["center_x_center_y_magnitude"][:, :2], magnitude=p["center_x_center_y_magnitude"][:, 2])
    if "rgb_weights" in p:
        return dict(weights=p["rgb_weights"])
    if "conv_bias_shared" in p:
        return dict(weight=p["conv_weight_per_sample"], bias=p["conv_bias_shared"])
    return {}


def mask_of(case):
    return case["mask"]["mask_1_is_removed"].bool() if "mask" in case else None


def build(module, name):
    case = CASES[name]
    c = case["config"]
    model = module.BeyondMasking(TASK[name], c["img_size"], c["patch_size"], c["encoder_embed_dim"],
                                 c["encoder_depth"], c["encoder_num_heads"], c["decoder_embed_dim"],
                                 c["decoder_depth"], c["decoder_num_heads"])
    module.load_official(model, case["state_dict"])
    return model


# -- against the authors' numbers


def check_degraded(module, name):
    case = CASES[name]
    degraded = module.degrade(TASK[name], case["clean"], params_of(case))
    torch.testing.assert_close(degraded, case["degraded"], atol=1e-4, rtol=0)


def check_mirrors(module, name):
    golden = GOLDEN["zoomed_out_pad_examples"]
    for example in golden["examples"]:
        canvas = module.degrade("zoom_out", golden["input"], dict(left=example["left"], top=example["top"]))
        torch.testing.assert_close(canvas, example["output"], atol=0, rtol=0)


def check_outputs(module, name):
    case, model = CASES[name], build(module, name).eval()
    mask = mask_of(case)
    with torch.no_grad():
        tokens = model.encoder(case["degraded"], mask)
        answer = model.answer(case["degraded"], mask)
    theirs = case["outputs"]["encoder_tokens"]
    if mask is not None:  # the authors keep the tokens in the order of their noise
        theirs = common.pick(theirs, case["mask"]["ids_keep"].argsort(dim=1))
    torch.testing.assert_close(tokens, theirs, atol=2e-5, rtol=0)
    torch.testing.assert_close(answer, case["outputs"]["prediction_patches"], atol=2e-5, rtol=0)


def check_targets(module, name):
    case = CASES[name]
    c, clean = case["config"], case["clean"]
    size, patch, grid = (c["img_size"],) * 2, c["patch_size"], (c["img_size"] // c["patch_size"],) * 2
    target = module.answer_target(clean, patch, size)
    if name == "zoomed_in_masked":
        centre = module.normalise_patches(module.centre_of(clean), patch)
        torch.testing.assert_close(centre, case["targets"]["target_center_patches"], atol=1e-4, rtol=0)
        border = module.area_resize(common.unpatchify(target, patch, grid), clean.shape[-2:])
        torch.testing.assert_close(border, case["targets"]["target_overall_image_inp"], atol=1e-4, rtol=0)
        return
    if name == "zoomed_out_masked":
        images = module.area_resize(common.unpatchify(target, patch, grid), clean.shape[-2:])
        target = common.patchify(module.amid_mirrors(images, params_of(case)), patch)
    torch.testing.assert_close(target, case["targets"]["target_patches"], atol=1e-4, rtol=0)


def check_loss(module, name):
    case = CASES[name]
    loss, parts = build(module, name)(case["clean"], params_of(case), mask_of(case))
    assert loss.item() == pytest.approx(case["loss"]["total"], abs=1e-5)
    if name == "zoomed_in_masked":
        assert parts["centre"].item() == pytest.approx(case["loss"]["loss_mae_center"], abs=1e-5)
        assert parts["border"].item() == pytest.approx(case["loss"]["loss_edge"], abs=1e-5)
    else:
        assert parts == {}


def check_gradients(module, name):
    case, model = CASES[name], build(module, name)
    model(case["clean"], params_of(case), mask_of(case))[0].backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    for theirs, norm in case["grad_l2"].items():
        if theirs == "encoder.cls_token":
            assert norm == -1 and theirs not in grads
            continue
        if theirs.endswith(("q_bias", "v_bias")):
            q, k, v = grads[theirs[:-6] + "qkv.bias"].chunk(3)
            assert k.abs().max() == 0, "there is no key bias"
            grad = q if theirs.endswith("q_bias") else v
        else:
            grad = grads[theirs]
        if norm == -1:
            assert grad is None, theirs
        else:
            assert grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-7), theirs
    norms = [g.norm() for g in grads.values() if g is not None]
    assert torch.stack(norms).norm().item() == pytest.approx(case["grad_l2_total"], rel=1e-4)


def check_positions(module, name):
    table = module.BeyondMasking("mask", 56, 4, 48, 1, 4, 32, 1, 4).encoder.pos_embed
    torch.testing.assert_close(table.data, GOLDEN["encoder_pos_embed"], atol=1e-6, rtol=0)


def check_everything(module, name):
    for check in (check_degraded, check_outputs, check_targets, check_loss, check_gradients):
        check(module, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", [check_degraded, check_outputs, check_targets, check_loss, check_gradients])
def test_golden(check, name):
    check(beyond_masking, name)


@pytest.mark.parametrize("check", [check_mirrors, check_positions])
def test_golden_parts(check):
    check(beyond_masking, "")


# -- wrong lines, by the number of the gotcha in the method's description


IN, OUT, FISH, BLUR, GREY = NAMES
MISTAKES = [
    ("1 zoom-in compared patch by patch", check_loss, IN,
     ("image = area_resize(common.unpatchify(answer, patch_size, grid), size)",
      "image = F.pad(common.unpatchify(answer, patch_size, grid), [size[0] // 9] * 4)")),
    ("1 zoom-out compared in the answer's frame", check_loss, OUT,
     ("answer, target = to_view(answer), to_view(target)", "pass")),
    ("2 bilinear resize", check_loss, IN,
     ("return rows @ images @ columns.T", "return F.interpolate(images, size=tuple(size), mode='bilinear')")),
    ("2 nearest resize", check_targets, OUT,
     ("return rows @ images @ columns.T", "return F.interpolate(images, size=tuple(size))")),
    ("2 area without shared pixels", check_loss, OUT,
     ("first, end = i * old // new, -(-(i + 1) * old // new)",
      "first = i * old // new; end = torch.maximum((i + 1) * old // new, first + 1)")),
    ("3 biased deviation", check_targets, GREY,
     ("torch.std_mean(pixels, dim=2, keepdim=True)", "torch.std_mean(pixels, dim=2, keepdim=True, correction=0)")),
    ("3 one deviation for the three colours", check_targets, FISH,
     ("torch.std_mean(pixels, dim=2, keepdim=True)", "torch.std_mean(pixels, dim=(2, 3), keepdim=True)")),
    ("4 mean of the four strips", check_loss, IN, ("0.8 * centre + 0.2 * border", "0.8 * centre + 0.05 * border")),
    ("4 corners counted twice", check_loss, IN,
     ("error[..., h:-h, :w].mean()", "error[..., :, :w].mean()")),
    ("4 weights swapped", check_loss, IN, ("0.8 * centre + 0.2 * border", "0.2 * centre + 0.8 * border")),
    ("4 border counts hidden patches only", check_loss, IN,
     ("error, (h, w) = (image - target).square(), (side // 9 for side in size)",
      "hidden = torch.zeros_like(answer).scatter(1, masked_ids[:, :, None].expand(-1, -1, answer.shape[2]), 1.0)\n"
      "    hidden = area_resize(common.unpatchify(hidden, patch_size, grid), size)\n"
      "    error, (h, w) = (image - target).square() * hidden / 0.75, (side // 9 for side in size)")),
    ("5 loss of the visible patches", check_loss, IN,
     ("common.split_ids(mask)[1].to(clean.device, non_blocking=True)  # (B, M)",
      "common.split_ids(mask)[0].to(clean.device, non_blocking=True)")),
    ("5 loss of all patches", check_loss, OUT, ("    if masked_ids is not None:\n        answer, target", "    if False:\n        answer, target")),
    ("6 the rim is normalised on the patches of the view's grid", check_targets, IN,
     ("return normalise_patches(area_resize(clean, img_size), patch_size)",
      "return normalise_patches(F.interpolate(centre_of(clean), size=tuple(img_size)), patch_size)")),
    ("6 the centre is cut from the rim's reference", check_loss, IN,
     ("normalise_patches(view, patch_size), masked_ids)",
      "common.patchify(centre_of(area_resize(common.unpatchify(answer_target(clean, patch_size, view.shape[-2:]), "
      "patch_size, grid), size)), patch_size), masked_ids)")),
    ("7 mirror without the edge", check_mirrors, "", ("place < 0, -1 - place, place", "place < 0, -place, place")),
    ("7 mirror without the far edge", check_mirrors, "", ("2 * size - 1 - place", "2 * size - 2 - place")),
    ("7 left and top swapped", check_degraded, OUT,
     ('(2, params["top"]), (3, params["left"])', '(2, params["left"]), (3, params["top"])')),
    ("7 offsets up to the whole margin", lambda m, _: check_draws(m), "",
     ("torch.randint(rows, (batch,), generator=generator)", "torch.randint(rows + 1, (batch,), generator=generator)")),
    ("7 one offset for both directions", lambda m, _: check_draws(m), "",
     ("        return dict(left=torch.randint(columns, (batch,), generator=generator),  # [code] [D3]\n"
      "                    top=torch.randint(rows, (batch,), generator=generator))",
      "        left = torch.randint(columns, (batch,), generator=generator)\n        return dict(left=left, top=left)")),
    ("8 linear displacement", check_degraded, FISH, ("* towards.norm(dim=-1, keepdim=True) * towards", "* towards")),
    ("8 away from the centre", check_degraded, FISH, ("grid = q + magnitude", "grid = q - magnitude")),
    ("8 x and y swapped", check_degraded, FISH, ('indexing="xy"', 'indexing="ij"')),
    ("8 corners not aligned", check_degraded, FISH, ("align_corners=True", "align_corners=False")),
    ("9 a 2-D table", check_positions, "", ("self.encoder.set_positions(common.sinusoid_1d(embed_dim, N))", "pass")),
    ("9 the decoder has no positions", check_outputs, FISH, ("x = x + self.positions", "x = x")),
    ("9 decoder positions before the tokens return to their places", check_outputs, IN,
     ("x = common.pick(torch.cat([x, hidden], dim=1), order)", "x = torch.cat([x, hidden], dim=1)")),
    ("10 a key bias", check_gradients, GREY, ("common.freeze_key_bias(part)", "pass")),
    ("11 patch convolution re-initialised", lambda m, _: check_initialisation(m), "",
     ("self.encoder.patch_embed.proj.reset_parameters()", "nn.init.trunc_normal_(self.encoder.patch_embed.proj.weight, std=0.02, a=-0.02, b=0.02)")),
    ("11 bridge re-initialised", lambda m, _: check_initialisation(m), "",
     ("for part in (self.encoder.blocks, self.decoder):", "for part in (self.encoder.blocks, self.decoder, nn.ModuleList([self.encoder_to_decoder])):"),
     ("nn.init.zeros_(layer.bias)", "layer.bias is None or nn.init.zeros_(layer.bias)")),
    ("11 cut at two sigma", lambda m, _: check_initialisation(m), "",
     ("nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.02, b=0.02)", "nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.04, b=0.04)")),
    ("12 colours first within a patch", check_targets, BLUR,
     ('return rearrange((pixels - mean) / (std + 1e-6), "b n pq c -> b n (pq c)")',
      'return rearrange((pixels - mean) / (std + 1e-6), "b n pq c -> b n (c pq)")')),
    ("13 tokens return in the wrong order", check_outputs, OUT,
     ("order = order.argsort(dim=1).to(", "order = order.to(")),
    ("15 weights drawn to sum to one", lambda m, _: check_draws(m), "",
     ("return dict(weights=uniform(0, 0.667, batch, 3))",
      "w = uniform(0, 0.667, batch, 3); return dict(weights=w / w.sum(dim=1, keepdim=True))")),
    ("15 luma weights", check_degraded, GREY,
     ('clean * params["weights"][..., None, None]', "clean * clean.new_tensor([0.299, 0.587, 0.114])[:, None, None]")),
    ("15 weights that sum to one", check_degraded, GREY,
     ('clean * params["weights"][..., None, None]', 'clean * (params["weights"] / params["weights"].sum())[..., None, None]')),
    ("blur channel by channel", check_degraded, BLUR,
     ('kernels = rearrange(params["weight"], "b o i h w -> (b o) i h w")',
      'kernels = rearrange(params["weight"] * torch.eye(3)[:, :, None, None], "b o i h w -> (b o) i h w")')),
    ("blur without bias", check_degraded, BLUR, ("b=len(clean)) + bias", "b=len(clean))")),
    ("decoder without its norm", check_outputs, FISH, ("self.head(self.norm(x))", "self.head(x)")),
    ("view not from the centre", check_degraded, IN, ("images[..., rows:-rows, columns:-columns]", "images[..., :-2 * rows, :-2 * columns]")),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=[m[0] for m in MISTAKES])
def test_mistake_is_caught(mistake):
    _, check, name, *replacements = mistake
    source = Path(beyond_masking.__file__).read_text(encoding="utf-8")
    for right, wrong in replacements:
        assert source.count(right) == 1, f"the line is not in beyond_masking.py any more: {right}"
        source = source.replace(right, wrong)
    mutant = types.ModuleType("beyond_masking_mutant")
    mutant.__file__ = beyond_masking.__file__
    exec(compile(source, "beyond_masking_mutant", "exec"), mutant.__dict__)
    with pytest.raises((AssertionError, ValueError)):
        check(mutant, name)


# -- by formulas


def check_initialisation(module):
    """Gotcha 11: blocks and head are cut at one sigma of 0.02; convolution and bridge keep torch's uniform default."""
    torch.manual_seed(0)
    model = module.BeyondMasking("mask", 56, 8, 192, 2, 3, 96, 2, 3)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "encoder_to_decoder":
            assert layer.weight.abs().max() <= 0.02 and layer.weight.std().item() == pytest.approx(0.0108, rel=0.05), name
            assert (layer.bias == 0).all(), name
    assert model.mask_token.abs().max() <= 0.02 and model.mask_token.std() > 0.008
    conv, bridge = model.encoder.patch_embed.proj, model.encoder_to_decoder
    for weight, bound in ((conv.weight, 192**-0.5), (bridge.weight, 192**-0.5), (conv.bias, 192**-0.5)):
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_initialisation_as_it_really_happens():
    check_initialisation(beyond_masking)


@pytest.mark.parametrize("old, new", [(7, 9), (9, 7), (5, 7), (7, 5), (36, 28), (28, 36), (288, 224), (224, 160), (13, 13)])
def test_area_resize_is_adaptive_average_pooling(old, new):
    images = torch.randn(2, 3, old, 2 * old)
    ours = beyond_masking.area_resize(images, (new, 2 * new))
    torch.testing.assert_close(ours, F.adaptive_avg_pool2d(images, (new, 2 * new)), atol=1e-6, rtol=0)


def test_the_index_groups_of_the_paper():
    """The periodic groups of the method's description, written out."""
    groups = {(7, 9): "0 01 12 23 3 34 45 56 6", (9, 7): "01 12 23 345 56 67 78", (5, 7): "0 01 12 2 23 34 4",
              (7, 5): "01 12 234 45 56"}
    for (old, new), text in groups.items():
        matrix = beyond_masking.area_matrix(old, new, torch.device("cpu"), torch.float32)
        assert ["".join(str(j) for j in row.nonzero().flatten().tolist()) for row in matrix] == text.split()


@pytest.mark.parametrize("left, top", [(0, 0), (5, 2), (9, 9)])
def test_zoom_out_is_numpys_symmetric_padding(left, top):
    images = torch.randn(2, 3, 25, 25)
    ours = beyond_masking.degrade("zoom_out", images, dict(left=left, top=top))
    theirs = np.pad(images.numpy(), [(0, 0), (0, 0), (top, 10 - top), (left, 10 - left)], mode="symmetric")
    assert np.array_equal(ours.numpy(), theirs)
    each = beyond_masking.degrade("mask+zoom_out", images, dict(left=torch.tensor([left, 1]), top=torch.tensor([top, 3])))
    assert torch.equal(each[0], ours[0])
    assert np.array_equal(each[1].numpy(), np.pad(images[1].numpy(), [(0, 0), (3, 7), (1, 9)], mode="symmetric"))


def test_fish_eye_by_loops():
    """Gotcha 8 at each pixel, bilinear by hand: q + m |c - q| (c - q), x along the columns."""
    image, (cx, cy), m, side = torch.randn(1, 1, 9, 9), (0.3, -0.6), 0.22, 9
    ours = beyond_masking.degrade("distort", image, dict(centre=torch.tensor([[cx, cy]]), magnitude=torch.tensor([m])))
    for row in range(side):
        for column in range(side):
            x, y = -1 + 2 * column / 8, -1 + 2 * row / 8
            length = math.hypot(cx - x, cy - y)
            u, v = ((p + m * length * (c - p) + 1) * 4 for p, c in ((x, cx), (y, cy)))
            j, i = min(int(u), 7), min(int(v), 7)
            a, b = u - j, v - i
            f = image[0, 0]
            expected = (1 - b) * ((1 - a) * f[i, j] + a * f[i, j + 1]) + b * ((1 - a) * f[i + 1, j] + a * f[i + 1, j + 1])
            assert ours[0, 0, row, column].item() == pytest.approx(expected.item(), abs=1e-4)


def test_blur_is_one_convolution_per_image():
    images, params = torch.randn(3, 3, 14, 14), beyond_masking.sample_params("blur", 3, torch.Generator().manual_seed(0))
    ours = beyond_masking.degrade("blur", images, params)
    for i in range(3):
        one = F.conv2d(images[i: i + 1], params["weight"][i], params["bias"], padding=3)
        torch.testing.assert_close(ours[i: i + 1], one, atol=1e-5, rtol=0)
    rows = {**params, "bias": torch.randn(3, 3)}  # as a batch of samples brings it: a bias per image
    each = beyond_masking.degrade("blur", images, rows)
    torch.testing.assert_close(each - ours, (rows["bias"] - params["bias"])[:, :, None, None].expand_as(ours), atol=1e-5, rtol=0)


def check_draws(module):
    """The ranges and moments of what is drawn, and what is drawn for each task."""
    generator = torch.Generator().manual_seed(0)
    draw = {task: module.sample_params(task, 4000, generator) for task in TASKS}
    for task in ("zoom_out", "mask+zoom_out"):
        assert {(int(x.min()), int(x.max())) for x in draw[task].values()} == {(0, 63)}
        assert not torch.equal(draw[task]["left"], draw[task]["top"])
    small = module.sample_params("zoom_out", 500, generator, img_size=(28, 42))
    assert small["top"].unique().tolist() == list(range(8)) and small["left"].unique().tolist() == list(range(12))
    centre, magnitude = draw["distort"]["centre"], draw["distort"]["magnitude"]
    assert centre.shape == (4000, 2) and -1 <= centre.min() < -0.99 and 0.99 < centre.max() <= 1
    assert 0.15 <= magnitude.min() < 0.151 and 0.249 < magnitude.max() <= 0.25
    weight, bias = draw["blur"]["weight"], draw["blur"]["bias"]
    assert weight.mean().item() == pytest.approx(1 / 49, abs=1e-4) and weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert bias.shape == (3,) and bias.abs().max() <= 147**-0.5
    weights = draw["decolor"]["weights"]
    assert 0 <= weights.min() and weights.max() <= 0.667 and weights.sum(dim=1).mean().item() == pytest.approx(1, abs=0.02)
    assert weights.sum(dim=1).std() > 0.2 and weights.min() < 0.01 and weights.max() > 0.66
    assert [task for task in TASKS if not draw[task]] == ["mask", "zoom_in", "mask+zoom_in"]


def test_the_draws_have_their_ranges_and_moments():
    check_draws(beyond_masking)


def test_the_same_generator_draws_the_same():
    for task in TASKS:
        first, again = (beyond_masking.sample_params(task, 5, torch.Generator().manual_seed(7)) for _ in range(2))
        assert all(torch.equal(first[name], again[name]) for name in first)


# -- the model


def inputs_of(task, batch=2, img_size=21, num_masked=6, channels=3):
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(batch, channels, *beyond_masking.clean_size(task, img_size), generator=generator)
    params = beyond_masking.sample_params(task, batch, generator, img_size=img_size)
    N = math.prod(side // 7 for side in common.pair(img_size))
    return clean, params, common.random_masks(batch, N, num_masked, generator) if task.startswith("mask") else None


@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_and_trains_all_that_it_should(task):
    torch.manual_seed(0)
    model = beyond_masking.BeyondMasking(task, **SMALL)
    loss, parts = model(*inputs_of(task))
    assert loss.ndim == 0 and set(parts) == ({"centre", "border"} if "zoom_in" in task else set())
    loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {"encoder.pos_embed", "decoder.positions"} | (set() if task.startswith("mask") else {"mask_token"})


@pytest.mark.parametrize("task", TASKS)
def test_images_that_are_not_square(task):
    model = beyond_masking.BeyondMasking(task, **{**SMALL, "img_size": (21, 42)})
    assert torch.isfinite(model(*inputs_of(task, img_size=(21, 42), num_masked=9))[0])


@pytest.mark.parametrize("task", ["mask", "mask+zoom_in"])
def test_a_class_token_stays_in_the_encoder(task):
    model = beyond_masking.BeyondMasking(task, **SMALL, class_token=True)
    clean, params, mask = inputs_of(task)
    assert model.encoder(beyond_masking.degrade(task, clean, params), mask).shape == (2, 4, 16)
    model(clean, params, mask)[0].backward()
    assert model.encoder.cls_token.grad.abs().max() > 0


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("channels", [1, 5])
def test_other_channels_are_refused(task, channels):
    model = beyond_masking.BeyondMasking(task, **SMALL)
    clean, params, mask = inputs_of(task)
    with pytest.raises(ValueError, match=rf"shape \(2, {channels}, .*expects \(B, 3, "):
        model(clean[:, :1].expand(-1, channels, -1, -1), params, mask)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no task 'zoom'.*mask, zoom_in, zoom_out, distort, blur, decolor, mask"):
        beyond_masking.BeyondMasking("zoom")
    for task in ("zoom_in", "zoom_out", "mask+zoom_in", "mask+zoom_out"):
        with pytest.raises(ValueError, match="img_size 256 is not a multiple of patch_size 16 and of 7.* is 224 or 336"):
            beyond_masking.BeyondMasking(task, 256)
        with pytest.raises(ValueError, match="img_size 32 .* is 28 or 56"):
            beyond_masking.BeyondMasking(task, 32, 4)
    with pytest.raises(ValueError, match="img_size 30 is not a multiple of patch_size 16: .* 16 or 32"):
        beyond_masking.BeyondMasking("blur", 30)
    beyond_masking.BeyondMasking("blur", 32, 16, 16, 1, 2, 16, 1, 2)  # 7 matters to the zooms alone
    clean, params, mask = inputs_of("mask+zoom_in")
    model = beyond_masking.BeyondMasking("mask+zoom_in", **SMALL)
    with pytest.raises(ValueError, match="needs a mask"):
        model(clean, params)
    with pytest.raises(ValueError, match=r"expects \(B, 3, 27, 27\)"):
        model(clean[..., :21, :21], params, mask)
    with pytest.raises(ValueError, match="hides no patch"):
        model(clean, params, torch.zeros_like(mask))
    with pytest.raises(ValueError, match="needs no mask"):
        beyond_masking.BeyondMasking("zoom_in", **SMALL)(clean, params, mask)


def test_unmasked_zooms_average_over_all_patches():
    """[D1], by a mask that hides all but one patch: the two means differ by that patch's share."""
    for task in ("zoom_in", "zoom_out"):
        torch.manual_seed(0)
        model = beyond_masking.BeyondMasking(task, **SMALL)
        clean, params, _ = inputs_of(task)
        answer = torch.randn(2, 9, 147)
        loss = [beyond_masking.recovery_loss(task, answer, clean, params, ids, 7, (21, 21))
                for ids in [None, *(torch.full((2, 1), i) for i in range(9))]]
        total = [l if task == "zoom_out" else parts["centre"] for l, parts in loss]
        assert total[0].item() == pytest.approx(torch.stack(total[1:]).mean().item(), rel=1e-5)
        del model


def test_hidden_patches_of_the_view_reach_nothing_but_the_loss():
    torch.manual_seed(0)
    model = beyond_masking.BeyondMasking("mask", **SMALL).eval()
    clean, _, mask = inputs_of("mask")
    hidden = common.unpatchify(mask[:, :, None].expand(-1, -1, 147).float(), 7, (3, 3)) > 0
    other = torch.where(hidden, torch.randn_like(clean), clean)
    assert torch.equal(model.answer(clean, mask), model.answer(other, mask))
    assert not torch.equal(model(clean, {}, mask)[0], model(other, {}, mask)[0])


def test_mask_is_maes_loss_with_patches_normalised_per_colour():
    torch.manual_seed(0)
    model = beyond_masking.BeyondMasking("mask", **SMALL)
    clean, _, mask = inputs_of("mask")
    answer = model.answer(clean, mask)
    pixels = clean * torch.tensor(common.IMAGENET_STD)[:, None, None] + torch.tensor(common.IMAGENET_MEAN)[:, None, None]
    total, count = 0, 0
    for b in range(2):
        for k in range(9):
            if mask[b, k]:
                patch = pixels[b, :, k // 3 * 7: k // 3 * 7 + 7, k % 3 * 7: k % 3 * 7 + 7]
                target = (patch - patch.mean(dim=(1, 2), keepdim=True)) / patch.std(dim=(1, 2), keepdim=True)
                total += (answer[b, k] - target.permute(1, 2, 0).flatten()).square().mean()
                count += 1
    assert model(clean, {}, mask)[0].item() == pytest.approx((total / count).item(), rel=1e-5)


def test_mask_and_distort_count_all_patches():
    torch.manual_seed(0)
    model = beyond_masking.BeyondMasking("mask+distort", **SMALL)
    clean, params, mask = inputs_of("mask+distort")
    answer = model.answer(beyond_masking.degrade("distort", clean, params), mask)
    target = beyond_masking.answer_target(clean, 7, (21, 21))
    assert model(clean, params, mask)[0].item() == pytest.approx(F.mse_loss(answer, target).item(), rel=1e-6)


def test_load_official_is_strict():
    case, model = CASES[IN], build(beyond_masking, IN)
    state = dict(case["state_dict"])
    assert "encoder.cls_token" in state
    for missing in ("mask_token", "encoder.blocks.1.attn.q_bias", "decoder.blocks.0.attn.v_bias", "decoder.head.bias",
                    "encoder_to_decoder.weight"):
        with pytest.raises(ValueError, match="not the weights"):
            beyond_masking.load_official(model, {name: t for name, t in state.items() if name != missing})
    for extra in ("encoder.blocks.0.ls1.gamma", "decoder.mask_token"):
        with pytest.raises(ValueError, match="not the weights"):
            beyond_masking.load_official(model, {**state, extra: torch.ones(3)})
    with pytest.raises(ValueError, match="size mismatch"):
        beyond_masking.load_official(model, {**state, "decoder.head.bias": torch.zeros(7)})


def test_parameter_count_of_vit_b():
    """As counted on the authors' model, which has a class token more and key biases less."""
    with torch.device("meta"):
        model = beyond_masking.BeyondMasking("mask+zoom_in")
    counts = GOLDEN["base_param_counts"]
    ours = {part: sum(p.numel() for n, p in getattr(model, part).named_parameters() if n not in ("pos_embed", "positions"))
            for part in ("encoder", "decoder", "encoder_to_decoder")}
    assert ours["encoder"] - 12 * 768 + 768 == counts["encoder"]
    assert ours["decoder"] - 4 * 384 == counts["decoder"]
    assert ours["encoder_to_decoder"] == counts["encoder_to_decoder"]


def test_decolor_is_exported_for_rgb():
    """[D4]: on grey images the RGB encoder gives the features of the one with one channel."""
    torch.manual_seed(0)
    model = beyond_masking.BeyondMasking("decolor", **SMALL)
    rgb = beyond_masking.rgb_encoder(model.encoder)
    grey = torch.randn(2, 1, 21, 21)
    torch.testing.assert_close(rgb(grey.expand(-1, 3, -1, -1)), model.encoder(grey), atol=1e-5, rtol=0)
    colour = torch.randn(2, 3, 21, 21)
    torch.testing.assert_close(rgb(colour), model.encoder(colour.mean(dim=1, keepdim=True)), atol=1e-5, rtol=0)
    encoder = beyond_masking.BeyondMasking("blur", **SMALL).encoder
    assert beyond_masking.rgb_encoder(encoder) is encoder


# -- the recipe


def test_the_recipe_is_the_authors():
    for size in ("vit_ti", "vit_s", "vit_b", "vit_l"):
        for task in TASKS:
            config = beyond_masking.Config(**beyond_masking.SIZES[size], task=task)
            assert (config.epochs, config.batch_size, config.lr, config.min_lr) == (300, 2048, 1.5e-4, 1e-5)
            assert (config.warmup_epochs, config.weight_decay, config.crop_min) == (20, 0.05, 0.2)
            assert config.peak_lr == pytest.approx(1.2e-3)
            assert config.num_masked == (147 if task.startswith("mask") else 0)
    assert beyond_masking.Config.task == "mask+zoom_in"
    b = beyond_masking.SIZES["vit_b"]
    assert (b["decoder_dim"], b["decoder_depth"], b["decoder_heads"]) == (384, 4, 6)


def test_the_number_of_kept_patches_is_cut():
    """int(N (1 - r)) are kept [code]: of 49 at 0.75, 12.25 become 12."""
    config = beyond_masking.Config(**{**beyond_masking.SIZES["vit_b"], "img_size": 112}, task="mask")
    assert config.num_masked == 37


def test_learning_rate_matches_the_authors():
    g = GOLDEN["lr_schedule_example"]
    total, warmup = g["epochs"] * g["iters_per_epoch"], g["warmup_epochs"] * g["iters_per_epoch"]
    ours = [common.learning_rate(step, g["peak"], warmup, total, g["final"]) for step in range(total)]
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), g["values"].double(), atol=1e-9, rtol=0)


def test_what_decays():
    model = beyond_masking.BeyondMasking("mask", **SMALL)
    names = {id(p): name for name, p in model.named_parameters()}
    decay, rest = common.parameter_groups(model, 0.05, beyond_masking.decays)
    assert decay["weight_decay"] == 0.05 and rest["weight_decay"] == 0
    rest = {names[id(p)] for p in rest["params"]}
    assert "mask_token" in rest and all(name == "mask_token" or name.endswith("bias") or "norm" in name for name in rest)
    assert {names[id(p)] for p in decay["params"]} == \
        {n for n, p in model.named_parameters() if p.ndim > 1 and p.requires_grad and n != "mask_token"}


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_the_crop_its_draws_and_a_mask(task):
    config = beyond_masking.Config(**{**beyond_masking.SIZES["vit_ti"], "img_size": 28, "patch_size": 4}, task=task)
    images = common.Images(torch.randint(256, (4, 3, 50, 40), dtype=torch.uint8))
    samples = common.Samples(images, beyond_masking.Augment(config), seed=0)
    clean, params, *mask = samples[0, 1]
    side = {"zoom_in": 36, "zoom_out": 20}.get(task.removeprefix("mask+"), 28)
    assert clean.shape == (3, side, side) and clean.dtype == torch.uint8
    assert len(mask) == task.startswith("mask") and all(m.shape == (49,) and m.sum() == 37 for m in mask)
    batch = common.preview_batch(samples, 3)
    images, params, mask = beyond_masking.inputs(batch, torch.device("cpu"))
    model = beyond_masking.BeyondMasking(task, 28, 4, 16, 1, 2, 8, 1, 2)
    assert torch.isfinite(model(images, params, mask)[0])


@pytest.mark.parametrize("task", TASKS)
def test_eight_images_are_learnt_by_heart(task):
    torch.manual_seed(0)
    clean = common.normalise(common.find_data("scenes", "pretrain", 27, num_scenes=8).pixels)
    clean = beyond_masking.area_resize(clean, beyond_masking.clean_size(task, 21))
    generator = torch.Generator().manual_seed(0)
    params = beyond_masking.sample_params(task, 8, generator, img_size=21)
    mask = common.random_masks(8, 9, 6, generator) if task.startswith("mask") else None
    model = beyond_masking.BeyondMasking(task, 21, 7, 64, 2, 4, 64, 1, 4)
    optimizer = torch.optim.AdamW(common.parameter_groups(model, 0.0, beyond_masking.decays), lr=4e-3)
    losses = []
    for step in range(150):
        loss, _ = model(clean, params, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0], (losses[0], losses[-1])
