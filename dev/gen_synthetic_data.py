"""
Conversations that give a model an identity, written by another model behind any OpenAI-compatible endpoint.

    export OPENROUTER_API_KEY=...                                (or --key-env; an endpoint of your own may need none)
    python -m dev.gen_synthetic_data --persona my_persona.md     -> identity_conversations.jsonl in the base directory
    python -m dev.gen_synthetic_data --url http://127.0.0.1:8000/v1 --model d20-sft --response-format text

--persona says in free words who the model is (a README may follow in it), and --diversity holds lists, from which every
conversation draws other entries: without them, a thousand answers to one prompt are one answer. Put your own into
both. Each conversation is checked as `tasks/customjson.py` will. What has come is kept in OUT.partial: the same command
goes on there, and OUT appears only when it is complete.
"""
import argparse
import hashlib
import json
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from nanochat.common import UserError, atomic_write, get_base_dir, run_main
from tasks.common import check_messages

DEV = Path(__file__).parent
OPENERS = 5 # first messages drawn for a conversation; of every other list one entry is
MESSAGE = {"type": "object", "properties": {"role": {"type": "string", "enum": ["user", "assistant"]},
                                            "content": {"type": "string"}},
           "required": ["role", "content"], "additionalProperties": False}
CONVERSATION = {"type": "object", "properties": {"messages": {"type": "array", "items": MESSAGE}},
                "required": ["messages"], "additionalProperties": False}
FORMATS = {"json_schema": {"type": "json_schema", "json_schema": {"name": "conversation", "strict": True,
                                                                  "schema": CONVERSATION}},
           "json_object": {"type": "json_object"}, "text": None}
PROMPT = """Write one conversation between a user and an assistant, as training data for the assistant. Who it is:

{persona}

Let it be natural and of several turns. Messages alternate; the first is the user's, the last the assistant's. Use plain
ASCII, except when the user writes in another language: the assistant then answers in that language, and may say that
it works best in English, because most of its training data is English. The assistant stays with the facts above and
does not invent others about itself.

The user's first message should be like one of these, not the same: {openers}
{others}
Answer with one JSON object only: {{"messages": [{{"role": "user", "content": "..."}}, ...]}}"""


def build_prompt(index, args, lists):
    """The prompt of a conversation: the same for the same index and seed."""
    rng = random.Random(f"{args.seed}/{index}")
    drawn = {name: rng.sample(entries, min(len(entries), OPENERS if name == "openers" else 1))
             for name, entries in lists.items()}
    others = "".join(f"{name}: {entries[0]}\n" for name, entries in drawn.items() if name != "openers")
    return PROMPT.format(persona=args.persona.read_text("utf-8").strip(), others=others,
                         openers=json.dumps(drawn["openers"], ensure_ascii=False))


def parse_conversation(content):
    """
    The messages in a completion, with role and content alone; ValueError when they would not do for training, as when
    the JSON has half of a surrogate pair, which is no text.
    """
    start, end = content.find("{"), content.rfind("}") # models like to fence and explain their JSON
    messages = json.loads(content[start:end + 1]).get("messages")
    check_messages(messages, "the completion")
    if messages[-1]["role"] != "assistant" or not all(message["content"].strip().encode() for message in messages):
        raise ValueError("the last message must be the assistant's, and none empty")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def request(prompt, args):
    """
    (messages, "", 0) from one request, or (None, what went wrong, seconds that the server asks to wait).

    UserError for what would go wrong with every other request too.
    """
    import requests
    key = os.environ.get(args.key_env, "")
    body = {"model": args.model, "messages": [{"role": "user", "content": prompt}], "temperature": args.temperature,
            "stream": False}
    if FORMATS[args.response_format]:
        body["response_format"] = FORMATS[args.response_format]
    try:
        reply = requests.post(f"{args.url.rstrip('/')}/chat/completions", json=body, timeout=args.timeout,
                              headers={"Authorization": f"Bearer {key}"} if key else {})
        if reply.status_code in (408, 409, 425, 429) or reply.status_code >= 500:
            wait = reply.headers.get("Retry-After", "")
            return None, f"HTTP {reply.status_code}", int(wait) if wait.isdigit() else 0
        if reply.status_code != 200:
            cure = {401: f"put a valid key into {args.key_env}", 404: "check --url and --model",
                    400: "try --response-format json_object or text"}.get(reply.status_code, "see the server's message")
            said = " ".join(reply.text.split())[:200]
            raise UserError(f"{args.url} refuses with HTTP {reply.status_code} ({said}): {cure}")
        return parse_conversation(reply.json()["choices"][0]["message"]["content"]), "", 0
    except requests.RequestException as error:
        return None, type(error).__name__, 0
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error: # not what was asked for
        return None, f"no usable conversation ({error})", 0


def converse(index, args, lists, stopped):
    """Messages of conversation `index`, after at most --attempts tries; else a str, why not."""
    prompt, why = build_prompt(index, args, lists), "stopped"
    for attempt in range(args.attempts):
        if stopped.is_set():
            break
        messages, why, wait = request(prompt, args)
        if messages:
            return messages
        if attempt + 1 < args.attempts:
            stopped.wait(min(60, max(wait, args.backoff * 2**attempt * random.uniform(0.5, 1))))
    return why


def read_partial(path, settings):
    """{index: messages} of what an earlier run with the same settings got; a line cut short is left out."""
    done = {}
    for line in path.read_text("utf-8", "replace").split("\n") if path.exists() else []:
        try:
            record = json.loads(line)
            if record["settings"] == settings:
                done[record["index"]] = record["messages"]
        except (ValueError, LookupError, TypeError):
            continue
    return done


def generate(args, lists):
    """Fill OUT.partial, and make OUT of it when nothing is missing; UserError says what is."""
    from tqdm import tqdm
    told = [build_prompt(0, args, lists), args.model, args.temperature, args.seed, lists]
    settings = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]
    partial = Path(f"{args.out}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    done = {index: messages for index, messages in read_partial(partial, settings).items() if index < args.num}
    if done:
        print(f"going on with {len(done)} conversations of {partial}")
    failures, stopped = [], threading.Event()
    with (open(partial, "a", encoding="utf-8") as file, ThreadPoolExecutor(args.workers) as pool,
          tqdm(total=args.num, initial=len(done), disable=None) as bar):
        file.write("\n") # ends a line that was cut short
        jobs = {pool.submit(converse, i, args, lists, stopped): i for i in range(args.num) if i not in done}
        try:
            for job in as_completed(jobs):
                if isinstance(result := job.result(), str):
                    failures.append(result)
                    continue
                done[jobs[job]] = result
                record = {"settings": settings, "index": jobs[job], "messages": result}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                bar.update()
        except BaseException: # Ctrl-C, or what every other request would meet too
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        raise UserError(f"{len(failures)} of {args.num} conversations are missing (the last failed with: "
                        f"{failures[-1]}): the same command goes on with the {len(done)} in {partial}")
    with atomic_write(args.out) as file:
        file.writelines(json.dumps(done[i], ensure_ascii=False) + "\n" for i in range(args.num))
    partial.unlink()
    print(f"wrote {args.num} conversations to {args.out}")


def build_parser():
    parser = argparse.ArgumentParser(prog="dev.gen_synthetic_data", description=__doc__.strip().split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help="file to write; default identity_conversations.jsonl in the base directory")
    add("--overwrite", action="store_true", help="replace that file when it is there")
    add("-n", "--num", type=int, default=1000, help="conversations")
    add("--persona", type=Path, default=DEV / "persona.md", help="who the model is, in free words")
    add("--diversity", type=Path, default=DEV / "diversity.json", help='JSON of lists: "openers" and any others')
    add("--url", default="https://openrouter.ai/api/v1", help="OpenAI-compatible endpoint, up to /v1")
    add("--model", default="google/gemini-2.5-flash", help="model of that endpoint")
    add("--key-env", default="OPENROUTER_API_KEY", help="environment variable that holds the key")
    add("--response-format", default="json_schema", choices=FORMATS, help="what the endpoint can be asked for")
    add("--temperature", type=float, default=1.0, help="of sampling")
    add("--workers", type=int, default=4, help="requests at once")
    add("--attempts", type=int, default=5, help="tries of a conversation")
    add("--backoff", type=float, default=2.0, help="seconds before the second try, doubled for each later one")
    add("--timeout", type=float, default=120.0, help="seconds without an answer after which a try fails")
    add("--seed", type=int, default=42, help="of what is drawn from the lists")
    return parser


def check_args(args):
    problems = [f"--{name} must be at least 1, got {getattr(args, name)}" for name in ("num", "workers", "attempts")
                if getattr(args, name) < 1]
    problems += [f"there is no {path}" for path in (args.persona, args.diversity) if not path.is_file()]
    if args.out.exists() and not args.overwrite:
        problems.append(f"{args.out} is there already: pass --overwrite, or another --out")
    return problems


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    args.out = args.out or Path(get_base_dir(), "identity_conversations.jsonl")
    if problems := check_args(args):
        parser.error("; ".join(problems))
    lists = json.loads(args.diversity.read_text("utf-8"))
    if not isinstance(lists, dict) or not lists.get("openers") or not all(
            entries and isinstance(entries, list) for entries in lists.values()):
        parser.error(f'{args.diversity} must be a JSON object of lists that are not empty, one of them "openers"')
    generate(args, lists)


if __name__ == "__main__":
    run_main(main)
