# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Writes train.jsonl and test.jsonl: `python recipes/data/journeys/generate.py [folder]`."""

import json
import random
import sys
from pathlib import Path


TRAIN_ROWS, TEST_ROWS = 600, 200

# The two splits share no template, and half of the values that fill the templates of the test split are new.
TRAIN_TEMPLATES = [
    "I need a train from {origin} to {destination} {date} .",
    "Is there a bus to {destination} that leaves {origin} {date} ?",
    "{person} is flying from {origin} to {destination} {date} .",
    "Book two seats to {destination} for {person} , please .",
    "How much is a ticket from {origin} to {destination} ? I can pay {price} .",
    "The ferry from {origin} reaches {destination} {date} .",
    "{person} arrives from {origin} {date} and needs a room .",
    "Coming from {origin} , {person} will be in {destination} {date} .",
    "A single to {destination} costs {price} , said {person} .",
    "We leave {origin} {date} and sleep in {destination} .",
    "Please send the {price} for the trip to {destination} to {person} .",
    "{person} asked whether anything goes to {destination} {date} .",
    "{date} the night train out of {origin} is full .",
    "Tell {person} that the coach to {destination} was cancelled .",
    "My flight from {origin} was late , so I missed the one to {destination} .",
    "{date} I have to be in {destination} , and I start in {origin} .",
    "Can {person} change the seat on the way to {destination} ?",
    "The fare out of {origin} went up to {price} {date} .",
    "{person} paid {price} for a bed on the boat to {destination} .",
    "Which platform is the {destination} train from ? It comes in from {origin} .",
    "Cancel the booking of {person} for {date} .",
    "I want to get away from {origin} {date} , no matter where .",
    "With {person} in the car we drove from {origin} all the way to {destination} .",
    "There is nothing to {destination} under {price} {date} .",
    "{person} and {person} set off from {origin} {date} .",
    "It is far from {origin} to {destination} , and {person} gets tired .",
    "Could you drop {person} in {destination} {date} ?",
    "From {origin} the way to {destination} takes nine hours .",
    "{date} {person} moves to {destination} for good .",
    "A taxi to {destination} would be {price} , which is too much .",
    "The parcel left {origin} {date} and is addressed to {person} .",
    "Back in {destination} , {person} slept for a whole day .",
    "To {destination} ? That bus starts in {origin} {date} .",
    "{person} will pick you up in {origin} {date} .",
    "Refund {price} to {person} , the tour began in {origin} too late .",
    "We hope to see {person} in {destination} {date} .",
]
TEST_TEMPLATES = [
    "Find me a flight to {destination} from {origin} {date} .",
    "{person} takes the early bus from {origin} {date} .",
    "Does {person} know that the ticket to {destination} is {price} ?",
    "The road out of {origin} is closed {date} , go to {destination} by boat .",
    "{date} we travel from {origin} to {destination} with {person} .",
    "For {price} you get from {origin} to {destination} .",
    "{person} has never been to {destination} .",
    "Our train to {destination} left {origin} without {person} .",
    "Please book {person} a seat to {destination} {date} .",
    "The ship sails from {origin} {date} and the cabin is {price} .",
    "I am leaving {origin} for {destination} {date} .",
    "Ask {person} about the fare from {origin} , I heard {price} .",
    "{person} flew to {destination} {date} and paid {price} .",
    "Will {person} meet us in {destination} {date} ?",
    "Somebody from {origin} sent {person} {price} .",
    "{date} is too late , the last coach to {destination} goes before .",
]
# (of both splits, of the test split only)
FIRST_NAMES = (
    "Nora Emil Florence Tariq Ines Oscar Charlotte Wei Marta Jonas Amara Sydney Pavel Lucia Kofi Greta Austin Yuki",
    "Paris Dmitri Salma Henrik Victoria Mateo Ngozi Elsa Devon Farid",
)
LAST_NAMES = (
    "Lind Okafor Berger Santos Haddad Novak Moreau Tanaka Hill Costa Weber Singh",
    "Kowalski Mensah Fischer London Duarte Larsen",
)
PLACES = (
    "Leeds,Oslo,Vienna,Porto,Florence,Lyon,New York,Cairo,Bergen,Austin,Riga,Kyoto,Hull,San Diego,Dublin,Charlotte,"
    "Krakow,Bonn,Sydney,Ghent,Cape Town,Malaga,Tartu,Quebec,Basel,Izmir",
    "Paris,Lima,Hong Kong,Victoria,Turin,Aberdeen,Graz,London,Los Angeles,Nairobi,Lille,Bilbao,Utrecht,Odense",
)
DATES = (
    "on Monday,on Tuesday,on Friday,tomorrow,tonight,next week,on 3 May,on 21 June,on the 2nd of March,this afternoon,"
    "at noon,at half past nine,on Sunday morning,at 7 pm,in two days,on 14 August,early on Thursday,at six o'clock",
    "on Wednesday,on Saturday night,next month,on 9 October,on the 30th of January,at a quarter to four,at 11 am,"
    "the day after tomorrow,on 17 December,in three weeks",
)
PRICES = (
    "20 euros,9 pounds,150 dollars,35 euros,two hundred crowns,48 pounds,12 dollars,sixty euros,75 francs,5 euros",
    "90 euros,thirty pounds,410 dollars,17 francs,eight hundred crowns,66 euros",
)
OPENINGS = ["", "", "", "", "Hello , ", "Well , ", "Listen : ", "One more thing : "]
CLOSINGS = ["", "", "", "", " Thanks !", " Is that right ?", " It is urgent .", " Please confirm ."]


def choose(rng: random.Random, names: tuple[str, str], is_test: bool, separator: str = ",") -> str:
    """Draws a name. In the test split, half of the names are from the second list."""
    return rng.choice(names[is_test and rng.random() < 0.5].split(separator))


def fill(rng: random.Random, template: str, is_test: bool) -> dict:
    """Returns one row. The words that fill a slot have the name of the slot as their tag."""
    tokens, tags, places = [], [], []
    words = (rng.choice(OPENINGS) + template + rng.choice(CLOSINGS)).split()
    for word in words:
        if not word.startswith("{"):
            tokens.append(word)
            tags.append("O")
            continue
        slot = word.strip("{}")
        if slot == "person":
            value = choose(rng, FIRST_NAMES, is_test, " ")
            value += " " + choose(rng, LAST_NAMES, is_test, " ") if rng.random() < 0.5 else ""
        elif slot in ("origin", "destination"):
            value = choose(rng, PLACES, is_test)
            while value in places:
                value = choose(rng, PLACES, is_test)
            places.append(value)
        else:
            value = choose(rng, {"date": DATES, "price": PRICES}[slot], is_test)
        tokens += value.split()
        tags += [f"B-{slot}"] + [f"I-{slot}"] * (len(value.split()) - 1)
    return {"tokens": tokens, "ner_tags": tags}


def generate(rng: random.Random, templates: list[str], count: int, is_test: bool) -> list[dict]:
    """Returns different rows, with about equally many of each template."""
    rows = {}
    while len(rows) < count:
        row = fill(rng, templates[len(rows) % len(templates)], is_test)
        rows.setdefault(" ".join(row["tokens"]), row)
    rows = list(rows.values())
    rng.shuffle(rows)
    return rows


def main(folder: Path) -> None:
    rng = random.Random(0)
    for name, templates, count, is_test in (
        ("train", TRAIN_TEMPLATES, TRAIN_ROWS, False),
        ("test", TEST_TEMPLATES, TEST_ROWS, True),
    ):
        lines = [json.dumps(row) + "\n" for row in generate(rng, templates, count, is_test)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
