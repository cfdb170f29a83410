"""The project on the pretend device of `pretend_gpu.py`: python tests/run_on_pretend_gpu.py PART FOLDER

PART is a function of this file that returns what test_pretend_gpu.py checks, printed as JSON. FOLDER is empty.
"""

import contextlib
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

sys.path.insert(0, str(Path(__file__).parent.parent))
from pretend_gpu import GPUTensor, PretendGPU

import caption
import eval
import models
import modules.cpu
import modules.transformer
import train
import training.state
from common.files import read_json, read_jsonl
from conftest import SMALL, beams, prepare_shapes, samples
from datasets import CaptionDataset, collate
from decoding.beam_search import beam_search
from decoding.captions import caption_batch
from decoding.constraints import Constraints
from decoding.ensemble import EnsembleDecoder
from decoding.sampling import sample
from text.cider import CiderD
from text.vocabulary import END
from training.start import start_run
from training.steps import validation_loss
from utils import choose_runtime, copy_to_device

ROOT = Path(__file__).parent.parent
FROZEN = replace(SMALL, fine_tune_encoder=False, max_length=4)

# ------------------------------------------------------------------------------------------------- the program

CASES = {
    "soft attention": replace(FROZEN, hflip=True),
    "bf16": replace(FROZEN, hflip=True, precision="bf16"),
    "hard attention": replace(
        FROZEN,
        cell="gru",
        attention="hard",
        graph_layers=1,
        scheduled_sampling_max_prob=0.5,
        gradient_accumulation_steps=2,
        doubly_stochastic=1.0,
    ),
    "adaptive attention": replace(FROZEN, decoder="adaptive", image_first=True, layers=2),
    "fine-tuned encoder, dot attention": replace(
        FROZEN, cell="rnn", attention="dot", fine_tune_encoder=True, in_memory=True
    ),
    "transformer": replace(
        FROZEN, decoder="transformer", encoder_layers=1, scheduled_sampling_max_prob=0.5, doubly_stochastic=1.0
    ),
    "up_down, objects": replace(
        FROZEN,
        decoder="up_down",
        regions="both",
        box_features=True,
        graph_layers=1,
        graph_edges="spatial",
        grounding_weight=1.0,
    ),
    "scst": replace(FROZEN, objective="scst", gradient_accumulation_steps=2),  # from the hard attention
}


def program(folder):
    """What the scripts compute on both devices: a run of two epochs, the second resumed, its scores and a caption."""
    data = prepare_shapes(folder / "data", num_scenes=8)
    results = {}
    for name, settings in CASES.items():
        results[name] = {device: run_scripts(name, device, settings, data, folder) for device in ("cpu", "gpu")}
    return results


def run_scripts(name, device, settings, data, folder):
    """Train, resume and decode on a device; everything that must be the same on another."""
    run = folder / f"{name} {device}"
    common = {"data_folder": str(data)}
    if not settings.fine_tune_encoder:
        common["features_folder"] = str(folder / f"features {device}")
    if settings.objective == "scst":
        settings = replace(settings, init_from=str(folder / f"hard attention {device}" / "best.pt"))
    with paths_of_gpus(), patch.object(eval, "has_java", lambda: False):  # METEOR takes seconds
        train.main(replace(settings, run_folder=str(run), device=device, epochs=1, **common))
        train.main(train.Settings(resume=str(run / "last.pt"), epochs=2))  # on the device that was saved
        result = {} if name == "scst" else decode(run, device, settings, common)
    result["log"] = without_times(read_jsonl(run / "log.jsonl"))
    model = torch.load(run / "last.pt", weights_only=True)["model"]
    return result | {"weights": sum(weights.double().abs().sum().item() for weights in model.values())}


def decode(run, device, settings, common):
    """The scores and captions of eval.py for a run, after caption.py with its pictures on the pretend device."""
    decoding = {"device": device, "precision": settings.precision, "max_length": 4}
    best, data = str(run / "best.pt"), Path(common["data_folder"])
    eval.main(eval.Settings(checkpoint=(best,), beam_sizes=(3,), **decoding, **common))
    if device == "gpu":
        if settings.graph_layers:
            decoding["graph_word"] = "a"
        if settings.regions != "grid":
            decoding["objects"] = str(data / "dataset_shapes.json")
        photos, output_folder = (str(min((data / "photos").glob("*.png"))),), str(run / "pictures")
        caption.main(caption.Settings(photos=photos, checkpoint=(best,), output_folder=output_folder, **decoding))
    scores = read_json(next(run.glob("scores_best_*.json")))["scores"]
    return {"scores": without_times(scores), "captions": read_json(next(run.glob("results_*.json")))}


def without_times(rows):
    """Rows of a log or of scores without their seconds and rates."""
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


def paths_of_gpus():
    """Let the CPU take the paths of a GPU where the project has two."""
    stack = contextlib.ExitStack()
    stack.enter_context(patch.object(modules.cpu, "applies_to", lambda x: False))
    stack.enter_context(patch.object(modules.transformer, "scaled_dot_product", scaled_dot_product))
    return stack


def scaled_dot_product(query, key, value, mask=None, *, original=modules.transformer.scaled_dot_product, **options):
    """Attention as a GPU computes it, with a kernel that the CPU has, too."""
    if options.pop("with_alpha", False):
        return original(query, key, value, mask, with_alpha=True, **options)
    with sdpa_kernel(SDPBackend.MATH):
        return modules.transformer.fused_attention(query, key, value, mask, **options), None


# ------------------------------------------------------------------------------------------------------- waits

STEPS = {
    "soft attention": FROZEN,
    "no attention": replace(FROZEN, attention="none"),
    "hard attention": replace(FROZEN, attention="hard"),
    "adaptive attention": replace(FROZEN, decoder="adaptive", image_first=True, layers=2),
    "up_down": replace(FROZEN, decoder="up_down"),
    "doubly stochastic": replace(FROZEN, doubly_stochastic=1.0),
    "objects": replace(FROZEN, regions="both", box_features=True, grounding_weight=1.0),
    "spatial graph": replace(FROZEN, regions="objects", graph_layers=1, graph_edges="spatial"),
    "gated graph": replace(FROZEN, regions="objects", graph_layers=1, graph_edges="spatial", graph_layer="gcn"),
    "geometry": replace(FROZEN, regions="objects", encoder_layers=1, geometry=True),
    "graph": replace(FROZEN, graph_layers=2),
    "scheduled sampling": replace(FROZEN, scheduled_sampling_max_prob=0.5),
    "two micro-batches": replace(FROZEN, gradient_accumulation_steps=2),
    "transformer": CASES["transformer"],
    "fine-tuned encoder": replace(FROZEN, fine_tune_encoder=True),
}


class Steps:
    """A training run on the pretend device that takes steps on one batch of six images."""

    def __init__(self, settings, data, gpu):
        self.gpu, self.runtime = gpu, choose_runtime("gpu", "fp32")
        self.state = start_run(replace(settings, data_folder=str(data)), None, self.runtime.device)
        self.state.captioner.train()
        self.state.step = 5  # scheduled sampling has begun
        self.dataset = CaptionDataset(data, "train", self.state.captioner.vocabulary)
        if self.state.captioner.uses_objects:
            self.dataset.use_objects()
            self.dataset.use_names(self.state.captioner.vocabulary)
        items = [self.dataset[index, False] for index in range(6)]
        if not settings.fine_tune_encoder:
            size = self.state.captioner.encoder.num_regions, self.state.captioner.encoder.feature_dim
            items = [item._replace(input=torch.rand(size).half()) for item in items]
        self.batch = collate(items)

    def take(self, reward=None):
        """One step; returns the waits in it."""
        waits = self.gpu.waits.copy()
        train.optimization_step(self.state, self.batch, self.runtime, 10, self.batch.counts(), reward)
        return self.gpu.waits - waits


def waits(folder):
    """The waits of a training step in several settings, and those of decoding."""
    data, gpu = prepare_shapes(folder / "data", num_scenes=8), the_gpu()
    table = {}
    for name, settings in STEPS.items():
        steps = Steps(settings, data, gpu)
        table[f"step, {name}"] = steps.take()
    steps.state.settings = replace(FROZEN, fine_tune_encoder=True, objective="scst", max_length=2)
    steps.state.captioner.decoder.output.bias.data[END] = -100.0  # no caption ends before max_length
    reward = CiderD([[caption[1:] for caption in captions] for captions in steps.dataset.captions])
    samples, searches = {2: steps.take(reward)}, {}
    steps.state.settings = replace(steps.state.settings, max_length=3)
    samples[3] = steps.take(reward)
    table |= per_word("scst step", samples)
    for max_length in (2, 3):
        before = gpu.waits.copy()
        decoding = beams(3, max_length)
        captioner = steps.state.captioner.eval()
        caption_batch(captioner, steps.batch.inputs[:2], decoding, steps.runtime)
        searches[max_length] = gpu.waits - before
    table |= per_word("beam search of two images", searches)
    captioner.decoder.output.bias.data[END] = 0.2
    torch.manual_seed(0)
    regions = 30 * torch.randn(6, 4, captioner.decoder.context_proj.in_features)  # so different that some end early
    regions, before = copy_to_device(regions, steps.runtime.device), gpu.waits.copy()
    captions, _ = beam_search(captioner.decoder, regions, beams(1, 9))
    table["beam search of nine words"] = gpu.waits - before
    ended = captions.cpu()[:, 0, 4] == END
    assert ended.any() and not ended.all()  # some images left the search after its fourth word
    transformer = Steps(STEPS["transformer"], data, gpu).state.captioner.eval().decoder
    transformer.output.bias.data[END] = -100.0  # no caption ends before max_length
    regions, before = copy_to_device(torch.rand(6, 4, SMALL.region_dim), steps.runtime.device), gpu.waits.copy()
    beam_search(transformer, regions, beams(3, 3))
    table["beam search of the transformer"] = gpu.waits - before
    table |= waits_of_decoding(captioner.decoder, regions, gpu)
    before = gpu.waits.copy()
    validation_loss(steps.state.captioner, steps.dataset, 4, steps.runtime)  # two batches
    table["validation loss"] = gpu.waits - before
    return {name: readable(waits) for name, waits in table.items()}


def waits_of_decoding(decoder, regions, gpu):
    """The waits of three words with all that a search can be asked for, of an ensemble's and of truncated samples."""
    decoder.output.bias.data[END] = -100.0  # no caption ends
    V, constraints = decoder.output.out_features, Constraints(no_repeat_ngram=2, min_length=1, banned_endings=(5, 6))
    word_map = copy_to_device(torch.tensor([0, 1, 2, 3, 5, 4, *range(6, V)]), regions.device)
    ensemble = EnsembleDecoder([decoder, decoder], [None, word_map])
    generator = torch.Generator().manual_seed(0)  # the pretend device has none
    table = {}
    for name, function in {
        "search with constraints and groups": lambda: beam_search(
            decoder,
            regions,
            beams(4, 3, num_beam_groups=2, diversity_penalty=1.0),
            constraints=constraints,
        ),
        "search of an ensemble": lambda: beam_search(ensemble, (regions, regions), beams(3, 3)),
        "truncated samples": lambda: sample(
            decoder, regions, samples(2, 3, temperature=0.5, top_k=4, top_p=0.9), generator
        ),
    }.items():
        before = gpu.waits.copy()
        function()
        table[name] = gpu.waits - before
    return table


def per_word(name, waits):
    """The waits of a call that decodes two and three words, as those of each word and the others."""
    word = waits[3] - waits[2]
    return {f"{name}, each word": word, f"{name}, the rest": waits[2] - word - word}


def readable(waits):
    """Waits as {"file function: operation": count}."""
    return {
        f"{place}: {operation}": count for (operation, place), count in sorted(waits.items(), key=lambda x: x[0][::-1])
    }


# ------------------------------------------------------------------------------------------------ rules of CUDA

# Code that CUDA refuses or that waits for it, for a vector x on the device, and what the pretend device finds.
RULES = [
    (lambda x: x + torch.ones(4), "error"),
    (lambda x: torch.stack([x[0], torch.tensor(1.0)]), "error"),
    (lambda x: x.masked_fill_(torch.ones(4, dtype=torch.bool), 1.0), "error"),
    (lambda x: x * torch.tensor(2.0), None),  # a scalar of the CPU may be an operand
    (lambda x: x[torch.tensor([0, 1])], "index with a tensor of the CPU"),
    (lambda x: x[..., [0, 1]], "index with a list"),
    (lambda x: x[x > 1], "index with a mask"),
    (lambda x: x.sum().item(), "read a number"),
    (lambda x: x.nonzero(), "count the nonzero elements"),
    (lambda x: x.cpu(), "copy to the CPU"),
    (lambda x: x.copy_(torch.ones(4)), "copy to the device"),
    (lambda x: torch.ones(4).pin_memory().to(x.device), "copy to the device"),
    (lambda x: torch.ones(4).to(x.device, non_blocking=True), "copy to the device"),  # not from page-locked memory
    (lambda x: torch.ones(4).pin_memory().to(x.device, non_blocking=True), None),
]


def rules(folder):
    """What the pretend device finds where it should find something else: [number of the rule, found]."""
    gpu, wrong = the_gpu(), []
    for number, (operation, expected) in enumerate(RULES):
        x, before = copy_to_device(torch.arange(4.0), torch.device("gpu")), gpu.waits.copy()
        try:
            operation(x)
            found = next((name for name, _ in gpu.waits - before), None)
        except RuntimeError as error:
            found = "error" if "is on the CPU and others on" in str(error) else str(error)
        if found != expected:
            wrong.append([number, found])
    return wrong


# ---------------------------------------------------------------------------------------------------- all of it


def the_gpu():
    """The pretend device that is in use."""
    return torch.utils._python_dispatch._get_current_dispatch_mode()


@contextlib.contextmanager
def checkpoints_of_gpus():
    """Let checkpoints hold tensors of the CPU and be read onto a device, as torch.save and map_location do on CUDA."""

    def save(path, checkpoint, original=training.state.save_torch):
        original(path, tree_map_only(GPUTensor, lambda x: x.host.clone(), checkpoint))

    def load(path, device="cpu", original=models.safe_load):
        return tree_map_only(torch.Tensor, lambda x: x.to(device), original(path))

    with patch.object(training.state, "save_torch", save), patch.object(models, "safe_load", load):
        yield


if __name__ == "__main__":
    part, folder = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    output, sys.stdout = sys.stdout, sys.stderr
    with checkpoints_of_gpus(), PretendGPU(ROOT):
        result = {"program": program, "waits": waits, "rules": rules}[part](Path(folder))
    print(json.dumps(result), file=output)
