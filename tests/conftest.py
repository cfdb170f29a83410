"""What the tests share: a small data set of shapes, a small trained run, and scripts run as their users run them."""

import itertools
import json
import random
import re
import shutil
import sys
from dataclasses import asdict, fields, replace

import pytest
import torch

import create_input_files
import decoding.beam_search
import decoding.sampling
import train
import utils
from common.files import read_jsonl
from datasets import Example, collate
from decoding.settings import DecodingSettings
from models import Captioner, ModelSettings
from modules.show_attend_tell import ShowAttendTell
from preparation.detection import Detector
from preparation.storage import write_captions
from text.vocabulary import END, SPECIAL_TOKENS, START, Vocabulary
from utils import Runtime

SMALL = train.Settings(
    encoder="resnet18",
    encoder_layer="layer1",
    encoder_weights="",
    fine_tune_encoder=True,
    grid_size=4,
    region_dim=16,
    embed_dim=16,
    attention_dim=16,
    hidden_dim=16,
    ffn_dim=32,
    batch_size=8,
    epochs=2,
    learning_rate=1e-2,
    warmup_ratio=0.0,
    max_length=6,
    precision="fp32",  # the same on every machine
    device="cpu",
)


def step_by_step(decoder, regions, caption):
    """Log-probability of an image's caption (word ids after <start>) and alpha (T, R), with `step` alone."""
    keys, state = decoder.keys(regions), decoder.init_state(regions)
    log_prob, alphas, previous = 0.0, [], START
    for word in caption:
        logits, state, alpha, _ = decoder.step(torch.tensor([[previous]]), regions, keys, state)
        log_prob += logits[0, 0].log_softmax(0)[word].item()
        alphas.append(alpha[0, 0])
        previous = word
    return log_prob, torch.stack(alphas)


def check_teacher_forcing(decoder, batch):
    """Assert that teacher forcing computes what `step` does word by word; returns its targets."""
    logits, targets, alpha, *_ = decoder(batch.inputs, batch.words, batch.lengths)
    expected = 0.0
    for b, c in itertools.product(*map(range, batch.lengths.shape)):
        length = int(batch.lengths[b, c])
        if length:
            caption = batch.words[b, c, 1 : length + 1].tolist()
            log_prob, expected_alpha = step_by_step(decoder, batch.inputs[b : b + 1], caption)
            expected += log_prob
            torch.testing.assert_close(alpha[:length, b, c], expected_alpha)
        assert alpha[length:, b, c].abs().sum() == 0
    log_probs = logits.log_softmax(1).gather(1, targets.unsqueeze(1))
    assert log_probs.sum().item() == pytest.approx(expected, rel=1e-5)
    return targets


def random_batch(captions, seed=0):
    """A Batch of random regions (B, 4, 6) with the captions given for each image."""
    generator = torch.Generator().manual_seed(seed)
    return collate([Example(i, torch.rand(4, 6, generator=generator), each) for i, each in enumerate(captions)])


def beams(beam_size, max_length, **options):
    """Settings of beam search."""
    return DecodingSettings(beam_size=beam_size, max_length=max_length, **options)


def samples(count, max_length, **options):
    """Settings of sampling."""
    return DecodingSettings(samples=count, max_length=max_length, **options)


CPU = Runtime(torch.device("cpu"), torch.float32)


def build(settings: train.Settings, words: int | list[str], image_size: int = 32, feature_dim: int = 0) -> Captioner:
    """A new captioner of these settings and words, or of so many."""
    if isinstance(words, int):
        words = [*SPECIAL_TOKENS, *(f"word{i}" for i in range(words - len(SPECIAL_TOKENS)))]
    return Captioner(
        settings,
        Vocabulary(words),
        image_size,
        "squash",
        feature_dim=feature_dim,
        fine_tune_encoder=settings.fine_tune_encoder,
    )


def flags(data_folder, run_folder, settings=SMALL):
    """The command line of settings with these folders."""
    values = asdict(replace(settings, data_folder=str(data_folder), run_folder=str(run_folder)))
    switches = {True: "--{}", False: "--no-{}"}
    arguments = []
    del values["plot"]  # it plots and does not train
    for field in fields(settings):  # those without effect
        for condition in filter(None, field.metadata.get("needs", "").split("; ")):
            if utils.unmet_condition(settings, condition):
                values.pop(field.name, None)
    for name, value in values.items():
        arguments += [switches[value].format(name)] if isinstance(value, bool) else [f"--{name}", str(value)]
    return arguments


def report_data(path):
    """The data in a report."""
    page = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def logged_epochs(folder):
    """The epochs in the log of a run folder."""
    return [row["epoch"] for row in read_jsonl(folder / "log.jsonl")]


def weights(path):
    """The model's weights in a checkpoint."""
    return torch.load(path, weights_only=True)["model"]


def random_captions(num_images, seed=0, shortest=0):
    """References, one to five for each image, and predictions of random words, most of them much like a reference."""
    generator = random.Random(seed)
    vocabulary = ["a", "the", "dog", "cat", "man", "red", "blue", "runs", "sits", "on", "in", "grass"]

    def draw(minimum):
        return generator.choices(vocabulary, k=generator.randint(minimum, 12))

    references = [[draw(1) for _ in range(generator.randint(1, 5))] for _ in range(num_images)]
    predictions = []
    for captions in references:
        words = list(generator.choice(captions)) if generator.random() < 0.7 else draw(shortest)
        words[len(words) // 2 : len(words) // 2 + 1] = draw(1)[:1]
        predictions.append([*words, *["ball"] * max(0, shortest - len(words))])
    return references, predictions


def peak_memory(reset=False):
    """The most bytes of memory that this process has held since the last reset, 0 where the system does not tell."""
    try:
        if reset:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        with open("/proc/self/status") as file:
            return 1024 * int(re.search(r"VmHWM:\s+(\d+)", file.read())[1])
    except OSError:
        return 0


@pytest.fixture
def no_meteor(monkeypatch):
    """Scores without METEOR, which starts slowly."""
    monkeypatch.setattr("eval.has_java", lambda: False)


@pytest.fixture(scope="session")
def detector_weights(tmp_path_factory):
    """Random weights of fasterrcnn_mobilenet_v3_large_320_fpn that call whatever they see a dog."""
    torch.manual_seed(0)
    detector = Detector("fasterrcnn_mobilenet_v3_large_320_fpn", "", torch.device("cpu"))
    torch.nn.init.constant_(detector.network.roi_heads.box_predictor.cls_score.bias[18:19].detach(), 6.0)
    path = tmp_path_factory.mktemp("detector") / "weights.pth"
    torch.save(detector.network.state_dict(), path)
    return str(path)


def pytest_addoption(parser):
    parser.addoption(
        "--commands", type=int, default=10, help="how many of each script tests/test_fuzz_commands.py runs"
    )
    parser.addoption("--fuzz", type=float, default=1 / 3, help="share of the runs of fuzz tests: 1 runs them all")
    parser.addoption("--kills", type=int, default=2, help="how often tests/test_kill.py kills a run")


def prepare_shapes(output, num_scenes):
    """Prepare scenes of 32 pixels, with all their words; returns the folder."""
    create_input_files.main(
        create_input_files.Settings(output_folder=str(output), num_scenes=num_scenes, image_size=32, min_word_freq=1)
    )
    return output


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A prepared folder of 24 training, 2 val and 2 test scenes of 32 pixels."""
    return prepare_shapes(tmp_path_factory.mktemp("data") / "shapes", num_scenes=24)


@pytest.fixture
def without_objects(shapes, tmp_path):
    """A copy of those shapes whose training split knows of no objects."""
    folder = shutil.copytree(shapes, tmp_path / "data")
    entries = json.loads((folder / "train_captions.json").read_text())
    write_captions(folder / "train_captions.json", [entry | {"objects": []} for entry in entries])
    return folder


@pytest.fixture(scope="session")
def run_folder(shapes, tmp_path_factory):
    """A run of two epochs on those shapes."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    train.main(replace(SMALL, data_folder=str(shapes), run_folder=str(folder)))
    return folder


@pytest.fixture(scope="session")
def objects_run(shapes, tmp_path_factory):
    """A run that looks at the cells of a grid and at objects."""
    folder = tmp_path_factory.mktemp("runs") / "both"
    train.main(
        replace(SMALL, data_folder=str(shapes), run_folder=str(folder), regions="both", box_features=True, epochs=1)
    )
    return folder


def make_tiny_decoder(decoder_class, scale=4, **settings):
    """A random decoder of 7 words, 4 of them special tokens, for regions of width 6."""
    torch.manual_seed(5)
    sizes = {"embed_dim": 5, "hidden_dim": 8, "attention_dim": 4}
    decoder = decoder_class(ModelSettings(**sizes | settings), vocab_size=7, region_dim=6).eval()
    for parameter in decoder.parameters():
        parameter.data *= scale  # far from uniform, so that rankings are clear
    decoder.output.bias.data[END] -= 2  # so that not every caption is empty
    return decoder


def torch_cell(cell, kind, *input_weights):
    """torch's cell of a kind, with the weights of one of ours and these input weights side by side."""
    weight = torch.cat(input_weights, dim=1)
    reference = kind(weight.shape[1], cell.hidden.in_features)
    weights = {"weight_ih": weight, "weight_hh": cell.hidden.weight, "bias_ih": cell.words.bias}
    reference.load_state_dict(weights | {"bias_hh": torch.zeros(len(weight))})
    return reference


@pytest.fixture(params=["every word", "every 4 words"])
def checks(request, monkeypatch):
    """How often a loop asks which images have ended: as on a CPU, and as on a GPU."""
    if request.param == "every 4 words":
        for module in (decoding.beam_search, decoding.sampling):
            monkeypatch.setattr(module, "checks_after", lambda t, device: t % 4 == 0)


def ending_at_different_words(decoder):
    """Regions of 12 images whose captions by a tiny decoder end after 3 to 15 words or not at all; it ends earlier."""
    decoder.output.bias.data[END] += 1
    return torch.randn(12, 4, 6, generator=torch.Generator().manual_seed(1)) * 3


@pytest.fixture
def tiny_decoder():
    """A random decoder with soft attention and an LSTM."""
    return make_tiny_decoder(ShowAttendTell)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a script's command line in this process: (module, arguments) -> exit status, stdout, stderr."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        status = 0
        try:
            utils.run_script(module.main, module.Settings)
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def server(run_folder):
    """A running server of the small run's page."""
    from served_photos import serve_run

    with serve_run(run_folder) as running:
        yield running


@pytest.fixture(scope="module")
def sent_photos(shapes):
    """Files of photos to send to the page, by name."""
    from served_photos import photo_files

    return photo_files(shapes)


@pytest.fixture(scope="session")
def browser():
    """A browser without a window."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    for argument in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "window-size=1280,1000"):
        options.add_argument(f"--{argument}")
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as opened:
        yield opened


@pytest.fixture
def open_page(browser):
    """Open an address in the browser; afterwards it must have logged no error."""

    def opened(address, width=1280, scheme="light"):
        scheme = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
        size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(address)
        return browser

    yield opened
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
