"""The Penn Treebank's words are those of pycocoevalcap."""

import json
import shutil

import pytest
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from scores.tokenization import ptb_references, ptb_tokenize
from utils import InputError

SENTENCES = ["A man, in a T-shirt (red) .", "", "It's the dog's ball; isn't it?", "...", "Deux \u00e9t\u00e9s 3/4 & 5"]


@pytest.mark.skipif(not shutil.which("java"), reason="needs Java")
def test_words_are_those_of_pycocoevalcap():
    expected = PTBTokenizer().tokenize({i: [{"caption": sentence}] for i, sentence in enumerate(SENTENCES)})
    words = ptb_tokenize(SENTENCES)
    assert [" ".join(each) for each in words] == [expected[i][0] for i in range(len(SENTENCES))]
    assert words[0][:3] == ["a", "man", "in"] and words[1] == words[3] == []


@pytest.mark.skipif(not shutil.which("java"), reason="needs Java")
def test_words_depend_neither_on_line_breaks_nor_on_the_locale(monkeypatch):
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=tr -Duser.country=TR -Dfile.encoding=US-ASCII")
    assert ptb_tokenize(["A\nDOG\r\nIS\u2028IN", "\u00c9T\u00c9"]) == [["a", "dog", "is", "in"], ["\u00e9t\u00e9"]]


def test_references_are_of_the_original_sentences(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr("scores.tokenization.ptb_tokenize", lambda sentences: [[text] for text in sentences])
    entries = json.loads((shapes / "val_captions.json").read_text())
    expected = [[[caption["raw"]] for caption in entry["captions"]] for entry in entries]
    assert ptb_references(shapes, "val") == expected
    (tmp_path / "val_captions.json").write_text('[{"captions": [{"words": ["a"]}]}]')
    with pytest.raises(InputError, match="lacks original sentences"):
        ptb_references(tmp_path, "val")
