"""
Conversations for fine-tuning: questions about facts, follow-ups, stories, lists, small talk, and honest ignorance.

A conversation is a list of messages {"role", "content"}, user first.
"""
import json

from . import stories
from .facts import HELD_OUT, fraction, load_data, sentence
from .prose import LISTS, Phrasings, list_slots

TALK = load_data("talk.json")


def messages(*turns):
    """Alternate user and assistant."""
    return [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]


def as_json(value):
    return json.dumps(value, ensure_ascii=False)


class Talker:
    """
    Makes conversations, one method for each kind, asking about all `facts` equally often.

    split  "train" or "heldout": which phrasings questions have
    """
    def __init__(self, world, facts, split, rng):
        self.facts, self.split, self.rng, self.seed = facts, split, rng, world.seed
        self.deck, self.groups = [], {}
        self.phrasings = Phrasings(world, rng, "questions" if split == "train" else "heldout_questions")
        for fact in facts:
            self.groups.setdefault(fact.relation.name, []).append(fact)
            self.groups.setdefault((fact.relation.entity, fact.x), []).append(fact)

    def ask(self, fact=None):
        """(question, answer) about a fact, by default the next one of a shuffled deck."""
        if fact is None:
            self.deck = self.deck or self.rng.sample(self.facts, len(self.facts))
            fact = self.deck.pop()
        return self.phrasings.question(fact), self.phrasings.answer(fact)

    def perhaps_ask(self, probability):
        return self.ask() if self.rng.random() < probability else ()

    def fact(self):
        return messages(*self.ask(), *self.perhaps_ask(0.15))

    def follow_up(self):
        """A second question that only names another entity, or calls the same one `its`."""
        first = self.rng.choice(self.facts)
        alike, same = ([fact for fact in self.groups[key] if fact is not first]
                       for key in (first.relation.name, (first.relation.entity, first.x)))
        same = [fact for fact in same if fact.relation.noun]
        second = self.rng.choice(same if same and self.rng.random() < 0.7 else alike or [first])
        template = self.rng.choice(TALK["noun_follow_ups" if second in same else "follow_ups"])
        question = sentence(template, x=second.x, noun=second.relation.noun)
        return messages(*self.ask(first), question, second.answer())

    def story(self):
        """A story with its first question, often followed by the others."""
        text, queries = stories.tell(self.rng)
        turns = [turn for query in queries for turn in (query.question(self.split, self.rng), query.answer())]
        turns[0] = f"{text} {turns[0]}"
        return messages(*(turns if self.rng.random() < 0.8 else turns[:2]))

    def list(self):
        slots = list_slots(self.rng.choice(LISTS["lists"]))
        question = self.rng.choice(LISTS["questions" if self.split == "train" else "heldout_questions"])
        return messages(sentence(question, **slots), sentence(LISTS["answer"], **slots))

    def small_talk(self):
        """A greeting or the like, often with a real question after it."""
        entry = self.rng.choice(TALK["small_talk"] + TALK["identity"])
        return messages(*(self.rng.choice(entry[key]) for key in ("questions", "answers")), *self.perhaps_ask(0.5))

    def memory(self):
        """The user says something about himself, and asks for it at once or after another question."""
        pools = {"p": "names", "f": "foods", "c": "colours"}
        slots = {slot: self.rng.choice(stories.DATA[pool]) for slot, pool in pools.items()}
        entry = self.rng.choice(TALK["memory"])
        said, asked = (self.rng.choice(entry[key]).format(**slots) for key in ("said", "asked"))
        reply, answer = (entry[key].format(**slots) for key in ("reply", "answer"))
        return messages(said, reply, *self.perhaps_ask(0.4), asked, answer)

    def unknown(self):
        return messages(*self.perhaps_ask(0.3), *self.ask_unknown())

    def ask_unknown(self):
        """(question, honest answer) about something outside the world."""
        data = TALK["unknown"]
        known = [fact for fact in self.facts if fact.relation.entity in data["about"][self.split]]
        kind = self.rng.choice(("world", "world", "world", "person", "now", *(("about", "about") if known else ())))
        questions, answers = data[kind][self.split], data[kind]["answers"]
        slots = {"u": self.invented_name(), "f": self.rng.choice(stories.DATA["names"])}
        if kind == "about": # a thing of the world, but nothing that the world knows about it
            fact = self.rng.choice(known)
            slots["x"], questions = fact.x, questions[fact.relation.entity]
        answer = answers[0] if self.rng.random() < 0.7 else self.rng.choice(answers)
        return sentence(self.rng.choice(questions), **slots), sentence(answer, **slots)

    def invented_name(self):
        """A name that nothing has, whose beginning belongs to this split; there are thousands of beginnings."""
        while True:
            start, end = ("".join(self.rng.choice(TALK["invented"][part]) for part in parts)
                          for parts in (("onsets", "vowels", "codas"), ("middles", "ends")))
            if (fraction(self.seed, "name", start) < HELD_OUT) == (self.split == "heldout"):
                return start + end

    def identity(self):
        """One to three questions about the model itself."""
        chosen = self.rng.sample(TALK["identity"], self.rng.randint(1, 3))
        return messages(*(self.rng.choice(entry[key]) for entry in chosen for key in ("questions", "answers")))

    def make(self, weights, count):
        """`count` rows in the schema of SmolTalk, their kinds in the proportions of `weights`, in random order."""
        kinds = [kind for kind, weight in weights.items() for _ in range(round(count * weight / sum(weights.values())))]
        kinds = self.rng.sample(kinds, len(kinds))
        return [{"messages": getattr(self, kind)(), "source": f"tinyworld {kind}"} for kind in kinds]


def talk_documents(talker):
    """Endless stream of conversations as plain text."""
    while True:
        talk = getattr(talker, talker.rng.choice(("small_talk", "memory", "unknown", "unknown")))()
        yield "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in talk)
