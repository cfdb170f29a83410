"""Detect objects in photos with a torchvision detector and write them in COCO's results format."""

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

NUM_CLASSES = 91  # COCO's ids; 0 is the background
KEPT_SCORE, MIN_KEPT = 0.2, 10  # keep objects of this score, and the best ten in any case (Anderson et al., 2018)
MAX_ASPECT = 100  # ratio of a photo's sides


def detector_names() -> list[str]:
    """Return the names of torchvision's detectors of COCO's categories."""
    names = torchvision.models.list_models(module=torchvision.models.detection)
    return [name for name in names if not name.startswith("keypoint")]


class Detector:
    """A detector of torchvision.

    Args:
        name: one of `detector_names`.
        weights: "coco" to download torchvision's, the path of a state dict, or "" for random ones.
        device: device of the network.

    Raises InputError for an unknown name and for weights that cannot be loaded.
    """

    def __init__(self, name: str, weights: str, device: torch.device) -> None:
        if name not in detector_names():
            raise InputError(f"--detect {name}: not one of {' '.join(detector_names())}")
        self.name, self.weights, self.device = name, weights, device
        self.network = _build_network(name, weights).to(device).eval()
        self.categories = dict(enumerate(COCO_CATEGORIES.split(", "), start=1))

    def fingerprint(self) -> dict[str, str]:
        """Return everything but the photos that its objects depend on."""
        digest = hashlib.sha256()
        for name, tensor in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return {"detector": self.name, "weights": digest.hexdigest()}

    @torch.inference_mode()
    def __call__(self, photo: Image.Image) -> list[dict[str, Any]]:
        """Detect objects: [{"bbox": [left, top, width, height] in pixels, "category", "score"}], best first.

        Very elongated photos yield none: torchvision would shrink them to nothing.
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
    """Build a detector with its weights. Raises InputError if they cannot be downloaded or do not fit."""
    if weights == "coco":
        choice = torchvision.models.get_model_weights(name)["DEFAULT"]
        try:
            return torchvision.models.get_model(name, weights=choice)
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            raise InputError(
                f"the weights of {name} cannot be downloaded ({first_line(error)}): download {choice.url} on another "
                f"machine and give the file as --detector_weights FILE"
            ) from None
    network = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
    if weights:
        try:
            missing, wrong = network.load_state_dict(safe_load(weights), strict=False)
        except (RuntimeError, TypeError, AttributeError) as error:
            missing, wrong = [], [str(error).splitlines()[-1].strip()]
        # torchvision's own weights come from a BatchNorm that does not count batches.
        wrong = [key for key in missing if not key.endswith("num_batches_tracked")] + wrong
        if wrong:
            raise InputError(f"--detector_weights {weights}: not the weights of {name}, see {wrong[0]}")
    return network


def detect_objects(records: Sequence[ImageRecord], path: Path, detector: Detector) -> int:
    """Write the objects of all photos in COCO's results format, with the photo's name as "image"; return their number.

    Results are kept in PATH.partial until all photos are done, so a stopped run resumes. Unreadable photos are left to
    the preparation, which says what is wrong with them.

    Raises InputError if PATH.partial is from another detector, if the images lie in HDF5, if no photo is readable, or
    if nothing can be written.
    """
    require_writable(path.parent)
    if stored := next((record for record in records if record.row >= 0), None):
        raise InputError(f"--detect {detector.name}: takes photos, {stored.path} holds images in HDF5")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    message = f"{path} is being written by another process: wait for it, or give another file"
    with name_in_errors(partial), hold_lock(path.with_name(f".{path.name}.lock"), message):
        done, unreadable = _resume(partial, detector.fingerprint()), []
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
    """Return the path of a photo: photos in several folders may have the same name."""
    return str(record.path.absolute())


def _resume(path: Path, fingerprint: dict[str, str]) -> set[str]:
    """Return the photos that an unfinished file has and drop its last line if that is incomplete; begin a new file.

    Raises InputError if the file is not from the detector with this fingerprint.
    """
    header, done, end = json.dumps(fingerprint).encode() + b"\n", set(), 0
    with open(path, "ab+") as file:
        file.seek(0)
        for line in file:
            if not end and not header.startswith(line):
                raise InputError(
                    f"{path} is not from this detector with these weights: remove it, or give another --objects"
                )
            if not line.endswith(b"\n"):
                break  # the run was killed while it wrote this line
            if end:
                done.add(json.loads(line)["photo"])
            end += len(line)
        file.truncate(end)
        if not end:
            file.write(header)
    return done


def _write_results(path: Path, partial: Path, names: dict[str, str]) -> int:
    """Convert a complete partial file to COCO's results, with the names of the photos; return the number of objects."""
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
