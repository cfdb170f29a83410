"""Index photos and captions for consensus re-ranking: python tools/index_captions.py --checkpoint best.pt

eval.py, caption.py and tools/serve.py take the file as --consensus_index, for every model with the same encoder.
eval.py takes it for this prepared folder alone.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.files import require_writable
from datasets import CaptionDataset, in_order, make_batches, make_loader
from evaluation.consensus import CaptionIndex, is_index_file
from features.feature_cache import build_dataset
from models import Captioner, load_captioner
from modules.encoders import NoEncoder
from preparation.storage import read_metadata
from utils import PRECISIONS, BaseSettings, InputError, Runtime, choose_runtime, copy_to_device, run_script, setting


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Index a prepared folder's training photos and captions by the features of an encoder."""

    checkpoint: str = "runs/shapes/best.pt"  # model whose encoder computes the features
    data_folder: str = "data/shapes"  # folder that create_input_files.py wrote
    output: str = "data/shapes/consensus.pt"  # file of the index
    overwrite: bool = False  # replace an existing index
    features_folder: str = ""  # cache of a frozen encoder's features; empty: in the data folder
    precision: str = setting("auto", choices=PRECISIONS)  # auto: bf16 mixed precision where it is faster
    device: str = "auto"  # auto, cpu or cuda


@torch.no_grad()
def mean_features(captioner: Captioner, dataset: CaptionDataset, runtime: Runtime) -> torch.Tensor:
    """Compute the mean of each photo's features over the regions: (N, F), on the CPU."""
    means = []
    batches = make_batches(in_order(len(dataset)), 32)
    for batch in tqdm(make_loader(dataset, batches), desc="features", unit="batch"):
        inputs = copy_to_device(batch.inputs, runtime.device)
        with runtime.autocast():
            features = captioner.features(inputs)
        order = sorted(range(len(batch.indices)), key=lambda i: batch.indices[i])
        means.append(features.float().mean(dim=1)[order])
    return torch.cat(means).cpu()


def main(settings: Settings) -> None:
    """Index the training split."""
    runtime = choose_runtime(settings.device, settings.precision)
    if Path(settings.output).exists() and not is_index_file(settings.output):
        raise InputError(f"{settings.output} is not an index of captions and is not replaced: give another --output")
    if Path(settings.output).exists() and not settings.overwrite:
        raise InputError(f"{settings.output} exists: give --overwrite or another --output")
    require_writable(Path(settings.output).parent)
    captioner = load_captioner(settings.checkpoint, runtime.device)
    if isinstance(captioner.encoder, NoEncoder):
        raise InputError(f"{settings.checkpoint} has no encoder to compute features for the index: use another model")
    dataset = build_dataset(
        settings.data_folder, "train", captioner, runtime, features_folder=settings.features_folder, with_objects=False
    )
    means, digest = mean_features(captioner, dataset, runtime), read_metadata(settings.data_folder)["digest"]
    index = CaptionIndex.build(captioner.encoder, means, dataset.references, digest)
    index.save(settings.output)
    megabytes = Path(settings.output).stat().st_size / 1e6
    print(f"{settings.output}: {len(dataset)} photos, {dataset.references.num_captions()} captions, {megabytes:.1f} MB")


if __name__ == "__main__":
    run_script(main, Settings)
