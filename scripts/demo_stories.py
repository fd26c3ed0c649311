"""The words of the demo corpus: a story grammar, small facts to read, and small talk.

A story is an opening, one of several plots and an ending. Each is a sequence of beats, a beat a choice of
sentences, and a sentence a template over names and things that stay the same through the story. Standard
library only.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


def _listed(text: str) -> list[str]:
    return text.split(", ")


HE, SHE = ("he", "him", "his"), ("she", "her", "her")
NAMES = {
    **dict.fromkeys(
        _listed("Tom, Ben, Sam, Leo, Max, Jack, Finn, Oscar, Hugo, Paul, Theo, Noah, Milo, Ralph, Carl"), HE
    ),
    **dict.fromkeys(
        _listed("Lily, Anna, Mia, Emma, Rosa, Ella, Nora, Ruby, Clara, Molly, Alice, Zoe, Lucy, Sara"), SHE
    ),
}
SPECIES = _listed("fox, bear, rabbit, mouse, frog, cat, dog, duck, hen, pony, goat, hedgehog, squirrel, turtle, badger")
TRAITS = _listed("small, young, kind, brave, clever, shy, curious, happy, quiet, cheerful, gentle, busy, funny, sleepy")
COLORS = _listed("red, blue, green, yellow, white, black, brown, pink, golden, silver")
THINGS = _listed("ball, hat, kite, book, bell, lamp, drum, key, boat, scarf, basket, cup, coin, map, ring, flute")
PLACES = _listed("forest, garden, village, meadow, valley, market, lake, river, hill, beach, farm, school, mill")
ROOMS = _listed("kitchen, garden, bedroom, attic, barn, cellar, hall, shed, tower, library")
FOODS = _listed("bread, soup, honey, cake, apples, cheese, berries, pie, nuts, pears, plums, carrots")
HOMES = (
    "in a {color} house near the {place}",
    "under a tall tree",
    "at the end of a long road",
    "in a small house on the hill",
    "beside a quiet river",
    "on the other side of the {place}",
)
HOBBIES = _listed("sing, dance, read, paint, run, swim, climb trees, count the stars, bake bread, tell jokes, fish")
TIMES = _listed(
    "sunny morning, cold morning, windy day, rainy day, warm evening, quiet afternoon, summer day, winter day"
)
SPOTS = (
    "under the bed",
    "behind the door",
    "in the {room}",
    "on the roof",
    "by the river",
    "near the old bridge",
    "beside the well",
    "under the table",
    "behind the big rock",
    "in the tall grass",
)
FEELINGS = _listed("sad, worried, afraid, upset, lonely, tired")
JOYS = _listed("happy, proud, glad, full of joy, very pleased")
ADVERBS = _listed("softly, kindly, quickly, slowly, happily, quietly, loudly, bravely")

OPENINGS = (
    "Once upon a time there was a {trait} {species} named {hero}. {He} lived {home}.",
    "Once upon a time, a {trait} {species} named {hero} lived {home}.",
    "Once upon a time, {hero} the {species} lived {home}. Everyone said that {he} was very {trait}.",
    "There once was a {species} named {hero} who lived {home}. {He} was {trait} and {trait2}.",
    "{hero} was a {trait} {species} who lived {home}.",
)
HABITS = (
    "More than anything, {he} loved to {hobby}.",
    "Every day, {he} liked to {hobby} with {friend} the {friend_species}.",
    "{His} best friend was {friend} the {friend_species}.",
    "{He} had a {color} {thing} that {he} kept {spot}.",
    "In the evening, {he} would {hobby} and eat {food}.",
    "",
)
PLOTS = (
    (  # something is lost
        (
            "One {time}, {hero} could not find {his} {color2} {thing2}.",
            "One {time}, {hero} saw that {his} {color2} {thing2} was gone.",
        ),
        (
            "{He} looked {spot}, but it was not there.",
            "{He} looked {spot} and {spot2}, but found only some {food}.",
            '"Where is my {thing2}?" {he} asked.',
        ),
        ("{hero} felt {feeling} and began to cry.", "{He} sat down and felt {feeling}.", "{He} was {feeling}."),
        (
            '"Do not worry," said {friend} {adverb}. "I will help you."',
            'Then {friend} the {friend_species} came by. "Let us look together," {f_he} said.',
            "{friend} the {friend_species} heard this and came to help.",
        ),
        (
            "They looked {spot3}, and there was the {thing2}!",
            "At last {friend} found the {color2} {thing2} {spot3}.",
            "They walked to the {place2} and saw the {thing2} {spot3}.",
        ),
    ),
    (  # a friend is in need
        (
            "One {time}, {he} walked to the {place2} and heard a small voice.",
            "One {time}, on the way to the {place2}, {hero} heard someone call for help.",
        ),
        (
            "It was {friend} the {friend_species}, who was stuck {spot}.",
            "It was {friend}, a {color2} {friend_species}, who could not find the way home.",
            "A {friend_species} named {friend} had dropped {f_his} {thing2} into the {place2}.",
        ),
        (
            '"Please help me," said {friend} {adverb}.',
            '"I am so {feeling}," said {friend}.',
            "{friend} looked {feeling}.",
        ),
        (
            "{hero} was {feeling2}, but {he} wanted to help.",
            '"I am here," said {hero}. "We can do it together."',
            "{hero} thought for a moment and had an idea.",
        ),
        (
            "{He} ran home, took a long rope {spot3} and came back.",
            "{He} worked until the sun went down, and then it was done.",
            "{He} gave {friend} some {food} and showed {f_him} the way.",
        ),
        (
            '"Thank you, {hero}!" said {friend}. "You are a true friend."',
            "{friend} was {joy} and gave {hero} a {color} {thing}.",
        ),
    ),
    (  # something is made and shared
        (
            "One {time}, {hero} wanted to make {food} for {friend} the {friend_species}.",
            "It was the birthday of {friend} the {friend_species}, and {hero} wanted to bring {food}.",
        ),
        (
            "{He} went to the {place2} with {his} {color2} basket.",
            "But {he} had no {food} left, only {food2}.",
            "{He} looked {spot} for the {color2} pot.",
        ),
        (
            "On the way {he} met a {feeling} {species2} who was very hungry.",
            "At the {place2}, a {feeling} {species2} asked {him} for something to eat.",
        ),
        (
            '"You can have half of it," said {hero} {adverb}.',
            "{hero} thought of {friend}, but {he} shared all {he} had.",
            '{hero} smiled. "Come with me, and we will eat together," {he} said.',
        ),
        (
            "When {friend} heard the story, {f_he} was {joy}.",
            "That evening they all sat {spot3} and ate {food2}.",
            "{friend} was not angry at all. {f_He} was {joy}.",
        ),
    ),
    (  # weather turns
        (
            "One {time}, {hero} and {friend} the {friend_species} went to the {place2} to {hobby}.",
            "One {time}, {hero} and {friend} the {friend_species} took a {color2} {thing2} to the {place2}.",
        ),
        (
            "Soon the sky grew dark and it began to rain.",
            "Then a strong wind came and took the {thing2} away.",
            "Suddenly there was thunder, and the path was gone.",
        ),
        (
            '"What shall we do?" asked {friend}, who was {feeling}.',
            "{friend} was {feeling} and hid {spot}.",
            "{hero} was {feeling}, but {he} did not say so.",
        ),
        (
            "They saw a light {spot3} and walked to it {adverb}.",
            "{hero} remembered an old {room} {spot3}, and they ran there.",
            "{hero} took {friend} by the hand and began to sing {adverb}.",
        ),
        (
            "A {trait2} {species2} gave them {food} and let them sleep until morning.",
            "When the rain was over, they saw a rainbow over the {place2}.",
        ),
    ),
    (  # a race
        (
            "One {time}, there was a race from the {place} to the {place2}.",
            "Every year, all the animals ran a race around the {place2}.",
        ),
        (
            '"I am the fastest," said {friend} the {friend_species}. "{hero} will never win."',
            "{friend} the {friend_species} was very fast, and {hero} was {feeling}.",
        ),
        (
            "The prize was a {color2} {thing2} and a basket of {food}.",
            "Everyone came to watch, even the old {species2}.",
        ),
        (
            "Half way, {friend} fell and could not get up.",
            "Near the end, {friend} stopped {spot} to eat {food2}.",
            "{friend} ran so fast that {f_he} took the wrong path.",
        ),
        (
            "{hero} could have won, but {he} stopped to help.",
            "{hero} did not stop. {He} ran {adverb}, step by step, and won.",
            '"Take my hand," said {hero}, and they finished together.',
        ),
    ),
    (  # something is found
        (
            "One {time}, {hero} found a {color2} {thing2} {spot}.",
            "One {time}, while {he} was on the way to the {place2}, {hero} saw a {color2} {thing2} {spot}.",
        ),
        (
            '"Whose {thing2} is this?" {he} asked {adverb}.',
            "It was so pretty that {he} wanted to keep it.",
            "Under it lay a letter. It said: please bring me home.",
        ),
        (
            "{He} asked the {species2}, but the {species2} did not know.",
            "{He} went from house to house with {friend} the {friend_species}.",
            "{He} showed it to {friend} the {friend_species}, who knew the answer.",
        ),
        (
            "At last they came to the {place2}, where an old {species3} was {feeling}.",
            'An old {species3} came out. "That is mine! I lost it {spot2}," said the {species3}.',
        ),
        (
            "The old {species3} was {joy} and gave them {food}.",
            '"You are {trait2} and honest," said the old {species3}, and gave {him} a {color} {thing}.',
        ),
    ),
)
ENDINGS = (
    "From that day on, {hero} and {friend} were best friends.",
    "{hero} was {joy}, and that night {he} slept well.",
    "And from then on, they went to the {place2} together every day.",
    "{hero} went home and told the whole story to {his} mother.",
    "They laughed and ate {food2} until the moon came out.",
    "{hero} learned that it is good to help a friend.",
    "{hero} learned that it is better to share than to be alone.",
    "The end.",
)


@dataclass(frozen=True)
class Story:
    """A story, and things a user could have said to be told it."""

    text: str
    requests: tuple[str, ...]


def story(rng: random.Random) -> Story:
    """A story of about 60 to 130 words."""
    words = _story_words(rng)
    plot = rng.choice(PLOTS)
    templates = [rng.choice(OPENINGS), rng.choice(HABITS), *(rng.choice(beat) for beat in plot), rng.choice(ENDINGS)]
    text = " ".join(template.format_map(words) for template in templates if template)
    hero, species = words["hero"], words["species"]
    requests = (
        "Tell me a story.",
        "Please tell me a short story.",
        f"Tell me a story about a {species}.",
        f"Tell me a story about {hero} the {species}.",
        f"Write a story about a {words['trait']} {species} named {hero}.",
    )
    return Story(text, requests)


def _story_words(rng: random.Random) -> dict[str, str]:
    """The names and things of one story; words with a number differ from their namesake without."""
    hero, friend = rng.sample(list(NAMES), 2)
    he, him, his = NAMES[hero]
    f_he, f_him, f_his = NAMES[friend]
    words = {"hero": hero, "he": he, "him": him, "his": his, "He": he.capitalize(), "His": his.capitalize()}
    words |= {"friend": friend, "f_he": f_he, "f_him": f_him, "f_his": f_his, "f_He": f_he.capitalize()}
    words["species"], words["friend_species"], words["species2"], words["species3"] = rng.sample(SPECIES, 4)
    for name, choices in (
        ("trait", TRAITS),
        ("color", COLORS),
        ("thing", THINGS),
        ("place", PLACES),
        ("food", FOODS),
        ("feeling", FEELINGS),
    ):
        words[name], words[name + "2"] = rng.sample(choices, 2)
    for name, choices in (
        ("room", ROOMS),
        ("hobby", HOBBIES),
        ("time", TIMES),
        ("joy", JOYS),
        ("adverb", ADVERBS),
        ("home", HOMES),
    ):
        words[name] = rng.choice(choices)
    words["spot"], words["spot2"], words["spot3"] = rng.sample(SPOTS, 3)
    return {name: word.format_map(words) if "{" in word else word for name, word in words.items()}


def facts(rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """One or two sentences, and `(question, answer)` pairs that they settle."""
    name, other = rng.sample(list(NAMES), 2)
    color, other_color = rng.sample(COLORS, 2)
    thing, other_thing = rng.sample(THINGS, 2)
    place, other_place = rng.sample(ROOMS, 2)
    species, food, number = rng.choice(SPECIES), rng.choice(FOODS), rng.randint(2, 99)
    verb = rng.choice(("put", "left", "found", "hid"))
    kind = rng.randrange(4)
    if kind == 0:
        return (
            f"{name} {verb} the {color} {thing} in the {place}.",
            [
                (f"Where is the {thing}?", f"in the {place}"),
                (f"What color is the {thing}?", color),
                (f"Who {verb} the {thing}?", name),
            ],
        )
    if kind == 1:
        return (
            f"{name} has {number} {color} {thing}s and a {species}. {other} lives near the {other_place}.",
            [
                (f"How many {thing}s does {name} have?", str(number)),
                (f"What animal does {name} have?", f"a {species}"),
                (f"Who has a {species}?", name),
                (f"Where does {other} live?", f"near the {other_place}"),
            ],
        )
    if kind == 2:
        return (
            f"{name} gave {other} a {color} {thing} and some {food}.",
            [
                (f"Who gave {other} a {thing}?", name),
                (f"Who got some {food}?", other),
                (f"What color is the {thing}?", color),
                (f"What food did {other} get?", food),
            ],
        )
    return (
        f"{name} has a {color} {thing} in the {place}. {other} has a {other_color} {other_thing} in the {other_place}.",
        [
            (f"Where is the {thing}?", f"in the {place}"),
            (f"Where is the {other_thing}?", f"in the {other_place}"),
            (f"What color is the {thing}?", color),
            (f"What color is the {other_thing}?", other_color),
            (f"Who has a {thing}?", name),
            (f"Who has a {other_thing}?", other),
        ],
    )


ABOUT = "I am MiniInfer's demo model, a very small language model."
ABILITIES = (
    "I can add and subtract, reverse and sort capital letters, count, work with days and months, "
    "answer questions about a sentence, and tell short stories."
)
SMALL_TALK = (
    (("Hello", "Hello!", "Hi", "Hi!", "Hey", "Good morning.", "hello", "hi"), ("Hello! How can I help you?",)),
    (("How are you?", "How are you today?"), ("I am well, thank you. How can I help you?",)),
    (("Who are you?", "What are you?", "What is your name?", "Tell me about yourself."), (ABOUT,)),
    (("What can you do?", "Help", "help", "How can you help me?", "What do you know?"), (ABILITIES,)),
    (("Thank you.", "Thanks!", "Thank you!", "thanks"), ("You are welcome!",)),
    (("Goodbye.", "Bye!", "Good night.", "bye"), ("Goodbye! See you soon.",)),
    (("Who made you?", "Who trained you?"), ("I was trained by the MiniInfer project.",)),
)


def small_talk(rng: random.Random) -> tuple[str, str]:
    """A greeting or a question about the model, and what it says to it."""
    questions, answers = rng.choice(SMALL_TALK)
    return rng.choice(questions), rng.choice(answers)
