"""Encoders: any torchvision classification network, cut at a layer whose output is a grid of regions.

Shapes: B images, R regions, F features of a region.
"""

import copy
import hashlib
import math
import operator
import re
import urllib.error
from typing import Any

import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.feature_extraction import create_feature_extractor

from common.files import safe_load
from utils import InputError, first_line

# The last layer of each family that still has a grid, by the prefix of the networks' names.
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

    Attributes: num_regions R, feature_dim F, and `pretrained`, which keeps BatchNorm in eval mode.

    Args:
        name: torchvision's name of the network, such as "resnet101".
        layer: name of the layer to cut at, "" for the family's last one with a grid.
        weights: "imagenet", "" (random) or the path of a torchvision state dict.
        grid_size: pool the grid to grid_size x grid_size (14 in "Show, Attend and Tell"), 0 keeps the network's own.
        image_size: side of the images in pixels.

    Raises InputError for a network or layer that does not exist, or weights that cannot be loaded.
    """

    mean: Tensor  # (3, 1, 1) of the network's training images
    std: Tensor  # (3, 1, 1)

    def __init__(
        self, name: str, *, layer: str = "", weights: str = "", grid_size: int = 0, image_size: int = 224
    ) -> None:
        super().__init__()
        if name not in torchvision.models.list_models(module=torchvision.models):
            raise InputError(f"--encoder {name}: torchvision has no such classification network")
        self.name, self.layer, self.grid_size = name, layer or _default_layer(name), grid_size
        self.pretrained = bool(weights)
        network = build_network(name, weights, image_size)
        try:
            self.network = create_feature_extractor(network, {self.layer: "grid"})
        except ValueError:
            names = " ".join(child for child, _ in network.named_children())
            raise InputError(f"--encoder_layer {self.layer}: {name} has {names} and their parts") from None
        if weights not in ("", "imagenet"):
            load_encoder_weights(self.network, weights)
        convert_conv2d_weight_memory_format(self.network, torch.channels_last)
        preset = imagenet_weights(name).transforms()
        self.register_buffer("mean", torch.tensor(preset.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preset.std).view(3, 1, 1), persistent=False)
        self.num_regions, self.feature_dim = self._infer_output_shape(image_size)

    def _infer_output_shape(self, image_size: int) -> tuple[int, int]:
        """Return R and F of the output for a black image."""
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

    def fingerprint(self) -> tuple[str, str, int, str]:
        """Return what determines the features: network, layer, grid, and a digest of weights and buffers."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return self.name, self.layer, self.grid_size, digest.hexdigest()

    def train(self, mode: bool = True) -> "Encoder":
        """Set training mode, but keep frozen modules and pretrained BatchNorm in eval mode.

        Small batches would corrupt BatchNorm's running statistics.
        """
        super().train(mode)
        for module in self.network.modules():
            parameters = list(module.parameters())
            frozen = parameters and not any(parameter.requires_grad for parameter in parameters)
            if frozen or (self.pretrained and isinstance(module, nn.modules.batchnorm._BatchNorm)):
                module.eval()
        return self

    def unfreeze_from(self, block: str) -> None:
        """Train the block with this name (layer3, features.10, ...) and all later ones; "" trains everything.

        Raises InputError if the network has no such block with weights.
        """
        reached = not block
        for name, parameter in self.network.named_parameters():  # in the order of the forward pass
            reached = reached or name.startswith(f"{block}.")
            parameter.requires_grad_(reached)
        if not reached:
            names = dict.fromkeys(name.split(".")[0] for name, _ in self.network.named_parameters() if "." in name)
            raise InputError(f"--unfreeze_from {block}: {self.name} has {' '.join(names)} and their parts")

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, h, w) uint8 -> regions (B, R, F) in row-major order."""
        images = (images.float() / 255 - self.mean) / self.std
        grid = self._grid(images.contiguous(memory_format=torch.channels_last))  # (B, F, rows, columns)
        if self.grid_size:
            grid = functional.adaptive_avg_pool2d(grid, self.grid_size)
        return grid.flatten(2).transpose(1, 2)  # (B, R, F)

    def _grid(self, images: Tensor) -> Tensor:
        """Compute the layer's output, dropping the class token of a vision transformer's tokens (B, 1 + R, F)."""
        grid = self.network(images)["grid"]
        side = math.isqrt(grid.shape[1] - 1)
        if grid.ndim == 3 and grid.shape[1] == 1 + side**2:  # the class token is the first
            grid = grid[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        return grid


class NoEncoder(nn.Module):
    """Stand-in for an `Encoder` if a prepared folder holds region features of F numbers each."""

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.feature_dim, self.num_regions = feature_dim, 0

    def fingerprint(self) -> tuple[str, str, int, str]:
        """Return a fingerprint like `Encoder.fingerprint`; the features are the folder's."""
        return "region features", "", self.feature_dim, ""


def folded_encoder(encoder: Encoder) -> Encoder:
    """Return a copy of an encoder for inference only, in eval mode and a fifth faster.

    Each BatchNorm that follows a convolution is folded into its weights: w' = w gamma / sigma and
    b' = (b - mu) gamma / sigma + beta. Additions to the convolution's output, such as a ResNet's shortcut, are in
    place. Features differ in their last bits.
    """
    encoder = copy.deepcopy(encoder).eval()
    if not any(isinstance(module, nn.BatchNorm2d) for module in encoder.network.modules()):
        return encoder
    network = fx.symbolic_trace(encoder.network)  # the graph of eval mode, down to torch's own layers

    def layer(node: fx.Node) -> nn.Module | None:
        return network.get_submodule(str(node.target)) if node.op == "call_module" else None

    for node in list(network.graph.nodes):
        conv = node.args[0] if node.args else None
        if not isinstance(conv, fx.Node) or len(conv.users) > 1:
            continue
        conv_layer, next_layer = layer(conv), layer(node)
        if not isinstance(conv_layer, nn.Conv2d):
            continue
        if isinstance(next_layer, nn.BatchNorm2d):
            network.set_submodule(str(conv.target), fuse_conv_bn_eval(conv_layer, next_layer))
            node.replace_all_uses_with(conv)
            network.graph.erase_node(node)
        elif node.target is operator.add:
            node.target = operator.iadd
    network.delete_all_unused_submodules()
    network.recompile()
    encoder.network = network
    return encoder


def _default_layer(name: str) -> str:
    """Return the last grid layer of a network's family. Raises InputError for an unknown family."""
    for family, layer in GRID_LAYERS.items():
        if name.removeprefix("wide_").startswith(family):
            return layer
    raise InputError(f"--encoder {name}: give the layer to take as --encoder_layer")


def imagenet_weights(name: str) -> torchvision.models.WeightsEnum:
    """Return torchvision's first ImageNet weights of a network, those of the published results."""
    known = torchvision.models.get_model_weights(name)
    return known["IMAGENET1K_V1" if "IMAGENET1K_V1" in known.__members__ else "DEFAULT"]


def build_network(name: str, weights: str, image_size: int) -> nn.Module:
    """Build a torchvision network, with its ImageNet weights for "imagenet" and random ones otherwise.

    Raises InputError if the weights cannot be downloaded or do not fit the image size.
    """
    options: dict[str, Any] = {}
    if name in ("inception_v3", "googlenet"):  # transform_input: their ImageNet weights expect another normalization
        options = {"transform_input": True, "init_weights": not weights}
    if name.startswith("vit") and weights != "imagenet":  # the ImageNet weights fix the image size
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
            f"the ImageNet weights of {name} cannot be downloaded ({first_line(error)}): download "
            f"{imagenet_weights(name).url} on another machine and pass the file as --encoder_weights FILE"
        ) from None


def load_encoder_weights(network: nn.Module, path: str) -> None:
    """Load a torchvision state dict. Weights of the layers behind the cut are not needed.

    Raises InputError if the file is not a state dict of this network.
    """
    weights = safe_load(path)
    if not isinstance(weights, dict):
        raise InputError(f"--encoder_weights {path}: not a state dict of weights")
    # DenseNet's files have the parameter names of torchvision before 0.3.
    weights = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name): weights[name] for name in weights}
    expected = network.state_dict()
    missing = [name for name in expected if name not in weights and not name.endswith("num_batches_tracked")]
    wrong = [name for name in expected if name in weights and expected[name].shape != weights[name].shape]
    if missing or wrong:
        example = f"{missing[0]} is missing" if missing else f"{wrong[0]} has another shape"
        raise InputError(f"--encoder_weights {path}: not the weights of this network, {example}")
    network.load_state_dict({name: weights[name] for name in expected if name in weights}, strict=False)
