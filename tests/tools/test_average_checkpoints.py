"""The mean of models that share a start."""

import pytest
import torch

from models import load_captioner
from tools import average_checkpoints


@pytest.fixture
def models(run_folder, tmp_path):
    """Two checkpoints of one model that differ in the weights of the decoder."""
    paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for path in paths:
        checkpoint = torch.load(run_folder / "best.pt", weights_only=True)
        checkpoint["settings"]["init_from"] = "start.pt"
        if path is paths[1]:
            checkpoint["model"] = {
                name: weight + 1 if name.startswith("decoder.") else weight
                for name, weight in checkpoint["model"].items()
            }
        torch.save(checkpoint, path)
    return paths


def change(path, **values):
    """Change parts of a checkpoint's file."""
    torch.save(torch.load(path, weights_only=True) | values, path)


def test_weights_are_averaged(command, models, tmp_path):
    output = tmp_path / "soup" / "best.pt"
    status, out, err = command(average_checkpoints, *models, *models[1:], "--output", output)
    assert status == 0 and out == f"{output}: the mean of 3 models\n", err
    first, found = (load_captioner(path, "cpu").state_dict() for path in (models[0], output))
    assert found.keys() == first.keys()
    for name, weight in found.items():
        shift = 2 / 3 if name.startswith("decoder.") else 0
        torch.testing.assert_close(weight, first[name] + shift)
    before = output.read_bytes()
    status, _, err = command(average_checkpoints, *models, "--output", output)
    assert status == 2 and "--overwrite" in err and output.read_bytes() == before
    assert command(average_checkpoints, *models, "--output", output, "--overwrite")[0] == 0


def test_another_file_is_not_replaced(command, models, tmp_path):
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"a photo")
    status, _, err = command(average_checkpoints, *models, "--output", photo, "--overwrite")
    assert status == 2 and "photo.jpg" in err and err.count("\n") == 1 and photo.read_bytes() == b"a photo"


def test_an_equal_weight_keeps_every_bit(models):
    weight = torch.tensor([0.1, 1e-30, 3.0])
    found = average_checkpoints.average_weights([{"a": weight, "n": torch.tensor(2)}] * 3)
    assert torch.equal(found["a"], weight) and found["n"] == 2


def test_what_has_no_common_meaning_is_refused(command, models, run_folder, tmp_path):
    a, b = models
    content = torch.load(b, weights_only=True)
    weights, words, settings = content["model"], content["words"], content["model_settings"]

    def refused(*paths, **changes):
        if changes:
            change(b, **changes)
        status, _, err = command(average_checkpoints, *paths, "--output", tmp_path / "soup.pt")
        assert status == 2 and err.count("\n") == 1 and not (tmp_path / "soup.pt").exists()
        return err

    assert "two checkpoints or more" in refused(a)
    assert "give its best.pt" in refused(a, run_folder / "last.pt")
    assert "trained from scratch" in refused(a, run_folder / "best.pt")
    other = settings | {"graph_knn": settings["graph_knn"] + 1}
    assert "graph_knn" in refused(a, b, model_settings=other)
    assert "they differ in words" in refused(a, b, model_settings=settings, words=words[:-2] + words[:-3:-1])
    assert "fine_tune_encoder" in refused(a, b, words=words, fine_tune_encoder=False)
    change(a, fine_tune_encoder=False)
    name = next(name for name in weights if name.startswith("encoder."))
    assert "different frozen encoders" in refused(a, b, model=weights | {name: weights[name] + 1})
