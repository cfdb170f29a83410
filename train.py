"""Train a captioner: python train.py --data_folder data/flickr8k --run_folder runs/flickr8k"""

import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.distributed import all_reduce_sum, broadcast, init_distributed, on_rank_zero, rank, world_size
from common.files import append_jsonl
from datasets import Batch, CaptionDataset, make_batches, make_loader, shuffled_indices
from decoding.settings import training_decoding
from evaluation.scoring import evaluate
from features.feature_cache import build_dataset
from models import ENCODER, ModelSettings
from text.cider import CiderD
from text.vocabulary import FLIPPED_WORDS
from training.logs import (
    describe_best,
    epoch_key,
    is_informative,
    plot_curves,
    plot_runs,
    print_epoch,
    write_tensorboard,
)
from training.optim import learning_rate_factor
from training.start import choose_run_device, lock_run_folder, prepare_run, start_files, start_run
from training.state import TrainState, graceful_shutdown, stop_request
from training.steps import scst_step, train_step, validation_loss
from utils import PRECISIONS, InputError, Runtime, choose_runtime, first_line, require_needs, run_script, setting

OBJECTIVES = ("cross_entropy", "scst")
# Conditions of settings, as in `utils.setting`.
FROZEN = f"not fine_tune_encoder; {ENCODER}"
TEACHER = "objective=cross_entropy"
GROUNDED = f"{TEACHER}; not attention=none"
TRAINED = "pretrained_embeddings or init_from or resume"


@dataclass(frozen=True, kw_only=True)
class Settings(ModelSettings):
    """Train an image captioner. Edit a value here, or in models.py, or pass it as a flag: --batch_size 64"""

    # group: paths
    data_folder: str = "data/shapes"  # folder that create_input_files.py wrote
    run_folder: str = "runs/shapes"  # folder to write checkpoints, log and curves to
    overwrite: bool = setting(False, needs="not resume")  # start again in a run folder that holds a run
    resume: str = ""  # last.pt of a run to continue exactly, in its folder and with its settings
    init_from: str = ""  # best.pt to start a new run from: weights, words, model settings
    features_folder: str = setting("", needs=FROZEN)  # cache of a frozen encoder's features; empty: in the data folder
    plot: tuple[str, ...] = ()  # run folders: plot their curves into one picture and stop

    # group: optimization
    objective: str = setting("cross_entropy", choices=OBJECTIVES)  # scst: CIDEr of sampled captions (self-critical)
    epochs: int = setting(8, minimum=1)  # passes over the training images
    batch_size: int = setting(8, minimum=1)  # images per step, each with all its captions, over all processes
    gradient_accumulation_steps: int = setting(1, minimum=1)  # micro-batches of a step: less memory, the same gradient
    hflip: bool = setting(False, needs=ENCODER)  # flip half of the images, and left and right in captions
    learning_rate: float = setting(1e-3, minimum=0)  # learning rate of the decoder (Adam)
    fine_tune_encoder: bool = setting(False, needs=ENCODER)  # train the encoder; frozen, its features are cached
    encoder_learning_rate: float = setting(1e-4, minimum=0, needs="fine_tune_encoder")  # learning rate of the encoder
    unfreeze_from: str = setting("", needs="fine_tune_encoder")  # first encoder block to train (layer3); empty: all
    warmup_ratio: float = setting(-1.0, minimum=-1, below=1)  # share of warmup steps; below 0: the decoder's own
    lr_schedule: str = setting("cosine", choices=("cosine", "step"))  # then: to 0 along a cosine, or a factor per epoch
    learning_rate_decay: float = setting(0.8, minimum=0, needs="lr_schedule=step")  # factor per epoch
    grad_clip: float = setting(5.0, minimum=0)  # maximum norm of the gradient; 0: not clipped
    label_smoothing: float = setting(0.1, minimum=0, below=1)  # share of a target's probability spread over all words
    doubly_stochastic: float = setting(0.0, minimum=0, needs=TEACHER)  # weight of doubly stochastic attention (alpha_c)
    grounding_weight: float = setting(0.0, minimum=0, needs=GROUNDED)  # weight of the loss on attention outside objects
    scheduled_sampling_max_prob: float = setting(0.0, minimum=0, below=1, needs=TEACHER)  # final share of sampled words
    ema_decay: float = setting(0.999, minimum=0, below=1)  # decay of the averaged weights in best.pt; 0: no average
    pretrained_embeddings: str = setting("", needs="not init_from")  # text file of word vectors (GloVe, word2vec)
    freeze_embeddings: bool = setting(False, needs=TRAINED)  # keep all word embeddings as initialized

    # group: run
    best_metric: str = setting("cider", choices=("cider", "bleu_4"))  # validation score that picks best.pt
    patience: int = setting(5, minimum=1)  # stop after this many epochs without improvement
    max_length: int = setting(30, minimum=1)  # maximum words of a caption decoded for validation, or sampled for scst
    save_minutes: float = setting(10.0, minimum=0)  # minutes between writes of last.pt within an epoch
    seed: int = 0  # random seed of weights, order and dropout
    workers: int = setting(0, minimum=0)  # processes that load batches; 0: the main one
    in_memory: bool = setting(False, needs="fine_tune_encoder")  # keep all images in memory
    precision: str = setting("auto", choices=PRECISIONS)  # auto: bf16 mixed precision where it is faster
    device: str = "auto"  # auto, cpu or cuda


# --------------------------------------------------------------------------------------------------- one epoch


def train_one_epoch(
    state: TrainState, training: CaptionDataset, runtime: Runtime, caught: list[int], reward: CiderD | None
) -> None:
    """Finish the current epoch over the training images and accumulate its loss in `state`.

    With a `reward` the steps are self-critical. A signal in `caught` (`training.state.graceful_shutdown`) raises
    StopRequested before the next step, with all complete steps in last.pt.
    """
    settings = state.settings
    state.captioner.train()
    items = shuffled_indices(len(training), settings.seed, state.epoch, settings.hflip)
    batches = make_batches(items, settings.batch_size)
    loader = make_loader(training, batches[state.step :], settings.workers)
    bar = tqdm(
        total=training.captions.num_captions(),
        initial=sum(len(training.captions[index]) for batch in batches[: state.step] for index, _ in batch),
        desc=f"epoch {state.epoch + 1}",
        unit="caption",
        leave=False,
        disable=rank() > 0,
    )
    start = saved = time.perf_counter()
    seconds_before = state.seconds
    with bar:
        for batch in loader:
            save_now = rank() == 0 and time.perf_counter() - saved > settings.save_minutes * 60
            words, captions, stop, save_now = all_reduce_sum([*batch.counts(), bool(caught), save_now])
            if stop or save_now:
                state.save("last.pt", with_training_state=True)
                saved = time.perf_counter()
            if stop:
                raise stop_request(state, caught)
            optimization_step(state, batch, runtime, len(batches), (words, captions), reward)
            state.seconds = seconds_before + time.perf_counter() - start
            bar.set_postfix({"reward" if reward else "loss": f"{state.loss / state.count:.3f}"}, refresh=False)
            bar.update(captions)


def optimization_step(
    state: TrainState,
    batch: Batch,
    runtime: Runtime,
    steps_per_epoch: int,
    counts: tuple[int, int],
    reward: CiderD | None,
) -> None:
    """Take a step at its learning rate and add its loss to `state`.

    `counts` are the words and captions of the step over all processes. Raises InputError if the loss or gradient is not
    finite, or memory runs out.
    """
    settings, optimizer = state.settings, state.optimizer
    step = state.epoch * steps_per_epoch + state.step
    factor = learning_rate_factor(settings, step, steps_per_epoch)
    for group in optimizer.param_groups:
        group["lr"] = factor * group["initial_lr"]
    try:
        if reward:
            loss, count = scst_step(state.network, optimizer, batch, settings, runtime, reward, counts)
        else:
            # Rises linearly over all steps.
            sampling_prob = settings.scheduled_sampling_max_prob * step / (settings.epochs * steps_per_epoch)
            loss, count = train_step(state.network, optimizer, batch, settings, runtime, counts, sampling_prob)
    except FloatingPointError as error:
        raise InputError(
            f"{error} at epoch {state.epoch + 1}, step {state.step + 1}, learning rate "
            f"{optimizer.param_groups[0]['lr']:g}: lower --learning_rate or --grad_clip, or try --precision fp32"
        ) from None
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"{first_line(error)} With --batch_size {settings.batch_size} --gradient_accumulation_steps "
            f"{settings.gradient_accumulation_steps}: double --gradient_accumulation_steps, or halve --batch_size"
        ) from None
    state.ema.update(step)
    state.step += 1
    state.loss += loss
    state.count += count


# -------------------------------------------------------------------------------------------------- validation


def validate_and_save(
    state: TrainState, training: CaptionDataset, validation: CaptionDataset, runtime: Runtime
) -> None:
    """Validate the averaged weights, then write log.jsonl, best.pt, last.pt and curves.png."""
    settings = state.settings
    state.save("last.pt", with_training_state=True)  # validation takes time, too
    broadcast(average for average, _ in state.ema.buffers)  # BatchNorm's statistics differ between processes
    captioner = state.ema.captioner
    decoding = training_decoding(max_length=settings.max_length)
    scores, captions = evaluate(captioner, validation, decoding, runtime)
    loss, count = all_reduce_sum([state.loss, state.count])
    row = {
        "epoch": state.epoch + 1,
        "train/reward" if settings.objective == "scst" else "train/loss": loss / count,
        "val/loss": validation_loss(captioner, validation, decoding.batch_size, runtime),
        **{f"val/{name}": score for name, score in scores.items() if name not in ("beam_size", "images_per_second")},
        "lr": state.optimizer.param_groups[0]["lr"],
        "seconds": state.seconds,
        "captions_per_second": training.captions.num_captions() / state.seconds,
    }
    improved = state.end_epoch(epoch_key(row, settings.best_metric, len(validation)))
    folder = Path(settings.run_folder)

    def draw() -> tuple[list[np.ndarray], str]:
        from visualization.samples import draw_samples  # imports matplotlib

        return draw_samples(captioner, validation, captions)

    on_rank_zero(lambda: append_jsonl(folder / "log.jsonl", row))
    on_rank_zero(lambda: write_tensorboard(folder / "tensorboard", row, draw))
    if improved:
        state.save("best.pt", with_training_state=False)
    state.save("last.pt", with_training_state=True)
    on_rank_zero(lambda: plot_curves([folder / "log.jsonl"], folder / "curves.png"))
    print_epoch(row, improved)
    print(f"  {validation.entries[0]['image']}: {captions[0].caption}")


# -------------------------------------------------------------------------------------------------- the program


def train(settings: Settings, device: torch.device) -> None:
    """Train until the last epoch, or until the validation score no longer rises."""
    settings, checkpoint = prepare_run(settings)
    device = choose_run_device(settings, device)
    require_needs(settings)
    micro_batches = world_size() * settings.gradient_accumulation_steps
    if settings.batch_size < micro_batches:
        raise InputError(
            f"--batch_size {settings.batch_size} cannot be shared by {world_size()} processes in "
            f"--gradient_accumulation_steps {settings.gradient_accumulation_steps}: give at least {micro_batches}"
        )
    if settings.features_folder:  # to find it again from another working directory
        settings = settings.replace(features_folder=os.path.abspath(settings.features_folder))
    runtime = choose_runtime(device, settings.precision)
    state = start_run(settings, checkpoint, device)
    open_split = functools.partial(
        build_dataset,
        settings.data_folder,
        captioner=state.captioner,
        runtime=runtime,
        features_folder=settings.features_folder,
    )
    validation = open_split("val")
    training = open_split("train", hflip=settings.hflip)
    if settings.in_memory:
        training.load_into_memory()
        validation.load_into_memory()
    if settings.grounding_weight:
        training.use_names(state.captioner.vocabulary)
    if len(training) < world_size():
        raise InputError(f"{len(training)} training images cannot be shared by {world_size()} processes")
    start_files(state)
    dtype = str(runtime.dtype).split(".")[1]
    print(f"{len(training)} training images, {len(state.captioner.vocabulary)} words, {device}, {dtype}")
    print_warnings(state, training, validation)
    reward = None
    if settings.objective == "scst":
        # <end> counts as a word; otherwise captions that break off would cost nothing.
        reward = CiderD([[caption[1:] for caption in captions] for captions in training.captions])
    with graceful_shutdown() as caught:
        while state.epoch < settings.epochs and state.epochs_since_improvement < settings.patience:
            train_one_epoch(state, training, runtime, caught, reward)
            validate_and_save(state, training, validation, runtime)
    print(f"best {describe_best(state.best_key, settings.best_metric)}: {Path(settings.run_folder) / 'best.pt'}")


def print_warnings(state: TrainState, training: CaptionDataset, validation: CaptionDataset) -> None:
    """Print which settings have no effect on this data, and if a resumed run has nothing to do."""
    settings = state.settings
    if not is_informative(settings.best_metric, len(validation)):
        print(
            "warning: CIDEr of one validation image is always 0: the validation loss picks best.pt and --patience has "
            "no effect. Give more validation photos, or --best_metric bleu_4"
        )
    if settings.hflip and not training.flipped_ids:
        print(
            f"warning: --hflip flips photos but no words, the captions have neither {' nor '.join(FLIPPED_WORDS)}: "
            f"leave it out if they name sides in other words"
        )
    if state.epochs_since_improvement >= settings.patience:
        print(f"nothing to do: no improvement in {state.epochs_since_improvement} epochs, increase --patience")
    elif state.epoch >= settings.epochs:
        print(f"nothing to do after {state.epoch} epochs: pass a larger --epochs, and the schedule is stretched to it")


def main(settings: Settings) -> None:
    """Train (each process of torchrun its share) or plot the curves of runs."""
    if settings.plot:
        print(plot_runs(settings.plot))
        return
    with init_distributed(settings.device) as device, lock_run_folder(settings):
        train(settings, device)  # frees all that uses the process group before the group is destroyed


if __name__ == "__main__":
    run_script(main, Settings)
