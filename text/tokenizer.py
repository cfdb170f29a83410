"""The tokenizer: a caption as people write it becomes a list of words."""

import re
import unicodedata

JOINERS = "\u200c\u200d"  # of letters in one word (Persian, Hindi)


def tokenize(caption):
    """A caption to its words: lower case, without punctuation and symbols, composed Unicode (NFC).

    An apostrophe joins what it stands between ("don't": dont), all else separates ("t-shirt": t shirt), as in
    Karpathy's files. Letters of all scripts, their marks and numbers are kept.
    """
    caption = unicodedata.normalize("NFC", re.sub("['\u2019\u00ad\ufe0f]", "", caption.lower()))
    kept = (c if c.isalnum() or c in JOINERS or unicodedata.category(c)[0] == "M" else " " for c in caption)
    return [word for word in "".join(kept).split() if any(map(str.isalnum, word))]
