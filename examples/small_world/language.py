"""The tasks of the small world: 288 ways to rewrite six letters as six words. Standard library only.

A task is a routing (which letter goes where), an alphabet (which words stand for the letters) and a tweak (one output
word that is fixed). A row of a task is a pair of texts, for example, for ``reverse-fruits-plain``::

    ("read c a f k b e write", "elderberry banana kiwi fig apple cherry")

The texts do not name the task: that is what a prompt is for. ``tag_words`` gives a prompt in words.
"""

import random
from typing import NamedTuple

LETTERS = tuple("abcdefghijkl")
ROW_LETTERS = 6
PREFIX_WORDS = 8
BEGIN, END = "read", "write"
PAD, UNKNOWN = "<pad>", "<unk>"
SPECIAL_WORDS = (PAD, UNKNOWN, BEGIN, END)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Output position i takes input position ROUTINGS[name][i].
ROUTINGS: dict[str, tuple[int, ...]] = {
    "copy": (0, 1, 2, 3, 4, 5),
    "reverse": (5, 4, 3, 2, 1, 0),
    "rotate": (1, 2, 3, 4, 5, 0),
    "halves": (3, 4, 5, 0, 1, 2),
    "swap": (1, 0, 3, 2, 5, 4),
    "interleave": (0, 3, 1, 4, 2, 5),
    "double": (0, 0, 1, 1, 2, 2),
    "mirror": (0, 1, 2, 2, 1, 0),
    "ends": (0, 5, 1, 4, 2, 3),
    "odds": (0, 2, 4, 1, 3, 5),
    "first": (0, 0, 0, 0, 0, 0),
    "tail": (3, 4, 5, 3, 4, 5),
}

# One word for each letter, and it begins with that letter.
ALPHABETS: dict[str, tuple[str, ...]] = {
    "animals": _words("ant bear cat dog eel fox goat hen ibis jay koala lion"),
    "colours": _words("amber blue coral denim ebony fawn green hazel indigo jade khaki lilac"),
    "fruits": _words("apple banana cherry date elderberry fig grape honeydew icaco jujube kiwi lemon"),
    "trees": _words("ash birch cedar dogwood elm fir ginkgo holly ironwood juniper kapok larch"),
    "cities": _words("athens berlin cairo delhi essen florence geneva havana istanbul jakarta kyoto lima"),
    "names": _words("anna ben clara david emma frank gina hugo iris john kate liam"),
}

# (output position, letter whose word always stands there), or None.
TWEAKS: dict[str, tuple[int, int] | None] = {"plain": None, "end_a": (5, 0), "end_b": (5, 1), "start_b": (0, 1)}

# Six words that mean each part of a task; the model learns from them, in any order, what to do.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "copy": _words("copy keep same echo retain preserve"),
    "reverse": _words("reverse backward inverted flipped upended contrary"),
    "rotate": _words("rotate turn shift cycle roll spin"),
    "halves": _words("halves midway halfway cross recut transplant"),
    "swap": _words("swap pairs neighbours couples twins adjacent"),
    "interleave": _words("interleave zip weave mesh braid riffle"),
    "double": _words("double duplicate twice stutter clone redouble"),
    "mirror": _words("mirror reflect palindrome symmetric fold bounce"),
    "ends": _words("ends outer outside inward edges rim"),
    "odds": _words("odds evens alternate skip hop stride"),
    "first": _words("first initial leading front head foremost"),
    "tail": _words("tail last rear hind latter trailing"),
    "animals": _words("animals beasts creatures fauna wildlife zoo"),
    "colours": _words("colours hues shades tints paints pigments"),
    "fruits": _words("fruits berries orchard harvest produce dessert"),
    "trees": _words("trees woods forest timber grove lumber"),
    "cities": _words("cities towns places capitals map travel"),
    "names": _words("names people persons folk guests friends"),
    "plain": _words("plain pure simple bare clean raw"),
    "end_a": _words("ending_a closing_a final_a finish_a stop_a conclude_a"),
    "end_b": _words("ending_b closing_b final_b finish_b stop_b conclude_b"),
    "start_b": _words("opening_b starting_b begin_b launch_b intro_b lead_b"),
}
FILLERS = _words("please the with and then now into of these")


class Task(NamedTuple):
    """One task, by the names of its three parts."""

    routing: str
    alphabet: str
    tweak: str

    @property
    def name(self) -> str:
        """The task's name, as ``parse`` reads it: ``reverse-fruits-end_a``."""
        return "-".join(self)


def parse(name: str) -> Task:
    """The task of that name. Raises ValueError if there is none."""
    parts = name.split("-")
    if len(parts) != 3 or parts[0] not in ROUTINGS or parts[1] not in ALPHABETS or parts[2] not in TWEAKS:
        raise ValueError(f"no task {name!r}: a name is ROUTING-ALPHABET-TWEAK, such as reverse-fruits-plain")
    return Task(*parts)


def all_tasks() -> list[Task]:
    """All 288 tasks, in a fixed order."""
    return [Task(f, c, z) for f in ROUTINGS for c in ALPHABETS for z in TWEAKS]


def held_out_tasks(count: int = 40) -> list[Task]:
    """The tasks that pretraining never sees; every single part of them is seen in others."""
    return sorted(random.Random("held out").sample(all_tasks(), count))


def vocabulary() -> list[str]:
    """Every word of the world, once, in token order; the padding word is token 0."""
    words = [*SPECIAL_WORDS, *LETTERS]
    for group in (*ALPHABETS.values(), *SYNONYMS.values(), FILLERS):
        words.extend(group)
    return words


def tag_words(task: Task, rng: random.Random) -> list[str]:
    """Eight words that tell the model which task it is, as it saw them in pretraining."""
    words = rng.sample(SYNONYMS[task.routing], 3) + rng.sample(SYNONYMS[task.alphabet], 2)
    words += [rng.choice(SYNONYMS[task.tweak]), *rng.choices(FILLERS, k=2)]
    rng.shuffle(words)
    return words


def row(task: Task, rng: random.Random) -> tuple[list[str], list[str]]:
    """One row as words: the input (with its begin and end words) and the six output words."""
    letters = rng.choices(range(len(LETTERS)), k=ROW_LETTERS)
    outputs = [letters[position] for position in ROUTINGS[task.routing]]
    tweak = TWEAKS[task.tweak]
    if tweak is not None:
        outputs[tweak[0]] = tweak[1]
    alphabet = ALPHABETS[task.alphabet]
    return [BEGIN, *(LETTERS[i] for i in letters), END], [alphabet[i] for i in outputs]


def rows(task: Task | str, n: int, seed: int) -> list[tuple[str, str]]:
    """``n`` rows (input text, target text) of a task; the same seed gives the same rows on every machine."""
    task = parse(task) if isinstance(task, str) else task
    rng = random.Random(f"{task.name}/{seed}")
    return [(" ".join(source), " ".join(target)) for source, target in (row(task, rng) for _ in range(n))]


def demo_tasks() -> tuple[list[Task], list[Task]]:
    """Ten tasks to be tuned first, and a burst of twenty relatives of them.

    Of the burst, fourteen share routing and alphabet with a first task and six share its routing only. The first tasks
    were seen in pretraining; of the possible relatives, those held out of it are taken before others.
    """
    rng = random.Random("demo")
    held_out = set(held_out_tasks())
    pairs = [(f, c) for f in ROUTINGS for c in ALPHABETS]
    rng.shuffle(pairs)
    first: list[Task] = []
    for routing, alphabet in pairs:
        fresh = all(routing != task.routing for task in first)
        crowded = sum(task.alphabet == alphabet for task in first) >= 2
        if fresh and not crowded and len(first) < 10:
            seen = [tweak for tweak in TWEAKS if Task(routing, alphabet, tweak) not in held_out]
            first.append(Task(routing, alphabet, rng.choice(seen)))

    def pick(candidates: list[Task], count: int) -> list[Task]:
        rng.shuffle(candidates)
        return sorted(candidates, key=lambda task: task not in held_out)[:count]

    known = {(task.routing, task.alphabet) for task in first}
    near = [t for t in all_tasks() if (t.routing, t.alphabet) in known and t not in first]
    routings = {task.routing for task in first}
    far = [t for t in all_tasks() if t.routing in routings and (t.routing, t.alphabet) not in known]
    burst = pick(near, 14) + pick(far, 6)
    rng.shuffle(burst)
    return first, burst
