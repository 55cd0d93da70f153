# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The question answering recipe from end to end on a tiny model, its metric and its data set."""

import random
import runpy
from collections import Counter
from types import SimpleNamespace

import evaluate
import pytest
import question_answering as recipe
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_recipes import (
    FILES,
    PLOTS,
    RECIPES,
    RUN,
    assert_deep_prompt_is_saved,
    outcome,
    read_rows,
    save_backbone,
    train,
    write_rows,
)
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer


NOTICES = RECIPES / "data" / "notices"
NAMES = ["oslo", "lima", "new york", "nora", "nora lind"]
FILLERS = ["to", "from", "we go", "is late", "and", "tomorrow"]
QUESTIONS = ["what name ?", "which ?"]


def questions(split):
    return read_rows(NOTICES / f"{split}.jsonl")


def make_rows(count, seed, unanswerable=0.1):
    """Texts of 4 to 22 words with one name, or none, and questions on it."""
    draw, rows = random.Random(seed), []
    for i in range(count):
        words = [draw.choice(FILLERS) for _ in range(draw.randint(3, 10))]
        answers = {"text": [], "answer_start": []}
        if draw.random() >= unanswerable:
            place, name = draw.randrange(len(words)), draw.choice(NAMES)
            answers = {"text": [name], "answer_start": [len(" ".join([*words[:place], ""]))]}
            words.insert(place, name)
        rows.append(
            {"id": f"q{i}", "context": " ".join(words), "question": draw.choice(QUESTIONS), "answers": answers}
        )
    return rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Arguments of a run on a tiny BERT that reads the longer texts in several windows."""
    folder = tmp_path_factory.mktemp("tiny")
    rows = {"train": make_rows(80, 0), "validation": make_rows(30, 1)}
    return {
        **RUN,
        "model_name_or_path": save_backbone(folder / "model", NAMES + FILLERS + QUESTIONS),
        **{f"{split}_file": write_rows(folder / f"{split}.jsonl", rows[split]) for split in rows},
        "max_length": 20,
        "doc_stride": 4,
        "max_answer_length": 3,
    }


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    return train(recipe, tiny, tmp_path_factory.mktemp("trained") / "output")


def predict(folder, tiny, rows, may_be_empty=True):
    """The saved adapter on one window at a time, and every span of it tried."""
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model = AutoModelForQuestionAnswering.from_pretrained(tiny["model_name_or_path"], config=config)
    model = PeftModel.from_pretrained(model, folder).eval()
    predicted = []
    for row in rows:
        spans, nothing = [(-float("inf"), "")], float("inf")
        options = {"stride": tiny["doc_stride"], "return_overflowing_tokens": True, "return_offsets_mapping": True}
        encoded = tokenizer(row["question"], row["context"], truncation="only_second", **options)
        for ids, types, offsets in zip(encoded["input_ids"], encoded["token_type_ids"], encoded["offset_mapping"]):
            assert len(ids) <= tiny["max_length"]
            with torch.inference_mode():
                output = model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types]))
            start, end = output.start_logits[0].tolist(), output.end_logits[0].tolist()
            nothing = min(nothing, start[0] + end[0])
            text = [i for i, kind in enumerate(types) if kind == 1][:-1]  # without [SEP]
            for first in text:
                for last in text[: text.index(first) + tiny["max_answer_length"]]:
                    if last >= first:
                        answer = row["context"][offsets[first][0] : offsets[last][1]]
                        spans.append((start[first] + end[last], answer))
        score, text = max(spans, key=lambda span: span[0])
        predicted.append("" if may_be_empty and nothing > score else text)
    return predicted


def measure(rows):
    """Exact match and F1 of rows whose answers have neither articles nor punctuation."""

    def f1(guess, truth):
        common = (Counter(guess) & Counter(truth)).total()
        return 2 * common / (len(guess) + len(truth)) if guess and truth else float(guess == truth)

    pairs = [(row["prediction"].split(), (row["answers"] or [""])[0].split()) for row in rows]
    return {
        "exact_match": sum(guess == truth for guess, truth in pairs) / len(pairs),
        "f1": sum(f1(guess, truth) for guess, truth in pairs) / len(pairs),
    }


def test_files_are_written(trained):
    assert {path.name for path in trained.output.iterdir() if not path.name.startswith("checkpoint-")} == FILES
    for name in PLOTS:
        assert (trained.output / name).read_bytes().startswith(b"\x89PNG")
    card = (trained.output / "README.md").read_text()
    assert "pipeline_tag: question-answering" in card
    assert f"| f1 | {trained.metrics['before']['f1']:.4f} | {trained.metrics['after']['f1']:.4f} |" in card


def test_prompt_and_head_move_and_the_backbone_stays(trained):
    assert trained.moved == {
        name for name in trained.before if "ptuning_encoders" in name or "modules_to_save" in name
    }
    assert len(trained.moved) == 3  # prompt, weight and bias of the head


def test_adapter_holds_prompt_and_head_only(trained):
    tensors = load_file(trained.output / "adapter_model.safetensors").values()
    assert sorted(tuple(tensor.shape) for tensor in tensors) == [(2,), (2, 32), (4, 32)]


def test_metrics_are_those_of_the_predictions(trained, tiny):
    given = read_rows(tiny["validation_file"])
    assert [row["id"] for row in trained.rows] == [row["id"] for row in given]
    assert [row["question"] for row in trained.rows] == [row["question"] for row in given]
    assert [row["answers"] for row in trained.rows] == [row["answers"]["text"] for row in given]
    measured = measure(trained.rows)
    assert {name: trained.metrics["after"][name] for name in measured} == pytest.approx(measured)
    assert measured["f1"] > trained.metrics["before"]["f1"] + 0.1
    evaluations = [entry for entry in trained.metrics["history"] if "eval_f1" in entry]
    assert [entry["step"] for entry in evaluations] == [20, 40]
    assert evaluations[-1]["eval_f1"] == trained.metrics["after"]["f1"]


def test_saved_adapter_gives_the_same_answers_as_trying_every_span(trained, tiny):
    predicted = predict(trained.output, tiny, read_rows(tiny["validation_file"]))
    assert [row["prediction"] for row in trained.rows] == predicted
    assert len(set(predicted)) > 3
    assert "" in predicted


def test_something_is_answered_where_training_has_an_answer_to_everything(tiny, tmp_path):
    rows = make_rows(30, 1)
    files = {
        "train_file": write_rows(tmp_path / "train.jsonl", make_rows(40, 0, unanswerable=0)),
        "validation_file": write_rows(tmp_path / "validation.jsonl", rows),
    }
    run = train(recipe, {**tiny, **files}, tmp_path / "output")
    assert [row["prediction"] for row in run.rows] == predict(run.output, tiny, rows, may_be_empty=False)
    assert "" in predict(run.output, tiny, rows)  # so the difference is one
    assert {name: run.metrics["after"][name] for name in ("exact_match", "f1")} == pytest.approx(measure(run.rows))


def test_rows_keep_their_places_where_evaluation_is_grouped_by_length(tiny, tmp_path):
    run = train(recipe, {**tiny, "train_sampling_strategy": "group_by_length"}, tmp_path / "output")
    predicted = [row["prediction"] for row in run.rows]
    assert predicted == predict(run.output, tiny, read_rows(tiny["validation_file"]))
    assert {name: run.metrics["after"][name] for name in ("exact_match", "f1")} == pytest.approx(measure(run.rows))


def test_windows_share_the_stride_and_hold_the_answer(trained, tiny):
    tokenizer = AutoTokenizer.from_pretrained(trained.output)
    rows = read_rows(tiny["train_file"])
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    windows = recipe.make_windows(columns, list(range(len(rows))), tokenizer, tiny["doc_stride"])
    assert len(windows["row"]) > len(rows)
    found = set()
    for i, start, end in zip(windows["row"], windows["start_positions"], windows["end_positions"]):
        if (start, end) != (0, 0):
            found.add(i)
    for ids, offsets, i, start, end in zip(
        *(windows[name] for name in ("input_ids", "offsets", "row", "start_positions", "end_positions"))
    ):
        assert ids[0] == tokenizer.cls_token_id
        if (start, end) != (0, 0):
            assert [rows[i]["context"][offsets[start][0] : offsets[end][1]]] == rows[i]["answers"]["text"]
        elif i in found:  # then another window has what this one lacks
            first = rows[i]["answers"]["answer_start"][0]
            last = first + len(rows[i]["answers"]["text"][0])
            inside = [offset for offset in offsets if offset[1]]
            assert first < inside[0][0] or last > inside[-1][1]
    assert found == {i for i, row in enumerate(rows) if row["answers"]["text"]}
    for i, j in zip(range(len(windows["row"])), range(1, len(windows["row"]))):
        if windows["row"][i] == windows["row"][j]:
            shared = [offset for offset in windows["offsets"][i] if offset[1] and offset in windows["offsets"][j]]
            assert len(shared) >= tiny["doc_stride"]


def test_window_that_begins_or_ends_in_an_answer_does_not_hold_it():
    offsets = torch.tensor([[0, 0], [3, 7], [8, 11], [12, 16], [0, 0]]).numpy()
    answers = [(8, "new"), (3, "oslo new york"), (0, "in oslo"), (12, "york and")]
    spans = [recipe.find_span(offsets, {"text": [text], "answer_start": [start]}) for start, text in answers]
    assert spans == [(2, 2), (1, 3), None, None]
    assert recipe.find_span(offsets, {"text": [], "answer_start": []}) is None


def test_of_several_windows_the_strongest_case_against_no_answer_counts():
    windows = {"row": [0, 0], "null": [0, 0], "offsets": [[[0, 0], [0, 4]]] * 2}
    trainer = SimpleNamespace(_get_eval_sampler=lambda dataset: None)
    spans = recipe.SpanArguments()
    for first, second in (((5, 1), (2, 3)), ((2, 3), (5, 1))):  # scores of [CLS] and of the word, by window
        logits = torch.tensor([first, second]).numpy() / 2
        output = SimpleNamespace(predictions=(logits, logits))
        assert recipe.read_answers(trainer, output, windows, ["oslo"], spans) == [("oslo", 3 - 2)]


def test_best_span_is_ordered_short_enough_and_none_if_there_is_no_room(tiny, tmp_path):
    for length in (1, 2):
        run = train(recipe, {**tiny, "max_answer_length": length, "max_steps": 20}, tmp_path / str(length))
        words = [len(row["prediction"].split()) for row in run.rows]
        assert max(words) <= length
        assert [row["prediction"] for row in run.rows] == predict(
            run.output, {**tiny, "max_answer_length": length}, read_rows(tiny["validation_file"])
        )


def test_seed_decides_the_run(trained, tiny, tmp_path):
    same, other = train(recipe, tiny, tmp_path / "same"), train(recipe, {**tiny, "seed": 7}, tmp_path / "other")
    assert outcome(trained.output) == outcome(same.output)
    assert trained.metrics["after"]["loss"] != other.metrics["after"]["loss"]


def test_resumed_run_equals_an_uninterrupted_one(trained, tiny, tmp_path):
    checkpoint = trained.output / "checkpoint-20"
    resumed = train(recipe, {**tiny, "resume_from_checkpoint": checkpoint}, tmp_path / "resumed")
    name = "adapter_model.safetensors"
    assert (checkpoint / name).read_bytes() != (resumed.output / name).read_bytes()
    assert not (resumed.output / "checkpoint-20").exists()  # it did not begin at the beginning
    assert outcome(resumed.output) == outcome(trained.output)


def test_deep_prompt(tiny, tmp_path):
    done = train(recipe, {**tiny, "depth": "DEEP", "max_steps": 4, "eval_strategy": "no"}, tmp_path)
    assert_deep_prompt_is_saved(done, tiny["num_virtual_tokens"], 2, "RANDOM")


@pytest.mark.parametrize("method", ["peft_ptuning", "peft_prefix", "lora", "head"])
def test_other_methods_run(tiny, tmp_path, method):
    run = train(recipe, {**tiny, "method": method}, tmp_path / "output")
    part = {"peft_ptuning": "prompt_encoder", "peft_prefix": "prompt_encoder", "lora": "lora_", "head": "qa_outputs"}[
        method
    ]
    assert any(part in name for name in run.moved)
    assert all(part in name or "qa_outputs" in name for name in run.moved)
    assert {name: run.metrics["after"][name] for name in ("exact_match", "f1")} == pytest.approx(measure(run.rows))


def test_test_file_is_measured_and_the_best_checkpoint_kept(tiny, tmp_path):
    rows = make_rows(10, 2)
    test_file = write_rows(tmp_path / "test.jsonl", rows)
    # The lowest F1 is called the best, so that it is the first of a run that learns.
    stopping = {"load_best_model_at_end": True, "greater_is_better": False, "early_stopping_patience": 1}
    run = train(recipe, {**tiny, **stopping, "max_steps": 100, "test_file": test_file}, tmp_path / "output")
    assert [row["prediction"] for row in run.rows] == predict(run.output, tiny, rows)
    assert {name: run.metrics["after"][name] for name in ("exact_match", "f1")} == pytest.approx(measure(run.rows))
    scores = {entry["step"]: entry["eval_f1"] for entry in run.metrics["history"] if "eval_f1" in entry}
    assert [*scores] == [20, 40]
    assert scores[20] < scores[40]
    validation = read_rows(tiny["validation_file"])
    pairs = zip(predict(run.output, tiny, validation), validation)
    assert measure([{"prediction": text, "answers": row["answers"]["text"]} for text, row in pairs])["f1"] == (
        pytest.approx(scores[20])
    )
    name = "adapter_model.safetensors"
    assert (run.output / name).read_bytes() == (run.output / "checkpoint-20" / name).read_bytes()


def row_with(answers, **columns):
    return {"id": "a7", "context": "we go to oslo", "question": "which ?", "answers": answers, **columns}


GOOD = row_with({"text": ["oslo"], "answer_start": [9]})


@pytest.mark.parametrize(
    ("changes", "row", "message"),
    [
        ({}, {"id": "1", "context": "a", "question": "b"}, "train data has no column 'answers', only"),
        ({}, {**GOOD, "question": 3}, "'question' of the train data has rows that are no text"),
        ({}, {**GOOD, "answers": "oslo"}, "'answers' of the train data has rows that are no table"),
        ({}, row_with({"text": ["oslo"]}), "Question 'a7' of the train data has answers .*, not equally long lists"),
        ({}, row_with({"text": ["oslo"], "answer_start": [9, 3]}), "Question 'a7' .* not equally long lists"),
        (
            {},
            row_with({"text": ["oslo"], "answer_start": [8]}),
            "'a7' .* answer 'oslo', and its context has none at 8",
        ),
        ({}, row_with({"text": ["oslo"], "answer_start": [-4]}), "'a7' .* and its context has none at -4"),
        ({}, row_with({"text": [""], "answer_start": [0]}), "'a7' .* answer '', and its context has none at 0"),
        ({}, row_with({"text": ["oslo"], "answer_start": ["9"]}), "'a7' .* answer 'oslo' at '9', not a text at a num"),
        ({}, row_with({"text": [], "answer_start": []}), "The train data has no answer at all"),
        (
            {},
            {**GOOD, "question": "which ? " * 7},
            "'a7' has 14 tokens, and with `--doc_stride` 4 leaves no room .* 20",
        ),
        ({"doc_stride": 15}, GOOD, "'a7' has 2 tokens, and with `--doc_stride` 15 leaves no room for the text in"),
        ({"doc_stride": -1}, GOOD, "`--doc_stride` is -1, and should be 0 or more"),
        ({"max_length": 61}, GOOD, "4 virtual tokens and `--max_length` 61 are 65 positions, and the model has 64"),
    ],
)
def test_bad_input_is_refused_before_training(tiny, tmp_path, changes, row, message):
    files = {f"{split}_file": write_rows(tmp_path / f"{split}.jsonl", [row]) for split in ("train", "validation")}
    with pytest.raises(ValueError, match=message):
        train(recipe, {**tiny, **files, **changes}, tmp_path / "output")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("prediction", "answers", "exact_match", "f1"),
    [
        ("The Old Chapel!", ["old chapel"], 1, 1),
        ("in the old chapel", ["old chapel", "an old boat house"], 0, 0.8),  # 2·2/(3+2), and 2·1/(3+3)
        ("oslo oslo", ["oslo"], 0, 2 / 3),
        ("", [], 1, 1),
        ("oslo", [], 0, 0),
        ("", ["oslo"], 0, 0),
        ("then", ["the n"], 0, 0),
        ("a", [], 1, 1),  # nothing is left of it, as in SQuAD 2.0
    ],
)
def test_metric(prediction, answers, exact_match, f1):
    metric = evaluate.load(str(RECIPES / "metrics" / "squad_f1"), keep_in_memory=True)
    result = metric.compute(predictions=[prediction, "x"], references=[answers, ["y"]])
    assert result == pytest.approx({"exact_match": exact_match / 2, "f1": f1 / 2})


def test_generator_writes_the_committed_questions(tmp_path):
    generate = runpy.run_path(str(NOTICES / "generate.py"))
    generate["main"](tmp_path)
    for split in ("train", "test"):
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (NOTICES / f"{split}.jsonl").read_bytes()
    pairs = [generate["TITLES"]]
    pairs += [sides for kind in generate["FACTS"].values() for sides in (kind[:2], kind[2:])]
    assert not any(set(train) & set(test) for train, test in pairs)


def test_test_notices_and_many_of_their_answers_are_new():
    rows = {split: questions(split) for split in ("train", "test")}
    card = (NOTICES / "README.md").read_text()
    for split, number in (("train", 150), ("test", 50)):
        assert len({row["context"] for row in rows[split]}) == number
        assert len({(row["context"], row["question"]) for row in rows[split]}) == len(rows[split])
        without = sum(not row["answers"]["text"] for row in rows[split])
        assert f"{len(rows[split])} questions on {number} notices, {without} of them without an answer" in card
    for name in ("context", "question"):
        texts = [{row[name] for row in rows[split]} for split in rows]
        assert not texts[0] & texts[1]
    known, new = ([text for row in rows[split] for text in row["answers"]["text"]] for split in rows)
    assert 0.4 < sum(text not in known for text in new) / len(new) < 0.8
