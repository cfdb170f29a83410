"""tools/export_onnx.py: ONNX Runtime computes what torch does, and docs/onnx_example.py captions without torch."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import caption
from conftest import SMALL, beams, build
from decoding.beam_search import beam_search
from preparation.images import load_image
from text.vocabulary import SPECIAL_TOKENS
from tools import export_onnx

EXAMPLE = Path(__file__).parent.parent.parent / "docs" / "onnx_example.py"
WORDS = [*SPECIAL_TOKENS, *"abcdefghijklmnop"]


@pytest.fixture(scope="module")
def onnxruntime():
    """The package; tests that need it are skipped without."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    return pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def export(settings, command, monkeypatch, folder):
    """Export a random model; return its captioner and the content of vocabulary.json."""
    torch.manual_seed(3)
    feature_dim = 6 if settings["regions"] == "features" else 0
    captioner = build(replace(SMALL, fine_tune_encoder=not feature_dim, heads=4, **settings), WORDS, 32, feature_dim)
    for parameter in captioner.eval().decoder.parameters():
        parameter.data *= 3  # far from uniform, so that captions differ
    monkeypatch.setattr(export_onnx, "load_captioner", lambda path, device: captioner)
    status, out, err = command(export_onnx, "--output_folder", folder)
    assert status == 0 and "largest difference from torch" in out, err
    return captioner, json.loads((folder / "vocabulary.json").read_text())


def greedy(model, encoder, step, inputs, count):
    """Return the word ids (B, count) of the most probable words; checks that two captions of an image are alike."""
    names = ["regions", *model["keys"], *model["state"]]
    tensors = dict(zip(names, encoder.run(names, inputs), strict=True))
    tensors |= {name: tensors[name].repeat(2, axis=model["captions_axis"]) for name in model["state"]}
    captions = np.full((len(tensors["regions"]), 2, 1), model["start"])
    for t in range(count):
        log_probs, alpha, *state = step.run(None, {"words": captions[..., -1]} | tensors)
        np.testing.assert_allclose(alpha.sum(axis=-1), 1, rtol=1e-5)
        np.testing.assert_allclose(np.exp(log_probs).sum(axis=-1), 1, rtol=1e-5)
        log_probs[..., model["banned"] + [model["end"]] * (t == 0)] = -np.inf
        captions = np.concatenate([captions, log_probs.argmax(axis=-1)[..., None]], axis=-1)
        tensors |= zip(model["state"], state, strict=True)
    assert (captions[:, 0] == captions[:, 1]).all()
    return captions[:, 0, 1:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"decoder": "adaptive", "layers": 2, "image_first": True, "regions": "features"},
        {"attention": "none", "cell": "gru", "regions": "features", "graph_layers": 1, "graph_edges": "similar"},
        {"decoder": "up_down", "regions": "features", "graph_layers": 1, "graph_layer": "gcn", "graph_edges": "all"},
        {"decoder": "sgrvinod", "regions": "both", "graph_layers": 1, "graph_edges": "spatial"},
        {"decoder": "transformer", "regions": "features", "encoder_layers": 1, "geometry": True, "box_features": True},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_greedy_captions_are_those_of_torch(command, monkeypatch, onnxruntime, tmp_path, settings):
    captioner, model = export(settings, command, monkeypatch, tmp_path / "export")
    encoder, step = (onnxruntime.InferenceSession(tmp_path / "export" / name) for name in export_onnx.FILES[:2])
    generator = torch.Generator().manual_seed(1)
    for B, N in ((1, 1), (5, 9)):  # other sizes than those that were exported
        inputs = torch.randint(0, 256, (B, 3, 32, 32), dtype=torch.uint8, generator=generator)
        if captioner.uses_region_features:
            inputs = torch.randn(B, N, 6, generator=generator)
        boxes = torch.rand(B, N, 2, 2, generator=generator).sort(dim=2).values.flatten(2)
        feed = {name: x.numpy() for name, x in zip(model["inputs"], (inputs, boxes), strict=False)}
        with torch.no_grad():
            encoded = captioner.encode(inputs, boxes)
            expected, _ = beam_search(captioner.decoder, encoded.regions, beams(1, 8), encoded.mask)
        found = greedy(model, encoder, step, feed, expected.shape[2])
        ends = (found == model["end"]).cumsum(axis=1) > 0
        assert np.where(ends, model["end"], found).tolist() == expected[:, 0].tolist()


@pytest.fixture(scope="module")
def export_of_run(run_folder, tmp_path_factory, onnxruntime):
    """The folder of an export of a trained model."""
    folder = tmp_path_factory.mktemp("export") / "small"
    export_onnx.main(export_onnx.Settings(checkpoint=str(run_folder / "best.pt"), output_folder=str(folder)))
    return folder


def run_example(tmp_path, *arguments):
    """Run the example in an environment without torch."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')")
    return subprocess.run(
        [sys.executable, EXAMPLE, *arguments],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_example_captions_as_caption_py_without_torch(command, export_of_run, run_folder, shapes, tmp_path):
    photos = sorted((shapes / "photos").glob("*.png"))[:6]
    wide = tmp_path / "wide.jpg"
    Image.open(photos[0]).resize((300, 90)).save(wide)
    photos.append(wide)
    arguments = ("--beam_size", 1, "--precision", "fp32", "--no-pictures", "--json")
    status, out, _ = command(caption, *photos, "--checkpoint", run_folder / "best.pt", *arguments)
    result = run_example(tmp_path, export_of_run, *photos)
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{row['file']}: {row['caption']}" for row in rows]


@pytest.mark.slow
def test_the_example_refuses_what_it_does_not_do(export_of_run, shapes, tmp_path):
    model = json.loads((export_of_run / "vocabulary.json").read_text())
    (tmp_path / "vocabulary.json").write_text(json.dumps(model | {"inputs": ["images", "boxes"]}))
    result = run_example(tmp_path, tmp_path, "photo.jpg")
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "takes images and boxes" in result.stderr


@pytest.mark.parametrize("size", [(500, 333), (20, 45), (64, 64)])
def test_the_example_resizes_as_training_does(onnxruntime, tmp_path, size):
    import onnx_example

    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    for name in ("photo.png", "photo.jpg"):
        photo = Image.fromarray(pixels)
        exif = photo.getexif()
        exif[0x0112] = 6  # turned
        photo.save(tmp_path / name, exif=exif)
        assert (onnx_example.load_image(tmp_path / name, 64) == load_image(tmp_path / name, 64)).all()


@pytest.mark.slow
def test_only_an_export_is_replaced(command, export_of_run, tmp_path):
    folder = shutil.copytree(export_of_run, tmp_path / "export")
    export_onnx.require_replaceable(folder)
    for name in export_onnx.FILES:
        for content in (b"mine", b"[]", b""):
            (folder / name).write_bytes(content)
            status, _, error = command(export_onnx, "--output_folder", folder)
            assert status == 2 and error.count("\n") == 1
            assert f"{name} is not an export of this command and is not replaced" in error
            assert (folder / name).read_bytes() == content
        shutil.copy(export_of_run / name, folder)


def test_without_the_packages_the_error_says_how_to_install_them(command, monkeypatch, tmp_path):
    monkeypatch.setattr(export_onnx.importlib.util, "find_spec", lambda name: None)
    status, _, error = command(export_onnx, "--output_folder", tmp_path / "export")
    assert status == 2 and error.count("\n") == 1 and not (tmp_path / "export").exists()
    assert "missing packages onnx onnxscript: pip install onnx onnxscript onnxruntime" in error


def test_what_cannot_be_exported_or_differs_leaves_no_file(command, monkeypatch, onnxruntime, run_folder, tmp_path):
    checkpoint = ("--checkpoint", run_folder / "best.pt", "--output_folder", tmp_path)

    def fail(*arguments, **options):
        raise RuntimeError("step 3") from ValueError("no ONNX function for aten.foo\nmore")

    monkeypatch.setattr(torch.onnx, "export", fail)
    status, _, error = command(export_onnx, *checkpoint)
    assert status == 2 and error.count("\n") == 1
    assert "cannot export the encoder: no ONNX function for aten.foo" in error
    monkeypatch.setattr("tools.onnx_parts.Part.write", lambda *arguments: None)
    for difference in (1e-3, float("nan")):
        monkeypatch.setattr(export_onnx, "largest_difference", lambda *arguments, d=difference: d)
        status, _, error = command(export_onnx, *checkpoint)
        assert status == 2 and error.count("\n") == 1 and "more than 0.0001: nothing is written" in error
    assert not list(tmp_path.iterdir())
