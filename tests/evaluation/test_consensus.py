"""Consensus re-ranking against its formula written out, and its index as a file."""

import numpy as np
import pytest
import torch

from evaluation.consensus import CaptionIndex, Consensus
from modules.encoders import Encoder
from preparation.storage import PackedCaptions
from text.cider import CiderD
from utils import InputError

CAPTIONS = [
    [["a", "dog", "runs"], ["a", "brown", "dog"]],
    [["a", "dog", "jumps"], ["the", "dog", "jumps", "high"]],
    [["a", "man", "rides", "a", "bike"], ["a", "man", "on", "a", "bike"]],
    [["two", "girls", "play"], ["girls", "play", "ball"]],
]
MEANS = torch.tensor([[1.0, 0, 0.2], [0.9, 0.3, 0], [-1, 0.5, 0], [0, -1, 0.5]])
CANDIDATES = [(["a", "man", "runs"], -2.0), (["a", "dog", "jumps"], -2.5), (["girls"], -2.6)]


@pytest.fixture(scope="module")
def index():
    encoder = Encoder("mobilenet_v3_small", image_size=32)
    return CaptionIndex.build(encoder, MEANS, PackedCaptions.pack(CAPTIONS))


def by_formula(query, weight, neighbors, length_penalty):
    """The scores of CANDIDATES, with plain loops."""
    center = MEANS.mean(dim=0)
    cosines = [max(0.0, float(torch.cosine_similarity(query - center, mean - center, dim=0))) for mean in MEANS]
    nearest = sorted(range(len(MEANS)), key=lambda i: -cosines[i])[:neighbors]
    cider, scores = CiderD(CAPTIONS), []
    for words, log_prob in CANDIDATES:
        total = sum(cosines[i] ** 2 * cider(CAPTIONS[i], [words])[0] for i in nearest)
        consensus = total / sum(cosines[i] ** 2 for i in nearest)
        scores.append(log_prob / (len(words) + 1) ** length_penalty + weight * consensus)
    return scores


@pytest.mark.parametrize("weight", [0.0, 0.3, 2.0])
def test_candidates_are_ranked_by_the_formula(index, weight):
    regions = torch.tensor([[[0.5, 0.4, 0], [1.5, 0, 0.2]], [[-1.0, 0.4, 0], [-1.0, 0.4, 0]]])  # (B, R, F)
    found = Consensus(index, weight, 3, torch.device("cpu")).rerank([CANDIDATES] * 2, regions, 0.5)
    for b, ranked in enumerate(found):
        scores = by_formula(regions[b].mean(dim=0), weight, 3, 0.5)
        assert ranked == [CANDIDATES[i] for i in np.argsort([-score for score in scores])]
    if weight == 2:
        assert [ranked[0] for ranked in found] == [CANDIDATES[1], CANDIDATES[0]]  # a dog is no man


def test_photos_of_no_similarity_change_nothing(index):
    center = MEANS.mean(dim=0).view(1, 1, -1)  # cosines of a zero vector
    assert Consensus(index, 9.0, 2, torch.device("cpu")).rerank([CANDIDATES], center, 0.5) == [CANDIDATES]


def test_an_index_is_read_as_it_was_written(index, tmp_path):
    index.save(tmp_path / "index.pt")
    loaded = CaptionIndex.load(tmp_path / "index.pt")
    assert loaded.encoder == index.encoder and loaded.captions.decode() == CAPTIONS
    torch.testing.assert_close(loaded.features, index.features, rtol=0, atol=0)
    assert torch.equal(loaded.center, index.center)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("words", ["a"]),
        ("word_ids", None),
        ("features", torch.zeros(3, 3).half()),
        ("features", torch.full((4, 3), torch.nan).half()),
        ("image_offsets", torch.tensor([0, 2, 4, 6, 900])),
        ("caption_offsets", torch.tensor([0, 3])),
        ("center", torch.zeros(2)),
        ("encoder", 5),
    ],
)
def test_a_damaged_index_is_refused(index, tmp_path, name, value):
    index.save(tmp_path / "index.pt")
    content = torch.load(tmp_path / "index.pt", weights_only=True)
    torch.save(content | {name: value}, tmp_path / "index.pt")
    with pytest.raises(InputError, match=r"index.pt is damaged: make it again with tools/index_captions.py"):
        CaptionIndex.load(tmp_path / "index.pt")


def test_another_file_is_no_index(run_folder):
    with pytest.raises(InputError, match=r"best.pt is not an index of captions"):
        CaptionIndex.load(run_folder / "best.pt")
