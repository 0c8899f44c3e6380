"""Reads the encoder of a checkpoint, whoever wrote it, and writes an encoder for other projects.

    python -m eval.encoders FILE OUT.safetensors     converts to timm's names, which --init reads
    python -m eval.encoders FILE OUT --form hf       converts to a folder for transformers.ViTModel

    FILE                                  recognised by                      what is done
    our encoder.safetensors, timm, MAE    patch_embed.proj.weight            nothing: these are ViT's names
    our last.pt                           encoder.patch_embed.proj.weight    the prefix is removed
    official CAE v2                       blocks.0.attn.q_bias               `LAYER_SCALE`, `fused_biases`
    official Beyond Masking               the same, and no pos_embed         `fused_biases`, 1-D sinusoid
    mmpretrain                            backbone.patch_embed.projection    `MMPRETRAIN`

A new format needs a few more lines in `to_timm`: everything after it knows timm's names only. Sizes are
inferred from shapes. The position table is that of the file, as two orders of the sin-cos table are in use;
for another image size it is resized, but the 1-D sinusoid of Beyond Masking is computed again: its fast
channels pass through more than a full period per row of patches, so interpolation makes no sense there.
A missing part is an error, and so is one that ViT does not have: the features would be plausible and wrong.
Dimension key: D width, P x Q size of a patch, N patches, h x w grid of patches; N', h', w' after a resize.
"""

import argparse
import json
import math
import re
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save

if not __package__:  # started by its file name, Python does not find common.py
    raise SystemExit("error: start it as `python -m eval.encoders`")
import common

# First words of the keys that belong to an encoder, and not to a head or a decoder.
BACKBONE = {"cls_token", "pos_embed", "patch_embed", "blocks", "norm", "norm_pre", "pre_norm", "reg_token",
            "dist_token", "rel_pos_bias", "rope"}


def load_encoder(path, **override):
    """The encoder of a checkpoint as a `common.ViT`: float32, on the CPU, in training mode.
    `path` is a file, or the folder of a run. `override` replaces arguments of ViT: with another `img_size`
    the position table is resized (bicubic, without the class token's row); `in_chans=3` makes an encoder of
    grey images accept RGB; `num_heads`, which no weight shows, and `drop_path_rate` are free; all others
    must agree with the file. Prints what was loaded and ignored. Raises FileNotFoundError or ValueError."""
    path = find_file(path)
    state, known, _ = read_state(path)
    try:
        form, weights, outside = to_timm(state)
        config, grid = infer_config(form, weights, known, override)
        with torch.device("meta"):  # no time and no random numbers for values that the file replaces
            vit = common.ViT(**config)
        wanted = vit.state_dict()
        weights["pos_embed"] = fit_positions(weights["pos_embed"], grid, vit)
        kernel = weights["patch_embed.proj.weight"]
        if (kernel.shape[1], vit.config["in_chans"]) == (1, 3):  # a third per colour: grey stays grey
            weights["patch_embed.proj.weight"] = kernel.expand(-1, 3, -1, -1) / 3  # (D, 3, P, Q)
        ignored = [name for name in weights if name not in wanted]
        check_weights(weights, wanted, extra=[name for name in ignored if name.split(".")[0] in BACKBONE])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    # Copied, not assigned: half precision becomes float32, and no two parameters share memory.
    vit.to_empty(device="cpu").load_state_dict({name: weights[name] for name in wanted})
    report(path, form, vit, grid, outside + ignored, assumed="num_heads" not in {**known, **override})
    return vit


def find_file(path):
    """The file `path`, or the checkpoint in the folder `path`. Raises FileNotFoundError."""
    path = Path(path).expanduser()
    for file in (path, path / "encoder.safetensors", path / "last.pt"):
        if file.is_file():
            return file
    raise FileNotFoundError(f"no checkpoint at {path}, and neither encoder.safetensors nor last.pt in it")


def read_state(path):
    """A file as ({key: tensor} without the prefixes of DDP and torch.compile, what only it can say of its
    encoder, as the shapes do not show it, the method that trained it or None)."""
    content = about = common.read_checkpoint(path)
    for key in ("state_dict", "model"):
        content = about[key] if isinstance(about.get(key), dict) else content
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
    state = {re.sub(r"(^|(?<=\.))(module|_orig_mod)\.", "", key): value for key, value in content.items()
             if isinstance(key, str) and isinstance(value, torch.Tensor)}
    known = next((about[key] for key in ("encoder", "config") if isinstance(about.get(key), dict)), {})
    known = {key: known[key] for key in ("num_heads", "img_size", "init_values") if known.get(key)}
    return state, known, about.get("method")


# ---- formats -------------------------------------------------------------------------------------

# Parts of others' names and ours for them, replaced in this order.
MMPRETRAIN = (("backbone.ln1.", "encoder.norm."), ("backbone.layers.", "encoder.blocks."),
              ("backbone.", "encoder."), ("patch_embed.projection.", "patch_embed.proj."),
              (".ln1.", ".norm1."), (".ln2.", ".norm2."),
              (".ffn.layers.0.0.", ".mlp.fc1."), (".ffn.layers.1.", ".mlp.fc2."))
LAYER_SCALE = ((".gamma_1", ".ls1.gamma"), (".gamma_2", ".ls2.gamma"))


def renamed(state, names):
    """A state dict with other names: each (old, new) of `names` is replaced in its keys, in this order."""
    for old, new in names:
        state = {key.replace(old, new): value for key, value in state.items()}
    return state


def fused_biases(state):
    """A state dict in which biases q and v, (D,) each, are one bias (3*D,) of q, k and v, with k's zero."""
    fused = dict(state)
    for name in state:
        v_name = name.replace("q_bias", "v_bias")
        if name.endswith("attn.q_bias") and v_name in state:
            q, v = fused.pop(name), fused.pop(v_name)
            fused[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    return fused


def to_timm(state):
    """A state dict of a known format as (its name, {timm's key: tensor} of the encoder, all other keys)."""
    form = "timm"
    if "backbone.patch_embed.projection.weight" in state:
        form, state = "mmpretrain", renamed(state, MMPRETRAIN)
    prefix = "encoder." if "encoder.patch_embed.proj.weight" in state else ""
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    outside = [key for key in state if not key.startswith(prefix)]
    if "blocks.0.attn.q_bias" in weights:
        width = len(weights["blocks.0.attn.q_bias"])
        form, weights = "CAE v2", fused_biases(renamed(weights, LAYER_SCALE))
        if "pos_embed" not in weights and "blocks.0.ls1.gamma" not in weights:
            form, weights["pos_embed"] = "Beyond Masking", common.sinusoid_1d(width, 14 * 14)[None]
            weights.pop("cls_token", None)  # in some of these files, but never used
    # All sizes are read from these three tensors.
    for key, ndim in {"patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2, "pos_embed": 3}.items():
        if key not in weights or weights[key].ndim != ndim:
            raise ValueError(f"this is no vision transformer in a known format: {len(state)} tensors "
                             f"({', '.join(list(state)[:3])} ...), but no {key} with {ndim} dimensions")
    return form, weights, outside


def infer_config(form, weights, known, override):
    """The arguments of `common.ViT` for these weights, and the (h, w) grid of their position table."""
    dim, channels, *patch = weights["patch_embed.proj.weight"].shape
    hidden = len(weights["blocks.0.mlp.fc1.weight"])
    # ViT computes int(dim * ratio), which the rounded quotient alone may make one too small.
    ratio = next(r for r in (hidden / dim, (hidden + 0.5) / dim) if int(dim * r) == hidden)
    class_token = "cls_token" in weights
    grid = table_grid(weights["pos_embed"].shape[1], class_token, patch, known, override)
    # Where layer scale began has no effect any more: the value only says that there is one.
    init_values = known.get("init_values", 1.0) if "blocks.0.ls1.gamma" in weights else None
    config = dict(img_size=(grid[0] * patch[0], grid[1] * patch[1]), patch_size=tuple(patch),
                  in_chans=channels, embed_dim=dim, num_heads=known.get("num_heads"), mlp_ratio=ratio,
                  depth=len({key.split(".")[1] for key in weights if key.startswith("blocks.")}),
                  class_token=class_token, init_values=init_values)
    config.update(override)
    config["num_heads"] = config["num_heads"] or assumed_heads(form, dim)
    if min(config["num_heads"], *common.pair(config["img_size"])) < 1:
        raise ValueError(f"{config['num_heads']} heads, image size {config['img_size']}: below 1")
    return config, grid


def assumed_heads(form, dim):
    """Heads of a file that does not say how many: 64 channels each, except in models known to differ."""
    if form == "CAE v2" and dim in (192, 384):
        return 12  # not 3 and 6 as in timm: with these the file would load, and the features be wrong
    if dim == 1280:
        return 16  # ViT-H: 80 channels each, in MAE and timm alike
    if dim % 64:
        raise ValueError(f"the number of heads cannot be inferred from a width of {dim}: give num_heads=")
    return dim // 64


def table_grid(rows, class_token, patch, known, override):
    """The (h, w) grid of a position table: by the image size that the file states, else a square, else by
    the caller's img_size=. The table may have no row for the class token (timm's `no_embed_class`)."""
    stated, asked = (tuple(side // P for side, P in zip(common.pair(source.get("img_size", 0)), patch))
                     for source in (known, override))
    for N in (rows - class_token, rows):
        for grid in (stated, (math.isqrt(N), math.isqrt(N)), asked):
            if 0 < N == math.prod(grid):
                return grid
    raise ValueError(f"its position table of {rows} rows is of no square grid: give the image size of its "
                     "training, img_size=(height, width)")


def fit_positions(table, grid, vit):
    """The position table of `grid`, (1, [1+]N, D), for the grid of `vit`: (1, [1+]N', D) float32."""
    N, D = math.prod(grid), table.shape[2]
    head, patches = table[:, :-N].float(), table[:, -N:].float()  # (1, [1], D), (1, N, D)
    if vit.cls_token is not None and not head.shape[1]:
        head = torch.zeros_like(patches[:, :1])  # a class token without a position
    if grid != vit.grid and torch.allclose(patches, common.sinusoid_1d(D, N), atol=1e-3):  # half: 5e-4
        patches = common.sinusoid_1d(D, math.prod(vit.grid))[None]  # (1, N', D)
    elif grid != vit.grid:
        patches = rearrange(patches, "one (h w) d -> one d h w", h=grid[0])  # (1, D, h, w)
        patches = F.interpolate(patches, vit.grid, mode="bicubic", align_corners=False)  # (1, D, h', w')
        patches = rearrange(patches, "one d h w -> one (h w) d")  # (1, N', D)
    return torch.cat([head, patches], dim=1)


def check_weights(weights, wanted, extra):
    """Raises ValueError that names what `weights` lack of `wanted`, other shapes, or what is `extra`."""
    lacking = [name for name in wanted if name not in weights]
    shapes = [f"{name} ({list(weights[name].shape)}, not {list(tensor.shape)})" for name, tensor
              in wanted.items() if name in weights and weights[name].shape != tensor.shape]
    for fault, names in (("lack", lacking), ("have another shape in", shapes),
                         ("hold what the model does not compute,", extra)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"these weights {fault} {', '.join(names[:3])}{more}")


def report(path, form, vit, grid, ignored, assumed):
    """Prints in three lines what was done with a file."""
    config, (height, width), (P, Q) = vit.config, vit.img_size, vit.patch_size
    print(f"loaded   {path}: all {len(vit.state_dict())} tensors of the encoder ({form} names), width "
          f"{config['embed_dim']}, depth {config['depth']}, {config['num_heads']} heads"
          f"{' (assumed)' if assumed else ''}, image {height} x {width}, patch {P} x {Q}")
    resized = f"position table, from {grid[0]} x {grid[1]} to {vit.grid[0]} x {vit.grid[1]} patches"
    print(f"new      {resized if grid != vit.grid else 'nothing'}")
    counts = Counter(key.split(".")[0] for key in ignored)
    print(f"ignored  {', '.join(f'{name} ({count})' for name, count in counts.items()) or 'nothing'}")


# ---- for other projects --------------------------------------------------------------------------

def export(vit, path, form="timm", **info):
    """Writes a `common.ViT` for other projects. "timm": a safetensors file with the keys of timm's
    VisionTransformer (num_classes=0), like a run's encoder.safetensors; `info` is added to its metadata.
    "hf": a folder with model.safetensors and config.json, for which the last_hidden_state of
    transformers.ViTModel.from_pretrained(path, add_pooling_layer=False) is what `vit` returns."""
    if form == "timm":
        return common.save_encoder(vit, path, **info)
    if form != "hf":
        raise ValueError(f"form is 'timm' or 'hf', not {form!r}")
    if vit.cls_token is None:
        raise ValueError("ViTModel always has a class token and this encoder has none: use form='timm'")
    (height, width), (P, Q), tensors = vit.img_size, vit.patch_size, to_hf(vit)
    config = json.dumps(dict(
        model_type="vit", architectures=["ViTModel"], num_channels=vit.config["in_chans"],
        image_size=height if height == width else [height, width], patch_size=P if P == Q else [P, Q],
        hidden_size=vit.config["embed_dim"], intermediate_size=vit.blocks[0].mlp.fc1.out_features,
        num_hidden_layers=vit.config["depth"], num_attention_heads=vit.config["num_heads"],
        hidden_act="gelu", layer_norm_eps=vit.norm.eps, qkv_bias=True), indent=2)
    common.write_atomically(Path(path, "model.safetensors"),
                            lambda file: file.write_bytes(save(tensors, {"format": "pt"})))
    common.write_atomically(Path(path, "config.json"), lambda file: file.write_text(config))


HF_NAMES = (("cls_token", "embeddings.cls_token"), ("pos_embed", "embeddings.position_embeddings"),
            ("patch_embed.proj.", "embeddings.patch_embeddings.projection."), ("blocks.", "encoder.layer."),
            ("norm1.", "layernorm_before."), ("norm2.", "layernorm_after."), ("norm.", "layernorm."),
            ("attn.proj.", "attention.output.dense."), ("attn.", "attention.attention."),
            ("mlp.fc1.", "intermediate.dense."), ("mlp.fc2.", "output.dense."))


def to_hf(vit):
    """The weights of a ViT under ViTModel's names: {name: tensor}. It has no layer scale: the gains go into
    the linear layers before them, gamma * (W x + b) = (gamma W) x + gamma b."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in vit.state_dict().items()}
    for name in [name for name in state if name.endswith(".gamma")]:
        layer = name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        gamma = state.pop(name)
        state[f"{layer}.weight"] *= gamma[:, None]
        state[f"{layer}.bias"] *= gamma
    for name in [name for name in state if ".qkv." in name]:
        for part, rows in zip(("query", "key", "value"), state.pop(name).chunk(3)):
            state[name.replace("qkv", part)] = rows.clone()  # safetensors takes no views
    return renamed(state, HF_NAMES)


def main(argv=None):
    parser = argparse.ArgumentParser("python -m eval.encoders", allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a checkpoint of a format above, or the folder of a run")
    parser.add_argument("out", help="timm: a new file that ends in .safetensors; hf: a new folder")
    parser.add_argument("--form", choices=["timm", "hf"], default="timm")
    parser.add_argument("--num_heads", "--num-heads", type=int, help="default: of FILE, else the usual")
    parser.add_argument("--img_size", "--img-size", type=int, help="another one resizes the position table")
    given = parser.parse_args(argv)
    if Path(given.out).exists():
        raise ValueError(f"{given.out} exists already: choose another name, nothing is overwritten")
    if given.form == "timm" and not given.out.endswith(".safetensors"):
        raise ValueError(f"{given.out} should end in .safetensors")
    path = find_file(given.file)
    sizes, method = dict(num_heads=given.num_heads, img_size=given.img_size), read_state(path)[2]
    vit = load_encoder(path, **{name: size for name, size in sizes.items() if size})
    export(vit, given.out, given.form, **({"method": method} if method else {}))
    print(f"wrote    {given.out}")


if __name__ == "__main__":
    common.run_main(main)
