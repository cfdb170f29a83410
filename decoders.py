"""The decoder: a recurrent network that looks at an image's regions before each word.

Shapes: B images, R regions, D features of a region, C captions of an image (in a search beams), T words, E units of a
word's embedding, A of the attention, H of the hidden state, Z of the context (D, or 0 without attention), V words of
the vocabulary.
"""

import math
import warnings
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from attention import ATTENTIONS
from cells import CELLS
from layers import Dropout, draw, start_linear
from vocabulary import PAD, START

WORD_SIZE = 0.1  # units of a word lie between minus and plus this at the start


class Outputs(NamedTuple):
    """What teacher forcing predicts: N real words over all captions, step by step."""

    logits: torch.Tensor  # (N, V)
    targets: torch.Tensor  # (N,)
    weights: torch.Tensor  # (T, B, C, R), zero after a caption's end
    choices: torch.Tensor | None = None  # (T, B, C) log-probabilities of what hard attention chose, 0 where it did not
    baseline: torch.Tensor | None = None  # () of hard attention, see `optimization.hard_attention_loss`


class Decoder(nn.Module):
    """A recurrent network that looks at the regions before each word ("Show, Attend and Tell", sections 3.1.2 and 4.2).

    `keys` and `first_state` run once an image, `step` once a word; teacher forcing and every search use these three.
    `cell` is a name in `cells.CELLS`, `attention` one in `attention.ATTENTIONS`.
    """

    def __init__(
        self, vocabulary_size, region_size, embedding_size, attention_size, hidden_size, dropout, cell, attention
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size, padding_idx=PAD)
        self.attention = ATTENTIONS[attention](region_size, hidden_size, attention_size)
        self.first = nn.ModuleList(nn.Linear(region_size, hidden_size) for _ in range(CELLS[cell].STATES))
        self.hidden_output = nn.Linear(hidden_size, embedding_size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # weights for a context of width 0 are empty: torch warns, all goes well
            self.cell = CELLS[cell](embedding_size, self.attention.context_size, hidden_size)
            self.context_output = nn.Linear(self.attention.context_size, embedding_size, bias=False)
        self.output = nn.Linear(embedding_size, vocabulary_size)
        self.dropout = Dropout(dropout)
        # torch's own start would draw the words ten times larger, and drown the regions in them for epochs; it would
        # also leave the attention so close to uniform that it stays so for long.
        nn.init.uniform_(self.embedding.weight, -WORD_SIZE, WORD_SIZE)
        self.embedding.weight.data[PAD] = 0
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and layer.weight.numel():
                start_linear(layer)
        self.cell.start()

    @property
    def looks(self):
        """Whether it looks at the regions before each word."""
        return self.attention.context_size > 0

    def start_words(self, numbers, vectors):
        """Start words (n,) from vectors (n, E) of root mean square 1, which become as large as others at the start."""
        self.embedding.weight.data[numbers] = vectors * WORD_SIZE / math.sqrt(3)

    def keys(self, regions):
        """The part of the attention that no word changes: regions (B, R, D) -> keys (B, R, A)."""
        return self.attention.keys(regions)

    def first_state(self, regions):
        """The state before the first word, from the mean region: (B, R, D) -> tuple of (B, 1, H)."""
        mean = regions.mean(dim=1, keepdim=True)  # (B, 1, D)
        return tuple(layer(mean).tanh() for layer in self.first)

    def step(self, words, regions, keys, state):
        """Predict the next word of C captions an image.

        words (B, C), regions (B, R, D), keys (B, R, A), state tuple of (B, C, H)
        -> logits (B, C, V), weights (B, C, R), state.
        """
        embedded = self.dropout(self.embedding(words))  # (B, C, E)
        context, weights, state = self._look_and_update(self.cell.words(embedded), regions, keys, state)
        return self._logits(embedded, state[0], context), weights, state

    def _look_and_update(self, words, regions, keys, state, choices=None):
        """The recurrent half of a step: attend (equations 4 to 6 and 13), then the cell (equations 1 to 3)."""
        context, weights = self.attention(regions, keys, state[0], choices)  # (B, C, Z), (B, C, R)
        return context, weights, self.cell(words, context, state)  # and state (B, C, H)

    def _logits(self, embedded, hidden, context):
        """The deep output layer (equation 7); the authors' code has the tanh and the dropout."""
        output = embedded + self.hidden_output(hidden) + self.context_output(context)  # (..., E)
        return self.output(self.dropout(output.tanh()))  # (..., V)

    @torch.no_grad()
    def _draw(self, *arguments):
        """Draw words as probable as `_logits` of these arguments makes them, of those that can follow."""
        logits = self._logits(*arguments).float()
        logits[..., [PAD, START]] = -math.inf
        return draw(logits.softmax(dim=-1))

    def forward(self, regions, words, lengths, sampling=0.0):
        """Teacher forcing: each word from the true words before it.

        Args:
            regions: (B, R, D).
            words: (B, C, T + 1), <start> ... <end> and padding, sorted as `datasets.Batch` has them.
            lengths: (B, C) on the CPU, the number of words to predict.
            sampling: share of the words before that the model draws itself (scheduled sampling, Bengio et al., 2015).

        Returns `Outputs`. Finished captions and padding are never computed.
        """
        keys, state = self.keys(regions), self.first_state(regions)
        B, C = lengths.shape
        state = tuple(part.expand(B, C, -1) for part in state)
        real = torch.arange(int(lengths.max())).view(-1, 1, 1) < lengths  # (T, B, C)
        # At each word the unfinished captions fill a corner of (B, C), up to a few: M of them over all words.
        corners = [(int(step.any(dim=1).sum()), int(step.any(dim=0).sum())) for step in real]
        inputs = torch.cat([words[:b, :c, t].flatten() for t, (b, c) in enumerate(corners)])  # (M,)
        sizes = [b * c for b, c in corners]
        embedded = self.dropout(self.embedding(inputs))  # (M, E)
        cell_words = self.cell.words(embedded).split(sizes)  # T of (b c, gates H)
        embedded = list(embedded.split(sizes))  # T of (b c, E)
        hiddens, contexts, weights = [], [], []
        with self.attention.over_time() as choices, self.cell.over_time():
            for t, (word, (b, c)) in enumerate(zip(cell_words, corners, strict=True)):
                if sampling and t:
                    drawn = self._draw(embedded[t - 1], hiddens[-1], contexts[-1])  # (b c of the step before)
                    drawn = drawn.view(corners[t - 1])[:b, :c]
                    own = torch.rand_like(drawn, dtype=torch.float) < sampling
                    embedded[t] = self.dropout(self.embedding(drawn.where(own, words[:b, :c, t]).flatten()))
                    word = self.cell.words(embedded[t])
                if b < len(regions):  # slice what is sliced already: less to fill with zeros on the way back
                    regions, keys = regions[:b], keys[:b]
                if (b, c) != state[0].shape[:2]:
                    state = tuple(part[:b, :c] for part in state)  # (b, c, H)
                word = word.view(b, c, -1)
                context, step_weights, state = self._look_and_update(word, regions, keys, state, choices)
                hiddens.append(state[0].flatten(0, 1))  # (b c, H)
                contexts.append(context.flatten(0, 1))  # (b c, Z)
                weights.append(functional.pad(step_weights, (0, 0, 0, C - c, 0, B - b)))  # (B, C, R)
        # Drop the few that had ended, then predict all words in one product.
        rows = torch.cat([real[t, :b, :c].flatten() for t, (b, c) in enumerate(corners)]).nonzero().squeeze(1)
        rows, real = rows.to(words.device), real.to(words.device)
        logits = self._logits(torch.cat(embedded)[rows], torch.cat(hiddens)[rows], torch.cat(contexts)[rows])  # (N, V)
        targets = words[:, :, 1 : len(real) + 1].permute(2, 0, 1)[real]  # (N,)
        weights = torch.stack(weights) * real.unsqueeze(-1)
        if not choices:
            return Outputs(logits, targets, weights)
        padded = [functional.pad(one, (0, C - one.shape[1], 0, B - one.shape[0])) for one in choices]
        return Outputs(logits, targets, weights, torch.stack(padded) * real, self.attention.baseline)
