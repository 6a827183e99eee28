"""The demo's synthetic data: a small language of instructions.

A row asks for one of seven tasks, or for two in turn, on a text of a few plain words. `write_demo`
writes the data sets and the teacher's pre-training text, which depend on a seed only.
"""

import json
import random
import re
from collections import namedtuple
from pathlib import Path

from data.cli import write_atomic
from data.rows import fill_template

TOKENIZER_DIR = Path(__file__).parent / "demo_bpe"  # trained by tests/make_demo_bpe.py

# The words: adjectives in pairs of opposites, verbs in pairs of present and past tense. NEW_WORDS
# occur in pre-training and in the test set "words", never in fine-tuning or distillation.
Words = namedtuple("Words", "animals things opposites pasts")
WORDS = Words(
    animals="bear cat cow dog fox goat horse lion pig sheep".split(),
    things="barn boat book chair door flag hat key lamp tower".split(),
    opposites="big small old new hot cold fast slow wet dry".split(),
    pasts="finds found sees saw holds held pulls pulled hides hid".split(),
)
NEW_WORDS = Words(
    animals="camel otter rabbit swan tiger".split(),
    things="basket candle ladder mill wagon".split(),
    opposites="wide narrow clean dirty loud quiet".split(),
    pasts="carries carried loses lost".split(),
)
ALL_WORDS = Words(*(old + new for old, new in zip(WORDS, NEW_WORDS)))

OPPOSITE = dict(zip(ALL_WORDS.opposites[::2], ALL_WORDS.opposites[1::2]))
OPPOSITE |= {second: first for first, second in OPPOSITE.items()}
PAST = dict(zip(ALL_WORDS.pasts[::2], ALL_WORDS.pasts[1::2]))

QUALITIES = "colour size age price shape weight name owner".split()
REPAIRS = ["no wait", "sorry", "i mean", "or rather"]  # said before correcting oneself
PLACES = ["near", "behind", "under", "beside"]

# What is corrected in a question: "the colour no wait " before "the size of ..."
SLIP = re.compile(rf"the (?:\w+ ){{1,3}}(?:{'|'.join(REPAIRS)}) ")


# --- Tasks: what each makes of the words of a text
TASKS = {
    "sort": sorted,
    "adjectives": lambda words: [word for word in words if word not in OPPOSITE],
    "animals": lambda words: [word for word in words if word in ALL_WORDS.animals],
    "others": lambda words: [word for word in words if word not in ALL_WORDS.animals],
    "opposite": lambda words: [OPPOSITE.get(word, word) for word in words],
    "past": lambda words: [PAST.get(word, word) for word in words],
    "correct": lambda words: SLIP.sub("", " ".join(words)).split(),
}

# Each task's wordings: of training and all other sets, in addition to them of pre-training, and of
# the test set "wording" only.
TRAIN_WORDINGS = {
    "sort": "sort the words/sort the text by the alphabet/put the words in alphabetical order/"
    "write the words from a to z",
    "adjectives": "remove the adjectives/delete all the adjectives/"
    "write the text without adjectives/drop the adjectives",
    "animals": "keep only the animals/list only the animals/write the animals/find all the animals",
    "others": "remove the animals/delete all the animals/write the text without animals/"
    "drop the animals",
    "opposite": "replace the adjectives with their opposites/"
    "change the adjectives to their opposites/use opposite adjectives",
    "past": "write the text in the past tense/put the verb in the past tense/"
    "say that it happened yesterday",
    "correct": "correct the question/fix the question/remove the slip from the question/"
    "write the question without the slip",
}
EXTRA_WORDINGS = {
    "sort": "arrange the list by the alphabet/order the words from a to z/"
    "give the words in alphabetical order",
    "adjectives": "leave out all the adjectives/take the describing words out/"
    "remove the describing words",
    "animals": "name the living things/pick out the animals/keep the living things",
    "others": "leave out all the animals/take the living things out/remove the living things",
    "opposite": "swap each adjective for its opposite/give the opposite of each adjective/"
    "make the describing words opposite",
    "past": "change the verb to the past/tell it as if it happened long ago/make it past tense",
    "correct": "clean up the question/write what the speaker meant/repair the slip in the question",
}
PRETRAIN_WORDINGS = {t: f"{text}/{EXTRA_WORDINGS[t]}" for t, text in TRAIN_WORDINGS.items()}
UNSEEN_WORDINGS = {
    "sort": "arrange the words from a to z/list the text in alphabetical order/"
    "order the text by the alphabet",
    "adjectives": "leave out the describing words/take all the adjectives out/"
    "say the text without describing words",
    "animals": "pick only the animals/list the living things/name all the animals",
    "others": "leave out the living things/take all the animals out/say the text without animals",
    "opposite": "swap the adjectives for their opposites/change each adjective to its opposite",
    "past": "tell the text in the past tense/change it to the past/"
    "write as if it happened yesterday",
    "correct": "repair the question/say what the speaker meant/clean the slip from the question",
}

# Two tasks in turn: in training, and in the test set "combined" only.
PAIRS = "adjectives+sort opposite+animals others+adjectives adjectives+past sort+others".split()
NEW_PAIRS = "animals+sort opposite+others adjectives+animals opposite+past sort+adjectives".split()


def make_text(rng, tasks, words, longer=False):
    """A text that suits all the tasks, as words: a corrected question, a sentence, or a list."""

    def thing():
        adjectives = rng.sample(words.opposites, rng.choice([1, 1, 2] if longer else [0, 1, 1]))
        return ["the", *adjectives, rng.choice(words.animals + words.things)]

    def place():
        return [rng.choice(PLACES), *thing()]

    if "correct" in tasks:
        wrong, quality = rng.sample(QUALITIES, 2)
        repair = rng.choice(REPAIRS).split()
        ending = thing() + (place() + place() if longer else [])
        if rng.random() < 0.5:
            return ["what", "is", "the", wrong, *repair, "the", quality, "of", *ending]
        return ["what", "is", "the", quality, "of", *thing(), *repair, *ending]
    # "past" needs a sentence, and these two tasks also take one.
    if "past" in tasks or (set(tasks) <= {"adjectives", "opposite"} and rng.random() < 0.5):
        ending = place() + place() if longer else rng.choice([[], place()])
        return [*thing(), rng.choice(words.pasts[::2]), *thing(), *ending]
    text = rng.sample(words.animals, rng.randint(3, 5))
    text += rng.sample(words.things, rng.randint(4, 5) if longer else rng.randint(1, 3))
    text += rng.sample(words.opposites, rng.randint(4, 5) if longer else rng.randint(2, 3))
    return rng.sample(text, len(text))


def make_request(rng, tasks, wordings):
    """A request for the tasks, one after the other."""
    request = " and then ".join(rng.choice(wordings[task].split("/")) for task in tasks)
    return rng.choice([request, f"please {request}"]).capitalize()


def join(words):
    return " ".join(words) + ("?" if words[0] == "what" else "")


def make_rows(rng, n, used, pairs=None, wordings=TRAIN_WORDINGS, words=WORDS, longer=False):
    """`n` rows with texts that are not in the set `used`, which they are added to. A fifth asks for
    two tasks in turn, or all if `pairs` are given; a quarter has the text in the instruction."""
    rows = []
    while len(rows) < n:
        is_pair = rng.random() < (1 if pairs else 0.2)
        tasks = rng.choice((pairs or PAIRS) if is_pair else [*TASKS]).split("+")
        output = make_text(rng, tasks, words, longer)
        text, request = join(output), make_request(rng, tasks, wordings)
        for task in tasks:
            output = TASKS[task](output)
        row = {"instruction": f"{request}.", "input": text, "output": join(output)}
        if rng.random() < 0.25:
            row |= {"instruction": f"{request}: {text}", "input": ""}
        if text not in used:
            used.add(text)
            rows.append(row)
    return rows


# --- Pre-training text
#
# A soft prompt moves the request away from position 0 and puts an unrelated text before it. The
# teacher tolerates that only if its pre-training had both. So the trainer packs documents into
# blocks, and most requests here have a preamble.
def make_preamble(rng):
    """A sentence to put before a request. Most say who the reader is, like the paper's prompt."""
    adjectives = "young kind careful good new clever patient".split()
    adjective = rng.choice(["", rng.choice(adjectives) + " "])
    people = "student student student teacher child reader writer farmer doctor friend beginner"
    who = f"a {adjective}{rng.choice(people.split())}"
    opening = rng.choice("Suppose/Imagine/Pretend/Assume/Suppose that/Imagine that".split("/"))
    sentences = [f"{opening} you are {who}."] * 2 + [f"{opening} I am {who}.", f"You are {who}."]
    sentences += [f"Answer like {who}.", f"Here is a task for {who}."]
    return rng.choice([*sentences, "Read the task with care.", "Think before you write."])


def make_fact(rng):
    """One or two sentences about the words, including the new ones."""
    words, place = ALL_WORDS, rng.choice(PLACES)
    quality, animal = rng.choice(words.opposites), rng.choice(words.animals)
    thing, present = rng.choice(words.things), rng.choice(words.pasts[::2])
    first, second = sorted(rng.sample(words.animals + words.things + words.opposites, 2))
    past, opposite, what = PAST[present], OPPOSITE[quality], f"the {quality} {thing}"
    facts = [
        f"The {animal} is an animal and a living thing. The {thing} is no animal.",
        f"The opposite of {quality} is {opposite}. Both are adjectives, or describing words.",
        f"Today the {animal} {present} {what}. Yesterday the {animal} {past} {what}.",
        f"In the alphabet {first} comes before {second}.",
        f"The {quality} {animal} is {place} the {thing}. "
        f"The {thing} is not {place} the {quality} {animal}.",
    ]
    return rng.choice(facts)


def make_document(rng, used):
    """A text for pre-training. Most rows in the template have a preamble."""
    kind = rng.choices(["fact", "copy", "lesson", "row"], [5, 25, 35, 35])[0]
    if kind == "fact":
        return make_fact(rng)
    if kind == "copy":
        # A list, repeated: all the tasks need to copy from the context, so a model learns it first.
        text = join(make_text(rng, ["sort"], ALL_WORDS))
        used.add(text)
        return "\n".join([text] * rng.randint(3, 5))
    if kind == "lesson":
        # A text, then several requests about it and their responses: much to learn in few tokens.
        list_tasks = ["sort", "adjectives", "animals", "others", "opposite"]
        group = rng.choice([list_tasks, ["adjectives", "opposite", "past"], ["correct"]])
        text = make_text(rng, group, ALL_WORDS)
        lines = [join(text)]
        used.add(lines[0])
        for task in rng.sample(group, min(3, len(group))):
            request = make_request(rng, [task], PRETRAIN_WORDINGS) + "."
            lines += [request, join(TASKS[task](text))]
        return "\n".join(lines)
    words = rng.choice([WORDS, ALL_WORDS])
    [row] = make_rows(rng, 1, used, wordings=PRETRAIN_WORDINGS, words=words)
    preamble = ""
    if rng.random() < 0.8:
        preamble = make_preamble(rng) + rng.choice(["", "\n", " " + make_preamble(rng) + "\n"])
    return preamble + fill_template(row["instruction"], row["input"]) + row["output"]


def make_documents(seed, count=24_000):
    """The pre-training documents, and the set of texts that their requests are about."""
    rng, used = random.Random(seed), set()
    return [make_document(rng, used) for _ in range(count)], used


def write_demo(directory, seed=10):
    """Write the data sets: train, dev, test and pretrain, and four test sets in subdirectories."""
    documents, used = make_documents(seed)
    rng = random.Random(seed + 1)
    sets = {
        "train": make_rows(rng, 4000, used),
        "dev": make_rows(rng, 200, used),
        "test": make_rows(rng, 200, used),
        "wording/test": make_rows(rng, 200, used, wordings=UNSEEN_WORDINGS),
        "words/test": make_rows(rng, 200, used, words=NEW_WORDS),
        "longer/test": make_rows(rng, 200, used, longer=True),
        "combined/test": make_rows(rng, 200, used, pairs=NEW_PAIRS),
        "pretrain": [{"text": text} for text in documents],
    }
    for name, rows in sets.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        write_atomic(Path(directory) / f"{name}.jsonl", "".join(lines))
