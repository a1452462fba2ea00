"""Tables of two medical sets, CheXpert and MIMIC-CXR, from their releases."""

import re

import numpy as np
import pytest
from pictures import encoded, picture, write_table

from configs.chest_xrays import EVALUATED, OBSERVATIONS
from configs.overrides import resolve
from configs.schema import ImageData
from data import open_data
from data.bad_records import taken_from
from data.dataset import DataError
from data.medical import chexpert_labels, chexpert_rows, decade, mimic_labels, mimic_rows, part_of
from launch.cli import main


def released(marks, **rest):
    """A row of a release with these marks, of the others nothing."""
    return dict.fromkeys(OBSERVATIONS, "") | marks | rest


def test_what_chexpert_says_becomes_targets():
    marks = {
        "Atelectasis": "-1.0",
        "Edema": "-1.0",
        "Pleural Effusion": "1.0",
        "Cardiomegaly": "-1.0",
        "Consolidation": "0.0",
        "Fracture": "1.0",
        "Support Devices": "-1.0",
    }
    expected = dict.fromkeys(OBSERVATIONS, 0.0)
    expected |= {"Atelectasis": 0.8, "Edema": 0.8, "Pleural Effusion": 1.0, "Fracture": 1.0}
    assert chexpert_labels(released(marks), 0.2) == expected | {"Cardiomegaly": 0.2, "Support Devices": 0.2}
    assert chexpert_labels(released(marks), 0.0) == expected | {"Atelectasis": 1.0, "Edema": 1.0}
    assert mimic_labels(released(marks)) == dict.fromkeys(OBSERVATIONS, 0.0) | {
        "Pleural Effusion": 1.0,
        "Fracture": 1.0,
    }
    with pytest.raises(DataError, match=r"Edema is '2.0' in a row: 1, 0, -1 or nothing is allowed"):
        chexpert_labels(released({"Edema": "2.0"}), 0.2)


def test_the_rules_of_every_mark_on_every_observation():
    """arXiv 2308.10888's code: (positive, negative, uncertain in training, uncertain in evaluation, unmentioned)."""
    for name in OBSERVATIONS:
        positive = name in ("Atelectasis", "Edema", "Pleural Effusion")
        for said, trained, evaluated, of_mimic in (
            ("1.0", 1.0, 1.0, 1.0),
            ("0.0", 0.0, 0.0, 0.0),
            ("-1.0", 0.8 if positive else 0.2, float(positive), 0.0),
            ("", 0.0, 0.0, 0.0),
        ):
            row = released({name: said})
            found = chexpert_labels(row, 0.2)[name], chexpert_labels(row, 0.0)[name], mimic_labels(row)[name]
            assert found == (trained, evaluated, of_mimic)


def test_ages_are_told_by_decade():
    assert [decade(age) for age in ("0", "9", "10", "68", "90", "")] == [
        "0-9",
        "0-9",
        "10-19",
        "60-69",
        "90-99",
        "unknown",
    ]


def chexpert_release(patients):
    return [
        released(
            {"Edema": "-1.0"},
            Path=f"CheXpert-v1.0-small/train/patient{p:05}/study{s}/view1_frontal.jpg",
            Sex="Female" if p % 2 else "Male",
            Age=str(p % 91),
            **{"Frontal/Lateral": "Lateral" if s == 2 else "Frontal", "AP/PA": "" if s == 2 else "AP"},
        )
        for p in range(patients)
        for s in (1, 2)
    ]


def test_a_patient_of_chexpert_is_in_one_table():
    tables = chexpert_rows(chexpert_release(2000), "..")
    assert set(tables) == {"train", "valid", "test"}
    owners = {part: {row["unit"] for row in rows} for part, rows in tables.items()}
    assert not owners["train"] & owners["valid"] | owners["train"] & owners["test"] | owners["valid"] & owners["test"]
    assert sum(map(len, owners.values())) == 2000
    assert abs(len(owners["train"]) / 2000 - 0.8) < 0.03
    assert abs(len(owners["valid"]) / 2000 - 0.1) < 0.02
    first = tables["train"][1]
    assert first["path"] == f"../train/{first['unit']}/study2/view1_frontal.jpg"
    assert (first["group:view"], first["label:Edema"], tables["valid"][0]["label:Edema"]) == ("Lateral", "0.8", "1")
    assert tables["train"][0]["group:view"] == "AP"
    number = int(first["unit"].removeprefix("patient"))
    assert first["group:sex"] == ("Male", "Female")[number % 2]
    assert first["group:age"] == decade(str(number % 91))


def test_images_of_mimic_get_the_labels_of_their_study():
    labels = [released({"Edema": "1.0"}, subject_id="10000032", study_id="50414267")]
    metadata = [
        dict(dicom_id=name, subject_id="10000032", study_id=study, ViewPosition=view)
        for name, study, view in (("a-1", "50414267", "PA"), ("a-2", "50414267", ""), ("a-3", "59999999", "AP"))
    ]
    tables, left_out = mimic_rows(labels, metadata, [], "images")
    assert left_out == 1
    ((part, rows),) = tables.items()
    assert part == part_of("10000032")
    assert [row["path"] for row in rows] == [f"images/files/p10/p10000032/s50414267/a-{i}.jpg" for i in (1, 2)]
    assert [row["group:view"] for row in rows] == ["PA", "unknown"]
    assert rows[0]["unit"] == "10000032"
    assert [name for name in OBSERVATIONS if rows[0][f"label:{name}"] == "1"] == ["Edema"]
    people = [dict(subject_id="10000032", gender="F", anchor_age="52")]
    row = mimic_rows(labels, metadata, people, ".")[0][part][0]
    assert (row["group:sex"], row["group:age"]) == ("F", "50-59")


def test_a_release_becomes_tables_that_can_be_read(tmp_path, capsys):
    release = tmp_path / "CheXpert-v1.0-small"
    found = chexpert_release(60)
    for i, row in enumerate(found):
        file = tmp_path / row["Path"]
        file.parent.mkdir(parents=True)
        file.write_bytes(encoded(picture(i, 12, 10)[..., 0]))  # grey, as released
    write_table(release / "train.csv", found)
    to = release / "tables"
    assert main(["data", "table", "chexpert", str(release), "--to", str(to)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"train +\d+ images in ", said)
    config = resolve("nfnet-f3-chexpert", ["--data.batch_size", "8", "--data.image_size", "16"]).config.data
    fields = {name: getattr(config, name) for name in ("labels", "evaluated", "loss", "label_smoothing", "normalise")}
    made = ImageData(
        source=f"{to}/train.csv", held_out_source=f"{to}/valid.csv", channels=3, image_size=16, batch_size=8, **fields
    )
    data = open_data(made)
    assert len(data.describe()) == 1
    batch = data.held_out.read(np.arange(len(data.held_out)))
    assert taken_from(batch) == []
    assert (batch["labels"] == np.eye(14)[OBSERVATIONS.index("Edema")]).all()
    assert set(data.held_out.attributes) == {"sex", "age", "view"}
    assert main(["data", "table", "chexpert", str(release), "--to", str(to)]) == 3
    assert "is there already: give --to another folder" in capsys.readouterr().err
    assert main(["data", "table", "mimic", str(release), "--to", str(tmp_path / "other")]) == 3
    assert "has no mimic-cxr-2.0.0-chexpert.csv, nor mimic-cxr-2.0.0-chexpert.csv.gz" in capsys.readouterr().err


def test_the_sets_of_the_paper_have_their_classes_and_labels():
    places, chexpert, mimic = (resolve(f"nfnet-f3-{name}").config for name in ("places365", "chexpert", "mimic"))
    assert places.model.num_classes == 365
    assert chexpert.model.num_classes == mimic.model.num_classes == len(chexpert.data.labels) == len(OBSERVATIONS) == 14
    assert chexpert.data.evaluated == EVALUATED
    assert mimic.data.evaluated == ()
    assert {c.data.image_size for c in (places, chexpert, mimic)} == {224}
