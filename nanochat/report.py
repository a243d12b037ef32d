"""
The record of a run: every stage logs one section, and the page with summary table and plots is made from them.

    python -m nanochat.report reset       a new run: old sections go, the header describes code and machine
    python -m nanochat.report generate    sections -> <base>/report/report.md, and a copy with plots in this folder
    python -m nanochat.report compare d4 d6 [--stage sft]     several runs of a stage: <base>/report/report_compare.md

A section lies in <base>/report/ twice: <slug>.md for people and <slug>.json for the table, which takes metrics from the
data by exact key, never from the printed text. Needs no network; plots need matplotlib and are left out without it.
"""
import argparse
import datetime
import glob
import json
import os
import platform
import re
import shutil
import subprocess
import uuid

import torch

from nanochat.common import (UserError, atomic_write, dataset_label, get_base_dir, get_dist_info, print0, read_json,
                             run_main, write_json)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) # of the repository
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
SECTIONS = ["tokenizer-training", "tokenizer-evaluation", "base-model-training", "base-model-loss",
            "base-model-evaluation", "midtraining", "chat-evaluation-mid", "chat-sft", "chat-evaluation-sft",
            "chat-rl", "chat-evaluation-rl"] # in the order of the page; others follow by name
RL_SECTIONS = {"chat-rl", "chat-evaluation-rl"} # an extra that does not count into the total time
METRIC_SOURCES = {"BASE": "base-model-evaluation", "MID": "chat-evaluation-mid", "SFT": "chat-evaluation-sft",
                  "RL": "chat-evaluation-rl"}
HOURLY_RATES = {"h100": 3.00, "a100": 1.79, "v100": 0.55, "": 2.00} # USD per GPU, by a part of its name
COUNTED_FILES = ("*.py", "*.md", "*.rs", "*.html", "*.toml", "*.sh")
CURVES = ("train/loss", "val/bpb", "val/loss", "core_metric", "train/reward", "pass@1") # of metrics.jsonl

# -----------------------------------------------------------------------------
# The header: which code, on which machine

def git(*arguments):
    """Output of a git command in our repository, stripped; empty when it fails or this is no checkout."""
    if not os.path.exists(os.path.join(ROOT, ".git")):
        return "" # an installed package may lie inside somebody else's repository
    try:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _git_lines():
    commit, state = git("rev-parse", "--short", "HEAD"), "dirty" if git("status", "--porcelain") else "clean"
    return {"Branch": git("rev-parse", "--abbrev-ref", "HEAD") or "unknown",
            "Commit": f"{commit} ({state})" if commit else "unknown", "Message": git("log", "-1", "--format=%s")[:80]}


def _hardware_lines():
    import psutil
    lines = {"Platform": platform.system(),
             "CPUs": f"{psutil.cpu_count(logical=False)} cores ({psutil.cpu_count()} logical)",
             "Memory": f"{psutil.virtual_memory().total / 2**30:.1f} GB"}
    if not torch.cuda.is_available():
        return lines | {"GPUs": "None available"}
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    rate = next(rate for name, rate in HOURLY_RATES.items() if name in gpus[0].name.lower())
    return lines | {"GPUs": f"{len(gpus)}x {', '.join(sorted({gpu.name for gpu in gpus}))}",
                    "GPU Memory": f"{sum(gpu.total_memory for gpu in gpus) / 2**30:.1f} GB total",
                    "CUDA Version": torch.version.cuda, "Hourly Rate": f"${rate * len(gpus):.2f}/hour"}


def _bloat_lines():
    """How much there is to read, in the files that git tracks; empty outside a checkout."""
    texts = []
    for name in git("ls-files", "-z", "--", *COUNTED_FILES).split("\0"):
        path = os.path.join(ROOT, name)
        if name and os.path.isfile(path): # tracked, but perhaps deleted just now
            with open(path, encoding="utf-8", errors="replace") as file:
                texts.append(file.read())
    if not texts:
        return {}
    with open(os.path.join(ROOT, "requirements.lock"), encoding="utf-8") as file:
        packages = sum("==" in line for line in file)
    characters = sum(map(len, texts))
    return {"Characters": f"{characters:,}", "Lines": f"{sum(text.count(chr(10)) for text in texts):,}",
            "Files": f"{len(texts):,}", "Tokens (approx)": f"{characters // 4:,}",
            "Dependencies (packages in requirements.lock)": f"{packages:,}"}


def render_header(run_id, started):
    """Title, environment and start of a run, as markdown."""
    blocks = {"Git Information": _git_lines(), "Hardware": _hardware_lines(),
              "Software": {"Python": platform.python_version(), "PyTorch": torch.__version__}, "Bloat": _bloat_lines()}
    text = f"# nanochat training report\n\nGenerated: {started}\n\n## Environment\n\n"
    for heading, facts in blocks.items():
        bullets = "".join(f"- {name}: {value}\n" for name, value in facts.items())
        text += f"### {heading}\n{bullets}\n" if bullets else ""
    return f"{text}Run: {run_id}\nRun started: {started}\n\n---\n\n"

# -----------------------------------------------------------------------------
# Sections

def format_value(value):
    """A value as the page shows it: floats with 4 decimals, tiny ones with an exponent, large ints with separators."""
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 or value != value else f"{value:.3g}"
    if isinstance(value, int) and value >= 10000:
        return f"{value:,}"
    return str(value)


def render_section(section, timestamp, data):
    """Markdown of a section. `data`: str (verbatim) and dicts (a bullet an entry; one printed before is left out)."""
    lines, printed = [f"## {section}", f"timestamp: {timestamp}", ""], {}
    for item in filter(None, data):
        if isinstance(item, str):
            lines.append(item)
            continue
        fresh = {key: value for key, value in item.items() if key not in printed or printed[key] != value}
        lines += [f"- {key}: {format_value(value)}" for key, value in fresh.items()]
        printed |= item
    return "\n".join(lines) + "\n"


def _jsonable(value):
    """The value as JSON can hold it: scalars of numpy and torch become numbers, devices and the like text."""
    return json.loads(json.dumps(value, default=lambda item: item.item() if hasattr(item, "item") else str(item)))


def find_metrics(section):
    """
    {metric: score} of a section: the floats under a name of one word with a capital, as tasks have it, and those
    under "<name> metric". Arguments, counts and sample text are none of these.
    """
    entries = {key: value for item in section["data"] if isinstance(item, dict) for key, value in item.items()}
    names = {key: re.fullmatch(r"([A-Z][\w-]*)( metric)?", key) for key in entries}
    return {names[key][1]: value for key, value in entries.items() if names[key] and isinstance(value, float)}


def _read_foreign(text):
    """A section of which only the markdown is there, as the JSON would be: bullets become one dict."""
    entries = dict(re.findall(r"^- ([^:\n]+): (.*)$", text, re.MULTILINE))
    numbers = {key: float(value) for key, value in entries.items() if re.fullmatch(r"-?\d*\.\d+", value)}
    stamp = re.search(r"^timestamp: (.*)$", text, re.MULTILINE)
    return {"timestamp": stamp and stamp[1], "run_id": None, "data": [entries | numbers]}


def _wall_clock(started, sections):
    """Whole hours and minutes from the start to the last section that is not RL's, or "unknown"."""
    try:
        start = datetime.datetime.strptime(started, TIME_FORMAT)
        ends = [datetime.datetime.strptime(section["timestamp"], TIME_FORMAT)
                for slug, section in sections.items() if slug not in RL_SECTIONS]
        minutes = (max(ends) - start).total_seconds() // 60
    except (TypeError, ValueError): # a time is missing or not one of ours
        return "unknown"
    return f"{minutes // 60:.0f}h{minutes % 60:.0f}m" if minutes >= 0 else "unknown"


def render_table(scores, label):
    """Markdown table of {column: {metric: score}}: CORE first, ChatCORE last. `label` marks scores on stand-ins."""
    names = {name for column in scores.values() for name in column}
    metrics = sorted(names, key=lambda name: ({"CORE": 0, "ChatCORE": 2}.get(name, 1), name))
    shown = {name: f"{name} ({label})" if label else name for name in metrics}
    width = max([15, *map(len, shown.values())])
    rows = [["Metric", *scores], ["-" * width, *["-" * 8] * len(scores)]]
    rows += [[shown[name], *(format_value(column.get(name, "-")) for column in scores.values())] for name in metrics]
    return "".join(f"| {row[0]:<{width}} | {' | '.join(f'{cell:<8}' for cell in row[1:])} |\n" for row in rows)

# -----------------------------------------------------------------------------
# Plots

def read_curves(path):
    """{key: (steps, values)} of a metrics.jsonl; a line cut short by a crash, or without a step, is left out."""
    curves = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
                step = int(record["step"])
            except (ValueError, TypeError, KeyError, OverflowError):
                continue
            for key, value in record.items():
                if isinstance(value, (int, float)) and key != "step":
                    steps, values = curves.setdefault(key, ([], []))
                    steps.append(step)
                    values.append(value)
    return curves


def metrics_files(stage="", tag=None):
    """The metrics.jsonl of all runs, of those of one stage (base, mid, sft, rl), or of its run `tag`; newest last."""
    name = glob.escape(tag) if tag else "*"
    files = glob.glob(os.path.join(glob.escape(get_base_dir()), f"*{stage}_checkpoints", name, "metrics.jsonl"))
    return sorted(files, key=os.path.getmtime)


def plot_curves(files, path, most=6):
    """Draw loss, validation and reward from these metrics.jsonl, `most` runs in a panel; False when there are none."""
    from matplotlib.figure import Figure
    panels = {} # (stage, key): [(tag, steps, values)]
    for file in files:
        stage, tag, _ = file.split(os.sep)[-3:]
        for key, (steps, values) in read_curves(file).items():
            if key in CURVES:
                panels.setdefault((stage.removesuffix("_checkpoints"), key), []).append((tag, steps, values))
    if not panels:
        return False
    figure = Figure(figsize=(11, 3.2 * -(-len(panels) // 2)), layout="constrained")
    for i, ((stage, key), runs) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(-(-len(panels) // 2), 2, i)
        for tag, steps, values in runs[-most:]: # more than six are hard to tell apart
            axes.plot(steps, values, label=tag, marker="." if len(steps) < 20 else None)
        axes.set(title=f"{stage}: {key}", xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    with atomic_write(path, "wb") as file:
        figure.savefig(file, dpi=100, format="png")
    return True


def plot_scores(scores, label, path):
    """Draw the summary table as bars, a colour a stage; False when it is empty."""
    from matplotlib.figure import Figure
    columns = {name: column for name, column in scores.items() if column}
    metrics = sorted({name for column in columns.values() for name in column})
    if not metrics:
        return False
    figure = Figure(figsize=(11, 1.2 + 0.45 * len(metrics)), layout="constrained")
    axes, height = figure.subplots(), 0.8 / len(columns)
    for i, (name, column) in enumerate(columns.items()):
        places = [metrics.index(metric) + height * (i + 0.5) - 0.4 for metric in column]
        axes.bar_label(axes.barh(places, list(column.values()), height, label=name), fmt="%.3f", fontsize="small")
    axes.set_title(f"Scores on {label} stand-ins" if label else "Scores")
    axes.set_yticks(range(len(metrics)), metrics)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.legend(fontsize="small")
    with atomic_write(path, "wb") as file:
        figure.savefig(file, dpi=100, format="png")
    return True

# -----------------------------------------------------------------------------
# Several runs side by side

def summarize_run(file):
    """What a metrics.jsonl and the newest meta file beside it say of a run, as a row of the table."""
    curves = read_curves(file)
    metas = sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(file)), "meta_*.json"))) # none before it saves
    row = {"depth": read_json(metas[-1], model_config=dict)["model_config"].get("n_layer", "-")} if metas else {}
    row |= {"last step": max((steps[-1] for steps, _ in curves.values()), default=0)}
    row |= {f"last {key}": curves[key][1][-1] for key in CURVES if key in curves}
    if "val/bpb" in curves:
        row["least val/bpb"] = min(curves["val/bpb"][1], key=lambda bpb: (bpb != bpb, bpb)) # NaN is no minimum
    if "total_training_time" in curves:
        row["minutes"] = curves["total_training_time"][1][-1] / 60
    return row


def compare(tags, stage):
    """Write report_compare.md with its plot beside the report; returns its path. UserError for an unknown run."""
    found = {tag: metrics_files(stage, tag) for tag in tags}
    if missing := [tag for tag, files in found.items() if not files]:
        there = [file.split(os.sep)[-2] for file in metrics_files(stage)]
        raise UserError(f"{get_base_dir()} has no metrics.jsonl of a {stage} run {', '.join(missing)}: it has those of "
                        f"{', '.join(there) or 'none'}")
    files = [files[0] for files in found.values()]
    rows = [{"run": tag, **summarize_run(file)} for tag, file in zip(found, files)]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, ["---"] * len(columns), *([format_value(row.get(key, "-")) for key in columns] for row in rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in cells)
    path = os.path.join(get_base_dir(), "report", "report_compare.md")
    drawn = False
    try:
        drawn = plot_curves(files, f"{path[:-3]}.png", len(files))
    except ImportError:
        print0("Report: no plot, because matplotlib is not installed (pip install matplotlib)")
    mark = f" on {dataset_label()}" if dataset_label() else ""
    with atomic_write(path) as file:
        file.write(f"# Runs compared: {stage}{mark}\n\n{table}\n")
        file.write("![report_compare.png](report_compare.png)\n" if drawn else "")
    print0(f"{table}\nReport: wrote {path}")
    return path

# -----------------------------------------------------------------------------
# The report

def _slug(section):
    return section.lower().replace(" ", "-")


class Report:
    """The sections of the run in progress, in one folder."""

    def __init__(self, report_dir):
        self.report_dir = report_dir

    def _path(self, name):
        return os.path.join(self.report_dir, name)

    def _run(self):
        """{"run_id", "started"} of the last reset; both None without one."""
        path = self._path("header.json")
        types = {"run_id": str, "started": str}
        return read_json(path, **types) if os.path.exists(path) else dict.fromkeys(types)

    def log(self, section, data):
        """Write (again) a section from a list of str and dicts; returns the path of its markdown."""
        slug, timestamp = _slug(section), datetime.datetime.now().strftime(TIME_FORMAT)
        with atomic_write(self._path(f"{slug}.md")) as file:
            file.write(render_section(section, timestamp, data))
        write_json(self._path(f"{slug}.json"), {"section": section, "timestamp": timestamp,
                   "run_id": self._run()["run_id"], "label": dataset_label(), "data": _jsonable(data)})
        return self._path(f"{slug}.md")

    def _read_sections(self):
        """{slug: section as in its JSON, with its markdown under "text"}, in the order of the page."""
        found = {os.path.basename(path)[:-len(".md")] for path in glob.glob(self._path("*.md"))}
        found -= {"header", "report", "report_compare"}
        for slug in SECTIONS:
            if slug not in found:
                print0(f"Report: no section {slug}, skipping it")
        sections = {}
        for slug in [*filter(found.__contains__, SECTIONS), *sorted(found - set(SECTIONS))]:
            with open(self._path(f"{slug}.md"), encoding="utf-8") as file:
                text = file.read()
            facts, types = self._path(f"{slug}.json"), {"timestamp": str, "run_id": str | None, "data": list}
            section = read_json(facts, **types) if os.path.exists(facts) else _read_foreign(text)
            sections[slug] = section | {"text": text}
        return sections

    def _render_header(self, label, mixed):
        """The header of the last reset, with notes on the data and on sections of other runs."""
        text = "# nanochat training report\n\n## Environment\n\n"
        if os.path.exists(self._path("header.md")):
            with open(self._path("header.md"), encoding="utf-8") as file:
                text = file.read()
        else:
            print0("Report: no header; begin a run with `python -m nanochat.report reset` to have one")
        notes = f"Data: {label} (synthetic), so all scores are on stand-ins of the benchmarks\n\n" if label else ""
        if mixed:
            notes += f"Warning: sections of another run: {', '.join(mixed)}\n\n"
            print0(f"Report: sections of another run: {', '.join(mixed)}")
        return text.replace("## Environment", notes + "## Environment", 1)

    def _plot(self, scores, label):
        """Markdown with the plots that could be made, and their file names."""
        plots = {"report_scores.png": lambda path: plot_scores(scores, label, path),
                 "report_curves.png": lambda path: plot_curves(metrics_files(), path)}
        try:
            names = [name for name, draw in plots.items() if draw(self._path(name))]
        except ImportError:
            print0("Report: no plots, because matplotlib is not installed (pip install matplotlib)")
            names = []
        return "".join(f"![{name}]({name})\n\n" for name in names), names

    def generate(self):
        """Join header, sections, plots and summary to report.md, copy it to the current folder; returns its path."""
        sections, run, label = self._read_sections(), self._run(), dataset_label()
        mixed = [slug for slug, section in sections.items() if section["run_id"] != run["run_id"]]
        scores = {name: find_metrics(sections.get(slug, {"data": []})) for name, slug in METRIC_SOURCES.items()}
        for column, only in (("BASE", "CORE"), ("RL", "GSM8K")): # of these two the table shows one score
            scores[column] = {name: score for name, score in scores[column].items() if name == only}
        header = self._render_header(label, mixed)
        bloat = re.search(r"^### Bloat\n((?:.+\n)+)", header, re.MULTILINE)
        pictures, plots = self._plot(scores, label)
        text = header + "".join(section["text"] + "\n" for section in sections.values()) + pictures
        text += f"## Summary\n\n{bloat[1] + chr(10) if bloat else ''}{render_table(scores, label)}"
        text += f"\nTotal wall clock time: {_wall_clock(run['started'], sections)}\n"
        with atomic_write(self._path("report.md")) as file:
            file.write(text)
        for name in ["report.md", *plots]:
            if os.path.realpath(name) != os.path.realpath(self._path(name)):
                with open(self._path(name), "rb") as source, atomic_write(name, "wb") as copy:
                    shutil.copyfileobj(source, copy)
        print0(f"Report: wrote {self._path('report.md')} and a copy here")
        return self._path("report.md")

    def reset(self):
        """Begin a new run: delete all sections and the report, write a fresh header."""
        for pattern in ("*.md", "*.json", "report_*.png"):
            for path in glob.glob(self._path(pattern)):
                os.unlink(path)
        run = {"run_id": uuid.uuid4().hex[:12], "started": datetime.datetime.now().strftime(TIME_FORMAT)}
        with atomic_write(self._path("header.md")) as file:
            file.write(render_header(**run))
        write_json(self._path("header.json"), run)


class DummyReport:
    """Stands in for the report on every rank but the first."""

    def log(self, section=None, data=None):
        pass

    generate = reset = log


def get_report():
    """The report of this base directory on rank 0, a DummyReport elsewhere."""
    rank = get_dist_info()[1]
    return Report(os.path.join(get_base_dir(), "report")) if rank == 0 else DummyReport()


def is_reported(section, compute):
    """Is the section in the report of this base directory? The same answer on all ranks."""
    path = os.path.join(get_base_dir(), "report", f"{_slug(section)}.json")
    return compute.all_reduce(int(os.path.exists(path)), op="max")[0] > 0


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write the report of a run, or begin a new one.")
    parser.add_argument("command", nargs="?", default="generate", choices=["generate", "reset", "compare"],
                        help="generate: join the sections to report.md (the default); reset: delete them, begin anew; "
                        "compare: several runs of a stage, side by side")
    parser.add_argument("tags", nargs="*", metavar="TAG", help="with compare: the runs (--model-tag)")
    parser.add_argument("--stage", default="base", choices=["base", "mid", "sft", "rl"], help="with compare: theirs")
    args = parser.parse_args(argv)
    if (args.command == "compare") != bool(args.tags):
        parser.error("compare needs the tags of runs, and nothing else takes tags")
    if args.command == "compare":
        compare(args.tags, args.stage)
    else:
        getattr(get_report(), args.command)()


if __name__ == "__main__":
    run_main(main)
