"""eval/official.py: of the authors' weights, which the golden files hold under their names, nothing is left out.
That our models then give the authors' losses is in the tests of each method."""

from pathlib import Path

import pytest
import torch

import beyond_masking
import cae_v2
import mfm_mae
from eval.official import load_official

GOLDEN = {path.stem: torch.load(path, weights_only=True) for path in Path(__file__).parent.glob("golden/*.pt")}
MFM = {name: GOLDEN["mfm_mae"][name] for name in ("mae", "mfm")}
CAE, BEYOND = GOLDEN["cae_v2"]["cases"], GOLDEN["beyond_masking"]["variants"]
TASK = {"zoomed_in_masked": "mask+zoom_in", "distorted": "distort"}
CASES = {**MFM, **CAE, **{name: BEYOND[name] for name in TASK}}
ZOOM, TINY = "zoomed_in_masked", "B_tiny_like_projected"


def build(name, **changes):
    """The model that a golden case is about, with weights of its own."""
    c = CASES[name]["config"]
    size = [c["img_size"], c["patch_size"]]
    if name in BEYOND:
        size += [c[f"{part}_{word}"] for part in ("encoder", "decoder") for word in ("embed_dim", "depth", "num_heads")]
        return beyond_masking.BeyondMasking(TASK[name], *size, **changes)
    size += [c["embed_dim"], c["depth"], c["num_heads"]]
    if name in MFM:
        decoder = [c["decoder_embed_dim"], c["decoder_depth"], c["decoder_num_heads"]]
        return mfm_mae.MFMMAE(*size, *decoder, **{"fuse": tuple(c.get("out_indices", ())), **changes})
    regressor = [c["num_out_dim"], c["decoder_embed_dim"], c["regressor_depth"], c["decoder_num_heads"]]
    return cae_v2.CAEv2(*size, *regressor, **{"init_values": 0.1, **changes})


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_needed(name):
    """Each tensor alone is removed or has another shape, and is named."""
    model, state = build(name), CASES[name]["state_dict"]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    free = ("regresser.norm.", "encoder.cls_token" if name in BEYOND else "regresser.norm.")
    for missing in state:
        rest = {key: tensor for key, tensor in state.items() if key != missing}
        if missing.startswith(free):
            load_official(build(name), rest)
            continue
        with pytest.raises(ValueError, match=r"^these weights lack \S+$"):
            load_official(model, rest)
    last = next(key for key in state if key.endswith(("head.bias", "pred.bias")))
    with pytest.raises(ValueError, match=r"another shape in (head|decoder).*\(\[7\], not"):
        load_official(model, {**state, last: torch.zeros(7)})
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name, extra", [
    (TINY, "encoder.blocks.0.attn.relative_position_bias_table"), (TINY, "decoder.blocks.0.norm.weight"),
    (TINY, "regresser.x"), ("A_base_like", "encoder_to_regresser.weight"), ("mfm", "neck.x"),
    (ZOOM, "encoder.blocks.0.gamma_1"), (ZOOM, "decoder.mask_token"), ("distorted", "encoder.norm_pre"),
    ("mae", "head.weight"), ("mae", "norm_pre.bias"), ("mfm", "backbone.proj_layers.5.bias")])
def test_every_tensor_is_used(name, extra):
    with pytest.raises(ValueError, match="hold what the model does not compute"):
        load_official(build(name), {**CASES[name]["state_dict"], extra: torch.ones(3)})


def test_without_layer_scale_cae_v2_takes_one_of_ones():
    model = build(TINY, init_values=None)
    state = {key: torch.ones_like(tensor) if key.endswith("_cross") else tensor for key, tensor
             in CASES[TINY]["state_dict"].items() if not key.endswith(("gamma_1", "gamma_2"))}
    load_official(model, state)
    for name in ("regresser.regressor_blocks.0.gamma_1_cross", "encoder.blocks.0.gamma_1"):
        with pytest.raises(ValueError, match="does not compute, (regressor|encoder.blocks).0.ls1.gamma"):
            load_official(model, {**state, name: 0.5 * torch.ones(24)})


def test_the_class_token_of_beyond_masking_goes_where_there_is_one_and_nothing_into_other_models():
    state = CASES[ZOOM]["state_dict"]
    model = build(ZOOM, class_token=True)
    load_official(model, state)
    assert torch.equal(model.encoder.cls_token, state["encoder.cls_token"])
    with pytest.raises(ValueError, match="lack encoder.cls_token$"):
        load_official(model, CASES["distorted"]["state_dict"])
    with pytest.raises(ValueError, match="not for Linear"):
        load_official(torch.nn.Linear(2, 2), {})


@pytest.mark.parametrize("name", MFM)
def test_names_of_mae_and_mfm(name):
    """A file of the encoder alone; our own names; mmpretrain's MAE, which is MFM without its fusion."""
    model, state = build(name), CASES[name]["state_dict"]
    load_official(model, state)
    load_official(build(name), model.state_dict())
    encoder = {k: t for k, t in state.items() if not k.startswith(("neck", "decoder", "mask_token"))}
    with pytest.raises(ValueError, match="no decoder.*eval.encoders FILE OUT"):
        load_official(model, encoder)
    if name == "mfm":
        load_official(build(name, fuse=()), {k: t for k, t in state.items() if ".proj_" not in k})
    with pytest.raises(ValueError, match="fusion.logits"):
        load_official(build(name, fuse=() if name == "mfm" else (0, 3)), state)
