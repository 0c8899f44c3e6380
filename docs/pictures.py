"""What the pages of docs/build.py show of a run: shapes and pictures, both from the methods' own forward pass.

Each method runs its demo configuration, seeded and untrained, on the first two images of its preview. Pictures are what
its own functions gave. Only predictions after training come from results/reference/, as trained weights are not in the
repository.
"""

import base64
import html
import io
import re
import sys
from unittest import mock

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import common
from docs.shapes import ROOT

# -- what runs
def execute(module, flags, trace):
    """Runs a method on two images: (sizes, what its functions gave: {name: local variables}, preview panels)."""
    config = common.parse_config(module.Config, "", module.SIZES, module.DEMO, ["--demo", *flags.split()],
                                 module.DEPENDS)
    side = max(getattr(module, "clean_size", lambda task, size: (size,))(getattr(config, "task", ""), config.img_size))
    images, sizes, seen, panels = common.find_data(config.data, img_size=max(side, config.img_size)), {}, {}, []
    teacher = [module.load_teacher(config.teacher, config.img_size)] if hasattr(module, "load_teacher") else []
    size, N = module.SIZES[config.model], config.num_patches
    sizes = dict(N=N, V=N - config.num_masked, M=config.num_masked, D=size["embed_dim"], P=config.patch_size)
    sizes |= dict(R=size["regressor_dim"], C=teacher[0].output_dim) if teacher else dict(E=size["decoder_dim"])
    sizes |= dict(S=config.img_size, R=side) if hasattr(module, "clean_size") else {}

    def note(frame, event, value):
        if event == "return" and frame.f_code.co_filename == module.__file__:
            owner = frame.f_locals.get("self")
            name = (f"{type(owner).__name__}." if owner is not None else "") + frame.f_code.co_name
            seen.setdefault(name, {**frame.f_locals, "return": value})

    def run(argv):
        samples = common.Samples(images, module.Augment(config, *(config.img_size for _ in teacher)), config.seed)
        batch = first_two(common.preview_batch(samples))
        model = module.build(config, *(tower.output_dim for tower in teacher)).eval()
        with torch.no_grad():
            if teacher:
                student, teacher_images, mask = module.inputs(batch, *teacher, "cpu")
                model(student, mask, module.clip_targets(*teacher, teacher_images), config.supervise)
            else:
                model(*module.inputs(batch, "cpu"))
            if hasattr(module, "rgb_encoder"):
                module.rgb_encoder(model.encoder)
        with mock.patch.object(common, "save_panels", lambda path, rows, *rest: panels.extend(rows)):
            module.preview("", config, model, *teacher, batch, torch.device("cpu"))

    sys.setprofile(note)
    try:
        trace.run(run, own=module.__file__, **sizes)
    finally:
        sys.setprofile(None)
    return sizes, seen, [list(column) for column in zip(*panels)]


def first_two(batch):
    """The first two samples of a batch, which is a tensor or holds tensors."""
    if isinstance(batch, torch.Tensor):
        return batch[:2]
    return {k: first_two(x) for k, x in batch.items()} if isinstance(batch, dict) else [first_two(x) for x in batch]


def spell(shapes):
    """A shape, or a list of shapes, as text."""
    if not isinstance(shapes, list):
        return str(shapes)
    return f"{len(shapes)} × {shapes[0]}" if len({*shapes}) == 1 < len(shapes) - 1 else ", ".join(map(str, shapes))


# -- pictures
def data_uri(image, levels=32):
    """A picture (3, H, W) of 0..1 as PNG. With few levels the rounding of another machine shows nowhere."""
    pixels = (image.clamp(0, 1) * (levels - 1)).round() * 255 / (levels - 1)
    file = io.BytesIO()
    Image.fromarray(rearrange(pixels.round().byte(), "c h w -> h w c").numpy()).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def figure(images, caption, levels=32):
    pictures = "".join(f'<img src="{data_uri(x, levels)}" alt="{html.escape(re.sub("<.*?>", "", caption))}">'
                       for x in images)
    return f"<figure><div>{pictures}</div><figcaption>{caption}</figcaption></figure>"


def heat(maps, where=None):
    """Maps (B, H, W) in colours, dark 0 to yellow 1; grey where there is no value."""
    where = torch.ones_like(maps) == 1 if where is None else where
    return [common.colour_map((x * 15).round() / 15).where(there, 0.5) for x, there in zip(maps, where)]


def place(values, ids, count):
    """Values (B, K) of the tokens `ids` as a square map (B, h, w), and where it has values."""
    maps, there = torch.zeros(len(ids), count), torch.zeros(len(ids), count, dtype=torch.bool)
    maps, there = maps.scatter(1, ids, values.float()), there.scatter(1, ids, True)
    return (rearrange(x, "b (h w) -> b h w", h=round(count**0.5)) for x in (maps, there))


def loss_figure(errors, ids, count, what):
    maps, there = place(errors, ids, count)
    return figure(heat(maps / maps.max(), there), f"The loss of each {what}, before training: dark 0, yellow "
                  f"{maps.max():.2g}; grey: no loss.", 16)


def similarity(tokens, ids, count, whose):
    """The cosine of one token with all others, (B, K, D): of the one nearest to the middle."""
    side = round(count**0.5)
    distance = ((ids // side - (side - 1) / 2).square() + (ids % side - (side - 1) / 2).square())
    one = distance.argmin(dim=1, keepdim=True)
    cosine = F.cosine_similarity(tokens, common.gather(tokens, one), dim=-1).clamp(min=0)
    maps = heat(*place(cosine, ids, count))
    for picture, index in zip(maps, ids.gather(1, one)[:, 0].tolist()):
        picture[:, index // side, index % side] = torch.tensor([0.9, 0.1, 0.2])
    return figure(maps, f"How similar {whose} are to that of the red patch: dark 0, yellow 1 (cosine).", 16)


def after_training(name, column, panels, caption, count=2):
    """A column of the reference run's preview, if that run saw the images and masks of our panels: in the size that
    they had before `common.save_panels` enlarged them."""
    path, found = ROOT / f"results/reference/{name}/preview.png", []
    if not path.exists():
        return f"<p class=note>No picture of {caption}: the reference run is not in the repository.</p>"
    for place in (0, 1, column):
        for row, like in enumerate(panels[place][:count]):
            x, y, size = 6 + place * 174, 22 + row * 174, like.shape[:0:-1]
            cut = Image.open(path).convert("RGB").crop((x, y, x + 168, y + 168)).resize(size, Image.NEAREST)
            found.append(TF.to_dtype(TF.pil_to_tensor(cut), torch.float32, scale=True))
    ours = [*panels[0][:count], *panels[1][:count]]
    if max((one.clamp(0, 1) - other).abs().max() for one, other in zip(ours, found)) > 2 / 255:
        return f"<p class=note>No picture of {caption}: the reference run saw other crops or masks than this page.</p>"
    return figure(found[2 * count:], f"{caption[0].upper()}{caption[1:]}.", 256)


def of_mfm_mae(runs):
    (sizes, seen, panels), low = runs[""], runs["--target lowpass"][1]["low_pass"]["return"]
    forward, N = seen["MFMMAE.forward"], sizes["N"]
    wanted = [image.where(there != image, 0.5) for image, there in zip(panels[0], panels[1])]
    return {
        "Augment": figure(panels[0], "The batch of two.", 256) + figure(panels[1], "What the encoder sees.", 256),
        "pixel_target": figure(wanted, "The target: the hidden patches, as pixels (the demo does not normalise).", 256),
        "low_pass": figure(common.unnormalise(low), "The low-pass target of the same images."),
        "MFMMAE.encode": similarity(seen["MFMMAE.encode"]["return"][:, 1:], forward["ids_keep"], N,
                                    "the fused tokens of the visible patches, before training,"),
        "squared_error": loss_figure(seen["squared_error"]["return"], forward["ids_masked"], N, "hidden patch"),
        "preview": after_training("mfm_mae", 3, panels, "the prediction after training (the reference run), among "
                                  "the visible patches")}


def of_beyond_masking(runs):
    (sizes, seen, panels), N = runs[""], runs[""][0]["N"]
    views = {flags.split()[-1]: run[1]["degrade"]["return"] for flags, run in runs.items() if flags[-1:].isalpha()}
    views = {task: figure(common.unnormalise(view.expand(-1, 3, -1, -1)), f"The view in <code>{task}</code>.", 16)
             for task, view in views.items()}
    error = seen["recovery_loss"]["error"].mean(dim=1)
    predict = seen["BeyondMasking.predict"]
    return {
        "degrade": views["blur"] + views["decolor"],
        "center_crop": views["zoom_in"],
        "symmetric_pad": views["zoom_out"],
        "fish_eye": views["distort"],
        "Augment": figure(panels[0], "The batch of two, clean.", 256)
        + figure(panels[1], "What the encoder sees in <code>mask+zoom_in</code>: the centre, 75 % hidden."),
        "pixel_target": figure(panels[2], "The target: all of the clean image, squeezed to the size of the view, here "
                               "before its patches are normalised."),
        "BeyondMasking.predict": similarity(predict["patches"], predict["ids_keep"], N,
                                            "the encoder's tokens of the visible patches, before training,"),
        "recovery_loss": figure(heat(error / error.max()), "The squared error of each pixel of the clean image, before "
                                f"training: dark 0, yellow {error.max():.2g}. The border counts everywhere, the centre "
                                "where the view hides a patch.", 16),
        "preview": after_training("beyond_masking", 3, panels, "the prediction after training (the reference run); "
                                  "each patch has the mean and std of the true one")}


def of_cae_v2(runs):
    (sizes, seen, panels), N = runs[""], runs[""][0]["N"]
    forward, every = seen["CAEv2.forward"], torch.arange(N).expand(2, -1)
    errors = torch.cat([forward["errors"][name] for name in ("visible", "masked")], dim=1)
    ids = torch.cat([forward["ids_keep"], forward["ids_masked"]], dim=1)
    return {
        "Augment": figure(panels[0], "The batch of two.") + figure(panels[1], "What the encoder sees."),
        "clip_targets": similarity(forward["targets"][:, 1:], every, N, "the teacher's tokens"),
        "CAEv2.predict": similarity(seen["CAEv2.predict"]["z"][:, 1:], forward["ids_keep"], N,
                                    "the encoder's tokens of the visible patches, before training,"),
        "cosine_distance": loss_figure(errors, ids, N, "visible and hidden patch"),
        "preview": after_training("cae_v2", 2, panels, "cosine of prediction and target after training (the reference "
                                  "run): dark 0, yellow 1")}


def of_index(runs):
    """One picture of what masked image modelling is: MFM's first image."""
    _, _, panels = runs[""]
    asked = panels[0][0].where(panels[1][0] != panels[0][0], 0.5)
    return ("<div class=pictures>" + figure(panels[0][:1], "An image.", 256)
            + figure(panels[1][:1], "What the network sees.", 256)
            + figure([asked], "What it is asked for.", 256)
            + after_training("mfm_mae", 3, panels, "what it answers after training", 1) + "</div>")
