"""
Held-out questions, and the stand-ins for benchmarks, the CORE bundle among them.

Held-out means: no phrasing is one of training's, half of the fact questions are about prose-only facts, and numbers,
spelled words and the beginnings of invented names are held out as well.
"""
import re

from tasks.common import split_tool_calls
from tasks.tinyworld import mentions

from . import exercises, stories
from .conversations import TALK, Talker, as_json, messages

REFUSAL = "I do not know"
SHARES = {"facts": 0.66, "arithmetic": 0.1, "spelling": 0.07, "story": 0.1, "honesty": 0.07} # of the test questions


def facts_to_ask(world, count, rng):
    """`count` facts, half prose-only and half open, each as seldom as possible."""
    def draw(facts):
        return [fact for _ in range(0, count, len(facts)) for fact in rng.sample(facts, len(facts))][:count // 2]
    return draw(world.prose_only) + draw(world.open)


def shuffled(right, wrong, rng): # (options, index of the right one)
    options = rng.sample([right, *wrong], 1 + len(wrong))
    return options, options.index(right)


def row(domain, question, reference, answers, wrong, rivals, rng):
    """One question; `wrong` are the other options of its multiple-choice form, `rivals` make a free answer wrong."""
    options, gold = shuffled(answers[0], wrong, rng)
    return {"domain": domain, "question": question, "answer": answers, "choices": options, "gold": gold,
            "rivals": rivals, "messages_json": as_json(messages(question, reference))}


def rivals_among(values, spoken):
    """The values that would make an answer wrong: all that question and right answer do not contain anyway."""
    return [value for value in values if not mentions(spoken, value)]


def fact_row(world, talker, fact, near=True):
    """A question about a fact (`near`: see World.distractors). The article of the value may be left out."""
    question, reference = talker.phrasings.question(fact), fact.answer()
    rivals = rivals_among(world.values[fact.relation.name], f"{question} {reference}")
    answers = list(dict.fromkeys((fact.y, re.sub(r"^(a|an|the) (?=\w\w)", "", fact.y))))
    wrong = world.distractors(fact, talker.rng, near)
    return row(fact.relation.domain, question, reference, answers, wrong, rivals, talker.rng)


def arithmetic_row(world, rng, split, is_practice=False):
    question, steps = exercises.problem(rng, world.seed, split, plain_share=0.6, is_practice=is_practice)
    result, reference = steps[-1][1], split_tool_calls(exercises.annotated(steps))
    wrong = [str(result + shift) for shift in rng.sample((-100, -10, -1, 1, 10, 100), 3)]
    return row("arithmetic", question, reference, [str(result)], wrong, [], rng)


def spelling_row(word, rng, split):
    answer, question = exercises.spelled(word), rng.choice(exercises.SPELLING[split]).format(w=word)
    reference = exercises.SPELLED.format(w=word, l=",".join(word))
    return row("spelling", question, reference, [answer], exercises.misspellings(word, rng), [], rng)


def story_row(rng):
    text, (query, *_) = stories.tell(rng)
    question = f"{text} {query.question('heldout', rng)}"
    return row("story", question, query.answer(), [query.value], rng.sample(query.rivals, 3), list(query.rivals), rng)


def honesty_row(world, talker):
    """Something outside the world; every value of the world would be an invented answer."""
    question, answer = talker.ask_unknown()
    refusals = " / ".join(refusal for entry in TALK["unknown"].values() for refusal in entry["answers"])
    rivals = rivals_among(sorted({fact.y for fact in world.facts}), f"{question} {refusals}")
    return row("honesty", question, answer, [REFUSAL], talker.rng.sample(rivals, 3), rivals, talker.rng)


def test_rows(world, count, words):
    """About `count` held-out questions of all domains; `words` are held-out words to spell."""
    rng, share = world.rng("test"), {domain: round(count * part) for domain, part in SHARES.items()}
    talker = Talker(world, world.facts, "heldout", rng)
    rows = [fact_row(world, talker, fact) for fact in facts_to_ask(world, share["facts"], rng)]
    rows += [arithmetic_row(world, rng, "heldout") for _ in range(share["arithmetic"])]
    rows += [spelling_row(word, rng, "heldout") for word in rng.sample(words, min(len(words), share["spelling"]))]
    rows += [story_row(rng) for _ in range(share["story"])]
    rows += [honesty_row(world, talker) for _ in range(share["honesty"])]
    unique = list({entry["question"]: entry for entry in rows}.values())
    return rng.sample(unique, len(unique))


def train_rows(world, count, words):
    """What the SmolTalk stand-in cannot hold, tool calls, whose content is a list of parts; and spelled words."""
    rng = world.rng("tinyworld train")
    rows = [arithmetic_row(world, rng, "train") if number % 2 else spelling_row(rng.choice(words), rng, "train")
            for number in range(count)]
    return [{key: entry[key] for key in ("domain", "question", "answer", "messages_json")} for entry in rows]


def practice_rows(world, count):
    """Arithmetic to be learned by trial alone: its phrasings are neither in the worked examples nor held out."""
    rng = world.rng("tinyworld practice")
    rows = [arithmetic_row(world, rng, "train", is_practice=True) for _ in range(count)]
    return [{key: row[key] for key in ("domain", "question", "answer", "messages_json")} for row in rows]


def choice_rows(world, name, split, count, near=True):
    """`count` questions about facts for a multiple-choice benchmark, open facts only in its split "train"."""
    rng = world.rng(name, split)
    talker = Talker(world, world.open, "train" if split == "train" else "heldout", rng)
    facts = rng.choices(world.open, k=count) if split == "train" else facts_to_ask(world, count, rng)
    return [fact_row(world, talker, fact, near) for fact in facts]


def arc_rows(world, name, split, count):
    """Rows in the schema of ARC: options of other kinds in ARC-Easy, of the same relation in ARC-Challenge."""
    return [{"id": f"{name}-{split}-{number}", "question": entry["question"], "answerKey": "ABCD"[entry["gold"]],
             "choices": {"text": entry["choices"], "label": list("ABCD")}}
            for number, entry in enumerate(choice_rows(world, name, split, count, near=name == "ARC-Challenge"))]


def mmlu_rows(world, split, count):
    """Rows in the schema of MMLU, the subject being the domain."""
    names = {"question": "question", "domain": "subject", "choices": "choices", "gold": "answer"} # ours: MMLU's
    return [{names[key]: entry[key] for key in names} for entry in choice_rows(world, "mmlu", split, count)]


def gsm8k_rows(world, split, count):
    """Problems for the calculator in the schema of GSM8K."""
    rng, side = world.rng("gsm8k", split), "train" if split == "train" else "heldout"
    problems = [exercises.problem(rng, world.seed, side, plain_share=0.3) for _ in range(count)]
    return [{"question": question, "answer": exercises.annotated(steps)} for question, steps in problems]


def cloze(world, fact, rng):
    """A statement less its value: for a prose-only fact the one that training never says, else any."""
    return world.held_out_cloze(fact) if fact in world.prose_only else rng.choice(fact.relation.clozes)


def schema_item(world, fact, rng):
    """Which of two entities fits the value? The two contexts differ in the entity alone."""
    others = [other for other in world.of_relation[fact.relation.name] if other.y != fact.y]
    template = cloze(world, fact, rng)
    options, gold = shuffled(fact.say(template), [rng.choice(others).say(template)], rng)
    return {"context_options": options, "gold": gold, "continuation": f"{fact.y}."}


def choice_item(query, row):
    return {"query": query, "choices": row["choices"], "gold": row["gold"]}


def core_tasks(world, count, words):
    """
    Small in-context tasks of all three types, about `count` items each; `words` are held-out words to spell.

    Returns [(entry of core.yaml, random baseline in percent, items)].
    """
    rng = world.rng("core")
    facts, talker = facts_to_ask(world, count, rng), Talker(world, world.facts, "heldout", rng)
    asked = [(f"Question: {row['question']}", fact, row) for fact in facts for row in [fact_row(world, talker, fact)]]
    told = [(fact.say(cloze(world, fact, rng)), fact, row) for _, fact, row in asked if len(fact.relation.clozes) > 1]
    spelled = [spelling_row(word, rng, "heldout") for word in rng.sample(words, min(len(words), count))]
    paired = [fact for _, fact, _ in told if len(world.values[fact.relation.name]) > 1]
    tasks = [
        ("question_choice", "multiple_choice", 3, "\nAnswer: ", 25, [choice_item(ask, row) for ask, _, row in asked]),
        ("cloze_choice", "multiple_choice", 0, " ", 25, [choice_item(ask, row) for ask, _, row in told]),
        ("spelling_choice", "multiple_choice", 0, " ", 25, [choice_item(row["question"], row) for row in spelled]),
        ("entity_schema", "schema", 0, " ", 50, [schema_item(world, fact, rng) for fact in paired]),
        ("question_answer", "language_modeling", 3, "\nAnswer: ", 0,
         [{"context": ask, "continuation": fact.y} for ask, fact, _ in asked]),
        ("cloze", "language_modeling", 0, " ", 0, [{"context": ask, "continuation": fact.y} for ask, fact, _ in told]),
        ("story", "language_modeling", 0, "\nAnswer: ", 0, # asked as in training; the stories are new
         [{"context": f"{text}\nQuestion: {query.question('train', rng)}", "continuation": query.value}
          for text, (query, *_) in map(stories.tell, [rng] * count)])]
    return [({"label": f"tinyworld_{name}", "icl_task_type": kind, "dataset_uri": f"tinyworld_{name}.jsonl",
              "num_fewshot": [shots], "continuation_delimiter": delimiter}, baseline, items)
            for name, kind, shots, delimiter, baseline, items in tasks]
