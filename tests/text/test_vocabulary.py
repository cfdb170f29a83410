"""The vocabulary: which words it keeps, word ids in both directions, and pretrained word vectors."""

from collections import Counter

import pytest
import torch

import train
from text.vocabulary import END, PAD, SPECIAL_TOKENS, START, UNK, Vocabulary, read_pretrained_embeddings
from utils import InputError

COUNTS = Counter({"a": 9, "dog": 4, "cat": 4, "runs": 2, "<pad>": 7})
VOCABULARY = Vocabulary.from_counts(COUNTS, 1)


@pytest.mark.parametrize(
    ("min_word_freq", "vocab_size", "words"),
    [(1, 0, "a cat dog runs"), (4, 0, "a cat dog"), (1, 2, "a cat"), (5, 3, "a"), (1, 9, "a cat dog runs")],
)
def test_the_most_frequent_words_are_kept(min_word_freq, vocab_size, words):
    vocabulary = Vocabulary.from_counts(COUNTS, min_word_freq, vocab_size)
    assert vocabulary.idx2word == SPECIAL_TOKENS + words.split()


def test_unknown_words_and_special_tokens_have_the_id_of_unk():
    words = ("a", "dog", "fish", "<end>", "<pad>", "<start>", "<unk>")
    assert [VOCABULARY.word_id(word) for word in words] == [4, 6, UNK, UNK, UNK, UNK, UNK]


def test_decode_stops_at_end_and_skips_start_and_padding():
    assert VOCABULARY.decode([START, 4, UNK, PAD, 6, END, 5]) == ["a", "<unk>", "dog"]
    assert VOCABULARY.decode([4, 5]) == ["a", "cat"]


def test_words_must_start_with_the_special_tokens():
    with pytest.raises(InputError, match="a word map starts with <pad> <start> <end> <unk>, not with a dog"):
        Vocabulary(["a", "dog"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("[", "not valid JSON"),
        ("[1]", "not a word map"),
        ('{"a": [], "b": 1}', "not a word map"),
    ],
)
def test_a_word_map_that_cannot_be_read_says_what_to_do(tmp_path, content, message):
    if content:
        (tmp_path / "word_map.json").write_text(content)
    with pytest.raises(InputError, match=rf"{message}.*: run create_input_files\.py again with --overwrite"):
        Vocabulary.load(tmp_path)


# The first vector of a word that is valid counts.
GLOVE = "a 1 nan 3\na 1 2 3\na 4 5 6\n. . 0 0 0\ndog 0.5 -1 2e-1\ncat 1 2\nruns 1 x 3\nfish 7 7 7\n\nruns 1 nan 3\n"


@pytest.mark.parametrize("header", ["", "400000 3\n"])
def test_vectors_are_read_and_malformed_lines_counted(tmp_path, capsys, header):
    (tmp_path / "vectors.txt").write_text(header + GLOVE)
    word_ids, vectors = read_pretrained_embeddings(tmp_path / "vectors.txt", VOCABULARY, 3)
    assert VOCABULARY.decode(word_ids) == ["a", "dog"]
    expected = torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 0.2]])
    torch.testing.assert_close(vectors / vectors[0, 0], expected)
    assert vectors.square().mean().item() == pytest.approx(1)
    assert "vectors for 2 of 4 words (50.0%), 5 malformed lines" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("a 1 2\ndog 3 4\n", "its vectors have size 2, so give --embed_dim 2"),
        ("fish 1 2 3\n", "holds none of the 4 words"),
        ("", "not a text file of a word and its vector per line"),
        ("a\t1\t2\t3\n", "not a text file of a word and its vector per line"),
        ("<unk> 1 2 3\n", "holds none of the 4 words"),
        ("a 0 0 0\n", "all zero, or too large"),
        ("a 1e39 0 0\n", "all zero, or too large"),
        ("a 1 2 3".encode("utf-16"), "holds none"),
    ],
)
def test_unusable_vectors_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "vectors.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=rf"--pretrained_embeddings .*vectors\.txt: .*{message}"):
        read_pretrained_embeddings(tmp_path / "vectors.txt", VOCABULARY, 3)


@pytest.mark.parametrize("freeze", [True, False])
def test_a_model_starts_from_pretrained_embeddings(command, shapes, tmp_path, freeze):
    lines = [f"{word} {' '.join(str(len(word) * k) for k in range(16))}" for word in ("red", "blue")]
    (tmp_path / "vectors.txt").write_text("\n".join(lines))
    small = ["--encoder", "resnet18", "--encoder_layer", "layer1", "--encoder_weights", "", "--epochs", 1]
    sizes = ["--embed_dim", 16, "--hidden_dim", 16, "--attention_dim", 16, "--region_dim", 16]
    folders = ["--data_folder", shapes, "--run_folder", tmp_path / "run"]
    embeddings = ["--pretrained_embeddings", tmp_path / "vectors.txt", f"--{'' if freeze else 'no-'}freeze_embeddings"]
    status, out, error = command(train, *small, *sizes, *folders, *embeddings, "--ema_decay", 0)
    assert status == 0 and "vectors for 2 of" in out, error
    checkpoint = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    red, blue = (checkpoint["model"]["decoder.embedding.weight"][checkpoint["words"].index(w)] for w in ("red", "blue"))
    assert torch.allclose(red / red[1], torch.arange(16.0), atol=1e-5) == freeze
    if freeze:
        torch.testing.assert_close(blue, red * 4 / 3)
