"""
Compare the tokenizer's compression with that of GPT-2 and GPT-4.

    python -m scripts.tok_eval

Reads:   the tokenizer, one row group of each split, scripts/tok_eval_texts, GPT's vocabularies (tiktoken fetches them).
Writes:  the report's "Tokenizer evaluation" section.
"""
import argparse
import sys
import threading
from pathlib import Path

from nanochat.common import read_manifest, run_main
from nanochat.dataset import NAME as DEFAULT_DATA
from nanochat.dataset import parquets_iter_batched
from nanochat.report import get_report
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer

TEXT_NAMES = ["news", "korean", "code", "math", "science"]
BASELINES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"} # shown name -> tiktoken's name
BASELINE_TIMEOUT = 20 # seconds for its download: without a network it can hang for minutes
GREEN, RED, RESET = "\033[92m", "\033[91m", "\033[0m"


def build_parser():
    return argparse.ArgumentParser(description=__doc__.split("\n")[1])


def load_texts():
    """{name: text}: our own samples, then the first row group of each split, joined by newlines, where there is one."""
    folder = Path(__file__).parent / "tok_eval_texts"
    texts = {name: (folder / f"{name}.txt").read_text(encoding="utf-8") for name in TEXT_NAMES}
    name = (read_manifest() or {"name": DEFAULT_DATA})["name"]
    for split in ("train", "val"):
        row = f"{'fwe' if name == DEFAULT_DATA else name}-{split}"
        try:
            text = "\n".join(next(parquets_iter_batched(split), []))
        except FileNotFoundError as error:
            print(f"{row} is left out: {error}")
            continue
        if text:
            texts[row] = text
        else:
            print(f"{row} is left out: its first row group holds no text")
    return texts


def load_baseline(name, timeout=BASELINE_TIMEOUT):
    """tiktoken's tokenizer of that name, or None after one printed line when it cannot be had."""
    outcome = {"error": f"no answer within {timeout} s"}

    def fetch():
        try:
            outcome["tokenizer"] = RustBPETokenizer.from_pretrained(name)
        except (OSError, ValueError) as error: # the network's errors are OSErrors
            outcome["error"] = type(error).__name__
    thread = threading.Thread(target=fetch, daemon=True) # a daemon does not keep the process alive
    thread.start()
    thread.join(timeout)
    if "tokenizer" not in outcome:
        print(f"{name} is left out: tiktoken cannot get its vocabulary ({outcome['error']})")
    return outcome.get("tokenizer")


def measure(name, tokenizer, texts):
    """{text name: {"bytes", "tokens", "ratio"}}, ratio in bytes per token. Raises ValueError when a text is changed."""
    results = {}
    for text_name, text in texts.items():
        ids = tokenizer.encode(text)
        if tokenizer.decode(ids) != text:
            raise ValueError(f"the tokenizer {name} must give back every text, but changes {text_name}: train it again")
        num_bytes = len(text.encode("utf-8"))
        results[text_name] = {"bytes": num_bytes, "tokens": len(ids), "ratio": num_bytes / len(ids)}
    return results


def compare(baseline, base, ours):
    """Rows [text, bytes, baseline tokens, ratio, our tokens, ratio, relative difference in %, better] as strings."""
    rows = []
    for text_name, b in base.items():
        o = ours[text_name]
        difference = 100 * (b["tokens"] - o["tokens"]) / b["tokens"] # positive: ours needs fewer
        better = "Tie" if b["tokens"] == o["tokens"] else "Ours" if difference > 0 else baseline
        rows.append([text_name, f"{b['bytes']:,}", f"{b['tokens']:,}", f"{b['ratio']:.2f}",
                     f"{o['tokens']:,}", f"{o['ratio']:.2f}", f"{difference:+.1f}%", better])
    return rows


def print_comparison(baseline, rows, colored):
    """The table on the console: 95 columns; with colours the winner is green and the loser red."""
    def line(cells, base_color="", our_color=""):
        reset = RESET if base_color else ""
        name, size, *numbers, difference, better = cells
        base, ours = (f"{tokens:>10} {ratio:>7}" for tokens, ratio in (numbers[:2], numbers[2:]))
        base, ours = f"{base_color}{base}{reset}", f"{our_color}{ours}{reset}"
        return f"{name:<15} {size:>10}  {base}  {ours}  {difference:>15}  {better:>10}"
    print(f"\nComparison with {baseline}:\n" + "=" * 95)
    print(f"{'':27} {baseline:>19} {'Ours':>19}")
    print(line(["Text Type", "Bytes", "Tokens", "Ratio", "Tokens", "Ratio", "Relative Diff %", "Better"]))
    print("-" * 95)
    for row in rows:
        colors = {"Ours": (RED, GREEN), baseline: (GREEN, RED)}.get(row[-1], ("", ""))
        print(line(row, *(colors if colored else ("", ""))))


def markdown(header, rows):
    """A markdown table as one string."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main(argv=None):
    build_parser().parse_args(argv)
    tokenizer = get_tokenizer()
    texts = load_texts()
    baselines = {name: found for name, short in BASELINES.items() if (found := load_baseline(short)) is not None}
    print("\nVocabulary sizes:")
    for name, found in {**baselines, "Ours": tokenizer}.items():
        print(f"{name}: {found.get_vocab_size():,}")

    ours = measure("Ours", tokenizer, texts)
    sections = []
    for name, baseline in baselines.items():
        rows = compare(name, measure(name, baseline, texts), ours)
        print_comparison(name, rows, colored=sys.stdout.isatty())
        header = ["Text Type", "Bytes", f"{name} Tokens", f"{name} Ratio", "Ours Tokens", "Ours Ratio",
                  "Relative Diff %"]
        sections.append(f"### Comparison with {name}\n\n" + markdown(header, [row[:-1] for row in rows]))
    if not baselines:
        print("\n" + "\n".join(f"{name:<15} {r['bytes']:>10,} bytes {r['tokens']:>10,} tokens, ratio {r['ratio']:.2f}"
                               for name, r in ours.items()))
    numbers = {"vocab_size": tokenizer.get_vocab_size(), **{f"ratio_{name}": r["ratio"] for name, r in ours.items()}}
    get_report().log("Tokenizer evaluation", [numbers, *sections])


if __name__ == "__main__":
    run_main(main)
