"""The model of sgrvinod's tutorial: the same names of classes, parameters and settings, and its equations.

One caption at a time, by `nn.LSTMCell`. D features of a region, R regions, E, A, H and V as in `modules.sgrvinod`.
"""

import contextlib
import sys
import types
import warnings

import torch
import torchvision
from torch import nn


class Encoder(nn.Module):
    """A ResNet without its last two layers, pooled to a grid."""

    def __init__(self, network="resnet18", enc_image_size=14):
        super().__init__()
        self.enc_image_size = enc_image_size
        self.resnet = nn.Sequential(*list(torchvision.models.get_model(network, weights=None).children())[:-2])
        self.adaptive_pool = nn.AdaptiveAvgPool2d((enc_image_size, enc_image_size))

    def forward(self, images):
        """Normalized images (B, 3, h, w) -> regions (B, R, D)."""
        return self.adaptive_pool(self.resnet(images)).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """alpha = softmax(full_att(relu(encoder_att(a) + decoder_att(h))))."""

    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)
        self.relu, self.softmax = nn.ReLU(), nn.Softmax(dim=1)


class DecoderWithAttention(nn.Module):
    """The decoder; `dropout` is the layer, as there."""

    def __init__(self, attention_dim, embed_dim, decoder_dim, vocab_size, encoder_dim, dropout=0.5):
        super().__init__()
        self.encoder_dim, self.attention_dim, self.embed_dim = encoder_dim, attention_dim, embed_dim
        self.decoder_dim, self.vocab_size, self.decoder_layers = decoder_dim, vocab_size, 1
        self.attention = Attention(encoder_dim, decoder_dim, attention_dim)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.dropout = nn.Dropout(p=dropout)
        self.decode_step = nn.LSTMCell(embed_dim + encoder_dim, decoder_dim)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        self.init_c = nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, encoder_dim)
        self.sigmoid = nn.Sigmoid()
        self.fc = nn.Linear(decoder_dim, vocab_size)


def init_state(decoder, regions):
    """regions (R, D) -> h and c (1, H)."""
    mean = regions.mean(0, keepdim=True)
    return decoder.init_h(mean), decoder.init_c(mean)


def step(decoder, word, regions, state):
    """A word's id, regions (R, D), state -> logits (V,), alpha (R,), state. Without dropout."""
    h = state[0]
    attention = decoder.attention
    scores = attention.full_att(torch.relu(attention.encoder_att(regions) + attention.decoder_att(h)))  # (R, 1)
    alpha = scores.squeeze(1).softmax(0)
    context = decoder.f_beta(h).sigmoid() * sum(weight * region for weight, region in zip(alpha, regions, strict=True))
    state = decoder.decode_step(torch.cat([decoder.embedding.weight[[word]], context], dim=1), state)
    return decoder.fc(state[0]).squeeze(0), alpha, state


def random_decoder(word_ids, encoder_dim):
    """Return a decoder in eval mode whose random weights and biases predict peaked distributions and often <end>."""
    decoder = DecoderWithAttention(6, 5, 16, len(word_ids), encoder_dim).eval()
    for parameter in decoder.parameters():
        parameter.data *= 3
    decoder.attention.encoder_att.weight.data *= 10
    decoder.fc.bias.data[word_ids["<end>"]] += 1
    return decoder


def word_map(words):
    """Return a word map like the tutorial's: words from 1, then <unk>, <start> and <end>; <pad> is 0."""
    ordered = [*words, "<unk>", "<start>", "<end>"]
    return {word: i + 1 for i, word in enumerate(ordered)} | {"<pad>": 0}


def plain_beam_search(decoder, regions, word_ids, *, beam_size, max_length):
    """Return the word ids of the best caption; `word_ids` is the word map.

    Each step keeps the most probable captions, finished or one word longer. The tutorial's own search differs: a
    finished caption leaves the beam and shrinks it, no word is banned, and there is no result if no caption ends.
    """
    end = word_ids["<end>"]
    banned = [word_ids[word] for word in ("<pad>", "<start>", "<unk>")]
    beams = [([], 0.0, init_state(decoder, regions))]
    for t in range(max_length):
        candidates = []
        for caption, score, state in beams:
            if caption and caption[-1] == end:
                candidates.append((caption, score, state))
                continue
            logits, _, new_state = step(decoder, caption[-1] if caption else word_ids["<start>"], regions, state)
            for word, log_prob in enumerate(logits.log_softmax(0).tolist()):
                if word not in banned and not (word == end and t == 0):
                    candidates.append(([*caption, word], score + log_prob, new_state))
        beams = sorted(candidates, key=lambda candidate: -candidate[1])[:beam_size]
    return beams[0][0]


@contextlib.contextmanager
def pickled_as_models():
    """Within this context the classes are pickled under the module name `models`, like the tutorial's."""
    classes, ours = (Encoder, Attention, DecoderWithAttention), sys.modules.get("models")
    theirs = types.ModuleType("models")
    for each in classes:
        each.__module__ = "models"
        setattr(theirs, each.__name__, each)
    sys.modules["models"] = theirs
    try:
        yield
    finally:
        for each in classes:
            each.__module__ = __name__
        del sys.modules["models"]
        if ours:
            sys.modules["models"] = ours


def checkpoint(encoder, decoder, *, fine_tuned=False):
    """Return what the tutorial saves after a step of its optimizers, with Adam's state."""
    optimizers = []
    for module in (encoder, decoder) if fine_tuned else (decoder,):
        optimizers.append(torch.optim.Adam(module.parameters(), lr=4e-4))
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizers[-1].step()
        module.zero_grad()
    return {
        "epoch": 3,
        "epochs_since_improvement": 0,
        "bleu-4": 0.24,
        "encoder": encoder,
        "decoder": decoder,
        "encoder_optimizer": optimizers[0] if fine_tuned else None,
        "decoder_optimizer": optimizers[-1],
    }


def save(content, path, *, legacy):
    """Write with torch.save under the tutorial's class names, in the format of torch before 1.6 or since."""
    with pickled_as_models(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some classes have no source to save
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
