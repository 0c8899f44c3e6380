"""MFM and MAE against the released code's own numbers (golden/mfm_mae.pt), and proof that these can fail.

Each `check_...` compares one part of a module with the golden file. The tests call them with `mfm_mae`;
`test_mistake_is_caught` calls them with copies of its source in which one line is wrong.
"""

import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

import common
import mfm_mae

GOLDEN = torch.load(Path(__file__).parent / "golden" / "mfm_mae.pt", weights_only=True)
CASES = ["mae", "mfm"]
TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, decoder_dim=16, decoder_depth=2,
            decoder_heads=2, fuse=(0, 1, 3))


def build(module, case, dtype=torch.float32, norm_pix=True, **changes):
    c = case["config"]
    options = dict(fuse=tuple(c.get("out_indices", ())), norm_pix=norm_pix, mlp_ratio=c["mlp_ratio"]) | changes
    model = module.MFMMAE(c["img_size"], c["patch_size"], c["embed_dim"], c["depth"], c["num_heads"],
                          c["decoder_embed_dim"], c["decoder_depth"], c["decoder_num_heads"], **options)
    module.load_official(model, case["state_dict"])
    return model.to(dtype)


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return mfm_mae.MFMMAE(**(TINY | changes))


def random_inputs(batch=4, seed=0, dtype=torch.float32, hidden=12):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, 32, 32, generator=generator).to(dtype)
    return images, common.random_masks(batch, 16, hidden, generator)


def all_predictions(model, images, mask):
    return model.answer(model.decode(model.encode(images, mask), *common.split_ids(mask)))


def check_outputs(module, name, dtype=torch.float32):
    """Golden tensors are float32, so float64 is compared with them at float32's rounding."""
    case = GOLDEN[name]
    model, images, mask = build(module, case, dtype).eval(), case["images"].to(dtype), case["mask"].bool()
    with torch.no_grad():
        latent = model.encode(images, mask)
        predicted = all_predictions(model, images, mask)
    kept = case["ids_keep"].argsort(dim=1)  # theirs stand in a random order, ours ascend
    golden = torch.cat([case["latent"][:, :1], common.pick(case["latent"][:, 1:], kept)], dim=1)
    torch.testing.assert_close(latent.float(), golden, atol=1e-5, rtol=0)
    torch.testing.assert_close(predicted.float(), case["pred"], atol=1e-5, rtol=0)
    if name == "mfm":
        torch.testing.assert_close(model.fusion_weights.float(), case["fusion_weights"], atol=1e-6, rtol=0)
    else:
        assert torch.equal(model.fusion_weights, torch.ones(1))


def check_losses(module, name):
    """The golden losses are numbers of a float64 run."""
    case = GOLDEN[name]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        for kind, norm_pix in (("loss_raw", False), ("loss_norm_pix", True)):
            model = build(module, case, dtype, norm_pix)
            loss, parts = model(case["images"].to(dtype), case["mask"].bool())
            assert loss.item() == pytest.approx(case[kind], abs=tolerance), (dtype, kind)
            shares = torch.stack(list(parts.values())) if parts else torch.ones(1)
            assert shares.tolist() == pytest.approx(model.fusion_weights.tolist())


def their_gradients(case, kind):
    """{our name: golden gradient norm}; the names are translated by the table of section (h)."""
    return {mfm_mae_name(name): norm for name, norm in case[kind].items()}


def mfm_mae_name(name):
    """Ours for theirs, written apart from the code under test."""
    if name.startswith(("backbone.", "neck.")):
        side, rest = name.split(".", 1)
        if rest.startswith("proj_layers."):
            return "fusion.projections." + rest.removeprefix("proj_layers.")
        if rest == "proj_weights":
            return "fusion.logits"
        words = {"layers": "blocks", "ln1": "norm1", "ln2": "norm2", "projection": "proj"}
        rest = rest.replace("ffn.layers.0.0", "mlp.fc1").replace("ffn.layers.1", "mlp.fc2")
        if rest.startswith("ln1."):
            rest = "norm." + rest[4:] if side == "backbone" else "decoder_norm." + rest[4:]
        rest = ".".join(words.get(word, word) for word in rest.split("."))
        return "encoder." + rest if side == "backbone" else rest
    return name if name.startswith(("mask_token", "decoder")) else "encoder." + name


def check_gradients(module, name):
    case = GOLDEN[name]
    for dtype, relative in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        for kind, norm_pix in (("grad_norm_raw", False), ("grad_norm_norm_pix", True)):
            model = build(module, case, dtype, norm_pix)
            model(case["images"].to(dtype), case["mask"].bool())[0].backward()
            ours = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
            theirs = their_gradients(case, kind)
            assert ours.keys() == theirs.keys()
            assert ours == {n: pytest.approx(norm, rel=relative, abs=1e-9) for n, norm in theirs.items()}


def check_downstream(module, name):
    """The bare encoder on whole images: the last block alone, nothing of the fusion."""
    case = GOLDEN[name]
    tokens = build(module, case).encoder(case["images"])
    torch.testing.assert_close(tokens[:, 0], case["vit_cls_feature"], atol=1e-5, rtol=0)
    last = build(module, case).encoder.layers(case["images"], [-1])[0][:, 1:].mean(dim=1)
    torch.testing.assert_close(last, case["vit_patch_mean"], atol=1e-5, rtol=0)


CHECKS = [(check, name) for check in (check_outputs, check_losses, check_gradients, check_downstream)
          for name in CASES]


@pytest.mark.parametrize("check, name", CHECKS)
def test_matches_the_released_code(check, name):
    check(mfm_mae, name)


@pytest.mark.parametrize("name", CASES)
def test_matches_the_released_code_in_float64(name):
    check_outputs(mfm_mae, name, torch.float64)


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
    generator = torch.Generator().manual_seed(0)
    for size, radius in (((56, 56), 10), ((32, 48), 40 * 32 / 224)):
        images = torch.randn(2, 3, *size, generator=generator).double()
        expected = reference_low_pass(images, radius)
        torch.testing.assert_close(module.low_pass(images), expected, atol=1e-12, rtol=0)
        assert (expected - images).abs().mean() > 0.3


def check_attention(module, name):
    """Against torch's own attention: the last block asks, all tokens of all blocks answer, no residual."""
    torch.manual_seed(0)
    fusion, theirs = module.AttentionFusion(32, 3, "linear", 4), torch.nn.MultiheadAttention(32, 4, batch_first=True)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([fusion.q.weight, fusion.k.weight, fusion.v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([fusion.q.bias, torch.zeros(32), fusion.v.bias]))
        theirs.out_proj.weight.copy_(fusion.proj.weight)
        theirs.out_proj.bias.copy_(fusion.proj.bias)
    outputs = [torch.randn(2, 5, 32) for _ in range(3)]
    u = [F.linear(outputs[k], fusion.projections[k].weight, fusion.projections[k].bias) for k in range(2)]
    u = [tokens + e.flatten() for tokens, e in zip([*u, outputs[2]], fusion.block_embed)]
    expected = theirs(u[2], torch.cat(u, dim=1), torch.cat(u, dim=1))[0]
    torch.testing.assert_close(fusion(outputs), expected, atol=1e-5, rtol=0)


def check_counts(module, name):
    """Gotcha 14: the count of visible patches is cut off in floating point: 9 of 100, not 10."""
    for grid, ratio, kept in ((10, 0.9, 9), (20, 0.9, 39), (14, 0.75, 49), (16, 0.75, 64), (8, 0.75, 16), (14, 0.6, 78)):
        config = module.Config(**module.SIZES["vit_b"] | dict(img_size=grid * 8, patch_size=8, mask_ratio=ratio))
        assert grid**2 - config.num_masked == kept


def check_decay(module, name):
    """mmpretrain's rule by its words: ln, bias, pos_embed, mask_token, cls_token in a name mean no decay."""
    case = GOLDEN["mfm"]
    model = build(module, case)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {g["weight_decay"]: {names[id(p)] for p in g["params"]}
              for g in common.parameter_groups(model, 0.05, module.decays)}
    frozen = {"backbone.pos_embed", "neck.decoder_pos_embed"}
    spared = {name for name in case["state_dict"] if any(
        word in name for word in ("ln", "bias", "pos_embed", "mask_token", "cls_token"))}
    assert groups[0.0] == {mfm_mae_name(name) for name in spared - frozen}
    assert groups[0.05] == {mfm_mae_name(name) for name in case["state_dict"].keys() - spared}
    assert "fusion.logits" in groups[0.05] and len(groups[0.05]) == 2 + 4 * 14 + 5 + 2


def check_preview(module, name):
    """Where the model answers with the truth, both last columns show the image, but for the pasted side."""
    config = module.Config(**module.SIZES["vit_demo"] | dict(img_size=32, patch_size=8))
    sheets, images = [], torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    mask = common.random_masks(2, 16, 12, torch.Generator().manual_seed(0))
    for norm_pix in (True, False):
        model = module.MFMMAE(**TINY, norm_pix=norm_pix)
        every = torch.arange(16).expand(2, -1)
        truth = mfm_mae.pixel_targets(common.normalise(images), every, 8, norm_pix)
        shift = torch.where(mask, 0.0, 1.0)[:, :, None]  # wrong at visible patches alone
        model.answer = lambda tokens: truth + shift
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common, "save_panels", lambda *a: sheets.append(a))
            module.preview("x.png", config, model, (images, mask), torch.device("cpu"))
        _, rows, captions, note = sheets[-1]
        hidden = mask.reshape(2, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)
        for row, image, where in zip(rows, images.float() / 255, hidden):
            seen, masked, predicted, pasted = row
            torch.testing.assert_close(seen, image, atol=1e-5, rtol=0)
            torch.testing.assert_close(masked, torch.where(where, 0.5, image), atol=1e-5, rtol=0)
            torch.testing.assert_close(pasted, image, atol=1e-5, rtol=0)
            torch.testing.assert_close(predicted[:, where], image[:, where], atol=1e-5, rtol=0)
            assert (predicted[:, ~where] - image[:, ~where]).abs().min() > 0.01
        assert len(captions) == 4 and ("leaks" in note) == norm_pix


CHECKS += [(check, "") for check in (check_low_pass, check_attention, check_counts, check_decay, check_preview)]


@pytest.mark.parametrize("check, name", CHECKS[8:])
def test_matches_the_specification(check, name):
    check(mfm_mae, name)


# Gotchas of the method, each as the wrong line that a reader might write: (which, check, case, (right, wrong) ...).
ENCODE = "outputs = self.encoder.layers(images, self.blocks, mask)"
MISTAKES = [
    ("1 each layer normed before the fusion", check_outputs, "mfm",
     ("self.fusion(outputs)\n        return self.encoder.norm(fused)",
      "self.fusion([self.encoder.norm(h) for h in outputs])\n        return fused")),
    ("1 normed twice", check_outputs, "mfm",
     ("return self.encoder.norm(fused)", "return self.encoder.norm(self.encoder.norm(fused))")),
    ("1 not normed", check_outputs, "mae", ("return self.encoder.norm(fused)", "return fused")),
    ("1 the last block projected", check_outputs, "mfm",
     ("zip(self.projections, outputs)]\n        return", "zip([*self.projections[:-1], self.projections[0]], outputs)]\n        return")),
    ("1 class token not fused", check_outputs, "mfm",
     ("return self.encoder.norm(fused)",
      "return self.encoder.norm(torch.cat([outputs[-1][:, :1], fused[:, 1:]], dim=1))")),
    ("2 projections feed the trunk", check_outputs, "mfm",
     (ENCODE, "x, outputs, k = self.encoder.embed(images, mask), [], 0\n"
      "        for i, block in enumerate(self.encoder.blocks):\n            x = block(x)\n"
      "            if i in self.blocks:\n                outputs.append(x)\n"
      "                x = self.fusion.projections[k](x) if self.fusion else x\n                k += 1")),
    ("3 blocks counted from 1", check_outputs, "mfm", (ENCODE, ENCODE.replace("self.blocks", "[i - 1 for i in self.blocks]"))),
    ("6 encoder's position table computed anew", check_outputs, "mfm",
     ("model.load_state_dict(state)", "model.load_state_dict(state | {'encoder.pos_embed': model.encoder.pos_embed.data})")),
    ("6 decoder's position table computed anew", check_outputs, "mfm",
     ("model.load_state_dict(state)", "model.load_state_dict(state | {'decoder_pos_embed': model.decoder_pos_embed.data})")),
    ("7 target in the order of the convolution", check_losses, "mae",
     ("common.pick(common.patchify(images, patch_size), ids)",
      "common.pick(rearrange(images, 'b c (h p) (w q) -> b (h w) (c p q)', p=patch_size[0], q=patch_size[0]), ids)")),
    ("8 biased variance", check_losses, "mae", ("patches.var(dim=-1, keepdim=True)", "patches.var(dim=-1, keepdim=True, correction=0)")),
    ("8 epsilon outside the root", check_losses, "mae", ("(variance + 1e-6).sqrt()", "variance.sqrt() + 1e-6")),
    ("8 no epsilon", check_losses, "mae", ("(variance + 1e-6).sqrt()", "variance.sqrt()")),
    ("9 sum over the patch vector", check_losses, "mae", (".square().mean(dim=-1)", ".square().sum(dim=-1)")),
    ("9 absolute error", check_losses, "mae", (".square().mean(dim=-1)", ".abs().mean(dim=-1)")),
    ("9 visible patches count too", check_losses, "mfm",
     ("answers = self.answer(common.pick(tokens, masked_ids))", "answers = self.answer(tokens)"),
     ("squared_error(answers, self.targets(images, masked_ids))",
      "squared_error(answers, self.targets(images, torch.cat([visible_ids, masked_ids], dim=1).sort(dim=1)[0]))")),
    ("9 visible patches instead", check_losses, "mfm",
     ("self.answer(common.pick(tokens, masked_ids))", "self.answer(common.pick(tokens, visible_ids))"),
     ("self.targets(images, masked_ids)).mean()", "self.targets(images, visible_ids)).mean()")),
    ("10 LayerNorm's own epsilon", check_losses, "mae",
     ("self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)", "self.decoder_norm = nn.LayerNorm(decoder_dim)")),
    ("12 logits do not decay", check_decay, "",
     ('return name == "fusion.logits" or (common.decays(name, parameter) and "token" not in name)',
      'return common.decays(name, parameter) and "token" not in name')),
    ("12 tokens decay", check_decay, "", (' and "token" not in name)', ")")),
    ("14 rounded count of visible patches", check_counts, "",
     ("int(self.grid**2 * (1 - self.mask_ratio))", "round(self.grid**2 * (1 - self.mask_ratio))")),
    ("14 truncated count of hidden patches", check_counts, "",
     ("self.grid**2 - int(self.grid**2 * (1 - self.mask_ratio))", "int(self.grid**2 * self.mask_ratio)")),
    ("weights without softmax", check_outputs, "mfm", ("self.logits.softmax(dim=0)", "self.logits / self.logits.sum()")),
    ("weights in reverse order", check_outputs, "mfm", ("zip(self.weights, projected)", "zip(self.weights.flip(0), projected)")),
    ("a plain mean", check_outputs, "mfm", ("self.logits.softmax(dim=0)", "torch.full_like(self.logits, 1 / len(self.logits))")),
    ("shallow blocks detached", check_gradients, "mfm",
     ("self.fusion(outputs)\n", "self.fusion([h.detach() for h in outputs[:-1]] + outputs[-1:])\n")),
    ("logits not learnt", check_gradients, "mfm", ('learnable=fusion == "average")', "learnable=False)")),
    ("shallow blocks not projected", check_losses, "mfm", ("[project(h) for", "[h for")),
    ("tokens not put back", check_outputs, "mae", ("torch.cat([visible_ids, masked_ids], dim=1).argsort(dim=1)",
                                                   "torch.cat([visible_ids, masked_ids], dim=1)")),
    ("no positions in the decoder", check_outputs, "mae", ("dim=1) + self.decoder_pos_embed", "dim=1)")),
    ("class token not in the decoder", check_outputs, "mae",
     ("x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed",
      "x = torch.cat([0 * x[:, :1], patches], dim=1) + self.decoder_pos_embed")),
    ("the class token's answer instead of the last patch's", check_outputs, "mae", ("return x[:, 1:]", "return x[:, :-1]")),
    ("no norm before the prediction", check_outputs, "mae", ("self.decoder_pred(self.decoder_norm(tokens))", "self.decoder_pred(tokens)")),
    ("the layers of the MLP swapped in mmpretrain's names", check_outputs, "mfm",
     ('(".ffn.layers.0.0.", ".mlp.fc1.")', '(".ffn.layers.0.0.", ".mlp.fc2.")'),
     ('(".ffn.layers.1.", ".mlp.fc2.")', '(".ffn.layers.1.", ".mlp.fc1.")')),
    ("norms swapped in mmpretrain's names", check_outputs, "mfm",
     ('(".ln1.", ".norm1."), (".ln2.", ".norm2.")', '(".ln1.", ".norm2."), (".ln2.", ".norm1.")')),
    ("fused mixture downstream", check_downstream, "mfm",
     ("        self._initialise()\n\n", "        self._initialise()\n        self.encoder.forward = lambda x, mask=None: self.encode(x, mask)\n\n")),
    ("low-pass: centred on the zero frequency", check_low_pass, "", ("- (size - 1) / 2 for", "- size // 2 for")),
    ("low-pass: real part", check_low_pass, "", ("disc).abs() - pixels", "disc).real - pixels")),
    ("low-pass: of normalised values", check_low_pass, "", ("pixels = unnormalise(images)", "pixels = images")),
    ("low-pass: the radius stays at 40", check_low_pass, "", ("(40 * min(H, W) / 224) ** 2", "40 ** 2")),
    ("low-pass: high frequencies", check_low_pass, "", ("columns.square() <= (", "columns.square() > (")),
    ("attention: the first block asks", check_attention, "", ("self.q(projected[-1])", "self.q(projected[0])")),
    ("attention: residual path", check_attention, "",
     ('return self.proj(rearrange(x, "b h t d -> b t (h d)"))', 'return projected[-1] + self.proj(rearrange(x, "b h t d -> b t (h d)"))')),
    ("attention: to the last block alone", check_attention, "", ("tokens = torch.cat(projected, dim=1)", "tokens = projected[-1]")),
    ("attention: no block vectors", check_attention, "", ("[project(h) + e\n", "[project(h) + 0 * e\n")),
    ("preview: not brought back from norm_pix", check_preview, "", ("patches = patches * std + mean", "patches = patches + mean")),
    ("preview: the visible patches grey", check_preview, "", ("torch.where(hidden, 0.5, images)", "torch.where(hidden, images, 0.5)")),
    ("preview: prediction pasted at visible patches", check_preview, "",
     ("torch.where(hidden, predicted, images)]", "torch.where(hidden, images, predicted)]")),
]


@pytest.mark.parametrize("which, check, name, replacements", [
    (which, check, name, replacements) for which, check, name, *replacements in MISTAKES],
    ids=[mistake[0] for mistake in MISTAKES])
def test_mistake_is_caught(which, check, name, replacements):
    source = Path(mfm_mae.__file__).read_text(encoding="utf-8")
    for right, wrong in replacements:
        assert source.count(right) == 1, f"the line is not in mfm_mae.py any more: {right}"
        source = source.replace(right, wrong)
    mutant = types.ModuleType("mfm_mae_mutant")
    mutant.__file__ = mfm_mae.__file__
    exec(compile(source, "mfm_mae_mutant", "exec"), mutant.__dict__)
    with pytest.raises((AssertionError, ValueError)):
        check(mutant, name)


# -- against other implementations


def test_vit_matches_timm():
    """With and without fusion in training, the encoder is timm's ViT, strictly loaded."""
    for name in CASES:
        c, model = GOLDEN[name]["config"], build(mfm_mae, GOLDEN[name])
        theirs = VisionTransformer(c["img_size"], c["patch_size"], embed_dim=c["embed_dim"], depth=c["depth"],
                                   num_heads=c["num_heads"], num_classes=0).eval()
        theirs.load_state_dict(model.encoder.state_dict())
        images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(model.encoder(images), theirs.forward_features(images), atol=1e-5, rtol=0)


def test_mae_matches_hugging_face(tmp_path):
    """ViTMAEForPreTraining, read from a file of its published names with our weights and our mask: the same loss and predictions."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, state = tiny(fuse=()), {}
    config = transformers.ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=128, decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=64, mask_ratio=0.75, norm_pix_loss=True, layer_norm_eps=1e-6)
    words = {"blocks": "layer", "norm1": "layernorm_before", "norm2": "layernorm_after", "fc1": "intermediate.dense",
             "fc2": "output.dense", "attn.proj": "attention.output.dense", "patch_embed.proj": "embeddings.patch_embeddings.projection"}
    rename = {"encoder.cls_token": "vit.embeddings.cls_token", "encoder.pos_embed": "vit.embeddings.position_embeddings",
              "mask_token": "decoder.mask_token", "decoder_pos_embed": "decoder.decoder_pos_embed"}
    for name, tensor in model.state_dict().items():
        for kind, part in zip(("query", "key", "value"), tensor.chunk(3) if "qkv" in name else (tensor,)):
            key = name.replace("attn.qkv", f"attention.attention.{kind}").replace("mlp.", "")
            key = key.replace("decoder_blocks", "decoder.decoder_layers").replace("encoder.blocks", "vit.encoder.layer")
            for ours, hf in words.items():
                key = key.replace(ours, hf)
            key = key.replace("encoder.norm", "vit.layernorm").replace("encoder.embeddings", "vit.embeddings")
            for side in ("embed", "norm", "pred"):
                key = key.replace(f"decoder_{side}.", f"decoder.decoder_{side}.")
            state[rename.get(name, key)] = part.contiguous()
    config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    theirs, info = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    model, theirs = model.double(), theirs.double().eval()
    images, mask = random_inputs(dtype=torch.float64)
    answer = theirs(images, noise=mask.double() + torch.rand(mask.shape) / 2)
    torch.testing.assert_close(answer.mask, mask.to(answer.mask))
    torch.testing.assert_close(model(images, mask)[0], answer.loss, atol=1e-12, rtol=0)
    torch.testing.assert_close(all_predictions(model, images, mask), answer.logits, atol=1e-12, rtol=0)


@pytest.mark.parametrize("changes", [
    dict(fuse=()), {}, dict(fusion="uniform"), dict(fusion="attention"), dict(projection="none"), dict(target="lowpass"),
    dict(norm_pix=False)], ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()) or "default")
def test_savings_change_no_number(changes):
    """Loss and every gradient equal the plain path: all patches embedded, all predicted, a float mask."""
    model = tiny(**changes).double()
    images, mask = random_inputs(dtype=torch.float64)
    loss, _ = model(images, mask)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    encoder, visible_ids, _ = model.encoder, *common.split_ids(mask)
    x = encoder.patch_embed.proj(images).flatten(2).transpose(1, 2) + encoder.pos_embed[:, 1:]
    x = torch.stack([tokens[~row] for tokens, row in zip(x, mask)])
    x, outputs = torch.cat([encoder.cls_token.expand(4, -1, -1), x], dim=1), []
    for block in encoder.blocks:
        x = block(x)
        outputs.append(x)
    if model.fusion is not None:
        x = model.fusion([outputs[k] for k in (0, 1, 3)])
    x = model.decoder_embed(encoder.norm(x))
    table = model.mask_token.repeat(4, 17, 1)
    table = table.scatter(1, torch.cat([torch.zeros(4, 1, dtype=torch.long), 1 + visible_ids], dim=1)[:, :, None]
                          .expand(-1, -1, 16), x)
    x = table + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x = block(x)
    predicted = model.decoder_pred(model.decoder_norm(x))[:, 1:]
    target = reference_low_pass(images, 40 * 32 / 224) if changes.get("target") == "lowpass" else images
    target = torch.stack([target[:, :, 8 * (n // 4): 8 * (n // 4) + 8, 8 * (n % 4): 8 * (n % 4) + 8]
                          .permute(0, 2, 3, 1).flatten(1) for n in range(16)], dim=1)
    if changes.get("norm_pix", True):
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    per_patch = ((predicted - target) ** 2).mean(dim=-1)
    plain = (per_patch * mask.double()).sum() / mask.double().sum()
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-12)
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], atol=1e-12, rtol=0, msg=name)


# -- the fusion


def test_all_weight_on_the_last_block_is_mae_bit_for_bit():
    fused, plain = tiny(), tiny(fuse=())
    missing, extra = plain.load_state_dict(fused.state_dict(), strict=False)
    assert missing == [] and all(name.startswith("fusion.") for name in extra)
    with torch.no_grad():
        fused.fusion.logits.copy_(torch.tensor([-1e4, -1e4, 1.0]))
    assert fused.fusion_weights.tolist() == [0, 0, 1]
    images, mask = random_inputs()
    assert torch.equal(fused.encode(images, mask), plain.encode(images, mask))
    losses = [model(images, mask)[0] for model in (fused, plain)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    grads = dict(plain.named_parameters())
    for name, parameter in fused.named_parameters():
        if name in grads and parameter.requires_grad:
            assert torch.equal(parameter.grad, grads[name].grad), name


def test_one_fused_block_is_mae():
    images, mask = random_inputs()
    one, none = tiny(fuse=(3,)), tiny(fuse=())
    assert one.state_dict().keys() == none.state_dict().keys()
    assert torch.equal(one(images, mask)[0], none(images, mask)[0]) and one(images, mask)[1] == {}


def test_fusion_weights():
    assert tiny().fusion_weights.tolist() == pytest.approx([1 / 3] * 3)  # equal at the start
    assert tiny(fusion="uniform").fusion_weights.tolist() == pytest.approx([1 / 3] * 3)
    assert tiny(fuse=()).fusion_weights.tolist() == [1] and tiny(fusion="attention").fusion_weights is None
    images, mask = random_inputs()
    model = tiny()
    with torch.no_grad():
        model.fusion.logits.copy_(torch.tensor([0.0, 1.0, 2.0]))
    parts = model(images, mask)[1]
    expected = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    assert {n: w.item() for n, w in parts.items()} == pytest.approx({f"weight_{k}": w for k, w in enumerate(expected)})
    assert not any(w.requires_grad for w in parts.values())
    for changes in (dict(fuse=()), dict(fusion="uniform"), dict(fusion="attention")):
        assert tiny(**changes)(images, mask)[1] == {}  # nothing is learnt that a log could show


def test_fused_blocks_average_by_hand():
    images, mask = random_inputs()
    for changes in ({}, dict(fusion="uniform"), dict(projection="none")):
        model = tiny(**changes)
        outputs = model.encoder.layers(images, [0, 1, 3], mask)
        if changes.get("projection") != "none":
            outputs = [model.fusion.projections[k](outputs[k]) for k in range(2)] + outputs[2:]
            assert isinstance(model.fusion.projections[0], torch.nn.Linear) and len(list(model.fusion.projections.parameters())) == 4
        else:
            assert not list(model.fusion.projections.parameters())
        mean = (outputs[0] + outputs[1] + outputs[2]) / 3
        expected = F.layer_norm(mean, (32,), model.encoder.norm.weight, model.encoder.norm.bias, 1e-6)
        torch.testing.assert_close(model.encode(images, mask), expected, atol=1e-5, rtol=0)


def test_fusion_learns_through_every_block():
    """Shallow features are not detached: the projections, logits and all blocks get a gradient."""
    for changes in ({}, dict(fusion="uniform"), dict(fusion="attention"), dict(projection="none")):
        model = tiny(**changes)
        model(*random_inputs())[0].backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        tables = {"encoder.pos_embed", "decoder_pos_embed"}
        assert frozen == tables | ({"fusion.logits"} if changes.get("fusion") == "uniform" else set())


@pytest.mark.parametrize("fuse", [(0, 2), (3, 1), (1, 1, 3), (-1, 3), (4,), (0, 1, 2, 3, 4)])
def test_blocks_that_cannot_be_fused(fuse):
    with pytest.raises(ValueError, match="must rise from at least 0 to 3"):
        tiny(fuse=fuse)


@pytest.mark.parametrize("changes", [dict(fusion="mean"), dict(projection="mlp"), dict(target="clip")])
def test_unknown_options(changes):
    with pytest.raises(ValueError, match="is none of"):
        tiny(**changes)


def test_default_blocks_keep_the_spacing():
    expected = {12: (0, 2, 4, 6, 8, 11), 24: (0, 4, 8, 12, 16, 23), 32: (0, 5, 10, 16, 21, 31), 4: (0, 1, 2, 3),
                6: (0, 1, 2, 3, 4, 5), 2: (0, 1), 1: (0,)}
    for depth, blocks in expected.items():
        assert mfm_mae.Config(**mfm_mae.SIZES["vit_b"] | dict(depth=depth)).fused_blocks == blocks
    config = mfm_mae.Config(**mfm_mae.SIZES["vit_b"], fuse="3,5,7,11")
    assert config.fused_blocks == (3, 5, 7, 11)
    assert mfm_mae.Config(**mfm_mae.SIZES["vit_b"], fuse="none").fused_blocks == ()


# -- sizes, start, recipe


def test_parameter_counts():
    """Of the released code, both frozen position tables included."""
    counts = {("vit_b", "none"): 111_907_840, ("vit_b", ""): 114_860_806, ("vit_s", "none"): 36_381_696,
              ("vit_s", ""): 37_120_902, ("vit_l", "none"): 329_541_888}
    for (size, fuse), count in counts.items():
        with torch.device("meta"):
            model = mfm_mae.build(mfm_mae.Config(**mfm_mae.SIZES[size], fuse=fuse))
        assert sum(p.numel() for p in model.parameters()) == count
    with torch.device("meta"):
        defaults = mfm_mae.MFMMAE()
    assert sum(p.numel() for p in defaults.parameters()) == 114_860_806
    assert sum(p.numel() for p in defaults.encoder.parameters()) == 85_798_656


def test_released_recipe():
    for size in ("vit_ti", "vit_s", "vit_b", "vit_l", "vit_h"):
        config = mfm_mae.Config(**mfm_mae.SIZES[size])
        assert (config.epochs, config.batch_size, config.lr, config.warmup_epochs) == (300, 4096, 1.5e-4, 40)
        assert (config.weight_decay, config.mask_ratio, config.augment, config.norm_pix) == (0.05, 0.75, "resize_crop", "on")
        assert (config.fusion, config.projection, config.target) == ("average", "linear", "pixels")
        assert config.peak_lr == pytest.approx(2.4e-3) and config.decoder_depth == 8
        assert config.num_masked == (192 if size == "vit_h" else 147)
    assert mfm_mae.SIZES["vit_h"]["patch_size"] == 14 and mfm_mae.SIZES["vit_s"]["decoder_dim"] == 384


def test_learning_rate_of_the_released_schedule():
    """300 epochs of 10 steps, 40 of warm-up: mmengine's numbers, then the cosine of MAE's epochs."""
    rate = lambda step: common.learning_rate(step, 2.4e-3, 400, 3000, start=1e-4 * 2.4e-3)
    assert rate(0) == pytest.approx(2.4e-7) and rate(200) == pytest.approx(1.203127e-3, rel=1e-6)
    assert rate(399) == pytest.approx(2.4e-3, rel=1e-12) and rate(400) == pytest.approx(2.4e-3)
    for step in (401, 1700, 2999):
        epoch = step / 10
        assert rate(step) == pytest.approx(2.4e-3 * 0.5 * (1 + np.cos(np.pi * (epoch - 40) / 260)), rel=1e-9)


def test_initialisation():
    torch.manual_seed(0)
    model = mfm_mae.MFMMAE(32, 4, 192, 4, 4, 96, 2, 4, fuse=(0, 1, 3))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert "fusion.projections.1" in linears and "decoder_embed" in linears
    for name, module in linears.items():
        bound = (6 / sum(module.weight.shape)) ** 0.5
        assert 0.95 * bound < module.weight.abs().max() <= bound, name
        assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name
        assert (module.bias == 0).all(), name
    patch = model.encoder.patch_embed.proj
    bound = (6 / (192 + 48)) ** 0.5
    assert 0.95 * bound < patch.weight.abs().max() <= bound
    assert 0.9 * 48**-0.5 < patch.bias.abs().max() <= 48**-0.5  # a convolution's own start
    for token, count in ((model.encoder.cls_token, 192), (model.mask_token, 96)):
        assert token.numel() == count and token.std().item() == pytest.approx(0.02, rel=0.2)
    assert (model.fusion.logits == 1).all()
    attention = mfm_mae.MFMMAE(32, 4, 192, 4, 4, 96, 2, 4, fuse=(0, 1, 3), fusion="attention").fusion
    assert attention.block_embed.std().item() == pytest.approx(0.02, rel=0.2) and attention.k.bias is None


def test_position_tables_are_those_of_mae():
    """Of a new model [D5], by its formula; the golden file of facebookresearch/mae has the same."""
    state = GOLDEN["mae"]["state_dict"]
    model = mfm_mae.MFMMAE(64, 16, 48, 1, 4, 32, 1, 4, fuse=())
    torch.testing.assert_close(model.encoder.pos_embed.data, state["pos_embed"], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decoder_pos_embed.data, state["decoder_pos_embed"], atol=1e-5, rtol=0)
    theirs = GOLDEN["mfm"]["state_dict"]["backbone.pos_embed"]
    assert (theirs - state["pos_embed"]).abs().max() > 0.5
    torch.testing.assert_close(theirs, state["pos_embed"].roll(24, -1), atol=1e-5, rtol=0)


# -- inputs


@pytest.mark.parametrize("size", [(90, 120), (64, 64), (40, 200), (64, 70)])
def test_resize_crop_is_torchvision_on_pil_images(size):
    """Short side, reflection of 4, crop, flip, in the released order with one set of draws."""
    from torchvision.transforms import RandomCrop, functional
    config = mfm_mae.Config(**mfm_mae.SIZES["vit_ti"] | dict(img_size=64, patch_size=8))
    image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = F.avg_pool2d(image[None].float(), 5, 1, 2)[0].byte()
    for seed in range(4):
        torch.manual_seed(seed)
        ours, mask = mfm_mae.Augment(config)(image, -1)
        torch.manual_seed(seed)
        theirs = functional.resize(functional.to_pil_image(image), 64)  # bilinear unless told otherwise
        theirs = RandomCrop(64, padding=4, padding_mode="reflect")(theirs)
        theirs = functional.hflip(theirs) if torch.rand(()) < 0.5 else theirs
        assert (ours.float() - functional.pil_to_tensor(theirs).float()).abs().max() <= 2
        assert ours.shape == (3, 64, 64) and ours.dtype == torch.uint8 and mask.shape == (64,) and mask.sum() == 48


def test_rrc_is_torchvision_on_pil_images():
    from torchvision.transforms import InterpolationMode, RandomResizedCrop, functional
    config = mfm_mae.Config(**mfm_mae.SIZES["vit_ti"] | dict(img_size=64, patch_size=8, augment="rrc"))
    image = torch.randint(256, (3, 90, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = F.avg_pool2d(image[None].float(), 5, 1, 2)[0].byte()
    for seed in range(4):
        torch.manual_seed(seed)
        ours = mfm_mae.Augment(config)(image, -1)[0]
        torch.manual_seed(seed)
        theirs = RandomResizedCrop(64, (0.2, 1.0), interpolation=InterpolationMode.BICUBIC)(functional.to_pil_image(image))
        theirs = functional.hflip(theirs) if torch.rand(()) < 0.5 else theirs
        assert (ours.float() - functional.pil_to_tensor(theirs).float()).abs().max() <= 3


def test_a_constant_patch_is_no_division_by_zero():
    images, mask = random_inputs()
    loss = tiny()(torch.zeros_like(images), mask)[0]
    loss.backward()
    assert loss.isfinite()


def test_masks_that_cannot_be():
    images, mask = random_inputs()
    with pytest.raises(ValueError, match="hides no patch"):
        tiny()(images, torch.zeros_like(mask))
    uneven = mask.clone()
    uneven[0] = ~uneven[0]
    with pytest.raises(ValueError, match="same number"):
        tiny()(images, uneven)


# -- checkpoints of others


def test_load_official_is_strict():
    for name in CASES:
        case = GOLDEN[name]
        model, state = build(mfm_mae, case), case["state_dict"]
        before = {n: t.clone() for n, t in model.state_dict().items()}
        assert {mfm_mae_name(n): t.flatten().sum() for n, t in state.items()} == {n: t.flatten().sum() for n, t in before.items()}
        for missing in [n for n in state if n.endswith(("mask_token", "pos_embed", "cls_token", "pred.bias", "proj_weights"))]:
            with pytest.raises(ValueError, match="not the weights.*Missing"):
                mfm_mae.load_official(model, {n: t for n, t in state.items() if n != missing})
        with pytest.raises(ValueError, match="not the weights.*Unexpected"):
            mfm_mae.load_official(model, state | {"head.weight": torch.zeros(3)})
        with pytest.raises(ValueError, match="size mismatch"):
            mfm_mae.load_official(model, state | {next(n for n in state if n.endswith("pred.bias")): torch.zeros(3)})
        encoder = {n: t for n, t in state.items() if not n.startswith(("neck", "decoder", "mask_token"))}
        with pytest.raises(ValueError, match="no decoder"):
            mfm_mae.load_official(model, encoder)
    with pytest.raises(ValueError, match="not the weights"):  # fused weights for a model without fusion
        mfm_mae.load_official(build_like("mfm", fuse=()), GOLDEN["mfm"]["state_dict"])
    with pytest.raises(ValueError, match="fusion.logits"):
        mfm_mae.load_official(build_like("mae", fuse=(0, 3)), GOLDEN["mae"]["state_dict"])


def build_like(name, **changes):
    c = GOLDEN[name]["config"]
    return mfm_mae.MFMMAE(c["img_size"], c["patch_size"], c["embed_dim"], c["depth"], c["num_heads"],
                          c["decoder_embed_dim"], c["decoder_depth"], c["decoder_num_heads"], **changes)


def test_mmpretrain_names_of_plain_mae():
    """mmpretrain's MAE has the names of MFF without the fusion's two."""
    case = GOLDEN["mfm"]
    state = {n: t for n, t in case["state_dict"].items() if "proj_layers" not in n and "proj_weights" not in n}
    model = build_like("mfm", fuse=())
    mfm_mae.load_official(model, state)
    assert torch.equal(model.encoder.pos_embed, state["backbone.pos_embed"])


@pytest.mark.parametrize("name", CASES)
def test_start_from(tmp_path, name, capsys):
    """--init: a whole checkpoint, ours or theirs, or an encoder alone."""
    case, fuse = GOLDEN[name], dict(mae=(), mfm=(0, 2, 4, 6, 8, 11))[name]
    reference = build(mfm_mae, case).state_dict()
    encoder = {n.removeprefix("encoder."): t for n, t in reference.items() if n.startswith("encoder.")}
    torch.save({dict(mae="model", mfm="state_dict")[name]: case["state_dict"], "epoch": 3}, tmp_path / "theirs.pth")
    torch.save({"model": reference, "kind": "pretraining", "config": {}}, tmp_path / "last.pt")
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    torch.save({f"backbone.{n}": t for n, t in encoder.items()}, tmp_path / "backbone.pth")
    vit = common.ViT(64, 16, embed_dim=48, depth=case["config"]["depth"], num_heads=4)
    vit.load_state_dict(encoder)
    common.save_encoder(vit, tmp_path / "encoder.safetensors")
    for file in ("theirs.pth", "last.pt"):
        model = build_like(name, fuse=fuse)
        mfm_mae.start_from(model, str(tmp_path / file))
        assert all(torch.equal(t, reference[n]) for n, t in model.state_dict().items())
    assert "alone" not in capsys.readouterr().out
    for file in ("encoder.safetensors", "encoder.pth", "backbone.pth"):
        model = build_like(name, fuse=fuse)
        drawn = {n: t.clone() for n, t in model.state_dict().items()}
        mfm_mae.start_from(model, str(tmp_path / file))
        assert "encoder alone" in capsys.readouterr().out
        for n, t in model.state_dict().items():
            assert torch.equal(t, reference[n] if n.startswith("encoder.") else drawn[n]), n
    for state, match in (({"model": encoder | {"head.bias": torch.zeros(2)}}, "does not fit.*head.bias"),
                         ({"model": {n: t for n, t in reference.items() if n != "mask_token"}}, "mask_token"),
                         ({"model": {"w": torch.zeros(2)}}, "does not fit"), ({"model": 3}, "no weights")):
        torch.save(state, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=match):
            mfm_mae.start_from(build_like(name, fuse=fuse), str(tmp_path / "bad.pt"))
    with pytest.raises(FileNotFoundError):
        mfm_mae.start_from(build_like(name, fuse=fuse), str(tmp_path / "none.pth"))


def test_nothing_of_the_fusion_is_kept(tmp_path):
    common.save_encoder(tiny().encoder, tmp_path / "encoder.safetensors")
    assert load_file(tmp_path / "encoder.safetensors").keys() == common.ViT(32, 8, embed_dim=32, depth=4, num_heads=4).state_dict().keys()
