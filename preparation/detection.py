"""Objects in photos by a detector of torchvision, written as COCO's detection results."""

import hashlib
import json
import urllib.error
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from common.files import atomic_write, hold_lock, name_in_errors, require_writable, safe_load
from preparation.images import open_photo
from preparation.records import ImageRecord
from text.nouns import COCO_CATEGORIES
from utils import InputError, first_line

NUM_CLASSES = 91  # of COCO's ids, 0 is the background
# As the regions of "Bottom-Up and Top-Down Attention" were chosen: those of this score, but the best ten in any case.
KEPT_SCORE, MIN_KEPT = 0.2, 10
MAX_ASPECT = 100  # of a photo's sides


def detector_names() -> list[str]:
    """The detectors of torchvision that know COCO's categories."""
    names = torchvision.models.list_models(module=torchvision.models.detection)
    return [name for name in names if not name.startswith("keypoint")]


class Detector:
    """A detector of torchvision.

    Args:
        name: one of `detector_names`.
        weights: "coco", which downloads torchvision's, the path of a state dict, or "" for random ones.
        device: where it runs.

    Raises InputError for an unknown name, or weights that cannot be loaded.
    """

    def __init__(self, name: str, weights: str, device: torch.device) -> None:
        if name not in detector_names():
            raise InputError(f"--detect {name}: not one of {' '.join(detector_names())}")
        self.name, self.weights, self.device = name, weights, device
        self.network = _build_network(name, weights).to(device).eval()
        self.categories = dict(enumerate(COCO_CATEGORIES.split(", "), start=1))

    def fingerprint(self) -> dict[str, str]:
        """What its objects depend on, photos aside."""
        digest = hashlib.sha256()
        for name, tensor in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return {"detector": self.name, "weights": digest.hexdigest()}

    @torch.inference_mode()
    def __call__(self, photo: Image.Image) -> list[dict[str, Any]]:
        """The objects of a photo, best first: {"bbox": [left, top, width, height] in pixels, "category", "score"}.

        A strip, which torchvision would shrink to nothing, has none.
        """
        if max(photo.size) > MAX_ASPECT * min(photo.size):
            return []
        (found,) = self.network([pil_to_tensor(photo).to(self.device).float() / 255])
        rows = zip(found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True)
        objects = []
        for (left, top, right, bottom), label, score in sorted(rows, key=lambda row: -row[2]):
            category = self.categories.get(label)
            if category and (score >= KEPT_SCORE or len(objects) < MIN_KEPT):
                box = [round(edge, 2) for edge in (left, top, right - left, bottom - top)]
                objects.append({"bbox": box, "category": category, "score": round(score, 4)})
        return objects


def _build_network(name: str, weights: str) -> torch.nn.Module:
    """The network with its weights; InputError where they cannot be downloaded or do not fit."""
    if weights == "coco":
        choice = torchvision.models.get_model_weights(name)["DEFAULT"]
        try:
            return torchvision.models.get_model(name, weights=choice)
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            raise InputError(
                f"the weights of {name} cannot be downloaded ({first_line(error)}): fetch {choice.url} where there is "
                f"a network and give the file as --detector_weights FILE"
            ) from None
    network = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
    if weights:
        state = safe_load(weights)
        is_state = isinstance(state, dict) and all(isinstance(key, str) for key in state)
        if not is_state or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise InputError(f"--detector_weights {weights}: not a state dict of weights")
        expected = network.state_dict()
        try:
            missing, unexpected = network.load_state_dict(state, strict=False)
        except RuntimeError:
            wrong_shapes = [key for key in state if key in expected and state[key].shape != expected[key].shape]
            missing, unexpected = [], wrong_shapes
        # torchvision's own weights are of a BatchNorm that does not count.
        missing = [key for key in missing if not key.endswith("num_batches_tracked")]
        if wrong := [*missing, *unexpected]:
            raise InputError(f"--detector_weights {weights}: not the weights of {name}, see {wrong[0]}")
    return network


def detect_objects(records: Sequence[ImageRecord], path: Path, detector: Detector) -> int:
    """Write the objects of all photos as COCO's detection results, each with the photo's name as "image".

    What is found is kept in PATH.partial until all is, so a stopped run continues where it ended. Photos that are not
    readable have no objects here; preparing them says what is wrong with them. Returns the number of objects.

    Raises InputError where PATH.partial is of another detector, where images lie in HDF5, where no photo is readable,
    or where nothing can be written.
    """
    require_writable(path.parent)
    if stored := next((record for record in records if record.row >= 0), None):
        raise InputError(f"--detect {detector.name}: takes photos, {stored.path} holds images in HDF5")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    message = f"{path} is being written by another process: wait for it, or give another file"
    with name_in_errors(partial), hold_lock(path.with_name(f".{path.name}.lock"), message):
        done, unreadable = _begin_partial(partial, detector.fingerprint()), []
        with open(partial, "a", encoding="utf-8") as file:
            for record in tqdm(records, desc=detector.name, unit="photo"):
                if _key(record) not in done:
                    try:
                        objects = detector(open_photo(record.path))
                    except InputError as error:
                        unreadable.append(error)
                        continue
                    file.write(json.dumps({"photo": _key(record), "objects": objects}) + "\n")
                    file.flush()
                    done.add(_key(record))
        if unreadable and not done:
            raise unreadable[0]
        count = _write_results(path, partial, {_key(record): record.name for record in records})
        partial.unlink()
    return count


def _key(record: ImageRecord) -> str:
    """What a partial file calls a photo: its path, since another folder may have one of the same name."""
    return str(record.path.absolute())


def _begin_partial(path: Path, fingerprint: dict[str, str]) -> set[str]:
    """The photos that are done in an unfinished file, which is begun where it is new.

    A last line that a killed run left unfinished is removed.
    """
    expected, done = json.dumps(fingerprint).encode() + b"\n", set()
    with open(path, "ab+") as file:
        file.seek(0)
        header = file.readline()
        if expected.startswith(header) and header != expected:
            file.truncate(0)
            file.write(expected)
            return done
        end = len(header)
        try:
            found = json.loads(header)
            for line in file:
                if line.endswith(b"\n"):
                    row = json.loads(line)
                    done |= {row["photo"]} if isinstance(row["objects"], list) else set()
                    end += len(line)
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} is not what --detect writes: remove it, or give another --objects") from None
        if found != fingerprint:
            raise InputError(f"{path} has the objects of another detector or other weights: remove it, or give these")
        file.truncate(end)
    return done


def _write_results(path: Path, partial: Path, names: dict[str, str]) -> int:
    """Write the objects of a complete partial file, photo by photo, with the photos' names; returns their number."""
    count = 0
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        with open(partial, encoding="utf-8") as rows:
            next(rows)  # the fingerprint
            for row in map(json.loads, rows):
                if row["photo"] in names:
                    for item in row["objects"]:
                        file.write(f"{',' if count else '['}\n{json.dumps({'image': names[row['photo']], **item})}")
                        count += 1
        file.write("\n]\n" if count else "[]\n")
    return count
