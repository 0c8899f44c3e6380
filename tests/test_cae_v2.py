"""CAE v2 against the authors' own numbers (golden/cae_v2.pt), and proof that these numbers can fail.

Each `check_...` compares one part of a module with the golden file. The tests call them with `cae_v2`;
`test_mistake_is_caught` calls them with copies of its source in which one line is wrong.
"""

import random
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, VisionTransformer

import cae_v2
import common

GOLDEN = torch.load(Path(__file__).parent / "golden" / "cae_v2.pt", weights_only=True)
A, B = "A_base_like", "B_tiny_like_projected"  # B has a regressor narrower than its encoder


def build(module, case, dtype=torch.float32):
    c = case["config"]
    model = module.CAEv2(c["img_size"], c["patch_size"], c["embed_dim"], c["depth"], c["num_heads"],
                         c["num_out_dim"], c["decoder_embed_dim"], c["regressor_depth"],
                         c["decoder_num_heads"], c["init_values"])
    module.load_official(model, case["state_dict"])
    return model.to(dtype)


def run(model, case, dtype=torch.float32, supervise="both"):
    return model(case["images"].to(dtype), case["mask"], case["teacher_features"].to(dtype), supervise)


def our_name(theirs):
    for old, new in cae_v2.OFFICIAL_NAMES:
        theirs = theirs.replace(old, new)
    return theirs


def our_gradient(model, theirs):
    """The gradient of the parameter that the authors call `theirs`; None if it has none in our model."""
    parameters = dict(model.named_parameters())
    if theirs.startswith("encoder.") and theirs.endswith(("q_bias", "v_bias")):
        q, k, v = parameters[theirs[:-6] + "qkv.bias"].grad.chunk(3)
        assert k.abs().max() == 0, "there is no key bias"
        return q if theirs.endswith("q_bias") else v
    parameter = parameters.get(our_name(theirs))
    return None if parameter is None else parameter.grad


def check_outputs(module, name):
    case = GOLDEN["cases"][name]
    model = build(module, case).eval()
    mask = case["mask"]
    with torch.no_grad():
        latent = model.encoder(case["images"], mask)
        features = model.features(case["images"], *common.split_ids(mask), mask, "both")
        answers = model.answer(features)
    torch.testing.assert_close(latent, case["encoder_latent"], atol=1e-5, rtol=0)
    torch.testing.assert_close(features["masked"], case["regressor_out_masked"], atol=1e-5, rtol=0)
    torch.testing.assert_close(F.normalize(answers, dim=-1), case["outputs"], atol=1e-5, rtol=0)
    per_token = module.cosine_distance(answers, case["labels_ordered_unit_norm"])
    torch.testing.assert_close(per_token, case["loss_per_token"], atol=1e-5, rtol=0)


def check_losses(module, name):
    case = GOLDEN["cases"][name]
    loss, parts = run(build(module, case), case)
    assert loss.item() == pytest.approx(case["losses"]["total"], abs=1e-5)
    assert {n: p.item() for n, p in parts.items()} == pytest.approx(
        {n: case["losses"][n] for n in ("cls", "visible", "masked")}, abs=1e-5)
    loss, _ = run(build(module, case, torch.float64), case, torch.float64)
    assert loss.item() == pytest.approx(case["loss_total_float64"], abs=1e-9)


def check_gradients(module, name):
    case = GOLDEN["cases"][name]
    model = build(module, case)
    run(model, case)[0].backward()
    for theirs, norm in case["grad_l2"].items():
        grad = our_gradient(model, theirs)
        if grad is None:  # frozen position tables, and the norm that is never applied
            assert norm == 0, theirs
        else:
            assert grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-7), theirs
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert torch.stack(norms).norm().item() == pytest.approx(case["grad_total_norm"], rel=1e-4)


def check_positions(module, name):
    model = module.CAEv2(224, 16, 16, 1, 2, 8, regressor_heads=2)
    table = GOLDEN["pos_embed_224_p16_dim16"]
    torch.testing.assert_close(model.encoder.pos_embed.data, table, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.positions, table[:, 1:], atol=1e-5, rtol=0)


def check_teacher(module, name, activation=QuickGELU):
    golden = GOLDEN["teacher"]
    c = golden["config"]
    tower = VisionTransformer(c["input_resolution"], c["patch_size"], c["width"], c["layers"], c["heads"],
                              4.0, output_dim=c["output_dim"], act_layer=activation)
    tower.load_state_dict(golden["state_dict"])
    targets = module.clip_targets(tower.eval(), golden["images"])
    torch.testing.assert_close(targets, golden["tokens"], atol=1e-5, rtol=0)
    resized = module.resize_positions(golden["pos_embed_resize_in"], (10, 10))
    torch.testing.assert_close(resized, golden["pos_embed_resize_out_grid10"], atol=1e-5, rtol=0)


def check_masks(module, name):
    for seed in range(6):
        rng = random.Random(seed)  # the authors draw from Python's `random`
        for draw in range(2):
            mask = torch.tensor(module.block_mask((14, 14), 49, rng))
            assert torch.equal(mask, GOLDEN["masks"]["block_49"][2 * seed + draw].long())


CHECKS = [(check, name) for check in (check_outputs, check_losses, check_gradients) for name in (A, B)]
CHECKS += [(check_positions, ""), (check_teacher, ""), (check_masks, "")]


@pytest.mark.parametrize("check, name", CHECKS)
def test_matches_the_authors(check, name):
    check(cae_v2, name)


# Gotchas of the method, each as the wrong line that a reader might write: (which, check, case, (right, wrong) ...).
MISTAKES = [
    ("1 mean of three means", check_losses, B,
     ("return distances.mean(), {",
      "return sum(p.mean() for p in distances.split([t.shape[1] for t in features.values()], dim=1)) / 3, {")),
    ("2 class token not supervised", check_losses, A,
     ("features.update(cls=z[:, :1], visible=z[:, 1:])", "features.update(visible=z[:, 1:])")),
    ("2 class token in the regressor", check_outputs, A,
     ("m = block(m, z[:, 1:], m_positions, z_positions)",
      "m = block(m, z, m_positions, torch.cat([0 * z[:, :1], z_positions], dim=1))")),
    ("3 ln_post on the pooled token only", check_teacher, "",
     ("    pooled, patches = visual(images.to(visual.conv1.weight.dtype))",
      "    pooled, _ = visual(images)\n    patches = visual.forward_intermediates("
      "images, indices=1, output_fmt='NLC')['image_intermediates'][-1]")),
    ("3 patches not projected", check_teacher, "",
     ("patches @ visual.proj", "patches[..., :visual.proj.shape[1]]")),
    ("3 normalised features", check_teacher, "",
     ("dim=1).float()  # (B, 1+N, C)", "dim=1).float().layer_norm() if False else "
      "F.layer_norm(torch.cat([pooled[:, None], patches @ visual.proj], dim=1), visual.proj.shape[1:])")),
    ("4 values carry positions", check_outputs, A, ("self.norm_v(context))", "self.norm_v(context + positions))")),
    ("4 queries are no keys", check_outputs, A,
     ("context = torch.cat([z, m], dim=1)", "context = z"),
     ("positions = torch.cat([z_positions, m_positions], dim=1)", "positions = z_positions")),
    ("4 keys keep the first queries", check_outputs, A,
     ("m = self.mask_token.expand_as(m_positions)", "m = first = self.mask_token.expand_as(m_positions)"),
     ("m = block(m, z[:, 1:], m_positions, z_positions)", "m = block(m, z[:, 1:], m_positions, z_positions, first)"),
     ("def forward(self, m, z, m_positions, z_positions):", "def forward(self, m, z, m_positions, z_positions, first):"),
     ("context = torch.cat([z, m], dim=1)", "context = torch.cat([z, first], dim=1)")),
    ("4 one norm for keys and values", check_outputs, A, ("self.norm_v(context))", "self.norm_k(context))")),
    ("4 norm_2 only before the MLP", check_outputs, A,
     ("        u = self.norm_2(m + self.drop_path(self.ls1(a)))\n        return u + self.drop_path(self.ls2(self.mlp(u)))",
      "        u = m + self.drop_path(self.ls1(a))\n        return u + self.ls2(self.mlp(self.norm_2(u)))")),
    ("5 no head norm", check_outputs, A, ("self.head(self.head_norm(torch.cat(", "self.head((torch.cat(")),
    ("5 a norm after the regressor", check_outputs, A,
     ('features["masked"] = m', 'features["masked"] = F.layer_norm(m, m.shape[-1:])')),
    ("6 column first", check_positions, "",
     ('self.encoder.set_positions(common.sincos_2d(embed_dim, grid, first="row"))',
      'self.encoder.set_positions(common.sincos_2d(embed_dim, grid, first="column"))')),
    ("6 column first in the regressor", check_positions, "",
     ('positions = common.sincos_2d(R, grid, first="row")', 'positions = common.sincos_2d(R, grid)')),
    ("8 key bias in the encoder", check_gradients, A, ("common.freeze_key_bias(self.encoder)", "pass")),
    ("8 key bias in the regressor", check_gradients, A,
     ("self.k = nn.Linear(dim, dim, bias=False)", "self.k = nn.Linear(dim, dim)")),
    ("15 labels not in the order of the answers", check_losses, A,
     ("visible=common.pick(targets[:, 1:], visible_ids)", "visible=targets[:, 1: 1 + visible_ids.shape[1]]")),
    ("15 masked labels in another order", check_losses, A,
     ("masked=common.pick(targets[:, 1:], masked_ids)", "masked=common.pick(targets[:, 1:], masked_ids.flip(1))")),
    ("15 count not exact", check_masks, "", ("while left:", "while left > 0:"), ("if 0 < new <= left:", "if 0 < new:")),
    ("16 small blocks", check_masks, "", ("rng.uniform(16 if", "rng.uniform(1 if")),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=[m[0] for m in MISTAKES])
def test_mistake_is_caught(mistake):
    _, check, name, *replacements = mistake
    source = Path(cae_v2.__file__).read_text(encoding="utf-8")
    for right, wrong in replacements:
        assert source.count(right) == 1, f"the line is not in cae_v2.py any more: {right}"
        source = source.replace(right, wrong)
    mutant = types.ModuleType("cae_v2_mutant")
    mutant.__file__ = cae_v2.__file__
    exec(compile(source, "cae_v2_mutant", "exec"), mutant.__dict__)
    with pytest.raises((AssertionError, ValueError)):
        check(mutant, name)


def test_plain_gelu_is_caught():
    """Gotcha 3: weights of a QuickGELU model run without a warning under GELU, and give other features."""
    with pytest.raises(AssertionError):
        check_teacher(cae_v2, "", activation=torch.nn.GELU)


def test_sincos_exponent_and_class_row():
    """Gotcha 6, by its formula in float64: exponent k / (dim/4), not k / (dim/4 - 1); the class row is zero."""
    table = cae_v2.CAEv2(64, 8, 16, 1, 2, 8, regressor_heads=2).encoder.pos_embed[0].double()
    assert table[0].abs().max() == 0
    row, column, k = 3, 5, torch.arange(4).double()
    omega = 10000.0 ** (-k / 4)
    expected = torch.cat([(row * omega).sin(), (row * omega).cos(), (column * omega).sin(), (column * omega).cos()])
    torch.testing.assert_close(table[1 + row * 8 + column], expected, atol=1e-5, rtol=0)


def test_target_width_must_be_the_teachers():
    """Gotcha 13: a head of another width than the teacher's is refused, not broadcast."""
    case = GOLDEN["cases"][A]
    model = build(cae_v2, case)
    for width in (1, 19, 21):
        with pytest.raises(ValueError, match="teacher's width"):
            model(case["images"], case["mask"], torch.randn(3, 65, width))


@pytest.mark.parametrize("name", [A, B])
def test_weight_decay_groups_match_the_authors(name):
    """Gotcha 10: class token and mask token decay."""
    case = GOLDEN["cases"][name]
    model = build(cae_v2, case)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in common.parameter_groups(model, 0.05)}
    for theirs in case["optimizer_groups"]:
        expected = {our_name(name) for name in theirs["names"] if not name.startswith("regresser.norm.")}
        expected = {name[:-6] + "qkv.bias" if name.startswith("encoder.") and name.endswith(("q_bias", "v_bias"))
                    else name for name in expected}
        assert groups[theirs["weight_decay"]] == expected
    assert {"encoder.cls_token", "mask_token"} <= groups[0.05]


def test_learning_rate_matches_the_authors():
    """Gotcha 11: absolute, from 0, and at the peak in steps 6249 and 6250."""
    golden = GOLDEN["lr_schedule"]
    warmup = golden["warmup_epochs"] * golden["steps_per_epoch"]
    for step, value in zip(golden["iters"], golden["values"]):
        ours = common.learning_rate(step, golden["base_lr"], warmup, golden["length"], golden["min_lr"])
        assert ours == pytest.approx(value, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("num_masked", [30, 49, 98])
def test_mask_statistics_match_the_authors(num_masked):
    golden = GOLDEN["masks"]["statistics_2000_masks"][str(num_masked)]
    masks = cae_v2.block_masks(2000, 14, num_masked, torch.Generator().manual_seed(0)).reshape(-1, 14, 14)
    assert (masks.sum((1, 2)) == num_masked).all()
    edges = (masks[:, 1:] != masks[:, :-1]).sum() + (masks[:, :, 1:] != masks[:, :, :-1]).sum()
    assert edges / 2000 == pytest.approx(golden["mean_boundary_edges"], rel=0.03)
    assert masks[:, [0, 0, -1, -1], [0, -1, 0, -1]].float().mean() == pytest.approx(golden["freq_corner"], abs=0.01)
    assert masks[:, 6:8, 6:8].float().mean() == pytest.approx(golden["freq_centre"], abs=0.03)


def test_masks_for_any_grid_and_count():
    for grid in ((2, 2), (3, 5), (7, 7), (8, 8)):
        for num_masked in range(grid[0] * grid[1]):
            masks = cae_v2.block_masks(2, grid, num_masked, torch.Generator().manual_seed(1))
            assert masks.shape == (2, grid[0] * grid[1]) and (masks.sum(1) == num_masked).all()
    for count in (-1, 49):
        with pytest.raises(ValueError, match="hidden patches"):
            cae_v2.block_masks(1, 7, count)
    again = [cae_v2.block_masks(4, 14, 49, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*again) and not torch.equal(again[0][0], again[0][1])


@pytest.mark.parametrize("name", [A, B])
def test_downstream_features_match_the_authors(name):
    case = GOLDEN["cases"][name]
    tokens = build(cae_v2, case).encoder(case["images"])
    torch.testing.assert_close(tokens, case["transfer"]["encoder_unmasked"], atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens[:, 0], case["transfer"]["linear_probe_cls"], atol=1e-5, rtol=0)


def test_supervise_visible_and_masked():
    case = GOLDEN["cases"][A]
    per_token = case["loss_per_token"]  # cls, 32 visible, 32 masked
    model = build(cae_v2, case)
    for block in model.regressor:
        block.forward = None  # `visible` must not run the regressor
    loss, parts = run(model, case, supervise="visible")
    assert loss.item() == pytest.approx(per_token[:, :33].mean().item(), abs=1e-5)
    assert set(parts) == {"cls", "visible"}
    loss, parts = run(build(cae_v2, case), case, supervise="masked")
    assert loss.item() == pytest.approx(per_token[:, 33:].mean().item(), abs=1e-5)
    assert set(parts) == {"masked"}
    none = torch.zeros_like(case["mask"])
    loss, parts = model(case["images"], none, case["teacher_features"])
    assert set(parts) == {"cls", "visible"}
    with pytest.raises(ValueError, match="hides none"):
        model(case["images"], none, case["teacher_features"], "masked")
    with pytest.raises(ValueError, match="'both'"):
        run(model, case, supervise="all")


def test_initialisation_as_it_really_happens():
    """Gotcha 9: Xavier for every Linear, qkv as one matrix; convolution and tokens cut at one sigma of 0.02."""
    torch.manual_seed(0)
    model = cae_v2.CAEv2(32, 4, 192, 2, 12, 64, 96, 1, 12)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert 0.95 * bound < module.weight.abs().max() <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name
            assert module.bias is None or (module.bias == 0).all(), name
    for tensor in (model.encoder.patch_embed.proj.weight, model.encoder.cls_token, model.mask_token):
        assert tensor.abs().max() <= 0.02 and tensor.std().item() == pytest.approx(0.0108, rel=0.12)
    assert (model.encoder.patch_embed.proj.bias == 0).all()
    assert (model.encoder.blocks[0].ls1.gamma == 0.1).all() and (model.regressor[0].ls2.gamma == 0.1).all()


def test_load_official_is_strict():
    case = GOLDEN["cases"][B]
    model, state = build(cae_v2, case), dict(case["state_dict"])
    for missing in ("mask_token", "encoder.blocks.1.attn.q_bias", "encoder.blocks.1.attn.v_bias",
                    "decoder.head.bias", "rd_pos_embed"):
        with pytest.raises(ValueError, match="not the weights"):
            cae_v2.load_official(model, {name: t for name, t in state.items() if name != missing})
    for extra in ("encoder.blocks.0.attn.relative_position_bias_table", "decoder.blocks.0.norm.weight"):
        with pytest.raises(ValueError, match="not the weights"):
            cae_v2.load_official(model, {**state, extra: torch.ones(3)})
    with pytest.raises(ValueError, match="size mismatch"):
        cae_v2.load_official(model, {**state, "decoder.head.bias": torch.zeros(7)})


def test_load_official_without_layer_scale():
    case = GOLDEN["cases"][B]
    c = case["config"]
    model = cae_v2.CAEv2(c["img_size"], c["patch_size"], c["embed_dim"], c["depth"], c["num_heads"], c["num_out_dim"],
                         c["decoder_embed_dim"], c["regressor_depth"], c["decoder_num_heads"], init_values=None)
    assert not [name for name in model.state_dict() if "gamma" in name]
    state = {n: torch.ones_like(t) if n.endswith("_cross") else t for n, t in case["state_dict"].items()
             if not n.endswith(("gamma_1", "gamma_2"))}
    cae_v2.load_official(model, state)
    with pytest.raises(ValueError, match="not the weights"):
        cae_v2.load_official(model, {n: 0.5 * t if n.endswith("_cross") else t for n, t in state.items()})


def test_parameter_counts_of_the_released_sizes():
    """Trainable parameters as measured on the authors' models; ours have no unused `regresser.norm`."""
    counts = dict(vit_ti=(5_670_080, 96), vit_s=(23_570_048, 384), vit_b=(114_420_992, 768))
    for size, (theirs, regressor_dim) in counts.items():
        config = cae_v2.Config(**cae_v2.SIZES[size])
        with torch.device("meta"):
            model = cae_v2.build(config, 512)
        ours = sum(p.numel() for p in model.parameters() if p.requires_grad)
        key_biases = config.depth * config.embed_dim  # part of qkv.bias, held at zero
        assert ours - key_biases + 2 * regressor_dim == theirs


def test_released_recipes():
    for size, hidden in dict(vit_ti=30, vit_s=49, vit_b=98, vit_l=98).items():
        config = cae_v2.Config(**cae_v2.SIZES[size])
        assert config.num_masked == hidden
        assert (config.epochs, config.batch_size, config.lr, config.min_lr, config.warmup_epochs) == (300, 2048, 1.5e-3, 1e-5, 10)
        assert (config.weight_decay, config.clip_grad, config.drop_path, config.crop_min, config.color_jitter) == (0.05, 3, 0.1, 0.4, 0.4)
        assert config.num_heads == (16 if size == "vit_l" else 12)


def test_augmentation_order_and_shared_crop():
    """Gotcha 14: jitter and flip come first and reach both images; both are the same crop."""
    config = cae_v2.Config(**{**cae_v2.SIZES["vit_ti"], "img_size": 64, "patch_size": 8})
    image = torch.randint(256, (3, 90, 120), dtype=torch.uint8)
    image = F.avg_pool2d(image[None].float(), 9, 1, 4)[0].byte()  # smooth, so that two sizes can be compared
    torch.manual_seed(3)
    student, teacher, mask = cae_v2.Augment(config, 56)(image, -1)
    assert student.shape == (3, 64, 64) and teacher.shape == (3, 56, 56) and student.dtype == torch.uint8
    assert mask.shape == (64,) and mask.sum() == config.num_masked
    resized = F.interpolate(student[None].float(), size=(56, 56), mode="bicubic", antialias=True)[0]
    assert (resized - teacher.float()).abs().mean() < 2
    torch.manual_seed(3)
    assert len(cae_v2.Augment(config, 64)(image, -1)) == 2  # one image serves both where the sizes agree
    names = []
    augment = cae_v2.Augment(config, 64)
    augment.jitter = lambda image: names.append("jitter") or image
    for name in ("horizontal_flip", "resized_crop"):
        original = getattr(cae_v2.TF, name)
        wrapper = (lambda original, name: lambda *a, **k: names.append(name) or original(*a, **k))(original, name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cae_v2.TF, name, wrapper)
            if name == "horizontal_flip":
                continue
            augment(image, -1)
    assert names[0] == "jitter" and names[-1] == "resized_crop"
