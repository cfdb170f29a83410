"""The same captions of three photos, written in each format in which people have them."""

import json

import h5py
import numpy as np

from text.tokenizer import tokenize

CAPTIONS = {"a.jpg": ["A dog, running .", "Two dogs"], "b.jpg": ['The "big" cat', "It's a cat"], "c.jpg": ["One man"]}
WORDS = {
    "a.jpg": [["a", "dog", "running"], ["two", "dogs"]],
    "b.jpg": [["the", "big", "cat"], ["its", "a", "cat"]],
    "c.jpg": [["one", "man"]],
}
SPLIT = {"a.jpg": "train", "b.jpg": "val", "c.jpg": "test"}
PAIRS = [(name, raw) for name, captions in CAPTIONS.items() for raw in captions]


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return [path]


def write_karpathy(folder, photos):
    images = []
    for name, captions in CAPTIONS.items():
        sentences = [{"tokens": tokenize(raw), "raw": raw} for raw in captions]
        objects = [{"words": ["a", "dog"], "box": [0, 0.25, 1, 0.5]}]
        images.append({"filename": name, "split": SPLIT[name], "sentences": sentences, "objects": objects})
    return write(folder / "captions.any", json.dumps({"images": images}))


def write_kaggle(folder, photos):
    lines = ["image,caption", *('{},"{}"'.format(name, raw.replace('"', '""')) for name, raw in PAIRS)]
    return write(folder / "captions.any", "\n".join(lines))


def write_split_csv(folder, photos):
    lines = ["\ufeffSplit;File;Caption", ""]  # as Excel writes it in some countries
    lines += ['{};{};"{}"'.format(SPLIT[name], name, raw.replace('"', '""')) for name, raw in PAIRS]
    return write(folder / "captions.any", "\r\n".join(lines))


def write_flickr30k(folder, photos):
    lines = ["image_name| comment_number| comment", *(f"{name}| 0| {raw}" for name, raw in PAIRS)]
    lines[1] = lines[1].replace("| 0| ", "| 0   ")  # as one line of the published file
    return write(folder / "captions.any", "\n".join(lines))


def write_token(folder, photos):
    lines = [f"{name}#0\t{raw}" for name, raw in PAIRS]
    lines.append("a.jpg.1#0\tA photo that is nowhere")  # as in the published file
    for split, name in {"train": "trainImages", "val": "devImages", "test": "testImages"}.items():
        write(folder / f"Flickr_8k.{name}.txt", "".join(f"{photo}\n" for photo in SPLIT if SPLIT[photo] == split))
    return write(folder / "captions.any", "\n".join(lines) + "\n")


def write_coco(folder, photos):
    paths = []
    for name, split in SPLIT.items():
        image_id = 100 + ord(name[0])
        annotations = [{"id": i, "image_id": image_id, "caption": raw} for i, raw in enumerate(CAPTIONS[name])]
        content = {"info": {}, "images": [{"id": image_id, "file_name": name}], "annotations": annotations}
        paths += write(folder / f"captions_{split}2014.json", json.dumps(content))
    return paths


def write_folder(folder, photos):
    for name, captions in CAPTIONS.items():
        write(photos / f"{name[0]}.txt", "\n".join([*captions, ""]))
    return [photos]


def write_tutorial(folder, photos):
    folder.mkdir()
    words = sorted({word for captions in WORDS.values() for words in captions for word in words} - {"man"})
    word2idx = {word: i for i, word in enumerate(words, start=1)}
    word2idx |= {"<unk>": len(words) + 1, "<start>": len(words) + 2, "<end>": len(words) + 3, "<pad>": 0}
    (folder / "WORDMAP_own_2_cap.json").write_text(json.dumps(word2idx))
    for name, split in SPLIT.items():
        captions = [["<start>", *words, "<end>"] for words in (WORDS[name] * 2)[:2]]
        encoded = [[word2idx.get(word, word2idx["<unk>"]) for word in words] for words in captions]
        padded = [word_ids + [0] * (10 - len(word_ids)) for word_ids in encoded]
        stem = f"{split.upper()}_{{}}_own_2_cap"
        (folder / f"{stem.format('CAPTIONS')}.json").write_text(json.dumps(padded))
        (folder / f"{stem.format('CAPLENS')}.json").write_text(json.dumps([len(words) for words in captions]))
        with h5py.File(folder / f"{stem.format('IMAGES')}.hdf5", "w") as file:
            file.attrs["captions_per_image"] = 2
            file["images"] = np.arange(3 * 256, dtype=np.int64).astype(np.uint8).reshape(1, 3, 16, 16)
    return [folder]


WRITERS = {
    "karpathy": write_karpathy,
    "kaggle": write_kaggle,
    "split_csv": write_split_csv,
    "flickr30k": write_flickr30k,
    "token": write_token,
    "coco": write_coco,
    "folder": write_folder,
    "tutorial": write_tutorial,
}
KINDS = {"kaggle": "csv", "split_csv": "csv"}  # formats of create_input_files.py that have another name
