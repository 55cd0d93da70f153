# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Writes train.jsonl and test.jsonl: `python recipes/data/notices/generate.py [folder]`."""

import json
import random
import sys
from pathlib import Path


TRAIN_NOTICES, TEST_NOTICES = 150, 50
QUESTIONS = 4  # per notice
UNANSWERABLE = 0.15  # share of the questions

# For each kind of fact, the sentences that state it and the questions that ask for it. The two splits have different
# sentences and questions, and half of the values of the test split are new. {event} comes without an article.
TITLES = (
    [
        "The {event} is back .",
        "Everyone is welcome at the {event} .",
        "We are planning a {event} .",
        "News on the {event} !",
    ],
    ["A {event} for all of us !", "Here is what we know about the {event} .", "Soon there is another {event} ."],
)
FACTS = {
    "place": (
        [
            "It takes place in {value} .",
            "You find us in {value} .",
            "We meet in {value} .",
            "This year we are in {value} .",
        ],
        ["The venue is {value} .", "Come to {value} .", "Everything happens in {value} ."],
        ["Where is the {event} ?", "Where does the {event} take place ?", "In which place do people meet ?"],
        ["Where do we have to go for the {event} ?", "At what place is the {event} held ?", "Where will it be ?"],
    ),
    "day": (
        ["It is on {value} .", "Keep {value} free .", "The date is {value} .", "Come on {value} ."],
        ["We have chosen {value} .", "It will be on {value} .", "{value} is the day ."],
        ["When is the {event} ?", "On which day is the {event} ?", "What is the date of the {event} ?"],
        ["Which day should I keep free ?", "When does the {event} take place ?", "On what day do we meet ?"],
    ),
    "time": (
        ["Doors open at {value} .", "We start at {value} .", "It begins at {value} sharp .", "Be there by {value} ."],
        ["The first guests may come at {value} .", "Everything starts at {value} .", "Please arrive at {value} ."],
        ["At what time does the {event} start ?", "What time does it begin ?", "At which hour should people come ?"],
        [
            "What time do we have to be there ?",
            "At what time do the doors open ?",
            "How early does the {event} begin ?",
        ],
    ),
    "price": (
        ["Tickets cost {value} .", "The entry is {value} .", "You pay {value} at the door .", "A seat is {value} ."],
        ["The price is {value} .", "We ask for {value} from each guest .", "Bring {value} for the ticket ."],
        ["How much is a ticket ?", "What does the {event} cost ?", "How much do people pay ?"],
        ["What is the price of the {event} ?", "How much money do I need ?", "What do guests have to pay ?"],
    ),
    "leader": (
        ["{value} leads the day .", "{value} is in charge .", "The host is {value} .", "It is run by {value} ."],
        ["{value} will guide us .", "The evening is led by {value} .", "Our host this time is {value} ."],
        ["Who leads the {event} ?", "Who is in charge of the {event} ?", "Who is the host ?"],
        ["Who runs the {event} ?", "Who will be leading it ?", "By whom is the {event} led ?"],
    ),
    "item": (
        ["Please bring {value} .", "Do not forget {value} .", "All you need is {value} .", "Come with {value} ."],
        ["Guests should bring {value} .", "Have {value} with you .", "You will need {value} ."],
        ["What should people bring ?", "What do I need for the {event} ?", "What must nobody forget ?"],
        ["What do guests have to bring ?", "What should I take along ?", "What will everyone need ?"],
    ),
}
# (of both splits, of the test split only)
EVENTS = (
    "book fair,choir evening,garden party,chess night,flower market,dance class,bread course,film night,boat race,"
    "quiz,flea market,poetry reading,pottery class,bird walk,swimming gala,kite festival",
    "jazz concert,puppet show,night hike,cheese tasting,sewing course,stargazing,harvest supper,bicycle tour",
)
FIRST_NAMES = (
    "Nora,Emil,Tariq,Ines,Oscar,Wei,Marta,Jonas,Amara,Pavel,Lucia,Kofi,Greta,Yuki",
    "Dmitri,Salma,Henrik,Mateo,Ngozi,Elsa,Farid",
)
LAST_NAMES = (
    "Lind,Okafor,Berger,Santos,Haddad,Novak,Moreau,Tanaka,Hill,Costa,Weber,Singh",
    "Kowalski,Mensah,Fischer,Duarte,Larsen",
)
VALUES = {
    "place": (
        "the old chapel,Mill Lane,the town hall,the school yard,Harbour Street,the north park,the library,"
        "the boat house,Oak Square,the fire station,the green barn,Castle Road",
        "the village inn,River Street,the city museum,the south gate,Rose Lane,the railway club",
    ),
    "day": (
        "Monday,Tuesday,Friday,3 May,21 June,the last Sunday of July,14 August,Easter Monday,2 March,30 November",
        "Wednesday,Saturday,9 October,17 December,the first Thursday of June",
    ),
    "time": (
        "noon,half past nine,7 pm,six o'clock,10 am,a quarter past five,8:30,three in the afternoon",
        "midnight,a quarter to four,11 am,seven o'clock,6:15",
    ),
    "price": (
        "20 euros,9 pounds,15 dollars,35 euros,two hundred crowns,48 pounds,12 dollars,sixty euros,75 francs,5 euros",
        "90 euros,thirty pounds,17 francs,eight hundred crowns,66 euros",
    ),
    "item": (
        "warm gloves,a pencil,your own cup,sturdy shoes,a blanket,sun cream,two photographs,a big spoon,an apron",
        "an umbrella,a torch,old newspapers,a folding chair,thick socks",
    ),
}


def choose(rng: random.Random, values: tuple[str, str], is_test: bool) -> str:
    """Draws a value. In the test split, half of the values are from the second list."""
    return rng.choice(values[is_test and rng.random() < 0.5].split(","))


def tidy(text: str) -> str:
    """Removes the spaces before punctuation marks, and makes the first letter a capital."""
    text = text.replace(" .", ".").replace(" ?", "?").replace(" !", "!")
    return text[0].upper() + text[1:]


def make_notice(rng: random.Random, is_test: bool) -> list[dict]:
    """Returns the questions on one notice, which states four or five facts in any order."""
    event = choose(rng, EVENTS, is_test)
    kinds = rng.sample(list(FACTS), 5)
    told = kinds[: rng.choice([4, 5])]
    context, found = tidy(rng.choice(TITLES[is_test]).format(event=event)), {}
    for kind in told:
        if kind == "leader":
            value = f"{choose(rng, FIRST_NAMES, is_test)} {choose(rng, LAST_NAMES, is_test)}"
        else:
            value = choose(rng, VALUES[kind], is_test)
        sentence = tidy(rng.choice(FACTS[kind][is_test]).format(value=value))
        start = sentence.lower().index(value.lower())
        found[kind] = (sentence[start : start + len(value)], len(context) + 1 + start)
        context += " " + sentence
    untold = [kind for kind in FACTS if kind not in told]
    asked = rng.sample(told, QUESTIONS)
    rows = []
    for kind in asked:
        kind = rng.choice(untold) if rng.random() < UNANSWERABLE else kind
        text, start = found.get(kind, (None, None))
        answers = {"text": [text], "answer_start": [start]} if text else {"text": [], "answer_start": []}
        question = tidy(rng.choice(FACTS[kind][2 + is_test]).format(event=event))
        rows.append({"context": context, "question": question, "answers": answers})
    return rows


def main(folder: Path) -> None:
    rng = random.Random(0)
    for name, count, is_test in (("train", TRAIN_NOTICES, False), ("test", TEST_NOTICES, True)):
        rows = [row for _ in range(count) for row in make_notice(rng, is_test)]
        rows = {(row["context"], row["question"]): row for row in rows}.values()
        lines = [json.dumps({"id": f"{name}-{i}", **row}) + "\n" for i, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
