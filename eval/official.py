"""Loads weights of the authors' own pre-training code into our models, to compare both number by number.

    from eval.official import load_official
    model = cae_v2.CAEv2(...)
    load_official(model, torch.load("checkpoint-299.pth", weights_only=True)["model"])

Every tensor of theirs is used, but for the exceptions below, and none may be missing: files of an encoder
alone are for `eval.encoders`."""

from eval.encoders import LAYER_SCALE, MMPRETRAIN, OWN, check_weights, fused_biases, renamed

# Parts of the authors' names (the spelling is theirs) and ours for them, replaced in this order.
CAE_V2 = (("regresser.regressor_blocks.", "regressor."), ("rd_pos_embed", "positions"),
          ("encoder_to_regresser_norm.", "adapter.1."), ("encoder_to_regresser.", "adapter.0."),
          ("decoder.norm.", "head_norm."), ("decoder.head.", "head."), (".norm1_", ".norm_"),
          (".norm2_cross.", ".norm_2."), (".mlp_cross.", ".mlp."), (".cross_attn.q_bias", ".attn.q.bias"),
          (".cross_attn.v_bias", ".attn.v.bias"), (".cross_attn.", ".attn."),
          (".gamma_1_cross", ".ls1.gamma"), (".gamma_2_cross", ".ls2.gamma"), *LAYER_SCALE)
MFM = (("backbone.proj_layers.", "fusion.projections."), ("backbone.proj_weights", "fusion.logits"),
       ("neck.ln1.", "decoder_norm."), ("neck.", ""), *MMPRETRAIN)


def load_official(model, state_dict):
    """Loads {the authors' name: tensor} into a CAEv2, BeyondMasking or MFMMAE. Raises ValueError."""
    kind = type(model).__name__  # not its class: people copy the method files, and change them
    formats = dict(CAEv2=from_cae_v2, BeyondMasking=from_beyond_masking, MFMMAE=from_mfm_mae)
    if kind not in formats:
        raise ValueError(f"there are official weights for {', '.join(formats)}, not for {kind}")
    own = model.state_dict()
    weights = formats[kind](state_dict, own)
    check_weights(weights, own, extra=[name for name in weights if name not in own])
    model.load_state_dict(weights)


def from_cae_v2(state_dict, own):
    """Left out: `regresser.norm.*`, never applied, and layer scales of ones that our regressor lacks."""
    weights = fused_biases(renamed(state_dict, CAE_V2))
    if "positions" in weights:
        weights["positions"] = weights["positions"][:, 1:]  # without the class token, which has no use
    for name in weights.keys() - own.keys():
        scale = name.startswith("regressor.") and name.endswith(".gamma")
        if name.startswith("regresser.norm.") or (scale and bool((weights[name] == 1).all())):
            del weights[name]
    return weights


def from_beyond_masking(state_dict, own):
    """Left out: `encoder.cls_token`, never used, if our model has none. Position tables stay our own."""
    tables = {name: own[name] for name in ("encoder.pos_embed", "decoder.positions")}
    weights = tables | fused_biases(state_dict)
    if "encoder.cls_token" not in own:
        weights.pop("encoder.cls_token", None)
    return weights


def from_mfm_mae(state_dict, own):
    """The names of facebookresearch/mae, mmpretrain, or our own. Files of the encoder alone are refused."""
    weights = {}
    for name, tensor in renamed(state_dict, MFM).items():
        # facebookresearch/mae has no prefix before the names of the encoder.
        name = f"encoder.{name}" if name.startswith(OWN) else name
        weights[name] = tensor.flatten() if name == "fusion.logits" else tensor
    if not any(name.startswith("decoder") for name in weights):
        raise ValueError("these weights hold no decoder, so pre-training cannot go on from them; eval/ can "
                         "evaluate them, or `python -m eval.encoders FILE OUT` makes an encoder for --init")
    return weights
