"""Forced decoding against teacher forcing and single steps."""

import pytest
import torch
from decoding.force_decode import force_decode

from conftest import beams, step_by_step
from decoding.beam_search import beam_search
from text.vocabulary import END, START


@pytest.mark.parametrize("max_length", [2, 8])
def test_beam_search_and_forced_decoding_agree_with_teacher_forcing(tiny_decoder, max_length):
    regions = torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(1)) * 2
    captions, log_probs = beam_search(tiny_decoder, regions, beams(3, max_length))
    forced_log_probs, forced_alpha = force_decode(tiny_decoder, regions, captions)
    assert forced_alpha.shape == (6, 3, captions.shape[2], 4)
    torch.testing.assert_close(forced_log_probs, log_probs)
    for b, image in enumerate(captions.tolist()):
        for k, caption in enumerate(image):
            length = caption.index(END) + 1 if END in caption else len(caption)
            words = torch.tensor([[[START, *caption[:length]]]])
            logits, targets, alpha, *_ = tiny_decoder(regions[b : b + 1], words, torch.tensor([[length]]))
            log_prob = logits.log_softmax(1).gather(1, targets.unsqueeze(1)).sum()
            torch.testing.assert_close(log_prob, log_probs[b, k])
            torch.testing.assert_close(forced_alpha[b, k, :length], alpha[:, 0, 0])
            assert forced_alpha[b, k, length:].abs().sum() == 0


def test_captions_of_any_origin_are_scored(tiny_decoder):
    regions = torch.randn(2, 4, 6)
    captions = torch.tensor([[[4, 5, 6], [END, END, END], [6, END, END]], [[6, 6, END], [3, 4, 5], [5, 4, END]]])
    log_probs, alpha = force_decode(tiny_decoder, regions, captions)
    for b in range(2):
        for c, caption in enumerate(captions[b].tolist()):
            caption = caption[: caption.index(END) + 1] if END in caption else caption
            expected, expected_alpha = step_by_step(tiny_decoder, regions[b : b + 1], caption)
            assert log_probs[b, c].item() == pytest.approx(expected, abs=1e-4)
            torch.testing.assert_close(alpha[b, c, : len(caption)], expected_alpha)
