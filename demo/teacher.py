"""The tool that trained demo/tiny_clip.safetensors, a CLIP for the scenes of demo/scenes.py.

CAE v2 learns from CLIP. The real one is a download of some 600 MB and work for a GPU; this one is
in the repository, is loaded by the same open_clip code, and is quick enough on a CPU.

    tiny_clip.json    the architecture, in open_clip's own format
    stage 1           masked pixels (MAE, arXiv 2111.06377): the image tower alone, no words
    stage 2           CLIP (arXiv 2103.00020): images against captions

Stage 1 is no luxury. Stage 2 alone first learns what lowers the loss soonest, the colours and skies
that captions name, and is slow to find the shapes.

    python -m demo.teacher        about twelve minutes on one core: demo/README.md

All is drawn from SEED and runs a fixed number of steps: a second run on the same machine gives the
same weights. The result is written at the very end, so a run that is killed changes nothing.

B batch, N patches, V visible, M masked, D width, P patch side, E embedding, L words.
"""

import json
import math
import os
import time
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from demo.scenes import CLASSES, GROUNDS, PAINTS, SEEDS, SKIES, Scenes, make_scenes

HERE = Path(__file__).parent
SEED = 0
NUM_SCENES = 50_000

# Stage 1: ratio, betas and decay are MAE's; the target is plain pixels; the rest suits the size.
MASK_RATIO, DECODER_WIDTH = .75, 64
PIXELS = {"steps": 2500, "batch": 64, "lr": 2e-3, "betas": (.9, .95), "decay": .05}

# Stage 2: betas are CLIP's for its ViTs. The batch is small, since at this size the number of
# steps matters more than the number of images.
CLIP = {"steps": 900, "batch": 64, "lr": 1e-3, "betas": (.9, .98), "decay": .1}

CONTEXT = 14
# open_clip pools a text at its largest id: the end token comes last.
WORDS = ("<pad>", "<start>", "a", "an", "on", "under", "sky",
         *CLASSES, *PAINTS, *SKIES, *GROUNDS, "<end>")


def tokenize(captions: list[str]) -> Tensor:
    """Word ids, padded: n captions -> (n, 14) int64.

    Raises ValueError for a word that no caption of demo/scenes.py has, or more than 12 words.
    """
    rows = torch.zeros(len(captions), CONTEXT, dtype=torch.long)  # (B, L)
    for row, caption in zip(rows, captions):
        words = ["<start>", *caption.split(), "<end>"]
        if len(words) > CONTEXT:
            raise ValueError(f"more than {CONTEXT - 2} words: {caption!r}")
        if unknown := [word for word in words if word not in WORDS]:
            raise ValueError(f"the vocabulary of the scenes lacks {unknown[0]!r}")
        row[:len(words)] = torch.tensor([WORDS.index(word) for word in words])
    return rows


def normalise(images: Tensor, tower: nn.Module) -> Tensor:
    """Pixels as open_clip's towers take them: (B, 3, H, W) uint8 -> float32, OpenAI's mean, std."""
    mean, std = (torch.tensor(tower.preprocess_cfg[key])[:, None, None] for key in ("mean", "std"))
    return (images / 255 - mean) / std


class MaskedPixels(nn.Module):
    """MAE around a CLIP image tower: it sees a quarter of the patches, a decoder adds the rest."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower, self.patch = tower, tower.patch_size[0]
        positions, width = tower.positional_embedding.shape
        self.embed = nn.Linear(width, DECODER_WIDTH)
        self.mask_token = nn.Parameter(torch.zeros(DECODER_WIDTH))
        self.positions = nn.Parameter(.02 * torch.randn(positions, DECODER_WIDTH))
        self.block = nn.TransformerEncoderLayer(
            DECODER_WIDTH, nhead=2, dim_feedforward=4 * DECODER_WIDTH, dropout=0.,
            activation="gelu", batch_first=True, norm_first=True)
        self.head = nn.Sequential(nn.LayerNorm(DECODER_WIDTH),
                                  nn.Linear(DECODER_WIDTH, 3 * self.patch**2))

    def forward(self, images: Tensor) -> Tensor:
        """Mean squared error on the hidden patches of normalised images (B, 3, H, W)."""
        x = rearrange(self.tower.conv1(images), "b d h w -> b (h w) d")  # (B, N, D)
        x = x + self.tower.positional_embedding[1:]
        batch, num_patches, _ = x.shape
        order = torch.rand(batch, num_patches).argsort(dim=1)  # (B, N)
        visible_ids = order[:, :round(num_patches * (1 - MASK_RATIO)), None]  # (B, V, 1)

        x = x.take_along_dim(visible_ids, dim=1)  # (B, V, D)
        first = self.tower.class_embedding + self.tower.positional_embedding[0]
        x = torch.cat([first.expand(batch, 1, -1), x], dim=1)  # (B, 1+V, D)
        x = self.embed(self.tower.ln_post(self.tower.transformer(x)))  # (B, 1+V, 64)

        # Back in their places; the hidden ones are the mask token. The class token leads.
        canvas = self.mask_token.expand(batch, num_patches, -1)  # (B, N, 64)
        canvas = canvas.scatter(1, visible_ids.expand(-1, -1, DECODER_WIDTH), x[:, 1:])
        canvas = torch.cat([x[:, :1], canvas], dim=1) + self.positions  # (B, 1+N, 64)
        pixels = self.head(self.block(canvas))[:, 1:]  # (B, N, P*P*3)

        target = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)
        hidden_ids = order[:, visible_ids.shape[1]:, None]  # (B, M, 1)
        return F.mse_loss(*(x.take_along_dim(hidden_ids, 1) for x in (pixels, target)))


def clip_loss(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    """CLIP's two-sided cross-entropy; a pair with the same caption is no negative."""
    image, text, scale = model(images, tokens)  # (B, E), (B, E), ()
    # CLIP's limit on the temperature: logits to 100.
    logits = scale.clamp(max=100) * image @ text.T  # (B, B)
    same = (tokens[:, None] == tokens).all(dim=2) & ~torch.eye(len(tokens), dtype=torch.bool)
    logits = logits.masked_fill(same, -torch.inf)
    diagonal = torch.arange(len(tokens))
    return (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2


def train(stage, module, loss_of, log, steps, batch, lr, betas, decay) -> None:
    """AdamW with 5 % warm-up, then a cosine; `loss_of` maps scene ids (B,) to a loss.

    Appends a line to `log` every 100 steps.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    # Matrices decay, biases, norms and the temperature do not.
    optimiser = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
         {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.}], betas=betas)
    start = time.time()
    for step in (bar := tqdm(range(steps), desc=stage)):
        ramp, left = (step + 1) / (.05 * steps), .5 + .5 * math.cos(math.pi * step / steps)
        for group in optimiser.param_groups:
            group["lr"] = lr * min(ramp, left)
        loss = loss_of(torch.randint(NUM_SCENES, (batch,)))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.)
        optimiser.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            log.append({"stage": stage, "step": step + 1, "loss": round(loss.item(), 4),
                        "seconds": round(time.time() - start, 1)})
            bar.set_postfix(loss=log[-1]["loss"])


@torch.no_grad()
def zero_shot(model: nn.Module, scenes: Scenes) -> float:
    """Share of scenes whose image lies nearest to the words of its class, "a house" and so on."""
    texts = model.encode_text(tokenize([f"a {name}" for name in CLASSES]), normalize=True)
    parts = normalise(scenes.images, model.visual).split(250)
    guess = torch.cat([model.encode_image(part) @ texts.T for part in parts]).argmax(1)  # (n,)
    return (guess == scenes.labels).float().mean().item()


@torch.no_grad()
def mean_tokens(tower: nn.Module, images: Tensor) -> Tensor:
    """The mean patch token after the last norm, before the projection: (n, 3, H, W) -> (n, D)."""
    tower.output_tokens = True
    tokens = [tower(part)[1].mean(dim=1) for part in normalise(images, tower).split(250)]
    tower.output_tokens = False
    return torch.cat(tokens)  # (n, D)


def ridge(x: Tensor, test_x: Tensor, labels: Tensor, test_labels: Tensor) -> float:
    """Test accuracy of a ridge regression from standardised features (n, D) to one-hot classes.

    The weight of the penalty is 1e-2 of the features' own variance. There is one solution and no
    schedule: where two encoders differ here, it is the encoders that differ.
    """
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, test_x = (x - mean) / std, (test_x - mean) / std
    y = F.one_hot(labels, len(CLASSES)).float()  # (n, 10)
    gram = x.T @ x / len(x) + 1e-2 * torch.eye(x.shape[1])  # (D, D)
    weight = torch.linalg.solve(gram, x.T @ (y - y.mean(0)) / len(x))  # (D, 10)
    guess = (test_x @ weight + y.mean(0)).argmax(1)
    return (guess == test_labels).float().mean().item()


def probe(tower: nn.Module) -> float:
    """Ridge probe of the mean patch tokens: 3,000 scenes to fit, 1,500 others to test."""
    fit, test = make_scenes(3000, seed=SEEDS["train"]), make_scenes(1500, seed=SEEDS["val"])
    return ridge(mean_tokens(tower, fit.images), mean_tokens(tower, test.images),
                 fit.labels, test.labels)


def write(path: Path, save) -> None:
    """Let `save` write a file beside `path`, then rename: `path` is old or new, never half."""
    beside = path.with_name(path.name + ".part")
    save(beside)
    os.replace(beside, path)


def main() -> None:
    """Train the teacher, score it, write its weights and its log."""
    import open_clip
    torch.manual_seed(SEED)
    open_clip.add_model_config(HERE / "tiny_clip.json")
    model = open_clip.create_model("tiny_clip")
    scenes = make_scenes(NUM_SCENES, seed=SEEDS["teacher"])
    tokens, log, start = tokenize(scenes.captions), [], time.time()
    log.append({"stage": "start", "seed": SEED, "probe": round(probe(model.visual), 4)})

    def images(ids):
        return normalise(scenes.images[ids], model.visual)

    pixels = MaskedPixels(model.visual)
    train("pixels", pixels, lambda ids: pixels(images(ids)), log, **PIXELS)
    log.append({"stage": "pixels", "probe": round(probe(model.visual), 4)})
    train("clip", model, lambda ids: clip_loss(model, images(ids), tokens[ids]), log, **CLIP)

    # Scored as it is stored: rounded to half precision.
    model = model.half().float().eval()
    val = make_scenes(3000, seed=SEEDS["val"])
    log.append({"stage": "end", "probe": round(probe(model.visual), 4),
                "zero_shot": round(zero_shot(model, val), 4),
                "seconds": round(time.time() - start), "cpu_seconds": round(time.process_time()),
                "threads": torch.get_num_threads()})
    # All but the image positions in half precision: open_clip resizes those for other image sizes
    # in the precision of the file, and on a CPU half is not enough for that.
    weights = {name: value if name == "visual.positional_embedding" else value.half()
               for name, value in model.state_dict().items()}
    write(HERE / "tiny_clip.safetensors", lambda path: save_file(weights, path))
    write(HERE / "tiny_clip.log.jsonl", lambda path: path.write_text(
        "".join(json.dumps(line) + "\n" for line in log)))
    print(log[-1])


if __name__ == "__main__":
    main()
