"""The demo world: a small instruction-following language, made by rules from a seed, and the byte-level BPE that reads it.

A row asks for one of seven things (or for two of them in turn) to be done to a text of a few plain words. `write_demo` writes
its data sets and the teacher's pre-training text. `python -m data.demo` trains the tokenizer that ships in data/demo_bpe.
"""

import json
import random
from collections import Counter, namedtuple
from pathlib import Path

import regex
from tiktoken_ext.openai_public import r50k_pat_str

from data.cli import write_atomic
from data.rows import fill_template
from data.tokenizer import END, LETTER_OF_BYTE

TOKENIZER_DIR = Path(__file__).parent / "demo_bpe"


VOCABULARY = 1000  # at most: training ends when every word of its text is one token


# ---------------------------------------------------------------------------------------------------------------------------
# The words. Pre-training meets the new ones; fine-tuning and distillation do not, and the set "words" is about them.
Words = namedtuple("Words", "animals things opposites pasts")


WORDS = Words(
    animals="bear cat cow dog fox goat horse lion pig sheep".split(),
    things="barn boat book chair door flag hat key lamp tower".split(),
    opposites="big small old new hot cold fast slow wet dry".split(),  # pairs of adjectives
    pasts="finds found sees saw holds held pulls pulled hides hid".split(),  # pairs of verbs, present and past
)


NEW_WORDS = Words(
    animals="camel otter rabbit swan tiger".split(),
    things="basket candle ladder mill wagon".split(),
    opposites="wide narrow clean dirty loud quiet".split(),
    pasts="carries carried loses lost".split(),
)


ALL_WORDS = Words(*(old + new for old, new in zip(WORDS, NEW_WORDS)))


OPPOSITE = {
    word: other
    for pair in zip(ALL_WORDS.opposites[::2], ALL_WORDS.opposites[1::2])
    for word, other in (pair, pair[::-1])
}


PAST = dict(zip(ALL_WORDS.pasts[::2], ALL_WORDS.pasts[1::2]))


QUALITIES = "colour size age price shape weight name owner".split()


REPAIRS = ["no wait", "sorry", "i mean", "or rather"]  # what a speaker says who corrects himself


PLACES = ["near", "behind", "under", "beside"]


# ---------------------------------------------------------------------------------------------------------------------------
# The tasks: what each does to the words of a text, and how it is asked for.
SLIP = regex.compile(
    rf"the (?:\w+ ){{1,3}}(?:{'|'.join(REPAIRS)}) "
)  # "the colour no wait " the size ...


TASKS = {
    "sort": sorted,
    "adjectives": lambda words: [word for word in words if word not in OPPOSITE],
    "animals": lambda words: [word for word in words if word in ALL_WORDS.animals],
    "others": lambda words: [word for word in words if word not in ALL_WORDS.animals],
    "opposite": lambda words: [OPPOSITE.get(word, word) for word in words],
    "past": lambda words: [PAST.get(word, word) for word in words],
    "correct": lambda words: SLIP.sub("", " ".join(words)).split(),
}


SENTENCE_TASKS = {
    "adjectives",
    "opposite",
    "past",
}  # these take a sentence; all but "past" and "correct", a list


# How a task is asked for in training, moreover in pre-training, and in the set "wording" alone.
WORDINGS = {
    "sort": (
        [
            "sort the words",
            "sort the text by the alphabet",
            "put the words in alphabetical order",
            "write the words from a to z",
        ],
        [
            "arrange the list by the alphabet",
            "order the words from a to z",
            "give the words in alphabetical order",
        ],
        [
            "arrange the words from a to z",
            "list the text in alphabetical order",
            "order the text by the alphabet",
        ],
    ),
    "adjectives": (
        [
            "remove the adjectives",
            "delete all the adjectives",
            "write the text without adjectives",
            "drop the adjectives",
        ],
        [
            "leave out all the adjectives",
            "take the describing words out",
            "remove the describing words",
        ],
        [
            "leave out the describing words",
            "take all the adjectives out",
            "say the text without describing words",
        ],
    ),
    "animals": (
        [
            "keep only the animals",
            "list only the animals",
            "write the animals",
            "find all the animals",
        ],
        ["name the living things", "pick out the animals", "keep the living things"],
        ["pick only the animals", "list the living things", "name all the animals"],
    ),
    "others": (
        [
            "remove the animals",
            "delete all the animals",
            "write the text without animals",
            "drop the animals",
        ],
        ["leave out all the animals", "take the living things out", "remove the living things"],
        ["leave out the living things", "take all the animals out", "say the text without animals"],
    ),
    "opposite": (
        [
            "replace the adjectives with their opposites",
            "change the adjectives to their opposites",
            "use opposite adjectives",
        ],
        [
            "swap each adjective for its opposite",
            "give the opposite of each adjective",
            "make the describing words opposite",
        ],
        ["swap the adjectives for their opposites", "change each adjective to its opposite"],
    ),
    "past": (
        [
            "write the text in the past tense",
            "put the verb in the past tense",
            "say that it happened yesterday",
        ],
        ["change the verb to the past", "tell it as if it happened long ago", "make it past tense"],
        [
            "tell the text in the past tense",
            "change it to the past",
            "write as if it happened yesterday",
        ],
    ),
    "correct": (
        [
            "correct the question",
            "fix the question",
            "remove the slip from the question",
            "write the question without the slip",
        ],
        [
            "clean up the question",
            "write what the speaker meant",
            "repair the slip in the question",
        ],
        ["repair the question", "say what the speaker meant", "clean the slip from the question"],
    ),
}


TRAIN, PRETRAIN, UNSEEN = 0, 1, 2


PAIRS = [
    ("adjectives", "sort"),
    ("opposite", "animals"),
    ("others", "adjectives"),
    ("adjectives", "past"),
    ("sort", "others"),
]


UNSEEN_PAIRS = [
    ("animals", "sort"),
    ("opposite", "others"),
    ("adjectives", "animals"),
    ("opposite", "past"),
    ("sort", "adjectives"),
]


def make_text(rng, tasks, words, longer=False):
    """A text that the tasks can be done to, as a list of words: a question with a slip, a sentence, or a list."""

    def thing():
        adjectives = rng.sample(words.opposites, rng.choice([1, 1, 2] if longer else [0, 1, 1]))
        return ["the", *adjectives, rng.choice(words.animals + words.things)]

    def place():
        return [rng.choice(PLACES), *thing()]

    if "correct" in tasks:
        slip, quality = rng.sample(QUALITIES, 2)
        repair, ending = (
            rng.choice(REPAIRS).split(),
            [*thing(), *(place() + place() if longer else [])],
        )
        if rng.random() < 0.5:
            return ["what", "is", "the", slip, *repair, "the", quality, "of", *ending]
        return ["what", "is", "the", quality, "of", *thing(), *repair, *ending]
    if "past" in tasks or set(tasks) <= SENTENCE_TASKS and rng.random() < 0.5:
        ending = place() + place() if longer else rng.choice([[], place()])
        return [*thing(), rng.choice(words.pasts[::2]), *thing(), *ending]
    text = rng.sample(words.animals, rng.randint(3, 5))
    text += rng.sample(words.things, rng.randint(4, 5) if longer else rng.randint(1, 3))
    text += rng.sample(words.opposites, rng.randint(4, 5) if longer else rng.randint(2, 3))
    return rng.sample(text, len(text))


def ask(rng, tasks, kinds):
    """How the tasks, one after the other, are asked for."""
    request = " and then ".join(
        rng.choice([wording for kind in kinds for wording in WORDINGS[task][kind]])
        for task in tasks
    )
    return rng.choice([request, "please " + request]).capitalize()


def answer(tasks, words):
    """The words after the tasks were done to them, one after the other."""
    for task in tasks:
        words = TASKS[task](words)
    return words


def join(words):
    return " ".join(words) + ("?" if words[0] == "what" else "")


def make_row(rng, tasks, kinds=(TRAIN,), words=WORDS, longer=False):
    """A row: instruction, input (empty in a quarter of the rows, which have the text in the instruction) and output."""
    text = make_text(rng, tasks, words, longer)
    request, output = ask(rng, tasks, kinds), join(answer(tasks, text))
    if rng.random() < 0.25:
        return {"instruction": f"{request}: {join(text)}", "input": "", "output": output}
    return {"instruction": f"{request}.", "input": join(text), "output": output}


def make_rows(rng, count, used, pairs=PAIRS, pair_share=0.2, **how):
    """`count` rows, of which about `pair_share` ask for two tasks in turn. No text of theirs is in `used`, which they join."""
    rows = []
    while len(rows) < count:
        tasks = rng.choice(pairs) if rng.random() < pair_share else [rng.choice([*TASKS])]
        row = make_row(rng, tasks, **how)
        text = row["input"] or row["instruction"].split(": ")[1]
        if text not in used:
            used.add(text)
            rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------------------------
# The pre-training text. A soft prompt moves the request away from position 0 and says something first; the teacher takes no
# harm from it only if its pre-training text did both: the trainer packs the documents, and here many of them have preambles.
def make_preamble(rng):
    """A sentence to stand before a request, mostly one that says who the reader is."""
    who = " ".join(
        [
            "a",
            *rng.choice([[], [rng.choice("young kind careful good new clever patient".split())]]),
            rng.choice(
                "student student student teacher child reader writer farmer doctor friend beginner".split()
            ),
        ]
    )
    opening = rng.choice(
        ["Suppose", "Imagine", "Pretend", "Assume", "Suppose that", "Imagine that"]
    )
    return rng.choice(
        [
            f"{opening} you are {who}.",
            f"{opening} you are {who}.",
            f"{opening} I am {who}.",
            f"You are {who}.",
            f"Answer like {who}.",
            f"Here is a task for {who}.",
            "Read the task with care.",
            "Think before you write.",
        ]
    )


def make_fact(rng):
    """A sentence or two about the words, the new ones among them."""
    words, place = ALL_WORDS, rng.choice(PLACES)
    adjective, animal, thing, present = (
        rng.choice(pool)
        for pool in [words.opposites, words.animals, words.things, words.pasts[::2]]
    )
    first, second = sorted(rng.sample(words.animals + words.things + words.opposites, 2))
    return rng.choice(
        [
            f"The {animal} is an animal and a living thing. The {thing} is no animal.",
            f"The opposite of {adjective} is {OPPOSITE[adjective]}. Both are adjectives, or describing words.",
            f"Today the {animal} {present} the {adjective} {thing}. Yesterday the {animal} {PAST[present]} the {adjective} {thing}.",
            f"In the alphabet {first} comes before {second}.",
            f"The {adjective} {animal} is {place} the {thing}. The {thing} is not {place} the {adjective} {animal}.",
        ]
    )


def make_copy(rng, used):
    """A list a few times over. Small models learn to copy from the context, which all the tasks need, from this first."""
    text = join(make_text(rng, ["sort"], ALL_WORDS))
    used.add(text)
    return "\n".join([text] * rng.randint(3, 5))


def make_lesson(rng, used):
    """A text, and one request after another about it with the response: for its length there is most to learn from this."""
    group = rng.choice(
        [
            ["sort", "adjectives", "animals", "others", "opposite"],
            ["adjectives", "opposite", "past"],
            ["correct"],
        ]
    )
    text = make_text(rng, group, ALL_WORDS)
    lines = [join(text)]
    used.add(lines[0])
    for task in rng.sample(group, min(3, len(group))):
        lines += [ask(rng, [task], (TRAIN, PRETRAIN)) + ".", join(answer([task], text))]
    return "\n".join(lines)


def make_document(rng, used):
    """A text for pre-training: a fact, a copy, a lesson, or a row in the template, often behind a preamble."""
    kind = rng.choices(["fact", "copy", "lesson", "row"], [5, 25, 35, 35])[0]
    if kind == "fact":
        return make_fact(rng)
    if kind == "copy":
        return make_copy(rng, used)
    if kind == "lesson":
        return make_lesson(rng, used)
    [row] = make_rows(rng, 1, used, kinds=(TRAIN, PRETRAIN), words=rng.choice([WORDS, ALL_WORDS]))
    preamble = (
        make_preamble(rng) + rng.choice(["", "\n", " " + make_preamble(rng) + "\n"])
        if rng.random() < 0.8
        else ""
    )
    return preamble + fill_template(row["instruction"], row["input"]) + row["output"]


def make_documents(seed, count=24_000):
    """The pre-training text, and the texts that its requests are about."""
    rng, used = random.Random(seed), set()
    return [make_document(rng, used) for _ in range(count)], used


def write_demo(directory, seed=10):
    """Write the demo's data sets in `directory`: train, dev, test and pretrain, and the four held-out sets in its subfolders."""
    directory = Path(directory)
    documents, used = make_documents(seed)
    rng = random.Random(seed + 1)
    sets = {
        "train": make_rows(rng, 4000, used),
        "dev": make_rows(rng, 200, used),
        "test": make_rows(rng, 200, used),
        "wording/test": make_rows(rng, 200, used, kinds=(UNSEEN,)),
        "words/test": make_rows(rng, 200, used, words=NEW_WORDS),
        "longer/test": make_rows(rng, 200, used, longer=True),
        "combined/test": make_rows(rng, 200, used, pairs=UNSEEN_PAIRS, pair_share=1),
        "pretrain": [{"text": text} for text in documents],
    }
    for name, items in sets.items():
        write_atomic(
            directory / f"{name}.jsonl", "".join(json.dumps(item) + "\n" for item in items)
        )


# ---------------------------------------------------------------------------------------------------------------------------
# The tokenizer: GPT-2's byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), trained on the pre-training text.
def train_bpe(texts, merge_count):
    """The merges, in order, that byte-pair encoding learns from the texts: again and again, join the most frequent pair."""
    pieces = Counter(piece for text in texts for piece in regex.findall(r50k_pat_str, text))
    words = {piece: [LETTER_OF_BYTE[byte] for byte in piece.encode()] for piece in pieces}
    merges = []
    while len(merges) < merge_count:
        pairs = Counter()
        for piece, word in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += pieces[piece]
        if not pairs:
            break  # every piece is one token
        left, right = max(
            pairs, key=lambda pair: (pairs[pair], pair)
        )  # by the pair too, so that a tie is no chance
        merges.append((left, right))
        for word in words.values():
            for i in range(len(word)):
                if word[i : i + 2] == [left, right]:
                    word[i : i + 2] = [left + right]
    return merges


def write_tokenizer(directory, seed=10):
    """Train the BPE on the demo's pre-training text and write vocab.json and merges.txt. As in GPT-2, an id is a merge's rank."""
    merges = train_bpe(make_documents(seed)[0], VOCABULARY - 257)
    tokens = [*LETTER_OF_BYTE.values(), *(left + right for left, right in merges), END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    write_atomic(Path(directory) / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_atomic(
        Path(directory) / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    )


if __name__ == "__main__":
    write_tokenizer(TOKENIZER_DIR)
