"""Encoders against torchvision's networks, and the errors for those that cannot be built."""

import pytest
import torch
import torchvision
from torch import nn

from modules.encoders import Encoder, folded_encoder
from utils import InputError


@pytest.fixture
def resnet18(tmp_path):
    """torchvision's network with random weights, and a file of them."""
    network = torchvision.models.resnet18(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    return network, str(tmp_path / "weights.pth")


def test_encoder_equals_torchvision(resnet18):
    network, weights = resnet18
    encoder = Encoder("resnet18", weights=weights).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    for name, child in network.named_children():
        if name not in ("avgpool", "fc"):
            x = child(x)
    torch.testing.assert_close(encoder(images), x.flatten(2).transpose(1, 2), rtol=1e-3, atol=1e-4)


def test_batch_norm_moves_with_random_weights_alone(resnet18):
    for weights in ("", resnet18[1]):
        encoder = Encoder("resnet18", layer="layer1", weights=weights)
        before = encoder.network.bn1.running_mean.clone()
        encoder.train()(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8))
        assert torch.equal(before, encoder.network.bn1.running_mean) == bool(weights)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet1000", {}, "--encoder resnet1000"),
        ("alexnet", {}, "--encoder_layer"),
        ("resnet18", {"layer": "layer9"}, "--encoder_layer layer9"),
        ("resnet18", {"layer": "avgpool.nothing"}, "--encoder_layer avgpool.nothing"),
        ("resnet18", {"layer": "fc"}, "not a grid"),
        ("vit_b_32", {"layer": "getitem"}, "--encoder_layer getitem: not a grid"),
        ("vit_b_32", {"image_size": 100}, "vit_b_32 does not take images of 100 pixels: Input shape indivisible"),
        ("swin_t", {"layer": "features"}, "not a grid"),
        ("vgg11", {"image_size": 16}, "vgg11 does not take images of 16 pixels"),
        ("resnet18", {"weights": "missing.pth"}, "missing.pth"),
    ],
)
def test_encoders_that_cannot_be_built_are_named(name, options, message):
    with pytest.raises(InputError, match=message):
        Encoder(name, **options)


def test_weights_of_another_network_are_refused(resnet18):
    with pytest.raises(InputError, match="not the weights of this network"):
        Encoder("resnet34", weights=resnet18[1])


def test_an_error_of_a_download_says_how_to_pass_a_file(monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(InputError, match=r"resnet18 cannot be downloaded \(no network\).*--encoder_weights FILE"):
        Encoder("resnet18", weights="imagenet")


def test_the_tokens_of_a_vision_transformer_become_a_grid_in_row_major_order():
    """Patch embeddings, before any attention layer, of an image whose patches grow brighter row by row."""
    encoder = Encoder("vit_b_32", layer="encoder.dropout").eval()
    patches = torch.arange(49, dtype=torch.uint8).view(7, 7) * 5
    image = patches.repeat_interleave(32, 0).repeat_interleave(32, 1).expand(1, 3, 224, 224)
    regions = encoder(image) - encoder.network.encoder.pos_embedding[:, 1:]
    assert encoder.num_regions == 49 and regions.shape == (1, 49, 768)
    steps = regions[0].diff(dim=0)
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=1e-2, atol=1e-3)
    assert steps.abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "size", "side", "features"),
    [("swin_t", 224, 7, 768), ("vit_b_16", 224, 14, 768), ("inception_v3", 299, 8, 2048), ("vgg11", 224, 7, 512)],
)
def test_the_default_layer_has_the_grid_of_the_papers(name, size, side, features):
    encoder = Encoder(name, image_size=size)
    assert (encoder.num_regions, encoder.feature_dim) == (side * side, features)


@pytest.mark.parametrize(("block", "frozen"), [("", ()), ("layer2", ("conv1", "bn1", "layer1"))])
def test_unfreeze_from_a_block_leaves_earlier_blocks_and_their_batch_norm_as_they_are(block, frozen):
    encoder = Encoder("resnet18", layer="layer3")
    encoder.unfreeze_from(block)
    for name, parameter in encoder.network.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen), name
    before = {name: buffer.clone() for name, buffer in encoder.network.named_buffers()}
    encoder.train()(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8))
    for name, buffer in encoder.network.named_buffers():
        assert torch.equal(buffer, before[name]) == name.startswith(frozen), name


@pytest.mark.parametrize("block", ["layer9", "relu", "layer4"])
def test_an_unknown_block_is_named(block):
    with pytest.raises(InputError, match=f"--unfreeze_from {block}: resnet18 has conv1 bn1 layer1 layer2 layer3 and"):
        Encoder("resnet18", layer="layer3").unfreeze_from(block)


def batch_norms(encoder):
    return [module for module in encoder.network.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize(
    ("name", "num_left"),  # DenseNet has BatchNorm before convolutions, too
    [("resnet18", 0), ("densenet121", 62), ("mobilenet_v3_small", 0), ("regnet_x_400mf", 0), ("vit_b_32", 0)],
)
def test_folded_batch_norm_changes_only_last_bits_and_only_the_copy(name, num_left):
    torch.manual_seed(0)
    encoder = Encoder(name, image_size=64)
    for norm in batch_norms(encoder):
        for tensor, low, high in ((norm.running_mean, -0.1, 0.1), (norm.running_var, 0.5, 1.5)):
            tensor.uniform_(low, high)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.1, 0.1)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    folded = folded_encoder(encoder)
    assert encoder.training and not folded.training
    assert encoder.state_dict().keys() == before.keys()
    assert all(torch.equal(before[key], tensor) for key, tensor in encoder.state_dict().items())
    assert len(batch_norms(folded)) == num_left
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(folded(images), encoder.eval()(images), rtol=1e-4, atol=1e-4)
