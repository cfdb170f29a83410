"""The index of a prepared folder's training photos."""

import numpy as np
import torch

from datasets import CaptionDataset
from evaluation.consensus import CaptionIndex
from models import load_captioner
from preparation.storage import read_metadata
from tools import index_captions


def test_the_index_holds_the_training_photos(command, shapes, run_folder, tmp_path):
    arguments = ["--checkpoint", run_folder / "best.pt", "--data_folder", shapes, "--output", tmp_path / "index.pt"]
    status, output, _ = command(index_captions, *arguments)
    captioner = load_captioner(run_folder / "best.pt", "cpu")
    dataset, index = CaptionDataset(shapes, "train", captioner.vocabulary), CaptionIndex.load(tmp_path / "index.pt")
    assert status == 0 and f"{len(dataset)} photos" in output
    assert index.captions.decode() == dataset.references.decode()
    assert index.encoder == captioner.encoder.fingerprint() and index.data_digest == read_metadata(shapes)["digest"]
    with torch.no_grad():
        images = torch.from_numpy(np.stack([dataset[i, False][1] for i in range(len(dataset))]))
        means = captioner.encoder(images).mean(dim=1)
    torch.testing.assert_close(index.center, means.mean(dim=0), rtol=1e-2, atol=1e-3)
    norms = index.features.float().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=2e-3)


def test_an_index_needs_no_objects(command, without_objects, run_folder, tmp_path):
    checkpoint = torch.load(run_folder / "best.pt", weights_only=True)
    checkpoint["model_settings"]["regions"] = "objects"
    torch.save(checkpoint, tmp_path / "best.pt")
    arguments = ("--checkpoint", tmp_path / "best.pt", "--data_folder", without_objects)
    assert command(index_captions, *arguments, "--output", tmp_path / "index.pt")[0] == 0


def test_only_an_index_is_replaced_and_only_when_asked(command, shapes, run_folder, tmp_path):
    arguments = ["--checkpoint", run_folder / "best.pt", "--data_folder", shapes, "--output", tmp_path / "index.pt"]
    mine = {"text": b"mine", "a checkpoint": (run_folder / "best.pt").read_bytes()}
    for content in mine.values():
        (tmp_path / "index.pt").write_bytes(content)
        for overwrite in ([], ["--overwrite"]):
            status, _, error = command(index_captions, *arguments, *overwrite)
            assert status == 2 and error.count("\n") == 1
            assert "is not an index of captions and is not replaced: give another --output" in error
        assert (tmp_path / "index.pt").read_bytes() == content
    torch.save({"index_format": 0}, tmp_path / "index.pt")  # of another version
    status, _, error = command(index_captions, *arguments)
    assert status == 2 and error.count("\n") == 1 and "give --overwrite or another --output" in error
    assert command(index_captions, *arguments, "--overwrite")[0] == 0
    CaptionIndex.load(tmp_path / "index.pt")
