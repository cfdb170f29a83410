"""Convert a checkpoint of sgrvinod's PyTorch tutorial on image captioning: python tools/convert_sgrvinod.py

The result is a checkpoint for eval.py, caption.py and train.py --init_from. No code in the file is executed.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from common.files import read_json, reraise_as_refused, save_torch
from models import CHECKPOINT_FORMAT, captioner_from_checkpoint, model_settings
from text.vocabulary import SPECIAL_TOKENS
from tools.pickled_modules import load_modules, state_dict
from training.state import git_revision
from utils import BaseSettings, InputError, has_type, run_script

# The classes in a checkpoint of the tutorial, besides torch's optimizers.
CLASSES = (
    "models.Encoder",
    "models.Attention",
    "models.DecoderWithAttention",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.activation.Sigmoid",
    "torch.nn.modules.activation.Softmax",
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.conv.Conv2d",
    "torch.nn.modules.dropout.Dropout",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.pooling.AdaptiveAvgPool2d",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.rnn.LSTMCell",
    "torch.nn.modules.sparse.Embedding",
    "torch.nn.backends.thnn._get_thnn_function_backend",  # in every module before torch 1.5
    "torchvision.models.resnet.BasicBlock",
    "torchvision.models.resnet.Bottleneck",
)
# The weights of the tutorial's decoder with their shapes, letters as in modules/sgrvinod.py; G = 4 H, I = E + D.
DECODER_SHAPES = {
    "embedding.weight": "VE",
    "attention.encoder_att.weight": "AD",
    "attention.encoder_att.bias": "A",
    "attention.decoder_att.weight": "AH",
    "attention.decoder_att.bias": "A",
    "attention.full_att.weight": "1A",
    "attention.full_att.bias": "1",  # no effect: it is the same for all regions
    "decode_step.weight_ih": "GI",
    "decode_step.bias_ih": "G",
    "decode_step.weight_hh": "GH",
    "decode_step.bias_hh": "G",
    "init_h.weight": "HD",
    "init_h.bias": "H",
    "init_c.weight": "HD",
    "init_c.bias": "H",
    "f_beta.weight": "DH",
    "f_beta.bias": "D",
    "fc.weight": "VH",
    "fc.bias": "V",
}
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
RESNET_PARTS = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
IMAGE_SIZE = 256  # of the tutorial


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Convert a checkpoint of sgrvinod's tutorial into one of train.py."""

    checkpoint: str = "BEST_checkpoint_coco_5_cap_per_img_5_min_word_freq.pth.tar"  # what its train.py wrote
    word_map: str = "WORDMAP_coco_5_cap_per_img_5_min_word_freq.json"  # what its create_input_files.py wrote
    output: str = "runs/sgrvinod/best.pt"  # new file to write


def optimizer_names() -> list[str]:
    """Return the names of torch's optimizers, such as torch.optim.adam.Adam."""
    return [f"{each.__module__}.{each.__name__}" for each in vars(torch.optim).values() if isinstance(each, type)]


def attribute(module: Any, name: str, kind: type, path: str) -> Any:
    """Return an attribute of a module in the file. Raises InputError if it is missing or of another type."""
    value = getattr(module, name, None)
    if not has_type(value, kind):
        raise InputError(f"{path} has no {name} of type {kind.__name__}")
    return value


def encoder_settings(encoder: Any, weights: Mapping[str, Tensor], path: str) -> dict[str, Any]:
    """Return train.py's settings `encoder` and `grid_size` for the encoder of the file."""
    # A ResNet's name counts its convolutions, of which the first is resnet.0 here, and a linear layer, left out here.
    depth = 2 + sum(".conv" in name for name in weights)
    if f"resnet{depth}" not in RESNETS:
        raise InputError(f"{path}: encoder has {depth} layers, which no ResNet of torchvision has")
    return {"encoder": f"resnet{depth}", "grid_size": attribute(encoder, "enc_image_size", int, f"{path}: encoder")}


def convert_encoder(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a captioner's encoder from those of the file's encoder."""
    converted = {}
    for name, weight in weights.items():
        _, part, rest = name.split(".", 2)  # resnet.4.0.conv1.weight
        converted[f"encoder.network.{RESNET_PARTS.get(part, part)}.{rest}"] = weight
    for name in [name for name in converted if name.endswith(".running_mean")]:
        counter = name.replace("running_mean", "num_batches_tracked")
        converted.setdefault(counter, torch.tensor(0))  # torch has it since 0.4.1, and nothing here reads it
    return converted


def decoder_settings(decoder: Any, weights: Mapping[str, Tensor], path: str) -> dict[str, Any]:
    """Return train.py's settings for the decoder of the file: its sizes and dropout.

    Raises InputError if its weights have other names than the tutorial's, or shapes that do not fit each other.
    """
    if missing := sorted(DECODER_SHAPES.keys() - weights.keys()):
        raise InputError(f"{path}: decoder has no {missing[0]}, which is part of the tutorial's model")
    if unknown := sorted(weights.keys() - DECODER_SHAPES.keys()):
        raise InputError(f"{path}: decoder has {unknown[0][:40]!a}, which is not part of the tutorial's model")
    sizes = {"1": 1}
    for name in ("embedding.weight", "attention.encoder_att.weight", "attention.decoder_att.weight"):
        sizes |= zip(DECODER_SHAPES[name], weights[name].shape, strict=True)
    sizes["G"] = 4 * sizes["H"]
    sizes["I"] = sizes["E"] + sizes["D"]
    for name, letters in DECODER_SHAPES.items():
        shape = tuple(sizes[letter] for letter in letters)
        if weights[name].shape != shape:
            raise InputError(f"{path}: decoder.{name} is {tuple(weights[name].shape)}, not {shape}")
    dropout = attribute(decoder._modules.get("dropout"), "p", float, f"{path}: decoder.dropout")
    return {
        "decoder": "sgrvinod",
        "embed_dim": sizes["E"],
        "attention_dim": sizes["A"],
        "hidden_dim": sizes["H"],
        "dropout": float(dropout),
    }


def convert_decoder(weights: Mapping[str, Tensor], word_ids: list[int]) -> dict[str, Tensor]:
    """Return the weights of `modules.sgrvinod.SgrvinodDecoder` from those of the file's decoder.

    Two biases that are added to each other become one. `word_ids` are the tutorial's ids of the words in the order of
    the new vocabulary.
    """
    embed_dim = weights["embedding.weight"].shape[1]
    converted = {
        "embedding.weight": weights["embedding.weight"][word_ids],
        "attention.keys.weight": weights["attention.encoder_att.weight"],
        "attention.keys.bias": weights["attention.encoder_att.bias"] + weights["attention.decoder_att.bias"],
        "attention.query.weight": weights["attention.decoder_att.weight"],
        "attention.score.weight": weights["attention.full_att.weight"],
        "attention.gate.weight": weights["f_beta.weight"],
        "attention.gate.bias": weights["f_beta.bias"],
        "init_hidden.weight": weights["init_h.weight"],
        "init_hidden.bias": weights["init_h.bias"],
        "init_cell.weight": weights["init_c.weight"],
        "init_cell.bias": weights["init_c.bias"],
        "cell.words.weight": weights["decode_step.weight_ih"][:, :embed_dim].contiguous(),
        "cell.words.bias": weights["decode_step.bias_ih"] + weights["decode_step.bias_hh"],
        "cell.context.weight": weights["decode_step.weight_ih"][:, embed_dim:].contiguous(),
        "cell.hidden.weight": weights["decode_step.weight_hh"],
        "output.weight": weights["fc.weight"][word_ids],
        "output.bias": weights["fc.bias"][word_ids],
    }
    return {f"decoder.{name}": weight for name, weight in converted.items()}


def read_words(path: str) -> dict[str, int]:
    """Return the ids of a word map by word, special tokens first. Raises InputError if the file is not a word map."""
    word_map = read_json(path)
    if not isinstance(word_map, dict) or not all(type(word_id) is int for word_id in word_map.values()):
        raise InputError(f"{path} is not a word map, a JSON object of words and their ids")
    if sorted(word_map.values()) != list(range(len(word_map))):
        raise InputError(f"{path}: the ids of its {len(word_map)} words are not 0 to {len(word_map) - 1}")
    for token in SPECIAL_TOKENS:
        if token not in word_map:
            raise InputError(f"{path} has no {token}, which the word maps of the tutorial have")
    words = sorted(word_map.keys() - set(SPECIAL_TOKENS), key=lambda word: word_map[word])
    return {word: word_map[word] for word in [*SPECIAL_TOKENS, *words]}


def convert(content: Any, word_map: Mapping[str, int], path: str) -> dict[str, Any]:
    """Return a checkpoint as train.py writes it, without training state, from the content of the file at `path`."""
    if not isinstance(content, dict) or not content.keys() >= {"encoder", "decoder", "encoder_optimizer"}:
        raise InputError(f"{path} is not a checkpoint of the tutorial: it lacks encoder, decoder or encoder_optimizer")
    encoder, decoder = content["encoder"], content["decoder"]
    encoder_weights = state_dict(encoder, f"{path}: encoder")
    decoder_weights = state_dict(decoder, f"{path}: decoder")
    fine_tuned = content["encoder_optimizer"] is not None
    settings = train.Settings(
        region_dim=0,
        fine_tune_encoder=fine_tuned,
        unfreeze_from="layer2" if fine_tuned else "",
        **encoder_settings(encoder, encoder_weights, path),
        **decoder_settings(decoder, decoder_weights, path),
    )
    if len(word_map) != (num_words := len(decoder_weights["embedding.weight"])):
        raise InputError(
            f"{path} has {num_words} words, the word map {len(word_map)}: give the word map of this checkpoint"
        )
    return {
        "format": CHECKPOINT_FORMAT,
        "model": convert_encoder(encoder_weights) | convert_decoder(decoder_weights, list(word_map.values())),
        "model_settings": model_settings(settings),
        "image_size": IMAGE_SIZE,
        "resize": "squash",
        "feature_dim": 0,
        "fine_tune_encoder": fine_tuned,
        "words": list(word_map),
        "settings": asdict(settings),
        "defaults": asdict(train.Settings()),
        "git": git_revision(),
    }


def main(settings: Settings) -> None:
    """Convert the checkpoint, check that the result can be loaded, write it."""
    if Path(settings.output).exists():
        raise InputError(f"--output {settings.output} exists: give another path, or delete it")
    word_map = read_words(settings.word_map)
    content = load_modules(settings.checkpoint, [*CLASSES, *optimizer_names()])
    with reraise_as_refused(settings.checkpoint):
        checkpoint = convert(content, word_map, settings.checkpoint)
    captioner_from_checkpoint(checkpoint, settings.checkpoint)  # checks that sizes fit and numbers are finite
    save_torch(settings.output, checkpoint)
    print(
        f"wrote {settings.output}: {checkpoint['settings']['encoder']}, {len(word_map)} words; --length_penalty 0 of "
        f"caption.py and eval.py ranks captions as the tutorial does"
    )


if __name__ == "__main__":
    run_script(main, Settings)
