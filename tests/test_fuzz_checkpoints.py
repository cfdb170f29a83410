"""Mutated checkpoints: each gives the captions of the original, or a one-line error, and never takes much memory.

There are three kinds of mutations, all seeded: of the dictionary, of the file's bytes, and of the pickle in the file,
with correct checksums. A mutation may leave a valid checkpoint of another model: other words, another image size or
grid, one weight in place of another. Those (`OTHER_MODEL`, and mutated pickles) must load and caption, or be a one-line
error.
"""

import copy
import io
import math
import random
import zipfile

import pytest
import torch
from test_models import inference_checkpoint

import train
from conftest import SMALL, beams, build, peak_memory
from decoding.beam_search import beam_search
from models import load_captioner, model_settings
from text.vocabulary import SPECIAL_TOKENS
from utils import InputError

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, of the odd tensors that are made here
TINY = {**vars(SMALL), "encoder": "squeezenet1_1", "encoder_layer": "features.3", "graph_layers": 1}
WORDS = [*SPECIAL_TOKENS, *"abcdefgh"]
OTHER_MODEL = {"image_size", "resize", "grid_size", "graph_knn", "words"}
OVERHEAD = 16 * 2**20  # bytes that Python and torch may take on top
VALUES = [
    *(None, True, False, -1, 0, 1, 3, 10**7, 10**12, 2**70, 2**2000, 0.3, -0.5, 1e308, math.inf, math.nan, 1j),
    *("", "x", "pad", "gru", "dot", "resnet18", "vgg11", "features", "features.4", "é", "\ud800", "x" * 100_000),
    *(b"", [], [1], {}, {1: 2}, (), ("a",), set(), torch.Size([2]), torch.float, torch.device("cpu"), [[[]]] * 9),
    *(torch.tensor(1), torch.zeros(0), torch.zeros(2, 3), torch.zeros(1).expand(10**12)),
]
TENSORS = [
    lambda weight: weight[:0],
    lambda weight: weight.unsqueeze(0),
    lambda weight: weight.flatten(),
    lambda weight: weight.double(),
    lambda weight: weight.bfloat16(),
    lambda weight: weight.long(),
    lambda weight: weight.to(torch.complex64),
    lambda weight: weight.to(torch.float8_e5m2),
    lambda weight: torch.full_like(weight, math.nan),
    lambda weight: torch.full_like(weight, -math.inf),
    lambda weight: weight.to("meta"),
    lambda weight: weight.float().to_sparse(),
    lambda weight: torch.sparse_coo_tensor(torch.zeros(2, 0), [], (10**9, 10**9)),
    lambda weight: torch.quantize_per_tensor(weight.float(), 0.1, 0, torch.qint8),
    lambda weight: torch.nested.nested_tensor([weight, weight]),
    lambda weight: weight.flatten()[:1].expand(10**12),
    lambda weight: weight.flatten()[:1].expand(10**6, 10**6),
    lambda weight: weight.flatten()[:1].expand(weight.numel() or 1).view(weight.shape),
    lambda weight: torch.cat([weight.flatten(), weight.flatten()])[::2],
]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint: its content, path and captions."""
    torch.manual_seed(3)
    captioner = build(type(SMALL)(**TINY), WORDS)
    for parameter in captioner.decoder.parameters():
        parameter.data *= 4  # far from uniform, so that captions differ
    content = inference_checkpoint(captioner, type(SMALL)(**TINY))
    path = tmp_path_factory.mktemp("original") / "best.pt"
    torch.save(content, path)
    return content, path, captions_of(load_captioner(path, "cpu"))


def captions_of(captioner):
    """Caption two images; returns None if the model's images are too large to try."""
    if captioner.image_size * captioner.encoder.num_regions > 10_000:
        return None
    generator = torch.Generator().manual_seed(0)
    size = (2, 3, captioner.image_size, captioner.image_size)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    with torch.inference_mode():
        captions, _ = beam_search(captioner.decoder, captioner.encode(images).regions, beams(2, 6))
    return [captioner.vocabulary.decode(caption[0].tolist()) for caption in captions]


def copy_containers(content):
    """Copy a checkpoint's dictionary and its containers, not its tensors."""
    return {key: type(value)(value) if isinstance(value, (dict, list)) else value for key, value in content.items()}


def mutate_content(rng, content, path):
    """Write a checkpoint with one entry changed; returns whether it may be a model with other captions."""
    content = copy_containers(content)
    where = rng.choice([content, content["model_settings"], content["model"], content["words"]])
    keys = list(where) if isinstance(where, dict) else list(range(len(where)))
    key, action = rng.choice(keys), rng.randrange(6)
    if action == 0:
        del where[key]
    elif action == 1 and isinstance(where, dict):
        where[rng.choice(["", "é", 0, None, (1, 2), "model.x", f"{key}.x"])] = rng.choice(VALUES)
    elif action == 2 and isinstance(where, dict):
        where[key] = where[rng.choice(keys)]
    elif where is content["model"]:
        where[key] = rng.choice(TENSORS)(where[key]) if action > 3 else rng.choice(VALUES)
    else:
        where[key] = rng.choice(VALUES)
    torch.save(content, path)
    swapped = action == 2 and where is content.get("model")
    return swapped or key in OTHER_MODEL or where is content.get("words")


def mutate_bytes(rng, data):
    """Change, cut off, leave out or repeat some bytes of a file."""
    data, start, length = bytearray(data), rng.randrange(len(data)), rng.choice([1, 1, 2, 8, 64, 1000])
    if rng.random() < 0.3:  # near the ends: the zip directory
        start = (len(data) - 1 - rng.randrange(3000)) % len(data)
    action = rng.randrange(6)
    if action == 0:
        return bytes(data[:start])
    if action == 1:
        del data[start : start + length]
    elif action == 2:
        data[start:start] = data[start : start + length]
    elif action == 3:
        data[start : start + length] = rng.randbytes(length)
    else:
        for _ in range(length % 10):
            data[rng.randrange(start, min(start + 50, len(data)))] ^= 1 << rng.randrange(8)
    return bytes(data)


def mutate_pickle(rng, data):
    """Mutate the pickle in a checkpoint's zip file; the checksums are correct."""
    output = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(output, "w") as target:
        for name in source.namelist():
            record = source.read(name)
            target.writestr(name, mutate_bytes(rng, record) if name.endswith("data.pkl") else record)
    return output.getvalue()


def check(path, original, may_differ):
    """Return True if a checkpoint loads; assert that it keeps the rules."""
    model_bytes = sum(weight.nbytes for weight in original[0]["model"].values())
    limit = 2 * path.stat().st_size + model_bytes + OVERHEAD
    before = peak_memory(reset=True)
    try:
        loaded = load_captioner(path, "cpu")
    except InputError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1 and len(str(error)) < 500, error
        return False
    finally:
        assert peak_memory() - before <= limit
    captions = captions_of(loaded)
    assert may_differ or captions == original[2]
    return True


@pytest.fixture
def share(request):
    """The share of the seeds to run."""
    return request.config.getoption("--fuzz")


@pytest.mark.parametrize("seeds", [range(150), pytest.param(range(150, 2150), marks=pytest.mark.slow)], ids=len)
def test_mutated_checkpoints_are_the_same_or_one_line(original, tmp_path, seeds, share):
    content, intact, _ = original
    data, loaded = intact.read_bytes(), 0
    for seed in seeds[: round(share * len(seeds))]:
        rng, kind, may_differ = random.Random(seed), seed % 3, False
        path = tmp_path / f"seed_{seed}.pt"
        if kind == 0:
            may_differ = mutate_content(rng, content, path)
        elif kind == 1:
            path.write_bytes(mutate_bytes(rng, data))
        else:
            path.write_bytes(mutate_pickle(rng, data))
            may_differ = True
        loaded += check(path, original, may_differ)
        path.unlink()
    assert loaded > share * len(seeds) / 100  # some mutations do no harm


@pytest.mark.parametrize("name", [name for name in model_settings(type(SMALL)(**TINY)) if isinstance(TINY[name], int)])
@pytest.mark.parametrize("value", [-1, 10**7, 2**62, 2**2000])
def test_sizes_that_the_weights_do_not_have_cost_no_memory(name, value, original, tmp_path):
    content = copy_containers(original[0])
    content["model_settings"][name] = value
    torch.save(content, tmp_path / "mutated.pt")
    loaded = check(tmp_path / "mutated.pt", original, may_differ=name in OTHER_MODEL)
    unused = ("graph_knn", "heads", "ffn_dim")  # by this decoder
    assert not loaded or (name in unused and value > 0)


def test_a_compressed_file_is_not_unpacked(original, tmp_path):
    path = tmp_path / "mutated.pt"
    with zipfile.ZipFile(original[1]) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        target.writestr("best/data/999", bytes(500_000_000))
    assert not check(path, original, may_differ=False)


def test_a_flipped_bit_of_a_weight_is_found(original, tmp_path):
    data = bytearray(original[1].read_bytes())
    weight = original[0]["model"]["decoder.output.weight"].numpy().tobytes()
    data[data.index(weight) + 100] ^= 1
    (tmp_path / "mutated.pt").write_bytes(data)
    assert not check(tmp_path / "mutated.pt", original, may_differ=False)


TRAINING = ["settings", "defaults", "progress", "optimizer", "ema", "rng", "data"]


def mutate_training_state(rng, content):
    """Remove or replace an entry of a checkpoint that only a resumed run reads."""
    holder, key = content, rng.choice(TRAINING)
    while isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.7:
        holder = holder[key]
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        if "fused" in holder:  # the rest of Adam's settings is torch's
            keys = ["params", "lr", "initial_lr", "betas", "eps", "weight_decay"]
        key = rng.choice(keys)
    if rng.random() < 0.3:
        del holder[key]
    else:
        holder[key] = rng.choice(VALUES)


@pytest.mark.parametrize("seeds", [range(15), pytest.param(range(15, 215), marks=pytest.mark.slow)], ids=len)
def test_mutated_training_states_are_resumed_or_one_line(run_folder, tmp_path, command, seeds, share):
    original, resumed = torch.load(run_folder / "last.pt", weights_only=True), 0
    seeds = seeds[: round(share * len(seeds))]
    for seed in seeds:
        content = copy.deepcopy(original)
        mutate_training_state(random.Random(seed), content)
        torch.save(content, tmp_path / "last.pt")
        status, _, errors = command(train, "--resume", tmp_path / "last.pt", "--device", "cpu")
        assert status in (0, 2) and (status == 0 or errors.count("\n") == 1), f"seed {seed}: {errors}"
        resumed += status == 0
    assert resumed < len(seeds) / 2 or len(seeds) < 60
