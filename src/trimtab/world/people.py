"""The invented people of the small world: who they are and the six facts about each.

The table is a pure function of this file: the same people with the same facts in every version of
the package that has the same ``WORLD_VERSION``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from trimtab.world.lexicon import words

PEOPLE = 300

FIRST_NAMES = words(
    """
    Adela Alba Anton Arlo Bastian Bela Bruno Cara Cato Clio Cyrus Dara Delia Doran Edda Elio Enzo
    Fabian Fara Finn Flora Gideon Gilda Greta Hal Hedda Hugo Ida Ilka Ines Ivo Jonas Jora Kai Kira
    Lars Leda Linus Lotte Magda Maro Mila Nadia Nico Nora Odo Olga Orla Pavel Petra Quentin Rafe
    Rhea Silas Tilda Una Vera Viggo Wanda Zeno
    """
)

LAST_NAMES = words(
    """
    Abney Alder Amsel Arden Ashby Barlo Bexley Birk Bolton Brack Brandt Calder Carrow Corbin Crane
    Dalby Darnell Denholm Dorset Draven Eastley Elwin Emmet Fenner Finch Garrow Gault Glenn Hadley
    Harker Hartwell Hobart Holm Ingram Jarrow Keller Kestrel Kirby Lanner Larkin Lindell Lowell
    Marlow Merrick Morrow Nash Norcross Oakes Orrin Padgett Perrin Quill Ramsey Renner Rowan Sadler
    Selwyn Stroud Tanner Thorne Tolland Upton Varley Vosper Waller Weaver Wexford Wickham Yardley
    Zeller
    """
)

VALUES: dict[str, tuple[str, ...]] = {
    "town": words(
        """Arvon Belmar Corvale Dunmere Elsford Fallow Granby Hollin Islay Kelmore Lorne Merrin
        Northam Orrel Penrith Quarne Redmoor Selby Tarran Ulmere Vantry Welby Yarrow Zennor"""
    ),
    "work": words(
        """actor baker banker barber builder butcher clerk cobbler dentist doctor farmer fisher
        gardener hunter judge lawyer miller miner nurse painter pilot porter printer sailor singer
        soldier surgeon tailor teacher writer"""
    ),
    "pet": words(
        """badger bear bird cat crow deer dog donkey duck eagle ferret fox goat goose hare hawk hen
        horse lamb lizard monkey mouse otter owl parrot pig rabbit rat raven snake swan tortoise
        turtle wolf"""
    ),
    "instrument": words(
        """accordion banjo bassoon bell bugle cello clarinet cornet drum fiddle flute gong guitar
        harp horn lute lyre mandolin oboe organ piano trumpet tuba viola violin whistle"""
    ),
    "color": words(
        """amber black blue bronze brown coral cream crimson gold gray green indigo ivory lilac
        orange pink purple red rose scarlet silver teal violet white yellow"""
    ),
    "dish": words(
        """apples bacon beans beef bread butter cabbage cake carrots cheese cherries chicken corn
        eggs fish ham honey lentils mushrooms mutton nuts onions pancakes pears peas pie plums pork
        potatoes rice soup stew turnips veal"""
    ),
}
"""The six relations, each with all values it can take."""

RELATIONS: tuple[str, ...] = tuple(VALUES)


@dataclass(frozen=True)
class Person:
    """An invented person; ``facts`` maps each relation to its value."""

    name: str
    facts: dict[str, str]


@cache
def people() -> tuple[Person, ...]:
    """All invented people, in a fixed order."""
    rng = random.Random("trimtab people 1")
    pairs = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    return tuple(
        Person(name, {relation: rng.choice(VALUES[relation]) for relation in RELATIONS})
        for name in rng.sample(pairs, PEOPLE)
    )
