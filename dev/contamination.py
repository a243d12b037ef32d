"""
How much of the evaluations stands in the training text: questions that share a run of 13 words with it.

    python -m dev.contamination
    python -m dev.contamination --tasks "GSM8K|MMLU" --max-documents 100000

The rule of Brown et al. 2020 (GPT-3, https://arxiv.org/abs/2005.14165, appendix C) with its largest N, 13: lower-cased
words, punctuation ignored, within one document. A question with fewer words has no such run, and is counted apart. One
shared run is a suspicion, no proof: it may be a quotation that both have. Reads the training shards as a stream, the
validation shard not; in memory are the runs of the questions alone. Writes the report's "Contamination" section.
"""
import argparse
import itertools
import re

from nanochat.common import UserError, dataset_label, run_main
from nanochat.dataset import parquets_iter_batched
from nanochat.report import get_report
from tasks.registry import EVALS, available_evals

N = 13 # words in a run


def words_of(text):
    return re.findall(r"\w+", text.lower())


def runs_of(words):
    """All runs of N words, as an iterator of tuples."""
    return zip(*(words[i:] for i in range(N)), strict=False) # the shorter ones end it


def question_of(conversation):
    """The first message of the user; of multiple choice the question alone, since no text has our rendering of it."""
    text = next(message["content"] for message in conversation["messages"] if message["role"] == "user")
    return text.partition(": ")[2].partition("\n- ")[0] if "letters" in conversation else text


def load_questions(names):
    """{evaluation: words of each question}. One whose data cannot be had is an error when named, else left out."""
    questions = {}
    for name in names or available_evals():
        try:
            questions[name] = [words_of(question_of(conversation)) for conversation in EVALS[name].make()]
        except UserError as error:
            if names:
                raise
            print(f"Leaving out {name}: {error}")
    if not questions:
        raise UserError("no data of any evaluation: run `python -m nanochat.dataset --prepare -n 8` or `dev.mirror`")
    return questions


def find_shared(wanted, max_documents):
    """(those runs of the set `wanted` that occur in the training shards, number of documents read)."""
    from tqdm import tqdm
    documents = itertools.islice(itertools.chain.from_iterable(parquets_iter_batched("train")), max_documents)
    shared, number = set(), 0
    for number, text in enumerate(tqdm(documents, unit=" documents", disable=None), start=1):
        shared |= wanted.intersection(runs_of(words_of(text)))
    return shared, number


def render_rows(questions, shared):
    """The lines of a markdown table, one for each evaluation."""
    mark = f" ({dataset_label()})" if dataset_label() else ""
    rows = [["Evaluation", "Questions", f"Under {N} words", f"Sharing {N} words", "Share of the longer"], ["---"] * 5]
    for name, items in questions.items():
        longer = [words for words in items if len(words) >= N]
        hits = sum(not shared.isdisjoint(runs_of(words)) for words in longer)
        share = f"{100 * hits / len(longer):.2f} %" if longer else "-"
        rows.append([name + mark, f"{len(items):,}", f"{len(items) - len(longer):,}", f"{hits:,}", share])
    return ["| " + " | ".join(f"{cell:<23}" for cell in row) + " |" for row in rows]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--tasks", default="", help="evaluations, joined by | (empty = all whose data can be had)")
    parser.add_argument("--max-documents", type=int, default=-1, help="read only the first so many (-1 = all)")
    args = parser.parse_args(argv)
    names = args.tasks.split("|") if args.tasks else []
    if unknown := [name for name in names if name not in EVALS]:
        parser.error(f"--tasks must be names joined by | of {', '.join(EVALS)}, got {', '.join(unknown)}")
    if args.max_documents != -1 and args.max_documents < 1:
        parser.error(f"--max-documents must be at least 1, or -1 for all, got {args.max_documents}")
    questions = load_questions(names)
    wanted = {run for items in questions.values() for words in items for run in runs_of(words)}
    print(f"{len(wanted):,} runs of {N} words in the questions; reading the training shards", flush=True)
    shared, number = find_shared(wanted, None if args.max_documents == -1 else args.max_documents)
    rows = render_rows(questions, shared)
    print(f"{number:,} documents read", *rows, sep="\n")
    get_report().log("Contamination", [vars(args), {"documents read": number}, "\n".join(["", *rows])])


if __name__ == "__main__":
    run_main(main)
