"""Consensus re-ranking against its formula written out, and its index as a file."""

import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluation.consensus import TENSORS, Candidate, CaptionIndex, Consensus
from evaluation.ensemble import EnsembleSettings
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
CANDIDATES = [
    Candidate(["a", "man", "runs"], -2.0, -1.0),
    Candidate(["a", "dog", "jumps"], -2.5, -1.25),
    Candidate(["girls"], -2.6, -2.6 / 2**0.5),
]


@pytest.fixture(scope="module")
def index():
    encoder = Encoder("mobilenet_v3_small", image_size=32)
    return CaptionIndex.build(encoder, MEANS, PackedCaptions.pack(CAPTIONS), "digest of the data")


def captioner_of(fingerprint, feature_dim=3, *others):
    """Return the parts of a captioner with this encoder, or of an ensemble, that a consensus needs."""
    sources = [SimpleNamespace(encoder=SimpleNamespace(feature_dim=feature_dim)) for _ in range(1 + len(others))]
    return SimpleNamespace(fingerprints=[*others, fingerprint], sources=sources, uses_region_features=False)


def consensus(index, weight, similar_photos, captioner=None):
    captioner = captioner or captioner_of(index.encoder)
    settings = EnsembleSettings(consensus_weight=weight, similar_photos=similar_photos)
    return Consensus(index, captioner, settings, torch.device("cpu"))


def by_formula(query, weight, similar_photos):
    """Compute the scores of CANDIDATES with plain loops."""
    center = MEANS.mean(dim=0)
    cosines = [max(0.0, float(torch.cosine_similarity(query - center, mean - center, dim=0))) for mean in MEANS]
    nearest = sorted(range(len(MEANS)), key=lambda i: -cosines[i])[:similar_photos]
    cider, scores = CiderD(CAPTIONS), []
    for words, _, score in CANDIDATES:
        total = sum(cosines[i] ** 4 * cider(CAPTIONS[i], [words])[0] for i in nearest)
        consensus = total / sum(cosines[i] ** 4 for i in nearest)
        scores.append(score + weight * consensus)
    return scores


@pytest.mark.parametrize("weight", [0.0, 0.3, 2.0])
def test_candidates_are_ranked_by_the_formula(index, weight):
    regions = torch.tensor([[[0.5, 0.4, 0], [1.5, 0, 0.2]], [[-1.0, 0.4, 0], [-1.0, 0.4, 0]], [[0, 1.9, -0.2]] * 2])
    found = consensus(index, weight, 3).rerank([CANDIDATES] * 3, regions)
    for b, ranked in enumerate(found):
        scores = by_formula(regions[b].mean(dim=0), weight, 3)
        assert ranked == [CANDIDATES[i] for i in np.argsort([-score for score in scores])]
    if weight == 2:
        assert [ranked[0] for ranked in found[:2]] == [CANDIDATES[1], CANDIDATES[0]]  # a dog is no man


def test_photos_of_no_similarity_change_nothing(index):
    center = MEANS.mean(dim=0).view(1, 1, -1)  # cosines of a zero vector
    assert consensus(index, 9.0, 2).rerank([CANDIDATES], center) == [CANDIDATES]


def test_words_that_the_index_lacks_differ_from_each_other(index):
    ranked = consensus(index, 1.0, 4)
    candidates = [["a", "zebra", "yak"], ["a", "gnu", "gnu"]]
    encoded = [[ranked._word_id(word) for word in words] for words in candidates]
    assert encoded[0][0] == index.captions.idx2word.index("a")
    unknown = [encoded[0][1], encoded[0][2], encoded[1][1]]
    assert len(set(unknown)) == 3 and min(unknown) >= len(index.captions.idx2word) and encoded[1][1] == encoded[1][2]
    as_words = CiderD(CAPTIONS).pairwise(candidates, CAPTIONS[0])
    np.testing.assert_allclose(ranked.cider.pairwise(encoded, index.captions[0]), as_words)


def test_mixed_precision_does_not_change_the_similarities(index):
    regions = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    expected = consensus(index, 1.0, 4).similar(regions)
    with torch.autocast("cpu", torch.bfloat16):
        found = consensus(index, 1.0, 4).similar(regions)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_an_index_is_read_as_it_was_written(index, tmp_path):
    index.save(tmp_path / "index.pt")
    loaded = CaptionIndex.load(tmp_path / "index.pt")
    assert loaded.encoder == index.encoder and loaded.captions.decode() == CAPTIONS
    torch.testing.assert_close(loaded.features, index.features, rtol=0, atol=0)
    assert torch.equal(loaded.center, index.center) and loaded.data_digest == "digest of the data"


DAMAGED = r"index.pt (is damaged: make it again|is not an index of captions|is refused: it is damaged)"
VALUES = [None, True, -1, 0, 3, 10**12, 0.5, 1j, "", "x", "\ud800", b"", {}, set(), ("a",)]
VALUES += [[], [[]], ["a", []], ["a", "a"]]
VALUES += [["resnet18", "", 0, None], ["resnet18", "", 0.5, "x"], ["resnet18"], [["a"], "", 0, "x"]]
VALUES += [torch.tensor(1), torch.zeros(0), torch.zeros(0, 3), torch.zeros(1).expand(10**12), torch.zeros(3).half()]
VALUES += [torch.tensor(each) for each in ([0, 2, 4, 6, 900], [0, 3], [0, 2**63 - 1, -2, 6, 8])]
VALUES += [torch.zeros(2), torch.zeros(3, 3).half(), torch.full((3,), torch.nan), torch.full((4, 3), torch.inf).half()]
VALUES += [torch.zeros(4, 3).half().to_sparse(), torch.zeros(4, 3, dtype=torch.float16, device="meta")]
CHANGES = {  # of each tensor
    "empty": lambda x: x[:0].clone(),
    "one more dimension": lambda x: x.unsqueeze(0),
    "one element for all": lambda x: x.flatten()[:1].expand(x.shape) if x.numel() > 1 else None,
    "not one after another": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "complex": lambda x: x.to(torch.complex64),
    "float64": lambda x: x.double(),
    "below 0": lambda x: -1 - x if x.dtype in (torch.int32, torch.int64) else None,
    "one row less": lambda x: x[:-1].clone(),
    "negated lazily": lambda x: torch._neg_view(x),
    "sparse": lambda x: x.to_sparse(),
}


def written(index, path):
    """Return the content of the file of an index."""
    index.save(path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", ["index_format", "encoder", "data_digest", "words", *TENSORS])
def test_each_damaged_part_is_one_line(index, tmp_path, name):
    content = written(index, tmp_path / "index.pt")
    values = [value for value in VALUES if not (name == "data_digest" and type(value) is str)]
    if name in TENSORS:
        values += [changed for change in CHANGES.values() if (changed := change(content[name])) is not None]
    without = {key: value for key, value in content.items() if key != name}
    for damaged in [without, *(content | {name: value} for value in values)]:
        torch.save(damaged, tmp_path / "index.pt")
        with pytest.raises(InputError) as error:
            CaptionIndex.load(tmp_path / "index.pt")
        assert re.search(DAMAGED, str(error.value)) and "\n" not in str(error.value)


def test_repeated_elements_take_no_memory(index, tmp_path):
    content = written(index, tmp_path / "index.pt")
    huge = {"center": torch.zeros(1).expand(10**12), "features": torch.zeros(1, 1).half().expand(4, 10**12)}
    torch.save(content | huge, tmp_path / "index.pt")  # they fit together
    with pytest.raises(InputError, match=DAMAGED):
        CaptionIndex.load(tmp_path / "index.pt")


def test_changed_elements_leave_an_index_or_are_one_line(index, tmp_path):
    content, generator, loads = written(index, tmp_path / "index.pt"), random.Random(0), 0
    regions = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(100):
        name = generator.choice(list(TENSORS))
        tensor = content[name].clone()
        values = [-1, 0, 1, 2, 5, 30] if not tensor.is_floating_point() else [-1e4, 0, 0.5, torch.nan, torch.inf]
        tensor.view(-1)[generator.randrange(tensor.numel())] = generator.choice(values)
        torch.save(content | {name: tensor}, tmp_path / "index.pt")
        try:
            loaded = CaptionIndex.load(tmp_path / "index.pt")
        except InputError as error:
            assert re.search(DAMAGED, str(error))
            continue
        loads += 1
        for ranked in consensus(loaded, 1.0, 3).rerank([CANDIDATES] * 2, regions):
            assert sorted(ranked) == sorted(CANDIDATES)
    assert 10 < loads < 90


def test_an_index_of_another_encoder_is_refused(index):
    other = ("resnet18", "layer4", 0, "digest")
    with pytest.raises(InputError, match="another encoder, mobilenet_v3_small with other weights, layer or grid"):
        consensus(index, 1.0, 2, captioner_of(other))
    found = consensus(index, 2.0, 3, captioner_of(index.encoder, 3, other))
    features = (torch.zeros(1, 2, 5), torch.tensor([[[0.5, 0.4, 0], [1.5, 0, 0.2]]]))  # of the two encoders
    assert found.rerank([CANDIDATES], features) == consensus(index, 2.0, 3).rerank([CANDIDATES], features[1])


def test_a_model_of_region_features_has_no_consensus(index):
    captioner = captioner_of(("", "", 0, ""))
    captioner.uses_region_features = True
    with pytest.raises(InputError, match="a model of region features does not have: leave --consensus_index out"):
        consensus(index, 1.0, 2, captioner)


def test_features_of_another_width_than_the_encoders_are_refused(index):
    with pytest.raises(InputError, match="damaged, its photos have 3 features and not the encoder's 576: make it"):
        consensus(index, 1.0, 2, captioner_of(index.encoder, 576))
