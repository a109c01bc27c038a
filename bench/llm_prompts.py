"""The prompts of bench/llm.py: questions, summaries, edits of code, and texts to rewrite, in words of our own.

`MIXED` is the stated mix; what speculation gains depends on how much of an answer repeats its prompt, so the kinds are
reported apart.
"""

from __future__ import annotations

from typing import NamedTuple


class Prompt(NamedTuple):
    """A message of a user, and what kind of answer it asks for."""

    kind: str
    text: str


_BRIDGE = """The footbridge over the Lenne was closed on Monday after an inspection found cracks in two of its steel
hangers. The city council says that the cracks are shallow and that the bridge was never in danger of falling, but that
it will stay closed until both hangers are replaced. The new hangers are made to order by a workshop in Hagen and take
six weeks to arrive. Until then walkers and cyclists have to use the road bridge, which is four hundred metres further
north and has a narrow pavement on one side only. The council has lowered the speed limit on the road bridge to thirty
kilometres an hour and will put up a temporary barrier between the pavement and the road. Shopkeepers on the west bank
fear for their trade in the weeks before the summer holidays. The council expects the repair to cost ninety thousand
euros, of which the state pays two thirds."""

_BEES = """Beekeepers in the valley lost fewer colonies this winter than in the three winters before. Of 412 colonies
that went into the winter, 371 were alive in March, a loss of ten percent; the year before it was twenty-three percent.
The association of beekeepers gives two reasons. The autumn was dry, so that the bees could forage until late October,
and most members treated their colonies against mites in July and not in September. The association warns that a single
good winter says little: mites come back within a season, and the flowering of the lime trees, on which the summer
honey depends, was poor last year. It asks its members to count the mites on the bottom boards every second week and
to report the counts, so that treatments in the valley can begin in the same week."""

_MINUTES = """Minutes of the meeting on the storage room. Present: Ana, Bertil, Chidi, Dana. Ana reports that the
storage room floods whenever it rains for more than a day, because the drain in the yard is blocked by roots. Bertil has
an offer from a plumber: 1,400 euros to clear the drain, and 3,900 euros to replace the pipe. Chidi prefers to replace
the pipe, since the roots will grow back within two years. Dana asks whether the insurance pays; Ana will call the
insurance before Friday. Until the drain is repaired, nothing may stand on the floor of the storage room. Bertil orders
shelves for the two long walls, at most 300 euros. The next meeting is on the twelfth at six in the evening."""

_PARSER = """def read_settings(path):
    settings = {}
    file = open(path)
    for line in file:
        line = line.strip()
        if line == "" or line.startswith("#"):
            continue
        name, value = line.split("=")
        settings[name.strip()] = value.strip()
    file.close()
    return settings
"""

_STATISTICS = """def mean(values):
    total = 0
    for value in values:
        total = total + value
    return total / len(values)


def variance(values):
    centre = mean(values)
    total = 0
    for value in values:
        total = total + (value - centre) ** 2
    return total / len(values)


def deviation(values):
    return variance(values) ** 0.5
"""

_CART = """class Cart:
    def __init__(self):
        self.items = []

    def add(self, name, price, count):
        self.items.append((name, price, count))

    def total(self):
        total = 0
        for name, price, count in self.items:
            total = total + price * count
        return total

    def show(self):
        for name, price, count in self.items:
            print(name, price, count)
"""

SUMMARISE = (
    Prompt("summarise", f"Summarise this text in three sentences, in its own words:\n\n{_BRIDGE}"),
    Prompt("summarise", f"Summarise this text in three sentences, in its own words:\n\n{_BEES}"),
    Prompt("summarise", f"List the decisions of this meeting, each with who does what:\n\n{_MINUTES}"),
)
EDIT = (
    Prompt("edit", f"Rewrite this function with a `with` statement:\n\n```python\n{_PARSER}```"),
    Prompt("edit", f"Add a docstring to each function and repeat the whole code:\n\n```python\n{_STATISTICS}```"),
    Prompt("edit", f"Rename `items` to `lines` and repeat the whole class:\n\n```python\n{_CART}```"),
)
QUESTIONS = (
    Prompt("question", "Why is the sky red in the evening?"),
    Prompt("question", "What is the difference between a stack and a queue? Give an example of each."),
    Prompt("question", "How do I keep bread fresh for a week?"),
    Prompt("question", "Name four rivers of Europe and a city on each of them."),
)
WRITE = (
    Prompt("write", "Write a short story about a lighthouse keeper who finds a letter in a bottle."),
    Prompt("write", "Write a polite message to a neighbour whose dog barks at night."),
)
MIXED = (*SUMMARISE, *EDIT, *QUESTIONS, *WRITE)

# For evidence that needs many sequences and no kind in particular.
VARIED = (
    *MIXED,
    Prompt("question", "Explain to a child why the moon has phases."),
    Prompt("question", "What should I check before I buy a used bicycle?"),
    Prompt("question", "Convert 72 degrees Fahrenheit to Celsius and show the steps."),
    Prompt("question", "Which is heavier, a litre of oil or a litre of water, and why does oil float?"),
    Prompt("write", "Write a recipe for a soup of carrots and ginger, with quantities for four people."),
    Prompt("write", "Write four lines of verse about a train at night."),
    Prompt("edit", "Correct the spelling: Teh wether wos good yesturday, so we wennt to the beech."),
    Prompt("edit", "Write a Python function that returns the primes below n, with a docstring."),
)
