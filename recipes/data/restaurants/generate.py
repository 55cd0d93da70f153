# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Writes train.jsonl, validation.jsonl and test.jsonl: `python recipes/data/restaurants/generate.py [folder]`."""

import json
import random
import sys
from pathlib import Path


SIZES = {"train": 200, "validation": 20, "test": 20}
WORDS = {
    "first": "Copper Blue Quiet Golden Old Little Red Wandering Silver Green Lazy Happy Crooked Hidden Brave",
    "second": "Kettle Heron Lantern Fig Anchor Barrel Fox Garden Spoon Bridge Pear Whistle Oak Sparrow Cellar",
    "food": "Indian Greek French Japanese Mexican Thai Italian Turkish Spanish Korean",
}
WORDS = {kind: words.split() for kind, words in WORDS.items()}
PRICES = {"low": "cheap", "moderate": "moderately priced", "high": "expensive"}
AREAS = {
    "riverside": "by the river",
    "city centre": "in the city centre",
    "harbour": "at the harbour",
    "old town": "in the old town",
    "station": "near the station",
}
CHILDREN = {"yes": "Children are welcome.", "no": "It is no place for children."}


def draw_facts(rng: random.Random) -> dict[str, str]:
    """Returns name, food and area of a restaurant and, of three more facts, one to three."""
    more = {
        "price": rng.choice(list(PRICES)),
        "rating": f"{rng.randint(1, 5)}/5",
        "children": rng.choice(list(CHILDREN)),
    }
    kept = rng.sample(list(more), rng.randint(1, 3))
    name = f"The {rng.choice(WORDS['first'])} {rng.choice(WORDS['second'])}"
    facts = {"name": name, "food": rng.choice(WORDS["food"]), "area": rng.choice(list(AREAS))}
    facts |= {kind: more[kind] for kind in more if kind in kept}
    return facts


def describe(facts: dict[str, str]) -> str:
    price = f"{PRICES[facts['price']]} " if "price" in facts else ""
    sentences = [f"{facts['name']} serves {price}{facts['food']} food {AREAS[facts['area']]}."]
    if "rating" in facts:
        sentences.append(f"Guests give it {facts['rating'][0]} out of 5 stars.")
    if "children" in facts:
        sentences.append(CHILDREN[facts["children"]])
    return " ".join(sentences)


def main(folder: Path) -> None:
    rng, names = random.Random(0), set()
    for split, size in SIZES.items():
        rows, own = [], set()
        while len(rows) < size:
            facts = draw_facts(rng)
            if facts["name"] in names:  # of another split
                continue
            own.add(facts["name"])
            text = ", ".join(f"{kind}: {value}" for kind, value in facts.items())
            rows.append({"input": text, "target": describe(facts)})
        names |= own
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
