"""
The facts of the little world: read them, choose how many, and decide what is held out.

    facts/*.json  ->  Relation (phrasings and pairs)  ->  World (the chosen facts; a tenth is never asked about)

That a fact read in prose alone can be told when asked is no matter of course: Allen-Zhu and Li 2023, "Physics of
Language Models: Part 3.1" (https://arxiv.org/abs/2309.14316). All chance depends on the seed and on names alone.
"""
import functools
import hashlib
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

DATA_DIR = Path(__file__).parent
FACTS_PER_RELATION = 10 # at least, in a world too small for all relations
HELD_OUT = 0.1 # share of the numbers and words that only held-out questions have
PROBES = {"France", "gold", "hot", "Friday"} # what base_train's sample prompts are about: nothing of it is held out


def load_data(name):
    """Parse one of the data files beside this module."""
    return json.loads((DATA_DIR / name).read_text(encoding="utf-8"))


@functools.cache
def fraction(seed, *names):
    """A number in [0, 1) that depends on the seed and the names alone."""
    return int(hashlib.sha256("/".join(map(str, (seed, *names))).encode()).hexdigest()[:8], 16) / 2**32


def sentence(template, **slots):
    """Fill the slots and start with a capital letter."""
    text = template.format(**slots)
    return text[:1].upper() + text[1:]


@dataclass(eq=False)
class Relation:
    """One kind of fact with its phrasings, as the JSON files have it; `entity` and `value` are the kinds of x and y."""
    domain: str
    name: str
    unique: bool # y is determined by x
    entity: str
    value: str
    pairs: list
    statements: list
    questions: list
    heldout_questions: list
    answers: list

    @property
    def noun(self):
        """What y is of x, e.g. "capital", when the first answer has the plain form "The capital of {x} is {y}."."""
        match = re.fullmatch(r"The ([\w ]+) of \{x\} is \{y\}\.", self.answers[0])
        return match and match[1]

    @functools.cached_property
    def clozes(self):
        """Statements that end in the value, less the value: what comes before it can serve as a prompt."""
        return [s.removesuffix(" {y}.") for s in self.statements if s.endswith(" {y}.")]


@dataclass(eq=False)
class Fact:
    relation: Relation
    x: str
    y: str

    def say(self, template):
        """The template about this fact, as a sentence."""
        return sentence(template, x=self.x, y=self.y)

    def answer(self):
        """The relation's full sentence."""
        return self.say(self.relation.answers[0])


def load_relations(folder=DATA_DIR / "facts"):
    """All relations of the fact files of a folder, in alphabetical order of the files."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))]
    return [Relation(content["domain"], **entry) for content in files for entry in content["relations"]]


def choose_relations(relations, count):
    """`count` relations (at least four) in their order: the probes', then the first of each domain, and so on."""
    seen, ranked = {}, []
    for number, relation in enumerate(relations):
        rank = seen[relation.domain] = seen.get(relation.domain, -1) + 1
        ranked.append((rank, relation.pairs[0][0] not in PROBES, number))
    return [relations[number] for number in sorted(number for _, _, number in sorted(ranked)[:max(4, count)])]


class World:
    """
    The chosen facts: round robin over the relations, best known first, until there are `num_facts`.

    prose_only  the tenth that training states but never asks about (spread over the relations, chosen by hash)
    open        the others
    """
    def __init__(self, num_facts, seed, relations=None):
        self.seed = seed
        relations = choose_relations(relations or load_relations(), num_facts // FACTS_PER_RELATION)
        order = sorted((rank, number) for number, one in enumerate(relations) for rank in range(len(one.pairs)))
        chosen = sorted((number, rank) for rank, number in order[:num_facts])
        self.facts = [Fact(relations[number], *relations[number].pairs[rank]) for number, rank in chosen]
        self.of_relation = {}
        for fact in self.facts:
            self.of_relation.setdefault(fact.relation.name, []).append(fact)
        self.values = {name: list(dict.fromkeys(fact.y for fact in facts)) for name, facts in self.of_relation.items()}
        self.prose_only = self._choose_prose_only()
        self.open = [fact for fact in self.facts if fact not in self.prose_only]

    def _choose_prose_only(self):
        """A tenth of each relation, rounded so that the whole comes to a tenth as well."""
        chosen, seen = [], 0
        for facts in self.of_relation.values():
            seen += len(facts)
            ranked = sorted((fact for fact in facts if fact.x not in PROBES),
                            key=lambda fact: fraction(self.seed, fact.relation.name, fact.x))
            chosen += ranked[:min(seen // 10 - len(chosen), len(facts) // 2)]
        return chosen

    def rng(self, *names):
        """An independent random.Random for one part of the world (seeding by a string is the same everywhere)."""
        return random.Random("/".join(map(str, (self.seed, *names))))

    def held_out_cloze(self, fact):
        """The cloze that training never says about this prose-only fact, or None when there is only one."""
        clozes = fact.relation.clozes
        place = fraction(self.seed, "cloze", fact.relation.name, fact.x) * len(clozes)
        return clozes[int(place)] if len(clozes) > 1 else None

    def distractors(self, fact, rng, near=True):
        """Three wrong values: of the same relation if `near` (filled up when it has too few), else of other ones."""
        own = [y for y in self.values[fact.relation.name] if y != fact.y]
        other = sorted({y for values in self.values.values() for y in values} - {fact.y, *own})
        return (rng.sample(own, min(3, len(own))) * near + rng.sample(other, 3))[:3]
