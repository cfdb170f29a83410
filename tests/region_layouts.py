"""Photos and region features of them, written in each layout in which people have them."""

import base64
import json

import h5py
import numpy as np
from PIL import Image

from preparation.records import ImageRecord, pack_sentences

SIZE = (80, 40)  # of the photos in pixels
LAYOUTS = ("folder", "npy folder", "tsv", "keyed", "stacked", "stacked pixels")


def random_regions(num_photos, num_regions=3, width=5, seed=0):
    """Regions of each photo: features (N, F) and boxes (N, 4) in pixels."""
    rng = np.random.default_rng(seed)
    top_left = rng.integers(0, 20, (num_photos, num_regions, 2))
    boxes = np.concatenate([top_left, top_left + rng.integers(1, 20, top_left.shape)], axis=2).astype(np.float32)
    return rng.random((num_photos, num_regions, width), np.float32), boxes


def write_features(folder, layout, ids, features, boxes):
    """Write features and boxes in a layout; returns the path to give."""
    folder.mkdir(exist_ok=True)
    if "folder" in layout:
        for name in ("cocobu_att", "cocobu_box"):
            (folder / name).mkdir()
        for photo, values, corners in zip(ids, features, boxes, strict=True):
            if layout == "folder":
                np.savez_compressed(folder / "cocobu_att" / f"{photo}.npz", feat=values)
            else:
                np.save(folder / "cocobu_att" / f"{photo}.npy", values)
            np.save(folder / "cocobu_box" / f"{photo}.npy", corners)
        return folder / "cocobu_att"
    if layout == "tsv":
        with open(folder / "features.tsv", "wb") as file:
            for photo, values, corners in zip(ids, features, boxes, strict=True):
                fields = [str(photo), str(SIZE[0]), str(SIZE[1]), str(len(values))]
                encoded = [base64.b64encode(np.ascontiguousarray(x, np.float32).tobytes()) for x in (corners, values)]
                file.write(b"\t".join([*(field.encode() for field in fields), *encoded]) + b"\n")
        return folder / "features.tsv"
    path = folder / "features.hdf5"
    with h5py.File(path, "w") as file:
        if layout == "keyed":
            for photo, values, corners in zip(ids, features, boxes, strict=True):
                file[f"{photo}_features"], file[f"{photo}_boxes"] = values, corners
                file[f"{photo}_cls_prob"] = np.zeros((len(values), 2))
        else:
            file["image_features"], file["image_bb"] = np.asarray(features), np.asarray(boxes)
            if layout == "stacked":
                spatial = np.asarray(boxes) / np.float32([*SIZE, *SIZE])
                file["spatial_features"] = np.concatenate([spatial, spatial[..., :2]], axis=2)
    (folder / "features_imgid2idx.json").write_text(json.dumps({str(photo): row for row, photo in enumerate(ids)}))
    return path


def write_photos(folder):
    """Write six photos; returns their records, whose ids are 10 to 15."""
    folder.mkdir()
    records = []
    for i in range(6):
        path = folder / f"photo{i}.png"
        Image.new("RGB", SIZE, (40 * i, 0, 0)).save(path)
        captions = pack_sentences([f"a {word} dog" for word in ("big", "small")])
        records.append(ImageRecord(path, path.name, 10 + i, "train", captions, has_own_id=True))
    return records
