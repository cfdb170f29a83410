"""Encoders against torchvision's own networks, and what cannot be had."""

import pytest
import torch
import torchvision

from encoders import Encoder
from utils import InputError


def test_encoder_equals_torchvision(tmp_path):
    network = torchvision.models.resnet18(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    encoder = Encoder("resnet18", weights=str(tmp_path / "weights.pth")).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    for name, child in network.named_children():
        if name not in ("avgpool", "fc"):
            x = child(x)
    torch.testing.assert_close(encoder(images), x.flatten(2).transpose(1, 2), rtol=1e-3, atol=1e-4)


def test_grid_size_pools_the_grid():
    encoder = Encoder("resnet18", "layer1", grid_size=3)
    assert encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 9, 64)


def batch_norm_moves(encoder):
    before = encoder.network.bn1.running_mean.clone()
    encoder.train()(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8))
    return not torch.equal(before, encoder.network.bn1.running_mean)


def test_batch_norm_of_pretrained_weights_never_moves(tmp_path):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "weights.pth")
    assert not batch_norm_moves(Encoder("resnet18", "layer1", str(tmp_path / "weights.pth")))
    assert batch_norm_moves(Encoder("resnet18", "layer1"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet1000",), "--encoder resnet1000"),
        (("resnet18", "layer9"), "--encoder_layer layer9"),
        (("resnet18", "avgpool.nothing"), "--encoder_layer avgpool.nothing"),
        (("resnet18", "fc"), "not a grid"),
        (("swin_t", "features"), "not a grid"),
        (("vgg11", "", "", 0, 16), "vgg11 does not take images of 16 pixels"),
        (("resnet18", "", "missing.pth"), "missing.pth"),
    ],
)
def test_encoders_that_cannot_be_had_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        Encoder(*arguments)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(InputError, match="not the weights of this network"):
        Encoder("resnet34", weights=str(tmp_path / "weights.pth"))


def test_weights_that_cannot_be_downloaded_say_how_to_pass_a_file(monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(InputError, match=r"resnet18 cannot be downloaded \(no network\).*--encoder_weights FILE"):
        Encoder("resnet18", weights="imagenet")
