"""Checks of the settings of train.py before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.distributed import world_size
from datasets import CaptionDataset
from preparation.storage import read_metadata, region_info
from text.vocabulary import FLIPPED_WORDS
from training.validation import is_informative
from utils import InputError

if TYPE_CHECKING:
    from train import Settings


def validate_settings(settings: Settings) -> None:
    """Raise InputError if settings do not go together, beyond what each one says that it needs."""
    if settings.objective == "scst" and not (settings.init_from or settings.resume):
        raise InputError("--objective scst requires a trained model: give its best.pt as --init_from")
    if settings.regions == "features" and settings.grounding_weight:
        info = region_info(read_metadata(settings.data_folder))
        if info and not info.has_boxes:
            raise InputError(f"--grounding_weight: the region features of {settings.data_folder} have no boxes")
    micro_batches = world_size() * settings.gradient_accumulation_steps
    if settings.batch_size < micro_batches:
        raise InputError(
            f"--batch_size {settings.batch_size} cannot be shared by {world_size()} processes in "
            f"--gradient_accumulation_steps {settings.gradient_accumulation_steps}: give at least {micro_batches}"
        )


def print_warnings(settings: Settings, training: CaptionDataset, validation: CaptionDataset) -> None:
    """Say which settings have no effect on this data."""
    if not is_informative(settings.best_metric, len(validation)):
        print(
            "warning: CIDEr of one validation image is always 0: the validation loss picks best.pt and --patience has "
            "no effect. Give more validation photos, or --best_metric bleu_4"
        )
    if settings.hflip and not training.flipped_ids:
        print(
            f"warning: --hflip flips photos but no words, the captions have neither {' nor '.join(FLIPPED_WORDS)}: "
            f"leave it out where they tell sides in other words"
        )
