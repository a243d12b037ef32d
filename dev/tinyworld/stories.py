"""
Short stories about people, things and places, told by small simulations, so that each question has one true answer.
"""
from dataclasses import dataclass

from .facts import load_data, sentence

DATA = load_data("stories.json")


@dataclass(frozen=True)
class Query:
    """Something to ask about a story."""
    kind: str # a key of stories.json "questions"
    slots: dict # what the question is about
    value: str # the short answer
    rivals: tuple # short answers that would be wrong

    def question(self, split, rng):
        """A question of the phrasings of a split, "train" or "heldout"."""
        return sentence(rng.choice(DATA["questions"][self.kind][split]), **self.slots)

    def answer(self):
        return sentence(DATA["questions"][self.kind]["answer"], value=self.value, **self.slots)


def finish(rng, lines, kind, slots_and_values, candidates):
    """(text, queries): the story, and all that can be asked about it in random order."""
    queries = [Query(kind, slots, value, tuple(item for item in candidates if item != value))
               for slots, value in slots_and_values]
    return " ".join(lines), rng.sample(queries, len(queries))


def giving(rng, kind):
    """Two things change hands among four people. Who has them?"""
    people, things = rng.sample(DATA["names"], 4), rng.sample(DATA["things"], 2)
    owner = dict(zip(things, people[:2], strict=True))
    lines = [f"{owner[thing]} has a {thing}." for thing in things]
    for thing in rng.choices(things, k=rng.randint(1, 3)):
        other = rng.choice([person for person in people if person != owner[thing]])
        lines.append(rng.choice(DATA["give"]).format(p=owner[thing], q=other, o=thing))
        owner[thing] = other
    return finish(rng, lines, kind, [({"o": thing}, owner[thing]) for thing in things], people)


def tracking(rng, kind):
    """Two people walk about, or put two things away. Where are they?"""
    people, things = rng.sample(DATA["names"], 2), rng.sample(DATA["things"], 2)
    subjects, places = (people if kind == "places" else things), rng.sample(DATA[kind], 4)
    where, lines = {}, []
    for one in [*subjects, *rng.choices(subjects, k=rng.randint(0, 2))]:
        template = rng.choice(DATA[f"{kind} again" if one in where else f"{kind} told"])
        where[one] = rng.choice([place for place in places if place != where.get(one)])
        lines.append(template.format(p=rng.choice(people), s=one, l=where[one]))
    return finish(rng, lines, kind, [({"s": one}, where[one]) for one in subjects], places)


def counting(rng, kind):
    """Something grows less. How many are left?"""
    words, number = DATA["numbers"], rng.randint(4, 9)
    gone = rng.randint(2, number - 2) # never one, which would need another plural
    slots = {"p": rng.choice(DATA["names"]), "f": rng.choice(DATA["countables"])}
    lines = [f"{slots['p']} has {words[number]} {slots['f']}.", rng.choice(DATA["lose"]).format(n=words[gone], **slots)]
    return finish(rng, lines, kind, [(slots, words[number - gone])], words[2:])


def describing(rng, kind):
    """Three people and what each likes, or the colour of what each owns. Which one belongs to each?"""
    people, things, values = (rng.sample(DATA[pool], 3) for pool in ("names", "things", kind))
    lines = [rng.choice(DATA[f"{kind} told"]).format(p=people[i], o=things[i], v=values[i]) for i in range(3)]
    return finish(rng, lines, kind, [({"p": people[i], "o": things[i]}, values[i]) for i in range(3)], DATA[kind])


TELLERS = {"things": giving, "places": tracking, "containers": tracking, "countables": counting, "foods": describing,
           "colours": describing}


def tell(rng):
    """A random story: (text, list of Query). Those that small models find hardest come most often."""
    kind = rng.choice((*TELLERS, "things", "places", "containers", "colours"))
    return TELLERS[kind](rng, kind)


def story_documents(rng):
    """Endless stream of stories, each with all its questions, in the forms of question blocks and of prose."""
    while True:
        text, queries = tell(rng)
        asked = [(query.question("train", rng), query) for query in queries]
        if rng.random() < 0.5:
            yield text + "".join(f"\nQuestion: {question}\nAnswer: {query.value}" for question, query in asked)
        else:
            yield " ".join([text, *(f"{question} {query.answer()}" for question, query in asked)])
