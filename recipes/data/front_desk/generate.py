# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Writes context.txt, train.jsonl and test.jsonl: `python recipes/data/front_desk/generate.py [folder]`."""

import json
import random
import sys
from pathlib import Path


TRAIN, TEST = 240, 100

# By desk, what a guest may speak of and what may be wrong with it. Each thing is in one of the examples.
THINGS = {
    "water": ["tap", "shower", "sink", "bath", "toilet", "drain"],
    "electricity": ["lamp", "heater", "kettle", "radio", "fan", "fridge"],
    "linen": ["towel", "sheet", "pillow", "blanket", "bathrobe", "curtain"],
    "furniture": ["door", "chair", "table", "wardrobe", "shelf", "bed"],
}
TROUBLES = {
    "water": ["is dripping", "is blocked", "has no hot water", "is leaking", "makes a gurgling noise"],
    "electricity": ["does not turn on", "is buzzing", "goes off by itself", "gives off sparks", "stays cold"],
    "linen": ["is dirty", "is missing", "is still wet", "has a stain", "smells of smoke"],
    "furniture": ["is broken", "is creaking", "has come loose", "wobbles", "has a crack"],
}
SENTENCES = [
    "The {thing} in room {room} {trouble}.",
    "Hello, this is room {room}, our {thing} {trouble}.",
    "I am calling from room {room} because the {thing} {trouble}.",
    "Good morning, the {thing} {trouble} here in room {room}.",
    "Sorry to trouble you, but in room {room} the {thing} {trouble}.",
    "We are in room {room} and the {thing} {trouble}.",
]
INSTRUCTION = (
    "You keep the log at the front desk of the Heron House. Answer each message of a guest with one entry for the log "
    "and nothing else. These entries were written before:"
)


def draw_row(rng: random.Random, desk: str, thing: str) -> dict[str, str]:
    """Returns the message of a guest, and the entry for the log."""
    room = rng.randint(2, 60)
    message = rng.choice(SENTENCES).format(thing=thing, room=room, trouble=rng.choice(TROUBLES[desk]))
    return {"input": message, "target": f"#{room} | {thing} | {desk}"}


def make_rows(count: int, rng: random.Random, known: set[str]) -> list[dict[str, str]]:
    """Returns rows, each thing as often, with messages that are not in `known`, and adds the messages to it."""
    kinds, rows = [(desk, thing) for desk, things in THINGS.items() for thing in things], []
    while len(rows) < count:
        row = draw_row(rng, *kinds[len(rows) % len(kinds)])
        if row["input"] not in known:
            known.add(row["input"])
            rows.append(row)
    rng.shuffle(rows)
    return rows


def write_context(rows: list[dict[str, str]]) -> str:
    """The instruction, and the rows as worked examples."""
    examples = (f"Message: {row['input']}\nEntry: {row['target']}" for row in rows)
    return "\n\n".join([INSTRUCTION, *examples]) + "\n"


def main(folder: Path) -> None:
    known, rng = set(), random.Random(1)
    examples = make_rows(sum(map(len, THINGS.values())), rng, known)
    (folder / "context.txt").write_text(write_context(examples), encoding="utf-8")
    for name, count in (("train", TRAIN), ("test", TEST)):
        rows = make_rows(count, rng, known)
        if name == "train":  # no answers: the model that reads the context writes them
            rows = [{"input": row["input"]} for row in rows]
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
