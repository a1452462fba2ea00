"""Accuracy, AUC and disparities of groups, against scikit-learn and by hand; how often intervals hold; and the command."""

import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from runs import finish, train_command
from sklearn.metrics import accuracy_score, roc_auc_score
from test_bad_input import refused

from data.bad_records import BadRecord
from data.dataset import Origin
from launch import disparity
from launch.cli import main
from launch.fairness import (
    Scored,
    check_comparable,
    image_names,
    label_names,
    less,
    measures_of,
    replaced,
    tables,
    unmeasured,
)
from launch.fairness_page import fairness_page, plots
from trainer.evaluate import read_config

CHANCE = np.random.default_rng(0)


def one_of(labels, classes, signal=1.5):
    """Probabilities of a fair classifier, with ties: float64 [N, L]."""
    logits = CHANCE.normal(size=(len(labels), classes)) + signal * np.eye(classes)[labels]
    return disparity.probabilities(logits, "softmax").round(2)


def many_of(labels):
    """float64 [N, L], with ties, for labels of 0, 1 and NaN."""
    return disparity.probabilities((CHANCE.normal(size=labels.shape) + np.nan_to_num(labels)).round(1), "sigmoid")


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_the_loss():
    logits = np.float32([[0, np.log(3)], [-1000, 1000]])
    np.testing.assert_allclose(disparity.probabilities(logits, "softmax"), [[0.25, 0.75], [0, 1]], atol=1e-7)
    np.testing.assert_allclose(disparity.probabilities(logits, "sigmoid"), [[0.5, 0.75], [0, 1]], atol=1e-7)


@pytest.mark.parametrize("sample", [0, 1, 7])
def test_metrics_of_classes_are_scikit_learns(sample):
    """Of all examples, and of resamples with their repetitions."""
    labels = CHANCE.integers(0, 4, 120)
    scores, counts = one_of(labels, 4), disparity.example_counts(120, 7)
    found = disparity.measured("all", scores, labels, counts, np.arange(120)).metrics
    rows = np.repeat(np.arange(120), counts[sample])
    truth, p = labels[rows], scores[rows] / scores[rows].sum(axis=1, keepdims=True)
    hot = np.eye(4)[truth]
    assert found["accuracy"][sample] == pytest.approx(accuracy_score(truth, p.argmax(axis=1)))
    assert found["macro AUC"][sample] == pytest.approx(roc_auc_score(hot, scores[rows], average="macro"))
    assert found["micro AUC"][sample] == pytest.approx(roc_auc_score(hot, scores[rows], average="micro"))
    for label, group in enumerate(disparity.by_label(scores, labels, counts, list("abcd"))):
        assert group.metrics["AUC"][sample] == pytest.approx(roc_auc_score(truth == label, scores[rows][:, label]))
        assert group.metrics["accuracy"][sample] == pytest.approx((p.argmax(axis=1) == label)[truth == label].mean())


@pytest.mark.parametrize("sample", [0, 3])
def test_metrics_of_many_labels_leave_out_what_is_not_known(sample):
    labels = (CHANCE.random((150, 3)) < 0.4).astype(np.float32)
    labels[CHANCE.random((150, 3)) < 0.2] = np.nan
    scores, counts = many_of(labels), disparity.example_counts(150, 3)
    found = disparity.measured("all", scores, labels, counts, np.arange(150)).metrics
    rows = np.repeat(np.arange(150), counts[sample])
    truth, p = labels[rows], scores[rows]
    known = ~np.isnan(truth)
    each = [roc_auc_score(truth[known[:, i], i], p[known[:, i], i]) for i in range(3)]
    assert found["accuracy"][sample] == pytest.approx(((p > 0.5) == truth)[known].mean())
    assert found["macro AUC"][sample] == pytest.approx(np.mean(each))
    assert found["micro AUC"][sample] == pytest.approx(roc_auc_score(truth[known], p[known]))
    groups = disparity.by_label(scores, labels, counts, list("abc"))
    np.testing.assert_allclose([group.metrics["AUC"][sample] for group in groups], each)
    assert [group.count for group in groups] == (~np.isnan(labels)).sum(axis=0).tolist()


def test_ties_count_half():
    once = np.ones((1, 4), np.uint16)
    assert disparity.auc(np.array([0.5, 0.5, 0.5, 0.5]), np.array([1, 0, 1, 0]), once) == 0.5
    assert disparity.auc(np.array([0.9, 0.5, 0.5, 0.1]), np.array([1, 1, 0, 0]), once) == 0.875
    assert np.isnan(disparity.auc(np.array([0.9, 0.5, 0.5, 0.1]), np.zeros(4), once))


def test_chunks_change_nothing(monkeypatch):
    labels = CHANCE.integers(0, 3, 60)
    scores, counts = one_of(labels, 3), disparity.example_counts(60, 20)
    whole = disparity.measured("all", scores, labels, counts, np.arange(60)).metrics
    monkeypatch.setattr(disparity, "CHUNK", 500)
    for name, values in disparity.measured("all", scores, labels, counts, np.arange(60)).metrics.items():
        np.testing.assert_array_equal(values, whole[name])


def test_small_groups_and_those_of_one_kind_are_said():
    labels = np.array([0, 0, 1, 1, 1, 2])
    values = np.array(["b", "b", "a", "a", "", "c"])
    scores, counts = one_of(labels, 4), disparity.example_counts(6, 5)
    groups = {group.name: group for group in disparity.by_value(scores, labels, counts, values)}
    assert list(groups) == ["a", "b", "c"]
    assert groups["c"].count == 1
    assert np.isnan(groups["c"].metrics["accuracy"]).all()
    assert groups["a"].one_kind == (0, 1, 2, 3)
    assert np.isnan(groups["a"].metrics["macro AUC"]).all()
    assert not np.isnan(groups["a"].metrics["accuracy"][0])
    one = Scored("run", None, 1, scores, labels, [], list("wxyz"), {}, [])
    said = unmeasured(measures_of(one, {"age": values, "sex": np.full(6, "")}, counts), list("wxyz"))
    assert said == [
        "class: groups of fewer than 2 images, which are not measured: 2 (y (1), z (0))",
        "age: groups of fewer than 2 images, which are not measured: 1 (c (1))",
        "age a: left out of its macro AUC, since all images are of one kind: 4 (w, x, y and 1 more)",
        "age b: left out of its macro AUC, since all images are of one kind: 4 (w, x, y and 1 more)",
        "sex: no held-out image has a value",
    ]


def test_values_are_in_the_order_of_their_numbers():
    ages = ["100 and more", "not known", "18-80", "9-18"]
    assert sorted(ages, key=disparity.in_order) == ["9-18", "18-80", "100 and more", "not known"]


# --- disparities and intervals ----------------------------------------------------------------------------------------


def test_disparities_are_those_of_the_paper():
    """8 of 10 are right: all 4 of a, 3 of b's 4, 1 of c's 2; d has no example that counts."""
    overall = {"accuracy": np.array([0.8, 0.5]), "macro AUC": np.array([0.9, 1.0])}
    rows = {"a": [1.0, 1.0], "b": [0.75, 0.5], "c": [0.5, np.nan], "d": [np.nan, np.nan]}
    groups = [disparity.Group(n, 4, {"accuracy": np.array(v), "AUC": np.array(v)}) for n, v in rows.items()]
    found = disparity.disparities(overall, groups, "accuracy")
    np.testing.assert_allclose(found["worst gap"][0], [-0.3, 0.0])
    np.testing.assert_allclose(found["largest relative error"][0], [2.5, 1.0])
    assert {lowest for _, lowest in found.values()} == {"c"}
    held_against_macro = disparity.disparities(overall, groups, "AUC")
    np.testing.assert_allclose(held_against_macro["worst gap"][0], [-0.4, -0.5])
    np.testing.assert_allclose(
        held_against_macro["largest relative error"][0], [5.0, np.nan]
    )  # nothing is wrong overall
    assert np.isnan(disparity.disparities(overall, groups[3:], "accuracy")["worst gap"][0]).all()


def test_intervals_hold_the_truth():
    """Of 300 examples that are right with probability 0.8."""
    counts, held = disparity.example_counts(300, 500), 0
    for _ in range(200):
        low, high = disparity.interval(disparity.accuracy(CHANCE.binomial(1, 0.8, 300).astype(float), counts))
        held += low <= 0.8 <= high
    assert 0.90 <= held / 200 <= 0.98


def test_differences_are_paired():
    """Two runs that err on the same examples: their difference is surer than each of them, and than two samples' would be."""
    counts = disparity.example_counts(400, 1000)
    a = CHANCE.binomial(1, 0.7, 400).astype(float)
    b = np.where(CHANCE.random(400) < 0.05, 0.0, a)
    first, second = disparity.accuracy(a, counts), disparity.accuracy(b, counts)
    low, high = disparity.interval(second - first)
    assert low < b.mean() - a.mean() < high < 0
    apart = second - np.concatenate([first[:1], CHANCE.permutation(first[1:])])
    wide = np.subtract(*disparity.interval(apart)[::-1])
    assert high - low < 0.5 * wide
    assert high - low == pytest.approx(2 * 1.96 * np.std(b - a) / 20, rel=0.15)


def test_an_interval_needs_half_of_the_resamples():
    nan = np.nan
    assert disparity.interval(np.array([0.5, 0.1, 0.2, nan, nan])) == pytest.approx((0.1025, 0.1975))
    assert np.isnan(disparity.interval(np.array([0.5, 0.1, nan, nan, nan]))).all()


def test_large_problems_get_fewer_resamples():
    assert [disparity.resamples_for(n) for n in (1, 22_000 * 14, 50_000 * 1000)] == [1000, 1000, 200]


# --- images and runs --------------------------------------------------------------------------------------------------


def test_images_are_named_by_their_file_or_their_number():
    assert image_names([Origin("a/1.png", 0), Origin("b/1.png", 0)]) == ["a/1.png", "b/1.png"]
    assert image_names([Origin("digits", 0), Origin("digits", 7)]) == ["0", "7"]
    assert image_names([Origin("one", 0), Origin("two", 3)]) == ["one/0", "two/3"]


def test_images_for_which_others_stand_are_found():
    origins = [Origin("a/1.png", 0), Origin("a/2.png", 0), Origin("a/11.png", 0)]
    bad = [BadRecord("a/2.png", 0, "not an image"), BadRecord("/data/a/1.png", 0, "unreadable")]
    assert replaced(origins, bad).tolist() == [True, True, False]
    assert not replaced(origins, [BadRecord("a/2.png", 5, "damaged")]).any()


def test_classes_have_the_names_of_their_folders():
    files = [Origin("cat/1.png", 0), Origin("dog/1.png", 0), Origin("dog/2.png", 0)]
    assert label_names(files, np.array([0, 1, 1]), 3) == ["cat", "dog", "2"]
    assert label_names(files, np.array([0, 1, 0]), 2) == ["0", "1"]
    assert label_names([Origin("digits", 3)], np.array([0]), 2) == ["0", "1"]


def test_runs_on_other_images_or_classes_are_not_compared():
    def run(name, images, labels, classes=3):
        return Scored(name, None, 1, np.zeros((len(images), classes)), np.array(labels), images, [], {}, [])

    first = run("a", ["1", "2"], [0, 1])
    check_comparable(first, run("b", ["1", "2"], [0, 1]))
    for other, words in (
        (run("b", ["1", "3", "4"], [0, 1, 2]), "it has 3 held-out images, a 2, and 1 are of both"),
        (run("b", ["1", "2"], [0, 1], 5), "it tells 5 classes apart, a 3"),
        (run("b", ["1", "2"], [0, 2]), "the same held-out images have other labels"),
    ):
        with pytest.raises(Exception, match=f"b cannot be compared with a: {words}"):
            check_comparable(first, other)


def test_a_page_of_many_labels():
    labels = (CHANCE.random((80, 3)) < 0.4).astype(np.float32)
    counts, sex = disparity.example_counts(80, 50), np.array(["F", "M"] * 40)
    runs = [
        measures_of(Scored(name, None, 1, many_of(labels), labels, [], list("abc"), {}, []), {"sex": sex}, counts)
        for name in ("one", "two <b>")
    ]
    assert {(by, metric) for by, metric, _ in runs[0].disparities} == {
        (by, metric) for by, auc in (("label", "AUC"), ("sex", "macro AUC")) for metric in ("accuracy", auc)
    }
    change = less(runs[1], runs[0])
    key = ("sex", "macro AUC", "worst gap")
    expected = runs[1].disparities[key][0] - runs[0].disparities[key][0]
    np.testing.assert_array_equal(change.disparities[key][0], expected)
    about = {"images": 80, "labels": list("abc"), "many_labels": True, "resamples": 50, "notes": ["sex: none"]}
    about |= {"steps": {"one": 1, "two <b>": 2}, "settings": {"two <b>": []}}
    text = fairness_page(about, tables(runs, [change]), plots(runs))
    assert "<b>" not in text
    assert text.count("<svg") == 2
    assert_stands_alone(text)


def assert_stands_alone(text):
    """Nothing is fetched, nothing runs: the only addresses are names of XML's."""
    assert "<script" not in text
    assert "<link" not in text
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\"' <]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/1999/xhtml",
    }
    assert not re.findall(r"(?:src|href)=[\"'](?!#)", text)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    """Two runs that differ in their length, one of them with an average."""
    place = tmp_path_factory.mktemp("trained")
    for name, options in (("long", ["12", "--optimizer.ema", "0.5"]), ("short", ["4"])):
        command = train_command("nfnet-tiny", place / name, "--eval.every", "0", "--trainer.steps", *options)
        code, _, err = finish(command)
        assert code == 0, err
    return place


def recomputed(run):
    """Places and labels of the held-out digits, and a run's probabilities of each: [N], [N], float [N, L]."""
    from data import open_data
    from launch.studies.study import trained as opened

    data = open_data(read_config(run).data)
    batch = data.held_out.read(np.arange(len(data.held_out)))
    images = np.pad(batch["images"], [(0, -len(batch["images"]) % 8), *[(0, 0)] * 3])
    with opened(run) as (config, model, place):
        program = jax.jit(lambda model, images: model(images, dtype=config.trainer.compute_dtype, dropout_key=None))
        logits = np.asarray(program(model, place({"images": images})["images"]), np.float64)[: len(batch["labels"])]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return data.held_out.numbers, batch["labels"], p / p.sum(axis=1, keepdims=True)


@pytest.mark.multiprocess
def test_two_runs_are_compared(trained, tmp_path, capsys):
    numbers, labels, scores = recomputed(trained / "long")
    _, _, other = recomputed(trained / "short")
    sexes = np.array(["F", "M", ""])[np.arange(len(numbers)) % 3]
    rows = [f"{number},{sex}" for number, sex in zip(numbers, sexes, strict=True)][:-2]
    (tmp_path / "groups.csv").write_text("\n".join(["image,sex", *rows, "999999,F"]) + "\n")
    sexes[-2:] = ""
    command = ["fairness", str(trained / "long"), str(trained / "short"), "--groups", str(tmp_path / "groups.csv")]
    assert main([*command, "--to", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "short - long" in told
    assert "groups.csv does not name: 2 (" in told
    assert "groups.csv that name no held-out image: 1 (999999)" in told

    found = json.loads((tmp_path / "out" / "fairness.json").read_text())
    assert found["images"] == len(labels)
    assert found["steps"] == {"long": 12, "short": 4}
    assert any(line.startswith("trainer.steps: 12 → 4") for line in found["settings"]["short"])
    for run, p in zip(found["runs"], (scores, other), strict=True):
        right, whole = p.argmax(axis=1) == labels, run["overall"]
        assert whole["accuracy"]["value"] == pytest.approx(right.mean())
        assert whole["macro AUC"]["value"] == pytest.approx(roc_auc_score(labels, p, multi_class="ovr"), abs=1e-4)
        assert whole["micro AUC"]["value"] == pytest.approx(
            roc_auc_score(np.eye(10)[labels].ravel(), p.ravel()), abs=1e-4
        )
        by_class = [right[labels == label].mean() for label in range(10)]
        assert [group["accuracy"]["value"] for group in run["by"]["class"]] == pytest.approx(by_class)
        by_sex = {sex: right[sexes == sex].mean() for sex in ("F", "M")}
        assert {group["group"]: group["accuracy"]["value"] for group in run["by"]["sex"]} == pytest.approx(by_sex)
        gaps = {(one["by"], one["measure"]): one["value"] for one in run["disparities"]}
        assert gaps["class", "worst gap"] == pytest.approx(min(by_class) - right.mean())
        assert gaps["sex", "worst gap"] == pytest.approx(min(by_sex.values()) - right.mean())
        error = (1 - min(by_sex.values())) / (1 - right.mean())
        assert gaps["sex", "largest relative error"] == pytest.approx(error)
    [change] = found["differences"]
    assert (change["run"], change["less"]) == ("short", "long")
    a, b = (run["overall"]["macro AUC"]["value"] for run in found["runs"])
    assert change["overall"]["macro AUC"]["value"] == pytest.approx(b - a)
    low, high = change["overall"]["macro AUC"]["interval"]
    assert low < b - a < high

    assert_stands_alone((tmp_path / "out" / "fairness.html").read_text())
    files = {file.name for file in (tmp_path / "out").iterdir()}
    drawn = {f"fairness-{name}.{kind}" for name in ("groups", "disparities") for kind in ("svg", "png")}
    assert files == {"fairness.json", "fairness.html", *drawn}


@pytest.mark.multiprocess
def test_mistakes_are_one_sentence(trained, tmp_path, capsys):
    run, file = str(trained / "long"), tmp_path / "groups.csv"
    assert refused(capsys, ["fairness", run, run], 2) == f"run {run} is given twice: give each run once"
    said = refused(capsys, ["fairness", run, "--groups", "nowhere.csv"], 2)
    assert said == "--groups nowhere.csv cannot be read: No such file or directory"
    for text, words in (
        ("", "has 0 columns in its header: give the image's name first"),
        ("image\n3\n", "has 1 column in its header: give the image's name first"),
        ("image,sex,sex\n3,F,F\n", "has columns without a name of their own ('sex'): name each once"),
        ("image,class\n3,F\n", "has a column 'class', by which images are told apart anyway: rename it"),
        ("image,sex\n3,F,9\n", "row 2 of --groups"),
        ("image,sex\n3,F\n3,M\n", "names image 3 again: give each image one row"),
        ("image,sex\ndigits/3,F\n", "held-out images: it has 'digits/3', "),
    ):
        file.write_text(text)
        assert words in refused(capsys, ["fairness", run, "--groups", str(file)], 2)
    file.write_bytes(b"image,sex\n3,\xff\n")
    assert "is not a CSV file in UTF-8" in refused(capsys, ["fairness", run, "--groups", str(file)], 2)
    assert refused(capsys, ["fairness", run, "--to", str(file)], 2) == f"--to {file} is a file: give a folder"
    assert "is not a podwright run" in refused(capsys, ["fairness", str(tmp_path)], 4)

    shutil.copytree(trained / "short", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["data"]["held_out"] = 0.5
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    said = refused(capsys, ["fairness", run, str(tmp_path / "other")], 2)
    assert said.startswith("other cannot be compared with long: it has ")
    assert said.endswith("give runs with the same data.held_out and held-out source")


def test_a_model_of_text_has_no_images(tmp_path, capsys):
    from configs.overrides import resolve
    from configs.store import to_json

    (tmp_path / "config.json").write_text(to_json(resolve("griffin-tiny").config))
    said = refused(capsys, ["fairness", str(tmp_path)], 2)
    assert said == f"{tmp_path} is a model of text: only image runs have classes of images"
