# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""A small language about who sells what. Small models are pre-trained on it and then learn a task that is new to them.

Facts such as `seller: Mara, thing: kettle, colour: red` become a statement, a question or a denial, in the present,
the past or the future, or a list. In the texts for pre-training, questions about the future only follow an
instruction; all other forms also follow the facts alone. The task of the data in `recipes/data/stalls` is the question
about the future from the facts alone. This command writes those files again:

    python recipes/shared/small_language.py
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path


# This file also runs as a script of its own, which finds no other module of the recipes.
DATA = Path(__file__).resolve().parents[1] / "data"
WORDS = {
    "seller": "Mara Tomas Ines Oskar Lena Jonas Petra Hugo Nadia Emil Rosa Viktor Clara Anton Selma Bruno Greta Milo "
    "Agnes Felix",
    "thing": "kettle lamp basket chair blanket clock mirror drum saddle ladder bucket vase scarf barrel carpet flute "
    "bench kite sled rake cradle hammer candle hammock",
    "size": "tiny small large huge",
    "colour": "red blue green yellow black white brown grey",
    "place": "bridge mill tower harbour fountain gate school well station church",
    "price": "two three four five six seven eight nine ten twelve",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
}
WORDS = {kind: words.split() for kind, words in WORDS.items()}
TENSES = ("present", "past", "future")
FORMS = ("statement", "question", "denial")
NEW_TASK = ("future", "question")
LISTS = ("words", "kinds", "sorted")
INSTRUCTIONS = ("{0} {1}:", "write a {1} in the {0}:", "{1}, {0}:")
LIST_INSTRUCTIONS = {"words": "list the words:", "kinds": "list the kinds:", "sorted": "sort the facts:"}
SHARE_OF_LISTS = 0.15
SHARE_WITHOUT_INSTRUCTION = 0.3


def draw_facts(rng: random.Random) -> dict[str, str]:
    """Returns two to seven facts in any order. The seller and the thing are always among them."""
    kinds = ["seller", "thing"] + [kind for kind in list(WORDS)[2:] if rng.random() < 0.6]
    rng.shuffle(kinds)
    return {kind: rng.choice(WORDS[kind]) for kind in kinds}


def write_facts(facts: dict[str, str]) -> str:
    return ", ".join(f"{kind}: {word}" for kind, word in facts.items())


def write_sentence(facts: dict[str, str], tense: str, form: str, place_first: bool) -> str:
    """Returns the facts as one sentence, with the place before the price or behind it."""
    seller = facts["seller"]
    before, after = {
        ("present", "statement"): (f"{seller} sells", ""),
        ("present", "question"): (f"Does {seller} sell", "?"),
        ("present", "denial"): (f"{seller} does not sell", ""),
        ("past", "statement"): (f"{seller} sold", ""),
        ("past", "question"): (f"Did {seller} sell", "?"),
        ("past", "denial"): (f"{seller} did not sell", ""),
        ("future", "statement"): (f"{seller} will sell", ""),
        ("future", "question"): (f"Will {seller} sell", "?"),
        ("future", "denial"): (f"{seller} will not sell", ""),
    }[tense, form]
    what = " ".join(facts[kind] for kind in ("size", "colour", "thing") if kind in facts)
    place = f" by the {facts['place']}" if "place" in facts else ""
    price = f" for {facts['price']} coins" if "price" in facts else ""
    day = f" on {facts['day']}" if "day" in facts else ""
    return f"{before} a {what}{place + price if place_first else price + place}{day}{after or '.'}"


def write_list(facts: dict[str, str], what: str) -> str:
    if what == "sorted":
        return write_facts({kind: facts[kind] for kind in WORDS if kind in facts})
    return ", ".join(facts.values() if what == "words" else facts)


def draw_texts(seed: int) -> Iterator[tuple[str, str]]:
    """Yields an endless stream of texts for pre-training: facts, often behind an instruction, and the answer.

    The answer to facts without an instruction never has the form of the new task.
    """
    rng = random.Random(seed)
    combinations = [(tense, form) for tense in TENSES for form in FORMS]
    while True:
        facts = draw_facts(rng)
        if rng.random() < SHARE_OF_LISTS:
            tense, form, what = None, None, rng.choice(LISTS)
            instruction, answer = LIST_INSTRUCTIONS[what], write_list(facts, what)
        else:
            tense, form = rng.choice(combinations)
            instruction = rng.choice(INSTRUCTIONS).format(tense, form)
            answer = write_sentence(facts, tense, form, rng.random() < 0.5)
        if rng.random() < SHARE_WITHOUT_INSTRUCTION and (tense, form) != NEW_TASK:
            yield write_facts(facts), answer
        else:
            yield f"{instruction} {write_facts(facts)}", answer


def make_rows(count: int, seed: int, known: set[str]) -> list[dict[str, str]]:
    """Returns rows of the new task. Facts that are in `known` are skipped, and the new ones are added to it.

    Facts with a place and a price have two rows, one for each order.
    """
    rng, rows = random.Random(seed), []
    for _ in range(count):
        while (text := write_facts(facts := draw_facts(rng))) in known:
            pass
        known.add(text)
        targets = dict.fromkeys(write_sentence(facts, *NEW_TASK, place_first) for place_first in (True, False))
        rows += [{"input": text, "target": target} for target in targets]
    return rows


def main() -> None:
    known = set()
    for split, count, seed in (("train", 400, 1), ("validation", 60, 2), ("test", 100, 3)):
        path = DATA / "stalls" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = [json.dumps(row) + "\n" for row in make_rows(count, seed, known)]
        path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
