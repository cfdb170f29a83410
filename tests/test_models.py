"""Captioners and their checkpoints."""

import pytest
import torch

from models import load_captioner
from utils import InputError


def test_a_checkpoint_of_another_vocabulary_names_both_sizes(run_folder, tmp_path):
    checkpoint = torch.load(run_folder / "best.pt", weights_only=True)
    rows = len(checkpoint["words"])
    checkpoint["words"] = checkpoint["words"][:-1]
    torch.save(checkpoint, tmp_path / "other.pt")
    with pytest.raises(InputError, match=f"names {rows - 1} words but its model has {rows}"):
        load_captioner(tmp_path / "other.pt", "cpu")


def test_a_checkpoint_gives_back_the_same_model(run_folder):
    captioner, vocabulary, _ = load_captioner(run_folder / "best.pt", "cpu")
    saved = torch.load(run_folder / "best.pt", weights_only=True)
    assert vocabulary.words == saved["words"] and not captioner.training
    for name, tensor in captioner.state_dict().items():
        assert torch.equal(tensor, saved["model"][name]), name
