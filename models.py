"""The captioner, an encoder with a decoder: its settings, how it is built, and how it is read from a checkpoint.

Shapes: B images, R regions, F features of the encoder, D features of a region as the decoder sees it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common.checkpoints import EmptyWeights, check_fit, check_types, check_weights, check_words, name_impossible_sizes
from common.files import safe_load
from decoding.captions import ImageCaption, caption_batch
from decoding.settings import DecodingSettings
from modules.adaptive import AdaptiveDecoder
from modules.attention import ATTENTIONS
from modules.cells import CELLS
from modules.cpu import Dropout
from modules.decoders import DecoderOutput, Encoded
from modules.encoders import Encoder, NoEncoder
from modules.graph import GRAPH_EDGES, GRAPH_LAYERS, RegionGraph
from modules.layers import init_linear
from modules.regions import BOX_FEATURES, REGIONS, RegionSource
from modules.sgrvinod import SgrvinodDecoder
from modules.show_attend_tell import ShowAttendTell
from modules.transformer import POSITIONS, RegionEncoder, TransformerDecoder
from modules.up_down import UpDownDecoder
from preparation.images import RESIZE_MODES, load_image, pad_boxes, photo_size, place_objects
from text.vocabulary import Vocabulary
from utils import BaseSettings, InputError, choose_device, choose_runtime, make_settings, setting

DECODERS = {
    "recurrent": ShowAttendTell,
    "adaptive": AdaptiveDecoder,
    "up_down": UpDownDecoder,
    "transformer": TransformerDecoder,
    "sgrvinod": SgrvinodDecoder,
}
CHECKPOINT_FORMAT = 8
DATA_KEYS = {"image_size": int, "resize": str, "feature_dim": int, "fine_tune_encoder": bool}  # of a checkpoint
# Upper bounds, so that a bad checkpoint or a typo cannot exhaust memory.
MAX_IMAGE_SIZE, MAX_LAYERS, MAX_FEATURES = 4096, 100, 65_536
# Conditions of settings, as in `utils.setting`.
ENCODER = "not regions=features"
STACKED = "decoder=recurrent,adaptive"
TRANSFORMER = "decoder=transformer or encoder_layers"


@dataclass(frozen=True, kw_only=True)
class ModelSettings(BaseSettings):
    """Settings that shape a model; a checkpoint keeps exactly these."""

    # group: encoder
    encoder: str = setting("resnet101", needs=ENCODER)  # any torchvision classification network
    encoder_layer: str = setting("", needs=ENCODER)  # layer to take the grid from; empty: the last one with a grid
    encoder_weights: str = setting("imagenet", needs=ENCODER)  # imagenet, the path of a state dict, or empty: random
    grid_size: int = setting(0, minimum=0, needs=ENCODER)  # pool the grid to this side (the paper: 14); 0: do not pool

    # group: regions
    regions: str = setting("grid", choices=REGIONS)  # what the decoder attends to
    box_features: bool = False  # append the box of a region to its features
    region_dim: int = setting(512, minimum=0)  # output size of the linear layer on each region; 0: no layer
    graph_layers: int = setting(0, minimum=0, maximum=MAX_LAYERS)  # graph layers over the regions
    graph_layer: str = setting("gat", choices=GRAPH_LAYERS, needs="graph_layers")  # graph attention or gated conv.
    graph_edges: str = setting("grid", choices=GRAPH_EDGES, needs="graph_layers")  # regions that are connected
    graph_knn: int = setting(4, minimum=0, needs="graph_layers")  # similar neighbors with --graph_edges grid or similar
    graph_heads: int = setting(4, minimum=1, needs="graph_layers")  # attention heads of a graph layer
    encoder_layers: int = setting(0, minimum=0, maximum=MAX_LAYERS)  # transformer encoder layers over the regions
    encoder_positions: str = setting("sine", choices=POSITIONS, needs="encoder_layers")  # position codes of the grid
    geometry: bool = setting(False, needs="encoder_layers")  # let encoder layers attend by relative position and size

    # group: decoder
    decoder: str = setting("recurrent", choices=DECODERS)  # kind of decoder
    cell: str = setting("lstm", choices=CELLS, needs="decoder=recurrent")  # recurrent cell
    attention: str = setting("soft", choices=ATTENTIONS, needs="decoder=recurrent")  # how regions are weighted
    image_first: bool = setting(False, needs=STACKED)  # the image is the first word (Show and Tell)
    layers: int = setting(1, minimum=1, maximum=MAX_LAYERS, needs=STACKED)  # stacked recurrent layers
    embed_dim: int = setting(512, minimum=1)  # units of a word embedding
    attention_dim: int = setting(512, minimum=1, needs="not decoder=transformer")  # units of the attention
    hidden_dim: int = setting(512, minimum=1)  # units of the recurrent cell, or width of the transformer decoder
    decoder_layers: int = setting(2, minimum=1, maximum=MAX_LAYERS, needs="decoder=transformer")  # transformer layers
    heads: int = setting(8, minimum=1, needs=TRANSFORMER)  # attention heads of transformer layers
    ffn_dim: int = setting(1024, minimum=1, needs=TRANSFORMER)  # units of transformer layers' feed-forward networks
    dropout: float = setting(0.5, minimum=0, below=1)  # on words, regions and the output layer

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.graph_layers and self.graph_edges == "grid" and self.regions != "grid":
            raise InputError(f"--graph_edges grid requires --regions grid: give {' or '.join(GRAPH_EDGES[1:])}")


def model_settings(settings: ModelSettings) -> dict[str, Any]:
    """Return the model settings among settings of train.py, as a checkpoint keeps them."""
    return {field.name: getattr(settings, field.name) for field in fields(ModelSettings)}


class Captioner(nn.Module):
    """An encoder, the choice of regions, a dense layer, graph layers, encoder layers and a decoder.

    Args:
        settings: what shapes the model.
        vocabulary: its words.
        image_size: side in pixels of the images that it is trained on.
        resize: how photos are made square (`preparation.images.to_square`).
        feature_dim: F of region features, which take the place of images and encoder.
        fine_tune_encoder: True if training changes the encoder; otherwise its features are cached.
        load_weights: load `encoder_weights`; False if a checkpoint's weights follow.

    Raises InputError for a network, layer or weights that do not exist, or sizes that do not fit.
    """

    def __init__(
        self,
        settings: ModelSettings,
        vocabulary: Vocabulary,
        image_size: int,
        resize: str,
        *,
        feature_dim: int = 0,
        fine_tune_encoder: bool = False,
        load_weights: bool = True,
    ) -> None:
        super().__init__()
        self.vocabulary, self.image_size, self.resize = vocabulary, image_size, resize
        self.fine_tune_encoder = fine_tune_encoder
        if settings.regions == "features":
            if feature_dim < 1:
                raise InputError("--regions features: the data folder has none, prepare it with --region_features")
            if feature_dim > MAX_FEATURES:
                raise InputError(f"region features of {feature_dim} numbers are too large, {MAX_FEATURES} is the limit")
            self.encoder = NoEncoder(feature_dim)
        else:
            if not 1 <= image_size <= MAX_IMAGE_SIZE:
                raise InputError(f"images of {image_size} pixels: must have 1 to {MAX_IMAGE_SIZE}")
            if settings.grid_size > image_size:
                raise InputError(f"--grid_size {settings.grid_size}: exceeds the image size of {image_size} pixels")
            self.encoder = Encoder(
                settings.encoder,
                layer=settings.encoder_layer,
                weights=settings.encoder_weights if load_weights else "",
                grid_size=settings.grid_size,
                image_size=image_size,
            )
            self.encoder.pretrained = bool(settings.encoder_weights)
        region_dim = self.encoder.feature_dim + (BOX_FEATURES if settings.box_features else 0)
        self.region_source = RegionSource(settings)
        self.region_layer: nn.Module = nn.Identity()
        if settings.region_dim:
            linear = nn.Linear(region_dim, settings.region_dim)
            init_linear(linear)
            self.region_layer = nn.Sequential(linear, nn.ReLU(), Dropout(settings.dropout))
            region_dim = settings.region_dim
        self.graph = RegionGraph(settings, region_dim=region_dim)
        num_cells = 0 if settings.regions == "objects" else self.encoder.num_regions
        self.region_encoder = RegionEncoder(settings, region_dim=region_dim, num_cells=num_cells)
        self.decoder = DECODERS[settings.decoder](settings, vocab_size=len(vocabulary), region_dim=region_dim)

    @property
    def sources(self) -> list["Captioner"]:
        """The captioners whose encoders compute features: itself (several in `evaluation.ensemble.Ensemble`)."""
        return [self]

    @property
    def fingerprints(self) -> list[tuple[str, str, int, str]]:
        """The fingerprints of the encoders of `sources`."""
        return [self.encoder.fingerprint()]

    @property
    def uses_objects(self) -> bool:
        """True if it needs the boxes of the objects in the images."""
        return self.region_source.uses_objects

    @property
    def uses_region_features(self) -> bool:
        """True if it takes region features and their boxes instead of images."""
        return self.region_source.uses_region_features

    @property
    def needs_boxes(self) -> bool:
        """True if it cannot work without the boxes of its regions."""
        in_encoder = self.region_encoder.geometry and bool(self.region_encoder.layers)
        in_graph = self.graph.edges == "spatial" and bool(self.graph.layers)
        return self.region_source.box_features or in_encoder or in_graph

    def features(self, inputs: Tensor) -> Tensor:
        """Return the encoder's features (B, R, F) of images (B, 3, h, w) uint8; features (B, R, F) pass through."""
        if inputs.ndim == 4:
            return self.encoder(inputs)
        return inputs.float() if inputs.dtype == torch.float16 else inputs  # the cache holds float16

    def encode(self, inputs: Tensor, boxes: Tensor | None = None) -> Encoded:
        """Compute what the decoder sees of images (B, 3, h, w) uint8, or of their cached or region features (B, R, F).

        A captioner that `uses_objects` needs the boxes (B, N, 4) of the objects; one that `uses_region_features` needs
        the boxes (B, R, 4) of the features, as in `modules.regions.RegionSource`.
        """
        features = self.features(inputs)
        regions, region_boxes, mask = self.region_source(features, boxes)
        regions, neighbors, edge_weights = self.graph(self.region_layer(regions), regions, region_boxes)
        regions = self.region_encoder(regions, region_boxes, mask)
        return Encoded(regions, mask, region_boxes, features, neighbors, edge_weights)

    def caption_images(
        self,
        photos: Iterable[str | Path | Image.Image],
        beam_size: int | None = None,
        *,
        objects: Sequence[list[dict[str, Any]]] | None = None,
        precision: str = "auto",
        **options: Any,
    ) -> list[ImageCaption]:
        """Caption photos: files or Pillow images. The captioner must be in eval mode, as `load_captioner` returns it.

        Args:
            objects: objects of each photo, for a captioner that `uses_objects`; each has a "box": left, top, right and
                bottom in fractions of the photo's sides.
            precision: auto (bf16 mixed precision where it is faster), bf16 or fp32.
            beam_size: beams per image; None: the default.
            options: other fields of `decoding.settings.DecodingSettings`, such as length_penalty=1. Samples depend on
                `seed`: torch's generators are seeded with it.

        Raises InputError for an option that does not exist or has no effect, a photo that cannot be read, and a
        captioner of region features.
        """
        if isinstance(photos, (str, Path, Image.Image)):
            raise InputError(f"caption_images takes a list of photos, not the single {photos}")
        photos = list(photos)
        if self.uses_region_features:
            raise InputError("this model looks at region features, not at photos: use caption.py --region_features")
        if self.uses_objects and (objects is None or len(objects) != len(photos)):
            raise InputError("this model requires objects: pass a list per photo as objects=")
        if objects is not None and not self.uses_objects:
            raise InputError("this model does not use objects: remove objects=")
        if beam_size is not None:
            options["beam_size"] = beam_size
        settings = make_settings(DecodingSettings, options)
        runtime = choose_runtime(next(self.parameters()).device, precision)
        captions = []
        if settings.samples:
            torch.manual_seed(settings.seed)
        for start in range(0, len(photos), settings.batch_size):
            batch = range(start, min(start + settings.batch_size, len(photos)))
            images = np.stack([load_image(photos[i], self.image_size, self.resize) for i in batch])
            boxes = None
            if self.uses_objects and objects:
                sizes = {i: photo_size(photos[i]) for i in batch if objects[i]}
                placed = {i: place_objects(objects[i], sizes[i], self.image_size, self.resize) for i in sizes}
                boxes = pad_boxes([placed.get(i, []) for i in batch])
            captions += caption_batch(self, torch.from_numpy(images), settings, runtime, boxes=boxes)
        return captions

    def forward(
        self,
        inputs: Tensor,
        words: Tensor,
        lengths: Tensor,
        sampling_prob: float = 0.0,
        boxes: Tensor | None = None,
    ) -> DecoderOutput:
        """Predict each word from the true words before it: inputs and boxes as in `encode`, others as in `Decoder`."""
        encoded = self.encode(inputs, boxes)
        output = self.decoder(encoded.regions, words, lengths, sampling_prob, encoded.mask)
        return output._replace(mask=encoded.mask, boxes=encoded.boxes)


def load_captioner(path: str | Path, device: str | torch.device = "auto") -> Captioner:
    """Load the captioner of a checkpoint, in eval mode.

    Raises InputError if the file is not a checkpoint of this format.
    """
    device = choose_device(device)
    return captioner_from_checkpoint(load_checkpoint(path, device), path).to(device).eval()


def captioner_from_checkpoint(
    checkpoint: Mapping[str, Any], path: str | Path, settings: ModelSettings | None = None
) -> Captioner:
    """Build a checkpoint's captioner, with other model settings if given.

    The captioner takes the checkpoint's tensors as its weights, without a copy. It is built without memory for weights
    first, so settings that the weights do not fit cost nothing. Raises InputError for such settings or words, and for
    weights that are not finite.
    """
    with name_impossible_sizes(path), EmptyWeights():
        vocabulary = Vocabulary(checkpoint["words"])
        settings = settings or ModelSettings(**checkpoint["model_settings"])
        data = {name: checkpoint[name] for name in DATA_KEYS}
        captioner = Captioner(settings, vocabulary, load_weights=False, **data)
    check_fit(checkpoint["model"], captioner.state_dict(), len(vocabulary), path)
    captioner.load_state_dict(dict(checkpoint["model"]), assign=True)
    return captioner


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint of train.py as a dictionary and check what inference needs; InputError for any other file."""
    if Path(path).is_dir():
        raise InputError(f"{path} is a folder, not a checkpoint: give {Path(path) / 'best.pt'}")
    checkpoint = safe_load(path, device)
    if not isinstance(checkpoint, dict) or type(checkpoint.get("format")) is not int:
        raise InputError(f"{path} is not a checkpoint of train.py")
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise InputError(
            f"{path} has checkpoint format {checkpoint['format']}, this code reads {CHECKPOINT_FORMAT}: train again"
        )
    if not checkpoint.keys() >= {"model", "model_settings", "words", *DATA_KEYS}:
        raise InputError(f"{path} is not a checkpoint of train.py")
    settings, hints = checkpoint["model_settings"], get_type_hints(ModelSettings)
    names = {field.name for field in fields(ModelSettings)}
    if not isinstance(settings, dict) or settings.keys() != names:
        raise InputError(f"{path}: its model_settings do not match this version: train again")
    check_types({name: checkpoint[name] for name in DATA_KEYS} | settings, hints | DATA_KEYS, path)
    if checkpoint["resize"] not in RESIZE_MODES:
        raise InputError(f"{path}: resize is not one of {' '.join(RESIZE_MODES)}")
    check_words(checkpoint["words"], path)
    check_weights(checkpoint["model"], path)
    return checkpoint
