"""Reads the encoder out of the checkpoints that people have, and writes it for other projects.

    file                                 how it is told                     what is done
    our encoder.safetensors, timm and    patch_embed.proj.weight            nothing: these are ViT's names
    facebookresearch/mae
    our last.pt                          encoder.patch_embed.proj.weight    the prefix goes
    official CAE v2                      blocks.0.attn.q_bias               `fused_biases`
    official Beyond Masking              the same, and no pos_embed         `from_beyond_masking`
    mmpretrain                           backbone.patch_embed.projection... `from_mmpretrain`

Another format is one more function `from_...` and two more lines in `to_timm`; everything after it works
on timm's names alone. Sizes come from the shapes. The position table is loaded, never recomputed (two
orders of the sin-cos table exist in the wild), and resized where another image size is asked for. The 1-D
sinusoid of Beyond Masking is no map that could be resized: from one row of patches to the next its fast
channels turn by more than a circle, and what lies between two such codes is the code of no place. It is
computed anew.

Nothing is loaded by halves: a part that the file lacks is an error, and so is a part of the file's encoder
that this ViT lacks, because both give features that look plausible and are wrong.

Dimension key: D width, N patches, h x w grid of patches; N', h', w' after a resize.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import common

# First words of keys that change an encoder's features, unlike those of heads and decoders.
BACKBONE = {"cls_token", "pos_embed", "patch_embed", "blocks", "norm", "norm_pre", "reg_token",
            "dist_token", "rel_pos_bias", "rope"}
OVERRIDES = {"img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio",
             "class_token", "init_values", "drop_path_rate"}


def load_encoder(path, **override):
    """The encoder in a checkpoint as a `common.ViT`: float32, on the CPU, in training mode as if new.

    `path` is a file, or the folder of a run. `override` replaces arguments of ViT: `img_size` (the position
    table is resized, bicubic, the class row kept), `num_heads`, `drop_path_rate`, and `in_chans=3` makes an
    encoder of grey images take RGB; other sizes may be stated and must then be those of the file. The number
    of heads leaves no trace in a weight: it is the override, else what the file says of itself, else what
    `assumed_heads` takes it to be.
    Prints three lines: loaded, new, ignored. Raises FileNotFoundError, or ValueError where the file cannot
    be read safely, is no such encoder, or is not all of one.
    """
    path = find_file(path)
    state, known = read_state(path)
    try:
        form, weights, outside = to_timm(state)
        config, grid = infer_config(form, weights, known, override)
        with torch.device("meta"):  # no time and no random numbers for values that the file replaces
            vit = common.ViT(**config)
        wanted = vit.state_dict()
        weights["pos_embed"] = fit_positions(weights["pos_embed"], grid, vit)
        kernel = weights["patch_embed.proj.weight"]
        if (kernel.shape[1], vit.config["in_chans"]) == (1, 3):  # a third per colour: grey stays grey
            weights["patch_embed.proj.weight"] = kernel.expand(-1, 3, -1, -1) / 3  # (D, 3, P, P)
        check_whole(weights, wanted)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    # Copied, not assigned: half precision becomes float32, and no two parameters are views of one memory.
    vit.to_empty(device="cpu").load_state_dict({name: weights[name] for name in wanted})
    ignored = outside + [name for name in weights if name not in wanted]
    report(path, form, vit, grid, ignored, assumed="num_heads" not in {**known, **override})
    return vit


def find_file(path):
    """The file that `path` names, or the checkpoint in the folder that it names."""
    path = Path(path).expanduser()
    inside = [path / name for name in ("encoder.safetensors", "last.pt") if (path / name).is_file()]
    if path.is_dir() and not inside:
        raise FileNotFoundError(f"the folder {path} holds neither encoder.safetensors nor last.pt: give a "
                                "checkpoint file, or the folder of a run")
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}: give a checkpoint file, or the folder "
                                "of a run")
    return inside[0] if inside else path


def read_state(path):
    """A file as ({key: tensor}, what it says of itself), without the prefixes of DDP and torch.compile."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                content = {key: file.get_tensor(key) for key in file.keys()}
                known = json.loads((file.metadata() or {}).get("about", "{}")).get("config")
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a safetensors file ({error}): it is cut off or of "
                             "another kind, fetch or write it again") from error
    else:
        content = common.read_checkpoint(path)
        known = content.get("config")
        inner = [content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)]
        content = inner[0] if inner else content
    state = {re.sub(r"(^|(?<=\.))(module|_orig_mod)\.", "", key): value for key, value in content.items()
             if isinstance(key, str) and isinstance(value, torch.Tensor)}
    # Only what shapes do not tell; a shape cannot be out of date.
    known = known if isinstance(known, dict) else {}
    return state, {key: known[key] for key in ("num_heads", "img_size", "init_values") if known.get(key)}


# --------------------------------------------------------------------------------------------------
# formats


def to_timm(state):
    """A state dict in a known format as (its name, {timm's key: tensor} of the encoder, all other keys)."""
    prefix = "encoder." if "encoder.patch_embed.proj.weight" in state else ""
    prefix = "backbone." if "backbone.patch_embed.projection.weight" in state else prefix
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    outside = [key for key in state if not key.startswith(prefix)]
    form = "timm"
    if "blocks.0.attn.q_bias" in weights:
        form, weights = "CAE v2", fused_biases(weights)
        if "pos_embed" not in weights and "blocks.0.ls1.gamma" not in weights:
            form, weights = "Beyond Masking", from_beyond_masking(weights)
    if prefix == "backbone.":
        form, weights = "mmpretrain", from_mmpretrain(weights)
    # The three tensors that all sizes are read from.
    for key, ndim in {"patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2, "pos_embed": 3}.items():
        if key not in weights or weights[key].ndim != ndim:
            some = f" ({', '.join(list(state)[:3])} ...)" if state else ""
            raise ValueError(f"this is no vision transformer in a known format: among its {len(state)} "
                             f"tensors{some} is no {key} with {ndim} dimensions; known are our "
                             "encoder.safetensors and last.pt, timm, facebookresearch/mae, mmpretrain, "
                             "official CAE v2 and Beyond Masking")
    return form, weights, outside


def fused_biases(weights):
    """Attention has no key bias there: zeros in the fused one say the same. Gamma is layer scale."""
    renamed = {}
    for key, value in weights.items():
        if key.endswith("attn.q_bias"):
            v_bias = weights.get(key.replace("q_bias", "v_bias"), value[:0])  # missing: a wrong shape tells
            bias = torch.cat([value, torch.zeros_like(value), v_bias])  # (3*D,)
            renamed[key.replace("q_bias", "qkv.bias")] = bias
        elif not key.endswith("attn.v_bias"):
            renamed[re.sub(r"gamma_([12])$", r"ls\1.gamma", key)] = value
    return renamed


def from_beyond_masking(weights):
    """The file has a class token that nothing has used, and no position table: it is of 14 x 14 patches."""
    width = len(weights["patch_embed.proj.bias"])
    kept = {key: value for key, value in weights.items() if key != "cls_token"}
    return {**kept, "pos_embed": common.sinusoid_1d(width, 14 * 14)[None]}


# Patterns of mmpretrain's names, without `backbone.`, and timm's names for them.
MMPRETRAIN = ((r"^patch_embed\.projection\.", "patch_embed.proj."), (r"^pre_norm\.", "norm_pre."),
              (r"^layers\.", "blocks."), (r"^ln1\.", "norm."), (r"\.ln([12])\.", r".norm\1."),
              (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."), (r"\.ffn\.layers\.1\.", ".mlp.fc2."))


def from_mmpretrain(weights):
    """Other names for the same tensors. MFF's proj_layers and proj_weights are of pre-training alone: they
    keep their names, and are ignored."""
    renamed = {}
    for key, value in weights.items():
        for pattern, name in MMPRETRAIN:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return renamed


# --------------------------------------------------------------------------------------------------
# from timm's names to a ViT


def infer_config(form, weights, known, override):
    """The arguments of `common.ViT` for these weights, and the (h, w) grid of their position table."""
    unknown = override.keys() - OVERRIDES
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))} is no argument of ViT, which has "
                         f"{', '.join(sorted(OVERRIDES))}")
    dim, channels, *patch = weights["patch_embed.proj.weight"].shape
    hidden = len(weights["blocks.0.mlp.fc1.weight"])
    # ViT takes int(dim * ratio), and the float next to hidden / dim may give one less than `hidden`.
    ratio = hidden / dim
    if int(dim * ratio) != hidden:
        ratio = math.nextafter(ratio, math.inf)
    class_token = "cls_token" in weights
    grid = table_grid(weights["pos_embed"].shape[1], class_token, patch, known, override)
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    # Where layer scale once started is history: the value only says that there is one.
    init_values = known.get("init_values", 1.0) if "blocks.0.ls1.gamma" in weights else None
    config = dict(img_size=(grid[0] * patch[0], grid[1] * patch[1]), patch_size=tuple(patch),
                  in_chans=channels, embed_dim=dim, depth=depth, num_heads=known.get("num_heads"),
                  mlp_ratio=ratio, class_token=class_token, init_values=init_values)
    config.update(override)
    if any(side < patch_side for side, patch_side in zip(common.pair(config["img_size"]), patch)):
        raise ValueError(f"img_size={config['img_size']} is smaller than a patch of {patch[0]} x {patch[1]}")
    if config["num_heads"] is None:
        config["num_heads"] = assumed_heads(form, dim)
    if config["num_heads"] < 1 or dim % config["num_heads"]:
        raise ValueError(f"a width of {dim} cannot be shared by {config['num_heads']} heads: give num_heads= "
                         "a number that divides it")
    return config, grid


def assumed_heads(form, dim):
    """Heads of a file that does not tell: 64 channels each, but for sizes that are known to differ."""
    if form == "CAE v2" and dim in (192, 384):
        return 12  # with the 3 and 6 of DeiT and timm the file loads just as well, and is wrong
    if dim == 1280:
        return 16  # ViT-H: 80 channels each, in MAE and timm alike
    if dim % 64:
        raise ValueError(f"the number of heads cannot be told from a width of {dim}: give num_heads=")
    return dim // 64


def table_grid(rows, class_token, patch, known, override):
    """The (h, w) grid of a position table: what the file says, else a square, else that of img_size=.

    The class token may have a row in it, or none (timm's `no_embed_class`).
    """
    known, asked = (tuple(size // side for size, side in zip(common.pair(source["img_size"]), patch))
                    if "img_size" in source else (0, 0) for source in (known, override))
    for count in (rows - class_token, rows):
        for grid in (known, (math.isqrt(count), math.isqrt(count)), asked):
            if 0 < count == math.prod(grid):
                return grid
    raise ValueError(f"its position table of {rows} rows is of no square grid: give the image size that the "
                     "encoder was trained with, img_size=(height, width)")


def fit_positions(table, grid, vit):
    """The position table of `grid`, (1, [1+]N, D), as one for the grid of `vit`: (1, [1+]N', D) float32."""
    N = math.prod(grid)
    head, patches = table[:, :-N].float(), table[:, -N:].float()  # (1, [1], D), (1, N, D)
    if vit.cls_token is not None and not head.shape[1]:
        head = torch.zeros_like(patches[:, :1])  # a class token that receives no position
    sinusoid = common.sinusoid_1d(patches.shape[2], N)[None]  # (1, N, D)
    if grid != vit.grid and torch.allclose(patches, sinusoid, atol=1e-3):  # half precision has 5e-4
        patches = common.sinusoid_1d(patches.shape[2], math.prod(vit.grid))[None]  # (1, N', D)
    elif grid != vit.grid:
        patches = rearrange(patches, "one (h w) d -> one d h w", h=grid[0])  # (1, D, h, w)
        patches = F.interpolate(patches, vit.grid, mode="bicubic", align_corners=False)  # (1, D, h', w')
        patches = rearrange(patches, "one d h w -> one (h w) d")  # (1, N', D)
    return torch.cat([head, patches], dim=1)


def check_whole(weights, wanted):
    """ValueError unless `weights` hold all of `wanted` in its shapes, and no other part of an encoder."""
    wrong = {
        "lacks": [name for name in wanted if name not in weights],
        "has another shape in": [f"{name} ({list(weights[name].shape)}, not {list(tensor.shape)})"
                                 for name, tensor in wanted.items()
                                 if name in weights and weights[name].shape != tensor.shape],
        "has what this ViT does not compute,": [name for name in weights if name not in wanted
                                                and name.split(".")[0] in BACKBONE],
    }
    for what, names in wrong.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"not the whole of an encoder: the file {what} {', '.join(names[:3])}{more}")


def report(path, form, vit, grid, ignored, assumed):
    """Prints the three lines that say what was done with a file."""
    config, (height, width), (P, Q) = vit.config, vit.img_size, vit.patch_size
    print(f"loaded   {path}: all {len(vit.state_dict())} tensors of the encoder ({form} names), width "
          f"{config['embed_dim']}, depth {config['depth']}, {config['num_heads']} heads"
          f"{' (assumed)' if assumed else ''}, image {height} x {width}, patch {P} x {Q}")
    resized = f"position table, from {grid[0]} x {grid[1]} to {vit.grid[0]} x {vit.grid[1]} patches"
    print(f"new      {resized if grid != vit.grid else 'nothing'}")
    counts = Counter(key.split(".")[0] for key in ignored)
    print(f"ignored  {', '.join(f'{name} ({count})' for name, count in counts.items()) or 'nothing'}")


# --------------------------------------------------------------------------------------------------
# for other projects


def export(vit, path, form="timm"):
    """Writes a `common.ViT` for other projects.

    "timm": a safetensors file at `path` with the keys of timm's VisionTransformer (num_classes=0), which is
    what a run writes as encoder.safetensors. "hf": `path` is a folder, which gets model.safetensors and
    config.json for transformers.ViTModel.from_pretrained(path, add_pooling_layer=False), whose
    last_hidden_state is what `vit` returns. ViTModel knows no layer scale: the gains are folded into the
    linear layer before them, gamma * (W x + b) = (gamma W) x + gamma b.
    Raises ValueError for another form, and for "hf" without a class token, which ViTModel always has.
    """
    if form == "timm":
        return common.save_encoder(vit, path)
    if form != "hf":
        raise ValueError(f"form is 'timm' or 'hf', not {form!r}")
    if vit.cls_token is None:
        raise ValueError("ViTModel always has a class token and this encoder has none: use form='timm'")
    tensors, config = to_hf(vit), json.dumps(hf_config(vit), indent=2)
    common.write_atomically(Path(path, "model.safetensors"),
                            lambda file: file.write_bytes(save(tensors, {"format": "pt"})))
    common.write_atomically(Path(path, "config.json"), lambda file: file.write_text(config))


HF_NAMES = {
    "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection", "blocks": "encoder.layer",
    "norm1": "layernorm_before", "attn.query": "attention.attention.query",
    "attn.key": "attention.attention.key", "attn.value": "attention.attention.value",
    "attn.proj": "attention.output.dense", "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense", "norm": "layernorm",
}


def to_hf(vit):
    """The weights of a ViT under ViTModel's names, layer scale folded in: {name: tensor}."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in vit.state_dict().items()}
    for gain, layer in (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2")):
        for name in [name for name in state if name.endswith(gain)]:
            gamma = state.pop(name)
            state[name.replace(gain, f"{layer}.weight")] *= gamma[:, None]
            state[name.replace(gain, f"{layer}.bias")] *= gamma
    for name in [name for name in state if ".qkv." in name]:
        for part, rows in zip(("query", "key", "value"), state.pop(name).chunk(3)):
            state[name.replace("qkv", part)] = rows.clone()  # safetensors takes no views
    # Whole words between dots: norm is not norm1.
    words = re.compile(rf"(?<![^.])({'|'.join(map(re.escape, HF_NAMES))})(?![^.])")
    return {words.sub(lambda match: HF_NAMES[match[0]], name): tensor for name, tensor in state.items()}


def hf_config(vit):
    """What ViTModel must know beside the weights."""
    (height, width), (P, Q) = vit.img_size, vit.patch_size
    return dict(model_type="vit", architectures=["ViTModel"], hidden_size=vit.config["embed_dim"],
                num_hidden_layers=vit.config["depth"], num_attention_heads=vit.config["num_heads"],
                intermediate_size=vit.blocks[0].mlp.fc1.out_features, num_channels=vit.config["in_chans"],
                image_size=height if height == width else [height, width],
                patch_size=P if P == Q else [P, Q],
                hidden_act="gelu", layer_norm_eps=vit.norm.eps, qkv_bias=True)
