"""Split raw captions into words."""

import re
import unicodedata

# Scripts without spaces: Thai, kana, Chinese characters. Marks that stay with the character before them: Thai vowels
# and tones above and below a consonant, the voicing of kana, variation selectors.
UNSPACED = (
    r"[\u0e01-\u0e5b\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f"
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
UNSPACED_MARKS = r"[\u0e31\u0e33-\u0e3a\u0e47-\u0e4e\u3099\u309a\uff9e\uff9f\ufe00-\ufe0f\U000e0100-\U000e01ef]*"
JOINERS = "\u200c\u200d"  # zero-width characters between letters of one word (Persian, Hindi)


def tokenize(caption: str) -> list[str]:
    """Split a caption into words: lower case, without punctuation and symbols, composed Unicode (NFC).

    An apostrophe joins its neighbors ("don't": dont); everything else separates ("t-shirt": t shirt), as in Karpathy's
    files. Letters of all scripts, their marks and digits are kept. Chinese, Japanese and Thai are written without
    spaces: each character becomes a word; a Thai character keeps the vowels and tones above and below it.
    """
    caption = unicodedata.normalize("NFC", re.sub("['\u2019\u00ad\ufe0f]", "", caption.lower()))
    kept = (c if c.isalnum() or c in JOINERS or unicodedata.category(c)[0] == "M" else " " for c in caption)
    kept = re.sub(UNSPACED + UNSPACED_MARKS, r" \g<0> ", "".join(kept))
    return [word for word in kept.split() if any(map(str.isalnum, word))]
