"""CAE v2 against the authors' own numbers (tests/golden/cae_v2.pt) and against independent formulas."""

import copy
import math
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import cae_v2
import common

GOLDEN = torch.load(Path(__file__).parent / "golden" / "cae_v2.pt", weights_only=True)
CASES = list(GOLDEN["cases"])


def build(case, dtype=torch.float32):
    c = case["config"]
    model = cae_v2.CAEv2(c["img_size"], c["patch_size"], c["embed_dim"], c["depth"], c["num_heads"], c["num_out_dim"],
                         c["decoder_embed_dim"], c["regressor_depth"], c["decoder_num_heads"], c["init_values"])
    cae_v2.load_official(model, case["state_dict"])
    return model.to(dtype)


def run(model, case, dtype=torch.float32, supervise="both"):
    return model(case["images"].to(dtype), case["mask"], case["teacher_features"].to(dtype), supervise)


def our_gradient(model, name):
    """The gradient that belongs to one of the authors' parameters, or None where ours has no such parameter."""
    parameters = dict(model.named_parameters())
    if name.startswith("encoder.") and name.endswith(("q_bias", "v_bias")):
        grad = parameters[name[:-6] + "qkv.bias"].grad
        q, k, v = grad.chunk(3)
        assert k.abs().max() == 0  # no key bias
        return q if name.endswith("q_bias") else v
    for theirs, ours in cae_v2.OFFICIAL_NAMES:
        name = name.replace(theirs, ours)
    return parameters[name].grad if name in parameters else None


@pytest.mark.parametrize("name", CASES)
def test_outputs_match_the_authors(name):
    case = GOLDEN["cases"][name]
    model = build(case).eval()
    with torch.no_grad():
        latent = model.encoder(case["images"], case["mask"])
        features = model.features(case["images"], case["mask"], "both")
        answers = model.head(model.head_norm(torch.cat(list(features.values()), 1)))
    torch.testing.assert_close(latent, case["encoder_latent"], atol=1e-5, rtol=0)
    torch.testing.assert_close(features["masked"], case["regressor_out_masked"], atol=1e-5, rtol=0)
    torch.testing.assert_close(F.normalize(answers, dim=-1), case["outputs"], atol=1e-5, rtol=0)
    distances = cae_v2.cosine_distance(answers, case["labels_ordered_unit_norm"])
    torch.testing.assert_close(distances, case["loss_per_token"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_losses_match_the_authors(name):
    case = GOLDEN["cases"][name]
    loss, parts = run(build(case), case)
    assert loss.item() == pytest.approx(case["losses"]["total"], abs=1e-5)
    for part in ("cls", "visible", "masked"):
        assert parts[part].item() == pytest.approx(case["losses"][part], abs=1e-5)
    loss, _ = run(build(case, torch.float64), case, torch.float64)
    assert loss.item() == pytest.approx(case["loss_total_float64"], abs=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_every_gradient_norm_matches_the_authors(name):
    case = GOLDEN["cases"][name]
    model = build(case)
    run(model, case)[0].backward()
    for theirs, norm in case["grad_l2"].items():
        grad = our_gradient(model, theirs)
        if grad is None:  # frozen position tables and the norm that is never applied
            assert norm == 0, theirs
        else:
            assert grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-7), theirs
    total = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    assert total == pytest.approx(case["grad_total_norm"], rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_weight_decay_groups_match_the_authors(name):
    case = GOLDEN["cases"][name]
    model = build(case)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in common.parameter_groups(model, 0.05)}
    for theirs in case["optimizer_groups"]:
        expected = set()
        for name in theirs["names"]:
            if name.startswith("regresser.norm."):
                continue
            for old, new in cae_v2.OFFICIAL_NAMES:
                name = name.replace(old, new)
            if name.startswith("encoder.") and name.endswith(("q_bias", "v_bias")):
                name = name[:-6] + "qkv.bias"
            expected.add(name)
        assert groups[theirs["weight_decay"]] == expected
    assert {"encoder.cls_token", "mask_token"} <= groups[0.05]  # gotcha 10


@pytest.mark.parametrize("name", CASES)
def test_downstream_features_match_the_authors(name):
    case = GOLDEN["cases"][name]
    tokens = build(case).encoder(case["images"])
    torch.testing.assert_close(tokens, case["transfer"]["encoder_unmasked"], atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens[:, 0], case["transfer"]["linear_probe_cls"], atol=1e-5, rtol=0)
