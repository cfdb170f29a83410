"""Run the recipe for the best captions of Flickr8k: python benchmarks/record.py --captions dataset_flickr8k.json

Run the scripts one after another and print each command. Finished steps are not repeated and stopped trainings are
resumed, so simply start again after an interruption. docs/results.md has the scores and the time.
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
CONFIGS = ROOT / "configs"
BEAM_SIZE = 5  # of each model
BEST = ("--beam_sizes", "10", "--views", "original", "hflip", "crop")  # decoding of the last model
START = "cross_entropy"  # folder of the run that all others start from
HALVES = ("half1", "half2")  # of the validation photos
FINISHED = "finished"  # an empty file in the folder of a completed training


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Prepare Flickr8k, train several models from one start, average them and score them on the validation photos."""

    captions: str = "dataset_flickr8k.json"  # Karpathy's JSON, for create_input_files.py
    images: str = "Images"  # folder of the photos
    encoder: str = "resnet50"  # torchvision network
    encoder_weights: str = "imagenet"  # imagenet, or the path of a torchvision state dict
    data_folder: str = "data/flickr8k"  # prepared folder; reused if it exists
    output_folder: str = "runs/record"  # where the runs go
    seeds: tuple[int, ...] = (0, 1, 2)  # one SCST run each, then averaged; the start uses the first
    epochs: int = setting(8, minimum=1)  # epochs of cross-entropy
    scst_epochs: int = setting(8, minimum=1)  # epochs of self-critical training


def steps(settings: Settings) -> Iterator[tuple[Path, list[str]]]:
    """Yield the file that each command writes last, and the command. Earlier commands must have run by then."""
    data, runs = Path(settings.data_folder), Path(settings.output_folder)
    prepare = ["--dataset", "flickr8k", "--captions", settings.captions, "--images", settings.images]
    prepare += ["--image_size", "224", "--output_folder", str(data)]
    yield data / "dataset.json", ["create_input_files.py", *prepare]
    common = ["--data_folder", str(data)]
    encoder = ["--encoder", settings.encoder, "--encoder_weights", settings.encoder_weights]
    start, seeds = runs / START, list(map(str, settings.seeds))
    flags = [f"@{CONFIGS / 'record.txt'}", *common, *encoder, "--seed", seeds[0], "--epochs", str(settings.epochs)]
    yield from training(start, flags)
    scst = [f"@{CONFIGS / 'scst.txt'}", "--epochs", str(settings.scst_epochs)]
    models = {seed: runs / f"scst{seed}" for seed in seeds}
    for seed, folder in models.items():
        yield from training(folder, ["--init_from", str(start / "best.pt"), *common, *scst, "--seed", seed])
    if len(seeds) > 1:
        models["soup"] = runs / "soup"
        members = [str(models[seed] / "best.pt") for seed in seeds]
        best = models["soup"] / "best.pt"
        yield best, ["tools/average_checkpoints.py", *members, "--output", str(best)]
    index, final = runs / "consensus.pt", list(models.values())[-1]
    of_index = ["--checkpoint", str(start / "best.pt"), *common, "--output", str(index)]
    yield index, ["tools/index_captions.py", *of_index]
    validation = [*common, "--split", "val"]
    for folder in models.values():
        yield scoring([*validation, "--checkpoint", str(folder / "best.pt"), "--beam_sizes", str(BEAM_SIZE)])
    consensus = [*validation, "--checkpoint", str(final / "best.pt"), *BEST, "--consensus_index", str(index)]
    yield scoring(consensus)
    write_halves(settings)
    results = eval_script.output_path(parse_settings(eval_script.Settings, consensus), "results")
    for half in HALVES:
        yield scoring([*validation, "--results", str(results), "--photos", str(runs / f"{half}.txt")])


def training(folder: Path, arguments: list[str]) -> Iterator[tuple[Path, list[str]]]:
    """Yield a training from its start or from where it stopped; train.py reports if nothing is left to do."""
    last = folder / "last.pt"
    resume = ["--resume", str(last)] if last.exists() else [*arguments, "--run_folder", str(folder)]
    yield folder / FINISHED, ["train.py", *resume]


def scoring(flags: list[str]) -> tuple[Path, list[str]]:
    """Return the file that a command of eval.py writes last (the scores of each image), and the command."""
    settings = parse_settings(eval_script.Settings, flags)
    return eval_script.output_path(settings, "scores_per_image"), ["eval.py", *flags]


def write_halves(settings: Settings) -> None:
    """Write two lists, each with every second validation photo, to choose a setting on one and test it on the other.

    The epochs of best.pt are chosen on both.
    """
    names = sorted(entry["image"] for entry in read_captions(settings.data_folder, "val").entries)
    for i, half in enumerate(HALVES):
        with atomic_write(Path(settings.output_folder) / f"{half}.txt") as temporary:
            temporary.write_text("\n".join(names[i::2]) + "\n", encoding="utf-8")


def require_same_settings(settings: Settings) -> None:
    """Store the settings in the output folder. Raises InputError if its runs were made with others."""
    path = Path(settings.output_folder) / "settings.json"
    now = {name: value for name, value in asdict(settings).items() if name not in ("captions", "images")}
    now["seeds"] = list(settings.seeds)
    has_begun = path.exists() and (path.parent / START).exists()  # until then, a wrong path of weights can be corrected
    for name, value in read_json(path).items() if has_begun else ():
        if value != now.get(name):
            raise InputError(
                f"{settings.output_folder} was started with --{name} {value}, not {now.get(name)}: choose another "
                f"--output_folder"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, now)


def run(command: list[str]) -> int:
    """Run a script with its arguments and return its exit status, negative if a signal killed it."""
    process = subprocess.Popen([sys.executable, ROOT / command[0], *command[1:]])
    while process.returncode is None:
        with contextlib.suppress(KeyboardInterrupt):  # the script gets the signal, too, and saves its progress
            process.wait()
    return process.returncode


def main(settings: Settings) -> None:
    """Run all steps that are not done yet."""
    if len(set(settings.seeds)) < len(settings.seeds):
        raise InputError(f"--seeds {' '.join(map(str, settings.seeds))}: give each seed only once")
    require_same_settings(settings)
    for done, command in steps(settings):
        if done.exists():
            continue
        print(f"\n$ python {shlex.join(command)}", flush=True)
        status = run(command)
        if status < 0:
            print(f"{command[0]} was killed by signal {-status}: start again to continue", file=sys.stderr)
        if status:
            sys.exit(status if status > 0 else 128 - status)  # above 0: the script has reported why
        if done.name == FINISHED:
            done.touch()


if __name__ == "__main__":
    run_script(main, Settings)
