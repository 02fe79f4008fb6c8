"""English sentences for the toy world, composed at random, and a held-out list that is never composed.

Half of the sentences follow templates of everyday language. The other half are lists of random words, so that most
pairs of phonemes occur.
"""

from functools import lru_cache
from importlib.resources import files

import numpy as np

PEOPLE = (
    *("I", "you", "we", "they", "my mother", "your teacher", "the doctor", "an old sailor", "the young artist"),
    *("our neighbor", "her brother", "his uncle", "the captain", "a farmer", "the singer", "that woman", "this boy"),
    *("the whole family", "someone", "nobody", "everybody", "George", "Vivian", "Theo", "the judge", "a thief"),
)
VERBS = (
    *("found", "watched", "painted", "measured", "forgot", "carried", "opened", "enjoyed", "threw", "bought", "sold"),
    *("pushed", "covered", "noticed", "chose", "wanted", "washed", "borrowed", "loved", "mentioned", "judged", "hid"),
    *("taught", "drew", "played with", "looked at", "thought about", "asked for", "laughed at", "waited for"),
)
ADJECTIVES = (
    *(
        "small",
        "yellow",
        "heavy",
        "quiet",
        "strange",
        "beautiful",
        "broken",
        "wooden",
        "cheap",
        "huge",
        "thick",
        "warm",
    ),
    *(
        "smooth",
        "usual",
        "fresh",
        "bright",
        "dangerous",
        "curious",
        "purple",
        "narrow",
        "loud",
        "joyful",
        "thin",
        "odd",
    ),
)
NOUNS = (
    *("boat", "window", "garden", "picture", "umbrella", "machine", "kitchen", "treasure", "mouth", "coin", "bridge"),
    *("feather", "chair", "mirror", "village", "orange", "book", "thumb", "engine", "valley", "watch", "television"),
    *("jacket", "voice", "tooth", "fish", "cage", "shoe", "clothes", "box", "yard", "noise", "measure", "garage"),
)
PLACES = (
    *("in the morning", "by the river", "near the old church", "under the table", "at the station", "on Thursday"),
    *("after lunch", "before the storm", "without a sound", "in the south", "on the beach", "with both hands"),
    *("for five dollars", "twice a year", "at the theater", "beyond the hills", "in July", "through the fog"),
)
TEMPLATES = (
    *("{p} {v} the {a} {n}.", "{p} {v} the {n} {l}.", "{l}, {p} {v} a {a} {n}.", "Did {p} see the {a} {n}?"),
    *("The {n} was {a} and the {m} was {b}.", "There is a {a} {n} {l}.", "Why is the {n} so {a}?", "What a {a} {n}!"),
    *("{p} {v} the {n}, but {q} {w} the {m}.", "Please bring the {a} {n} {l}.", "How many {n}s are there {l}?"),
    *(
        "I think that {p} {v} {k} {n}s.",
        "Yes, {p} {v} it {l}.",
        "No, the {a} {n} is not {b}.",
        "{k} minutes, thank you.",
    ),
    *("Good evening, how are you {l}?", "Could {p} open the {n}?", "It is {k} past {j}, and {p} {v} the {n}."),
)
_NUMBERS = (*(str(n) for n in range(2, 21)), "30", "42", "58", "76", "99", "100", "365", "1,000")

HELD_OUT = (
    "Hello, it is very nice to meet you.",
    "The weather is lovely today, so let us go outside.",
    "Every evening she reads a story to the children.",
    "We should leave now if we want to catch the train.",
    "My favorite color used to be green.",
    "Nothing is as easy as it looks.",
    "He answered the question with a short smile.",
    "They are planning a long journey around the world.",
    "Turn left at the corner and walk straight ahead.",
    "Fresh bread smells better than anything else.",
    "A good friend will always speak the truth.",
    "The concert begins at half past seven.",
    "Our computer learned to speak in one night.",
    "Her grandfather built this house with his own hands.",
    "Nobody could explain how the light went out.",
    "Let me know when you are ready to begin.",
    "Snow covered the mountains until the end of spring.",
    "The little bird sang on the highest branch.",
    "It takes courage to change your mind.",
    "This machine can talk, blink and move its head.",
    "Please speak slowly, I am still learning.",
    "He poured some milk into a glass of tea.",
    "The museum is closed on Mondays.",
    "Water boils at one hundred degrees.",
    "Do you remember the name of that song?",
    "A quick answer is not always a wise one.",
    "The bus was late because of heavy traffic.",
    "She wrote a letter and sent it to the mayor.",
    "Birds fly south when the days get shorter.",
    "I would rather stay home and read.",
    "Thank you for your help, see you tomorrow.",
    "Nine people shared three pizzas.",
)
"""Sentences for evaluation. No template composes them."""


def compose_sentence(rng: np.random.Generator) -> str:
    """Return a random sentence: from a template, or random common words."""
    if rng.random() < 0.5:
        return _from_template(rng)
    words = common_words()
    chosen = [words[int(i)] for i in rng.integers(len(words), size=int(rng.integers(3, 8)))]
    if len(chosen) > 4:
        chosen[2] += ","
    return " ".join(chosen).capitalize() + "."


def _from_template(rng: np.random.Generator) -> str:
    def pick(table: tuple[str, ...]) -> str:
        return table[int(rng.integers(len(table)))]

    text = pick(TEMPLATES).format(
        p=pick(PEOPLE), q=pick(PEOPLE), v=pick(VERBS), w=pick(VERBS), a=pick(ADJECTIVES), b=pick(ADJECTIVES),
        n=pick(NOUNS), m=pick(NOUNS), l=pick(PLACES), k=pick(_NUMBERS), j=pick(_NUMBERS),
    )  # fmt: skip
    return text[0].upper() + text[1:]


@lru_cache(maxsize=1)
def common_words() -> tuple[str, ...]:
    """Return about 1,000 common words in alphabetical order."""
    return tuple(files("preprocessing.speech").joinpath("words.txt").read_text().split())
