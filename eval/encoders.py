"""Reads the encoder of a checkpoint, whoever wrote it, and writes an encoder for other projects.

    python -m eval.encoders FILE OUT.safetensors     converts to timm's names, which --init reads
    python -m eval.encoders FILE OUT --form hf       converts to a folder for transformers.ViTModel

    FILE, or the folder it is in          recognised by                      what is done
    our encoder.safetensors, timm, MAE    patch_embed.proj.weight            nothing: these are ViT's names
    official CAE v2                       blocks.0.attn.q_bias               `LAYER_SCALE`, `fused_biases`
    official Beyond Masking               the same, and no pos_embed         `fused_biases`, 1-D sinusoid
    mmpretrain                            patch_embed.projection.weight      `MMPRETRAIN`
    transformers: ViT, ViTMAE             embeddings.patch_embeddings. ...   `HF_NAMES`, `joined_qkv`

A new format needs a few more lines in `to_timm`: everything after it knows timm's names only. The encoder
may lie at any depth and under any prefix: its patch embedding tells where. Sizes are inferred from shapes.
What weights do not show, such as heads, mean and std, comes from the file, from config.json and
preprocessor_config.json beside it, or from the caller; otherwise it is assumed and said, or demanded.
The position table is that of the file, as two orders of the sin-cos table are in use; for another image
size it is resized, but the 1-D sinusoid of Beyond Masking is computed again: its fast channels pass through
more than a full period per row of patches, so interpolation makes no sense there.
A missing part is an error, and so is one that ViT does not have: the features would be plausible and wrong.
Only what is known to be no part of an encoder (`OTHERS`) is ignored, and said.
Dimension key: D width, P x Q size of a patch, N patches, h x w grid of them; N', h', w' after a resize."""

import argparse
import json
import math
import re
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save

if not __package__:  # started by its file name, Python does not find common.py
    raise SystemExit("error: start it in the folder of common.py as `python -m eval.encoders`")
import common

# Where an encoder lies: before these names.
KERNELS = ("patch_embed.proj.weight", "patch_embed.projection.weight",
           "embeddings.patch_embeddings.projection.weight")
# How the names of a ViT begin.
OWN = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
# How names begin that are no part of it: heads, decoders, mask tokens, other copies, optimisers.
OTHERS = re.compile(
    "head|classifier|fc|pre_logits|pooler|attn_pool|neck|decode|mask_|regress|rd_pos|encoder_to_|projector|"
    "proj_layers|proj_weights|predictor|prototypes|queue|dino_|ibot_|loss|criterion|logit_|text|auxiliary_|"
    "rpn|roi_|bbox_|teacher|student|target_|momentum_|.*ema$|n_averaged|optim|scaler|.*scheduler|callbacks")
AVERAGED = re.compile(r"(^|[._])ema([._]|$)")  # where an averaged copy lies
# What parts are that ViT does not compute.
PARTS = {"reg": "register tokens", "storage": "register tokens", "dist": "a distillation token",
         "pre": "a norm before the blocks", "rope": "rotary positions", "rel": "relative positions",
         "q_norm|k_norm": "norms of queries and keys"}


def load_encoder(path, own_norm=False, key="", **override):
    """The encoder of a checkpoint as a `common.ViT`: float32, on the CPU, in training mode.
    `path` is a file or a folder; `key` names the weights of a file that holds several encoders. `override`
    replaces arguments of ViT: with another `img_size` the position table is resized (bicubic, without the
    class token's row); `in_chans=3` makes an encoder of grey images accept RGB; `num_heads`, `norm_eps`,
    `mean` and `std`, which no weight shows, and `drop_path_rate` are free; others must agree with the file.
    A fine-tuned file without the final norm is taken with `own_norm` only, for callers that do not use it.
    `vit.assumed` lists what nobody said. Prints what was loaded. Raises FileNotFoundError or ValueError."""
    path = find_file(path)
    state, outside, known, _ = read_state(path, key)
    try:
        form, weights = to_timm(state)
        dim = weights["patch_embed.proj.weight"].shape[0]
        known = beside(path, dim) | known
        assumed = [name for name in ("num_heads", "mean") if name not in known | override]
        if "norm.weight" not in weights and "fc_norm.weight" in weights:
            if not own_norm:
                raise ValueError("this is a fine-tuned classifier: its norm (fc_norm) comes after the mean "
                                 "of the tokens, and the encoder has none at its end, as is needed here; "
                                 "eval.segment --head upernet, eval.detect and eval.finetune --pool mean "
                                 "--fc_norm fresh can do without")
            weights |= {"norm.weight": torch.ones(dim), "norm.bias": torch.zeros(dim)}
            assumed.append("norm")
        config, grid = infer_config(form, weights, known, override)
        with torch.device("meta"):  # no time and no random numbers for values that the file replaces
            vit = common.ViT(**config)
        wanted = vit.state_dict()
        weights["pos_embed"] = fit_positions(weights["pos_embed"], grid, vit)
        kernel = weights["patch_embed.proj.weight"]
        if (kernel.shape[1], vit.config["in_chans"]) == (1, 3):  # a third per colour: grey stays grey
            weights["patch_embed.proj.weight"] = kernel.expand(-1, 3, -1, -1) / 3  # (D, 3, P, Q)
        elif kernel.shape[1] != vit.config["in_chans"]:
            raise ValueError(f"its images have {kernel.shape[1]} channels, and here they have "
                             f"{vit.config['in_chans']} (patch_embed.proj.weight is {list(kernel.shape)})")
        ignored = [name for name in weights if name not in wanted]
        check_weights(weights, wanted, extra=[name for name in ignored if not OTHERS.match(name)])
        if not all(weights[name].is_floating_point() for name in wanted) \
                or not common.all_finite(weights[name] for name in wanted):
            raise ValueError("its weights hold numbers that are not finite, or no floating-point numbers")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    # Copied, not assigned: half precision becomes float32, and no two parameters share memory.
    vit.to_empty(device="cpu").load_state_dict({name: weights[name] for name in wanted})
    vit.assumed = assumed
    report(path, form, vit, grid, outside + ignored)
    return vit


def find_file(path):
    """The file `path`, or the checkpoint in the folder `path`. Raises FileNotFoundError."""
    path = Path(path).expanduser()
    for name in ("", "encoder.safetensors", "last.pt", "model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"no checkpoint at {path}, and neither encoder.safetensors nor last.pt, "
                            "model.safetensors or pytorch_model.bin in it")


def read_state(path, key=""):
    """A file as ({name: tensor} of the encoder and its head, words for everything else, what the file says
    of its encoder that shapes do not show, the method that trained it or None). Raises ValueError as
    `find_encoder` does, and for a part beside the encoder that is not known to be another."""
    content = about = common.read_checkpoint(path)
    if path.suffix == ".safetensors":
        about = common.read_about(path)
    flat, ours = dict(flatten(content)), "kind" in about
    try:
        root, roots = find_encoder(flat, key)
        state = {name.removeprefix(root): value for name, value in flat.items() if name.startswith(root)}
        others = {name: next_word(name, root) for name in flat if not name.startswith(root)}
        copies = {next_word(other, root) for other in roots}
        odd = [name for name, word in others.items() if not OTHERS.match(word) and word not in copies]
        if odd and not key and not ours:
            raise ValueError(f"{odd[0]} is not known as a head, a decoder or another copy: if it is no "
                             f"part of the encoder, give --key {root.rstrip('.')}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    known = next((about[name] for name in ("encoder", "config") if isinstance(about.get(name), dict)), {})
    names = ("num_heads", "img_size", "init_values", "norm_eps", "mean", "std")
    known = {name: known[name] for name in names if known.get(name)}
    if ours:  # older files do not say it
        known = dict(mean=common.IMAGENET_MEAN, std=common.IMAGENET_STD) | known
    return state, [*others.values()], known, about.get("method")


def flatten(content, path=""):
    """Yields (name, tensor) of nested dicts, without the prefixes of DDP and torch.compile."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{path}{key}.")
        elif isinstance(value, torch.Tensor):
            yield re.sub(r"(^|(?<=\.))(module|_orig_mod)\.", "", path + str(key)), value


def find_encoder(flat, key):
    """(prefix of the encoder among the names, all prefixes of encoders). Raises ValueError unless there is
    one, or one that `key` names; of raw weights and an averaged copy, the raw ones are taken."""
    roots = [name.removesuffix(kernel) for name in flat for kernel in KERNELS
             if f".{name}".endswith(f".{kernel}")]
    named = [root for root in roots if not key or root.startswith(f"{key}.")]
    raw = [root for root in named if not AVERAGED.search(root.rstrip("."))] if not key else named
    chosen = [root for root in raw or named if root == ""] or raw or named
    if len(chosen) != 1 and (key or chosen):
        found = ", ".join(root.rstrip(".") or "no key" for root in roots) or "no key"
        raise ValueError(f"it has weights of encoders under {found}: give one of them, as --key NAME"
                         + f", not '{key}'" * bool(key))
    return chosen[0] if chosen else "", roots


def next_word(name, root):
    """The word of `name` at which it parts from the prefix `root`."""
    pairs = zip(name.split("."), [*root.split("."), ""])
    return next((word for word, own in pairs if word != own), name)


def beside(path, dim):
    """What config.json and preprocessor_config.json beside a file say of an encoder of this width, as
    arguments of ViT: transformers' and timm's are known. Raises ValueError for an activation but GELU."""
    known, found = {}, {}
    for name in ("config.json", "preprocessor_config.json"):
        file = path.with_name(name)
        try:
            content = json.loads(file.read_bytes()) if file.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        found[name] = content if isinstance(content, dict) else {}
    config, images = found["config.json"], found["preprocessor_config.json"]
    if config.get("hidden_size") == dim:
        if config.get("hidden_act", "gelu") != "gelu":
            raise ValueError(f"its config.json says hidden_act {config['hidden_act']}; ViT computes gelu")
        names = dict(num_heads="num_attention_heads", img_size="image_size", norm_eps="layer_norm_eps")
        known = {ours: config[theirs] for ours, theirs in names.items() if config.get(theirs)}
        if isinstance(images.get("image_mean"), list):
            known |= dict(mean=images["image_mean"], std=images["image_std"])
    timm = config.get("pretrained_cfg")
    if isinstance(timm, dict) and config.get("num_features", dim) == dim and "mean" in timm:
        known |= dict(mean=timm["mean"], std=timm["std"])
    return known


# ---- formats -------------------------------------------------------------------------------------
# Parts of others' names and ours for them, replaced in this order.
MMPRETRAIN = (("backbone.ln1.", "norm."), ("backbone.ln2.", "fc_norm."), ("backbone.layers.", "blocks."),
              ("backbone.", ""), ("patch_embed.projection.", "patch_embed.proj."), (".ln1.", ".norm1."),
              (".ln2.", ".norm2."), (".ffn.layers.0.0.", ".mlp.fc1."), (".ffn.layers.1.", ".mlp.fc2."))
LAYER_SCALE = ((".gamma_1", ".ls1.gamma"), (".gamma_2", ".ls2.gamma"))
HF_NAMES = (("embeddings.cls_token", "cls_token"), ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.mask_token", "mask_token"),
            ("embeddings.patch_embeddings.projection.", "patch_embed.proj."), ("encoder.layer.", "blocks."),
            ("layernorm_before.", "norm1."), ("layernorm_after.", "norm2."), ("layernorm.", "norm."),
            ("attention.output.dense.", "attn.proj."), ("attention.attention.", "attn."),
            ("intermediate.dense.", "mlp.fc1."), ("output.dense.", "mlp.fc2."))


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


def joined_qkv(state):
    """A state dict in which query, key and value of a block are one layer, of q, k and v in this order."""
    joined = dict(state)
    for name in state:
        names = [name.replace("query", part) for part in ("query", "key", "value")]
        if ".attn.query." in name and set(names) <= state.keys():
            joined[name.replace("query", "qkv")] = torch.cat([joined.pop(part) for part in names])
    return joined


def to_timm(state):
    """The weights of an encoder and its head in a known format as (its name, {timm's name: tensor})."""
    form, weights = "timm", state
    if KERNELS[1] in state:
        state = {f"backbone.{name}": value for name, value in state.items()}
        form, weights = "mmpretrain", renamed(state, MMPRETRAIN)
    elif KERNELS[2] in state:
        form, weights = "transformers", joined_qkv(renamed(state, HF_NAMES))
    elif "blocks.0.attn.q_bias" in state:
        width = len(state["blocks.0.attn.q_bias"])
        form, weights = "CAE v2", fused_biases(renamed(state, LAYER_SCALE))
        if "pos_embed" not in weights and "blocks.0.ls1.gamma" not in weights:
            form, weights["pos_embed"] = "Beyond Masking", common.sinusoid_1d(width, 14 * 14)[None]
            weights.pop("cls_token", None)  # in some of these files, but never used
    # All sizes are read from these three tensors.
    for key, ndim in {"patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2, "pos_embed": 3}.items():
        if key not in weights or weights[key].ndim != ndim:
            raise ValueError(f"this is no vision transformer in a known format: {len(state)} tensors "
                             f"({', '.join(list(state)[:3])} ...), but no {key} with {ndim} dimensions")
    # Before anything is inferred: a second special token would only make a table of no square grid.
    check_weights({}, {}, [name for name in weights if not name.startswith(OWN) and not OTHERS.match(name)])
    return form, dict(weights)


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
    config |= {name: known[name] for name in ("norm_eps", "mean", "std") if name in known} | override
    config["num_heads"] = config["num_heads"] or assumed_heads(form, dim)
    if min(config["num_heads"], *common.pair(config["img_size"])) < 1:
        raise ValueError(f"{config['num_heads']} heads, image size {config['img_size']}: below 1")
    return config, grid


def assumed_heads(form, dim):
    """Heads of a file that does not say how many: 64 channels each, or as in the models of this width."""
    if form == "CAE v2" and dim in (192, 384):
        return 12  # not 3 and 6 as in timm: with these the file would load, and the features be wrong
    if dim in (1152, 1280, 1408, 1536, 1664):
        return 16  # SigLIP so400m, ViT-H, ViT-g, SigLIP giantopt, ViT-G
    if dim % 64 or dim > 1024:
        raise ValueError(f"heads cannot be inferred from a width of {dim}: give num_heads= (--num_heads)")
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
            what = next((f" ({what})" for part, what in PARTS.items() if names is extra
                         and re.search(rf"(^|[._]){part}", names[0])), "")
            raise ValueError(f"these weights {fault} {', '.join(names[:3])}{more}{what}")


def report(path, form, vit, grid, ignored):
    """Prints in three lines what was done with a file."""
    config, (height, width), (P, Q) = vit.config, vit.img_size, vit.patch_size
    print(f"loaded   {path}: all {len(vit.state_dict())} tensors of the encoder ({form} names), width "
          f"{config['embed_dim']}, depth {config['depth']}, {config['num_heads']} heads"
          f"{' (assumed)' * ('num_heads' in vit.assumed)}, image {height} x {width}, patch {P} x {Q}, mean "
          f"{config['mean']}, std {config['std']}{' (assumed)' * ('mean' in vit.assumed)}")
    resized = f"position table, from {grid[0]} x {grid[1]} to {vit.grid[0]} x {vit.grid[1]} patches"
    new = [resized] * (grid != vit.grid) + ["final norm"] * ("norm" in vit.assumed)
    print(f"new      {', '.join(new) or 'nothing'}")
    counts = Counter(key.split(".")[0] for key in ignored)
    averaged = [f"; --key {name} takes averaged weights" for name in counts if AVERAGED.search(name)][:1]
    words = ", ".join(f"{name} ({count})" for name, count in counts.items()) or "nothing"
    print("".join([f"ignored  {words}", *averaged]))


# ---- for other projects --------------------------------------------------------------------------
def export(vit, path, form="timm", **info):
    """Writes a `common.ViT` for other projects. "timm": a safetensors file with the keys of timm's
    VisionTransformer (num_classes=0), like a run's encoder.safetensors; `info` is added to its metadata.
    "hf": a folder with weights, config.json, preprocessor_config.json, for which the last_hidden_state of
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
    images = json.dumps(dict(image_processor_type="ViTImageProcessor", do_normalize=True, resample=3,
                             image_mean=vit.config["mean"], image_std=vit.config["std"],
                             size=dict(height=height, width=width)), indent=2)
    common.write_atomically(Path(path, "preprocessor_config.json"), lambda file: file.write_text(images))
    common.write_atomically(Path(path, "config.json"), lambda file: file.write_text(config))


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
    return renamed(state, [(ours, theirs) for theirs, ours in HF_NAMES])


def main(argv=None):
    parser = argparse.ArgumentParser("python -m eval.encoders", allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a checkpoint of a format above, or the folder of a run")
    parser.add_argument("out", help="timm: a new file that ends in .safetensors; hf: a new folder")
    parser.add_argument("--form", choices=["timm", "hf"], default="timm")
    parser.add_argument("--num_heads", "--num-heads", type=int, help="default: of FILE, else the usual")
    parser.add_argument("--key", default="", help="which weights of a file that holds several, as teacher")
    parser.add_argument("--img_size", "--img-size", type=int, help="another one resizes the position table")
    given = parser.parse_args(argv)
    if Path(given.out).exists():
        raise ValueError(f"{given.out} exists already: choose another name, nothing is overwritten")
    if given.form == "timm" and not given.out.endswith(".safetensors"):
        raise ValueError(f"{given.out} should end in .safetensors")
    path = find_file(given.file)
    flags = {name: size for name in ("num_heads", "img_size") if (size := getattr(given, name))}
    method = read_state(path, given.key)[-1]
    vit = load_encoder(path, key=given.key, **flags)
    export(vit, given.out, given.form, **({"method": method} if method else {}))
    print(f"wrote    {given.out}")


if __name__ == "__main__":
    common.run_main(main)
