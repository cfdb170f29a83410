"""Draw the figures of docs/tutorial.md: python docs/figures.py

The diagrams need no model. The figures of shapes need data/shapes and runs/shapes/best.pt from `make demo`, those of
photos a model trained on Flickr8k (--checkpoint). Figures that cannot be drawn are skipped with one line each.
"""

import io
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from nltk.util import ngrams
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.files import atomic_write
from decoding.beam_search import beam_search
from decoding.captions import caption_batch
from decoding.sampling import sample
from decoding.settings import DecodingSettings
from diagrams import (
    ATTENTION,
    GRAY,
    IMAGE,
    INK,
    STATE,
    WORD,
    arrow,
    box,
    canvas,
    draw_decoder,
    draw_overview,
    draw_regions,
    draw_show_and_tell,
    draw_teacher_forcing,
    show_image,
)
from models import Captioner, load_captioner
from preparation.images import load_image, to_square
from preparation.shapes import draw_scene
from preparation.storage import read_captions
from scores.metrics import Meteor, compute_metrics, has_java
from text.cider import CiderD
from text.vocabulary import END
from utils import BaseSettings, Runtime, choose_runtime, run_script
from visualization.pictures import plot_attention

BEAM_SCENE, ATTENTION_SCENE, SAMPLES_SCENE = 5, 77, 75  # indices in the test split: one shape; two shapes on white
PHOTOS = ("camera", "chelsea", "astronaut")  # from scikit-image


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Draw the figures of docs/tutorial.md. Edit a value here or pass it as a flag."""

    output_folder: str = "docs/figures"  # where the figures go
    checkpoint: str = ""  # a model trained on Flickr8k, for the figures of photos; empty: skip them
    shapes_checkpoint: str = "runs/shapes/best.pt"  # a model trained on shapes by make demo
    data_folder: str = "data/shapes"  # the shapes drawn by make demo


# ------------------------------------------------------------------------------------------------ drawing


def save_figure(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Save a figure as a PNG with 256 colors."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    picture = Image.open(buffer).convert("RGB").quantize(256, kmeans=2, dither=Image.Dither.NONE)
    with atomic_write(path) as temporary:
        picture.save(temporary, optimize=True)
    print(f"{path} ({path.stat().st_size / 1000:.0f} KB)")


# ----------------------------------------------------------------------------------- diagrams and a photo


def draw_bleu(candidate: str, references: Sequence[str]) -> Figure:
    """Draw which n-grams of a candidate occur in a reference, and BLEU-4 from their shares."""
    words = candidate.split()
    scores = compute_metrics([[reference.split() for reference in references]], [words])
    figure, axes = canvas(10, 4)
    for i, reference in enumerate(references, start=1):
        axes.text(0.2, 3.95 - 0.3 * i, f"reference {i}:  {reference}", fontsize=10.5, color=GRAY)
    for i, word in enumerate(words):
        axes.text(1.5 + 0.95 * i, 2.8, word, ha="center", va="baseline", fontsize=12, color=INK, weight="bold")
    for n in range(1, 5):
        known = {gram for reference in references for gram in ngrams(reference.split(), n)}
        grams = list(ngrams(words, n))
        y = 2.95 - 0.6 * n
        axes.text(0.2, y, f"n = {n}", va="center", fontsize=10.5, color=INK)
        for i, gram in enumerate(grams):
            lift = 0.13 * (i % n - (n - 1) / 2) if n > 1 else 0
            start, end = 1.5 + 0.95 * i - 0.36, 1.5 + 0.95 * (i + n - 1) + 0.36
            color, line = (WORD, "solid") if gram in known else ("#c9cdd3", (0, (2, 1)))
            axes.plot([start, end], [y - lift] * 2, color=color, linewidth=4, linestyle=line, solid_capstyle="butt")
        hits = sum(gram in known for gram in grams)  # no n-gram of this candidate repeats, so nothing is clipped
        axes.text(8.3, y, f"$p_{n}$ = {hits} / {len(grams)}", va="center", fontsize=11.5, color=INK)
    axes.text(8.3, 2.8, f"BLEU-4 = {scores['bleu_4']:.3f}", va="baseline", fontsize=11.5, color=INK, weight="bold")
    axes.text(0.2, 2.8, "candidate", fontsize=10.5, color=INK)
    return figure


CANDIDATES = {
    "correct, in other words": "an orange cross over a yellow cross",
    "the relation is wrong": "a small orange cross below a large yellow cross",
    "a color is wrong": "a small orange cross above a large green cross",
    "correct, with half of it missing": "a small orange cross",
}


def draw_metrics(picture: np.ndarray, references: list[list[str]], all_references: list[list[list[str]]]) -> Figure:
    """Draw the scores of four captions of a scene under four metrics as bars; without Java, leave out METEOR.

    CIDEr takes its n-gram frequencies from `all_references`, the captions of many scenes.
    """
    reward = CiderD(all_references)
    texts = {i: [" ".join(reference) for reference in references] for i in range(len(CANDIDATES))}
    meteor = [None] * len(CANDIDATES)
    if has_java():  # call it once for all captions: it takes seconds to start
        meteor = Meteor().compute_score(texts, {i: [text] for i, text in enumerate(CANDIDATES.values())})[1]
    names = {"bleu_4": "BLEU-4", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr / 10"}
    colors = (STATE, IMAGE, WORD, ATTENTION)
    figure, axes = canvas(10, 3.9)
    show_image(axes, picture, 0.2, 1.25, 2.2, 2.2)
    axes.text(1.3, 3.62, "scene", ha="center", fontsize=11, weight="bold", color=INK)
    axes.text(1.3, 1.05, "references", ha="center", va="center", fontsize=9.5, weight="bold", color=GRAY)
    for i, reference in enumerate(references):
        axes.text(1.3, 0.86 - 0.18 * i, " ".join(reference), ha="center", va="center", fontsize=6.8, color=GRAY)
    for i, (title, caption) in enumerate(CANDIDATES.items()):
        scores = compute_metrics([references], [caption.split()]) | {"meteor": meteor[i]}
        scores["cider"] = reward(references, [caption.split()])[0] / 10
        bottom = 2.88 - 0.92 * i
        axes.text(3.0, bottom + 0.62, title, fontsize=10.5, weight="bold", color=INK)
        axes.text(3.0, bottom + 0.36, caption, fontsize=9, color=INK)
        shown = {name: score for name in names if (score := scores[name]) is not None}
        for j, (name, score) in enumerate(shown.items()):
            y = bottom + 0.78 - 0.19 * j
            axes.barh(y, 2.0 * score, left=7.35, height=0.15, color=colors[list(names).index(name)])
            axes.text(7.28, y, names[name], ha="right", va="center", fontsize=7.5, color=INK)
            axes.text(7.4 + 2.0 * score, y, f"{score:.2f}", va="center", fontsize=7.5, color=INK)
    return figure


# --------------------------------------------------------------------------- a model trained on shapes


def draw_beam_search(picture: np.ndarray, captioner: Captioner, image: Tensor, beam_size: int = 3) -> Figure:
    """Draw the beams of a search step by step: a search with max_length t returns the beams of step t."""
    regions = captioner.encode(image.unsqueeze(0)).regions
    steps = []  # per step, the beams: pairs of a caption (a tuple of word ids) and its log-probability
    for t in range(1, 12):
        captions, log_probs = beam_search(
            captioner.decoder, regions, DecodingSettings(beam_size=beam_size, max_length=t)
        )
        beams = zip(captions[0].tolist(), log_probs[0].tolist(), strict=True)
        steps.append([(tuple(caption), log_prob) for caption, log_prob in beams])
        if bool((captions == END).any(dim=-1).all()):
            break
    spacing, left = 1.02, 2.15
    figure, axes = canvas(left + spacing * len(steps) - 0.45, 0.85 * beam_size + 0.5)
    height = figure.get_figheight()
    show_image(axes, picture, 0.1, height / 2 - 0.75, 1.2, 1.2)
    positions = {(): (1.34, height / 2 - 0.15)}
    best = steps[-1][0][0]
    kept = {caption[:t] for caption, _ in steps[-1] for t in range(len(steps) + 1)}
    for t, beams in enumerate(steps, start=1):
        axes.text(left + spacing * (t - 1), height - 0.2, f"step {t}", ha="center", fontsize=9, color=GRAY)
        for rank, (caption, score) in enumerate(beams):
            x, y = left + spacing * (t - 1), height - 0.7 - 0.85 * rank
            positions[caption] = (x, y)
            on_best = caption == best[:t]
            color = WORD if on_best else STATE if caption in kept else GRAY
            start_x, start_y = positions[caption[:-1]]
            start = (start_x + (0.41 if t > 1 else 0), start_y)
            arrow(axes, start, (x - 0.42, y), color=color, linewidth=2 if on_best else 1.1)
            word = captioner.vocabulary.idx2word[caption[-1]]
            box(axes, x, y, 0.8, 0.5, f"{word}\n{score:.2f}", color, size=8.5)
    return figure


def draw_attention_shapes(
    picture: np.ndarray, words: list[str], alpha: np.ndarray, objects: list[dict[str, Any]]
) -> Figure:
    """Draw the raw attention weights at each word, region by region, with the box of the object that the word names."""
    side = round(alpha.shape[1] ** 0.5)
    columns = min(6, len(words) + 1)
    rows = -(-(len(words) + 1) // columns)
    figure = Figure(figsize=(1.66 * columns, 1.95 * rows), layout="constrained")
    tiles = figure.subplots(rows, columns, squeeze=False).flatten()
    for tile in tiles:
        tile.axis("off")
    tiles[0].imshow(picture, extent=(0, 1, 1, 0))
    tiles[0].set_title("scene", fontsize=11)
    for t, (tile, word) in enumerate(zip(tiles[1:], words, strict=False)):
        tile.imshow(picture, extent=(0, 1, 1, 0), alpha=0.6)
        cover = np.zeros((side, side, 4))
        cover[..., :3] = to_rgb(ATTENTION)
        cover[..., 3] = alpha[t].reshape(side, side)
        tile.imshow(cover, extent=(0, 1, 1, 0), interpolation="nearest")
        row, column = divmod(int(alpha[t].argmax()), side)
        tile.plot((column + 0.5) / side, (row + 0.5) / side, "x", color=INK, markersize=8, markeredgewidth=2)
        tile.set_title(word, fontsize=11)
        for item in objects:
            if item["words"][-1] == word and item["words"][-2] == words[t - 1]:
                x0, y0, x1, y1 = item["box"]
                tile.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor="none", edgecolor=STATE, linewidth=2.5))
        tile.set(xlim=(0, 1), ylim=(1, 0))
    return figure


def draw_self_critical(picture: np.ndarray, captions: list[str], rewards: list[float]) -> Figure:
    """Draw sampled captions of a scene with their rewards, and the advantage of each over the mean of the others."""
    figure, axes = canvas(10, 0.5 * len(captions) + 0.85)
    height = figure.get_figheight()
    show_image(axes, picture, 0.15, height / 2 - 0.95, 1.7, 1.7)
    for x, title in ((2.1, "sampled caption"), (7.1, "CIDEr-D"), (8.75, "advantage")):
        align = "left" if x < 3 else "center"
        axes.text(x, height - 0.3, title, ha=align, va="center", fontsize=10.5, color=INK, weight="bold")
    axes.plot([8.75, 8.75], [0.15, height - 0.5], color=GRAY, linewidth=1)
    advantages = [reward - (sum(rewards) - reward) / (len(rewards) - 1) for reward in rewards]
    scale = 0.65 / max(1e-6, *map(abs, advantages))  # inches
    for i, (caption, reward, advantage) in enumerate(zip(captions, rewards, advantages, strict=True)):
        y = height - 0.75 - 0.5 * i
        color = WORD if advantage > 0 else ATTENTION
        axes.text(2.1, y, caption, va="center", fontsize=9.5, color=INK)
        axes.text(7.1, y, f"{reward:.2f}", ha="center", va="center", fontsize=10, color=INK)
        axes.barh(y, scale * advantage, left=8.75, height=0.26, color=color)
        text_x, align = 8.75 + scale * advantage, "left" if advantage > 0 else "right"
        axes.text(
            text_x + (0.05 if advantage > 0 else -0.05), y, f"{advantage:+.2f}", ha=align, va="center", fontsize=9
        )
    return figure


def draw_shapes_figures(settings: Settings, folder: Path, runtime: Runtime) -> None:
    """Draw the figures of a model trained on shapes, with scenes of the test split."""
    captioner = load_captioner(settings.shapes_checkpoint, runtime.device)
    entries, packed, objects = read_captions(settings.data_folder, "test")
    references = packed.decode()

    def scene(index: int) -> tuple[np.ndarray, Tensor]:
        """Return a scene enlarged for a figure, (256, 256, 3), and as the model sees it, (3, h, w)."""
        path = Path(settings.data_folder) / "photos" / entries[index]["image"]
        picture = Image.open(path).convert("RGB").resize((256, 256), Image.Resampling.NEAREST)
        return np.asarray(picture), torch.from_numpy(load_image(path, captioner.image_size, captioner.resize))

    beam, attention, samples = (i % len(entries) for i in (BEAM_SCENE, ATTENTION_SCENE, SAMPLES_SCENE))
    picture, image = scene(beam)
    save_figure(draw_beam_search(picture, captioner, image), folder / "beam_search.png")

    picture, image = scene(attention)
    caption = caption_batch(captioner, image[None], DecodingSettings(beam_size=3), runtime)[0]
    figure = draw_attention_shapes(picture, caption.words, caption.alpha.numpy(), objects[attention])
    save_figure(figure, folder / "attention_shapes.png")

    picture, image = scene(samples)
    torch.manual_seed(2)
    regions = captioner.encode(image.unsqueeze(0)).regions
    word_ids = sample(captioner.decoder, regions, DecodingSettings(samples=5))[0].tolist()
    sampled = [captioner.vocabulary.decode(caption) for caption in word_ids]
    rewards = CiderD(references)(references[samples], sampled)
    figure = draw_self_critical(picture, [" ".join(words) for words in sampled], rewards)
    save_figure(figure, folder / "self_critical.png")


# ------------------------------------------------------------------------- a model trained on Flickr8k


def draw_photos(settings: Settings, folder: Path, runtime: Runtime) -> None:
    """Caption photos from scikit-image and draw the attention at each word."""
    captioner = load_captioner(settings.checkpoint, runtime.device)
    for name in PHOTOS:
        photo = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        image = to_square(photo, captioner.image_size, captioner.resize)
        caption = caption_batch(captioner, image[None], DecodingSettings(beam_size=5), runtime)[0]
        photo.thumbnail((320, 320))
        figure = plot_attention(photo, caption.words, caption.alpha.numpy(), caption.gates)
        save_figure(figure, folder / f"photo_{name}.png", dpi=70)
        print(f"  {' '.join(caption.words)}")


def draw_diagrams(folder: Path) -> None:
    """Draw the figures that need no model."""
    photo = skimage.data.coffee()
    save_figure(draw_overview(photo), folder / "overview.png")
    save_figure(draw_regions(photo), folder / "regions.png")
    save_figure(draw_show_and_tell(), folder / "show_and_tell.png")
    save_figure(draw_decoder(), folder / "decoder.png")
    generator = random.Random(3)
    scenes = [draw_scene(generator, 64) for _ in range(400)]
    captions = [[caption.split() for caption in scene_captions] for _, scene_captions, _ in scenes]
    save_figure(draw_teacher_forcing(captions[:4]), folder / "teacher_forcing.png")
    references = ("a dog runs across the grass", "a brown dog is running on the green grass")
    save_figure(draw_bleu("a dog runs on the green grass", references), folder / "bleu.png")
    pair = next(i for i, (_, _, objects) in enumerate(scenes) if len(objects) == 2)
    picture = np.asarray(scenes[pair][0].resize((256, 256), Image.Resampling.NEAREST))
    save_figure(draw_metrics(picture, captions[pair], captions), folder / "metrics.png")


@torch.inference_mode()
def main(settings: Settings) -> None:
    """Draw every figure that can be drawn."""
    folder, runtime = Path(settings.output_folder), choose_runtime("cpu", "fp32")
    draw_diagrams(folder)
    if Path(settings.shapes_checkpoint).is_file() and Path(settings.data_folder, "dataset.json").is_file():
        draw_shapes_figures(settings, folder, runtime)
    else:
        print(
            f"skipped the figures of shapes: make demo writes {settings.shapes_checkpoint} and {settings.data_folder}"
        )
    if settings.checkpoint:
        draw_photos(settings, folder, runtime)
    else:
        print("skipped the figures of photos: pass a model trained on Flickr8k as --checkpoint")


if __name__ == "__main__":
    run_script(main, Settings)
