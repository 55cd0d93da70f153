# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The recipes that generate, from end to end on tiny models; their default models, data and metric."""

import itertools
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import causal_lm
import evaluate
import pytest
import seq2seq
import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel
from safetensors.torch import load_file
from shared import small_language, small_models
from shared.small_models import Pretraining
from tiny_recipes import (
    FILES,
    RECIPES,
    assert_deep_prompt_is_saved,
    losses,
    outcome,
    read_metrics,
    read_rows,
    run,
    train,
    write_rows,
)
from tokenizers.normalizers import Lowercase
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq


WIDTH = 32
V = 4
LONGEST = 10
PRETRAINING = {
    causal_lm: Pretraining("causal_lm", width=WIDTH, layers=1, steps=2, batch_size=2),
    seq2seq: Pretraining("seq2seq", width=WIDTH, layers=1, steps=2, batch_size=2),
}
MODEL_CLASS = {causal_lm: AutoModelForCausalLM, seq2seq: AutoModelForSeq2SeqLM}
NAMES = {  # of what both recipes have
    causal_lm: {"first": "prompt_column", "second": "response_column", "longest": "max_length"},
    seq2seq: {"first": "source_column", "second": "target_column", "longest": "max_source_length"},
}


def make_tiny(recipe, folder, **changes):
    """A model that nothing was trained on, and its tokenizer, in a folder."""
    torch.manual_seed(0)
    settings = PRETRAINING[recipe]
    tokenizer = small_models.make_tokenizer(settings, itertools.islice(small_language.draw_texts(0), 50))
    model = small_models.make_model(settings, tokenizer)
    if changes:
        model = type(model)(type(model.config)(**{**model.config.to_dict(), **changes}))
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=1.0)  # so that different texts come out visibly different
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=[causal_lm, seq2seq], ids=["causal_lm", "seq2seq"])
def recipe(request):
    return request.param


@pytest.fixture(scope="module")
def tiny(recipe, tmp_path_factory):
    """Arguments of a run on a one-layer model, which has seen a few sentences, and a few rows of the data."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "model").mkdir()
    small_models._pretrain(replace(PRETRAINING[recipe], steps=100, batch_size=8, learning_rate=1e-2), folder / "model")
    rows = small_language.make_rows(20, 0, set())
    short = {"max_new_tokens": LONGEST}
    if recipe is seq2seq:  # with the token that the decoder starts from
        short = {"max_target_length": 40, "generation_max_length": LONGEST + 1}
    return {
        "model_name_or_path": str(folder / "model"),
        "train_file": write_rows(folder / "train.jsonl", rows[:16]),
        "validation_file": write_rows(folder / "validation.jsonl", rows[16:]),
        "num_virtual_tokens": V,
        "max_steps": 4,
        "learning_rate": 0.1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **short,
    }


@pytest.fixture(scope="module")
def trained(recipe, tiny, tmp_path_factory):
    return train(recipe, {**tiny, "eval_strategy": "epoch"}, tmp_path_factory.mktemp("trained") / "output")


def test_files_are_written(trained):
    assert {path.name for path in trained.output.iterdir()} == FILES
    card = (trained.output / "README.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in card for name in ("loss", "bleu", "rouge_l", "exact_match"))


def test_prompt_moves_and_the_backbone_stays(trained):
    assert trained.moved == {name for name in trained.before if "ptuning_encoders" in name}
    assert len(trained.moved) == 1


def test_adapter_holds_the_prompt_only(trained):
    tensors = load_file(trained.output / "adapter_model.safetensors")
    assert [tuple(tensor.shape) for tensor in tensors.values()] == [(V, WIDTH)]


def test_references_of_an_input_are_grouped(trained, tiny):
    grouped = {}
    for row in read_rows(tiny["validation_file"]):
        grouped.setdefault(row["input"], []).append(row["target"])
    assert {row["input"]: row["references"] for row in trained.rows} == grouped
    assert [row["input"] for row in trained.rows] == list(grouped)
    assert {len(targets) for targets in grouped.values()} == {1, 2}


def test_metrics_agree_with_predictions(trained):
    metric = evaluate.load(str(RECIPES / "metrics" / "bleu_rouge"), keep_in_memory=True)
    again = metric.compute(
        predictions=[row["prediction"] for row in trained.rows],
        references=[row["references"] for row in trained.rows],
    )
    assert again == {name: trained.metrics["after"][name] for name in again}
    assert again["bleu"] > 0
    assert again["rouge_l"] > 0
    assert trained.metrics["before"]["loss"] != trained.metrics["after"]["loss"]
    assert trained.metrics["before"].keys() == trained.metrics["after"].keys()


def test_saved_adapter_gives_the_same_texts(recipe, trained, tiny):
    base = MODEL_CLASS[recipe].from_pretrained(tiny["model_name_or_path"])
    model = PeftModel.from_pretrained(base, trained.output).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained.output)
    end = "\n" if recipe is causal_lm else ""
    texts = []
    for row in trained.rows:  # one by one, without any padding
        batch = tokenizer(row["input"] + end, return_tensors="pt")
        ids = model.generate(**batch, do_sample=False, max_new_tokens=LONGEST)
        ids = ids[0, batch["input_ids"].shape[1] :] if recipe is causal_lm else ids[0]
        texts.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    assert texts == [row["prediction"] for row in trained.rows]
    assert len(set(texts)) > 1  # else the comparison says little


def test_seed_decides_the_run(recipe, tiny, trained, tmp_path):
    arguments = {**tiny, "eval_strategy": "epoch"}
    run(recipe, {**arguments, "output_dir": tmp_path / "same"})
    run(recipe, {**arguments, "output_dir": tmp_path / "other", "seed": 7})
    assert outcome(tmp_path / "same") == outcome(trained.output)
    assert losses(trained.metrics) != losses(read_metrics(tmp_path / "other"))


def test_resumed_is_uninterrupted(recipe, tiny, tmp_path):
    arguments = {**tiny, "save_strategy": "steps", "save_steps": 2}
    run(recipe, {**arguments, "output_dir": tmp_path / "whole"})
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    run(recipe, {**arguments, "output_dir": tmp_path / "resumed", "resume_from_checkpoint": checkpoint})
    assert outcome(tmp_path / "resumed") == outcome(tmp_path / "whole")
    assert not (tmp_path / "resumed" / "checkpoint-2").exists()  # it did go on from the other folder


def test_deep_prompt(recipe, tiny, tmp_path):
    done = train(recipe, {**tiny, "depth": "DEEP"}, tmp_path)
    assert_deep_prompt_is_saved(done, V, 1, "RANDOM")


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # by stock P-tuning
@pytest.mark.parametrize("method", ["peft_ptuning", "peft_prefix", "lora"])
def test_other_methods_run(recipe, tiny, tmp_path, method):
    run(recipe, {**tiny, "method": method, "max_steps": 1, "output_dir": tmp_path})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == {"peft_ptuning": "P_TUNING", "peft_prefix": "PREFIX_TUNING", "lora": "LORA"}[method]
    assert (tmp_path / "predictions.jsonl").is_file()


def test_tied_head_is_refused(recipe, tiny, tmp_path):
    with pytest.raises(ValueError, match="has no head apart from its frozen embeddings"):
        run(recipe, {**tiny, "method": "head", "output_dir": tmp_path / "output"})
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("recipe", [causal_lm], indirect=True)  # T5's is tied, always
def test_untied_head_is_trained(recipe, tiny, tmp_path):
    untied = make_tiny(recipe, tmp_path / "model", tie_word_embeddings=False)
    run(recipe, {**tiny, "method": "head", "model_name_or_path": untied, "output_dir": tmp_path / "output"})
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(tmp_path / "output" / "model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"lm_head.weight"}


def test_files_of_csv_and_columns_of_other_names(recipe, tiny, tmp_path):
    files = {f"{split}_file": tmp_path / f"{split}.csv" for split in ("train", "validation", "test")}
    for name, path in files.items():
        path.write_text("labels,answer\n" + "".join(f"text {i} of {name},yes\n" for i in range(4)))
    columns = {NAMES[recipe]["first"]: "labels", NAMES[recipe]["second"]: "answer"}
    run(recipe, {**tiny, **files, **columns, "max_steps": 1, "output_dir": tmp_path / "output"})
    rows = read_rows(tmp_path / "output" / "predictions.jsonl")
    assert [row["input"] for row in rows] == [f"text {i} of test_file" for i in range(4)]


GOOD = [{"input": "thing: lamp", "target": "a lamp"}, {"input": "thing: kite", "target": "a kite"}]


@pytest.mark.parametrize(
    ("changes", "train_rows", "rows", "message"),
    [
        ({"first": "text"}, GOOD, GOOD, r"train data has no column 'text', only \['input', 'target'\]"),
        ({"second": "input"}, GOOD, GOOD, "columns of input and target should differ, got 'input' for both"),
        ({}, [], GOOD, r"train\.jsonl is empty"),
        ({}, GOOD, [], r"validation\.jsonl is empty"),
        ({}, [*GOOD, {"input": "a", "target": None}], GOOD, "'target' of the train data has rows that are no text"),
        ({}, GOOD, [{"input": None, "target": "b"}], "'input' of the validation data has rows that are no text"),
        ({"model_name_or_path": "./no/such/model"}, GOOD, GOOD, r"no model folder \./no/such/model"),
        (
            {"longest": 253},
            GOOD,
            GOOD,
            r"4 virtual tokens and `--max_(source_)?length`.* positions, and the model has 256",
        ),
        ({"longest": 3}, GOOD, GOOD, r"All 2 train rows have more than 3 tokens \(`--max_(source_)?length`\)"),
        ({"train_file": "none.jsonl"}, GOOD, GOOD, "no file none.jsonl"),
        ({"num_virtual_tokens": 0}, GOOD, GOOD, "`num_virtual_tokens` must be from 1 to"),
    ],
)
def test_bad_input_is_refused_before_training(recipe, tiny, tmp_path, changes, train_rows, rows, message):
    arguments = {
        **tiny,
        "train_file": write_rows(tmp_path / "train.jsonl", train_rows),
        "validation_file": write_rows(tmp_path / "validation.jsonl", rows),
        "output_dir": tmp_path / "output",
    }
    for name, value in changes.items():
        arguments[NAMES[recipe].get(name, name)] = value
    with pytest.raises(ValueError, match=message):
        run(recipe, arguments)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("recipe", [seq2seq], indirect=True)
def test_texts_of_the_same_tokens_are_one_input_of_their_split(recipe, tiny, tmp_path):
    model = shutil.copytree(tiny["model_name_or_path"], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    tokenizer.save_pretrained(model)
    one, other = "thing: drum", "Thing: Drum"
    rows = {
        "validation": [{"input": one, "target": "a lamp"}, *GOOD],
        "test": [{"input": other, "target": "a bell"}, GOOD[1], {"input": one, "target": "a drum"}],
    }
    files = {f"{split}_file": write_rows(tmp_path / f"{split}.jsonl", found) for split, found in rows.items()}
    changes = {"model_name_or_path": model, "eval_strategy": "epoch", "max_steps": 1}
    run(recipe, {**tiny, **files, **changes, "output_dir": tmp_path / "output"})
    found = {row["input"]: row["references"] for row in read_rows(tmp_path / "output" / "predictions.jsonl")}
    assert found == {other: ["a bell", "a drum"], GOOD[1]["input"]: [GOOD[1]["target"]]}


def test_template_needs_a_place_for_the_text(tmp_path):
    with pytest.raises(ValueError, match=r"should have {input} where the text goes, got 'Answer: '"):
        causal_lm.main(["--template", "Answer: ", "--output_dir", str(tmp_path / "output")])
    assert not (tmp_path / "output").exists()


CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }} "
    "{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


@pytest.mark.parametrize(
    ("chat_template", "template", "text"),
    [
        (None, None, "<s> thing: lamp\n"),
        (None, "Say {input} ->", "<s> Say thing: lamp ->"),
        (CHAT, None, " <|user|> thing: lamp <|assistant|>"),
        (CHAT, "Say {input} ->", "<s> Say thing: lamp ->"),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_is_on_the_answer_only(tmp_path, chat_template, template, text, side):
    tokenizer = AutoTokenizer.from_pretrained(make_tiny(causal_lm, tmp_path))
    tokenizer.padding_side = side
    tokenizer.chat_template = chat_template
    rows = Dataset.from_list([GOOD[0], {"input": "thing: lamp, seller: Mara, day: Monday", "target": "a lamp"}])
    tokens = causal_lm.tokenize(DatasetDict(train=rows), tokenizer, causal_lm.TextArguments(template=template))
    rows = tokens["train"].select_columns(["input_ids", "labels"])
    batch = DataCollatorForSeq2Seq(tokenizer)(list(rows))
    ids, labels, mask = (batch[name][0] for name in ("input_ids", "labels", "attention_mask"))
    answer = tokenizer.decode(ids[labels != -100])
    assert answer.strip() == f"a lamp{tokenizer.eos_token}"
    assert torch.equal(ids[labels != -100], labels[labels != -100])
    given = ids[(labels == -100) & (mask == 1)]
    assert tokenizer.decode(given).rstrip(" ") == text
    assert causal_lm.make_ids(tokenizer, template, GOOD[0]["input"])[0] == given.tolist()
    assert (mask == 0).any()  # the other row is longer
    assert set(labels[mask == 0].tolist()) == {-100}


@pytest.mark.parametrize(
    ("chat_template", "template", "text"),
    [
        (None, None, "<s> day: Monday\na day\nthing: lamp\n"),
        (None, "Say {input} ->", "<s> Say day: Monday ->a day\nSay thing: lamp ->"),
        (CHAT, None, " <|user|> day: Monday <|assistant|> a day</s> <|user|> thing: lamp <|assistant|>"),
    ],
)
def test_examples_stand_in_front_of_each_text(tmp_path, chat_template, template, text):
    tokenizer = AutoTokenizer.from_pretrained(make_tiny(causal_lm, tmp_path))
    tokenizer.chat_template = chat_template
    examples = [("day: Monday", "a day")]
    given, answer = causal_lm.make_ids(tokenizer, template, "thing: lamp", "a lamp", examples)
    assert tokenizer.decode(given).rstrip(" ") == text
    assert answer == causal_lm.make_ids(tokenizer, template, "thing: lamp", "a lamp")[1]


def test_examples_are_spread_and_not_trained_on():
    rows = [{"input": f"thing {number}", "target": f"answer {number}"} for number in range(10)]
    data = DatasetDict(train=Dataset.from_list(rows), validation=Dataset.from_list(rows[:1]))
    assert causal_lm.take_examples(data, 3) == [(f"thing {n}", f"answer {n}") for n in (0, 3, 6)]
    assert data["train"]["input"][:] == [f"thing {n}" for n in (1, 2, 4, 5, 7, 8, 9)]
    assert causal_lm.take_examples(data, 0) == []
    for count in (7, -1):
        with pytest.raises(ValueError, match=f"`--examples` should be 0 to 6, .* got {count}"):
            causal_lm.take_examples(data, count)


def test_chat_template_that_rewrites_the_question_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(make_tiny(causal_lm, tmp_path))
    tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="pass `--template`"):
        causal_lm.make_ids(tokenizer, None, "thing: lamp", "a lamp")


def test_long_rows_are_left_out_and_counted(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(make_tiny(causal_lm, tmp_path))
    rows = Dataset.from_list([*GOOD, {"input": "a " * 20, "target": "b"}])
    tokens = causal_lm.tokenize(DatasetDict(train=rows), tokenizer, causal_lm.TextArguments(max_length=20))
    assert tokens["train"]["input"][:] == [row["input"] for row in GOOD]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in tokens["train"]["labels"])
    assert "1 of 3 train rows are longer than `--max_length` 20, and left out." in capsys.readouterr().out


def test_perplexity_counts_each_token_of_the_answers_once(tmp_path):
    folder = make_tiny(causal_lm, tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = Dataset.from_list([*GOOD, {"input": "thing: drum, size: huge", "target": "a huge drum by the mill"}])
    tokens = causal_lm.tokenize(DatasetDict(train=rows), tokenizer, causal_lm.TextArguments())["train"]
    batch = DataCollatorForSeq2Seq(tokenizer)([{key: row[key] for key in ("input_ids", "labels")} for row in tokens])
    with torch.no_grad():
        found = causal_lm.token_losses(model(**batch).logits, batch["labels"])
        sums = []
        for row in tokens:
            logits = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
            sums += [-logits[i - 1, label].item() for i, label in enumerate(row["labels"]) if label != -100]
    output = SimpleNamespace(predictions=found.numpy(), label_ids=batch["labels"].numpy())
    expected = math.exp(sum(sums) / len(sums))
    assert causal_lm.compute_perplexity(output)["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_metric():
    metric = evaluate.load(str(RECIPES / "metrics" / "bleu_rouge"), keep_in_memory=True)
    result = metric.compute(
        predictions=["a b c d e f", "v w x y z"],
        references=[["a b c d e g"], ["q", "v w x y z"]],
    )
    # Matching n-grams of all, n = 1 … 4: 10/11, 8/9, 6/7, 4/5. As long as the references: no penalty.
    # ROUGE-L of the first: the longest common subsequence has 5 of 6 words.
    bleu = (10 / 11 * 8 / 9 * 6 / 7 * 4 / 5) ** 0.25
    assert result == pytest.approx({"bleu": 100 * bleu, "rouge_l": 100 * (5 / 6 + 1) / 2, "exact_match": 50.0})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "peft_ptuning_ext"


def test_small_model_is_trained_once(recipe, cache, capsys, monkeypatch):
    settings = PRETRAINING[recipe]
    state = torch.get_rng_state()
    folder = small_models.find_small_model(settings)
    assert torch.equal(
        torch.get_rng_state(), state
    )  # the recipe's run is the same, whether the model was there or not
    assert Path(folder).parent == cache
    model = MODEL_CLASS[recipe].from_pretrained(folder)
    assert f"{type(model).__name__} of {model.num_parameters():,} parameters" in capsys.readouterr().out
    batch = AutoTokenizer.from_pretrained(folder)("thing: lamp", return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=2).shape[0] == 1

    monkeypatch.setattr(small_models, "_pretrain", lambda *args: pytest.fail("trained again"))
    assert small_models.find_small_model(settings) == folder
    assert "A toy, made for trying things" in capsys.readouterr().out
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        small_models.find_small_model(replace(settings, steps=3))


def test_pretraining_that_fails_leaves_nothing(cache, monkeypatch):
    def fail(settings, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    settings = PRETRAINING[causal_lm]
    with monkeypatch.context() as patch:
        patch.setattr(small_models, "_pretrain", fail)
        with pytest.raises(KeyboardInterrupt):
            small_models.find_small_model(settings)
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    assert (Path(small_models.find_small_model(settings)) / "model.safetensors").is_file()


def test_one_of_several_trains(cache, monkeypatch):
    trained = []

    def pretrain(settings, folder):
        trained.append(folder)
        torch.multiprocessing.Event().wait(0.5)
        (folder / "pretraining.json").write_text('{"description": "a model"}')

    monkeypatch.setattr(small_models, "_pretrain", pretrain)
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(small_models.find_small_model, [PRETRAINING[seq2seq]] * 3))
    assert len(trained) == 1
    assert len(set(folders)) == 1


def test_stalls_are_what_the_script_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(small_language, "DATA", tmp_path)
    small_language.main()
    inputs = {}
    for split in ("train", "validation", "test"):
        path = RECIPES / "data" / "stalls" / f"{split}.jsonl"
        assert path.read_bytes() == (tmp_path / "stalls" / path.name).read_bytes()
        inputs[split] = {row["input"] for row in read_rows(path)}
    assert {split: len(texts) for split, texts in inputs.items()} == {"train": 400, "validation": 60, "test": 100}
    assert len(set.union(*inputs.values())) == 560


def test_the_new_task_always_has_an_instruction_in_pretraining():
    texts = list(itertools.islice(small_language.draw_texts(0), 3000))
    starts = tuple(f"{kind}:" for kind in small_language.WORDS)
    asked = [source for source, answer in texts if answer.startswith("Will ")]
    plain = [answer for source, answer in texts if source.startswith(starts)]
    assert len(asked) > 100
    assert len(plain) > 600
    assert not any(source.startswith(starts) for source in asked)
