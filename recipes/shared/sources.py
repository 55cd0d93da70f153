# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Where a recipe's data come from: the Hub, files, or the recipe itself; checked before anything is trained."""

from collections.abc import Hashable
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from shared.arguments import DataArguments


RECIPES = Path(__file__).resolve().parents[1]
DATA = RECIPES / "data"
METRICS = RECIPES / "metrics"


def load_data(args: DataArguments, packaged: dict[str, Path]) -> DatasetDict:
    """Returns the splits "train", "validation" and, where there is one, "test", from the Hub or from files.

    If a data set of the Hub has no validation split, its test split takes that place. If neither a data set nor files
    are given, the files in `packaged` are read.

    Raises:
        ValueError: A file is missing, empty or of another kind, or a split is missing.
    """
    given = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    given = {split: Path(file) for split, file in given.items() if file is not None}
    if args.dataset_name is not None:
        if given:
            raise ValueError("Pass either `--dataset_name` or files, not both.")
        data = load_dataset(args.dataset_name, args.dataset_config_name)
        held_out = next((split for split in ("validation", "test") if split in data), None)
        if "train" not in data or held_out is None:
            raise ValueError(f"{args.dataset_name} needs a train and a validation or test split, has {list(data)}.")
        splits = {"train": data["train"], "validation": data[held_out]}
        if held_out == "validation" and "test" in data:
            splits["test"] = data["test"]
        return DatasetDict(splits)
    if given and not {"train", "validation"} <= given.keys():
        raise ValueError("`--train_file` and `--validation_file` go together, only one was given.")
    files = given or packaged
    for file in files.values():
        _check_file(file)
    if len({file.suffix == ".csv" for file in files.values()}) > 1:
        raise ValueError(f"All files should be JSON lines or all CSV, got {', '.join(map(str, files.values()))}.")
    builder = "csv" if files["train"].suffix == ".csv" else "json"
    try:
        return load_dataset(builder, data_files={split: str(file) for split, file in files.items()})
    except DatasetGenerationError as error:  # only its cause names the value
        names = " and ".join(map(str, files.values()))
        raise ValueError(f"{names} can't be read as one table: {error.__cause__ or error}") from error


def _check_file(file: Path) -> None:
    if file.suffix not in (".jsonl", ".json", ".csv"):
        raise ValueError(f"{file} should be JSON lines (.jsonl, .json) or CSV (.csv).")
    if not file.is_file():
        raise ValueError(f"There is no file {file}.")
    # The readers of pandas and Arrow do not name the file in their errors.
    header = 1 if file.suffix == ".csv" else 0
    if len(file.read_bytes().strip().splitlines()) <= header:
        raise ValueError(f"{file} is empty.")


def check_columns(data: DatasetDict, columns: dict[str, type]) -> None:
    """Checks that every split has rows, and that each column is there with values of its type.

    Raises:
        ValueError: A split has no rows, lacks a column, or has a value of another type.
    """
    for split, dataset in data.items():
        if missing := [name for name in columns if name not in dataset.column_names]:
            raise ValueError(f"The {split} data has no column {missing[0]!r}, only {dataset.column_names}.")
        if len(dataset) == 0:
            raise ValueError(f"The {split} data has no rows.")
        for name, kind in columns.items():
            if not all(isinstance(value, kind) for value in dataset[name]):
                what = {str: "text", list: "list", dict: "table", Hashable: "text or number"}[kind]
                raise ValueError(f"Column {name!r} of the {split} data has rows that are no {what}.")


def take_text_columns(data: DatasetDict, **columns: str) -> DatasetDict:
    """Checks that the columns hold texts, and returns no others, under the names that the recipe uses.

    Raises:
        ValueError: Two are the same column, or one is not there or has other values than texts.
    """
    if len({*columns.values()}) < len(columns):
        names = " and ".join(columns)
        raise ValueError(f"The columns of {names} should differ, got {next(iter(columns.values()))!r} for both.")
    check_columns(data, dict.fromkeys(columns.values(), str))
    return DatasetDict(
        {
            split: Dataset.from_dict({name: dataset[column][:] for name, column in columns.items()})
            for split, dataset in data.items()
        }
    )


def drop_long_rows(data: DatasetDict, column: str, option: str, limit: int) -> DatasetDict:
    """Returns the rows with at most `limit` tokens in the column, and prints how many rows are left out.

    Raises:
        ValueError: A split has no other rows.
    """
    kept = DatasetDict(
        {split: dataset.filter(lambda row: len(row[column]) <= limit) for split, dataset in data.items()}
    )
    for split, dataset in data.items():
        if dropped := len(dataset) - len(kept[split]):
            print(f"{dropped:,} of {len(dataset):,} {split} rows are longer than `{option}` {limit}, and left out.")
        if dropped == len(dataset):
            raise ValueError(f"All {dropped:,} {split} rows have more than {limit} tokens (`{option}`).")
    return kept


def group_targets(rows: Dataset) -> dict[str, list[str]]:
    """Returns all "target" texts of each "input" text, in the order of the rows."""
    grouped = {}
    for text, target in zip(rows["input"], rows["target"]):
        grouped.setdefault(text, []).append(target)
    return grouped
