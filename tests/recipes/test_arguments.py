# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The arguments of all recipes, from command lines and files: config files arrive, and what is wrong is refused."""

import json
from dataclasses import dataclass

import accelerate_loop
import causal_lm
import distill_context
import few_shot
import pytest
import question_answering
import seq2seq
import text_classification
import token_classification
import yaml
from shared.arguments import MethodArguments, parse_arguments
from tiny_recipes import RECIPES


ALL = [accelerate_loop, causal_lm, few_shot, question_answering, seq2seq, text_classification, token_classification]


class Parsed(Exception):
    """Raised in place of a training, with the values of all arguments."""


@pytest.fixture
def parse(monkeypatch):
    """Returns what a recipe reads from its command line."""

    def parse(recipe, *words):
        parse_arguments = recipe.parse_arguments

        def parse_and_stop(*args):
            raise Parsed({name: value for part in parse_arguments(*args) for name, value in vars(part).items()})

        with monkeypatch.context() as patch:
            patch.setattr(recipe, "parse_arguments", parse_and_stop)
            with pytest.raises(Parsed) as parsed:
                recipe.main([*words, "--use_cpu", "True"])
        return parsed.value.args[0]

    return parse


def test_each_recipe_has_a_config_file():
    assert {path.stem for path in (RECIPES / "configs").iterdir()} == {recipe.__name__ for recipe in ALL}


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.__name__)
def test_every_value_of_a_config_file_arrives(recipe, parse):
    name = recipe.__name__
    file = RECIPES / "configs" / f"{name}.yaml"
    text = file.read_text(encoding="utf-8")
    assert text.startswith(f"# python recipes/{name}.py recipes/configs/{name}.yaml\n")
    options = yaml.safe_load(text)
    values, defaults = parse(recipe, str(file), "--seed", "5"), parse(recipe)
    options |= {"learning_rate": float(options["learning_rate"]), "seed": 5}
    if recipe is not accelerate_loop:
        options["report_to"] = [options["report_to"]]
    assert {name: values[name] for name in options} == options
    assert sum(defaults[name] != value for name, value in options.items()) > 5  # else nothing shows that it was read


def test_options_win_over_a_file(tmp_path, parse):
    (tmp_path / "run.json").write_text(json.dumps({"max_steps": 2, "learning_rate": 0.5}))
    values = parse(text_classification, str(tmp_path / "run.json"), "--learning_rate", "0.25")
    assert (values["max_steps"], values["learning_rate"]) == (2, 0.25)


def test_depth_is_that_of_the_recipe_for_prompts_of_this_package_only(parse):
    assert parse(text_classification)["depth"] == parse(accelerate_loop)["depth"] == "DEEP"
    assert parse(text_classification, "--depth", "INPUT")["depth"] == "INPUT"
    assert parse(text_classification, "--method", "lora")["depth"] is None
    assert parse(causal_lm)["depth"] == "INPUT"


def test_defaults_of_a_recipe_win_over_the_shared_ones(parse):
    assert parse(question_answering)["label_names"] == ["start_positions", "end_positions"]
    assert parse(text_classification)["label_names"] == ["labels"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no file"),
        ("- a\n- b\n", "should hold options by name"),
        ("learning_rat: 1\nnum_virtual_token: 2\n", "does not know: learning_rat, num_virtual_token"),
    ],
)
def test_config_files_that_are_wrong(tmp_path, content, message):
    if content is not None:
        (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        text_classification.main([str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("content", ["method: rola", "learning_rate: fast"])
def test_values_of_a_config_file_are_checked(tmp_path, content, capsys):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(SystemExit):
        text_classification.main([str(tmp_path / "run.yaml")])
    assert content.split()[-1] in capsys.readouterr().err


WITHOUT_PREDICTIONS = {
    "dataloader_drop_last": True,  # which is for training, and Trainer leaves out rows of evaluations as well
    "prediction_loss_only": True,
    "eval_do_concat_batches": False,
    "batch_eval_metrics": True,
}


class Started(Exception):
    """Raised where a recipe has accepted its arguments."""


def start(recipe, first: str, options: dict, folder) -> None:
    """Runs a recipe up to the call of its function `first`."""

    def stop(*_):
        raise Started

    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, first, stop)
        recipe.main([*words, "--use_cpu", "True", "--output_dir", str(folder)])


@pytest.mark.parametrize(
    ("recipe", "option", "value"),
    [
        *(
            (recipe, option, value)
            for recipe in (few_shot, question_answering, seq2seq, text_classification, token_classification)
            for option, value in WITHOUT_PREDICTIONS.items()
        ),
        (seq2seq, "predict_with_generate", False),
        (causal_lm, "dataloader_drop_last", True),
        (causal_lm, "eval_do_concat_batches", False),
    ],
)
def test_evaluations_without_all_predictions_are_refused_where_they_are_read(recipe, option, value, tmp_path):
    with pytest.raises(ValueError, match=f"`--{option}` is {value}, and this recipe needs {not value}: "):
        start(recipe, "load_data", {option: value}, tmp_path)


@pytest.mark.parametrize(
    ("recipe", "first", "options"),
    [
        (causal_lm, "load_data", ["prediction_loss_only"]),  # its answers are generated apart from Trainer
        (distill_context, "prepare", [*WITHOUT_PREDICTIONS]),  # it measures by itself
    ],
)
def test_recipes_that_read_no_predictions_leave_these_options_free(recipe, first, options, tmp_path):
    with pytest.raises(Started):
        start(recipe, first, {option: WITHOUT_PREDICTIONS[option] for option in options}, tmp_path)


def test_deepspeed_has_to_be_told_the_learning_rate(tmp_path) -> None:
    """It reads the rate when the arguments are made, and the rate of a prompt is chosen later."""
    arguments = [HasLearningRate, MethodArguments]
    with pytest.raises(ValueError, match="pass `--learning_rate`"):
        parse_arguments(arguments, {}, ["--deepspeed", "config.json"])
    told, _ = parse_arguments(arguments, {}, ["--deepspeed", "config.json", "--learning_rate", "0.1"])
    assert told.learning_rate == 0.1


@dataclass
class HasLearningRate:
    """Two of the fields of `TrainingArguments`, which would look for DeepSpeed."""

    deepspeed: str | None = None
    learning_rate: float = 0.5
