# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""A prompt in place of a context: teacher, loss and report on a tiny model."""

import importlib.util
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import distill as measure_distill
import distill_context
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from shared import small_language, small_models
from shared.arguments import ModelArguments
from shared.contexts import ContextArguments, Frame, make_frame
from shared.small_models import Pretraining
from shared.teacher import DistillationCollator, Teacher
from tiny_recipes import FILES, RECIPES, read_metrics, read_rows, run, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments


LAYERS, V = 2, 4
STOP = "a"  # ends some of the answers early
CONTEXT = "Mara sells a lamp at the mill on Monday. Ines sells a kite by the river, and Bo has drums."
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Arguments of a run on a model of random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    settings = Pretraining("causal_lm", width=32, layers=LAYERS)
    tokenizer = small_models.make_tokenizer(settings, itertools.islice(small_language.draw_texts(0), 50))
    model = small_models.make_model(settings, tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=0.3)  # so that answers differ, and are not certain
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "context.txt").write_text(CONTEXT)
    inputs = [f"thing: {thing}, day: {day}" for thing in ("lamp", "kite", "drum") for day in ("Monday", "Friday")]
    rows = [{"input": text, "target": "yes"} for text in inputs]
    return {
        "model_name_or_path": str(folder / "model"),
        "context_file": str(folder / "context.txt"),
        "inputs_file": write_rows(folder / "train.jsonl", rows[:4]),
        "test_file": write_rows(folder / "test.jsonl", [*rows[4:], {"input": "a", "target": "no"}]),
        "max_new_tokens": 6,
        "num_virtual_tokens": V,
        "dtype": "float32",
    }


RUN = {
    "max_steps": 3,
    "learning_rate": 0.1,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def prepare(tiny: dict, folder: Path, **changes) -> distill_context.Task:
    arguments = {**tiny, **changes}
    model = ModelArguments(arguments.pop("model_name_or_path"))
    training = TrainingArguments(str(folder), per_device_eval_batch_size=2, use_cpu=True)
    return distill_context.prepare(model, ContextArguments(**arguments), training)


def vocabulary(tiny: dict) -> int:
    return AutoModelForCausalLM.from_pretrained(tiny["model_name_or_path"]).config.vocab_size


def log_probabilities(model, front: list[int], row: dict) -> torch.Tensor:
    """Of a model that is called on the plain tokens, at each place of the row's answer: (N, vocabulary)."""
    ids = torch.tensor([[*front, *row["text_ids"], *row["answer_ids"]]])
    with torch.no_grad():
        logits = model(ids).logits[0].log_softmax(-1)
    return logits[-len(row["answer_ids"]) - 1 : -1]


def front_ids(task: distill_context.Task) -> list[int]:
    return task.tokenizer(task.frame.front, add_special_tokens=False).input_ids


def test_the_teacher_is_the_model_behind_the_context(tiny, tmp_path):
    task = prepare(tiny, tmp_path, top_k=5, stop=STOP)
    base, front = AutoModelForCausalLM.from_pretrained(tiny["model_name_or_path"]).eval(), front_ids(task)
    assert front[0] == task.tokenizer.bos_token_id
    assert CONTEXT in task.tokenizer.decode(front)
    rows = [*task.data["train"], *task.data["test"]]
    assert min(len({len(row[name]) for row in rows}) for name in ("text_ids", "answer_ids")) > 1
    for row in rows:
        assert task.tokenizer.decode(row["text_ids"]).strip() == row["input"]
        ids = torch.tensor([[*front, *row["text_ids"]]])
        whole = base.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
        whole = whole[0, ids.shape[1] :].tolist()
        ended = [i for i in range(1, 7) if STOP in task.tokenizer.decode(whole[:i])]
        assert row["answer_ids"] == whole[: min(ended, default=6)]
        expected = log_probabilities(base, front, row)
        top, top_ids = expected.topk(5)
        assert row["teacher_ids"] == top_ids.tolist()
        torch.testing.assert_close(torch.tensor(row["teacher_logprobs"]), top, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.tensor(row["teacher_rest"]).exp(), 1 - top.exp().sum(-1), rtol=0, atol=1e-5)
    away = log_probabilities(base, front[:1], rows[0])
    assert (away - log_probabilities(base, front, rows[0])).abs().max() > 0.1  # else the context would say nothing


def student(task: distill_context.Task, depth: str, length: int, folder: Path) -> distill_context.DistillationTrainer:
    task.args = replace(task.args, prompt_depth=depth, num_virtual_tokens=length)
    defaults = {**distill_context.TRAINING_DEFAULTS, **RUN, "per_device_eval_batch_size": 8, "output_dir": str(folder)}
    return distill_context.train_prompt(task, distill_context.TrainingArguments(**defaults))


@pytest.mark.parametrize("top_k", [None, 7])
def test_the_loss_is_the_divergence_of_the_distributions(tiny, tmp_path, top_k):
    """Of the full ones where k is the vocabulary. Otherwise all other tokens count as one."""
    task = prepare(tiny, tmp_path, top_k=top_k or vocabulary(tiny))
    base, rows = AutoModelForCausalLM.from_pretrained(tiny["model_name_or_path"]).eval(), task.data["test"].to_list()
    names = ("answer_ids", "teacher_ids", "teacher_logprobs", "teacher_rest")
    rows[0] |= {name: rows[0][name][:2] for name in names}  # one answer is shorter
    task.data["test"] = Dataset.from_list(rows)
    trainer = student(task, "INPUT", V, tmp_path)
    batch = DistillationCollator(task.tokenizer.pad_token_id)(rows)
    counted = (batch["labels"] != -100).sum()
    loss = trainer.compute_loss(trainer.model, batch)
    full, grouped, front = 0, 0, front_ids(task)
    spread = [front[round(i * (len(front) - 1) / (V - 1))] for i in range(V)]  # where the prompt starts
    for row in rows:
        teacher = log_probabilities(base, front, row).double()
        own = log_probabilities(base, spread, row).double()
        full += (teacher.exp() * (teacher - own)).sum()
        if top_k:
            ids = teacher.topk(top_k).indices
            teacher, own = (both.exp().gather(-1, ids) for both in (teacher, own))
            teacher, own = (torch.cat([both, 1 - both.sum(-1, keepdim=True)], -1).log() for both in (teacher, own))
        grouped += (teacher.exp() * (teacher - own)).sum()
    assert loss.item() == pytest.approx(grouped.item() / counted.item(), rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item())
    assert 0.01 < grouped.item() < full.item() if top_k else grouped.item() == full.item() > 0.01
    loss.backward()
    gradients = {name for name, parameter in trainer.model.named_parameters() if parameter.grad is not None}
    assert len(gradients) == 1
    assert all(p.grad.isfinite().all() for p in trainer.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("depth", ["INPUT", "DEEP"])
def test_a_prompt_that_is_the_whole_context_is_the_teacher(tiny, tmp_path, depth):
    task = prepare(tiny, tmp_path, top_k=vocabulary(tiny))
    metrics = {}
    for length in (task.context_tokens, V):
        model = student(task, depth, length, tmp_path).model
        metrics[length], _ = distill_context.measure(model, task, 2, [])
        task.model = model.unload()
    assert abs(metrics[task.context_tokens]["kl"]) < 1e-5
    assert metrics[task.context_tokens]["agreement"] == 1
    assert metrics[V]["kl"] > 0.01


def test_what_is_in_front_changes_nothing_else(tiny, tmp_path):
    """Without a context, a model reads what its tokenizer makes of the text."""
    task = prepare(tiny, tmp_path, top_k=vocabulary(tiny))
    base, start = AutoModelForCausalLM.from_pretrained(tiny["model_name_or_path"]).eval(), []
    for row in task.data["test"]:
        assert task.tokenizer(row["input"] + "\n").input_ids == [task.tokenizer.bos_token_id, *row["text_ids"]]
        teacher, own = (
            log_probabilities(base, front, row) for front in (front_ids(task), [task.tokenizer.bos_token_id])
        )
        start += (teacher.exp() * (teacher - own)).sum(-1).tolist()
    found = distill_context.measure_without(task, 2)
    assert found["nothing"]["kl"] == pytest.approx(sum(start) / len(start), rel=1e-3)
    assert (found["context"]["kl"], found["context"]["agreement"]) == (0, 1)


def test_a_deep_prompt_starts_at_the_contexts_own_keys_and_values(tiny, tmp_path):
    task = prepare(tiny, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny["model_name_or_path"])
    front = torch.tensor([front_ids(task)])
    with torch.no_grad():
        cache = base(front, position_ids=torch.arange(-front.shape[1], 0)[None], use_cache=True).past_key_values
    model, last = student(task, "DEEP", V, tmp_path).model, front.shape[1] - 1
    places = [round(i * last / (V - 1)) for i in range(V)]
    for layer, (keys, values) in model.prompt_key_values().items():
        torch.testing.assert_close(keys, cache.layers[layer].keys[0, :, places], rtol=0, atol=1e-5)
        torch.testing.assert_close(values, cache.layers[layer].values[0, :, places], rtol=0, atol=1e-5)


@pytest.mark.parametrize("depth", ["INPUT", "DEEP"])
def test_a_run_writes_the_prompt_and_the_report(tiny, tmp_path, depth, capsys):
    output = tmp_path / "output"
    run(distill_context, {**tiny, **RUN, "prompt_depth": depth, "output_dir": output})
    written = {path.name for path in output.iterdir()}
    assert written == FILES | {"distillation.json", "distillation.md"}
    report = json.loads((output / "distillation.json").read_text())
    assert report["tokens_saved"] == report["context_tokens"] - V
    kl = {case: found["kl"] for case, found in report["metrics"].items()}
    assert kl["context"] == 0 < min(kl["nothing"], kl["start"], kl["prompt"])
    assert kl["start"] != kl["prompt"]
    assert report["recovered"]["kl"] == pytest.approx(1 - kl["prompt"] / kl["nothing"])
    assert read_metrics(output)["after"]["kl"] == kl["prompt"]
    assert {len(seconds) for seconds in report["prefill_seconds"].values()} == {distill_context.ROUNDS}
    assert (output / "distillation.md").read_text() in capsys.readouterr().out
    rows = read_rows(output / "predictions.jsonl")
    assert [row["input"] for row in rows] == [row["input"] for row in read_rows(tiny["test_file"])]

    saved = load_file(output / "adapter_model.safetensors")
    assert len(saved) == (1 if depth == "INPUT" else 2 * LAYERS)
    task = prepare(tiny, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny["model_name_or_path"])
    loaded, _ = distill_context.measure(PeftModel.from_pretrained(base, output), task, 2, [])
    assert loaded["kl"] == pytest.approx(kl["prompt"], rel=1e-4)


def test_a_resumed_run_is_the_run_without_the_break(tiny, tmp_path, monkeypatch):
    whole, broken, steps = tmp_path / "whole", tmp_path / "broken", []
    plain = distill_context.DistillationTrainer.training_step
    monkeypatch.setattr(
        distill_context.DistillationTrainer,
        "training_step",
        lambda self, *args: steps.append(self.args.output_dir) or plain(self, *args),
    )
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    run(distill_context, {**tiny, **RUN, **saving, "output_dir": whole})
    shutil.copytree(whole / "checkpoint-2", broken / "checkpoint-2")
    run(distill_context, {**tiny, **RUN, **saving, "output_dir": broken, "resume_from_checkpoint": "last"})
    assert (steps.count(str(whole)), steps.count(str(broken))) == (4, 2)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, broken))
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_a_kept_context_is_read_behind_in_each_round(tiny, tmp_path):
    task = prepare(tiny, tmp_path)
    model, seen = student(task, "DEEP", V, tmp_path).model, set()
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.add(kwargs["attention_mask"].shape[1]), with_kwargs=True
    )
    seconds = distill_context.time_prefill(model, task, rounds=3)
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(distill_context.CASES, 3)
    text = sorted(map(len, task.data["test"]["text_ids"]))[1]
    assert seen == {text, task.context_tokens, task.context_tokens + text}


def test_training_lowers_the_divergence(tiny, tmp_path):
    run(distill_context, {**tiny, **RUN, "max_steps": 20, "learning_rate": 0.01, "output_dir": tmp_path / "output"})
    report = json.loads((tmp_path / "output" / "distillation.json").read_text())
    assert report["metrics"]["prompt"]["kl"] < report["metrics"]["start"]["kl"]


def test_accumulated_steps_are_those_of_a_larger_batch(tiny, tmp_path):
    prompts = []
    for size, steps, rate in ((4, 1, 0.1), (1, 4, 0.1), (4, 1, 0.0)):
        output = tmp_path / f"{size}_{rate}"
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "learning_rate": rate}
        plain = {"max_steps": 1, "warmup_steps": 0, "max_grad_norm": 0, "optim": "sgd"}
        run(distill_context, {**tiny, **RUN, **sizes, **plain, "output_dir": output})
        prompts.append(
            torch.cat([each.flatten() for each in load_file(output / "adapter_model.safetensors").values()])
        )
    whole, accumulated, start = prompts
    assert (whole - start).norm() > 1e-3
    assert (accumulated - whole).norm() < 0.01 * (whole - start).norm()


@pytest.mark.parametrize(("capability", "dtype"), [("AVX2", torch.float32), ("AVX512", torch.bfloat16)])
def test_the_number_format_is_one_that_the_machine_multiplies_fast(capability, dtype, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    task = prepare(tiny, tmp_path, dtype=None)
    assert task.model.dtype == getattr(torch, task.args.dtype) == dtype
    assert prepare(tiny, tmp_path, dtype="float16").model.dtype == torch.float16
    assert distill_context.fast_dtype(torch.device("cuda")) == "bfloat16"


def test_the_teacher_answers_where_training_will_be(tiny, tmp_path, monkeypatch):
    # A machine without a GPU has one other device, whose tensors hold no numbers.
    monkeypatch.setattr(TrainingArguments, "device", torch.device("meta"))
    monkeypatch.setattr(Teacher, "__init__", lambda self, model, *_: pytest.fail(f"asked on {model.device}"))
    with pytest.raises(pytest.fail.Exception, match="asked on meta"):
        prepare(tiny, tmp_path)


def test_the_teacher_answers_once(tiny, tmp_path, monkeypatch):
    first = prepare(tiny, tmp_path)
    monkeypatch.setattr(Teacher, "__call__", lambda *_: pytest.fail("asked again"))
    assert prepare(tiny, tmp_path).data["test"][:] == first.data["test"][:]
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        prepare(tiny, tmp_path, top_k=3)
    other = tmp_path / "other.txt"
    other.write_text(CONTEXT.replace("lamp", "kite"))
    for changes in ({"context_file": str(other)}, {"template": "Q: {input}\n"}, {"stop": "a"}):
        with pytest.raises(pytest.fail.Exception, match="asked again"):
            prepare(tiny, tmp_path, **changes)


def test_the_model_makes_up_inputs(tiny, tmp_path):
    changes = {"inputs_file": None, "test_file": None, "template": "Q: {input}\nA:", "sampled_inputs": 6}
    data = prepare(tiny, tmp_path, **changes, stop="\n", max_input_tokens=12).data
    texts = [*data["train"]["input"], *data["test"]["input"]]
    assert 2 <= len(texts) == len(set(texts)) <= 6
    assert len(data["test"]) >= 1
    assert all(text.strip() and "\n" not in text for text in texts)
    assert {row["input"] for row in read_rows(tmp_path / "inputs.jsonl")} == set(texts)


@pytest.mark.parametrize("end", ["\n", "\n\n \n"])
def test_a_text_of_lines_is_a_file_of_inputs(tiny, tmp_path, end):
    file = tmp_path / "inputs.txt"
    file.write_text("".join(f"thing: {i}{end}" for i in range(10)))
    data = prepare(tiny, tmp_path, inputs_file=str(file), test_file=None).data
    assert data.num_rows == {"train": 8, "test": 2}
    assert {*data["train"]["input"], *data["test"]["input"]} == {f"thing: {i}" for i in range(10)}


def frame(tiny: dict, chat: str | None = None, **changes) -> Frame:
    tokenizer = AutoTokenizer.from_pretrained(tiny["model_name_or_path"])
    tokenizer.chat_template = chat
    return make_frame(tokenizer, "Be brief.", ContextArguments(**changes))


def test_the_context_is_the_system_message(tiny):
    assert frame(tiny, CHAT) == Frame("<system> Be brief.</s>", "<user> ", "</s><assistant>")
    assert frame(tiny, CHAT, template="Q: {input}!") == Frame("<s>Be brief.\n\n", "Q: ", "!")
    assert frame(tiny) == Frame("<s>Be brief.\n\n", "", "\n")


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ("{{ raise_exception('no system role') }}", "takes no system message .no system role.*`--template`"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "puts no system message in front",
        ),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            "puts no system message in front",
        ),
    ],
)
def test_other_chat_templates_are_refused(tiny, chat, message):
    with pytest.raises(ValueError, match=message):
        frame(tiny, chat)


NO_ROWS, LATIN = b"\n \n", "Grüße".encode("latin-1")


@pytest.mark.parametrize(
    ("changes", "files", "message"),
    [
        ({}, {"context_file": b" \n"}, r"context_file\.jsonl is empty"),
        ({}, {"context_file": LATIN}, r"context_file\.jsonl is not text in UTF-8"),
        ({}, {"context_file": b"a\0b"}, r"context_file\.jsonl is not text"),
        ({}, {"context_file": b"lamp kite " * 200}, r"context has \d+ tokens, .*the model has 256. Shorten"),
        ({}, {"inputs_file": json.dumps({"input": "kite " * 250}).encode()}, "longest input .*the model has 256"),
        ({"context_file": "none.txt"}, {}, "no file none.txt"),
        ({}, {"inputs_file": NO_ROWS}, r"inputs_file\.jsonl has no rows"),
        ({}, {"test_file": NO_ROWS}, r"test_file\.jsonl has no rows"),
        ({}, {"inputs_file": LATIN}, r"inputs_file\.jsonl is not text in UTF-8"),
        ({}, {"inputs_file": b'{"text": "a"}'}, "should have a text 'input' in each line, got"),
        ({}, {"inputs_file": b'{"input": "a"}\n{"input": 3}'}, r'each line, got {"input": 3}'),
        ({}, {"inputs_file": b'{"input": "a"}\n["b"]'}, r'each line, got \["b"\]'),
        ({}, {"inputs_file": b"{'input'}"}, "should have a JSON object in each line"),
        ({"inputs_file": "none.jsonl"}, {}, "no file none.jsonl"),
        ({"test_file": None}, {"inputs_file": b'{"input": "a"}'}, "has one row"),
        ({"inputs_file": None}, {}, "`--test_file` goes with `--inputs_file`"),
        ({"template": "Answer:"}, {}, r"should have {input} where the input goes, got 'Answer:'"),
        ({"stop": ""}, {}, "`--stop` should be a text of one character or more, got ''"),
        ({"num_virtual_tokens": 200}, {}, r"`--num_virtual_tokens` is 200, and the context has \d+ tokens"),
        ({"num_virtual_tokens": 0}, {}, "`--num_virtual_tokens` is 0"),
        ({"top_k": 0}, {}, "`--top_k` is 0"),
        ({"inputs_file": None, "test_file": None}, {}, "Nothing stands between context and input"),
        ({"model_name_or_path": "./no/such/model"}, {}, r"no model folder \./no/such/model"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(tiny, tmp_path, monkeypatch, changes, files, message):
    monkeypatch.setattr(Teacher, "__call__", lambda *_: pytest.fail("the teacher was asked"))
    arguments = {**tiny, **changes}
    for name, content in files.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_bytes(content)
        arguments[name] = str(file)
    arguments = {name: value for name, value in arguments.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        run(distill_context, {**arguments, **RUN, "output_dir": tmp_path / "output"})
    assert not (tmp_path / "output").exists()


def test_the_way_from_no_context_to_the_context():
    assert distill_context.recovered(nothing=4.0, prompt=1.0, context=0.0) == 0.75
    assert distill_context.recovered(nothing=0.1, prompt=0.9, context=0.5) == 2.0  # a prompt may go further
    assert distill_context.recovered(nothing=0.0, prompt=0.5, context=0.0) is None


def test_the_measured_table_has_a_row_for_each_prompt(tiny, tmp_path):
    words = [word for name, value in {**tiny, **RUN}.items() for word in (f"--{name}", str(value))]
    words = [word for pair in zip(words[::2], words[1::2]) if pair[0] != "--num_virtual_tokens" for word in pair]
    arguments = ["--lengths", "2", "3", "--depths", "DEEP", "--output_dir", str(tmp_path), *words]
    measure_distill.main(arguments)
    table = (tmp_path / "distill.md").read_text().splitlines()
    assert [row.split("|")[2].strip() for row in table[2:]] == ["0", "2", "3", "36"]
    assert {row.count("|") for row in table} == {len(table[0].split("|")) - 1}
    reports = json.loads((tmp_path / "distill.json").read_text())["results"]
    assert f"| {reports[1]['metrics']['prompt']['kl']:.3f} |" in table[4]
    (tmp_path / "deep_3" / "distillation.json").write_text(json.dumps(reports[0]))
    measure_distill.main(arguments)  # finished runs are read, and not repeated
    assert (tmp_path / "distill.md").read_text().splitlines()[4] == table[3]


def test_front_desk_is_what_the_script_writes(tmp_path):
    folder = RECIPES / "data" / "front_desk"
    spec = importlib.util.spec_from_file_location("front_desk", folder / "generate.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(tmp_path)
    for name in ("context.txt", "train.jsonl", "test.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()
    inputs = [row["input"] for name in ("train", "test") for row in read_rows(folder / f"{name}.jsonl")]
    context = (folder / "context.txt").read_text(encoding="utf-8")
    assert len(inputs) == len(set(inputs)) == script.TRAIN + script.TEST
    assert not any(text in context for text in inputs)
    assert all(f"| {thing} | {desk}\n" in context for desk, things in script.THINGS.items() for thing in things)
