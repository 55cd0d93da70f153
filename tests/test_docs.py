# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What the documents say is true: every Python block runs, links lead somewhere, tables are those of the results."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from families import FAMILIES, make_model, support_table
from hub_server import TOKEN, serving
from tiny_tokenizers import CHAT, SIZE, make_tokenizer


ROOT = Path(__file__).parent.parent
README, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"
DOCUMENTS = [README, CHINESE, *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*DOCUMENTS, ROOT / "CONTRIBUTING.md"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def python_blocks(path: Path) -> list[tuple[int, str]]:
    """The Python blocks of a document, each with the number of lines in front of it."""
    text = read(path)
    found = re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [(text[: block.start(1)].count("\n"), block[1]) for block in found]


# Names that the documents give to models of the Hub: family, task and tokenizer of the tiny model in their place.
MODELS = {
    "google-bert/bert-base-uncased": ("BERT", "FEATURE_EXTRACTION", "BERT"),
    "openai-community/gpt2": ("GPT-2", "CAUSAL_LM", "GPT-2"),
    "Qwen/Qwen3-0.6B": ("Qwen3", "CAUSAL_LM", "nothing around"),
    "microsoft/mpnet-base": ("MPNet", "FEATURE_EXTRACTION", "BERT"),
}

# Behind the blocks of a document: `after[i]` has the names that were set when block i had run.
CHECKS = {
    "README.md": """
tokenizer = after[0]["tokenizer"]
trained, loaded = after[0]["model"].eval(), after[1]["model"].eval()
inputs = tokenizer(["good good", "bad"], return_tensors="pt", padding=True)
torch.testing.assert_close(loaded(**inputs).logits, trained(**inputs).logits, rtol=0, atol=1e-6)

ids, inputs = after[2]["ids"], after[2]["inputs"]
assert ids[:, : inputs.input_ids.shape[1]].tolist() == inputs.input_ids.tolist()
model = after[3]["model"].eval()
trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
assert trained == ["base_model.model.transformer.wte.ptuning_encoders.default.embedding"]
served = transformers.AutoModelForCausalLM.from_pretrained("standalone")
longer = transformers.AutoTokenizer.from_pretrained("standalone")("Once upon a time", return_tensors="pt")
found = served(**longer).logits[:, 20:, : model.config.vocab_size]
torch.testing.assert_close(found, model(**inputs).logits, rtol=1e-5, atol=1e-5)
assert keys.shape == values.shape == (4, 20, 8) and deep.prompt_route == "deep"
encoded = encode({"premise": ["It rains."], "hypothesis": ["wet"]})
assert encoded["input_ids"][0].count(template.placeholder_id) == 3
assert templated(**{key: torch.tensor(value) for key, value in encoded.items()}).logits.isfinite().all()
""",
    "docs/guide.md": """
assert losses[-1] < losses[0]
assert [type(m.get_base_model()).__name__ for m in (tagger, reader, filler)] == [
    "BertForTokenClassification", "BertForQuestionAnswering", "BertForMaskedLM"
]
assert type(base.get_input_embeddings()).__name__ == "PTuningLayer"  # that of the import
assert classifier.prompt_embeddings().equal(after[0]["model"].prompt_embeddings())
trained = [parameter for name, parameter in chat.named_parameters() if "trainable_tokens_delta" in name]
assert [parameter.shape for parameter in trained] == [(2, 32)] and trained[0].requires_grad
assert keys.shape == values.shape == (2, 20, 8)
torch.testing.assert_close(unfolded_logits, folded_logits, rtol=0, atol=1e-5)
assert unfolded.peft_config["default"].prompt_depth == taken.peft_config["default"].prompt_depth == "DEEP"
assert after[6]["loaded"].prompt_embeddings().equal(after[0]["model"].prompt_embeddings())
assert len(grown.get_input_embeddings().weight) == len(tokenizer) + 8
assert from_bank.shape[0] == 2 and list(bank) == ["stories"]
assert not torch.allclose(lettered, after[14]["bank"].base_model(**after[14]["texts"]).logits)
assert "prompt_effect" in after[15]["trainer"].state.log_history[0]
assert len(nearest) == 20 and len(nearest[0]) == 3 and -1 <= similarity <= 1
assert static.equal(answer)
assert more.shape[1] == first.sequences.shape[1] + 8
assert [len(output.generated_tokens) for output in outputs.values()] == [8, 8]
assert model.prompt_route == "shared"
assert vectors.shape == (2, 32)
assert 0 <= scores["acc,none"] <= 1 and scores["sample_len"] == 32
torch.testing.assert_close(merged, together, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(again_both.eval()(**after[0]["batch"]).logits, together, rtol=1e-4, atol=1e-5)
assert not torch.allclose(prompt_alone, together) and not torch.allclose(of_base, prompt_alone)

inputs = tokenizer("Once", return_tensors="pt")
expected = model(**inputs).logits
for other in (shared, imported):
    torch.testing.assert_close(other.eval()(**inputs).logits, expected, rtol=0, atol=1e-6)
stock = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(name), "for-peft")
torch.testing.assert_close(stock.eval()(**inputs).logits[:, 20:], expected, rtol=1e-5, atol=1e-5)
served = transformers.AutoModelForCausalLM.from_pretrained("standalone")
longer = transformers.AutoTokenizer.from_pretrained("standalone")("Once", return_tensors="pt")
found = served(**longer).logits[:, 20:, : model.config.vocab_size]
torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
assert embeds.shape == (20 + ids.shape[1], 32)
assert templated.prompt_route == "in place" and answer_ids.shape[1] == pair_ids.shape[1] + 4
assert rows[1]["input_ids"].count(template.placeholder_id) == 7
assert again_template == template and cloze_loss.isfinite()
torch.testing.assert_close(again(**batch).logits, cloze.eval()(**batch).logits)
""",
}
CHECKS["README.zh.md"] = CHECKS["README.md"]

PROGRAM = """
import json, sys, warnings
import datasets, peft, torch, transformers, trl, sentence_transformers
torch.manual_seed(0)
torch.set_num_threads(1)
warnings.simplefilter("error")
for message in (
    "`is_gradient_checkpointing` is deprecated",  # PEFT 0.21 itself reads the old name
    "`gradient_checkpointing` is deprecated",  # TRL's arguments use the old name
    "'pin_memory' argument is set",  # Trainer's default, where there is no accelerator
    "`past_key_values` is deprecated",  # since transformers 5.24 its name is `cache`
    "Unable to fetch remote file",  # PEFT looks for the files of a folder on the Hub, too
    "Use 'content=<...>' to upload",  # huggingface_hub's own uploads
    "You are trying to modify a model with PEFT for a second time",  # so it is
    "Already found a `peft_config` attribute in the model",
):
    warnings.filterwarnings("ignore", message)
path, blocks, check = json.load(sys.stdin)
names, after = {}, []
for line, block in blocks:
    exec(compile("\\n" * line + block, path, "exec"), names)  # so that an error names the document's own line
    after.append(dict(names))
with torch.no_grad():
    exec(check, names | {"after": after, "peft": peft, "torch": torch, "transformers": transformers})
"""


def make_world(folder: Path) -> None:
    """Models, tokenizers and data under the names by which the documents load them."""
    for name, (family, task, kind) in MODELS.items():
        sizes = {"n_positions": 512} if family == "GPT-2" else {"max_position_embeddings": 512}
        make_model(family, task, vocab_size=SIZE, **sizes).save_pretrained(folder / name)
        side = "right" if task != "CAUSAL_LM" else "left"
        tokenizer = make_tokenizer(
            kind, CHAT if task == "CAUSAL_LM" else None, padding_side=side, model_max_length=512
        )
        tokenizer.save_pretrained(folder / name)
    rows = [{"text": "good good", "label": 1}, {"text": "bad bad", "label": 0}] * 16
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if python_blocks(path)], ids=name_of)
def test_every_python_block_runs(path, tmp_path) -> None:
    """In order, in one process whose Hub is a server of the tests."""
    make_world(tmp_path)
    with serving() as hub:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        env |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
        }
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM],
            input=json.dumps([name_of(path), python_blocks(path), CHECKS.get(name_of(path), "")]),
            cwd=tmp_path,
            env={**env, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_readme_keeps_its_promises_of_brevity() -> None:
    for path in (README, CHINESE):
        (_, train), (_, load), *_ = python_blocks(path)
        assert len([line for line in train.splitlines() if line.strip()]) <= 15
        assert len([line for line in load.splitlines() if line.strip()]) == 3
        assert read(path)[: read(path).index(load)].count("\n") <= 50
        assert read(path).count("\n") <= 240


def test_the_readmes_commands_are_targets_of_make() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for path in (README, CHINESE):
        commands = re.findall(r"^make (\w+)", read(path), flags=re.MULTILINE)
        assert commands == ["quickstart", "test"]
        assert all(f"\n{command}:" in makefile for command in commands)


def test_the_chinese_readme_says_the_same() -> None:
    """The same code but for its comments, the same numbers, the same links, as many headings."""
    code = {path: [ast.unparse(ast.parse(block)) for _, block in python_blocks(path)] for path in (README, CHINESE)}
    assert code[README] == code[CHINESE]
    for pattern in (r"\d+(?:[.,]\d+)*", r"^#+ ", r"^\|", r"\]\(([^)#]+)"):
        found = [Counter(re.findall(pattern, read(path), flags=re.MULTILINE)) for path in (README, CHINESE)]
        for counts in found:  # each links to the other
            del counts["README.md"], counts["README.zh.md"]
        assert found[0] == found[1]


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", read(path), flags=re.DOTALL | re.MULTILINE), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_and_paths_lead_somewhere(path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", read(path)):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link
    for named in re.findall(r"(?<![\w/])(?:tests|recipes|docs|peft_ptuning_ext)/[\w/.]+\.\w+", read(path)):
        assert (ROOT / named).exists(), named


def test_the_table_of_families_is_made_from_the_tests() -> None:
    assert support_table() in read(ROOT / "docs/guarantees.md")
    assert f"{len(FAMILIES)} model families" in read(README)


def results(pattern: str) -> list[Path]:
    """Files among the results of the measuring tools."""
    return sorted((ROOT / "recipes/measure/results").glob(pattern))


def test_the_measurements_are_those_in_the_results() -> None:
    text = read(ROOT / "docs/measurements.md")
    (benchmark,) = results("benchmark/benchmark.md")
    tables = read(benchmark).split("\n## ")
    training = next(table for table in tables if table.startswith("Training step: time"))
    assert training[training.index("| B |") :].strip() in text
    titles = {"Prefill": -2, "Time to first token": -2, "Tokens per second": -2}
    titles |= {"Training step: peak memory": -2, "Generating": -2}
    for title, column in titles.items():
        rows = next(table for table in tables if table.startswith(title)).strip().splitlines()[-4:]
        medians = [row.split("|")[column].split()[0] for row in rows]
        assert f"| {' | '.join(medians)} |" in text
    compared = [*results("compare*/compare.md"), *results("compare/ablation.md")]
    assert len(compared) == 5
    compared += (many := results("many*/many.md"))
    assert len(many) == 2
    compared += (banks := results("bank/bank.md"))
    assert len(banks) == 1
    compared += (distilled := results("distill*/distill.md"))
    assert len(distilled) == 1
    assert all(read(path).strip() in text for path in compared)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


@pytest.mark.parametrize("path", [README, CHINESE], ids=name_of)
def test_the_readmes_figures_are_those_in_the_results(path) -> None:
    (compared,) = results("compare/compare.md")
    scores, deployed = {}, {}
    for row in read(compared).splitlines()[2:]:
        task, method, score, *_, saved = cells(row)
        shown = "`ValueError`" if score.startswith("ValueError") else score.partition(" of ")[0]
        scores.setdefault(task.partition(",")[0], {})[method] = shown
        deployed.setdefault(task.partition(",")[0], {})[method] = saved
    for row in read(next(iter(results("compare_deep/compare.md")))).splitlines()[2:]:
        task, method, score, *_, saved = cells(row)
        if method.startswith("this package, deep") and task.partition(",")[0] in scores:
            # Of two starts, the second is the one that the held-out rows have chosen.
            scores[task.partition(",")[0]]["deep"] = score.partition(" of ")[0]
            deployed[task.partition(",")[0]]["deep"] = saved
    methods = ["this package, NONE", "deep", "PEFT P-tuning", "LoRA, r = 8", "head only"]
    for row in (*scores.values(), deployed["sst2"]):
        assert f"| {' | '.join(row[method] for method in methods)} |" in read(path)

    (file,) = results("benchmark/benchmark.json")
    measured = json.loads(file.read_text())["results"]
    for shape in ((16, 32, 100), (1, 128, 20)):
        ours = [
            result["stock_to_this"][1]
            for result in measured
            if result["method"] == "ptuning"
            and result["measure"] in ("train_step", "train_memory")
            and (result["batch_size"], result["text_length"], result["prompt_length"]) == shape
        ]
        assert len(ours) == 2
        assert all(f"{ratio:.2f}" in read(path) for ratio in ours)
