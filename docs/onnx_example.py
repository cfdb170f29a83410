"""Caption photos without torch: python docs/onnx_example.py export photo.jpg

Requires only numpy, pillow and onnxruntime. `export` is a folder written by tools/export_onnx.py, for a model of whole
images squashed to squares (--resize squash). JPEGs, and PNGs without transparency, are read exactly as by caption.py.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def resize_rows(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize the first axis as torch does, with its antialiased bicubic filter: (h, w, 3) -> (size, w, 3)."""
    scale = len(pixels) / size
    centers = (np.arange(size) + 0.5) * scale
    x = abs(np.arange(len(pixels)) + 0.5 - centers[:, None]) / max(scale, 1)
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0))
    weights /= weights.sum(axis=1, keepdims=True)
    # torch rounds the weights to 16-bit integers, with as many fractional bits as the largest weight allows.
    bits = next((n for n in range(22) if int(weights.max() * 2 ** (n + 1) + 0.5) >= 2**15), 22)
    weights = np.trunc(weights * 2**bits + np.copysign(0.5, weights))
    return np.clip(np.floor(np.tensordot(weights, pixels, 1) / 2**bits + 0.5), 0, 255)


def load_image(path: str, size: int) -> np.ndarray:
    """Load a photo as an image (3, size, size) uint8, as in training."""
    with Image.open(path) as photo:
        photo.draft(None, (round(1.4 * size), round(1.4 * size)))  # decode a JPEG at a reduced size
        pixels = np.asarray(ImageOps.exif_transpose(photo).convert("RGB"), dtype=float)  # (h, w, 3)
    columns = resize_rows(pixels.transpose(1, 0, 2), size)  # (size, h, 3)
    return resize_rows(columns.transpose(1, 0, 2), size).transpose(2, 0, 1).astype(np.uint8)


def decode(encoder: Any, step: Any, model: dict[str, Any], inputs: dict[str, np.ndarray]) -> str:
    """Caption one image greedily with the sessions of both models."""
    names = ["regions", *model["keys"], *model["state"]]
    tensors = dict(zip(names, encoder.run(names, inputs), strict=True))
    word_ids = [model["start"]]
    while len(word_ids) <= model["max_length"]:
        log_probs, _, *state = step.run(None, {"words": np.array([word_ids[-1:]]), **tensors})
        banned = model["banned"] + [model["end"]] * (len(word_ids) == 1)  # a caption has at least one word
        log_probs[..., banned] = -np.inf
        word_ids.append(int(log_probs.argmax()))
        if word_ids[-1] == model["end"]:
            break
        tensors |= zip(model["state"], state, strict=True)
    return " ".join(model["words"][i] for i in word_ids[1:] if i != model["end"])


def main(folder: Path, photos: list[str]) -> None:
    """Print the caption of each photo."""
    model = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
    if model["inputs"] != ["images"] or model["resize"] != "squash":
        sys.exit(f"{folder}: takes {' and '.join(model['inputs'])}, resize {model['resize']}: see docs/models.md")
    encoder, step = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("encoder", "step"))
    for photo in photos:
        images = load_image(photo, model["image_size"])[None]  # (1, 3, S, S)
        print(f"{photo}: {decode(encoder, step, model, {'images': images})}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
