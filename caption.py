"""Caption photos and plot the attention at each word: python caption.py photo.jpg --checkpoint best.pt"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from tqdm import tqdm

from common.files import save_figure
from evaluation.generation import DecodingSettings, caption_image
from evaluation.pictures import open_for_picture, plot_attention, plot_edges
from models import Captioner, load_captioner
from modules.graph import edge_attribution
from preparation.images import load_image
from text.vocabulary import Vocabulary
from utils import InputError, choose_runtime, require_at_least, run_script


@dataclass(frozen=True)
class Settings:
    """Caption photos and save a picture of each with the attention at every word."""

    # group: paths
    photos: tuple[str, ...]  # one or more image files
    checkpoint: str = "runs/shapes/best.pt"  # what train.py wrote
    output_folder: str = "captions"  # folder of the pictures, each named after its photo

    # group: decoding
    beam_size: int = 5  # beams; 1 is greedy decoding
    length_penalty: float = 0.5  # rank by log-probability / length ** this; 0 favors short captions
    max_length: int = 30  # maximum words of a caption

    # group: run
    graph_word: str = ""  # a word: where a caption has it, plot the graph's edges that mattered for it, too
    show: bool = False  # open each picture
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # bf16 mixed precision where the hardware has it
    device: str = "auto"  # auto, cpu or cuda


def validate_graph_word(settings: Settings, captioner: Captioner, vocabulary: Vocabulary) -> None:
    """Raise InputError where the model cannot show the edges for --graph_word."""
    if not (captioner.graph.layers and captioner.decoder.has_attention):
        raise InputError(
            f"--graph_word {settings.graph_word}: {settings.checkpoint} has no graph to plot, train with --graph_layers"
        )
    if settings.graph_word not in vocabulary.word2idx:
        raise InputError(f"--graph_word {settings.graph_word}: {settings.checkpoint} does not know this word")


def unique_paths(stems: list[str], folder: str) -> list[Path]:
    """The path of a picture for each stem, with a suffix where several share a stem."""
    paths: list[Path] = []
    for stem in stems:
        path, suffix = Path(folder) / f"{stem}.png", 2
        while path in paths:
            path, suffix = Path(folder) / f"{stem}-{suffix}.png", suffix + 1
        paths.append(path)
    return paths


def picture_paths(settings: Settings) -> tuple[list[Path], list[Path]]:
    """The paths of the attention pictures and, with --graph_word, of the edge pictures; one of each per photo.

    Raises InputError where a picture would replace a photo.
    """
    stems = [Path(photo).stem for photo in settings.photos]
    edge_stems = [f"{stem}-edges" for stem in stems] if settings.graph_word else []
    paths = unique_paths(stems + edge_stems, settings.output_folder)
    replaced = {path.resolve() for path in paths} & {Path(photo).resolve() for photo in settings.photos}
    if replaced:
        raise InputError(
            f"--output_folder {settings.output_folder}: a picture would replace the photo {replaced.pop()}"
        )
    return paths[: len(stems)], paths[len(stems) :]


def main(settings: Settings) -> None:
    """Print the caption of each photo with its log-probability and save its pictures."""
    require_at_least(settings, 1, "beam_size", "max_length")
    require_at_least(settings, 0, "length_penalty")
    runtime = choose_runtime(settings.device, settings.precision)
    captioner, vocabulary = load_captioner(settings.checkpoint, runtime.device)
    if settings.graph_word:
        validate_graph_word(settings, captioner, vocabulary)
    # All photos are read before any is captioned: a bad one stops the script before it writes a file.
    images = [load_image(photo, captioner.image_size, captioner.resize) for photo in settings.photos]
    paths, edge_paths = picture_paths(settings)
    Path(settings.output_folder).mkdir(parents=True, exist_ok=True)
    decoding = DecodingSettings(settings.beam_size, settings.max_length, settings.length_penalty)
    for i, photo in enumerate(tqdm(settings.photos, unit="photo", disable=len(images) == 1)):
        caption = caption_image(captioner, vocabulary, torch.from_numpy(images[i]), decoding, runtime)
        tqdm.write(f"{photo}: {' '.join(caption.words)} (log-probability {caption.log_prob:.2f})")
        picture_photo = open_for_picture(photo, captioner.resize)
        attended_words = caption.words if captioner.decoder.has_attention else []
        figures = {paths[i]: plot_attention(picture_photo, attended_words, caption.alpha.numpy())}
        if settings.graph_word in caption.words and caption.neighbors is not None:
            alpha = caption.alpha[caption.words.index(settings.graph_word)]
            edges = edge_attribution(alpha, caption.neighbors, caption.edge_weights)
            figures[edge_paths[i]] = plot_edges(picture_photo, settings.graph_word, alpha.numpy(), edges)
        elif settings.graph_word:
            tqdm.write(f"  {settings.graph_word} is not in this caption")
        for path, figure in figures.items():
            save_figure(figure, path)
            tqdm.write(f"  {path}")
            if settings.show:
                Image.open(path).show()


if __name__ == "__main__":
    run_script(main, Settings)
