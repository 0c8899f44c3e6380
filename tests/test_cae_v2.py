"""CAE v2 against the authors' own numbers (golden/cae_v2.pt), and proof that these numbers can fail.

Each `check_...` compares one part of a module with the golden file or with a formula. The tests call them with
`cae_v2`, and with copies of it in which a line is wrong (the table at the end).
"""

import functools
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, VisionTransformer
from torchvision.transforms import RandomResizedCrop, v2

import cae_v2
import common
from eval import official
from mutants import checks
from test_mfm_mae import FLAGS, LOOP, ONE, close, compare_loops, config_of, learn_by_heart, plain_loop, rates

GOLDEN = torch.load(Path(__file__).parent / "golden" / "cae_v2.pt", weights_only=True)
CASES = GOLDEN["cases"]
A, B = CASES  # B has a regressor narrower than its encoder


def build(module, name, dtype=torch.float32):
    c = CASES[name]["config"]
    model = module.CAEv2(c["img_size"], c["patch_size"], c["embed_dim"], c["depth"], c["num_heads"],
                         c["num_out_dim"], c["decoder_embed_dim"], c["regressor_depth"],
                         c["decoder_num_heads"], c["init_values"])
    official.load_official(model, CASES[name]["state_dict"])
    return model.to(dtype)


def run(model, name, dtype=torch.float32, supervise="both"):
    case = CASES[name]
    return model(case["images"].to(dtype), case["mask"], case["teacher_features"].to(dtype), supervise)


def our_name(theirs):
    (name,) = official.renamed({theirs: 0}, official.CAE_V2)
    return name


def gradients(model):
    """{name: gradient}, of the parts of a qkv bias one by one, as the authors have them; there is no key bias."""
    found = {}
    for name, grad in ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None):
        q, k, v = grad.chunk(3) if name.endswith("qkv.bias") else (grad, torch.zeros(1), None)
        assert k.abs().max() == 0
        found |= {name: grad} if v is None else {name[:-8] + "q_bias": q, name[:-8] + "v_bias": v}
    return found


# -- against the authors' numbers


def check_outputs(module, name):
    case, model, seen = CASES[name], build(module, name), []
    model.head_norm.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    ids = common.mask_to_ids(case["mask"], "cpu")
    close(model.encoder(case["images"], ids_keep=ids[0]), case["encoder_latent"])
    pred = torch.cat(list(model.predict(case["images"], *ids).values()), dim=1)
    close(F.normalize(pred, dim=-1), case["outputs"])
    close(seen[0][:, -ids[1].shape[1]:], case["regressor_out_masked"])
    close(module.cosine_distance(pred, case["labels_ordered_unit_norm"]), case["loss_per_token"])
    close(model.encoder(case["images"]), case["transfer"]["encoder_unmasked"])


def check_losses(module, name):
    """The loss, its parts, and the norm of each gradient."""
    case, model = CASES[name], build(module, name)
    loss, parts = run(model, name)
    golden = {part: pytest.approx(case["losses"][part], abs=1e-5) for part in ("cls", "visible", "masked")}
    assert {part: value.item() for part, value in parts.items()} == golden
    assert loss.item() == pytest.approx(case["losses"]["total"], abs=1e-5)
    precise, _ = run(build(module, name, torch.float64), name, torch.float64)
    assert precise.item() == pytest.approx(case["loss_total_float64"], abs=1e-9)
    loss.backward()
    ours = gradients(model)
    for theirs, norm in case["grad_l2"].items():  # 0: position tables, and the norm that is never applied
        grad = ours.pop(our_name(theirs), torch.zeros(1))
        assert grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-7), theirs
    assert not ours
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert total.item() == pytest.approx(case["grad_total_norm"], rel=1e-4)


def check_supervision(module, name):
    """Of one kind of token, and where none is hidden [D4]."""
    case, model = CASES[name], build(module, name)
    count = 1 + (~case["mask"][0]).sum()  # class token, visible, masked
    for supervise, tokens, names in (("visible", slice(0, count), {"cls", "visible"}),
                                     ("masked", slice(count, None), {"masked"})):
        loss, parts = run(model, name, supervise=supervise)
        assert set(parts) == names and not any(part.requires_grad for part in parts.values())
        assert loss.item() == pytest.approx(case["loss_per_token"][:, tokens].mean().item(), abs=1e-5)
    none = torch.zeros_like(case["mask"])
    assert set(model(case["images"], none, case["teacher_features"])[1]) == {"cls", "visible"}


def check_decay(module, name):
    """Class token and mask token decay."""
    model = build(module, name)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {g["weight_decay"]: {names[id(p)] for p in g["params"]}
              for g in module.common.parameter_groups(model, 0.05)}
    for theirs in CASES[name]["optimizer_groups"]:
        expected = {re.sub("[qv]_bias", "qkv.bias", our_name(name)) for name in theirs["names"]}
        assert groups[theirs["weight_decay"]] == {n for n in expected if not n.startswith("regresser.norm.")}
    assert {"encoder.cls_token", "mask_token"} <= groups[0.05]


def check_positions(module, name):
    model, table = module.CAEv2(224, 16, 16, 1, 2, 8, regressor_heads=2), GOLDEN["pos_embed_224_p16_dim16"]
    close(model.encoder.pos_embed.data, table)
    close(model.positions.data, table[:, 1:])
    row, column, k = 3, 5, torch.arange(4).double()  # the exponent is k / (dim/4), not k / (dim/4 - 1)
    angles = torch.stack([row * 10000.0 ** (-k / 4), column * 10000.0 ** (-k / 4)])
    close(table[0, 1 + row * 14 + column].double(), torch.stack([angles.sin(), angles.cos()], dim=1).flatten())


def check_teacher(module, name):
    """Weights of a QuickGELU model run without a warning under GELU, and give other features."""
    golden, c = GOLDEN["teacher"], GOLDEN["teacher"]["config"]
    for activation in (QuickGELU, torch.nn.GELU):
        tower = VisionTransformer(c["input_resolution"], c["patch_size"], c["width"], c["layers"], c["heads"],
                                  4.0, output_dim=c["output_dim"], act_layer=activation).eval()
        tower.load_state_dict(golden["state_dict"])
        targets = module.clip_targets(tower, golden["images"])
        wrong = (targets - golden["tokens"]).abs().max().item()
        assert not targets.requires_grad and (wrong < 1e-5) == (activation is QuickGELU)


def check_masks(module, name):
    for seed in range(6):
        rng = random.Random(seed)  # the authors draw from Python's `random`
        for draw in range(2):
            mask = torch.tensor(module.block_mask((14, 14), 49, rng))
            assert torch.equal(mask, GOLDEN["masks"]["block_49"][2 * seed + draw].long())


def check_small_grids(module, name):
    """Any grid and count; where no block of 16 cells fits, smaller ones are tried from the 1001st time on [D6]."""
    for grid in ((2, 2), (3, 5), (7, 7)):
        for num_masked in range(grid[0] * grid[1]):
            rng, areas = random.Random(num_masked), []

            def uniform(low, high, draw=rng.uniform):
                areas.append("b" if low == 1 else "a" if low == 16 else "")
                assert len(areas) < 50_000, "this goes on for ever"
                return draw(low, high)

            rng.uniform = uniform
            mask = module.block_mask(grid, num_masked, rng)
            assert sum(map(sum, mask)) == num_masked and len(mask) == grid[0] and len(mask[0]) == grid[1]
            assert all(len(few) == 1000 for few in re.findall("a+(?=b)", "".join(areas)))
            assert num_masked != 3 or grid != (2, 2) or re.match("a{1000}b+a", "".join(areas))


def check_initialisation(module, name):
    """Xavier for every Linear, qkv as one matrix; convolution and tokens cut at one sigma of 0.02."""
    torch.manual_seed(0)
    model = module.CAEv2(32, 4, 192, 2, 12, 64, 96, 1, 12)
    for layer in (layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)):
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert layer.bias is None or (layer.bias == 0).all()
    for tensor in (model.encoder.patch_embed.proj.weight, model.encoder.cls_token, model.mask_token):
        assert tensor.abs().max() <= 0.02 and tensor.std().item() == pytest.approx(0.0108, rel=0.12)
    assert (model.encoder.patch_embed.proj.bias == 0).all()
    assert (model.encoder.blocks[0].ls1.gamma == 0.1).all() and (model.regressor[0].ls2.gamma == 0.1).all()
    small = module.CAEv2(32, 4, 48, 1, 4, 64, 48, 1, 4, init_values=1e-5)  # ViT-L's; the regressor ignores it
    assert (small.encoder.blocks[0].ls1.gamma == 1e-5).all() and (small.regressor[0].ls2.gamma == 0.1).all()


def check_augment(module, name):
    """torchvision's jitter of the whole image in floats, crop and flip with the same draws, for both sizes. Its own
    on bytes cuts three times, each time half a level on average [D8]."""
    config = config_of(module, "--img_size=64 --patch_size=8 --model=vit_s")
    photos, change, levels = common.find_data("scenes", "pretrain", 96, num_scenes=24).pixels, [], []
    clip, adjust, draw = demo_teacher().preprocess_cfg, v2.functional, lambda: torch.empty(()).uniform_(0.6, 1.4).item()
    for seed, image in enumerate(photos[:, :, :, 8:]):
        torch.manual_seed(seed)
        *crops, colours, mask = module.Augment(config, 56)(image, -1)
        student, teacher, _ = module.inputs([x[None] for x in (*crops, colours, mask)], demo_teacher(), "cpu")
        assert mask.shape == (64,) and mask.sum() == 16 and all(crop.dtype == torch.uint8 for crop in crops)
        torch.manual_seed(seed)
        jitters = [([adjust.adjust_brightness, adjust.adjust_contrast, adjust.adjust_saturation][kind], draw())
                   for kind in torch.randperm(3)]
        box = RandomResizedCrop.get_params(image, (0.4, 1.0), (3 / 4, 4 / 3))
        flip = (lambda x: x.flip(-1)) if torch.rand(()) < 0.5 else (lambda x: x)
        for ours, stats in ((student, (common.IMAGENET_MEAN, common.IMAGENET_STD)), (teacher, (clip["mean"], clip["std"]))):
            ours, theirs = 255 * common.unnormalise(ours, *stats)[0], []
            for whole in (image.float() / 255, image):
                for jitter, factor in jitters:
                    whole = jitter(whole, factor)
                whole = flip(adjust.resized_crop(whole, *box, ours.shape[-2:], v2.InterpolationMode.BICUBIC))
                theirs.append(255 * whole.clamp(0, 1) if whole.is_floating_point() else whole)
            change.append((ours - theirs[0]).abs().mean())
            levels.append([(ours - theirs[1]).abs().mean(), (ours - theirs[1]).mean()])
    assert max(change) < 1.5 and sum(change) / len(change) < 0.6  # the grey of a part; where values were cut off
    difference, bias = torch.tensor(levels).mean(0).tolist()
    assert difference < 2 and 1 < bias < 1.6
    assert len(module.Augment(config, 64)(image, -1)) == 3  # one image serves both where the sizes agree
    plain = config_of(module, "--img_size=64 --patch_size=8 --model=vit_s --color_jitter=0")
    *crops, colours, _ = module.Augment(plain, 64)(image, -1)
    assert torch.equal(module.recolour(crops[0][None].float(), colours[None])[0], crops[0].float())


@functools.cache
def demo_teacher(size=32):
    return cae_v2.load_teacher("demo", size)


MORE = FLAGS + "--img_size=16 --patch_size=4 --drop_path=0.5 --clip_grad=0.5"


@functools.cache
def plain_run():
    config, teacher = config_of(cae_v2, MORE), demo_teacher(16)
    model = cae_v2.build(config, teacher.output_dim)

    def loss_of(batch, step, row):
        student, images, mask = cae_v2.inputs(batch, teacher, ONE.device)
        torch.manual_seed(common.seed_for(0, "step", step, row))  # for the paths that are dropped
        return model(student, mask, cae_v2.clip_targets(teacher, images))[0]

    return plain_loop(config, cae_v2.Augment(config, 16), loss_of, torch.optim.AdamW(
        common.parameter_groups(model, 0.05)), rates(0.01, end=1e-5), clip=0.5)


def check_loop(module, name):
    """And the teacher has no gradient and keeps every bit."""
    teacher = demo_teacher(16)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    module.load_teacher = lambda spec, size: demo_teacher(size)
    compare_loops(module, plain_run(), MORE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


# -- mistakes, {(check, case) that catches them: [(what is wrong, place, pattern, wrong, ...)]}, see mutants.py

QUERIES, SINCOS = "block(m, z[:, 1:], m_positions, z_positions)", 'sincos_2d(%s, grid, first="row")'
test_checks = checks(cae_v2, {
    (check_outputs, A): [
        ("class token in the regressor", "CAEv2.predict", QUERIES,
         "block(m, z, m_positions, torch.cat([0 * z[:, :1], z_positions], dim=1))"),
        ("values carry positions", "RegressorBlock.forward", "norm_v(context)", "norm_v(context + positions)"),
        ("queries are no keys", "RegressorBlock.forward", "torch.cat([z, m], dim=1)", "z",
         "RegressorBlock.forward", "torch.cat([z_positions, m_positions], dim=1)", "z_positions"),
        ("keys keep the first queries", "CAEv2.predict", QUERIES, QUERIES[:-1] + ", self.mask_token)",
         "RegressorBlock.forward", "z_positions):", "z_positions, first):",
         "RegressorBlock.forward", "[z, m]", "[z, first.expand_as(m)]"),
        ("one norm for keys and values", "RegressorBlock.forward", "self.norm_v", "self.norm_k"),
        ("norm_2 only before the MLP", "RegressorBlock.forward", "self.norm_2", "",
         "RegressorBlock.forward", "self.mlp(u)", "self.mlp(self.norm_2(u))"),
        ("no head norm", "CAEv2.predict", "self.head_norm", ""),
        ("a norm after the regressor", "CAEv2.predict", '["masked"] = m', '["masked"] = F.layer_norm(m, m.shape[2:])')],
    (check_outputs, B): [("no norm in the adapter", "CAEv2.predict", "self.adapter", "self.adapter[0]")],
    (check_losses, B): [
        ("mean of three means", "CAEv2.forward", "torch.cat(list(errors.values()), dim=1).mean()",
         "sum(error.mean() for error in errors.values()) / 3")],
    (check_losses, A): [
        ("class token not supervised", "CAEv2.predict", "cls=z[:, :1],", ""),
        ("labels not in the order of pred", "CAEv2.forward", "common.gather(targets[:, 1:], ids_keep)",
         "targets[:, 1: 1 + ids_keep.shape[1]]"),
        ("masked labels in another order", "CAEv2.forward", "[:, 1:], ids_masked", "[:, 1:], ids_masked.flip(1)"),
        ("ids swapped", "CAEv2.forward", "ids_keep, ids_masked =", "ids_masked, ids_keep ="),
        ("polarity of the mask", "common:mask_to_ids", "hidden.byte()", "(~hidden).byte()"),
        ("squared error", "cosine_distance", "return 1 -", "return (pred - target).square().mean(dim=-1) + 0 *"),
        ("key bias in the encoder", "CAEv2.__init__", "common.freeze_key_bias(self.encoder)", "pass"),
        ("key bias in the regressor", "CrossAttention.__init__", ", bias=False", "")],
    (check_supervision, A): [
        ("the regressor always runs", "CAEv2.predict", 'supervise != "visible" and', ""),
        ("visible tokens always count", "CAEv2.predict", '{} if supervise == "masked" else', "")],
    (check_decay, A): [
        ("tokens do not decay", "common:decays", "parameter.ndim >= 2", 'parameter.ndim >= 2 and "token" not in name')],
    (check_decay, B): [("biases decay", "common:decays", "parameter.ndim >= 2 and", "")],
    (check_positions, ""): [
        ("column first", "CAEv2.__init__", SINCOS % "embed_dim", "sincos_2d(embed_dim, grid)"),
        ("column first in the regressor", "CAEv2.__init__", SINCOS % "R", "sincos_2d(R, grid)")],
    (check_teacher, ""): [
        ("ln_post on the pooled token only", "clip_targets", "return", "patches = visual.forward_intermediates(images, "
         "indices=1, output_fmt='NLC')['image_intermediates'][-1]; return"),
        ("patches not projected", "clip_targets", "patches @ visual.proj", "patches[..., :visual.proj.shape[1]]"),
        ("normalised features", "clip_targets", "return torch.cat", "return F.normalize(torch.cat",
         "clip_targets", ".float()", ".float(), dim=-1)")],
    (check_masks, ""): [
        ("count not exact", "block_mask", "while left:", "while left > 0:", "block_mask", "0 < new <= left", "0 < new"),
        ("small blocks", "block_mask", "16 if tries < 1000 else 1", "1")],
    (check_small_grids, ""): [
        ("never smaller", "block_mask", "16 if tries < 1000 else 1", "16"),
        ("smaller too soon", "block_mask", "tries < 1000", "tries < 100"),
        ("smaller ever after", "block_mask", "left - new, 0", "left - new, tries")],
    (check_initialisation, ""): [
        ("torch's own", "CAEv2.__init__", "common.xavier_init(self)", "pass"),
        ("cut at two sigma", "CAEv2.__init__", "a=-0.02, b=0.02", "a=-0.04, b=0.04"),
        ("the regressor's scale as the encoder's", "CAEv2.__init__", "0.1 if init_values else None", "init_values")],
    (check_augment, ""): [
        ("contrast by the grey of the crop", "recolour", "+ c", "+ c * 0 + (1 - a - b) * images.mean((1, 2, 3), True)"),
        ("always in one order", "draw_colours", "torch.randperm(3)", "torch.randperm(3).sort()[0]"),
        ("the grey of the untouched image", "draw_colours", "if mean is None", "if False"),
        ("saturation towards white", "draw_colours", "(f, 1 - f, 0)", "(f, 0, 255 * (1 - f))"),
        ("values not cut", "recolour", ".clamp_(0, 255)", ""),
        ("the teacher's colours stay", "inputs", "recolour(crop.float(), colours) for",
         "crop.float() if crop is crops[1] else recolour(crop.float(), colours) for"),
        ("smaller crops", "Augment.__call__", "config.crop_min", "0.08"),
        ("bilinear", "Augment.__call__", "BICUBIC", "BILINEAR"),
        ("never flipped", "Augment.__call__", "< 0.5", "< 0"),
        ("the teacher's images normalised as the student's", "inputs", ', cfg["mean"], cfg["std"]', "")],
    (check_loop, ""): [
        *LOOP, ("no clipping", "train", "config.clip_grad", "1e9"),
        ("MAE's betas", "train", "AdamW(groups,", "AdamW(groups, betas=(0.9, 0.95),"),
        ("the rate scaled with the batch", "Config.peak_lr", "self.lr", "self.lr * self.batch_size / 256"),
        ("the same paths dropped in all steps", "train", '"step", step,', '"step", 0,'),
        ("the same paths dropped in all micro batches", "train", "step, row)", "step, 0)"),
        ("images of the student for the teacher", "train", "clip_targets(teacher, teacher_images)",
         "clip_targets(teacher, student)")]})


# -- what the golden cases do not hold


def test_what_cannot_be():
    """A head of another width than the teacher's is refused, not broadcast."""
    case, model = CASES[A], build(cae_v2, A)
    images, mask, targets = case["images"], case["mask"], case["teacher_features"]
    for arguments, match in (
            ((mask, targets[..., :1]), "targets of shape"), ((mask, F.pad(targets, (0, 1))), "targets of shape"),
            ((0 * mask > 0, targets, "masked"), "hides none"), ((mask, targets, "all"), "'both'")):
        with pytest.raises(ValueError, match=match):
            model(images, *arguments)
    for count in (-1, 49):
        with pytest.raises(ValueError, match="hidden patches"):
            cae_v2.block_masks(1, 7, count)


def test_learning_rate_matches_the_authors():
    """Absolute, from 0, and at the peak in steps 6249 and 6250."""
    golden = GOLDEN["lr_schedule"]
    warmup = golden["warmup_epochs"] * golden["steps_per_epoch"]
    for step, value in zip(golden["iters"], golden["values"]):
        ours = common.learning_rate(step, golden["base_lr"], warmup, golden["length"], golden["min_lr"])
        assert ours == pytest.approx(value, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("num_masked", [30, 49, 98])
def test_mask_statistics_match_the_authors(num_masked):
    golden = GOLDEN["masks"]["statistics_2000_masks"][str(num_masked)]
    masks, again = (cae_v2.block_masks(count, 14, num_masked, torch.Generator().manual_seed(0)) for count in (2000, 2))
    assert torch.equal(masks[0], again[0]) and not torch.equal(masks[0], masks[1])
    masks = masks.reshape(-1, 14, 14)
    assert (masks.sum((1, 2)) == num_masked).all()
    edges = (masks[:, 1:] != masks[:, :-1]).sum() + (masks[:, :, 1:] != masks[:, :, :-1]).sum()
    assert edges / 2000 == pytest.approx(golden["mean_boundary_edges"], rel=0.03)
    assert masks[:, [0, 0, -1, -1], [0, -1, 0, -1]].float().mean() == pytest.approx(golden["freq_corner"], abs=0.01)
    assert masks[:, 6:8, 6:8].float().mean() == pytest.approx(golden["freq_centre"], abs=0.03)


def test_parameter_counts_of_the_released_sizes():
    """Trainable parameters as measured on the authors' models; ours have no unused `regresser.norm`."""
    counts = dict(vit_ti=(5_670_080, 96), vit_s=(23_570_048, 384), vit_b=(114_420_992, 768))
    for size, (theirs, regressor_dim) in counts.items():
        with torch.device("meta"):
            model = cae_v2.build(config_of(cae_v2, f"--model={size}"), 512)
        ours = sum(p.numel() for p in model.parameters() if p.requires_grad)
        key_biases = cae_v2.SIZES[size]["depth"] * cae_v2.SIZES[size]["embed_dim"]  # part of qkv.bias, held at zero
        assert ours - key_biases + 2 * regressor_dim == theirs


def test_released_recipes():
    for size, hidden in dict(vit_ti=30, vit_s=49, vit_b=98, vit_l=98).items():
        c = config_of(cae_v2, f"--model={size}")
        assert (c.epochs, c.batch_size, c.lr, c.min_lr, c.warmup_epochs) == (300, 2048, 1.5e-3, 1e-5, 10)
        assert (c.weight_decay, c.clip_grad, c.drop_path, c.crop_min, c.color_jitter) == (0.05, 3, 0.1, 0.4, 0.4)
        assert c.num_masked == hidden and cae_v2.SIZES[size]["num_heads"] == (16 if size == "vit_l" else 12)


@pytest.mark.parametrize("flags", ["", "--supervise=masked", "--supervise=visible", "--mask_ratio=0", "--mask=random"])
def test_eight_images_are_learnt_by_heart(flags, monkeypatch):
    """And what is trained gets a gradient, what is not stays as it is."""
    monkeypatch.setitem(cae_v2.SIZES, "vit_demo", dict(zip(cae_v2.COLUMNS, (64, 2, 4, 48, 1, 4, 0.1))))
    config, teacher = config_of(cae_v2, f"--demo {flags}"), demo_teacher()
    images = common.find_data("scenes", "pretrain", 32, num_scenes=8)
    samples = common.Samples(images, cae_v2.Augment(config, 32), 0)
    batch = torch.utils.data.default_collate([samples[0, index] for index in range(8)])
    student, teacher_images, mask = cae_v2.inputs(batch, teacher, ONE.device)
    targets, model = cae_v2.clip_targets(teacher, teacher_images), cae_v2.build(config, teacher.output_dim)
    inputs = student, mask, targets, config.supervise
    first, last = learn_by_heart(model, common.decays, inputs, lr=4e-3, steps=60)
    assert first > 0.8 and last < 0.4 * first
    without = {name for name, p in model.named_parameters() if p.grad is None}
    idle = ("regressor.", "mask_token") * (flags in ("--supervise=visible", "--mask_ratio=0"))
    assert without == {n for n in model.state_dict() if n.startswith(("encoder.pos_embed", "positions", *idle))}
