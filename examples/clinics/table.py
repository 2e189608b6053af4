"""The heart-disease table, as each hospital has it: 13 measurements of a patient, and whether the disease was found.

The columns are those of the UCI heart-disease data (Janosi, Steinbrunn, Pfisterer, Detrano 1988), files
`processed.cleveland.data` and `processed.hungarian.data`: rows of 14 numbers, "?" for a missing one, no header. Nothing
is fetched: give a folder with these files, or with `westside.csv` and `grapevine.csv` of your own in the same form.
Without one the table is made up, so that the story runs anywhere.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch

FILES = {
    "westside": ("processed.cleveland.data", "westside.csv"),
    "grapevine": ("processed.hungarian.data", "grapevine.csv"),
}
COLUMNS = (
    "age", "sex", "chest_pain", "pressure", "cholesterol", "sugar", "ecg", "pulse", "angina", "depression", "slope",
    "vessels", "thal",
)  # fmt: skip
# What every textbook says of these columns, never what one hospital's records say: the middle, and the scale.
MIDDLE = torch.tensor([55.0, 0.5, 3.0, 130, 240, 0.2, 0.5, 145, 0.4, 1.0, 1.6, 0.5, 4.5])
SCALE = torch.tensor([10.0, 0.5, 1.0, 18, 60, 0.4, 0.9, 24, 0.5, 1.1, 0.6, 0.9, 1.9])

Table = tuple[torch.Tensor, torch.Tensor]  # x: float32 [rows, 13]; y: float32 [rows], 1 for disease


def table(hospital: str, folder: Path | None = None) -> Table:
    """The records of one hospital, scaled; what is missing is in the middle."""
    rows = _made_up(hospital) if folder is None else _read(folder, hospital)
    x, y = rows[:, :-1], rows[:, -1]
    return torch.nan_to_num((x - MIDDLE) / SCALE).contiguous(), (y > 0).float()


def split(records: Table) -> tuple[Table, Table]:
    """What the hospital keeps, and every fifth row, which plays the rows that were published: the scientist's own."""
    x, y = records
    public = torch.arange(len(y)) % 5 == 0
    return (x[~public], y[~public]), (x[public], y[public])


def _read(folder: Path, hospital: str) -> torch.Tensor:
    found = next((folder / name for name in FILES[hospital] if (folder / name).is_file()), None)
    if found is None:
        raise SystemExit(f"{folder} has none of {', '.join(FILES[hospital])}")
    with found.open(newline="") as lines:
        rows = [[float("nan" if cell.strip() == "?" else cell) for cell in row] for row in csv.reader(lines) if row]
    if not rows or any(len(row) != len(COLUMNS) + 1 for row in rows):
        raise SystemExit(f"{found.name}: expected rows of {len(COLUMNS) + 1} numbers, the last one the diagnosis")
    return torch.tensor(rows)


def _made_up(hospital: str) -> torch.Tensor:
    """Patients of nobody: each measurement around its middle, and a disease that follows from some of them."""
    generator = torch.Generator().manual_seed(sorted(FILES).index(hospital))
    normal = torch.randn(240, len(COLUMNS), generator=generator)
    risk = normal[:, [0, 2, 9, 11, 12]].sum(1) - normal[:, 7] + 0.5 * torch.randn(240, generator=generator)
    return torch.cat((MIDDLE + SCALE * normal, (risk > 0).float()[:, None]), 1)
