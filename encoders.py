"""Encoders: any torchvision classification network up to a layer with a grid, as regions of a photo.

Shapes: B images, R regions, F features of a region.
"""

import math
import re
import urllib.error

import torch
import torchvision
from torch import nn
from torch.nn import functional
from torchvision.models.feature_extraction import create_feature_extractor

from utils import InputError, first_line, load_state

# The last layer of each family that still has a grid; its children's names begin like this.
GRID_LAYERS = {
    "resnet": "layer4",
    "resnext": "layer4",
    "vgg": "features",
    "densenet": "features",
    "mobilenet": "features",
    "efficientnet": "features",
    "convnext": "features",
    "squeezenet": "features",
    "mnasnet": "layers",
    "shufflenet": "conv5",
    "regnet": "trunk_output",
    "inception": "Mixed_7c",
    "googlenet": "inception5b",
    "swin": "permute",
    "vit": "encoder",
}


class Encoder(nn.Module):
    """A torchvision classification network up to a layer with a grid of features.

    Args:
        name: torchvision's name of the network, such as "resnet101".
        layer: name of the layer to take, "" for the family's last one with a grid.
        weights: "imagenet", "" (random) or the path of a torchvision state dict.
        grid_size: pool the grid to grid_size x grid_size (the paper: 14), 0 keeps the network's own.
        image_size: side in pixels of the images to come.

    Raises InputError for a name, layer or weights that cannot be had.
    """

    def __init__(self, name, layer="", weights="", grid_size=0, image_size=224):
        super().__init__()
        if name not in torchvision.models.list_models(module=torchvision.models):
            raise InputError(f"--encoder {name}: torchvision has no such classification network")
        family = next((family for family in GRID_LAYERS if name.removeprefix("wide_").startswith(family)), None)
        if not layer and not family:
            raise InputError(f"--encoder {name}: give the layer to take as --encoder_layer")
        self.name, self.layer, self.grid_size = name, layer or GRID_LAYERS[family], grid_size
        self.pretrained = bool(weights)
        network = build_network(name, weights, image_size)
        try:
            self.network = create_feature_extractor(network, {self.layer: "grid"})
        except ValueError:
            names = " ".join(child for child, _ in network.named_children())
            raise InputError(f"--encoder_layer {self.layer}: {name} has {names} and their parts") from None
        if weights not in ("", "imagenet"):
            load_encoder_weights(self.network, weights)
        self.network = self.network.to(memory_format=torch.channels_last)
        preset = imagenet_weights(name).transforms()
        self.register_buffer("mean", torch.tensor(preset.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preset.std).view(3, 1, 1), persistent=False)
        self.number_of_regions, self.region_size = self._dry_run(image_size)

    def _dry_run(self, image_size):
        """Read R and F off a photo's way through."""
        self.eval()
        try:
            with torch.inference_mode():
                grid = self._grid(torch.zeros(1, 3, image_size, image_size))
        except AttributeError:
            raise InputError(f"--encoder_layer {self.layer}: not a grid of features") from None
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"{self.name} does not take images of {image_size} pixels: {first_line(error)}") from None
        if grid.ndim != 4 or grid.shape[2] != grid.shape[3]:
            raise InputError(f"--encoder_layer {self.layer}: not a grid of features, its shape is {tuple(grid.shape)}")
        self.train()
        return (self.grid_size or grid.shape[2]) ** 2, grid.shape[1]

    def train(self, mode=True):
        """Keep frozen parts in eval mode, and BatchNorm of pretrained weights, whose statistics small batches spoil."""
        super().train(mode)
        for module in self.network.modules():
            parameters = list(module.parameters())
            frozen = parameters and not any(parameter.requires_grad for parameter in parameters)
            if frozen or (self.pretrained and isinstance(module, nn.modules.batchnorm._BatchNorm)):
                module.eval()
        return self

    def train_from(self, block):
        """Train the part named `block` (layer3, features.10, ...) and all behind it; "" trains everything.

        Raises InputError where the network has no such part with weights.
        """
        started = not block
        for name, parameter in self.network.named_parameters():  # in the order in which they are used
            started = started or name.startswith(f"{block}.")
            parameter.requires_grad_(started)
        if not started:
            names = dict.fromkeys(name.split(".")[0] for name, _ in self.network.named_parameters() if "." in name)
            raise InputError(f"--fine_tune_from {block}: {self.name} has {' '.join(names)} and their parts")

    def forward(self, images):
        """images (B, 3, h, w) uint8 -> regions (B, R, F), row by row."""
        images = (images.float() / 255 - self.mean) / self.std
        grid = self._grid(images.contiguous(memory_format=torch.channels_last))  # (B, F, rows, columns)
        if self.grid_size:
            grid = functional.adaptive_avg_pool2d(grid, self.grid_size)
        return grid.flatten(2).transpose(1, 2)  # (B, R, F)

    def _grid(self, images):
        """The layer's output; of a transformer's tokens those of the patches, row by row as they lie in the photo."""
        grid = self.network(images)["grid"]
        side = math.isqrt(grid.shape[1] - 1)
        if grid.ndim == 3 and grid.shape[1] == 1 + side**2:  # the class token stands first
            grid = grid[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        return grid


def imagenet_weights(name):
    """torchvision's first ImageNet weights of a network, those behind the field's published numbers."""
    known = torchvision.models.get_model_weights(name)
    return known["IMAGENET1K_V1"] if "IMAGENET1K_V1" in known.__members__ else known.DEFAULT


def build_network(name, weights, image_size):
    """A torchvision network, with its ImageNet weights where "imagenet" is asked for."""
    options = {}
    if name in ("inception_v3", "googlenet"):  # they expect other colours, and make them when told to
        options = {"transform_input": True, "init_weights": not weights}
    if name.startswith("vit") and weights != "imagenet":  # those weights are for images of one size
        options = {"image_size": image_size}
    try:
        if weights != "imagenet":
            return torchvision.models.get_model(name, weights=None, **options)
        network = torchvision.models.get_model(name, weights=imagenet_weights(name), **options)
        if getattr(network, "image_size", image_size) != image_size:
            raise AssertionError(f"its ImageNet weights are for {network.image_size} pixels")
        return network
    except AssertionError as error:
        raise InputError(f"{name} does not take images of {image_size} pixels: {error}") from None
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise InputError(
            f"the ImageNet weights of {name} cannot be downloaded ({first_line(error)}): fetch "
            f"{imagenet_weights(name).url} where there is a network and give the file as --encoder_weights FILE"
        ) from None


def load_encoder_weights(network, path):
    """Load a torchvision state dict; what lies behind the layer that is taken may be missing."""
    state = load_state(path)
    if not isinstance(state, dict):
        raise InputError(f"--encoder_weights {path}: not a state dict of weights")
    # The files of DenseNet spell some names as torchvision did before 0.3.
    state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name): state[name] for name in state}
    own = network.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing or wrong:
        example = f"{missing[0]} is missing" if missing else f"{wrong[0]} has another shape"
        raise InputError(f"--encoder_weights {path}: not the weights of this network, {example}")
    network.load_state_dict({name: state[name] for name in own if name in state}, strict=False)
