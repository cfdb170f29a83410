"""Tokenization by the rules of the Penn Treebank, which COCO's published scores use."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from pycocoevalcap.tokenizer import ptbtokenizer

from common.files import read_json
from utils import InputError


def ptb_tokenize(sentences: Sequence[str]) -> list[list[str]]:
    """Split sentences into words like pycocoevalcap's PTBTokenizer: lower case, without its list of punctuation.

    It runs the same Java program with the same list, but writes no file beside the program, and the result depends
    neither on the locale nor on line breaks in a sentence. Raises InputError if Java fails.
    """
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-Duser.language=en", "-Duser.country=US", "-cp", str(jar)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    text = "".join(" ".join(sentence.split()) + "\n" for sentence in sentences)
    try:
        output = subprocess.run(command, input=text.encode(), capture_output=True, check=True).stdout.decode()
        lines = zip(sentences, output.removesuffix("\n").split("\n"), strict=True)
        return [[word for word in line.split() if word not in ptbtokenizer.PUNCTUATIONS] for _, line in lines]
    except (OSError, subprocess.CalledProcessError, ValueError):
        raise InputError("the Java program of --tokenizer ptb failed: does `java -version` work?") from None


def ptb_references(data_folder: str | Path, split: str) -> list[list[list[str]]]:
    """Split the original sentences of a prepared split into words: for each image its captions, in order."""
    path = Path(data_folder) / f"{split}_captions.json"
    try:
        images = [[caption["raw"] for caption in entry["captions"]] for entry in read_json(path)]
    except (KeyError, TypeError):
        raise InputError(f"{path} lacks original sentences: run create_input_files.py again with --overwrite") from None
    words = iter(ptb_tokenize([sentence for sentences in images for sentence in sentences]))
    return [[next(words) for _ in sentences] for sentences in images]
