"""Caption photos and draw where the model looks at each word: python caption.py photo.jpg --checkpoint best.pt"""

import math
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from skimage.transform import pyramid_expand, resize
from tqdm import tqdm

from graph import edges_that_mattered
from models import load_captioner
from photos import load_image, open_photo, to_square
from search import attend, beam_search
from utils import (
    InputError,
    autocast,
    choose_device,
    choose_dtype,
    require_at_least,
    run_script,
    written_whole,
)


@dataclass(frozen=True)
class Settings:
    """Caption photos and save a picture of each with the attention at every word."""

    photos: tuple[str, ...]  # one or more image files
    checkpoint: str = "runs/shapes/best.pt"  # what train.py wrote
    output: str = "captions"  # folder of the pictures, each named after its photo
    beam_size: int = 5  # captions kept while searching; 1 is greedy decoding
    length_penalty: float = 0.5  # rank by log-probability / length ** this; 0 favours short captions
    max_length: int = 30  # words of a caption at most
    edges: str = ""  # a word: where captions hold it, draw the edges of the model's graph that mattered for it, too
    show: bool = False  # open each picture
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # bf16 mixed precision where the hardware has it
    device: str = "auto"  # auto, cpu or cuda


def draw_attention(photo, words, weights):
    """A figure of the photo and one tile a word: the photo, bright where the decoder looked.

    photo is a Pillow image, words a list of T strings, weights (T, R) an array over a square grid of regions.
    """
    pixels = np.asarray(photo) / 255
    side = math.isqrt(weights.shape[1])
    columns = min(5, len(words) + 1)
    rows = math.ceil((len(words) + 1) / columns)
    tile_height = 2.3 * pixels.shape[0] / pixels.shape[1]
    figure = Figure(figsize=(2.3 * columns, (tile_height + 0.3) * rows), layout="constrained")
    tiles = figure.subplots(rows, columns, squeeze=False).flatten()
    for tile in tiles:
        tile.axis("off")
    tiles[0].imshow(pixels)
    for tile, word, look in zip(tiles[1:], words, weights, strict=False):
        smooth = pyramid_expand(look.reshape(side, side), upscale=16, sigma=8)
        smooth = resize(smooth, pixels.shape[:2], order=1)
        light = (smooth - smooth.min()) / max(np.ptp(smooth), 1e-8)
        tile.imshow(pixels * (0.2 + 0.8 * light[..., None]))
        tile.set_title(word, fontsize=13)
    return figure


def draw_edges(photo, word, look, edges, most=30):
    """A figure of the photo with the edges that mattered for a word: a circle where the decoder looked, arrows to it.

    look (R) is an array over a square grid, edges are those of `graph.edges_that_mattered`.
    """
    side = math.isqrt(len(look))

    def centre(region):
        row, column = divmod(region, side)
        return (column + 0.5) / side * photo.width, (row + 0.5) / side * photo.height

    figure = Figure(figsize=(6, 6 * photo.height / photo.width + 0.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.asarray(photo) / 255 * 0.6)
    axes.axis("off")
    axes.set_title(word)
    axes.scatter(*zip(*map(centre, range(len(look))), strict=True), s=400 * look / look.max(), color="white", alpha=0.6)
    shown = list(edges.items())[:most]
    for (sender, receiver), share in shown:
        strength = share / shown[0][1]
        arrow = {"arrowstyle": "->", "color": "orange", "linewidth": 3 * strength, "alpha": 0.3 + 0.7 * strength}
        axes.annotate("", centre(receiver), centre(sender), arrowprops=arrow)
    return figure


def picture_paths(stems, folder):
    """Where each picture goes: its stem, numbered where two share one."""
    paths = []
    for stem in stems:
        path, number = Path(folder) / f"{stem}.png", 2
        while path in paths:
            path, number = Path(folder) / f"{stem}-{number}.png", number + 1
        paths.append(path)
    return paths


def main(settings):
    """Print each photo's caption with its log-probability and save its picture."""
    require_at_least(settings, 1, "beam_size", "max_length")
    require_at_least(settings, 0, "length_penalty")
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.precision, device)
    captioner, vocabulary, trained = load_captioner(settings.checkpoint, device)
    if settings.edges and not (trained["graph_layers"] and captioner.decoder.looks):
        raise InputError(
            f"--edges {settings.edges}: {settings.checkpoint} has no graph to look at, train with --graph_layers"
        )
    if settings.edges and settings.edges not in vocabulary.numbers:
        raise InputError(f"--edges {settings.edges}: {settings.checkpoint} does not know this word")
    # All are sound before any is drawn.
    images = [load_image(photo, captioner.image_size, captioner.resize) for photo in settings.photos]
    stems = [Path(photo).stem for photo in settings.photos]
    of_edges = [f"{stem}-edges" for stem in stems] if settings.edges else []
    paths = picture_paths(stems + of_edges, settings.output)
    replaced = {path.resolve() for path in paths} & {Path(photo).resolve() for photo in settings.photos}
    if replaced:
        raise InputError(f"--output {settings.output}: a picture would replace the photo {replaced.pop()}")
    Path(settings.output).mkdir(parents=True, exist_ok=True)
    jobs = zip_longest(settings.photos, images, paths[: len(images)], paths[len(images) :])
    for photo, image, path, edges_path in tqdm(jobs, total=len(images), unit="photo", disable=len(images) == 1):
        with torch.inference_mode(), autocast(device, dtype):
            regions, neighbours, layers = captioner.trace(torch.from_numpy(image).unsqueeze(0).to(device))
            captions, _ = beam_search(
                captioner.decoder, regions, settings.beam_size, settings.max_length, settings.length_penalty
            )
            log_probability, weights = attend(captioner.decoder, regions, captions[:, 0])
        words = vocabulary.decode(captions[0, 0])
        tqdm.write(f"{photo}: {' '.join(words)} (log-probability {log_probability.item():.2f})")
        shown = open_photo(photo, 400)
        if captioner.resize == "squash":
            shown.thumbnail((400, 400))  # the grid of regions is stretched over it
        else:
            shown = Image.fromarray(to_square(shown, 400, captioner.resize).permute(1, 2, 0).numpy())
        weights = weights[0].float().cpu()
        looked = words if captioner.decoder.looks else []  # without attention just the photo
        figures = {path: draw_attention(shown, looked, weights.numpy())}
        if settings.edges in words:
            look = weights[words.index(settings.edges)]
            edges = edges_that_mattered(look, neighbours[0].cpu(), [layer[0].float().cpu() for layer in layers])
            figures[edges_path] = draw_edges(shown, settings.edges, look.numpy(), edges)
        elif settings.edges:
            tqdm.write(f"  {settings.edges} is not in this caption")
        for path, figure in figures.items():
            with written_whole(path) as temporary:
                figure.savefig(temporary, dpi=100)
            tqdm.write(f"  {path}")
            if settings.show:
                Image.open(path).show()


if __name__ == "__main__":
    run_script(main, Settings)
