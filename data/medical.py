"""Chest radiographs as they are released to tables of data/image_tables.py: labels, patients and subgroups as in arXiv 2308.10888
and its code. A patient's images are in one of three tables, train (80 %), valid and test, by hash of who it is."""

import csv
import gzip
import io
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from configs.chest_xrays import OBSERVATIONS
from data.dataset import DataError, is_held_out
from data.image_tables import GROUP, LABEL

Row = dict[str, str]
UNCERTAIN_IS_POSITIVE = ("Atelectasis", "Edema", "Pleural Effusion")  # of CheXpert; elsewhere uncertain is negative
SMOOTHING = 0.2  # of CheXpert's uncertain labels, and only in training
POSITIVE, NEGATIVE, UNCERTAIN, UNMENTIONED = "1", "0", "-1", ""


def chexpert_labels(row: Row, smoothing: float) -> dict[str, float]:
    """Targets of the 14 observations: uncertain ones are positive or negative, smoothed; what the report does not mention is
    negative."""
    found = {}
    for name in OBSERVATIONS:
        said = mark(row, name)
        if said == UNCERTAIN:
            found[name] = 1 - smoothing if name in UNCERTAIN_IS_POSITIVE else smoothing
        else:
            found[name] = float(said == POSITIVE)
    return found


def mimic_labels(row: Row) -> dict[str, float]:
    """Targets of the 14 observations: uncertain and unmentioned ones are negative."""
    return {name: float(mark(row, name) == POSITIVE) for name in OBSERVATIONS}


def mark(row: Row, name: str) -> str:
    """One of the four; released are `1.0`, `0.0`, `-1.0` and nothing. Raises DataError."""
    said = row[name].strip().removesuffix(".0")
    if said not in (POSITIVE, NEGATIVE, UNCERTAIN, UNMENTIONED):
        raise DataError(f"{name} is {row[name]!r} in a row: 1, 0, -1 or nothing is allowed")
    return said


def decade(age: str) -> str:
    """`60-69`"""
    if not age.strip().isdecimal():
        return "unknown"
    first = int(age) // 10 * 10
    return f"{first}-{first + 9}"


def part_of(patient: str) -> str:
    if is_held_out(patient, 0.1):
        return "valid"
    return "test" if is_held_out(patient, 0.2) else "train"


def table_row(path: str, patient: str, groups: dict[str, str], labels: dict[str, float]) -> Row:
    return {
        "path": path,
        "unit": patient,
        **{GROUP + name: value for name, value in groups.items()},
        **{LABEL + name: f"{value:g}" for name, value in labels.items()},
    }


def chexpert_rows(rows: Iterable[Row], to_images: str, part: str = "") -> dict[str, list[Row]]:
    """By part, of the released train.csv or valid.csv; with `part` all are of that one. `to_images` leads from the tables to the
    release's own folder, which a `Path` begins with. Raises DataError."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        below = row["Path"].partition("/")[2]
        patient = re.search(r"(?:^|/)(patient\d+)/", below)
        if not patient:
            raise DataError(f"Path {row['Path']!r} has no folder patientNUMBER, whose image it is")
        where = part or part_of(patient[1])
        view = row["AP/PA"].strip() if row["Frontal/Lateral"].strip() == "Frontal" else row["Frontal/Lateral"].strip()
        groups = {"sex": row["Sex"].strip() or "unknown", "age": decade(row["Age"]), "view": view or "unknown"}
        labels = chexpert_labels(row, SMOOTHING if where == "train" else 0.0)
        found.setdefault(where, []).append(table_row(f"{to_images}/{below}", patient[1], groups, labels))
    return found


def mimic_rows(
    labels: Iterable[Row], metadata: Iterable[Row], patients: Iterable[Row], to_images: str
) -> tuple[dict[str, list[Row]], int]:
    """By part, of the released tables of labels by study, of images and of MIMIC-IV's patients, which may be none; and how many
    images have no labels and are left out. Raises DataError."""
    studies = {row["study_id"]: mimic_labels(row) for row in labels}
    people = {
        row["subject_id"]: {"sex": row["gender"] or "unknown", "age": decade(row["anchor_age"])} for row in patients
    }
    unknown = {"sex": "unknown", "age": "unknown"} if people else {}
    found: dict[str, list[Row]] = {}
    left_out = 0
    for row in metadata:
        patient, study = row["subject_id"], row["study_id"]
        if study not in studies:
            left_out += 1
            continue
        path = f"{to_images}/files/p{patient[:2]}/p{patient}/s{study}/{row['dicom_id']}.jpg"
        groups = {**people.get(patient, unknown), "view": row["ViewPosition"] or "unknown"}
        found.setdefault(part_of(patient), []).append(table_row(path, patient, groups, studies[study]))
    return found, left_out


@dataclass(frozen=True)
class Release:
    """Where a data set was unpacked, and where its tables shall be."""

    folder: Path
    to_images: str  # from the tables to the folder

    def rows(self, name: str, columns: Iterable[str], optional: bool = False) -> list[Row]:
        """Of `name` or `name`.gz, which must have these columns. Raises DataError."""
        file = next((f for f in (self.folder / name, self.folder / f"{name}.gz") if f.exists()), None)
        if file is None:
            if optional:
                return []
            raise DataError(f"{self.folder} has no {name}, nor {name}.gz")
        try:
            content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), restval="")
            found = list(reader)
        except (OSError, EOFError, ValueError, csv.Error) as error:
            raise DataError(f"{file} is not a CSV that can be read: {error}") from None
        if missing := [one for one in columns if one not in (reader.fieldnames or ())]:
            raise DataError(f"{file} has no column {missing[0]}: its columns are {', '.join(reader.fieldnames or ())}")
        return found


def chexpert(release: Release) -> tuple[dict[str, list[Row]], int]:
    columns = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *OBSERVATIONS)
    tables = chexpert_rows(release.rows("train.csv", columns), release.to_images)
    return tables | chexpert_rows(release.rows("valid.csv", columns, optional=True), release.to_images, "official"), 0


def mimic(release: Release) -> tuple[dict[str, list[Row]], int]:
    return mimic_rows(
        release.rows("mimic-cxr-2.0.0-chexpert.csv", ("study_id", *OBSERVATIONS)),
        release.rows("mimic-cxr-2.0.0-metadata.csv", ("dicom_id", "subject_id", "study_id", "ViewPosition")),
        release.rows("patients.csv", ("subject_id", "gender", "anchor_age"), optional=True),
        release.to_images,
    )


SETS: dict[str, Callable[[Release], tuple[dict[str, list[Row]], int]]] = {"chexpert": chexpert, "mimic": mimic}


def write_tables(name: str, folder: str, to: str) -> tuple[dict[str, int], int]:
    """Writes TO/train.csv, valid.csv and test.csv; rows of each, and how many images were left out. Raises DataError."""
    source, target = Path(folder).expanduser(), Path(to).expanduser()
    tables, left_out = SETS[name](Release(source, os.path.relpath(source, target)))
    there = [target / f"{part}.csv" for part in tables if (target / f"{part}.csv").exists()]
    if there:
        raise DataError(f"{there[0]} is there already: give --to another folder")
    try:
        target.mkdir(parents=True, exist_ok=True)
        for part, rows in tables.items():
            with open(target / f"{part}.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    except OSError as error:
        raise DataError(f"{to} cannot be written: {error}") from None
    return {part: len(rows) for part, rows in sorted(tables.items())}, left_out
