"""
Documents of the pretraining text about facts and lists.

Facts come in passes: each pass mentions every fact once, in one style, so that all are seen about equally often; each
fact deals out its own shuffle of the phrasings, so that all phrasings are seen too.
"""
from tasks.common import render_mc

from .facts import load_data, sentence

LISTS = load_data("lists.json")
ASKED = ("relation block", "mixed block", "plain", "dialogue") # the other styles tell
ROUND = ("relation", "relation block", "entity", "plain", "mixed", "mixed block", "relation", "dialogue", "mixed block")


class Phrasings:
    """Deals out the phrasings of each fact in shuffled rounds; `questions` is the field that questions come from."""
    def __init__(self, world, rng, questions="questions"):
        self.rng, self.questions, self.left = rng, questions, {}
        self.hidden = {fact: f"{world.held_out_cloze(fact)} {{y}}." for fact in world.prose_only}

    def next(self, fact, kind):
        """The next phrasing, filled in; `kind` is a field of Relation."""
        left = self.left.setdefault((fact, kind), [])
        if not left:
            left += [phrasing for phrasing in getattr(fact.relation, kind) if phrasing != self.hidden.get(fact)]
            self.rng.shuffle(left)
        return fact.say(left.pop())

    def question(self, fact):
        return self.next(fact, self.questions)

    def answer(self, fact):
        """Mostly the relation's full sentence: one fixed shape is easiest to learn."""
        return fact.answer() if self.rng.random() < 0.8 else fact.say(self.rng.choice(fact.relation.answers))


def fact_documents(world, rng, names):
    """Endless stream of documents about facts; prose-only facts are told wherever the others are asked about."""
    phrasings = Phrasings(world, rng)
    while True:
        for style in ROUND:
            asked, told = (world.open, world.prose_only) if style in ASKED else ([], world.facts)
            for facts in grouped(asked, style, rng):
                yield questions_and_answers(facts, style, phrasings, rng.sample(names, 2))
            for facts in grouped(told, style, rng):
                yield " ".join(phrasings.next(fact, "statements") for fact in facts)


def grouped(facts, style, rng):
    """Pieces of three to five facts: of one relation, of one entity, or of anything."""
    facts, pieces, place = rng.sample(facts, len(facts)), [], {}
    if style.startswith("relation"): # in a random order of the relations; sorting is stable, so random within one too
        facts.sort(key=lambda fact: place.setdefault(fact.relation.name, rng.random()))
    elif style == "entity":
        facts.sort(key=lambda fact: place.setdefault((fact.relation.entity, fact.x), rng.random()))
    while facts:
        size = rng.randint(3, 5)
        pieces.append(facts[:size])
        del facts[:size]
    return rng.sample(pieces, len(pieces))


def questions_and_answers(facts, style, phrasings, names):
    """Blocks of question and bare value (the form of few-shot prompts), or whole sentences, or a dialogue of two."""
    asked = [(phrasings.question(fact), fact) for fact in facts]
    if style.endswith("block"):
        return "\n\n".join(f"Question: {question}\nAnswer: {fact.y}" for question, fact in asked)
    if style == "plain":
        return " ".join(f"{question} {phrasings.answer(fact)}" for question, fact in asked)
    return "\n".join(f"{names[0]}: {question}\n{names[1]}: {phrasings.answer(fact)}" for question, fact in asked)


def choice_documents(world, rng):
    """
    Endless stream of multiple choice about facts that may be asked about.

    Half in the form of the benchmarks; half ask for all options of one list, which makes four letters to learn from.
    """
    phrasings, pools = Phrasings(world, rng), [{} for _ in world.of_relation]
    for pool, facts in zip(pools, world.of_relation.values(), strict=True):
        pool.update((fact.y, fact) for fact in rng.sample(facts, len(facts)) if fact not in world.prose_only)
    pools = [pool for pool in pools if len(pool) >= 4]
    while True:
        letters, fact = rng.sample("ABCD", 4), rng.choice(world.open)
        if rng.random() < 0.5 or not pools:
            options = [fact.y, *world.distractors(fact, rng, near=rng.random() < 0.5)]
            listed = dict(sorted(zip(letters, options, strict=True)))
            yield f"{render_mc(phrasings.question(fact), listed.keys(), listed.values())}\n{letters[0]}"
        else:
            facts = rng.sample(list(rng.choice(pools).values()), 4)
            asked = rng.sample(list(zip(letters, facts, strict=True)), 4)
            yield "\n".join([f"- {fact.y}={letter}" for letter, fact in sorted(zip(letters, facts, strict=True))]
                             + [f"Question: {phrasings.question(fact)}\nAnswer: {letter}" for letter, fact in asked])


def list_slots(entry):
    """The slots of the phrasings about one list."""
    return {"name": entry["name"], "items": ", ".join(entry["items"][:-1]) + " and " + entry["items"][-1]}


def list_documents(rng):
    """Endless stream of the world's lists, in turn."""
    while True:
        for entry in rng.sample(LISTS["lists"], len(LISTS["lists"])):
            templates = rng.sample(LISTS["statements"], 2)
            if rng.random() < 0.4:
                templates[1:] = [rng.choice(LISTS["questions"]), LISTS["answer"]]
            yield " ".join(sentence(template, **list_slots(entry)) for template in templates)
