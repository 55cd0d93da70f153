# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The few-shot recipe on tiny models: every method is trained and measured, and what is drawn is drawn fairly."""

import json

import few_shot
import pytest
from datasets import Dataset
from shared.small_models import Pretraining, make_model, make_tokenizer
from tiny_recipes import as_words, run, save_backbone, write_rows


# Two kinds of messages that differ in their words.
WORDS = {"good": ["great", "lovely"], "bad": ["awful", "dull"]}
ROWS = [
    {"text": f"the {thing} was {word}", "label": label}
    for label, words in WORDS.items()
    for word in words
    for thing in ("play", "song", "food", "walk")
]


@pytest.fixture(scope="module", name="arguments")
def _arguments(tmp_path_factory) -> dict:
    """Options of a run on a tiny encoder and a tiny language model, both of random weights."""
    folder = tmp_path_factory.mktemp("few_shot")
    texts = [row["text"] for row in ROWS]
    settings = Pretraining("causal_lm", width=32, layers=2)
    tokenizer = make_tokenizer(settings, [(text, "good bad") for text in texts * 3])
    make_model(settings, tokenizer).save_pretrained(folder / "language_model")
    tokenizer.save_pretrained(folder / "language_model")
    return {
        "model_name_or_path": save_backbone(folder / "encoder", texts),
        "language_model": str(folder / "language_model"),
        "train_file": write_rows(folder / "train.jsonl", ROWS),
        "validation_file": write_rows(folder / "validation.jsonl", ROWS[::2]),
        "template": "{prompt:2} {text} {prompt:2} It is {mask}",
        "num_virtual_tokens": 2,
        "shots": 4,
        "draws": 2,
        "max_steps": 8,
        "use_cpu": True,
        "report_to": "none",
    }


def test_every_method_is_measured_on_every_draw(arguments, tmp_path, capsys) -> None:
    run(few_shot, {**arguments, "output_dir": tmp_path})
    results = json.loads((tmp_path / "metrics.json").read_text())
    assert list(results["accuracy"]) == list(few_shot.METHODS)
    for scores in results["accuracy"].values():
        assert len(scores["draws"]) == 2
        assert scores["worst"] == min(scores["draws"]) <= scores["mean"] <= 1
    table = (tmp_path / "few_shot.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert [line.split()[1] for line in table.splitlines()[4:]] == list(few_shot.METHODS)


def test_a_template_learns_what_a_few_examples_show(arguments, tmp_path) -> None:
    change = {"methods": "template_cloze", "max_steps": 60, "learning_rate": 0.1, "draws": 1, "shots": 8}
    run(few_shot, {**arguments, **change, "output_dir": tmp_path})
    scores = json.loads((tmp_path / "metrics.json").read_text())["accuracy"]
    assert list(scores) == ["template_cloze"]
    assert scores["template_cloze"]["mean"] > 0.8


def test_draws() -> None:
    rows = Dataset.from_dict({"text": [str(i) for i in range(20)], "label": [i % 2 for i in range(20)]})
    draws = [few_shot.draw_examples(rows, 3, seed) for seed in (0, 0, 1)]
    assert all(sorted(draw["label"]) == [0, 0, 0, 1, 1, 1] for draw in draws)
    assert draws[0]["text"][:] == draws[1]["text"][:] != draws[2]["text"][:]
    with pytest.raises(ValueError, match="`--shots` is 11, and label number 0 has 10 rows"):
        few_shot.draw_examples(rows, 11, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": "magic"}, "`--methods` has 'magic', and there are template_cloze"),
        ({"resume_from_checkpoint": "last"}, "trains many short runs, and continues none of them"),
        ({"label_words": '{"good": ["a"]}'}, r"`--label_words` has \['good'\], and the labels are \['bad', 'good'\]"),
        ({"label_words": "{good"}, "`--label_words` should be a JSON object, got '{good'"),
        ({"label_words": '["good", "bad"]'}, "`--label_words` should be a JSON object, got"),
        ({"label_words": '{"good": ["a"], "bad": ["a"]}'}, "The word 'a' of class '.*' is, for the tokenizer, a word"),
        ({"template": "{text} is {mask}"}, "has no slot"),
        ({"template": "{prompt} is {mask}"}, "`--template` should have {text} where the text goes, got"),
        ({"template": "{prompt} {text} {title} is {mask}"}, "title"),
        ({"draws": 0}, "`--draws` is 0, and should be 1 or more"),
        ({"shots": -1}, "`--shots` is -1, and should be 1 or more"),
        ({"max_length": 0}, "`--max_length` is 0, and should be 1 or more"),
    ],
)
def test_what_is_refused_before_anything_is_trained(arguments, change, message, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(few_shot, "run_method", lambda *_: pytest.fail("a method was trained"))
    options = {**arguments, "output_dir": tmp_path / "output", **change}
    methods = options.pop("methods", "head template_cloze").split()
    with pytest.raises(ValueError, match=message):
        few_shot.main([*as_words(options), "--methods", *methods])
    assert not (tmp_path / "output").exists()
