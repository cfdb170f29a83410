"""The recipe for the best captions of Flickr8k: python benchmarks/record.py --captions dataset_flickr8k.json

It runs the scripts one after another and prints each command. What is finished is not repeated and a training that was
stopped is resumed, so start it again after an interruption. docs/results.md has its scores and its time.
"""

import contextlib
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import eval as eval_script
from common.files import atomic_write, read_json, write_json
from preparation.storage import read_captions
from utils import BaseSettings, InputError, parse_settings, run_script, setting

ROOT = Path(__file__).parent.parent
SCST = ("--objective", "scst", "--learning_rate", "3e-4", "--batch_size", "40")
BEAM_SIZE = 5  # of each model
BEST = ("--beam_sizes", "10", "--views", "original", "hflip", "crop")  # how the last model captions
START = "cross_entropy"  # folder of the run that all others begin with
HALVES = ("half1", "half2")  # of the validation photos
FINISHED = "finished"  # an empty file in the folder of a training that ran to its end


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Prepare Flickr8k, train one model, the mean of several trainings, and score it on the validation photos."""

    captions: str = "dataset_flickr8k.json"  # of Karpathy's format, as create_input_files.py takes it
    images: str = "Images"  # folder of the photos
    encoder: str = "resnet50"  # torchvision network
    encoder_weights: str = "imagenet"  # imagenet, or the path of a torchvision state dict
    data_folder: str = "data/flickr8k"  # the prepared folder; one that is there is taken
    output_folder: str = "runs/record"  # folder of the runs
    seeds: tuple[int, ...] = (0, 1, 2)  # of the trainings whose weights are averaged; the first is of the start, too
    epochs: int = setting(8, minimum=1)  # of cross-entropy
    scst_epochs: int = setting(8, minimum=1)  # of self-critical training


def steps(settings: Settings) -> Iterator[tuple[Path, list[str]]]:
    """Each command, and the file that it writes last; the commands before it have run then."""
    data, runs = Path(settings.data_folder), Path(settings.output_folder)
    prepare = ["--dataset", "flickr8k", "--captions", settings.captions, "--images", settings.images]
    prepare += ["--image_size", "224", "--output_folder", str(data)]
    yield data / "dataset.json", ["create_input_files.py", *prepare]
    common = ["--data_folder", str(data), "--hflip"]
    encoder = ["--encoder", settings.encoder, "--encoder_weights", settings.encoder_weights]
    start, seeds = runs / START, list(map(str, settings.seeds))
    sizes = ["--attention_dim", "64"]  # faster on a CPU; after three epochs it scored as 512: docs/results.md
    yield from training(start, [*common, *encoder, *sizes, "--seed", seeds[0], "--epochs", str(settings.epochs)])
    scst = [*SCST, "--epochs", str(settings.scst_epochs)]
    models = {seed: runs / f"scst{seed}" for seed in seeds}
    for seed, folder in models.items():
        yield from training(folder, ["--init_from", str(start / "best.pt"), *common, *scst, "--seed", seed])
    if len(seeds) > 1:
        models["soup"] = runs / "soup"
        members = [str(models[seed] / "best.pt") for seed in seeds]
        best = models["soup"] / "best.pt"
        yield best, ["tools/average_checkpoints.py", *members, "--output", str(best)]
    index, final = runs / "consensus.pt", list(models.values())[-1]
    of_index = ["--checkpoint", str(start / "best.pt"), *common[:2], "--output", str(index)]
    yield index, ["tools/index_captions.py", *of_index]
    validation = [*common[:2], "--split", "val"]
    for folder in models.values():
        yield scoring([*validation, "--checkpoint", str(folder / "best.pt"), "--beam_sizes", str(BEAM_SIZE)])
    consensus = [*validation, "--checkpoint", str(final / "best.pt"), *BEST, "--consensus_index", str(index)]
    yield scoring(consensus)
    write_halves(settings)
    results = eval_script.output_path(parse_settings(eval_script.Settings, consensus), "results")
    for half in HALVES:
        yield scoring([*validation, "--results", str(results), "--photos", str(runs / f"{half}.txt")])


def training(folder: Path, arguments: list[str]) -> Iterator[tuple[Path, list[str]]]:
    """A training from the start or from where it stopped; train.py itself says where nothing is left to do."""
    last = folder / "last.pt"
    resume = ["--resume", str(last)] if last.exists() else [*arguments, "--run_folder", str(folder)]
    yield folder / FINISHED, ["train.py", *resume]


def scoring(flags: list[str]) -> tuple[Path, list[str]]:
    """A scoring by eval.py, which writes the scores of each image last."""
    settings = parse_settings(eval_script.Settings, flags)
    return eval_script.output_path(settings, "scores_per_image"), ["eval.py", *flags]


def write_halves(settings: Settings) -> None:
    """Lists of the validation photos, every second name in each: a setting that is chosen on one is tried on the other.

    The epochs of best.pt are chosen on both.
    """
    names = sorted(entry["image"] for entry in read_captions(settings.data_folder, "val").entries)
    for i, half in enumerate(HALVES):
        with atomic_write(Path(settings.output_folder) / f"{half}.txt") as temporary:
            temporary.write_text("\n".join(names[i::2]) + "\n", encoding="utf-8")


def require_same_settings(settings: Settings) -> None:
    """Keep the settings in the output folder; InputError where what is there was made with others."""
    path = Path(settings.output_folder) / "settings.json"
    now = {name: value for name, value in asdict(settings).items() if name not in ("captions", "images")}
    now["seeds"] = list(settings.seeds)
    has_begun = path.exists() and (path.parent / START).exists()  # a wrong path of weights may be corrected
    for name, value in read_json(path).items() if has_begun else ():
        if value != now.get(name):
            raise InputError(
                f"{settings.output_folder} was begun with --{name} {value} and not {now.get(name)}: give another "
                f"--output_folder"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, now)


def run(command: list[str]) -> int:
    """Run a script with its arguments; returns its exit status, below 0 where a signal killed it."""
    process = subprocess.Popen([sys.executable, ROOT / command[0], *command[1:]])
    while process.returncode is None:
        with contextlib.suppress(KeyboardInterrupt):  # it got the signal, too, and saves what it has
            process.wait()
    return process.returncode


def main(settings: Settings) -> None:
    """Run what is not done yet."""
    if len(set(settings.seeds)) < len(settings.seeds):
        raise InputError(f"--seeds {' '.join(map(str, settings.seeds))}: give each once")
    require_same_settings(settings)
    for done, command in steps(settings):
        if done.exists():
            continue
        print(f"\n$ python {shlex.join(command)}", flush=True)
        status = run(command)
        if status < 0:
            print(f"{command[0]} was killed by signal {-status}: start again to go on", file=sys.stderr)
        if status:
            sys.exit(status if status > 0 else 128 - status)  # above 0: the script has said why
        if done.name == FINISHED:
            done.touch()


if __name__ == "__main__":
    run_script(main, Settings)
