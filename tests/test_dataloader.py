"""Packing against plain scans, the spec's traces, lanes for any number of ranks, and exact restarts."""
import collections
import itertools
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat.dataloader import (BestFitBuffer, conversation_steps, first_rows, flat_loader, merge_lane_states,
                                 prefetched, pretraining_loader, render_pieces, tokenizing_distributed_data_loader,
                                 tokenizing_distributed_data_loader_bos_bestfit,
                                 tokenizing_distributed_data_loader_with_state,
                                 tokenizing_distributed_data_loader_with_state_bos_bestfit)

BOS, USER, ASSISTANT, END = 0, 1, 2, 3


class FakeTokenizer:
    """One id for each character (its code point); conversations: user text, then assistant text with its end."""
    def get_bos_token_id(self):
        return BOS

    def encode(self, text, prepend=None, append=None, num_threads=None):
        if isinstance(text, list):
            return [self.encode(one, prepend) for one in text]
        return ([] if prepend is None else [prepend]) + [ord(c) for c in text]

    def render_conversation(self, conversation, max_tokens=2048):
        messages = list(conversation["messages"])
        if messages[0]["role"] == "system":
            messages[:2] = [{"role": "user", "content": messages[0]["content"] + messages[1]["content"]}]
        ids, mask = [BOS], [0]
        for i, message in enumerate(messages):
            assert message["role"] == ("user", "assistant")[i % 2]
            text = self.encode(message["content"])
            ids += [ASSISTANT if i % 2 else USER, *text, END]
            mask += [0] + [i % 2] * (len(text) + 1)
        return ids[:max_tokens], mask[:max_tokens]


def write(base_dir, files, monkeypatch):
    """Shards from lists of row groups (lists of str), and a validation shard behind them; sets the base directory."""
    folder = base_dir / "base_data"
    folder.mkdir(parents=True)
    schema = pa.schema([("text", pa.string())])
    for i, row_groups in enumerate([*files, [["validation"]] * 8]):
        with pq.ParquetWriter(folder / f"shard_{i if i < len(files) else 1822:05d}.parquet", schema) as writer:
            for texts in row_groups:
                writer.write_table(pa.table({"text": texts}, schema), row_group_size=len(texts))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir))


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Three files with 9, 5 and 12 row groups of 5 to 12 documents; every document is one character, repeated."""
    rng, characters = random.Random(5), map(chr, itertools.count(1000))
    files = [[[next(characters) * rng.choice([1, 2, 3, 5, 8, 13, 30, 60]) for _ in range(rng.randrange(5, 13))]
              for _ in range(n)] for n in (9, 5, 12)]
    write(tmp_path, files, monkeypatch)
    return files


def loader(B=2, T=16, split="train", **kwargs):
    settings = dict(device="cpu", tokenizer_batch_size=4, buffer_size=10, rank=0, world_size=1)
    return pretraining_loader(FakeTokenizer(), B, T, split, **{**settings, **kwargs})


def take(batches, n):
    """The next n batches as (rows of T+1 ids, state through JSON)."""
    taken = []
    for inputs, targets, state in itertools.islice(batches, n):
        assert inputs.dtype == targets.dtype == torch.int64 and inputs.is_contiguous() and targets.is_contiguous()
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert json.loads(json.dumps(state)) == state
        rows = torch.cat([inputs, targets[:, -1:]], dim=1).tolist()
        taken.append((rows, json.loads(json.dumps(state))))
    return taken


def rows_of(batches, n):
    return [row for rows, _ in take(batches, n) for row in rows]

# -----------------------------------------------------------------------------
# An independent reference: the spec's text, with plain lists and scans

def reference_lane(files, lane, num_lanes, slice_size, buffer_size, capacity, requeue):
    """Endless rows of one lane."""
    def slices():
        while True:
            for row_groups in files:
                for texts in row_groups[lane::num_lanes]:
                    for start in range(0, len(texts), slice_size):
                        yield [[BOS] + [ord(c) for c in text] for text in texts[start:start + slice_size]]
    source, buffer = slices(), []
    while True:
        row = []
        while len(row) < capacity:
            while len(buffer) < buffer_size:
                buffer += next(source)
            best = None
            for i, document in enumerate(buffer):
                if len(document) <= capacity - len(row) and (best is None or len(document) > len(buffer[best])):
                    best = i
            if best is None:
                best = min(range(len(buffer)), key=lambda i: len(buffer[i]))
            document, room = buffer.pop(best), capacity - len(row)
            row += document[:room]
            if requeue and document[room:]:
                buffer.append([BOS] + document[room:])
        yield row


def reference(files, num_lanes, num_rows, slice_size=4, buffer_size=10, capacity=17, requeue=False):
    lanes = [reference_lane(files, lane, num_lanes, slice_size, buffer_size, capacity, requeue)
             for lane in range(num_lanes)]
    return [next(lanes[n % num_lanes]) for n in range(num_rows)]


def test_buffer_chooses_as_a_plain_scan_does():
    rng = random.Random(1)
    buffer, plain = BestFitBuffer(), []
    for i in range(5000):
        if rng.random() < 0.55 or not plain:
            length = rng.randrange(1, 40)
            buffer.add(length, i)
            plain.append((length, i))
        elif rng.random() < 0.8:
            room = rng.randrange(50)
            fitting = [item for item in plain if item[0] <= room]
            expected = max(fitting, key=lambda item: item[0], default=None) # max takes the first of equals
            assert buffer.take(room) == (expected and expected[1])
            if expected:
                plain.remove(expected)
        else:
            expected = min(plain, key=lambda item: item[0])
            assert buffer.take_shortest() == expected[1]
            plain.remove(expected)
        assert len(buffer) == len(plain)
    assert list(buffer.waiting.values()) == [i for _, i in plain]

# -----------------------------------------------------------------------------
# The spec's traces (spec/library 14.5)

def test_golden_best_fit(tmp_path, monkeypatch):
    lengths = [4, 7, 12, 3, 5, 6, 11, 2, 8, 9, 4, 4, 10, 3] # with BOS
    write(tmp_path, [[[chr(1000 + i) * (length - 1)] for i, length in enumerate(lengths)]], monkeypatch)
    batches = loader(2, 9, buffer_size=3, tokenizer_batch_size=1)
    (first, state_1), (second, state_2) = take(batches, 2)
    def documents(row): # (index, tokens) in order; a piece of BOS alone has no index, so look at runs
        return [(max(run) - 1000 if max(run) else None, len(run)) for run in split_at_bos(row)]
    assert documents(first[0]) == [(1, 7), (3, 3)]
    assert documents(first[1]) == [(4, 5), (0, 4), (None, 1)] # one token of document 5: its BOS
    assert documents(second[0]) == [(7, 2), (8, 8)]
    assert documents(second[1]) == [(9, 9), (None, 1)]
    assert (state_1["pq_idx"], state_1["rg_idx"], state_1["epoch"]) == (0, 6, 1) and state_2["rg_idx"] == 10


def split_at_bos(row):
    runs = []
    for token in row:
        runs = runs + [[]] if token == BOS else runs
        runs[-1].append(token)
    return runs


def test_golden_flat(tmp_path, monkeypatch):
    write(tmp_path, [[["xxx", "yyyy"] * 10]], monkeypatch)
    x, y = ord("x"), ord("y")
    batches = tokenizing_distributed_data_loader(FakeTokenizer(), 2, 4, "train", device="cpu")
    first, second = itertools.islice(batches, 2)
    assert first[0].tolist() == [[0, x, x, x], [0, y, y, y]] and first[1].tolist() == [[x, x, x, 0], [y, y, y, y]]
    assert second[0].tolist() == [[y, 0, x, x], [x, 0, y, y]]


@pytest.mark.parametrize("load", [flat_loader, pretraining_loader])
def test_golden_resume_of_the_three_fields(tmp_path, monkeypatch, load):
    write(tmp_path, [[["a"], ["b"], ["c"], ["d"]]], monkeypatch)
    def first_after(saved):
        inputs, _, state = next(load(FakeTokenizer(), 1, 1, "train", device="cpu", resume_state_dict=saved,
                                     **({"buffer_size": 1} if load is pretraining_loader else {})))
        return chr(int(_[0, 0])), state["epoch"]
    assert first_after({"pq_idx": 0, "rg_idx": 1}) == ("c", 1)
    assert first_after({"pq_idx": 0, "rg_idx": 3, "epoch": 1}) == ("a", 2) # the one file of the split is over


def test_three_fields_skip_the_rest_of_the_stripe_on_every_rank(world):
    for rank in range(2):
        batches = loader(1, 16, rank=rank, world_size=2, resume_state_dict={"pq_idx": 1, "rg_idx": 2, "epoch": 3})
        _, state = take(batches, 1)[0] # stripe 4, 5 is next: rank 0 reads row group 4, rank 1 finds none there
        first_document = state["lanes"][str(rank)]["documents"].split()[0]
        assert first_document.split(".")[:2] == (["1", "4"] if rank == 0 else ["2", "1"]) and state["epoch"] == 3

# -----------------------------------------------------------------------------
# Lanes and ranks

@pytest.mark.parametrize("num_lanes", [1, 2, 4, 8])
def test_any_number_of_ranks_sees_the_same_global_rows(world, num_lanes):
    """Row n of the run comes from rank n mod W; the sequence is the reference's, with wraps into later epochs."""
    expected = reference(world, num_lanes, 240)
    for world_size in (1, 2, 3, 4, 6, 8): # 6 and 4 lanes: a lane is the business of three ranks
        B = 24 // world_size - (world_size == 2) # 11 rows: no multiple of a rank's lanes
        ranks = [rows_of(loader(B, num_lanes=num_lanes, rank=rank, world_size=world_size), 10)
                 for rank in range(world_size)]
        interleaved = [row for rows in zip(*ranks) for row in rows]
        assert interleaved == expected[:len(interleaved)] and len(interleaved) >= 220


def test_what_is_cut_off_can_wait_for_another_row(world):
    """As the reference has it; and in the rows of one lane and what waits, every token of a document is found once."""
    ranks = [rows_of(loader(2, num_lanes=4, rank=rank, world_size=2, requeue=True), 60) for rank in range(2)]
    assert [row for rows in zip(*ranks) for row in rows] == reference(world, 4, 240, requeue=True)
    lengths = {ord(text[0]): len(text) for row_groups in world for texts in row_groups for text in texts}
    rows, states = zip(*take(loader(1, requeue=True), 400))
    found = collections.Counter(token for batch in rows for row in batch for token in row if token != BOS)
    for name in states[-1]["lanes"]["0"]["documents"].split():
        place, _, start = name.partition("+")
        pq_idx, rg_idx, i = map(int, place.split("."))
        text = world[pq_idx][rg_idx][i]
        found[ord(text[0])] += len(text) - (int(start) - 1 if start else 0)
    assert states[-1]["epoch"] >= 2 and "+" in states[-1]["lanes"]["0"]["documents"]
    assert all(found[token] % length == 0 for token, length in lengths.items())


def test_by_default_the_lanes_are_the_ranks(world, monkeypatch):
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert rows_of(loader(rank=None, world_size=None), 5) == reference(world, 2, 20)[1::2]


def test_every_row_is_full_and_begins_with_a_document_and_nothing_but_crops_is_lost(world):
    """Over one epoch and a bit, every document that was read is in a row whole, was cut at a row's end, or waits."""
    rows, states = zip(*take(loader(1), 150))
    rows = [row for batch in rows for row in batch]
    assert all(len(row) == 17 and row[0] == BOS for row in rows)
    lengths = {text[0]: len(text) for row_groups in world for texts in row_groups for text in texts}
    seen, cut = [], []
    for row in rows:
        *whole, last = split_at_bos(row)
        for run in whole:
            seen.append(chr(run[1]))
            assert len(run) == 1 + lengths[seen[-1]]
        if len(last) > 1:
            (seen if len(last) == 1 + lengths[chr(last[1])] else cut).append(chr(last[1]))
    assert states[-1]["epoch"] > 1 and cut
    waiting = states[-1]["lanes"]["0"]["documents"].split()
    counts = {c: seen.count(c) + cut.count(c) for c in lengths}
    epoch = states[-1]["epoch"]
    bare = sum(split_at_bos(row)[-1] == [BOS] for row in rows) # cut to its BOS: we can't tell which document
    for name in waiting:
        pq_idx, rg_idx, i = map(int, name.split("."))
        counts[world[pq_idx][rg_idx][i][0]] += 1
    assert max(counts.values()) <= epoch
    assert sum(max(0, epoch - 1 - count) for count in counts.values()) <= bare


@pytest.mark.parametrize("load", [loader, lambda **kwargs: tokenizing_distributed_data_loader_with_state(
    FakeTokenizer(), 2, 16, "train", device="cpu", rank=0, world_size=1)])
def test_validation_text_is_never_trained_on(world, load):
    forbidden = {ord(c) for c in "validation"}
    assert not forbidden & {token for row in rows_of(load(), 200) for token in row}
    assert {token for row in rows_of(loader(split="val"), 3) for token in row} == forbidden | {BOS}


@pytest.mark.parametrize("num_lanes, seed, requeue", [(1, 0, False), (3, 1, True), (4, 2, False), (1, 3, True)])
def test_a_restart_after_any_batch_continues_exactly(world, num_lanes, seed, requeue):
    rng = random.Random(seed)
    settings = dict(requeue=requeue, B=rng.randrange(1, 4), num_lanes=num_lanes, buffer_size=rng.randrange(1, 30),
                    tokenizer_batch_size=rng.randrange(1, 9))
    whole = take(loader(**settings), 90)
    for i in range(80):
        again = take(loader(**{**settings, "num_lanes": None}, resume_state_dict=whole[i][1]), 3)
        assert again == whole[i + 1:i + 4], f"restart after batch {i}"


def test_a_chain_of_restarts_with_other_numbers_of_ranks(world):
    """4 lanes on 1, 4, 3, 2, ... ranks in turn, 12 rows a global batch: the rows are those of an undisturbed run."""
    expected, rows, state = reference(world, 4, 12 * 24), [], None
    for world_size in (1, 4, 3, 2, 6, 4):
        ranks = [take(loader(12 // world_size, num_lanes=4, rank=rank, world_size=world_size,
                             resume_state_dict=state), 4) for rank in range(world_size)]
        for batches in zip(*ranks):
            rows += [row for group in zip(*(batch for batch, _ in batches)) for row in group]
        state = json.loads(json.dumps(merge_lane_states([batches[-1][1] for batches in ranks])))
    assert rows == expected and sorted(state["lanes"]) == ["0", "1", "2", "3"]


def test_a_restart_of_the_flat_loader_continues_exactly(world):
    def flat(**kwargs):
        return flat_loader(FakeTokenizer(), 2, 13, "train", tokenizer_batch_size=3, device="cpu", rank=1, world_size=2,
                           **kwargs)
    whole = take(flat(), 80)
    tokens = [token for rows, _ in whole for row in rows for token in row[:-1]]
    documents = [[BOS, *map(ord, text)] for groups in world for texts in groups[1::2] for text in texts]
    stream = [token for document in documents * 9 for token in document]
    assert tokens == stream[:len(tokens)] and len(tokens) > sum(map(len, documents))
    for i in range(50):
        assert take(flat(resume_state_dict=whole[i][1]), 3) == whole[i + 1:i + 4]


def test_the_state_is_small_and_the_short_names_have_no_state(world):
    _, state = take(loader(num_lanes=4, buffer_size=100), 5)[-1]
    assert len(json.dumps(state)) < 4 * 110 * 9 + 600
    batch = next(tokenizing_distributed_data_loader_bos_bestfit(FakeTokenizer(), 2, 16, "train", device="cpu"))
    assert len(batch) == 2 and tokenizing_distributed_data_loader_with_state_bos_bestfit is pretraining_loader


def test_more_lanes_than_a_file_has_row_groups(world):
    """One file cannot feed them all, so they count through the list of files; there are never more than row groups."""
    row_groups = [texts for groups in world for texts in groups] # 26, at most 12 in a file
    for num_lanes, usable in ((16, 16), (40, 26)):
        batches = loader(1, num_lanes=num_lanes)
        assert rows_of(batches, 200) == reference([row_groups], usable, 200)
        assert take(batches, 1)[0][1]["num_lanes"] == usable
    with pytest.raises(ValueError, match="fewer row groups than the 27 ranks"):
        flat_loader(FakeTokenizer(), 2, 13, "train", device="cpu", rank=0, world_size=27)


def test_the_first_rows_are_the_same_for_any_number_of_ranks(world):
    for world_size in (1, 2, 3):
        learned = []
        for rank in range(world_size):
            batches = loader(2, num_lanes=4, rank=rank, world_size=world_size)
            for _, targets in itertools.islice(first_rows(batches, 7, rank, world_size), 4):
                learned += [row for row in targets.tolist() if row != [-1] * len(row)]
        assert sorted(learned) == sorted(row[1:] for row in reference(world, 4, 7))


def test_what_does_not_fit_the_saved_state_is_refused(world, tmp_path):
    _, state = take(loader(3, num_lanes=4), 1)[0]
    def refused(words, **kwargs):
        with pytest.raises(ValueError, match=words):
            loader(3, resume_state_dict=state, **kwargs)
    refused("num_lanes is 4 in the saved state, 2 here", num_lanes=2)
    refused("3 rows .* 2 ranks", world_size=2)
    state["rows"] = 4
    del state["lanes"]["1"]
    refused("lacks lane 1", rank=1, world_size=2)
    extra = tmp_path / "base_data" / "shard_00003.parquet"
    extra.write_bytes((tmp_path / "base_data" / "shard_00002.parquet").read_bytes())
    refused("num_files is 3 in the saved state, 4 here")
    (tmp_path / "base_data" / "shard_00000.parquet").unlink()
    refused("files is .* in the saved state")

# -----------------------------------------------------------------------------
# Conversations

def make_task(seed, n=60, longest=25):
    """Conversations of 1 to 4 turns, some with a system message or an unanswered end; answers are unique characters."""
    rng, unique = random.Random(seed), map(chr, itertools.count(5000))
    task = []
    for _ in range(n):
        messages = [{"role": "system", "content": "be good"}] if rng.random() < 0.2 else []
        for _ in range(rng.randrange(1, 5)):
            messages.append({"role": "user", "content": "q" * rng.randrange(longest)})
            answer = "".join(next(unique) for _ in range(rng.randrange(longest)))
            messages.append({"role": "assistant", "content": answer})
        task.append({"messages": messages[:-1] if rng.random() < 0.1 else messages})
    return task


def steps(task, T=40, per_step=7, seed=3, **kwargs):
    return conversation_steps(FakeTokenizer(), task, T, END, seed, conversations_per_step=per_step, **kwargs)


def test_a_fixed_number_of_rows_takes_the_next_conversations_that_fit_and_leaves_none_out():
    task = make_task(5, n=90)
    by_rows = conversation_steps(FakeTokenizer(), task, 60, END, 3, rows_per_step=4)
    order, seen, before = [], 0, 0
    for (inputs, targets), state in by_rows:
        if state["epoch"] > 1:
            break
        assert len(inputs) <= 4 and len(inputs) * 61 == sum(
            state["counters"][name] for name in ("tokens", "padding")) - before
        before += len(inputs) * 61
        order += [ids for ids, _ in supervised(inputs, targets)]
        taken, seen = state["counters"]["conversations"] - seen, state["counters"]["conversations"]
        one_more = conversation_steps(FakeTokenizer(), task, 60, END, 3, conversations_per_step=taken + 1,
                                      resume_state_dict={**state, "epoch": 1, "position": seen - taken})
        if seen < len(task):
            assert len(next(one_more)[0][0]) > 4, "one conversation more would need a fifth row"
    everything = [ids for (inputs, targets), _ in itertools.islice(steps(task, 60, 90), 1)
                  for ids, _ in supervised(inputs, targets)]
    assert {tuple(ids) for ids in order} <= {tuple(ids) for ids in everything} and len(order) > 0.8 * len(everything)


def test_rows_per_step_resume_exactly_and_share_out_over_ranks():
    task = make_task(6, n=50)
    def run(state=None, rank=0, world_size=1):
        return conversation_steps(FakeTokenizer(), task, 60, END, 3, rank, world_size, state, rows_per_step=3,
                                  learn_all=True)
    whole = list(itertools.islice(run(), 12))
    for (inputs, targets), state in itertools.islice(run(whole[4][1]), 7):
        (expected_inputs, expected_targets), expected_state = whole.pop(5)
        assert torch.equal(inputs, expected_inputs) and torch.equal(targets, expected_targets)
        assert state == expected_state
    (inputs, targets), _ = next(run())
    parts = [next(run(rank=rank, world_size=2))[0] for rank in (0, 1)]
    assert torch.equal(parts[0][0], inputs[::2]) and torch.equal(parts[1][1], targets[1::2])
    assert (targets[inputs != END] == -1).sum() == 0, "with learn_all only padding is not learned"


def test_prefetched_items_are_the_same_and_an_error_comes_through():
    def items():
        yield from range(5)
        raise ValueError("bad data")
    found = []
    with pytest.raises(ValueError, match="bad data"):
        for item in prefetched(items()):
            found.append(item)
    assert found == list(range(5))


def supervised(inputs, targets):
    """Runs of supervised targets, each (the ids, the input before it)."""
    runs = []
    for x, y in zip(inputs.tolist(), targets.tolist()):
        for j, target in enumerate(y):
            if target >= 0 and (j == 0 or y[j - 1] < 0):
                runs.append(([], x[j]))
            if target >= 0:
                runs[-1][0].append(target)
    return runs


@pytest.mark.parametrize("seed", range(4))
def test_every_answer_is_learned_once_an_epoch_and_whole(seed):
    """60 conversations in steps of 7: after 60 steps, 7 epochs. T holds every turn, so only loose ends are dropped."""
    task = make_task(seed)
    answers = [[ord(c) for c in m["content"]] + [END] for c in task for m in c["messages"] if m["role"] == "assistant"]
    found, counters = [], None
    for (inputs, targets), state in itertools.islice(steps(task, T=70), 60):
        assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape[1] == 70
        assert inputs.is_contiguous() and targets.is_contiguous()
        assert (targets >= 0).any(dim=1).all(), "every row has something to learn"
        for answer, before in supervised(inputs, targets):
            assert before == ASSISTANT
            found.append(answer)
        assert all(row[0] == BOS for row in inputs.tolist())
        counters = state["counters"]
    assert sorted(found) == sorted(answers * 7)
    assert counters["conversations"] == 420 and counters["split"] > 0


def naive_rows(pieces, capacity):
    """Best fit by plain scans."""
    pieces, rows = list(pieces), []
    while pieces:
        row, room = [], capacity
        while fitting := [piece for piece in pieces if len(piece[0]) <= room]:
            best = max(fitting, key=lambda piece: len(piece[0]))
            pieces.remove(best)
            row.append(best)
            room -= len(best[0])
        rows.append(row)
    return rows


def test_steps_equal_a_naive_reference_and_counters_add_up():
    task, T = make_task(8), 40
    totals = dict(conversations=0, split=0, dropped=0, tokens=0, padding=0)
    epoch_order = torch.randperm(60, generator=torch.Generator().manual_seed(3 * 1_000_003 + 1)).tolist()
    for i, ((inputs, targets), state) in enumerate(itertools.islice(steps(task, T, per_step=20), 3)):
        pieces = []
        for index in epoch_order[20 * i:20 * i + 20]:
            found = render_pieces(FakeTokenizer(), task[index], T + 1)
            pieces += [piece for piece in found if piece]
            totals["split"] += len(found) > 1
            totals["dropped"] += found.count(None)
        rows = naive_rows(pieces, T + 1)
        assert inputs.shape == (len(rows), T)
        for row, x, y in zip(rows, inputs.tolist(), targets.tolist()):
            ids, mask = (sum((piece[k] for piece in row), []) for k in (0, 1))
            padded = ids + [END] * (T + 1 - len(ids))
            mask = mask + [0] * (T + 1 - len(mask))
            assert x == padded[:-1] and y == [t if m else -1 for t, m in zip(padded[1:], mask[1:])]
            totals["tokens"] += len(ids)
            totals["padding"] += T + 1 - len(ids)
        totals["conversations"] += 20
        assert state["counters"] == totals and state["position"] == 20 * i + 20
    assert totals["split"] and totals["dropped"] and totals["padding"]


def test_conversations_are_split_between_turns_and_keep_the_system_message():
    turns = [("user", "u" * 8), ("assistant", "1" * 8), ("user", "v" * 8), ("assistant", "2" * 8), ("user", "w" * 99),
             ("assistant", "3"), ("user", "x"), ("assistant", "4"), ("user", "y")]
    messages = [{"role": "system", "content": "S"}] + [{"role": role, "content": content} for role, content in turns]
    pieces = render_pieces(FakeTokenizer(), {"messages": messages}, 30)
    texts = ["".join(chr(t) for t in piece[0] if t > END) if piece else None for piece in pieces]
    assert texts == ["S" + "u" * 8 + "1" * 8, "S" + "v" * 8 + "2" * 8, None, "Sx4y"]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_rows_of_one_rank(world_size):
    task = make_task(1, n=11)
    alone = list(itertools.islice(steps(task, per_step=3), 12))
    ranks = [list(itertools.islice(steps(task, per_step=3, rank=rank, world_size=world_size), 12))
             for rank in range(world_size)]
    for (rows, state), *shares in zip(alone, *ranks):
        for rank, (share, share_state) in enumerate(shares):
            assert share_state == state
            for part, whole in zip(share, rows):
                assert torch.equal(part, whole[rank::world_size])


def test_a_restart_after_any_step_continues_exactly():
    task = make_task(2, n=23)
    whole = list(itertools.islice(steps(task), 25))
    for i in range(20):
        again = list(itertools.islice(steps(task, resume_state_dict=json.loads(json.dumps(whole[i][1]))), 4))
        for (rows, state), (expected_rows, expected_state) in zip(again, whole[i + 1:]):
            assert state == expected_state and all(map(torch.equal, rows, expected_rows))


def test_epochs_differ_in_order_and_seeds_too():
    task = make_task(3, n=30)
    def epochs(seed): # of 6 steps each; within a step the packer sets the order
        answers = [sorted(rows[1].flatten().tolist()) for rows, _ in itertools.islice(steps(task, 400, 5, seed), 12)]
        return answers[:6], answers[6:]
    first, second = epochs(1)
    def learned(epoch):
        return sorted(target for step in epoch for target in step if target >= 0)
    assert first != second and learned(first) == learned(second)
    assert epochs(2)[0] != first and epochs(1) == (first, second)


def test_one_pass_takes_every_conversation_once_and_ends():
    task = make_task(7, n=23)
    passes = list(steps(task, per_step=5, T=200, one_pass=True))
    assert [state["counters"]["conversations"] for _, state in passes] == [5, 10, 15, 20, 23]
    assert passes[-1][1]["epoch"] == 1
    learned = sorted(target for (_, targets), _ in passes for target in targets[targets >= 5000].tolist())
    assert learned == sorted(ord(c) for conversation in task for message in conversation["messages"]
                             for c in message["content"] if ord(c) >= 5000)
    silent = {"messages": [{"role": "user", "content": "q"}]}
    with pytest.raises(ValueError, match="none of the 3 conversations"):
        list(steps([silent] * 3, one_pass=True))


def test_steps_without_anything_to_learn_are_passed_over_and_hopeless_tasks_refused():
    unusable = {"messages": [{"role": "user", "content": "q" * 99}, {"role": "assistant", "content": "a"}]}
    silent = {"messages": [{"role": "user", "content": "q"}]}
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    for (inputs, targets), state in itertools.islice(steps([unusable, good, silent], T=10, per_step=1), 5):
        assert targets[targets >= 0].tolist() == [ord("a"), END]
    assert state["counters"]["dropped"] >= 8
    with pytest.raises(ValueError, match="none of the 2 conversations .* fits .* 11 tokens .* raise --max-seq-len"):
        next(steps([unusable, silent], T=10, per_step=5))
    with pytest.raises(ValueError, match="no conversations"):
        next(steps([]))


def test_a_conversation_state_of_other_data_is_refused():
    _, state = next(steps(make_task(1)))
    with pytest.raises(ValueError, match="num_conversations is 60 in the saved state, 61 here"):
        steps(make_task(1, n=61), resume_state_dict=state)
    with pytest.raises(ValueError, match="seed is 3 in the saved state, 4 here"):
        steps(make_task(1), seed=4, resume_state_dict=state)
