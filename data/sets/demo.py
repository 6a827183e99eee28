"""The demo's synthetic data: a small language of instructions.

A row asks for one of eight tasks, or for two in turn, on a text of a few plain words. Many have
several right answers: a list may be written in any order, an adjective has two opposites, and "name
two animals" leaves the choice. People differ in their habits: some write a list as it comes, some
by the alphabet, some in no order at all. The rows for fine-tuning mix them, as Dolly mixes its
thousands of authors; the pre-training text often says who writes.

`data_files` and `pretraining_text` depend on a seed only. MODELS_DIR has models pre-trained on the
text: the demo starts from them as a full run starts from GPT-2.
"""

import random
from collections import namedtuple
from pathlib import Path

import regex

from data.sets.rows import fill_template, to_jsonl

VERSION = "2"  # of the files below; sets of another version are written again
TOKENIZER_DIR = Path(__file__).parent.parent / "demo_bpe"  # trained by tests/make_demo_bpe.py
MODELS_DIR = Path(__file__).parent.parent / "demo_models"  # made by tests/make_demo_models.py
TEACHER, STUDENT = str(MODELS_DIR / "3x128x4"), str(MODELS_DIR / "1x96x4")

# The words: adjectives in fours, the second two the opposites of the first two; verbs in pairs of
# present and past tense. NEW_WORDS occur in pre-training and in the test set "words", never in
# fine-tuning or distillation.
Words = namedtuple("Words", "animals things adjectives verbs")
WORDS = Words(
    animals="bear cat cow dog fox goat horse lion pig sheep".split(),
    things="barn boat book chair door flag hat key lamp tower".split(),
    adjectives="big large small little hot warm cold cool old ancient new modern "
    "fast quick slow lazy".split(),
    verbs="finds found sees saw holds held pulls pulled hides hid".split(),
)
NEW_WORDS = Words(
    animals="camel otter rabbit swan tiger".split(),
    things="basket candle ladder mill wagon".split(),
    adjectives="wide broad narrow thin clean neat dirty muddy".split(),
    verbs="carries carried loses lost".split(),
)
ALL_WORDS = Words(*(old + new for old, new in zip(WORDS, NEW_WORDS)))

OPPOSITES = {}  # of each adjective, its two opposites
for i in range(0, len(ALL_WORDS.adjectives), 4):
    a, b, c, d = ALL_WORDS.adjectives[i : i + 4]
    OPPOSITES |= {a: [c, d], b: [c, d], c: [a, b], d: [a, b]}
PAST = dict(zip(ALL_WORDS.verbs[::2], ALL_WORDS.verbs[1::2]))

QUALITIES = "colour size age price shape weight name owner".split()
REPAIRS = ["no wait", "sorry", "i mean", "or rather"]  # said before correcting oneself
PLACES = ["near", "behind", "under", "beside"]

# What is corrected in a question: "the colour no wait " before "the size of ..."
SELF_CORRECTION = regex.compile(rf"the (?:\w+ ){{1,3}}(?:{'|'.join(REPAIRS)}) ")

# How people order a list, with the shares of those who do, and adjectives that tell who does.
HABITS = {"text": 5, "alphabet": 3, "free": 2}
TELLING = {"text": "busy", "alphabet": "tidy", "free": "dreamy"}
PEOPLE = 12  # who answer a row of a dev or test set; their different answers are its references
ORDER_ERRORS = 0.1  # how often the next word of a list is any of those left, whatever the habit


# --- Tasks
def do_task(rng, task, words):
    """What a task makes of the words of a text. `rng` chooses where it leaves a choice."""
    animals = [word for word in words if word in ALL_WORDS.animals]
    if task == "sort":
        return sorted(words)
    if task == "adjectives":
        return [word for word in words if word not in OPPOSITES]
    if task == "animals":
        return animals
    if task == "others":
        return [word for word in words if word not in animals]
    if task == "opposite":
        return [rng.choice(OPPOSITES.get(word, [word])) for word in words]
    if task == "two":
        return sorted(rng.sample(animals, min(2, len(animals))), key=animals.index)
    if task == "past":
        return [PAST.get(word, word) for word in words]
    return SELF_CORRECTION.sub("", " ".join(words)).split()  # "correct"


def draw_habit(rng):
    return rng.choices([*HABITS], [*HABITS.values()])[0]


def arrange(rng, words, habit):
    """The words of a list in the order in which a person of that habit writes them."""
    words = {"text": words, "alphabet": sorted(words), "free": rng.sample(words, len(words))}[habit]
    arranged = []
    while words:
        i = rng.randrange(len(words)) if rng.random() < ORDER_ERRORS else 0
        arranged.append(words[i])
        words = words[:i] + words[i + 1 :]
    return arranged


def answer(rng, tasks, words, habit):
    """A person's answer to a request for the tasks, in turn, as words."""
    is_list = words[0] not in ("the", "what")
    for task in tasks:
        words = do_task(rng, task, words)
    return arrange(rng, words, habit) if is_list and "sort" not in tasks else words


# Each task's wordings. WORDINGS: of every set but "wording"; EXTRA_WORDINGS: also of pre-training;
# UNSEEN_WORDINGS: of the set "wording" only.
WORDINGS = {
    "sort": "sort the words/sort the text by the alphabet/put the words in alphabetical order/"
    "write the words from a to z",
    "adjectives": "remove the adjectives/delete all the adjectives/"
    "write the text without adjectives/drop the adjectives",
    "animals": "keep only the animals/list only the animals/write the animals/find all the animals",
    "others": "remove the animals/delete all the animals/write the text without animals/"
    "drop the animals",
    "opposite": "replace the adjectives with their opposites/"
    "change the adjectives to their opposites/use opposite adjectives",
    "two": "name two animals/write two of the animals/pick any two animals/"
    "list two animals from the text",
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
    "two": "choose two of the animals/give any two animals/find two animals",
    "past": "change the verb to the past/tell it as if it happened long ago/make it past tense",
    "correct": "clean up the question/write what the speaker meant/repair the slip in the question",
}
PRETRAIN_WORDINGS = {t: f"{text}/{EXTRA_WORDINGS[t]}" for t, text in WORDINGS.items()}
UNSEEN_WORDINGS = {
    "sort": "arrange the words from a to z/list the text in alphabetical order/"
    "order the text by the alphabet",
    "adjectives": "leave out the describing words/take all the adjectives out/"
    "say the text without describing words",
    "animals": "pick only the animals/list the living things/name all the animals",
    "others": "leave out the living things/take all the animals out/say the text without animals",
    "opposite": "swap the adjectives for their opposites/change each adjective to its opposite",
    "two": "choose any two animals/name two of the animals from the text/give two animals",
    "past": "tell the text in the past tense/change it to the past/"
    "write as if it happened yesterday",
    "correct": "repair the question/say what the speaker meant/clean the slip from the question",
}

# Two tasks in turn: in training, and in the test set "combined" only.
PAIRS = "adjectives+sort opposite+animals others+adjectives adjectives+past sort+others".split()
NEW_PAIRS = "others+sort sort+animals others+opposite adjectives+two past+adjectives".split()


# --- Rows
def make_text(rng, tasks, words, longer=False):
    """A text that suits all the tasks, as words: a corrected question, a sentence, or a list."""

    def thing():
        adjectives = rng.sample(words.adjectives, rng.choice([1, 1, 2] if longer else [0, 1, 1]))
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
        return [*thing(), rng.choice(words.verbs[::2]), *thing(), *ending]
    text = rng.sample(words.animals, rng.randint(3, 5))
    text += rng.sample(words.things, rng.randint(4, 5) if longer else rng.randint(1, 3))
    text += rng.sample(words.adjectives, rng.randint(4, 5) if longer else rng.randint(2, 3))
    return rng.sample(text, len(text))


def new_text(rng, tasks, words, used, longer=False):
    """A text as `make_text` gives that is not in the set `used`, which it is added to."""
    while join(text := make_text(rng, tasks, words, longer)) in used:
        pass
    used.add(join(text))
    return text


def make_request(rng, tasks, wordings):
    """A request for the tasks, one after the other."""
    request = " and then ".join(rng.choice(wordings[task].split("/")) for task in tasks)
    return rng.choice([request, "please " + request]).capitalize()


def join(words):
    return " ".join(words) + ("?" if words[0] == "what" else "")


def make_rows(
    rng, n, used, combined=False, wordings=WORDINGS, words=WORDS, longer=False, people=1, habit=None
):
    """`n` rows with texts that are not in the set `used`, which they are added to. About a fifth of
    them, or all if `combined`, ask for two tasks in turn; a quarter has the text in the
    instruction. people: how many answer; different answers are the row's references. habit: theirs.
    """
    pairs, pair_share = (NEW_PAIRS, 1) if combined else (PAIRS, 0.2)
    rows = []
    for _ in range(n):
        tasks = rng.choice(pairs if rng.random() < pair_share else [*WORDINGS]).split("+")
        given = new_text(rng, tasks, words, used, longer)
        text, request = join(given), make_request(rng, tasks, wordings)
        habits = [habit or draw_habit(rng) for _ in range(people)]
        answers = list(dict.fromkeys(join(answer(rng, tasks, given, h)) for h in habits))
        output = answers[0] if people == 1 else answers
        row = {"instruction": f"{request}.", "input": text, "output": output}
        if rng.random() < 0.25:
            row |= {"instruction": f"{request}: {text}", "input": ""}
        rows.append(row)
    return rows


# --- Pre-training text
#
# A soft prompt moves the request away from position 0 and puts an unrelated text before it. The
# teacher tolerates that only if its pre-training had both. So the trainer packs documents into
# blocks, and most requests here have a preamble.
def make_preamble(rng, habit):
    """A sentence to put before a request. Most say who the reader is, like the paper's prompt, and
    three quarters of these tell the habit. Those that do not are as likely with every habit."""
    adjective = rng.choice(["", "young ", "kind ", "good ", "clever "])
    if rng.random() < 0.75:
        adjective = TELLING[habit] + " "
    people = "student student student teacher child reader writer farmer doctor friend beginner"
    who = f"a {adjective}{rng.choice(people.split())}"
    opening = rng.choice("Suppose/Imagine/Pretend/Assume/Suppose that/Imagine that".split("/"))
    sentences = (
        f"{opening} you are {who}./{opening} you are {who}./{opening} I am {who}./You are {who}./"
        f"Answer like {who}./Here is a task for {who}./Read the task."
    )
    return rng.choice(sentences.split("/"))


def make_fact(rng):
    """One or two sentences about the words, including the new ones."""
    words, place = ALL_WORDS, rng.choice(PLACES)
    adjective, animal = rng.choice(words.adjectives), rng.choice(words.animals)
    thing, present = rng.choice(words.things), rng.choice(words.verbs[::2])
    first, second = sorted(rng.sample(words.animals + words.things + words.adjectives, 2))
    facts = [
        f"The {animal} is an animal and a living thing. The {thing} is no animal.",
        f"The opposite of {adjective} is {' or '.join(OPPOSITES[adjective])}. These are "
        "adjectives, or describing words.",
        f"Today the {animal} {present} the {adjective} {thing}. Yesterday the {animal} "
        f"{PAST[present]} the {adjective} {thing}.",
        f"In the alphabet {first} comes before {second}.",
        f"The {adjective} {animal} is {place} the {thing}. The {thing} is not {place} the "
        f"{adjective} {animal}.",
    ]
    return rng.choice(facts)


def make_lesson(rng, used):
    """A text, then several requests about it with their responses: much to learn in few tokens. One
    person answers all of them, named first, or several do, each named before a request."""
    list_tasks = ["sort", "adjectives", "animals", "others", "opposite", "two"]
    group = rng.choice([list_tasks] * 3 + [["adjectives", "opposite", "past"], ["correct"]])
    text, habit = new_text(rng, group, ALL_WORDS, used), draw_habit(rng)
    one_person = rng.random() < 0.6
    lines = [make_preamble(rng, habit)] if one_person else []
    lines.append(join(text))
    for task in rng.sample(group, min(3, len(group))):
        request = make_request(rng, [task], PRETRAIN_WORDINGS) + "."
        if not one_person:
            habit = draw_habit(rng)
            request = f"{make_preamble(rng, habit)} {request}"
        lines += [request, join(answer(rng, [task], text, habit))]
    return "\n".join(lines)


def make_copies(rng, used):
    """A list, as several people write it. All the tasks need to copy from the context, and to know
    who writes, so a model learns that first."""
    text = new_text(rng, ["sort"], ALL_WORDS, used)
    lines = [join(text)]
    for _ in range(rng.randint(3, 4)):
        habit = draw_habit(rng)
        lines += [make_preamble(rng, habit), join(arrange(rng, text, habit))]
    return "\n".join(lines)


def make_exercise(rng, used):
    """A row in the template. Most say somewhere who answers: three in five of these in front, where
    the soft prompt stands. If none said so nearer to the response, a model would take much longer
    to learn to look back so far."""
    words, habit = rng.choice([WORDS, ALL_WORDS]), draw_habit(rng)
    [row] = make_rows(rng, 1, used, wordings=PRETRAIN_WORDINGS, words=words, habit=habit)
    text = fill_template(row["instruction"], row["input"])
    if rng.random() < 0.9:
        place = rng.choice(["Below", "Below", "Below", "### Instruction", "### Response"])
        end = rng.choice(["", "\n", f" {make_preamble(rng, habit)}\n"])
        text = text.replace(place, make_preamble(rng, habit) + end + place, 1)
    return text + row["output"]


def make_document(rng, used):
    """A text for pre-training."""
    if rng.random() < 0.05:
        return make_fact(rng)
    [make] = rng.choices([make_copies, make_lesson, make_exercise], [15, 25, 60])
    return make(rng, used)


def make_sets(seed):
    """The rows of each data set, {path: rows}, and the set of their texts."""
    rng, shifted_rng, used = random.Random(seed + 1), random.Random(seed + 2), set()
    answers = {"used": used, "people": PEOPLE}
    sets = {
        "train.jsonl": make_rows(rng, 8000, used),
        "dev.jsonl": make_rows(rng, 200, **answers),
        "test.jsonl": make_rows(rng, 200, **answers),
        "wording/test.jsonl": make_rows(rng, 200, wordings=UNSEEN_WORDINGS, **answers),
        "words/test.jsonl": make_rows(rng, 200, words=NEW_WORDS, **answers),
        "longer/test.jsonl": make_rows(shifted_rng, 200, longer=True, **answers),
        "combined/test.jsonl": make_rows(shifted_rng, 200, combined=True, **answers),
    }
    return sets, used


def make_documents(seed):
    """The pre-training documents. No text of a data set is in them."""
    rng, (_, used) = random.Random(seed), make_sets(seed)
    return [make_document(rng, used) for _ in range(240_000)]


def data_files(seed=10):
    """The files of the data sets, {path: text}: train, dev, test, and the four test sets unlike
    the training data, each in a subdirectory."""
    sets, _ = make_sets(seed)
    return {path: to_jsonl(rows) for path, rows in sets.items()}


def pretraining_text(seed=10):
    return to_jsonl({"text": text} for text in make_documents(seed))
