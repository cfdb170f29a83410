"""The tokenizer: a caption as people write it becomes a list of words."""

import re
import unicodedata

JOINERS = "\u200c\u200d"  # zero-width characters between letters of one word (Persian, Hindi)


def tokenize(caption: str) -> list[str]:
    """Split a caption into words: lower case, without punctuation and symbols, composed Unicode (NFC).

    An apostrophe joins its neighbors ("don't": dont), everything else separates ("t-shirt": t shirt), as in Karpathy's
    files. Letters of all scripts, their marks and digits are kept.
    """
    caption = unicodedata.normalize("NFC", re.sub("['\u2019\u00ad\ufe0f]", "", caption.lower()))
    kept = (c if c.isalnum() or c in JOINERS or unicodedata.category(c)[0] == "M" else " " for c in caption)
    return [word for word in "".join(kept).split() if any(map(str.isalnum, word))]
