"""Installation: a whole folder or none, by one process at a time, and the user's own files stay."""

import subprocess
import sys
import time

import pytest

import create_input_files
from preparation.installation import install_folder, installed_folder
from preparation.storage import read_captions


def test_a_folder_is_installed_in_the_end_or_not_at_all(tmp_path):
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), installed_folder(output) as folder:
        (folder / "dataset.json").write_text("1")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with installed_folder(output) as folder:
        (folder / "dataset.json").write_text("2")
        assert not output.exists()
    assert list(tmp_path.iterdir()) == [output] and (output / "dataset.json").read_text() == "2"


@pytest.mark.parametrize(("is_shapes", "kept"), [(False, {"photos", "notes.txt"}), (True, {"notes.txt"})])
def test_photos_are_removed_only_where_this_program_drew_them(tmp_path, is_shapes, kept):
    complete, output = tmp_path / "complete", tmp_path / "out"
    (output / "photos").mkdir(parents=True)
    names = ["notes.txt", "words.png", "val_images.hdf5", *(["dataset_shapes.json"] if is_shapes else [])]
    for name in names:
        (output / name).touch()
    complete.mkdir()
    (complete / "dataset.json").touch()
    install_folder(complete, output)
    assert {path.name for path in output.iterdir()} == kept | {"dataset.json"}


@pytest.mark.slow
def test_two_processes_cannot_prepare_one_folder(command, tmp_path):
    output = tmp_path / "out"
    arguments = ("--output_folder", output, "--image_size", 64, "--num_scenes")
    script = [sys.executable, create_input_files.__file__, *map(str, arguments), "600"]
    first = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / ".out.partial" / "photos").exists():  # until it has begun to write
            assert first.poll() is None
            time.sleep(0.01)
        for number in (600, 5):  # with the same settings, and with others that would be ready earlier
            status, _, err = command(create_input_files, *arguments, number)
            assert status == 2 and f"{output} is being prepared by another process: wait for it" in err
        assert first.wait(60) == 0 and b"is ready" in first.stdout.read()
    finally:
        first.kill()
    assert list(tmp_path.iterdir()) == [output]
    status, out, _ = command(create_input_files, *arguments, 600)
    assert status == 0 and "exists already" in out
    read_captions(output, "train")
