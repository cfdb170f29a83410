"""The tokenizer on several scripts."""

import unicodedata

import pytest

from text.tokenizer import tokenize


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("Two dogs, don't  run... 42!", "two dogs dont run 42"),
        ("A t-shirt (red) & #3_x", "a t shirt red 3 x"),
        ("Cafe\u0301 ÉLAN", "caf\u00e9 élan"),  # composed
        ("İstanbul", "i\u0307stanbul"),  # lower case first, then composed
        ("एक कुत्ता दौड़ता है।", "एक कुत्ता दौड़ता है"),  # vowel signs stay
        ("\u0645\u06cc\u200c\u062e\u0648\u0631", "\u0645\u06cc\u200c\u062e\u0648\u0631"),  # Persian, joined
        ("\u200c -- ...", ""),
        ("I \u2764\ufe0f Hunde\u00adh\u00fctten 5\ufe0f\u20e3", "i hundeh\u00fctten 5\u20e3"),  # emoji, a soft hyphen
        ("它在跑。2只Dog", "它 在 跑 2 只 dog"),
        ("犬がコーヒー・か\u3099", "犬 が コ ー ヒ ー が"),
        ("葛\U000e0100飾", "葛\U000e0100 飾"),  # a variant of the character
        ("สุนัขวิ่งใกล้น้ำ", "สุ นั ข วิ่ ง ใ ก ล้ น้ำ"),  # vowels and tones above and below stay with their consonant
        ("개가 달린다", "개가 달린다"),
    ],
)
def test_tokenize(caption, words):
    assert tokenize(caption) == unicodedata.normalize("NFC", words).split()
