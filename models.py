"""The captioner, an encoder with a decoder: built from settings, or read from a checkpoint.

Shapes: B images, R regions, F features of the encoder, D features of a region as the decoder sees it.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.files import safe_load
from modules.decoders import Decoder, DecoderOutput
from modules.encoders import Encoder
from modules.graph import RegionGraph
from modules.layers import Dropout, init_linear
from text.vocabulary import Vocabulary
from utils import InputError, first_line

CHECKPOINT_FORMAT = 4
# What inference needs.
CHECKPOINT_KEYS = {"format", "model", "model_settings", "image_size", "resize", "fine_tune_encoder", "words"}


class Captioner(nn.Module):
    """An encoder and a decoder, between them a dense layer and graph layers on the regions.

    `image_size` is the side in pixels of the images that it was trained on, `resize` how they were made square
    (`preparation.images.to_square`), `fine_tune_encoder` whether training changes the encoder, whose features are
    cached otherwise.
    """

    def __init__(
        self,
        encoder: Encoder,
        region_layer: nn.Module,
        graph: RegionGraph,
        decoder: Decoder,
        *,
        image_size: int,
        resize: str,
        fine_tune_encoder: bool,
    ) -> None:
        super().__init__()
        self.encoder, self.region_layer, self.graph, self.decoder = encoder, region_layer, graph, decoder
        self.image_size, self.resize, self.fine_tune_encoder = image_size, resize, fine_tune_encoder

    def encode(self, inputs: Tensor, is_features: bool = False) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Regions for the decoder (B, R, D), with the graph's neighbors and edge weights (`RegionGraph.forward`).

        Args:
            inputs: images (B, 3, h, w) uint8 or, where `is_features`, cached features (B, R, F).
        """
        features = inputs.float() if is_features else self.encoder(inputs)
        return self.graph(self.region_layer(features), features)

    def encode_images(self, inputs: Tensor, is_features: bool = False) -> Tensor:
        """The regions (B, R, D) of `encode` alone."""
        return self.encode(inputs, is_features)[0]

    def forward(
        self, inputs: Tensor, words: Tensor, lengths: Tensor, sampling_prob: float = 0.0, is_features: bool = False
    ) -> DecoderOutput:
        """Teacher forcing, as `Decoder.forward`."""
        return self.decoder(self.encode_images(inputs, is_features), words, lengths, sampling_prob)


def build_captioner(
    vocab_size: int,
    image_size: int,
    resize: str,
    fine_tune_encoder: bool = False,
    load_weights: bool = True,
    *,
    encoder: str,
    encoder_layer: str,
    encoder_weights: str,
    grid_size: int,
    region_dim: int,
    graph_layers: int,
    graph_knn: int,
    graph_heads: int,
    cell: str,
    attention: str,
    embed_dim: int,
    attention_dim: int,
    hidden_dim: int,
    dropout: float,
) -> Captioner:
    """Build a captioner; its keyword-only parameters are the settings of train.py that a checkpoint keeps.

    Args:
        vocab_size, image_size, resize: what the prepared folder gives.
        fine_tune_encoder: whether training is to change the encoder.
        load_weights: load `encoder_weights`; False where a checkpoint's weights follow.

    Raises InputError for a network, layer or weights that do not exist, or sizes that do not fit.
    """
    network = Encoder(
        encoder,
        layer=encoder_layer,
        weights=encoder_weights if load_weights else "",
        grid_size=grid_size,
        image_size=image_size,
    )
    network.pretrained = bool(encoder_weights)
    region_layer: nn.Module = nn.Identity()
    if region_dim:
        linear = nn.Linear(network.feature_dim, region_dim)
        region_layer = nn.Sequential(linear, nn.ReLU(), Dropout(dropout))
        init_linear(linear)
    else:
        region_dim = network.feature_dim
    if graph_layers and region_dim % graph_heads:
        raise InputError(f"--graph_heads {graph_heads}: does not divide the {region_dim} features of a region")
    graph = RegionGraph(region_dim=region_dim, layers=graph_layers, knn=graph_knn, heads=graph_heads, dropout=dropout)
    decoder = Decoder(
        vocab_size=vocab_size,
        region_dim=region_dim,
        embed_dim=embed_dim,
        attention_dim=attention_dim,
        hidden_dim=hidden_dim,
        dropout=dropout,
        cell=cell,
        attention=attention,
    )
    return Captioner(
        network,
        region_layer,
        graph,
        decoder,
        image_size=image_size,
        resize=resize,
        fine_tune_encoder=fine_tune_encoder,
    )


def model_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings of train.py those that `build_captioner` takes: its keyword-only parameters."""
    parameters = inspect.signature(build_captioner).parameters.values()
    return {each.name: settings[each.name] for each in parameters if each.kind is each.KEYWORD_ONLY}


def load_captioner(path: str | Path, device: str | torch.device) -> tuple[Captioner, Vocabulary]:
    """Read what a checkpoint holds for inference: the captioner in eval mode and its vocabulary.

    Raises InputError where the file is no checkpoint of this format.
    """
    captioner, vocabulary = captioner_from_checkpoint(load_checkpoint(path, device), path)
    return captioner.to(device).eval(), vocabulary


def captioner_from_checkpoint(
    checkpoint: Mapping[str, Any], path: str | Path, changes: Mapping[str, Any] | None = None
) -> tuple[Captioner, Vocabulary]:
    """Build a checkpoint's captioner and vocabulary, with `changes` to its model settings.

    Raises InputError where the weights do not fit the words or the settings.
    """
    vocabulary = Vocabulary(checkpoint["words"])
    rows = len(checkpoint["model"]["decoder.embedding.weight"])
    if rows != len(vocabulary):
        raise InputError(f"{path} names {len(vocabulary)} words but its model has {rows}: it is not one run's file")
    settings = checkpoint["model_settings"] | (changes or {})
    data_settings = (checkpoint[name] for name in ("image_size", "resize", "fine_tune_encoder"))
    captioner = build_captioner(rows, *data_settings, load_weights=False, **settings)
    try:
        captioner.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise InputError(f"{path}: its weights do not fit its settings: {first_line(error)}") from None
    return captioner, vocabulary


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint of train.py as the dictionary that it is; InputError for any other file."""
    checkpoint = safe_load(path, device)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise InputError(f"{path} is not a checkpoint of train.py")
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise InputError(
            f"{path} has checkpoint format {checkpoint['format']}, this code reads {CHECKPOINT_FORMAT}: train again"
        )
    if not checkpoint.keys() >= CHECKPOINT_KEYS:
        raise InputError(f"{path} is not a checkpoint of train.py")
    return checkpoint
