"""Captions from Python: `Captioner.caption_images` gives what caption.py prints."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

import caption
from conftest import SMALL, build
from models import load_captioner
from preparation.images import load_image, photo_size
from utils import InputError

ROOT = Path(__file__).parent.parent


def test_captions_are_those_of_the_script(command, shapes, run_folder):
    photos = sorted((shapes / "photos").glob("*.png"))[:9]
    arguments = ("--checkpoint", run_folder / "best.pt", "--no-pictures", "--json", "--n_best", 3)
    status, out, _ = command(caption, *photos, *arguments)
    rows = [json.loads(line) for line in out.splitlines()]
    captioner = load_captioner(run_folder / "best.pt")
    found = captioner.caption_images(photos)
    assert status == 0 and len(rows) == len(found) == 9 and not captioner.training
    for row, record in zip(rows, found, strict=True):
        assert row["caption"] == record.caption == " ".join(record.words)
        assert row["log_prob"] == pytest.approx(record.log_prob, abs=1e-3)
        assert [each["caption"] for each in row["n_best"]] == [" ".join(each.words) for each in record.n_best[:3]]
        assert record.alpha.shape[1] == len(record.boxes) == 16 and len(record.alpha) >= len(record.words)
        assert record.alpha[: len(record.words)].sum(dim=1) == pytest.approx(1, abs=0.02)  # bf16 where it is faster


def test_batches_and_images_give_the_same(shapes, run_folder):
    photos = sorted((shapes / "photos").glob("*.png"))[:5]
    captioner = load_captioner(run_folder / "best.pt", "cpu")
    images = [Image.open(photo) for photo in photos]
    one = captioner.caption_images(photos, beam_size=3)
    other = captioner.caption_images(images, beam_size=3, batch_size=2)
    assert [record.caption for record in one] == [record.caption for record in other]
    assert captioner.caption_images([]) == []
    short = captioner.caption_images(map(str, photos[:1]), max_length=2)
    assert len(short[0].words) <= 2


def test_the_lines_of_the_readme_run(shapes, run_folder, tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for folder in ("photos", "runs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "runs" / "mine").symlink_to(run_folder, target_is_directory=True)
    photo = shutil.copy(min((shapes / "photos").glob("*.png")), tmp_path / "photos" / "dog.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    (record,) = load_captioner(run_folder / "last.pt").caption_images([photo], beam_size=5)
    assert capsys.readouterr().out == f"{record.caption} {record.log_prob}\n"


def test_images_are_read_as_their_files(tmp_path, run_folder):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 4), np.uint8)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels).save(tmp_path / "transparent.png")
    Image.fromarray(pixels[..., :3]).save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(pixels[..., 0]).convert("P").save(tmp_path / "palette.gif")
    for path in tmp_path.iterdir():
        assert np.array_equal(load_image(path, 32, "pad"), load_image(Image.open(path), 32, "pad")), path
        assert photo_size(path) == photo_size(Image.open(path))
    (tmp_path / "half.png").write_bytes((tmp_path / "turned.png").read_bytes()[:2000])
    with pytest.raises(InputError, match="not a readable photo"):
        load_captioner(run_folder / "best.pt", "cpu").caption_images([Image.open(tmp_path / "half.png")])


def test_wrong_input_is_named(tmp_path, shapes, run_folder):
    captioner = load_captioner(run_folder / "best.pt", "cpu")
    photo = next((shapes / "photos").glob("*.png"))
    with pytest.raises(InputError, match=r"nowhere\.png: no such file"):
        captioner.caption_images([tmp_path / "nowhere.png"])
    with pytest.raises(InputError, match=r"caption_images takes a list of photos, not the single .*png"):
        captioner.caption_images(str(photo))
    with pytest.raises(InputError, match="does not use objects: remove objects="):
        captioner.caption_images([photo], objects=[[]])
    for options, message in (
        ({"beam_size": 0}, "--beam_size 0: must be at least 1"),
        ({"temperature": 0.5}, "--temperature 0.5 requires --samples"),
        ({"samples": 2, "beam_size": 3}, "--beam_size 3 cannot be combined with --samples"),
        ({"num_beams": 3}, "num_beams is not a setting: did you mean"),
    ):
        with pytest.raises(InputError, match=message):
            captioner.caption_images([photo], **options)
    with pytest.raises(InputError, match="requires objects: pass a list per photo as objects="):
        build(replace(SMALL, regions="objects"), 9).caption_images([photo])
    features = build(replace(SMALL, regions="features", fine_tune_encoder=False), 9, feature_dim=8)
    with pytest.raises(InputError, match="looks at region features, not at photos"):
        features.caption_images([photo])
