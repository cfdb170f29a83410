"""Export a model to ONNX, which runs without torch: python tools/export_onnx.py --checkpoint best.pt

docs/models.md describes the files; docs/onnx_example.py captions photos with them.
"""

import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.files import atomic_write, read_json, require_writable
from decoding.contract import expand
from decoding.settings import DecodingSettings
from models import Captioner, load_captioner
from text.vocabulary import BANNED_IDS, END, PAD, START, UNK
from tools.onnx_parts import ImageModule, StepModule, TensorNames, flatten, make_parts, random_inputs
from utils import BaseSettings, InputError, run_script

FILES = ("encoder.onnx", "step.onnx", "vocabulary.json")
FORMAT_KEY, FORMAT = "image_captioning_export", "1"  # marks the files of an export
MAX_DIFFERENCE = 1e-4  # from torch: absolute for numbers below 1, relative for larger ones
CHECKED_WORDS = 4  # words of each caption that are compared with torch


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Write encoder.onnx, step.onnx and vocabulary.json, which caption photos without torch."""

    checkpoint: str = "runs/shapes/best.pt"  # what train.py wrote
    output_folder: str = "export"  # folder of the three files; those of an earlier export are replaced


def largest_difference(captioner: Captioner, names: TensorNames, encoder_path: Path, step_path: Path) -> float:
    """Return the largest difference of the files' outputs from torch's, on random images in batches of 1 and 3."""
    import onnxruntime  # optional

    differences: list[float] = []
    sessions: list[Any] = [onnxruntime.InferenceSession(path) for path in (encoder_path, step_path)]
    encoder, step = sessions
    for B, N, C in ((1, 1, 1), (3, 12, 2)):
        inputs = random_inputs(captioner, B, N)
        regions, keys, state = ImageModule(captioner).encode(*inputs)
        outputs = encoder.run(None, dict(zip(names.inputs, map(Tensor.numpy, inputs), strict=True)))
        differences += compare([regions, *flatten(keys), *flatten(state)], outputs)
        found = dict(zip(names.image_outputs, outputs, strict=True))
        found |= {name: found[name].repeat(C, axis=1) for name in names.state}
        step_module, state = StepModule(captioner.decoder, keys, state), flatten(expand(state, C))
        generator = torch.Generator().manual_seed(B)
        for _ in range(CHECKED_WORDS):
            words = torch.randint(UNK, captioner.decoder.embedding.num_embeddings, (B, C), generator=generator)
            expected = step_module(words, regions, flatten(keys), state)
            outputs = step.run(None, {"words": words.numpy()} | found)
            differences += compare(expected, outputs)
            state, found = expected[2:], found | dict(zip(names.state, outputs[2:], strict=True))
    return float(np.max(differences))  # NaN if one is NaN


def compare(expected: Sequence[Tensor], found: Sequence[np.ndarray]) -> Iterator[float]:
    """Yield the largest difference of each of torch's tensors from ONNX Runtime's, relative for numbers above 1."""
    for x, y in zip(expected, found, strict=True):
        x, y = x.double().numpy(), y.astype(np.float64)
        yield np.max(abs(x - y) / np.maximum(1, abs(x)), initial=0) if x.shape == y.shape else np.inf


def require_packages() -> None:
    """Raise InputError if a package that torch's export needs is missing."""
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if missing:
        raise InputError(f"missing packages {' '.join(missing)}: pip install onnx onnxscript onnxruntime")


def require_replaceable(folder: Path) -> None:
    """Raise InputError if an export would replace a file that no export wrote."""
    for path in map(folder.joinpath, FILES):
        if path.exists() and not is_export(path):
            raise InputError(
                f"{path} is not an export of this command and is not replaced: choose another --output_folder"
            )


def is_export(path: Path) -> bool:
    """Return True if this command wrote a file."""
    import onnx  # optional

    try:
        if path.suffix == ".json":
            return FORMAT_KEY in read_json(path)
        return any(entry.key == FORMAT_KEY for entry in onnx.load(path, load_external_data=False).metadata_props)
    except Exception:  # a file of another program raises almost anything
        return False


def describe_model(captioner: Captioner, names: TensorNames) -> dict[str, Any]:
    """Return the content of vocabulary.json: all that a caller needs besides the two models."""
    return {
        FORMAT_KEY: FORMAT,
        "image_size": captioner.image_size,
        "resize": captioner.resize,
        "max_length": DecodingSettings.max_length,
        **names._asdict(),
        "captions_axis": 1,
        "pad": PAD,
        "start": START,
        "end": END,
        "unk": UNK,
        "banned": BANNED_IDS,
        "words": captioner.vocabulary.idx2word,
    }


@torch.no_grad()
def main(settings: Settings) -> None:
    """Export both models and compare them with torch, then put the files in place."""
    folder = Path(settings.output_folder)
    require_packages()
    require_writable(folder)
    require_replaceable(folder)
    captioner = load_captioner(settings.checkpoint, "cpu")
    captioner.requires_grad_(False)
    names = TensorNames.of(captioner)
    with contextlib.ExitStack() as stack:
        *paths, vocabulary_path = [stack.enter_context(atomic_write(folder / name)) for name in FILES]
        for part, path in zip(make_parts(captioner, names), paths, strict=True):
            part.write(path, {FORMAT_KEY: FORMAT})
        model = describe_model(captioner, names)
        vocabulary_path.write_text(json.dumps(model, ensure_ascii=False), encoding="utf-8")
        checked = "not compared with torch: pip install onnxruntime"
        if importlib.util.find_spec("onnxruntime"):
            difference = largest_difference(captioner, names, *paths)
            checked = f"largest difference from torch {difference:.1e}"
            if not difference <= MAX_DIFFERENCE:
                raise InputError(
                    f"{settings.checkpoint}: {checked}, more than {MAX_DIFFERENCE:g}: nothing is written, try other "
                    f"versions of torch, onnxscript or onnxruntime"
                )
    sizes = ", ".join(f"{name} {(folder / name).stat().st_size / 1e6:.1f} MB" for name in FILES)
    print(f"{folder}: {sizes}; {checked}")


if __name__ == "__main__":
    run_script(main, Settings)
