"""eval.py without a model: on a results file, on two of them, and on the scores of several runs."""

import json
import random
import shutil
import statistics

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

import eval as eval_script
from preparation.storage import read_captions, write_captions
from scores.metrics import compute_metrics, image_scores
from scores.tokenization import ptb_tokenize
from text.tokenizer import tokenize

SCORES = ("bleu_4", "rouge_l", "cider")


@pytest.fixture
def entries(shapes):
    """The images of the training split with their captions."""
    return json.loads((shapes / "train_captions.json").read_text())


@pytest.fixture
def results(entries, tmp_path):
    """Two results files of the training split: captions with one word changed, and captions of other images."""
    files = []
    captions = [entry["captions"][0]["raw"] for entry in entries]
    near = [f"There is {caption.capitalize()}." for caption in captions]
    for name, changed in (("near", near), ("far", captions[1:] + captions[:1])):
        items = [{"image_id": entry["image_id"], "caption": text} for entry, text in zip(entries, changed, strict=True)]
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(items))
    return files


@pytest.fixture
def score(command, shapes, no_meteor):
    """Run eval.py on the training split: arguments -> exit status, stdout, stderr."""
    return lambda *arguments: command(eval_script, "--data_folder", shapes, "--split", "train", *arguments)


def test_results_are_scored_without_a_model(score, shapes, entries, results):
    near = results[0]
    before = near.read_bytes()
    status, out, err = score("--results", near)
    assert status == 0, err
    scores = json.loads(near.with_name("scores_near_shapes_train.json").read_text())
    assert scores["checkpoint"] == [] and scores["results"] == str(near) and scores["tokenizer"] == "plain"
    assert (scores["split"], scores["comparison"]) == ("train", None) and len(scores["digest"]) == 64
    captions = [item["caption"] for item in json.loads(before)]
    words, references = [tokenize(caption) for caption in captions], read_captions(shapes, "train").captions.decode()
    (row,) = scores["scores"]
    expected = compute_metrics(references, words)
    assert row["meteor"] is None
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    for name in SCORES:
        low, high = row["intervals"][name]
        assert low <= row[name] <= high and f"{row[name]:.4f} ± {(high - low) / 2:.4f}" in out
    assert row["diversity"].keys() == {"distinct_1", "distinct_2", "vocabulary", "mean_length", "in_training"}
    assert f"| {row['diversity']['vocabulary']} | {row['diversity']['mean_length']:.2f} | 0.0000 |" in out

    per_image = json.loads(near.with_name("scores_per_image_near_shapes_train.json").read_text())
    of_images = image_scores(references, words)
    for i, item in enumerate(per_image):
        assert item.keys() == {"image_id", "image", "caption", *SCORES} and item["caption"] == captions[i]
        assert (item["image_id"], item["image"]) == (entries[i]["image_id"], entries[i]["image"])
        assert [item[name] for name in SCORES] == pytest.approx([of_images[name][i] for name in SCORES])
    assert near.read_bytes() == before
    assert len(list(near.parent.glob("*.json"))) == 4  # the two results files and the two of the scores


def test_two_results_files_are_compared(score, results):
    near, far = results
    status, out, err = score("--results", near, "--compare", far)
    assert status == 0, err
    scores = json.loads(near.with_name("scores_near_shapes_train.json").read_text())
    score("--results", far)
    other = json.loads(far.with_name("scores_far_shapes_train.json").read_text())
    assert scores["comparison"]["file"] == str(far)
    for name, title in zip(SCORES, ("BLEU-4", "ROUGE-L", "CIDEr"), strict=True):
        test = scores["comparison"]["tests"][name]
        assert test["difference"] == pytest.approx(scores["scores"][0][name] - other["scores"][0][name])
        line = f"{title}: {test['difference']:.4f} ± {test['standard_error']:.4f}, p = {test['p']:.3f}"
        assert line in out.splitlines()


def test_a_checkpoint_is_compared_with_its_own_captions(score, run_folder, results, tmp_path):
    arguments = ("--checkpoint", run_folder / "best.pt", "--beam_sizes", 1, 2, "--output_folder", tmp_path / "out")
    assert score(*arguments)[0] == 0
    own = tmp_path / "own.json"
    own.write_bytes((tmp_path / "out" / "results_best_shapes_train.json").read_bytes())
    assert score(*arguments, "--compare", own)[0] == 0
    scores = json.loads((tmp_path / "out" / "scores_best_shapes_train.json").read_text())
    for test in scores["comparison"]["tests"].values():
        assert test == {"difference": 0, "standard_error": 0, "p": 1}
    assert all("intervals" in row and "diversity" in row for row in scores["scores"])
    assert score("--results", own)[0] == 0  # the same captions have the same scores
    (row,) = json.loads((tmp_path / "scores_own_shapes_train.json").read_text())["scores"]
    assert row.items() <= scores["scores"][1].items()
    per_image = json.loads((tmp_path / "out" / "scores_per_image_best_shapes_train.json").read_text())
    assert [item["caption"] for item in per_image] == [item["caption"] for item in json.loads(own.read_text())]


def test_only_the_photos_of_a_list_are_scored(score, shapes, entries, results, tmp_path):
    near, far = results
    kept = [entry["image"] for entry in entries[1::2]]
    photos = tmp_path / "every_second.txt"
    photos.write_text("\n".join(reversed(kept)) + "\n\n")
    status, _, err = score("--results", near, "--photos", photos, "--compare", far)
    assert status == 0, err
    scores = json.loads((tmp_path / "scores_near_every_second_shapes_train.json").read_text())
    assert scores["photos"] == str(photos)
    other = tmp_path / "other" / photos.name
    other.parent.mkdir()
    other.write_bytes(b"\xef\xbb\xbf" + photos.read_bytes())  # as some editors write it
    status, _, err = score("--results", near, "--photos", other)
    assert status == 2 and f"has the scores of the photos of {photos}: choose another --output_folder" in err
    assert score("--results", near, "--photos", other, "--output_folder", other.parent)[0] == 0
    words = [tokenize(item["caption"]) for item in json.loads(near.read_text())][1::2]
    references = read_captions(shapes, "train").captions.decode()[1::2]
    expected = compute_metrics(references, words)
    assert {name: scores["scores"][0][name] for name in expected} == pytest.approx(expected, rel=1e-9)
    per_image = json.loads((tmp_path / "scores_per_image_near_every_second_shapes_train.json").read_text())
    assert [item["image"] for item in per_image] == kept
    others = [tokenize(item["caption"]) for item in json.loads(far.read_text())][1::2]
    difference = expected["cider"] - compute_metrics(references, others)["cider"]
    assert scores["comparison"]["tests"]["cider"]["difference"] == pytest.approx(difference)


def test_a_list_of_photos_is_checked(score, run_folder, results, tmp_path):
    near, photos = results[0], tmp_path / "photos.txt"

    def refused(*arguments):
        status, _, err = score(*arguments)
        assert status == 2 and err.count("\n") == 1 and "Traceback" not in err
        return err

    assert f"--photos {photos}: no such file" in refused("--results", near, "--photos", photos)
    photos.write_text("\n")
    assert "names no photo" in refused("--results", near, "--photos", photos)
    photos.write_text("nowhere.png\n")
    assert "nowhere.png is not in the train split" in refused("--results", near, "--photos", photos)
    assert "requires --results" in refused("--checkpoint", run_folder / "best.pt", "--photos", photos)
    assert "cannot be combined with --report" in refused("--results", near, "--photos", photos, "--report")
    assert not list(tmp_path.glob("scores*"))


def punctuated_sentence(generator):
    """Return a random sentence with punctuation, hyphens, contractions and accents."""
    parts = ["A man", "the T-shirt", "isn't", "two dogs' ball", "on", "grass,", "(red)", "with a", "cat", "été"]
    return " ".join(generator.choices(parts, k=generator.randint(4, 8))) + generator.choice([".", "", " !"])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("java"), reason="needs Java")
def test_ptb_scores_are_those_of_cocos_pipeline(command, shapes, entries, tmp_path, monkeypatch):
    monkeypatch.setattr("scores.caption_scores.compute_meteor", lambda *_: (0.0, [0.0] * 24))  # slow
    generator = random.Random(0)
    for entry in entries:
        for each in entry["captions"]:
            each["raw"] = punctuated_sentence(generator)
    predictions = {entry["image_id"]: punctuated_sentence(generator) for entry in entries}
    folder = shutil.copytree(shapes, tmp_path / "synthetic")
    write_captions(folder / "train_captions.json", entries)
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{"image_id": i, "caption": text} for i, text in predictions.items()]))
    arguments = ("--data_folder", folder, "--split", "train", "--results", path, "--tokenizer", "ptb")
    status, _, err = command(eval_script, *arguments)
    assert status == 0, err
    scores = json.loads((tmp_path / "scores_results_ptb_synthetic_train.json").read_text())
    (row,) = scores["scores"]

    tokenizer = PTBTokenizer()
    captions = {entry["image_id"]: [each["raw"] for each in entry["captions"]] for entry in entries}
    references = tokenizer.tokenize({i: [{"caption": text} for text in texts] for i, texts in captions.items()})
    predicted = tokenizer.tokenize({i: [{"caption": text}] for i, text in predictions.items()})
    bleu, _ = Bleu(4).compute_score(references, predicted, verbose=0)
    expected = {f"bleu_{n}": score for n, score in enumerate(bleu, start=1)}
    expected["rouge_l"] = Rouge().compute_score(references, predicted)[0]
    expected["cider"] = Cider().compute_score(references, predicted)[0]
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=5e-5)
    assert scores["tokenizer"] == "ptb" and 0.01 < row["bleu_4"] < 0.9


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("java"), reason="needs Java")
def test_ptb_scores_of_a_checkpoint(command, shapes, entries, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("scores.caption_scores.compute_meteor", lambda *_: (0.5, [0.5] * 24))  # slow
    arguments = ("--checkpoint", run_folder / "best.pt", "--data_folder", shapes, "--split", "train")
    status, _, err = command(eval_script, *arguments, "--output_folder", tmp_path, "--tokenizer", "ptb")
    assert status == 0, err
    rows = json.loads((tmp_path / "scores_best_ptb_shapes_train.json").read_text())["scores"]
    captions = json.loads((tmp_path / "results_best_ptb_shapes_train.json").read_text())
    references = [ptb_tokenize([caption["raw"] for caption in entry["captions"]]) for entry in entries[:1]]
    words = ptb_tokenize([item["caption"] for item in captions])
    assert len(rows) == 3 and all(row["meteor"] == 0.5 for row in rows)
    per_image = json.loads((tmp_path / "scores_per_image_best_ptb_shapes_train.json").read_text())
    assert per_image[0]["rouge_l"] == pytest.approx(image_scores(references, words[:1])["rouge_l"][0])
    assert per_image[0]["meteor"] == 0.5


def write_scores(folder, cider, **changes):
    """Write a run folder with a file of scores of two rows; return the folder."""
    rows = [{"beam_size": size, "meteor": None, "cider": cider + size, "intervals": {}} for size in (1, 3)]
    folder.mkdir()
    scores = {"checkpoint": [], "digest": "d", "decoding": {"max_length": 30}, "scores": rows} | changes
    (folder / "scores_best_shapes_train.json").write_text(json.dumps(scores))
    return folder


@pytest.fixture
def digest(shapes):
    """The digest of the prepared shapes."""
    return json.loads((shapes / "dataset.json").read_text())["digest"]


def test_runs_have_a_mean_and_a_deviation(score, digest, tmp_path):
    values = [0.25, 0.5, 0.875]
    runs = [write_scores(tmp_path / str(i), cider, digest=digest) for i, cider in enumerate(values)]
    status, out, err = score("--runs", *runs)
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    assert status == 0, err
    assert out.splitlines() == [
        "| runs | beam | CIDEr |",
        "| ---: | ---: | ---: |",
        f"| 3 | 1 | {mean + 1:.4f} ± {deviation:.4f} |",
        f"| 3 | 3 | {mean + 3:.4f} ± {deviation:.4f} |",
    ]


def test_runs_of_real_checkpoints(score, shapes, run_folder, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(run_folder, tmp_path / name)
        assert score("--checkpoint", tmp_path / name / "best.pt", "--beam_sizes", 1)[0] == 0
    status, out, err = score("--runs", tmp_path / "a", tmp_path / "b")
    assert status == 0, err
    (row,) = json.loads((tmp_path / "a" / "scores_best_shapes_train.json").read_text())["scores"]
    assert f"{row['bleu_1']:.4f} ± 0.0000" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, "no such file: {folder}/b/scores_best_shapes_train.json: score this run first"),
        ({"digest": "another"}, "b/scores_best_shapes_train.json has the scores of other data"),
        ({"decoding": {"max_length": 3}}, "has other rows or decoding settings than {folder}/a"),
        ({"scores": [{"beam_size": 1, "cider": 1.0}]}, "has other rows or decoding settings than {folder}/a"),
        ({"scores": "none"}, "b/scores_best_shapes_train.json was not written by eval.py"),
        ({"dtype": "float32"}, "b/scores_best_shapes_train.json has other rows or decoding settings"),
    ],
)
def test_runs_that_do_not_match_are_named(score, digest, tmp_path, changes, message):
    first = write_scores(tmp_path / "a", 0.5, digest=digest)
    if changes is not None:
        write_scores(tmp_path / "b", 0.5, **{"digest": digest} | changes)
    status, out, err = score("--runs", first, tmp_path / "b")
    assert status == 2 and out == "" and err.count("\n") == 1 and message.format(folder=tmp_path) in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--results", "{far}", "--checkpoint", "best.pt"), "--checkpoint best.pt cannot be combined with --results"),
        (("--results", "{far}", "--beam_sizes", 1), "--beam_sizes 1 cannot be combined with --results"),
        (("--results", "missing.json"), "no such file: missing.json"),
        (("--results", __file__), "is not valid JSON"),
        (("--results", "{far}", "--split", "val"), "has images that the val split of {shapes} does not have: "),
        (("--results", "{far}", "--compare", "missing.json"), "no such file: missing.json"),
        (("--results", "{far}", "--tokenizer", "ptb"), "--tokenizer ptb needs Java"),
        (("--results", "{far}", "--spice"), "--spice needs Java"),
        (("--results", "{far}", "--compare", "best.pt"), "--compare best.pt: --results loads no model: give that"),
        (("--runs", "a", "b", "--results", "{far}"), "--results {far} cannot be combined with --runs"),
        (("--runs", "a"), "--runs a: give two run folders or more"),
        (("--runs", "a", "./a"), "--runs a ./a: give two run folders or more, each once"),
        (("--report_photos", 5), "--report_photos 5 requires --report"),
    ],
)
def test_bad_input_is_one_line(score, shapes, results, arguments, message):
    files = {"far": results[1], "shapes": shapes}
    status, out, err = score(*(str(argument).format(**files) for argument in arguments))
    assert status == 2 and out == "" and err.count("\n") == 1 and message.format(**files) in err
    assert len(list(results[0].parent.glob("*.json"))) == 2  # nothing was written


def test_a_checkpoint_of_the_same_name_keeps_its_scores(score, run_folder, results, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    assert score("--checkpoint", run / "best.pt", "--beam_sizes", 1)[0] == 0
    path = run / "scores_best_shapes_train.json"
    before = path.read_bytes()
    shutil.copy(results[0], run / "best.json")
    status, _, err = score("--results", run / "best.json")
    assert status == 2 and f"{path} has the scores of {run / 'best.pt'}" in err and path.read_bytes() == before
