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
