"""Bugs of GPU code to try on the pretend device: what the CPU forgives and a GPU does not, or waits for."""

import inspect
import textwrap

import modules.attention
import modules.decoders
import modules.recurrent
import training.optim
import training.steps
from training.state import TrainState

# Description, settings of `run_on_pretend_gpu.STEPS`, and the bug:
# where a function is looked up, its name, and two texts of its source.
BUGS = [
    (
        "features stay on the CPU",
        "soft attention",
        (training.steps, "on_device"),
        ("copy_to_device(x, runtime.device)", "x"),
    ),
    (
        "an index stays on the CPU",
        "soft attention",
        (modules.recurrent.ActiveCaptions, "of"),
        ("copy_to_device(indices, device)", "indices"),
    ),
    (
        "a new tensor has no device",
        "no attention",
        (modules.attention.NoAttention, "forward"),
        ("hidden.new_zeros(", "torch.zeros("),
    ),
    (
        "a number is read at each word",
        "soft attention",
        (modules.recurrent.RecurrentDecoder, "forward"),
        ("alphas.append(", "assert attended.alpha.max().item() <= 1; alphas.append("),
    ),
    (
        "the loss is read before backward",
        "two micro-batches",
        (training.steps, "optimize"),
        ("losses.append(loss.detach())", "losses.append(torch.full((), loss.item(), device=loss.device))"),
    ),
    (
        "captions are selected with a mask",
        "doubly stochastic",
        (training.steps, "captioning_loss"),
        ("lengths.flatten().nonzero().squeeze(1)", "lengths.flatten() > 0"),
    ),
    (
        "a list is an index",
        "scheduled sampling",
        (modules.recurrent, "sample_words"),
        ("logits[..., word_id]", "logits[..., [word_id]]"),
    ),
    (
        "a copy is not asynchronous",
        "soft attention",
        (training.steps, "copy_to_device"),
        ("non_blocking=True", "non_blocking=False"),
    ),
    (
        "a copy is not from page-locked memory",
        "two micro-batches",
        (modules.decoders, "copy_to_device"),
        (".contiguous().pin_memory()", ".contiguous()"),
    ),
    (
        "the moving average is resumed on the CPU",
        "soft attention",
        (training.optim.ModelEMA, "load_state_dict"),
        ("average.data.copy_(state[name])", "self.averages[name] = state[name]"),
    ),
    (
        "Adam's state is resumed on the CPU",
        "soft attention",
        (TrainState, "restore"),
        (
            'self.optimizer.load_state_dict(checkpoint["optimizer"])',
            'self.optimizer.state.update(zip(self.optimizer.param_groups[0]["params"], '
            'checkpoint["optimizer"]["state"].values()))',
        ),
    ),
]


def edit(function, old, new):
    """A function with a text of its source replaced by another."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{function.__qualname__} has no single {old!r}: bring the seeded bug up to date"
    namespace = dict(inspect.unwrap(function).__globals__)
    source = "from __future__ import annotations\n" + source.replace(old, new)  # as for types of hints alone
    exec(compile(source, inspect.getfile(function), "exec"), namespace)
    return namespace[function.__name__]
