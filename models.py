"""The networks and the search: an image's regions, a decoder that attends to them, beam search over any decoder.

Shapes: B images, R regions, D features of a region, C captions of an image (in a search K beams), T words,
E units of a word's embedding, A of the attention, H of the hidden state, V words of the vocabulary.
"""

import math
import re
import urllib.error
from contextlib import contextmanager

import torch
import torchvision
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torchvision.models.feature_extraction import create_feature_extractor

from datasets import END, PAD, START, UNKNOWN, Vocabulary
from utils import InputError, first_line, load_state

CHECKPOINT_FORMAT = 2
CHECKPOINT_KEYS = {"format", "model", "image_size", "words", "settings"}  # what inference needs

# The settings of train.py that shape a model: what a checkpoint needs to be built again.
MODEL_SETTINGS = (
    "encoder",
    "encoder_layer",
    "grid_size",
    "region_dim",
    "embedding_size",
    "attention_size",
    "hidden_size",
    "dropout",
)

# The last layer of each family that still has a grid; its children's names begin like this.
GRID_LAYERS = {
    "resnet": "layer4",
    "resnext": "layer4",
    "wide_resnet": "layer4",
    "vgg": "features",
    "densenet": "features",
    "mobilenet": "features",
    "efficientnet": "features",
    "convnext": "features",
    "squeezenet": "features",
    "mnasnet": "layers",
    "shufflenet": "conv5",
    "regnet": "trunk_output",
    "inception": "Mixed_7c",
    "googlenet": "inception5b",
}


class Encoder(nn.Module):
    """A torchvision classification network up to a layer with a grid of features.

    Args:
        name: torchvision's name of the network, such as "resnet101".
        layer: name of the layer to take, "" for the family's last one with a grid.
        weights: "imagenet", "" (random) or the path of a torchvision state dict.
        grid_size: pool the grid to grid_size x grid_size (the paper: 14), 0 keeps the network's own.
        image_size: side in pixels of the images to come.

    Raises InputError for a name, layer or weights that cannot be had.
    """

    def __init__(self, name, layer="", weights="", grid_size=0, image_size=224):
        super().__init__()
        if name not in torchvision.models.list_models(module=torchvision.models):
            raise InputError(f"--encoder {name}: torchvision has no such classification network")
        family = next((family for family in GRID_LAYERS if name.startswith(family)), None)
        if not layer and not family:
            raise InputError(f"--encoder {name}: give the layer to take as --encoder_layer")
        self.name, self.layer, self.grid_size = name, layer or GRID_LAYERS[family], grid_size
        self.pretrained = bool(weights)
        network = build_network(name, weights)
        try:
            self.network = create_feature_extractor(network, {self.layer: "grid"})
        except ValueError:
            names = " ".join(child for child, _ in network.named_children())
            raise InputError(f"--encoder_layer {self.layer}: {name} has {names} and their parts") from None
        if weights not in ("", "imagenet"):
            load_encoder_weights(self.network, weights)
        self.network = self.network.to(memory_format=torch.channels_last)
        preset = imagenet_weights(name).transforms()
        self.register_buffer("mean", torch.tensor(preset.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preset.std).view(3, 1, 1), persistent=False)
        self.number_of_regions, self.region_size = self._dry_run(image_size)

    def _dry_run(self, image_size):
        """Read R and D off a photo's way through."""
        self.eval()
        try:
            with torch.inference_mode():
                grid = self.network(torch.zeros(1, 3, image_size, image_size))["grid"]
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"{self.name} does not take images of {image_size} pixels: {first_line(error)}") from None
        if grid.ndim != 4 or grid.shape[2] != grid.shape[3]:
            raise InputError(f"--encoder_layer {self.layer}: not a grid of features, its shape is {tuple(grid.shape)}")
        self.train()
        return (self.grid_size or grid.shape[2]) ** 2, grid.shape[1]

    def train(self, mode=True):
        """Keep the BatchNorm statistics of pretrained weights, which small batches would spoil, and of frozen ones."""
        super().train(mode)
        if self.pretrained or not any(parameter.requires_grad for parameter in self.parameters()):
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, images):
        """images (B, 3, h, w) uint8 -> regions (B, R, D), row by row."""
        images = (images.float() / 255 - self.mean) / self.std
        grid = self.network(images.contiguous(memory_format=torch.channels_last))["grid"]  # (B, D, rows, columns)
        if self.grid_size:
            grid = functional.adaptive_avg_pool2d(grid, self.grid_size)
        return grid.flatten(2).transpose(1, 2)  # (B, R, D)


def imagenet_weights(name):
    """torchvision's first ImageNet weights of a network, those behind the field's published numbers."""
    known = torchvision.models.get_model_weights(name)
    return known["IMAGENET1K_V1"] if "IMAGENET1K_V1" in known.__members__ else known.DEFAULT


def build_network(name, weights):
    """A torchvision network, with its ImageNet weights where "imagenet" is asked for."""
    # These two expect their own normalisation of colours and make it themselves when told to.
    options = {"transform_input": True, "init_weights": not weights} if name in ("inception_v3", "googlenet") else {}
    if weights != "imagenet":
        return torchvision.models.get_model(name, weights=None, **options)
    try:
        return torchvision.models.get_model(name, weights=imagenet_weights(name), **options)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise InputError(
            f"the ImageNet weights of {name} cannot be downloaded ({first_line(error)}): fetch "
            f"{imagenet_weights(name).url} where there is a network and give the file as --encoder_weights FILE"
        ) from None


def load_encoder_weights(network, path):
    """Load a torchvision state dict; what lies behind the layer that is taken may be missing."""
    state = load_state(path)
    if not isinstance(state, dict):
        raise InputError(f"--encoder_weights {path}: not a state dict of weights")
    # The files of DenseNet spell some names as torchvision did before 0.3.
    state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name): state[name] for name in state}
    own = network.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing or wrong:
        example = f"{missing[0]} is missing" if missing else f"{wrong[0]} has another shape"
        raise InputError(f"--encoder_weights {path}: not the weights of this network, {example}")
    network.load_state_dict({name: state[name] for name in own if name in state}, strict=False)


def start_linear(layer):
    """Start a linear layer as Glorot and Bengio (2010) do."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


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
        energy = (keys.unsqueeze(1) + self.query(hidden).unsqueeze(2)).tanh_()  # (B, C, R, A), the largest tensor
        scores = self.score(energy).squeeze(-1)  # (B, C, R)
        weights = scores.float().softmax(dim=-1)  # (B, C, R)
        return weights.to(regions.dtype) @ regions, weights  # (B, C, D), (B, C, R)


class Decoder(nn.Module):
    """An LSTM that looks at the regions before each word ("Show, Attend and Tell", sections 3.1.2 and 4.2).

    `keys` and `first_state` run once an image, `step` once a word; teacher forcing and every search use these three.
    """

    def __init__(self, vocabulary_size, region_size, embedding_size, attention_size, hidden_size, dropout):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size, padding_idx=PAD)
        self.attention = SoftAttention(region_size, hidden_size, attention_size)
        self.beta = nn.Linear(hidden_size, 1)
        self.first_hidden = nn.Linear(region_size, hidden_size)
        self.first_memory = nn.Linear(region_size, hidden_size)
        self.cell = LSTMCell(embedding_size, region_size, hidden_size)
        self.hidden_output = nn.Linear(hidden_size, embedding_size)
        self.context_output = nn.Linear(region_size, embedding_size, bias=False)
        self.output = nn.Linear(embedding_size, vocabulary_size)
        self.dropout = nn.Dropout(dropout)
        # torch's own start would draw the words ten times larger, and drown the regions in them for epochs; it would
        # also leave the attention so close to uniform that it stays so for long.
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.embedding.weight.data[PAD] = 0
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                start_linear(layer)
        self.cell.start()

    def keys(self, regions):
        """The part of the attention that no word changes: regions (B, R, D) -> keys (B, R, A)."""
        return self.attention.keys(regions)

    def first_state(self, regions):
        """The state before the first word, from the mean region: (B, R, D) -> two tensors (B, 1, H)."""
        mean = regions.mean(dim=1, keepdim=True)  # (B, 1, D)
        return self.first_hidden(mean).tanh(), self.first_memory(mean).tanh()

    def step(self, words, regions, keys, state):
        """Predict the next word of C captions an image.

        words (B, C), regions (B, R, D), keys (B, R, A), state tuple of (B, C, H)
        -> logits (B, C, V), weights (B, C, R), state.
        """
        embedded = self.dropout(self.embedding(words))  # (B, C, E)
        context, weights, state = self._look_and_update(self.cell.words(embedded), regions, keys, state)
        return self._logits(embedded, state[0], context), weights, state

    def _look_and_update(self, words, regions, keys, state):
        """The recurrent half of a step: attend (equations 4 to 6 and 13), then the LSTM (equations 1 to 3)."""
        context, weights = self.attention(regions, keys, state[0])  # (B, C, D), (B, C, R)
        context = self.beta(state[0]).sigmoid() * context  # section 4.2.1: how much to look, how much to just go on
        return context, weights, self.cell(words, context, state)  # (B, C, D), (B, C, R), state (B, C, H)

    def _logits(self, embedded, hidden, context):
        """The deep output layer (equation 7); the authors' code has the tanh and the dropout."""
        output = embedded + self.hidden_output(hidden) + self.context_output(context)  # (..., E)
        return self.output(self.dropout(output.tanh()))  # (..., V)

    @torch.no_grad()
    def _draw(self, *arguments):
        """Draw words as probable as `_logits` of these arguments makes them, of those that can follow."""
        logits = self._logits(*arguments).float()
        logits[..., [PAD, START]] = -math.inf
        return logits.softmax(dim=-1).multinomial(1).squeeze(-1)

    def forward(self, regions, words, lengths, sampling=0.0):
        """Teacher forcing: each word from the true words before it.

        Args:
            regions: (B, R, D).
            words: (B, C, T + 1), <start> ... <end> and padding, sorted as `datasets.Batch` has them.
            lengths: (B, C) on the CPU, the number of words to predict.
            sampling: share of the words before that the model draws itself (scheduled sampling, Bengio et al., 2015).

        Returns logits (N, V) and targets (N,) of the N real words, step by step, and weights (T, B, C, R), which are
        zero after a caption's end. Finished captions and padding are never computed.
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
        cell_words = self.cell.words(embedded).split(sizes)  # T of (b c, 4 H)
        embedded = list(embedded.split(sizes))  # T of (b c, E)
        hiddens, contexts, weights = [], [], []
        with self.attention.query.over_time(), self.cell.context.over_time(), self.cell.hidden.over_time():
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
                context, step_weights, state = self._look_and_update(word.view(b, c, -1), regions, keys, state)
                hiddens.append(state[0].flatten(0, 1))  # (b c, H)
                contexts.append(context.flatten(0, 1))  # (b c, D)
                weights.append(functional.pad(step_weights, (0, 0, 0, C - c, 0, B - b)))  # (B, C, R)
        # Drop the few that had ended, then predict all words in one product.
        rows = torch.cat([real[t, :b, :c].flatten() for t, (b, c) in enumerate(corners)]).nonzero().squeeze(1)
        rows, real = rows.to(words.device), real.to(words.device)
        logits = self._logits(torch.cat(embedded)[rows], torch.cat(hiddens)[rows], torch.cat(contexts)[rows])  # (N, V)
        targets = words[:, :, 1 : len(real) + 1].permute(2, 0, 1)[real]  # (N,)
        return logits, targets, torch.stack(weights) * real.unsqueeze(-1)


class Captioner(nn.Module):
    """An encoder and a decoder with a dense layer on the regions between them.

    `image_size` is the side in pixels of the photos that it was trained on.
    """

    def __init__(self, encoder, region_layer, decoder, image_size):
        super().__init__()
        self.encoder, self.region_layer, self.decoder, self.image_size = encoder, region_layer, decoder, image_size

    def regions(self, images):
        """images (B, 3, h, w) uint8, or features (B, R, D) from the cache -> regions for the decoder (B, R, D)."""
        return self.region_layer(images.float() if images.ndim == 3 else self.encoder(images))

    def forward(self, images, words, lengths, sampling=0.0):
        """Teacher forcing, as `Decoder.forward`."""
        return self.decoder(self.regions(images), words, lengths, sampling)


def build_captioner(settings, vocabulary_size, image_size, encoder_weights):
    """A new captioner of the settings named in MODEL_SETTINGS, a dictionary."""
    encoder = Encoder(
        settings["encoder"], settings["encoder_layer"], encoder_weights, settings["grid_size"], image_size
    )
    dropout = settings["dropout"]
    region_size, region_layer = encoder.region_size, nn.Identity()
    if settings["region_dim"]:
        region_size = settings["region_dim"]
        region_layer = nn.Sequential(nn.Linear(encoder.region_size, region_size), nn.ReLU(), nn.Dropout(dropout))
        start_linear(region_layer[0])
    sizes = (settings["embedding_size"], settings["attention_size"], settings["hidden_size"])
    return Captioner(encoder, region_layer, Decoder(vocabulary_size, region_size, *sizes, dropout), image_size)


def load_captioner(path, device):
    """Read what a checkpoint holds for inference: captioner in eval mode, vocabulary, settings of its training."""
    checkpoint = load_checkpoint(path, device)
    captioner, vocabulary = restore_captioner(checkpoint, path)
    return captioner.to(device).eval(), vocabulary, checkpoint["settings"]


def restore_captioner(checkpoint, path):
    """Build a checkpoint's captioner and vocabulary; InputError where it is at odds with itself."""
    vocabulary = Vocabulary(checkpoint["words"])
    rows = len(checkpoint["model"]["decoder.embedding.weight"])
    if rows != len(vocabulary):
        raise InputError(f"{path} names {len(vocabulary)} words but its model has {rows}: it is not one run's file")
    settings = checkpoint["settings"]
    captioner = build_captioner(settings, rows, checkpoint["image_size"], encoder_weights="")
    captioner.encoder.pretrained = bool(settings["encoder_weights"])
    try:
        captioner.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise InputError(f"{path}: its weights do not fit its settings: {first_line(error)}") from None
    return captioner, vocabulary


def load_checkpoint(path, device="cpu"):
    """Read a checkpoint of train.py as the dictionary that it is; InputError for any other file."""
    checkpoint = load_state(path, device)
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= CHECKPOINT_KEYS:
        raise InputError(f"{path} is not a checkpoint of train.py")
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise InputError(
            f"{path} has checkpoint format {checkpoint['format']}, this code reads {CHECKPOINT_FORMAT}: train it anew"
        )
    return checkpoint


# ----------------------------------------------------------------------------------------------------- search


@torch.inference_mode()
def beam_search(decoder, regions, beam_size=5, max_length=30, length_penalty=0.5):
    """Search the most probable captions of all images at once.

    Args:
        decoder: anything with `keys`, `first_state` and `step`.
        regions: (B, R, D).
        beam_size: captions kept an image at each word, K; 1 is greedy decoding.
        max_length: words at most, <end> included.
        length_penalty: captions are ranked by log-probability / length ** length_penalty; 0 ranks by probability,
            which favours short captions (Wu et al., 2016, section 7).

    Returns words (B, K, T), best caption first, <end> repeated after its end, and log-probabilities (B, K), -inf
    where there are fewer than K captions.

    A finished caption stays in its beam and can only go on with <end> at no cost, so nothing is set aside and an
    image none of whose captions ends within max_length still has one.
    """
    B, K = len(regions), beam_size
    keys = decoder.keys(regions)
    state = tuple(part.expand(-1, K, -1) for part in decoder.first_state(regions))  # (B, K, H)
    words = torch.full((B, K), START, device=regions.device)
    totals = torch.full((B, K), -math.inf, device=regions.device)
    totals[:, 0] = 0  # all beams start alike: count only one
    lengths = torch.zeros_like(words)
    finished = torch.zeros_like(words, dtype=torch.bool)
    captions = torch.empty((B, K, 0), dtype=torch.long, device=regions.device)
    for t in range(max_length):
        logits, _, state = decoder.step(words, regions, keys, state)  # (B, K, V)
        step = logits.float().log_softmax(dim=-1)
        step[..., [PAD, START, UNKNOWN] if t else [PAD, START, UNKNOWN, END]] = -math.inf  # and no empty caption
        step.masked_fill_(finished.unsqueeze(-1), -math.inf)
        step[..., END].masked_fill_(finished, 0)
        lengths = lengths + ~finished
        best = step.topk(min(K, step.shape[-1]))  # (B, K, W): no more than K captions can come from one beam
        candidates = totals.unsqueeze(-1) + best.values  # (B, K, W)
        ranks = candidates / lengths.unsqueeze(-1) ** length_penalty
        chosen = ranks.flatten(1).topk(K).indices  # (B, K)
        parents, words = chosen // ranks.shape[-1], best.indices.flatten(1).gather(1, chosen)
        totals = candidates.flatten(1).gather(1, chosen)
        lengths = lengths.gather(1, parents)
        captions = torch.cat([captions.gather(1, parents.unsqueeze(-1).expand_as(captions)), words.unsqueeze(-1)], -1)
        state = tuple(part.gather(1, parents.unsqueeze(-1).expand_as(part)) for part in state)
        finished = words == END
        if finished.all():
            break
    return captions, totals


@torch.inference_mode()
def attend(decoder, regions, captions):
    """Where a decoder looks at each word of given captions, and how probable it finds them.

    Args:
        regions: (B, R, D).
        captions: (B, T) word numbers as `beam_search` returns them, without <start>.

    Returns log-probabilities (B,) and weights (B, T, R), zero after a caption's <end>.
    """
    keys, state = decoder.keys(regions), decoder.first_state(regions)
    words = torch.full((len(captions), 1), START, device=captions.device)
    totals = torch.zeros(len(captions), device=regions.device)
    unfinished = torch.ones_like(totals)
    weights = []
    for following in captions.split(1, dim=1):  # (B, 1)
        logits, look, state = decoder.step(words, regions, keys, state)
        log_probabilities = logits.squeeze(1).float().log_softmax(dim=-1).gather(1, following).squeeze(1)  # (B,)
        totals += unfinished * log_probabilities
        weights.append(unfinished.unsqueeze(1) * look.squeeze(1))  # (B, R)
        unfinished = unfinished * (following.squeeze(1) != END)
        words = following
    return totals, torch.stack(weights, dim=1)
