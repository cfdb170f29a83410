"""What train.py checks of its settings before all work."""

from typing import Any

from common.distributed import world_size
from datasets import CaptionDataset
from models import DECODERS, decoder_settings
from preparation.storage import read_metadata, region_info
from text.vocabulary import FLIPPED_WORDS
from training.validation import is_informative
from utils import InputError, require_at_least, require_below_one

# Settings that have no effect without an encoder.
OF_ENCODERS = (
    "encoder",
    "encoder_layer",
    "encoder_weights",
    "grid_size",
    "encoder_learning_rate",
    "in_memory",
    "features_folder",
)


def validate_settings(settings: Any) -> None:
    """Raise InputError for a value out of range, those of the model aside, or settings that do not go together."""
    require_at_least(settings, 1, "epochs", "batch_size", "gradient_accumulation_steps", "patience", "max_length")
    require_at_least(settings, 0, "learning_rate", "encoder_learning_rate", "doubly_stochastic", "grounding_weight")
    require_at_least(settings, 0, "workers", "grad_clip", "learning_rate_decay", "save_minutes")
    if settings.warmup_ratio != -1:
        require_below_one(settings, "warmup_ratio")
    require_below_one(settings, "label_smoothing", "ema_decay", "scheduled_sampling_max_prob")
    if settings.unfreeze_from and not settings.fine_tune_encoder:
        raise InputError(f"--unfreeze_from {settings.unfreeze_from} needs --fine_tune_encoder")
    if settings.freeze_embeddings and not (settings.pretrained_embeddings or settings.init_from):
        raise InputError("--freeze_embeddings needs --pretrained_embeddings: without, the words would stay random")
    if settings.objective == "scst" and not (settings.init_from or settings.resume):
        raise InputError("--objective scst needs a trained model: give its best.pt as --init_from")
    if settings.grounding_weight and settings.attention == "none" and settings.decoder == "recurrent":
        raise InputError("--grounding_weight needs attention: leave --attention none out")
    if settings.regions == "features":
        if settings.hflip:
            raise InputError("--hflip: region features are those of the photos as they are, leave it out")
        for name in OF_ENCODERS:
            if name in settings.given and getattr(settings, name):
                raise InputError(f"--{name}: --regions features has no encoder, leave it out")
        info = region_info(read_metadata(settings.data_folder))
        if settings.grounding_weight and info and not info.has_boxes:
            raise InputError(f"--grounding_weight: the region features of {settings.data_folder} have no boxes")
    of_layers = dict.fromkeys(("graph_layer", "graph_edges", "graph_knn", "graph_heads"), "graph_layers")
    of_layers |= dict.fromkeys(("encoder_positions", "geometry"), "encoder_layers")
    for name, layers in of_layers.items():
        if name in settings.given and getattr(settings, name) is not False and not getattr(settings, layers):
            raise InputError(f"--{name} is a setting of --{layers}: give --{layers}, too")
    for name in ("scheduled_sampling_max_prob", "doubly_stochastic", "grounding_weight"):
        if settings.objective == "scst" and getattr(settings, name):
            raise InputError(f"--{name} {getattr(settings, name)} does not go with --objective scst")
    unused = {name for kind in DECODERS for name in decoder_settings(kind)} - set(decoder_settings(settings.decoder))
    if settings.encoder_layers:
        unused -= {"heads", "ffn_dim"}
    for name in sorted(unused & settings.given):
        raise InputError(
            f"--{name} does not go with --decoder {settings.decoder}, which has no such part: leave it out"
        )
    micro_batches = world_size() * settings.gradient_accumulation_steps
    if settings.batch_size < micro_batches:
        raise InputError(
            f"--batch_size {settings.batch_size} cannot be shared by {world_size()} processes in "
            f"--gradient_accumulation_steps {settings.gradient_accumulation_steps}: give at least {micro_batches}"
        )


def print_warnings(settings: Any, training: CaptionDataset, validation: CaptionDataset) -> None:
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
