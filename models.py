"""The captioner, an encoder with a decoder: built from settings, or read from a checkpoint.

Shapes: B images, R regions, F features of the encoder, D features of a region as the decoder sees it.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_type_hints

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common.checkpoints import (
    EmptyWeights,
    check_fit,
    check_settings,
    check_types,
    check_weights,
    check_words,
    name_impossible_sizes,
    shown,
)
from common.files import safe_load
from decoding.captions import Encoded, ImageCaption, caption_batch
from decoding.settings import DecodingSettings
from modules.adaptive import AdaptiveDecoder
from modules.attention import ATTENTIONS
from modules.cells import CELLS
from modules.decoders import Decoder, DecoderOutput
from modules.encoders import Encoder, NoEncoder
from modules.graph import GRAPH_EDGES, GRAPH_LAYERS, RegionGraph
from modules.layers import Dropout, init_linear
from modules.region_encoder import POSITIONS, RegionEncoder
from modules.regions import BOX_FEATURES, REGIONS, RegionSource
from modules.sgrvinod import SgrvinodDecoder
from modules.show_attend_tell import ShowAttendTell
from modules.transformer import TransformerDecoder
from modules.up_down import UpDownDecoder
from preparation.images import load_image, pad_boxes, photo_size, place_objects
from text.vocabulary import Vocabulary
from utils import InputError, choose_device, choose_runtime, require_at_least, require_below_one

DECODERS = {
    "recurrent": ShowAttendTell,
    "up_down": UpDownDecoder,
    "transformer": TransformerDecoder,
    "sgrvinod": SgrvinodDecoder,
}
CHECKPOINT_FORMAT = 7
DATA_KEYS = ("image_size", "resize", "feature_dim", "fine_tune_encoder")  # for `build_captioner` beside the settings
CHECKPOINT_KEYS = {"format", "model", "model_settings", "words", *DATA_KEYS}  # what inference needs
# A checkpoint of others, or a slip of the hand, could ask for any amount of memory and time otherwise.
MAX_IMAGE_SIZE, MAX_LAYERS, MAX_FEATURES = 4096, 100, 65_536


class Captioner(nn.Module):
    """An encoder and a decoder, between them the choice of regions, a dense layer, graph layers and encoder layers.

    `vocabulary` holds its words. `image_size` is the side in pixels of the images that it was trained on, `resize` how
    they were made square (`preparation.images.to_square`), `fine_tune_encoder` whether training changes the encoder,
    whose features are cached otherwise.
    """

    def __init__(
        self,
        encoder: Encoder | NoEncoder,
        region_source: RegionSource,
        region_layer: nn.Module,
        graph: RegionGraph,
        region_encoder: RegionEncoder,
        decoder: Decoder,
        *,
        vocabulary: Vocabulary,
        image_size: int,
        resize: str,
        fine_tune_encoder: bool,
    ) -> None:
        super().__init__()
        self.encoder, self.region_source, self.region_layer = encoder, region_source, region_layer
        self.graph, self.region_encoder, self.decoder = graph, region_encoder, decoder
        self.vocabulary = vocabulary
        self.image_size, self.resize, self.fine_tune_encoder = image_size, resize, fine_tune_encoder

    @property
    def sources(self) -> list["Captioner"]:
        """Itself, as the one whose encoder gives the features; see `evaluation.ensemble.Ensemble`."""
        return [self]

    @property
    def fingerprints(self) -> list[tuple[str, str, int, str]]:
        """The encoder's fingerprint; see `evaluation.ensemble.Ensemble`."""
        return [self.encoder.fingerprint()]

    @property
    def uses_objects(self) -> bool:
        """Whether it needs the boxes of the objects in the images."""
        return self.region_source.uses_objects

    @property
    def uses_region_features(self) -> bool:
        """Whether it needs region features and their boxes in place of images."""
        return self.region_source.uses_region_features

    @property
    def needs_boxes(self) -> bool:
        """Whether it cannot do without the boxes of its regions."""
        in_encoder = self.region_encoder.geometry and bool(self.region_encoder.layers)
        in_graph = self.graph.edges == "spatial" and bool(self.graph.layers)
        return self.region_source.box_features or in_encoder or in_graph

    def encode(self, inputs: Tensor, is_features: bool = False, boxes: Tensor | None = None) -> Encoded:
        """What the decoder sees of images (B, 3, h, w) uint8 or, where `is_features`, of cached features (B, R, F).

        A captioner that `uses_objects` needs their boxes (B, N, 4), one that `uses_region_features` those and their
        boxes (B, R, 4), as `modules.regions.RegionSource`.
        """
        return self.encode_features(self.features(inputs, is_features), boxes)

    def features(self, inputs: Tensor, is_features: bool = False) -> Tensor:
        """The encoder's features (B, R, F) of inputs as `encode` takes them."""
        return inputs.float() if is_features else self.encoder(inputs)

    def encode_features(self, features: Tensor, boxes: Tensor | None = None) -> Encoded:
        """As `encode`, of the encoder's features (B, R, F)."""
        regions, region_boxes, mask = self.region_source(features, boxes)
        regions, neighbors, edge_weights = self.graph(self.region_layer(regions), regions, region_boxes)
        regions = self.region_encoder(regions, region_boxes, mask)
        return Encoded(regions, mask, region_boxes, features, neighbors, edge_weights)

    def encode_images(self, inputs: Tensor, is_features: bool = False) -> Tensor:
        """The regions (B, R, D) of `encode` alone, for a captioner of a grid."""
        return self.encode(inputs, is_features).regions

    def caption_images(
        self,
        photos: Iterable[str | Path | Image.Image],
        beam_size: int = 5,
        *,
        objects: Sequence[list[dict[str, Any]]] | None = None,
        precision: Literal["auto", "bf16", "fp32"] = "auto",
        **decoding: Any,
    ) -> list[ImageCaption]:
        """Caption photos, files or Pillow's images; the captioner is in eval mode, as `load_captioner` returns it.

        Args:
            objects: of each photo, for a captioner that `uses_objects`; each has a "box": left, top, right and bottom
                in fractions of the photo's sides.
            precision: auto: bf16 mixed precision where it is faster.
            decoding: other fields of `decoding.settings.DecodingSettings`, such as batch_size=8 or length_penalty=1.
                With samples, torch's generators are seeded.

        Raises InputError for a photo that cannot be read, and for a captioner of region features.
        """
        if isinstance(photos, (str, Path, Image.Image)):
            raise InputError(f"caption_images takes a list of photos, not the single {photos}")
        photos = list(photos)
        if self.uses_region_features:
            raise InputError("this model looks at region features, not at photos: use caption.py --region_features")
        if self.uses_objects and (objects is None or len(objects) != len(photos)):
            raise InputError("this model looks at objects: give those of each photo as objects=")
        if objects is not None and not self.uses_objects:
            raise InputError("this model looks at no objects: leave objects= out")
        settings = DecodingSettings(beam_size=beam_size, **decoding)
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
        is_features: bool = False,
        boxes: Tensor | None = None,
    ) -> DecoderOutput:
        """Teacher forcing, as `Decoder.forward`, on inputs as `encode` takes them."""
        encoded = self.encode(inputs, is_features, boxes)
        output = self.decoder(encoded.regions, words, lengths, sampling_prob, encoded.mask)
        return output._replace(mask=encoded.mask, boxes=encoded.boxes)


def build_captioner(
    vocabulary: Vocabulary,
    image_size: int,
    resize: Literal["squash", "crop", "pad"],
    feature_dim: int = 0,
    fine_tune_encoder: bool = False,
    load_weights: bool = True,
    *,
    encoder: str,
    encoder_layer: str,
    encoder_weights: str,
    grid_size: int,
    regions: Literal[tuple(REGIONS)],  # pyright: ignore[reportInvalidTypeForm]
    box_features: bool,
    region_dim: int,
    graph_layers: int,
    graph_layer: Literal[tuple(GRAPH_LAYERS)],  # pyright: ignore[reportInvalidTypeForm]
    graph_edges: Literal[tuple(GRAPH_EDGES)],  # pyright: ignore[reportInvalidTypeForm]
    graph_knn: int,
    graph_heads: int,
    encoder_layers: int,
    geometry: bool,
    encoder_positions: Literal[tuple(POSITIONS)],  # pyright: ignore[reportInvalidTypeForm]
    decoder: Literal[tuple(DECODERS)],  # pyright: ignore[reportInvalidTypeForm]
    cell: Literal[tuple(CELLS)],  # pyright: ignore[reportInvalidTypeForm]
    attention: Literal[tuple(ATTENTIONS)],  # pyright: ignore[reportInvalidTypeForm]
    image_first: bool,
    layers: int,
    embed_dim: int,
    attention_dim: int,
    hidden_dim: int,
    decoder_layers: int,
    heads: int,
    ffn_dim: int,
    dropout: float,
) -> Captioner:
    """Build a captioner; its keyword-only parameters are the settings of train.py that a checkpoint keeps.

    Args:
        vocabulary, image_size, resize, feature_dim: what the prepared folder gives, the last of region features.
        fine_tune_encoder: whether training is to change the encoder.
        load_weights: load `encoder_weights`; False where a checkpoint's weights follow.

    Raises InputError for a network, layer or weights that do not exist, or sizes that do not fit.
    """
    sizes = SimpleNamespace(**locals())
    _check_sizes(sizes)
    if regions == "features":
        network = NoEncoder(feature_dim)
    else:
        network = Encoder(
            encoder,
            layer=encoder_layer,
            weights=encoder_weights if load_weights else "",
            grid_size=grid_size,
            image_size=image_size,
        )
        network.pretrained = bool(encoder_weights)
    feature_dim = network.feature_dim + BOX_FEATURES * box_features
    region_layer: nn.Module = nn.Identity()
    if region_dim:
        linear = nn.Linear(feature_dim, region_dim)
        region_layer = nn.Sequential(linear, nn.ReLU(), Dropout(dropout))
        init_linear(linear)
    else:
        region_dim = feature_dim
    if graph_layers and graph_layer == "gat" and region_dim % graph_heads:
        raise InputError(f"--graph_heads {graph_heads}: does not divide the {region_dim} features of a region")
    graph = RegionGraph(
        region_dim=region_dim,
        layers=graph_layers,
        layer=graph_layer,
        edges=graph_edges,
        knn=graph_knn,
        heads=graph_heads,
        dropout=dropout,
    )
    region_encoder = RegionEncoder(
        region_dim=region_dim,
        num_cells=0 if regions == "objects" else network.num_regions,
        layers=encoder_layers,
        positions=encoder_positions,
        heads=heads,
        ffn_dim=ffn_dim,
        geometry=geometry,
        dropout=dropout,
    )
    sizes.region_dim, sizes.vocab_size = region_dim, len(vocabulary)
    is_adaptive = decoder == "recurrent" and attention == "adaptive"
    decoder_class = AdaptiveDecoder if is_adaptive else DECODERS[decoder]
    return Captioner(
        network,
        RegionSource(regions, box_features=box_features),
        region_layer,
        graph,
        region_encoder,
        decoder_class(**{name: getattr(sizes, name) for name in decoder_settings(decoder)}),
        vocabulary=vocabulary,
        image_size=image_size,
        resize=resize,
        fine_tune_encoder=fine_tune_encoder,
    )


def _check_sizes(sizes: SimpleNamespace) -> None:
    """Raise InputError where arguments of `build_captioner` are out of range or do not go together."""
    require_at_least(sizes, 1, "image_size", "embed_dim", "attention_dim", "hidden_dim", "graph_heads")
    require_at_least(sizes, 1, "layers", "decoder_layers", "heads", "ffn_dim")
    require_at_least(sizes, 0, "grid_size", "region_dim", "graph_layers", "graph_knn", "encoder_layers")
    require_below_one(sizes, "dropout")
    if sizes.feature_dim > MAX_FEATURES:
        raise InputError(f"region features of {sizes.feature_dim} numbers are too large, {MAX_FEATURES} is the limit")
    if sizes.image_size > MAX_IMAGE_SIZE:
        raise InputError(f"images of {sizes.image_size} pixels are too large, {MAX_IMAGE_SIZE} is the limit")
    for name in ("graph_layers", "encoder_layers", "layers", "decoder_layers"):
        if getattr(sizes, name) > MAX_LAYERS:
            raise InputError(f"--{name} {getattr(sizes, name)}: must be at most {MAX_LAYERS}")
    if sizes.graph_layers and sizes.graph_edges == "grid" and sizes.regions != "grid":
        raise InputError("--graph_edges grid: is for --regions grid, give similar, spatial or all")
    if sizes.regions == "features":
        if sizes.feature_dim < 1:
            raise InputError("--regions features: the data folder has none, prepare it with --region_features")
        if sizes.fine_tune_encoder:
            raise InputError("--fine_tune_encoder: --regions features has no encoder, leave one of them out")
    if sizes.grid_size > sizes.image_size:
        raise InputError(f"--grid_size {sizes.grid_size}: finer than the images, which have {sizes.image_size} pixels")
    if sizes.decoder == "recurrent" and sizes.attention == "adaptive" and sizes.cell != "lstm":
        raise InputError(f"--cell {sizes.cell} does not go with --attention adaptive, which needs an LSTM: --cell lstm")


def decoder_settings(decoder: str) -> list[str]:
    """The settings that a decoder of this name takes: the parameters of its class, the sizes of its input included."""
    return list(inspect.signature(DECODERS[decoder]).parameters)


def model_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings of train.py those that `build_captioner` takes: its keyword-only parameters."""
    parameters = inspect.signature(build_captioner).parameters.values()
    return {each.name: settings[each.name] for each in parameters if each.kind is each.KEYWORD_ONLY}


def load_captioner(path: str | Path, device: str | torch.device = "auto") -> Captioner:
    """Read what a checkpoint holds for inference: the captioner, in eval mode.

    Raises InputError where the file is no checkpoint of this format.
    """
    device = choose_device(device)
    return captioner_from_checkpoint(load_checkpoint(path, device), path).to(device).eval()


def captioner_from_checkpoint(
    checkpoint: Mapping[str, Any], path: str | Path, changes: Mapping[str, Any] | None = None
) -> Captioner:
    """Build a checkpoint's captioner, with `changes` to its model settings.

    The captioner takes the checkpoint's tensors as its weights, without a copy. It is built without memory for
    weights first, so settings that the weights do not fit cost nothing. Raises InputError for such settings or words,
    and for weights that are not finite.
    """
    weights, settings = checkpoint["model"], checkpoint["model_settings"] | (changes or {})
    data_settings = [checkpoint[name] for name in DATA_KEYS]
    with name_impossible_sizes(path), EmptyWeights():
        vocabulary = Vocabulary(checkpoint["words"])
        captioner = build_captioner(vocabulary, *data_settings, load_weights=False, **settings)
    check_fit(weights, captioner.state_dict(), len(vocabulary), path)
    captioner.load_state_dict(dict(weights), assign=True)
    return captioner


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint of train.py as the dictionary that it is; InputError for any other file.

    What inference needs has the types that train.py writes, whoever wrote the file.
    """
    if Path(path).is_dir():
        raise InputError(f"{path} is a folder, not a checkpoint: give {Path(path) / 'best.pt'}")
    checkpoint = safe_load(path, device)
    if not isinstance(checkpoint, dict) or type(checkpoint.get("format")) is not int:
        raise InputError(f"{path} is not a checkpoint of train.py")
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        found = shown(checkpoint["format"])
        raise InputError(f"{path} has checkpoint format {found}, this code reads {CHECKPOINT_FORMAT}: train again")
    if not checkpoint.keys() >= CHECKPOINT_KEYS:
        raise InputError(f"{path} is not a checkpoint of train.py")
    hints = get_type_hints(build_captioner)
    check_settings(checkpoint["model_settings"], model_settings(hints), path)
    check_types({name: checkpoint[name] for name in DATA_KEYS} | checkpoint["model_settings"], hints, path)
    check_words(checkpoint["words"], path)
    check_weights(checkpoint["model"], path)
    return checkpoint
