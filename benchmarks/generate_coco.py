"""Generate photos and captions in the number and form of COCO's, to try every script at that size without a download:

python benchmarks/generate_coco.py --output_folder coco
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.files import write_json
from utils import BaseSettings, run_script

CAPTIONS_PER_IMAGE, MAX_WORDS = 5, 40


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Generate photos in folders, and dataset_coco.json with Karpathy's splits of them."""

    output_folder: str = "coco"  # folder to write
    num_train: int = 113287  # photos in Karpathy's split
    num_val: int = 5000
    num_test: int = 5000
    width: int = 320  # width of a photo in pixels
    height: int = 256
    seed: int = 0  # seed of photos and captions


def generate_photo(generator: np.random.Generator, width: int, height: int) -> Image.Image:
    """Generate a photo of coarse and fine colored blots, 15 kB as JPEG, in 2 ms."""
    coarse, fine = (
        Image.fromarray(generator.integers(0, 256, (rows, columns, 3), np.uint8)).resize((width, height))
        for rows, columns in ((6, 8), (height // 4, width // 4))
    )
    return Image.blend(coarse, fine, 0.25)


def generate_sentences(generator: np.random.Generator, index: int) -> list[dict[str, Any]]:
    """Generate the captions of an image, with lengths, word frequencies and 10,000 frequent words as in COCO."""
    sentences = []
    lengths = generator.normal(10.5, 2.4, CAPTIONS_PER_IMAGE).round().clip(5, MAX_WORDS).astype(int)
    word_ids = generator.zipf(1.3, (CAPTIONS_PER_IMAGE, MAX_WORDS)) % 10_000
    for caption_index, (caption, length) in enumerate(zip(word_ids.tolist(), lengths, strict=True)):
        tokens = [f"word{word_id}" for word_id in caption[:length]]
        sentence_id = CAPTIONS_PER_IMAGE * index + caption_index
        sentences.append({"tokens": tokens, "raw": f"{' '.join(tokens)}.", "imgid": index, "sentid": sentence_id})
    return sentences


def main(settings: Settings) -> None:
    """Write the photos to train2014/ and val2014/, with file names like COCO's, and then dataset_coco.json."""
    folder, generator = Path(settings.output_folder), np.random.default_rng(settings.seed)
    splits = ["train"] * settings.num_train + ["val"] * settings.num_val + ["test"] * settings.num_test
    images = []
    for index, split in enumerate(tqdm(splits, unit="photo")):
        source = "train2014" if split == "train" else "val2014"
        name = f"COCO_{source}_{index:012d}.jpg"
        (folder / source).mkdir(parents=True, exist_ok=True)
        generate_photo(generator, settings.width, settings.height).save(folder / source / name, quality=85)
        images.append(
            {
                "filepath": source,
                "sentids": list(range(CAPTIONS_PER_IMAGE * index, CAPTIONS_PER_IMAGE * (index + 1))),
                "filename": name,
                "imgid": index,
                "split": split,
                "sentences": generate_sentences(generator, index),
                "cocoid": index,
            }
        )
    write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


if __name__ == "__main__":
    run_script(main, Settings)
