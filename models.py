"""The captioner, an encoder with a decoder: built from settings, or read from a checkpoint.

Shapes: B images, R regions, D features of a region.
"""

from torch import nn

from decoders import Decoder
from encoders import Encoder
from graph import RegionGraph
from layers import Dropout, start_linear
from utils import InputError, first_line, load_state
from vocabulary import Vocabulary

CHECKPOINT_FORMAT = 3
CHECKPOINT_KEYS = {"format", "model", "image_size", "words", "settings"}  # what inference needs

# The settings of train.py that shape a model: what a checkpoint needs to be built again.
MODEL_SETTINGS = (
    "encoder",
    "encoder_layer",
    "grid_size",
    "region_dim",
    "graph_layers",
    "graph_neighbours",
    "graph_heads",
    "cell",
    "attention",
    "embedding_size",
    "attention_size",
    "hidden_size",
    "dropout",
)


class Captioner(nn.Module):
    """An encoder and a decoder, between them a dense layer and graph layers on the regions.

    `image_size` is the side in pixels of the photos that it was trained on, `resize` how they were made square
    (`photos.to_square`).
    """

    def __init__(self, encoder, region_layer, graph, decoder, image_size, resize="squash"):
        super().__init__()
        self.encoder, self.region_layer, self.graph, self.decoder = encoder, region_layer, graph, decoder
        self.image_size, self.resize = image_size, resize

    def regions(self, images):
        """images (B, 3, h, w) uint8, or features (B, R, F) from the cache -> regions for the decoder (B, R, D)."""
        return self.trace(images)[0]

    def trace(self, images):
        """As `regions`, with the graph's edges, as `RegionGraph.forward` returns them."""
        features = images.float() if images.ndim == 3 else self.encoder(images)
        return self.graph(self.region_layer(features), features)

    def forward(self, images, words, lengths, sampling=0.0):
        """Teacher forcing, as `Decoder.forward`."""
        return self.decoder(self.regions(images), words, lengths, sampling)


def build_captioner(settings, vocabulary_size, image_size, encoder_weights, resize):
    """A new captioner of the settings named in MODEL_SETTINGS, a dictionary."""
    encoder = Encoder(
        settings["encoder"], settings["encoder_layer"], encoder_weights, settings["grid_size"], image_size
    )
    dropout = settings["dropout"]
    region_size, region_layer = encoder.region_size, nn.Identity()
    if settings["region_dim"]:
        region_size = settings["region_dim"]
        region_layer = nn.Sequential(nn.Linear(encoder.region_size, region_size), nn.ReLU(), Dropout(dropout))
        start_linear(region_layer[0])
    layers, neighbours, heads = settings["graph_layers"], settings["graph_neighbours"], settings["graph_heads"]
    if layers and region_size % heads:
        raise InputError(f"--graph_heads {heads}: the {region_size} features of a region cannot be shared out evenly")
    graph = RegionGraph(region_size, layers, neighbours, heads, dropout)
    sizes = (settings["embedding_size"], settings["attention_size"], settings["hidden_size"])
    decoder = Decoder(vocabulary_size, region_size, *sizes, dropout, settings["cell"], settings["attention"])
    return Captioner(encoder, region_layer, graph, decoder, image_size, resize)


def load_captioner(path, device):
    """Read what a checkpoint holds for inference: captioner in eval mode, vocabulary, settings of its training."""
    checkpoint = load_checkpoint(path, device)
    captioner, vocabulary = restore_captioner(checkpoint, path)
    return captioner.to(device).eval(), vocabulary, checkpoint["settings"]


def restore_captioner(checkpoint, path):
    """Build a checkpoint's captioner and vocabulary; InputError where it is at odds with itself."""
    vocabulary = Vocabulary(checkpoint["words"])
    rows = len(checkpoint["model"]["decoder.embedding.weight"])
    if rows != len(vocabulary):
        raise InputError(f"{path} names {len(vocabulary)} words but its model has {rows}: it is not one run's file")
    settings = checkpoint["settings"]
    resize = checkpoint.get("resize", "squash")  # an earlier version knew no other
    captioner = build_captioner(settings, rows, checkpoint["image_size"], encoder_weights="", resize=resize)
    captioner.encoder.pretrained = bool(settings["encoder_weights"])
    try:
        captioner.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise InputError(f"{path}: its weights do not fit its settings: {first_line(error)}") from None
    return captioner, vocabulary


def load_checkpoint(path, device="cpu"):
    """Read a checkpoint of train.py as the dictionary that it is; InputError for any other file."""
    checkpoint = load_state(path, device)
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= CHECKPOINT_KEYS:
        raise InputError(f"{path} is not a checkpoint of train.py")
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise InputError(
            f"{path} has checkpoint format {checkpoint['format']}, this code reads {CHECKPOINT_FORMAT}: train it anew"
        )
    return checkpoint
