"""What decoders are built from: linear layers that are applied at every word, recurrent cells, attention.

Shapes: B images, R regions, D features of a region, C captions of an image, A units of the attention, H of the hidden
state; N rows, I and O features of a linear layer.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.function import once_differentiable


def start_linear(layer):
    """Start a linear layer as Glorot and Bengio (2010) do."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class Dropout(nn.Dropout):
    """torch's dropout with random numbers that come faster on a CPU."""

    def forward(self, x):
        """x -> the same shape."""
        if x.device.type != "cpu" or not self.training or not self.p:
            return super().forward(x)
        return x.masked_fill(torch.rand(x.shape) < self.p, 0) / (1 - self.p)


class _WeightOverTime(torch.autograd.Function):
    """Hands out a weight for the applications at all words; backward multiplies out all of its gradient at once."""

    @staticmethod
    def forward(ctx, weight, applications):
        ctx.applications = applications
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        rows, gradients = (torch.cat(parts) for parts in zip(*ctx.applications, strict=True))
        ctx.applications.clear()
        return gradients.t() @ rows, None


class _ApplyOnce(torch.autograd.Function):
    """rows (N, I) @ weight (O, I).T, whose part of the weight's gradient is left to _WeightOverTime."""

    @staticmethod
    def forward(ctx, rows, weight, applications):
        ctx.save_for_backward(rows, weight)
        ctx.applications = applications
        return rows @ weight.t()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rows, weight = ctx.saved_tensors
        if ctx.needs_input_grad[1]:  # without, nobody would ever clear the list
            ctx.applications.append((rows.detach(), gradient))
        return gradient @ weight, None, None


class LinearOverTime(nn.Linear):
    """A linear layer without bias that is applied at every word.

    Within `over_time` the gradient of its weight is one product over all words. autograd alone makes a product a
    word and adds them up, which for the last words of a long caption, a few rows, is nearly all of the work.
    """

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)
        self.applications = None

    @contextmanager
    def over_time(self):
        """Collect the applications of one sequence, which is to be differentiated as a whole."""
        self.applications = []
        weight = self.weight
        if torch.is_autocast_enabled(weight.device.type):
            weight = weight.to(torch.get_autocast_dtype(weight.device.type))
        self.shared = _WeightOverTime.apply(weight, self.applications)
        try:
            yield
        finally:
            self.applications = self.shared = None

    def forward(self, rows):
        """rows (..., I) -> (..., O)."""
        if self.applications is None:
            return super().forward(rows)
        flat = rows.flatten(0, -2).to(self.shared.dtype)
        return _ApplyOnce.apply(flat, self.shared, self.applications).unflatten(0, rows.shape[:-1])


class LSTMCell(nn.Module):
    """torch's LSTMCell ("Show, Attend and Tell", equations 1 to 3) with the words' part of the gates apart.

    That part, `words`, depends on no state: teacher forcing computes it for all words in one product.
    """

    def __init__(self, embedding_size, region_size, hidden_size):
        super().__init__()
        self.words = nn.Linear(embedding_size, 4 * hidden_size)
        self.context = LinearOverTime(region_size, 4 * hidden_size)
        self.hidden = LinearOverTime(hidden_size, 4 * hidden_size)

    def start(self):
        """Forget nothing at first (Jozefowicz et al., 2015), and let the state turn without growing or fading."""
        for gate in self.hidden.weight.data.chunk(4):
            nn.init.orthogonal_(gate)
        self.words.bias.data.chunk(4)[1].fill_(1)

    def forward(self, words, context, state):
        """words (..., 4 H) as `words` makes them, context (..., D), state tuple of (..., H) -> state."""
        hidden, memory = state
        gates = words + self.context(context) + self.hidden(hidden)
        take, keep, new, show = gates.chunk(4, dim=-1)
        memory = keep.sigmoid() * memory + take.sigmoid() * new.tanh()
        return show.sigmoid() * memory.tanh(), memory


class SoftAttention(nn.Module):
    """Additive attention: a weighted mean of the regions.

    Source: "Show, Attend and Tell" (Xu et al., 2015), equations 4 to 6 and 13; the scoring network is that of
    Bahdanau et al. (2015).
    """

    def __init__(self, region_size, hidden_size, attention_size):
        super().__init__()
        self.keys = nn.Linear(region_size, attention_size)
        self.query = LinearOverTime(hidden_size, attention_size)
        self.score = nn.Linear(attention_size, 1, bias=False)  # softmax takes no notice of a bias

    def forward(self, regions, keys, hidden):
        """regions (B, R, D), keys (B, R, A), hidden (B, C, H) -> context (B, C, D), weights (B, C, R)."""
        energy = keys.unsqueeze(1) + self.query(hidden).unsqueeze(2)  # (B, C, R, A), the largest tensor
        if energy.device.type == "cpu":
            # tanh(x) = 2 sigmoid(2 x) - 1, in a third of the time there; of the 1, softmax takes no notice.
            scores = 2 * self.score(energy.mul_(2).sigmoid_()).squeeze(-1)  # (B, C, R)
        else:
            scores = self.score(energy.tanh_()).squeeze(-1)  # (B, C, R)
        weights = scores.float().softmax(dim=-1)  # (B, C, R)
        return weights.to(regions.dtype) @ regions, weights  # (B, C, D), (B, C, R)
