"""N-best lists of captions are what beam search finds."""

import torch

from conftest import beams
from decoding.beam_search import beam_search
from decoding.captions import caption_batch
from models import load_captioner
from utils import choose_runtime


def test_n_best_is_what_beam_search_finds(shapes, run_folder):
    captioner = load_captioner(run_folder / "best.pt", "cpu")
    runtime = choose_runtime("cpu", "fp32")
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    decoding = beams(4, 6)
    found = caption_batch(captioner, images, decoding, runtime, with_attention=False)
    captions, log_probs = beam_search(captioner.decoder, captioner.encode(images).regions, beams(4, 6))
    for b, image in enumerate(found):
        assert [each.words for each in image.n_best] == [
            captioner.vocabulary.decode(caption) for caption in captions[b]
        ]
        assert [each.log_prob for each in image.n_best] == log_probs[b].tolist()
        assert image.words == image.n_best[0][0] and image.alpha.shape == (0, 16) and image.gates is None
    (alone,) = caption_batch(captioner, images[:1], decoding, runtime)
    assert alone.words == found[0].words and len(alone.alpha) == len(alone.gates) >= len(alone.words)
