"""Convert a checkpoint of sgrvinod's PyTorch tutorial on image captioning: python tools/convert_sgrvinod.py

The result is a checkpoint for eval.py, caption.py and train.py --init_from. Nothing of the file is executed.
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
from common.checkpoints import EmptyWeights, name_impossible_sizes
from common.files import read_json, save_torch
from common.pickled import PickledFile, PickledObject, open_pickled
from models import CHECKPOINT_FORMAT, Captioner, captioner_from_checkpoint, model_settings
from text.vocabulary import SPECIAL_TOKENS, Vocabulary
from training.state import git_revision
from utils import BaseSettings, InputError, has_type, run_script

# Names of classes and functions that a checkpoint of the tutorial has, and the prefixes of torch's own.
NAMES = {
    "models.Encoder",
    "models.Attention",
    "models.DecoderWithAttention",
    "torchvision.models.resnet.BasicBlock",
    "torchvision.models.resnet.Bottleneck",
    "collections.OrderedDict",
    "collections.defaultdict",
    "__builtin__.dict",
    "__builtin__.set",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.FloatStorage",
    "torch.DoubleStorage",
    "torch.HalfStorage",
    "torch.LongStorage",
    "torch.ByteStorage",
}
PREFIXES = ("torch.nn.modules.", "torch.nn.backends.", "torch.optim.")
# The modules of the tutorial's decoder and encoder, by path.
DECODER_CLASSES = {
    "": "models.DecoderWithAttention",
    "attention": "models.Attention",
    "attention.encoder_att": "torch.nn.modules.linear.Linear",
    "attention.decoder_att": "torch.nn.modules.linear.Linear",
    "attention.full_att": "torch.nn.modules.linear.Linear",
    "attention.relu": "torch.nn.modules.activation.ReLU",
    "attention.softmax": "torch.nn.modules.activation.Softmax",
    "embedding": "torch.nn.modules.sparse.Embedding",
    "dropout": "torch.nn.modules.dropout.Dropout",
    "decode_step": "torch.nn.modules.rnn.LSTMCell",
    "init_h": "torch.nn.modules.linear.Linear",
    "init_c": "torch.nn.modules.linear.Linear",
    "f_beta": "torch.nn.modules.linear.Linear",
    "sigmoid": "torch.nn.modules.activation.Sigmoid",
    "fc": "torch.nn.modules.linear.Linear",
}
ENCODER_CLASSES = {
    "": "models.Encoder",
    "resnet": "torch.nn.modules.container.Sequential",
    "adaptive_pool": "torch.nn.modules.pooling.AdaptiveAvgPool2d",
}
# The sizes of the tutorial's decoder, and its weights with their shapes in these letters; G = 4 H, I = E + D.
DECODER_SIZES = {"V": "vocab_size", "E": "embed_dim", "A": "attention_dim", "H": "decoder_dim", "D": "encoder_dim"}
DECODER_SHAPES = {
    "embedding.weight": "VE",
    "attention.encoder_att.weight": "AD",
    "attention.encoder_att.bias": "A",
    "attention.decoder_att.weight": "AH",
    "attention.decoder_att.bias": "A",
    "attention.full_att.weight": "1A",
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
# The ResNets, by the blocks of their four layers and whether these are bottlenecks.
RESNETS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}
RESNET_PARTS = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
IMAGE_SIZE = 256  # of the tutorial


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Convert a checkpoint of sgrvinod's tutorial into one of train.py."""

    checkpoint: str = "BEST_checkpoint_coco_5_cap_per_img_5_min_word_freq.pth.tar"  # what its train.py wrote
    word_map: str = "WORDMAP_coco_5_cap_per_img_5_min_word_freq.json"  # what its create_input_files.py wrote
    output: str = "runs/sgrvinod/best.pt"  # file to write, which must not exist


def is_admitted(name: str) -> bool:
    """Whether a checkpoint of the tutorial may name this class or function. It is not imported."""
    return name in NAMES or name.startswith(PREFIXES)


def children(module: Any) -> dict[str, Any]:
    """The direct submodules of a module of the file, by name; {} where `module` is not a module."""
    modules = module.state.get("_modules") if isinstance(module, PickledObject) else None
    return modules if isinstance(modules, dict) and all(isinstance(name, str) for name in modules) else {}


def submodule(module: Any, path: str) -> Any:
    """The submodule with this path, or the module itself for ""; None where it does not exist."""
    for name in path.split(".") if path else ():
        module = children(module).get(name)
    return module


def require_classes(module: Any, classes: Mapping[str, str], source: str) -> None:
    """Raise InputError where a module does not have the submodules of these paths and classes, and no others."""
    for path, name in classes.items():
        found = submodule(module, path)
        found_name = found.name if isinstance(found, PickledObject) else "missing"
        if found_name != name:
            raise InputError(f"{source}: {path or 'the model'} is {found_name}, not {name} as in the tutorial")
    for path in ("", "attention"):
        for name in children(submodule(module, path)):
            if f"{path}.{name}".lstrip(".") not in classes:
                raise InputError(f"{source} has {ascii(name)[:40]}, which is not part of the tutorial's model")


def read_parameter(file: PickledFile, module: Any, path: str, name: str) -> Tensor:
    """Read the parameter or buffer with this path; `name` is that of the module in an error message."""
    owner, _, last = path.rpartition(".")
    state = getattr(submodule(module, owner), "state", {})
    for kind in ("_parameters", "_buffers"):
        if isinstance(state.get(kind), dict) and state[kind].get(last) is not None:
            return file.tensor(state[kind][last])
    raise InputError(f"{file.path}: {name} has no {path}, which is part of the tutorial's model")


def read_encoder_settings(encoder: Any, source: str) -> dict[str, Any]:
    """The settings `encoder` and `grid_size` of train.py, read from the encoder of the file."""
    require_classes(encoder, ENCODER_CLASSES, f"{source}: encoder")
    layers = [children(submodule(encoder, f"resnet.{part}")) for part in ("4", "5", "6", "7")]
    blocks = tuple(len(layer) for layer in layers)
    is_bottleneck = "conv3" in children(layers[0].get("0"))
    names = [name for name, layout in RESNETS.items() if layout == (blocks, is_bottleneck)]
    if not names:
        raise InputError(f"{source}: encoder is no ResNet of torchvision: its layers have {blocks} blocks")
    if not has_type(encoder.state.get("enc_image_size"), int):
        raise InputError(f"{source}: encoder has no enc_image_size of type int")
    return {"encoder": names[0], "grid_size": encoder.state["enc_image_size"]}


def read_encoder(file: PickledFile, encoder: Any, names: list[str]) -> dict[str, Tensor]:
    """The weights of a captioner's encoder with these names, read from the encoder of the file."""
    weights = {}
    for name in names:
        _, _, part, *rest = name.split(".")  # encoder.network.layer1.0.conv1.weight
        path = ".".join(["resnet", RESNET_PARTS[part], *rest])
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)  # torch has it since 0.4.1, and nothing here reads it
        else:
            weights[name] = read_parameter(file, encoder, path, "encoder")
    return weights


def read_decoder_settings(decoder: Any, source: str) -> dict[str, Any]:
    """The settings of train.py for the decoder, read from the decoder of the file: its sizes and dropout."""
    require_classes(decoder, DECODER_CLASSES, f"{source}: decoder")
    dims = {name: decoder.state.get(name) for name in DECODER_SIZES.values()}
    dropout = submodule(decoder, "dropout").state.get("p")
    for name, value, kind in [*((name, value, int) for name, value in dims.items()), ("dropout.p", dropout, float)]:
        if not has_type(value, kind):
            raise InputError(f"{source}: decoder has no {name} of type {kind.__name__}")
    return {
        "decoder": "sgrvinod",
        "embed_dim": dims["embed_dim"],
        "attention_dim": dims["attention_dim"],
        "hidden_dim": dims["decoder_dim"],
        "dropout": float(dropout),
    }


def read_decoder(file: PickledFile, decoder: Any, word_ids: list[int]) -> dict[str, Tensor]:
    """The weights of `modules.sgrvinod.SgrvinodDecoder`, read from the decoder of the file.

    word_ids are the tutorial's ids of the words, in the new vocabulary's order. Two biases that add up become one.
    """
    sizes = {letter: decoder.state.get(name) for letter, name in DECODER_SIZES.items()}
    if sizes["V"] != len(word_ids):
        raise InputError(f"{file.path} has {sizes['V']} words, the word map has {len(word_ids)}: give the file's own")
    sizes |= {"1": 1, "G": 4 * sizes["H"], "I": sizes["E"] + sizes["D"]}
    read = {}
    for path, letters in DECODER_SHAPES.items():
        read[path] = read_parameter(file, decoder, path, "decoder")
        shape = tuple(sizes[letter] for letter in letters)
        if read[path].shape != shape:
            raise InputError(f"{file.path}: decoder.{path} is {tuple(read[path].shape)}, not {shape}")
    words, context = read["decode_step.weight_ih"].split([sizes["E"], sizes["D"]], dim=1)
    weights = {
        "embedding.weight": read["embedding.weight"][word_ids],
        "attention.keys.weight": read["attention.encoder_att.weight"],
        "attention.keys.bias": read["attention.encoder_att.bias"] + read["attention.decoder_att.bias"],
        "attention.query.weight": read["attention.decoder_att.weight"],
        "attention.score.weight": read["attention.full_att.weight"],
        "attention.gate.weight": read["f_beta.weight"],
        "attention.gate.bias": read["f_beta.bias"],
        "init_hidden.weight": read["init_h.weight"],
        "init_hidden.bias": read["init_h.bias"],
        "init_cell.weight": read["init_c.weight"],
        "init_cell.bias": read["init_c.bias"],
        "cell.words.weight": words.contiguous(),
        "cell.words.bias": read["decode_step.bias_ih"] + read["decode_step.bias_hh"],
        "cell.context.weight": context.contiguous(),
        "cell.hidden.weight": read["decode_step.weight_hh"],
        "output.weight": read["fc.weight"][word_ids],
        "output.bias": read["fc.bias"][word_ids],
    }
    return {f"decoder.{name}": weight for name, weight in weights.items()}


def read_words(path: str) -> dict[str, int]:
    """The ids of a word map by word, the special tokens first; InputError where the file is not a word map."""
    word_map = read_json(path)
    if not isinstance(word_map, dict) or not all(type(word_id) is int for word_id in word_map.values()):
        raise InputError(f"{path} is no word map: not a JSON object of words and their ids")
    if sorted(word_map.values()) != list(range(len(word_map))):
        raise InputError(f"{path}: the ids of its {len(word_map)} words are not 0 to {len(word_map) - 1}")
    for token in SPECIAL_TOKENS:
        if token not in word_map:
            raise InputError(f"{path} has no {token}, which the word maps of the tutorial have")
    words = sorted(word_map.keys() - set(SPECIAL_TOKENS), key=lambda word: word_map[word])
    return {word: word_map[word] for word in [*SPECIAL_TOKENS, *words]}


def convert(file: PickledFile, word_map: dict[str, int]) -> dict[str, Any]:
    """A checkpoint as train.py writes it, without training state."""
    content, source = file.content, str(file.path)
    if not isinstance(content, dict) or not content.keys() >= {"encoder", "decoder", "encoder_optimizer"}:
        raise InputError(f"{source} is no checkpoint of the tutorial: it has no encoder, decoder and encoder_optimizer")
    encoder, decoder = content["encoder"], content["decoder"]
    fine_tuned = content["encoder_optimizer"] is not None
    settings = train.Settings(
        region_dim=0,
        fine_tune_encoder=fine_tuned,
        unfreeze_from="layer2" if fine_tuned else "",
        **read_encoder_settings(encoder, source),
        **read_decoder_settings(decoder, source),
    )
    options = model_settings(settings)
    with name_impossible_sizes(source), EmptyWeights():
        captioner = Captioner(settings, Vocabulary(list(word_map)), IMAGE_SIZE, "squash", load_weights=False)
    names = [name for name in captioner.state_dict() if name.startswith("encoder.")]
    return {
        "format": CHECKPOINT_FORMAT,
        "model": read_encoder(file, encoder, names) | read_decoder(file, decoder, list(word_map.values())),
        "model_settings": options,
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
    """Read, check and write."""
    if Path(settings.output).exists():
        raise InputError(f"--output {settings.output} exists: give another, or delete it")
    word_map = read_words(settings.word_map)
    with open_pickled(settings.checkpoint, is_admitted) as file:
        checkpoint = convert(file, word_map)
    captioner_from_checkpoint(checkpoint, settings.checkpoint)  # sizes that fit each other, finite numbers
    save_torch(settings.output, checkpoint)
    print(
        f"wrote {settings.output}: {checkpoint['settings']['encoder']}, {len(word_map)} words; --length_penalty 0 of "
        f"caption.py and eval.py ranks captions as the tutorial does"
    )


if __name__ == "__main__":
    run_script(main, Settings)
