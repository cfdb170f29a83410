"""The vocabulary: which words it keeps, and word ids in both directions."""

from collections import Counter

import pytest

from text.vocabulary import END, PAD, SPECIAL_TOKENS, START, UNK, Vocabulary
from utils import InputError

COUNTS = Counter({"a": 9, "dog": 4, "cat": 4, "runs": 2, "<pad>": 7})
VOCABULARY = Vocabulary.from_counts(COUNTS, 1)


@pytest.mark.parametrize(
    ("min_word_freq", "vocab_size", "words"),
    [(1, 0, "a cat dog runs"), (3, 0, "a cat dog"), (1, 2, "a cat"), (5, 3, "a"), (1, 9, "a cat dog runs")],
)
def test_the_most_frequent_words_are_kept(min_word_freq, vocab_size, words):
    vocabulary = Vocabulary.from_counts(COUNTS, min_word_freq, vocab_size)
    assert vocabulary.idx2word == SPECIAL_TOKENS + words.split()


def test_a_word_counted_exactly_min_word_freq_times_is_kept():
    vocabulary = Vocabulary.from_counts(Counter({"b": 2, "a": 2, "c": 3, "rare": 1}), 2)
    assert vocabulary.idx2word == [*SPECIAL_TOKENS, "c", "a", "b"]


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
