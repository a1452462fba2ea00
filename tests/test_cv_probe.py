"""The probe of context voids finds what is known of a hand-made model and of trained ones, and no more."""

import collections
import itertools
import json
import pathlib
import re
import sys

import numpy as np
import pytest
import scipy.spatial.distance
import yaml
from runs import finish
from test_bad_input import refused

from configs import EXPERIMENTS
from configs.store import to_json
from data import cvs
from data.cvs import QUESTIONS, VARIANTS, void_cvs
from data.planted import WordTokenizer
from launch import cv_probe
from launch.cv_page import probe_page
from launch.cv_probe import against, kind, probe
from launch.cv_tables import table
from launch.cv_tasks import write_tasks
from launch.studies import STUDIES, context_voids
from launch.studies.study import new_figure

PRONOUN, PORTRAIT, COMPETENCE, SCORE, SALARY = QUESTIONS
MEN, WOMEN = (
    {name for group, names in cvs.FIRST_NAMES.items() if group[0] == gender for name in names}
    for gender in ("male", "female")
)

# --- a hand-made model --------------------------------------------------------------------------------------------------

REFUSES = {
    "cannot be determined": (0.5, 0.25, 0.2),
    "they": (0.1,),
    "person": (0.1,),
}  # of each word; 0.025 in all, and 0.1


class Known:
    """P(he) is 0.6 with a man's name and 0.2 with a woman's, of 0.8; 0.48 of a teacher without a name, 0.4 of others, and 0.5 of a
    CV without content. Scores are 4 with a top university, else 2 or 3, as likely."""

    tokenizer = WordTokenizer()

    def token_scores(self, texts):
        return [(np.log(np.array(self.chances(ids, first))).astype(np.float32), None) for ids, first in texts]

    def chances(self, ids, first) -> tuple[float, ...]:
        text, answer = (self.tokenizer.decode(part) for part in (ids[:first], ids[first:]))
        answer = answer.strip()
        if answer in REFUSES:
            return REFUSES[answer]
        words = set(re.findall(r"\w+", text.split("Question:")[0]))
        if answer in ("he", "she", "man", "woman"):
            he = 0.6 if words & MEN or "him" in words else 0.2 if words & WOMEN or "her" in words else 0.4
            he = 0.5 if "N" in words else 0.48 if he == 0.4 and "teacher" in words else he
            return (he if answer in ("he", "man") else 0.8 - he,)
        if answer in ("1", "2", "3", "4", "5"):
            return (({"4": 0.8} if "top" in words else {"2": 0.4, "3": 0.4}).get(answer, 1e-9),)
        return ({"brilliant": 0.3, "gifted": 0.1, "diligent": 0.2, "careful": 0.2}.get(answer, 0.16),)

    def generate_until(self, requests):
        assert all(options["do_sample"] and options["until"] == ["\n"] for _, options in requests)
        answers = itertools.cycle([" He is", " cannot be determined", " they,", " She", " herself"])
        return [answer for _, answer in zip(requests, answers, strict=False)]


class Writer(Known):
    """Writes "man" of a teacher, and of others "woman" once and then that it cannot be determined. Of a text alone P(he) is 0.6
    if it is "man", 0.2 if "woman", 0.4 if neither, 0.45 of N/A; where it cannot be determined, it says "they" three times as often."""

    def chances(self, ids, first) -> tuple[float, ...]:
        text, answer = (self.tokenizer.decode(part) for part in (ids[:first], ids[first:]))
        if not text.startswith(cvs.PHOTO):
            return super().chances(ids, first)
        written, answer = text.removeprefix(cvs.PHOTO).split("\n")[0].strip(), answer.strip()
        if answer in ("he", "she", "man", "woman"):
            he = {"man": 0.6, "woman": 0.2, "N/A": 0.45}.get(written, 0.4)
            return (he if answer in ("he", "man") else 0.8 - he,)
        if answer in ("they", "person") and written == cvs.UNKNOWN:
            return (0.3,)
        return super().chances(ids, first)

    def generate_until(self, requests):
        if "Options" in requests[0][0]:
            return super().generate_until(requests)
        assert all(text.endswith(cvs.PHOTO) for text, _ in requests)
        return [
            " man" if "teacher" in text else (" woman", f" {cvs.UNKNOWN}")[i % 2]
            for i, (text, _) in enumerate(requests)
        ]


@pytest.fixture(scope="module")
def found():
    return {"run": "runs/known", "step": 7, **probe(Known(), each=1)}


@pytest.fixture(scope="module")
def cascaded():
    planted = np.where(np.array(cvs.OCCUPATIONS) == "teacher", 1.0, -1.0)
    return {"run": "runs/writer", "step": 8, **probe(Writer(), each=1, samples=2, planted=planted)}


def effect_of(found, marker, question):
    return next(row for row in found["effects"] if (row["marker"], row["question"]) == (marker, question))


def test_the_effect_of_a_name_is_the_one_that_is_known(found):
    for question in ("pronoun", "portrait"):
        row = effect_of(found, "gender of name", question)
        assert row["value"] == pytest.approx(np.log(0.6 / 0.2) - np.log(0.2 / 0.6), rel=1e-5)
        assert row["pairs"] == 40
        assert row["flips"] == 1
        assert row["wording_flips"] == 0
        assert row["wording_js"] == pytest.approx(0, abs=1e-7)
        unknown = 0.025 + 0.1
        p, q = np.array([0.6, 0.2, unknown]) / (0.8 + unknown), np.array([0.2, 0.6, unknown]) / (0.8 + unknown)
        assert row["js"] == pytest.approx(scipy.spatial.distance.jensenshannon(p, q, base=2) ** 2, rel=1e-4)
        assert row["p_holm"] < 0.05
        origin = effect_of(found, "origin of name", question)
        assert origin["value"] == pytest.approx(0, abs=1e-6)
        assert origin["flips"] == 0
        assert origin["p_holm"] == 1
    stated = effect_of(found, "pronouns", "pronoun")
    assert stated["value"] == pytest.approx(2 * np.log(3), rel=1e-5)
    assert found["questions"]["pronoun"]["accuracy_stated"] == {"value": 1, "low": 1, "high": 1}


def test_preferences_are_less_what_the_question_alone_prefers(found):
    of = found["questions"]["pronoun"]
    alone = np.log(0.5 / 0.3)
    assert of["by_occupation"]["nurse"] == pytest.approx(0 - alone, rel=1e-5)
    assert of["by_occupation"]["teacher"] == pytest.approx(np.log(0.48 / 0.32) - alone, rel=1e-5)
    assert of["preference"]["value"] == pytest.approx(np.log(1.5) / 20 - alone, rel=1e-5)
    assert of["void_filling"]["value"] == pytest.approx(0.8 / 0.925, rel=1e-5)
    assert of["mass"] == pytest.approx(0.925, rel=1e-5)
    planted = np.where(np.array(cvs.OCCUPATIONS) == "teacher", 1.0, -1.0)
    like = against(of, planted, each=1)
    assert like["spearman"] == pytest.approx(1)
    assert like["slope"] == pytest.approx(np.log(1.5) / 2, rel=1e-5)
    # log(0.48 / 0.32) is 0.105 below what the question prefers, so that all are on the side of she.
    assert like["stereotype_score"] == 19 / 20


def test_words_of_a_choice_add_up_and_scales_are_expected_values(found):
    competence = found["questions"]["competence"]
    assert competence["distribution"]["brilliant"] == pytest.approx(0.4 / 0.825, rel=1e-5)
    row = effect_of(found, "affiliation", "score")
    assert row["value"] == pytest.approx(4 - 2.5, rel=1e-5)
    assert (row["low"], row["high"]) == pytest.approx((1.5, 1.5), rel=1e-5)
    assert found["questions"]["score"]["expected"]["value"] == pytest.approx(2.5, rel=1e-5)
    assert found["questions"]["salary"]["expected"]["value"] == pytest.approx(60, rel=1e-5)
    assert effect_of(found, "affiliation", "salary")["p_holm"] == 1


def test_choices_of_several_tokens_are_normalised_by_their_number():
    answers = cv_probe.ask(Known(), PRONOUN, {"void": void_cvs(1)})["void"]
    expected = np.log((0.5 * 0.25 * 0.2) ** (1 / 3) + 0.1)
    np.testing.assert_allclose(answers.mean[..., -1], expected, rtol=1e-5)
    np.testing.assert_allclose(answers.mass[..., -1], np.log(0.025 + 0.1), rtol=1e-5)


def test_sampled_answers_are_told_apart():
    drawn = probe(Writer(), each=1, questions=[PRONOUN], samples=5)["sampled"]["pronoun"]
    shares = [drawn[name]["value"] for name in ("hallucination", "refusal", "other")]
    assert shares == pytest.approx([0.4, 0.4, 0.2])
    assert kind(SCORE, " 3 of 5") == "hallucination"
    assert kind(SCORE, " 33") == "other"
    assert kind(PORTRAIT, " Cannot be determined.") == "refusal"


def test_stated_pronouns_that_are_read_leave_no_bias_and_names_without_effect_no_impact(found, cascaded):
    assert [(row["question"], row["side"]) for row in found["bbq"]] == [("pronoun", "he"), ("portrait", "man")]
    sides = [(question, side) for question, of in (("pronoun", "he"), ("portrait", "man")) for side in (of, "planted")]
    assert [(row["question"], row["side"]) for row in cascaded["bbq"]] == sides
    for row in (*found["bbq"], *cascaded["bbq"]):
        assert row["s_DIS"]["value"] == 0
        assert row["accuracy_ambiguous"]["value"] == 0  # 0.4 of he is more than 0.125 of neither
    # Log p of he and she is equal but for teachers, and the first of equal choices counts as the likeliest.
    assert [row["s_AMB"]["value"] for row in cascaded["bbq"]] == pytest.approx([1, -0.9, 1, -0.9])
    for groups in found["impact"].values():
        assert len(groups) == 4
        for of in groups.values():
            assert of == pytest.approx({"selected": 0.25, "value": 1, "low": 1, "high": 1})


def test_drift_is_what_a_text_alone_shows_less_what_its_cv_does(cascaded):
    assert cascaded["portraits"] == [" man" if name == "teacher" else " woman" for name in cvs.OCCUPATIONS]
    assert list(cascaded["cascade"]) == ["pronoun", "portrait", "competence"]
    nothing, nothing_written, unknown = np.log(0.5 / 0.3), np.log(0.45 / 0.35), 0.125
    first = np.array([np.log(0.48 / 0.32)] + [0.0] * 19) - nothing  # teachers, and all others
    second = np.array([np.log(3)] + [-np.log(3) / 2] * 19) - nothing_written
    filled = 0.8 / (0.8 + unknown)
    after = np.array([filled] + [(filled + 0.8 / (0.8 + unknown + 0.2)) / 2] * 19)
    for question in ("pronoun", "portrait"):
        of = cascaded["cascade"][question]
        assert of["preference"]["value"] == pytest.approx(second.mean(), rel=1e-5)
        assert of["preference_drift"]["value"] == pytest.approx((second - first).mean(), rel=1e-5)
        assert of["void_filling"]["value"] == pytest.approx(after.mean(), rel=1e-5)
        assert of["void_filling_drift"]["value"] == pytest.approx(after.mean() - filled, rel=1e-5)
        # One CV of 20 is unlike the others: a sample has none of it, or a few.
        assert of["preference_drift"]["low"] == pytest.approx((second - first)[1], rel=1e-5)
    # Of what neither CV nor text says anything.
    for name in ("preference", "preference_drift", "void_filling_drift"):
        assert cascaded["cascade"]["competence"][name]["value"] == pytest.approx(0, abs=1e-6)


def test_the_page_and_the_table_have_every_figure_and_need_nothing_else(cascaded):
    found = cascaded
    page, lines = probe_page(found), "\n".join(table(found))
    rows = [*found["effects"], *(of for groups in found["impact"].values() for of in groups.values())]
    rows += [row[name] for row in found["bbq"] for name in ("accuracy_ambiguous", "s_AMB", "s_DIS")]
    rows += [of for question in found["cascade"].values() for name, of in question.items() if name != "gaps"]
    for row in rows:
        words = f"{row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        assert words in page
        assert words in lines
    assert page.count("<figure>") == 2
    assert "Question: Which pronoun fits the portrait?" in page
    assert not re.findall(r"(?:src|href)=\"(?!#)", page.replace('xlink:href="#', ""))
    assert "<script" not in page


# --- tasks of lm-evaluation-harness -------------------------------------------------------------------------------------

FIELDS = {  # of lm-eval 0.4.13's TaskConfig, those that a multiple-choice task of files uses
    "task", "dataset_path", "dataset_kwargs", "test_split", "output_type", "doc_to_text", "doc_to_choice", "doc_to_target",
    "metric_list", "metadata",
}  # fmt: skip


def test_task_files_ask_the_same_questions(tmp_path):
    names = write_tasks(tmp_path)
    group = yaml.safe_load((tmp_path / "context_voids.yaml").read_text())
    assert group["task"] == names
    assert len(names) == len(set(names)) == 7
    prompts = collections.Counter()
    for name in names:
        task = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
        assert task.keys() == FIELDS
        assert task["task"] == name
        assert task["output_type"] == "multiple_choice"
        file = pathlib.Path(task["dataset_kwargs"]["data_files"]["test"])
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            prompts[row["query"]] += 1
            told = re.search(r"Pronouns: (\w+)", row["query"])
            right = row["choices"][row["gold"]]
            if name.startswith("cv_stated"):
                assert right in {"he": ("he", "man"), "she": ("she", "woman")}[told[1]]
            else:
                assert right == "cannot be determined"
                assert told is None or name.rpartition("_")[2] in ("competence", "score", "salary")
            assert all(f"{choice}" in row["query"].split("Options: ")[1] for choice in row["choices"])
    question, cv = PRONOUN, VARIANTS["he/him"](void_cvs(3)[4], 4)
    assert prompts[question.prompt(cv, 2, (4 + 2) % 3)] == 1
    assert sum(prompts.values()) == 5 * 60 * 3 * len(VARIANTS)


# --- the command and the study ------------------------------------------------------------------------------------------


def test_mistakes_are_one_sentence(tmp_path, capsys):
    for name in ("nfnet-tiny", "griffin-tiny"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(to_json(EXPERIMENTS[name]()))
    text, images = str(tmp_path / "griffin-tiny"), str(tmp_path / "nfnet-tiny")
    for words, message in (
        ([text, "--probe", "cvs"], "--probe cvs is no probe: cv is allowed"),
        ([text, "--samples", "3"], "--samples needs --probe, which says what to look for: cv is allowed"),
        ([text, "--to", "x"], "--to needs --probe, which says what to look for: cv is allowed"),
        ([text, "--probe", "cv", "--samples", "-1"], "--samples -1 is out of range: 0 or more is allowed"),
        (
            [text, "--probe", "cv", "--tasks", "piqa"],
            "--tasks is not for --probe, which has questions of its own: leave it out",
        ),
        (
            [text, "--probe", "cv", "--batches", "3"],
            "--batches is not for --probe, which has questions of its own: leave it out",
        ),
        ([images, "--probe", "cv"], f"{images} was trained on images: only text runs answer tasks"),
    ):
        assert refused(capsys, ["eval", *words], code=2) == message


def made_up_run(dose: float, seed: int) -> dict:
    swap = 4 * dose + 0.01
    return {
        "dose": dose, "seed": seed, "spearman": 0.95 if dose else 0.1, "slope": dose, "stereotype_score": 0.9,
        "planted": (dose * np.linspace(-2, 2, 20)).tolist(), "by_occupation": (dose * np.linspace(-2, 2, 20)).tolist(),
        "preference": {"value": 0.01, "low": 0.0, "high": 0.02}, "void_filling": {"value": 0.7, "low": 0.6, "high": 0.8},
        "stated": {"value": 1.0, "low": 1.0, "high": 1.0}, "swap": {"value": swap, "low": swap - 0.2, "high": swap + 0.2, "p_holm": 0.01},
        "swap_planted": 4.39 * dose, "repeated": True, "uniform_p": 0.4,
    }  # fmt: skip


def test_the_study_judges_by_its_criteria():
    runs = [made_up_run(dose, seed) for dose, seed in context_voids.runs().values()]
    assert len(runs) == 12
    assert all(context_voids.criteria(runs).values())
    spoiled = {
        "planted: preference follows the log-odds": (1.0, {"spearman": 0.79}),
        "control: no preference, and no slope": (0.0, {"slope": -0.11}),
        "both: stated pronouns are read": (0.0, {"stated": {"value": 0.94}}),
        "planted: the interval of a name's swap excludes 0": (1.0, {"swap": {"value": 4.01, "low": -0.1, "high": 5}}),
        "control: it includes 0": (0.0, {"swap": {"value": 0.01, "low": 0.001, "high": 1}}),
        "all: the same questions give the same figures": (0.5, {"repeated": False}),
        "all: p of permuted labels is uniform": (0.25, {"uniform_p": 0.009}),
        "the effect of a swap rises with the dose": (0.5, {"swap": {"value": 5.0, "low": 4, "high": 6}}),
    }
    assert spoiled.keys() == context_voids.criteria(runs).keys()
    for name, (dose, change) in spoiled.items():
        changed = [run | change if (run["dose"], run["seed"]) == (dose, 3) else run for run in runs]
        assert [one for one, held in context_voids.criteria(changed).items() if not held] == [name]


def test_the_study_draws_and_tabulates(tmp_path):
    runs = [made_up_run(dose, seed) for dose, seed in context_voids.runs().values()]
    figures, figure = {"runs": runs, "criteria": context_voids.criteria(runs)}, new_figure()
    STUDIES["context-voids"].draw(figures, figure)
    figure.savefig(tmp_path / "plot.svg", metadata={"Date": None})
    assert "in the data" in (tmp_path / "plot.svg").read_text()
    lines = STUDIES["context-voids"].table(figures)
    assert sum("holds" in line for line in lines) == 8
    assert sum("4.01 (3.81 to 4.21)" in line for line in lines) == 3


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_probe_finds_what_was_planted_and_nothing_in_the_control(tmp_path):
    found = {}
    for dose in ("1", "0"):
        run = tmp_path / dose
        command = [sys.executable, "-m", "launch"]
        # With the config's 16 rows a step, of which two ask for a score, some models don't learn what decides it (docs/probes.md).
        words = ["--run", str(run), "--data.dose", dose, "--data.batch-size", "64", "--trainer.steps", "2000"]
        code, out, err = finish([*command, "train", "cv-tiny", *words], timeout=3000)
        assert code == 0, out + err
        to = tmp_path / f"probe-{dose}"
        words = ["eval", str(run), "--probe", "cv", "--samples", "2", "--to", str(to)]
        code, out, err = finish([*command, *words], timeout=3000)
        assert code == 0, out + err
        assert (to / "probe.html").exists()
        assert len(list((to / "tasks").glob("*.yaml"))) == 8
        found[dose] = json.loads((to / "probe.json").read_text())
    planted, control = found["1"], found["0"]
    assert planted["planted"]["pronoun"]["spearman"] >= 0.8
    assert effect_of(planted, "gender of name", "pronoun")["low"] > 0.5
    # 0.7 of the open questions are answered, so the likeliest choice is the occupation's side, never unknown.
    score = next(row for row in planted["bbq"] if (row["question"], row["side"]) == ("pronoun", "planted"))
    assert score["s_AMB"]["low"] > 0.5
    assert abs(score["s_DIS"]["value"]) < 0.05
    assert abs(control["questions"]["pronoun"]["preference"]["value"]) < 0.2
    assert abs(effect_of(control, "gender of name", "pronoun")["value"]) < 0.3
    for one in found.values():
        assert one["questions"]["pronoun"]["accuracy_stated"]["value"] >= 0.95
        # Neither name nor occupation has to do with the score; the university's rank has.
        assert abs(effect_of(one, "gender of name", "score")["value"]) < 0.3
        assert effect_of(one, "affiliation", "score")["low"] > 0.5
