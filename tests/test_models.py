"""Captioners of every kind, and their checkpoints."""

from dataclasses import replace

import pytest
import torch
from torchvision.ops import StochasticDepth

import train
from conftest import CPU, SMALL, beams, build
from datasets import Example, collate
from decoding.beam_search import beam_search
from decoding.sampling import force_decode
from models import CHECKPOINT_FORMAT, load_captioner, model_settings
from modules.encoders import GRID_LAYERS
from modules.regions import has_area
from text.cider import CiderD
from text.vocabulary import SPECIAL_TOKENS
from training.losses import captioning_loss
from training.optim import make_optimizer
from training.steps import scst_step
from utils import InputError

# Of each family the smallest network and the size of its images.
ENCODERS = {
    "resnet18": 64,
    "resnext50_32x4d": 64,
    "vgg11": 64,
    "densenet121": 64,
    "mobilenet_v3_small": 64,
    "efficientnet_b0": 64,
    "convnext_tiny": 64,
    "squeezenet1_1": 64,
    "mnasnet0_5": 64,
    "shufflenet_v2_x0_5": 64,
    "regnet_y_400mf": 64,
    "inception_v3": 128,
    "googlenet": 64,
    "swin_t": 64,
    "vit_b_32": 64,
}
VARIANTS = {
    "soft-lstm": {},
    "dot-gru": {"attention": "dot", "cell": "gru"},
    "hard-rnn": {"attention": "hard", "cell": "rnn"},
    "none-lstm": {"attention": "none"},
    "graph1": {"graph_layers": 1, "graph_heads": 4},
    "graph2": {"graph_layers": 2, "graph_heads": 1, "graph_knn": 0},
    "grid14": {"grid_size": 14},
    "transformer-2+2-learned": {"decoder": "transformer", "encoder_layers": 2, "encoder_positions": "learned"},
    "transformer-embed8": {"decoder": "transformer", "embed_dim": 8, "decoder_layers": 1, "heads": 2},
    "adaptive-image_first-layers2": {"decoder": "adaptive", "image_first": True, "layers": 2},
    "image_first": {"attention": "none", "image_first": True},
    "image_first-soft-gru": {"cell": "gru", "image_first": True},
    "layers2-gru": {"cell": "gru", "layers": 2},
    "layers3-none-rnn": {"cell": "rnn", "attention": "none", "layers": 3},
    "sgrvinod": {"decoder": "sgrvinod"},
    "objects-up_down-boxes": {"regions": "objects", "decoder": "up_down", "box_features": True},
    "objects-adaptive": {"regions": "objects", "decoder": "adaptive"},
    "both-boxes-region_dim0": {"regions": "both", "box_features": True, "region_dim": 0},
    "both-transformer-2+2-sine": {"regions": "both", "decoder": "transformer", "encoder_layers": 2},
    "objects-spatial-gat": {"regions": "objects", "graph_layers": 2, "graph_edges": "spatial"},
    "objects-spatial-gcn": {"regions": "objects", "graph_layers": 1, "graph_edges": "spatial", "graph_layer": "gcn"},
    "both-all-gcn": {"regions": "both", "graph_layers": 1, "graph_edges": "all", "graph_layer": "gcn"},
    "both-similar-gat": {"regions": "both", "graph_layers": 1, "graph_edges": "similar"},
    "objects-geometry": {"regions": "objects", "encoder_layers": 2, "geometry": True},
}
WORDS = [*SPECIAL_TOKENS, "a", "b", "c"]
CAPTIONS = [[[1, 4, 5, 6, 2], [1, 4, 2]], [[1, 5, 5, 4, 6, 4, 2]], [[1, 6, 2]], [[1, 6, 4, 4, 5, 2]]]


def test_every_family_has_an_encoder_here():
    assert {family for family in GRID_LAYERS if not any(name.startswith(family) for name in ENCODERS)} == set()


# Of three images; the fourth has none.
BOXES = torch.tensor(
    [[[0, 0, 0.4, 0.5], [0.3, 0.2, 1, 0.9]], [[0.5, 0.5, 0.9, 1], [0] * 4], [[0, 0.1, 1, 0.2], [0] * 4]]
)


def search(captioner, encoded):
    return beam_search(captioner.decoder, encoded.regions, beams(3, 8), encoded.mask)[0][:, 0]


def inference_checkpoint(captioner, settings, feature_dim=0):
    """Return what inference needs of a captioner of these settings."""
    return {
        "format": CHECKPOINT_FORMAT,
        "model": captioner.state_dict(),
        "model_settings": model_settings(settings),
        "image_size": captioner.image_size,
        "resize": captioner.resize,
        "feature_dim": feature_dim,
        "fine_tune_encoder": settings.fine_tune_encoder,
        "words": captioner.vocabulary.idx2word,
    }


def start(image_size=64, **changes):
    """Return a captioner with these changes of its settings, its settings, and a batch of four images."""
    changes = {"encoder": "squeezenet1_1", "encoder_layer": "", "grid_size": 0, **changes}
    settings = replace(SMALL, dropout=0.0, label_smoothing=0.0, **changes)
    torch.manual_seed(0)
    captioner = build(settings, WORDS, image_size).train()
    scale = image_size // 4
    images = torch.randint(0, 256, (4, 3, 4, 4), dtype=torch.uint8)
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    boxes = torch.cat([BOXES, torch.zeros(1, 2, 4)]) if captioner.uses_objects else [None] * 4
    batch = collate([Example(i, images[i], one, boxes[i]) for i, one in enumerate(CAPTIONS)])
    return captioner, settings, batch


KINDS = [pytest.param({"encoder": name, "image_size": size}, id=name) for name, size in ENCODERS.items()]
KINDS += [pytest.param(changes, id=name) for name, changes in VARIANTS.items()]


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.slow
def test_every_model_has_gradients_and_a_checkpoint_that_gives_the_same_captions(changes, tmp_path):
    captioner, settings, batch = start(**changes)
    images, boxes = batch.inputs, batch.boxes
    for module in captioner.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0  # or a block may get no gradient by chance

    # Shapes, weights that sum to one, and a gradient for each parameter that is trained.
    optimizer = make_optimizer(captioner, settings)
    outputs = captioner(images, batch.words, batch.lengths, boxes=boxes)
    T, R = int(batch.lengths.max()), captioner.encoder.num_regions
    R = {"grid": R, "objects": 3, "both": R + 3}[settings.regions]
    assert outputs.logits.shape == (int(batch.lengths.sum()), len(WORDS))
    assert outputs.alpha.shape == (T, 4, 2, R)
    real = torch.arange(T).view(-1, 1, 1) < batch.lengths
    torch.testing.assert_close(outputs.alpha.sum(-1), real.float())
    loss, _ = captioning_loss(outputs, batch.lengths, settings, *batch.counts())
    loss.backward()
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert len(trained) == len(list(captioner.parameters()))
    for name, parameter in captioner.named_parameters():
        if parameter.numel():  # a context of width 0 has empty weights
            assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name

    # A checkpoint gives the same captions of the photos.
    captioner.eval()
    torch.save(inference_checkpoint(captioner, settings), tmp_path / "best.pt")
    loaded = load_captioner(tmp_path / "best.pt", "cpu")
    assert loaded.vocabulary.idx2word == WORDS
    with torch.no_grad():
        encoded, encoded_by_loaded = captioner.encode(images, boxes=boxes), loaded.encode(images, boxes=boxes)
    assert encoded.regions.shape[:2] == (4, R)
    torch.testing.assert_close(encoded_by_loaded.regions, encoded.regions)
    captions = search(captioner, encoded)
    assert torch.equal(search(loaded, encoded_by_loaded), captions)
    forced = captions.unsqueeze(1)
    log_probs = [force_decode(c.decoder, encoded.regions, forced, encoded.mask)[0] for c in (loaded, captioner)]
    torch.testing.assert_close(*log_probs)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_every_decoder_memorizes_four_images(variant):
    """From features as they are cached."""
    captioner, settings, batch = start(**VARIANTS[variant])
    settings = replace(settings, fine_tune_encoder=False, learning_rate=2e-2)
    with torch.no_grad():
        features = captioner.encoder(batch.inputs)
        features = (features - features.mean(0)) / features.std()  # random weights make all images much alike
    batch.inputs, boxes = features, batch.boxes
    optimizer, counts = make_optimizer(captioner, settings), batch.counts()
    steps = 40 if settings.decoder in ("transformer", "up_down") else 25
    losses = [train.train_step(captioner, optimizer, batch, settings, CPU)[0] / counts[0] for _ in range(steps)]
    assert losses[0] > 1.5 and losses[-1] < 0.35

    # A batch is searched as its images are one by one.
    captioner.eval()
    with torch.no_grad():
        together = search(captioner, captioner.encode(features, boxes))
    for b in range(4):
        own = None
        if boxes is not None:  # without the padding
            own = boxes[b : b + 1, has_area(boxes[b])]
        alone = search(captioner, captioner.encode(features[b : b + 1], own))
        assert together[b].tolist()[: alone.shape[1]] == alone[0].tolist()

    # Scheduled sampling and self-critical training take their steps.
    reward = CiderD([[caption[1:] for caption in captions] for captions in CAPTIONS])
    for objective in ("scheduled sampling", "scst"):
        before = [weight.clone() for weight in captioner.decoder.parameters()]
        if objective == "scst":
            scst_step(captioner, optimizer, batch, settings, CPU, reward)
        else:
            train.train_step(captioner.train(), optimizer, batch, settings, CPU, counts, sampling_prob=0.5)
        after = list(captioner.decoder.parameters())
        assert all(weight.isfinite().all() for weight in after)
        assert not all(torch.equal(*pair) for pair in zip(before, after, strict=True))


OF_REGION_FEATURES = {
    "soft": {},
    "adaptive-dim0": {"decoder": "adaptive", "region_dim": 0},
    "up_down-boxes": {"decoder": "up_down", "box_features": True},
    "transformer-geometry": {"decoder": "transformer", "encoder_layers": 1, "geometry": True},
    "spatial-gat": {"graph_layers": 1, "graph_edges": "spatial"},
    "similar-gcn": {"graph_layers": 1, "graph_edges": "similar", "graph_layer": "gcn"},
}


@pytest.mark.parametrize("variant", OF_REGION_FEATURES)
def test_models_of_region_features(variant, tmp_path):
    """Photos with different numbers of regions: learned, searched as each alone, and kept by a checkpoint."""
    changes = {"regions": "features", "fine_tune_encoder": False, "dropout": 0.0, **OF_REGION_FEATURES[variant]}
    settings = replace(SMALL, label_smoothing=0.0, learning_rate=2e-2, **changes)
    torch.manual_seed(0)
    captioner = build(settings, WORDS, feature_dim=8).train()
    sizes, generator = (3, 1, 4, 2), torch.Generator().manual_seed(1)
    corners = [torch.rand(n, 2, 2, generator=generator).sort(dim=1).values.flatten(1) for n in sizes]
    features = [torch.randn(n, 8, generator=generator) for n in sizes]
    batch = collate(list(map(Example, range(4), features, CAPTIONS, corners)))
    assert batch.inputs.shape == (4, 4, 8) and batch.boxes.shape == (4, 4, 4)
    optimizer = make_optimizer(captioner, settings)
    losses = [train.train_step(captioner, optimizer, batch, settings, CPU)[0] / batch.counts()[0] for _ in range(40)]
    assert losses[-1] < 0.5 < losses[0]
    assert all(param.grad.isfinite().all() for param in captioner.parameters() if param.grad is not None)
    captioner.eval()
    torch.save(inference_checkpoint(captioner, settings, feature_dim=8), tmp_path / "best.pt")
    loaded = load_captioner(tmp_path / "best.pt", "cpu")
    with torch.no_grad():
        encoded = loaded.encode(batch.inputs, batch.boxes)
        together = search(loaded, encoded)
        for b, index in enumerate(batch.indices):
            alone = captioner.encode(features[index].unsqueeze(0), corners[index].unsqueeze(0))
            torch.testing.assert_close(encoded.regions[b, : sizes[index]], alone.regions[0])
            found = search(captioner, alone)[0].tolist()
            assert together[b].tolist()[: len(found)] == found


def change(name, value):
    """A change of a checkpoint: its setting of this name."""
    return lambda checkpoint: checkpoint["model_settings"].update({name: value})


MALFORMED = {
    "not a checkpoint": (lambda checkpoint: checkpoint.pop("words"), "is not a checkpoint of train.py"),
    "no settings": (
        lambda checkpoint: checkpoint.update(model_settings={}),
        "model_settings do not match this version",
    ),
    "integers as words": (lambda checkpoint: checkpoint.update(words=[1, 2]), "words is not a list of words"),
    "a word twice": (lambda checkpoint: checkpoint["words"].append("a"), "words has a word twice"),
    "fewer words": (lambda checkpoint: checkpoint["words"].pop(), r"do not fit its settings and \d+ words: decoder"),
    "text as a size": (lambda checkpoint: checkpoint.update(image_size="32"), "image_size is '32', not of type int"),
    "huge images": (
        lambda checkpoint: checkpoint.update(image_size=10**6),
        "images of 1000000 pixels: must have 1 to 4096",
    ),
    "an unknown cell": (change("cell", "elman"), "--cell elman: choose from lstm gru rnn"),
    "a wide cell": (change("hidden_dim", 10**7), "decoder.* is .* not torch.float32 .*10000000"),
    "many layers": (change("graph_layers", 10**8), "--graph_layers 100000000: must be at most 100"),
    "another decoder": (change("decoder", "up_down"), "its weights do not fit its settings: 'decoder"),
    "a fine grid": (change("grid_size", 10**6), "exceeds the image size"),
    "dropout of everything": (change("dropout", float("nan")), "--dropout nan: must be at least 0"),
    "a missing weight": (lambda checkpoint: checkpoint["model"].popitem(), "is missing"),
    "doubles": (
        lambda checkpoint: checkpoint.update(model={name: x.double() for name, x in checkpoint["model"].items()}),
        "float64",
    ),
    "a terabyte of one number": (
        lambda checkpoint: checkpoint["model"].update({"decoder.gate.bias": torch.zeros(1).expand(10**12)}),
        "not one after another",
    ),
    "a sparse weight": (
        lambda checkpoint: checkpoint["model"].update(x=torch.zeros(2, 2).to_sparse()),
        "x is not a dense tensor",
    ),
    "weights that are not numbers": (
        lambda checkpoint: checkpoint["model"]["decoder.output.bias"].fill_(float("nan")),
        "decoder.output.bias has values that are not finite",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_checkpoint_is_one_line_that_names_it(name, run_folder, tmp_path):
    change, message = MALFORMED[name]
    checkpoint = torch.load(run_folder / "best.pt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "other.pt")
    with pytest.raises(InputError, match=message) as caught:
        load_captioner(tmp_path / "other.pt", "cpu")
    assert str(tmp_path / "other.pt") in str(caught.value)


def test_a_loaded_model_is_the_same_and_trainable_and_loading_draws_no_random_numbers(run_folder):
    before = torch.get_rng_state()
    captioner = load_captioner(run_folder / "best.pt", "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    saved = torch.load(run_folder / "best.pt", weights_only=True)
    assert captioner.vocabulary.idx2word == saved["words"] and not captioner.training
    for name, tensor in captioner.state_dict().items():
        assert torch.equal(tensor, saved["model"][name]), name
    assert all(parameter.requires_grad for parameter in captioner.parameters())


def test_regions_are_a_dense_layer_with_relu_on_the_features():
    captioner = build(SMALL, 7).eval()
    features = torch.randn(2, 16, 64)
    linear = captioner.region_layer[0]
    expected = (features @ linear.weight.T + linear.bias).clamp_min(0)
    torch.testing.assert_close(captioner.encode(features).regions, expected)
