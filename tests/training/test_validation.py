"""Which epoch is the best, and when training stops."""

import pytest

from training.state import TrainState
from training.validation import epoch_key


def row(cider, bleu_4, loss):
    """A row of the log."""
    return {"val/cider": cider, "val/bleu_4": bleu_4, "val/loss": loss}


@pytest.mark.parametrize(
    ("metric", "num_images", "rows"),  # from worst to best
    [
        ("cider", 2, [row(0.1, 0.9, 1), row(0.2, 0.1, 2)]),
        ("cider", 2, [row(0.0, 0.1, 1), row(0.0, 0.2, 2)]),
        ("cider", 2, [row(0.1, 0.2, 2), row(0.1, 0.2, 1)]),
        ("cider", 2, [row(0.0, 1e-80, 2), row(0.0, 1e-155, 1)]),  # what prints as 0.0000 is 0
        ("bleu_4", 2, [row(0.9, 0.1, 1), row(0.1, 0.2, 2)]),
        ("bleu_4", 2, [row(0.1, 0.2, 1), row(0.2, 0.2, 2)]),
        ("cider", 1, [row(0.0, 0.2, 2), row(0.0, 0.1, 1)]),  # CIDEr says nothing
        ("bleu_4", 1, [row(0.0, 0.1, 1), row(0.0, 0.2, 2)]),
    ],
)
def test_the_best_epoch_has_the_highest_key(metric, num_images, rows):
    keys = [epoch_key(one, metric, num_images) for one in rows]
    assert keys == sorted(keys) and keys[0] != keys[1]


@pytest.mark.parametrize(
    ("num_images", "rows", "counts"),
    [
        (2, [row(0.1, 0.1, 3), row(0.1, 0.1, 4), row(0.0, 0.1, 1), row(0.2, 0.0, 9)], [0, 1, 2, 0]),
        (
            2,
            [row(0.0, 0.0, 3), row(0.0, 0.0, 4), row(0.0, 0.0, 5), row(0.1, 0.0, 9), row(0.0, 0.0, 1)],
            [0, 0, 0, 0, 1],
        ),
        (2, [row(0.0, 0.0, 3), row(0.0, 0.0, 4), row(0.0, 0.0, 2), row(0.0, 0.0, 5), row(0.0, 0.0, 6)], [0] * 5),
        (1, [row(0.0, 0.5, 3), row(0.0, 0.6, 4), row(0.0, 0.7, 5)], [0, 0, 0]),
    ],
)
def test_epochs_without_improvement_count_only_where_the_score_tells(num_images, rows, counts):
    state = TrainState(*[None] * 5, "", [])
    for one, count in zip(rows, counts, strict=True):
        state.end_epoch(epoch_key(one, "cider", num_images))
        assert state.epochs_since_improvement == count
    assert state.epoch == len(rows)
