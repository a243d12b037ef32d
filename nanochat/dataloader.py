"""
Documents in, fixed-length training rows out.

    documents -> ids -> BestFitBuffer -> rows of T+1 ids -> (inputs, targets, state), rows (B, T)

Pretraining rows start with BOS and are full: a document that does not fit is kept for a later row, and only when
nothing in the buffer fits is one cut; the rest of it is dropped, or waits as another document. The greedy rule "longest
that fits" is best-fit packing as in Ding et al. 2024, "Fewer Truncations Improve Language Modeling"
(https://arxiv.org/abs/2404.10830). Conversations are packed by the same rule, but are never cut inside a turn, and rows
are padded.

One stream, any number of ranks: the stream is cut into L lanes. Lane l reads row groups l, l + L, l + 2L, ... of every
file (where no file has L of them: of all files as one list) and packs with a buffer of its own; row n of the run (all
ranks, all micro-batches, from 0) comes from lane n mod L, and rank R of W yields the rows n = R mod W. So the sequence
of rows depends on the data and on L alone. Where W divides L, each lane is the business of one rank; else of several,
each of which packs all of its rows and keeps its own: the same rows, with more work. A lane's state is its place and
the names of the documents that wait in its buffer; these are read and encoded again on resume. Memory: a row group of
text and `buffer_size` documents a lane.
"""
import bisect
import collections
import functools
import hashlib
import itertools
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from nanochat.common import get_dist_info
from nanochat.dataset import num_row_groups, read_row_group, split_files

# -----------------------------------------------------------------------------
# Packing

class BestFitBuffer:
    """Items that wait for a place, found by length and then by arrival, without a scan."""

    def __init__(self):
        self.lengths = []   # the distinct lengths, ascending
        self.arrivals = {}  # length -> arrival numbers, first come first
        self.waiting = {}   # arrival number -> item; a dict keeps the order of arrival
        self.num_added = 0

    def __len__(self):
        return len(self.waiting)

    def add(self, length, item):
        if length not in self.arrivals:
            bisect.insort(self.lengths, length)
            self.arrivals[length] = collections.deque()
        self.arrivals[length].append(self.num_added)
        self.waiting[self.num_added] = item
        self.num_added += 1

    def take(self, room):
        """Remove and return the longest item of at most `room` (of equals the first that came), or None."""
        i = bisect.bisect_right(self.lengths, room)
        return self._remove(i - 1) if i else None

    def take_shortest(self):
        """Remove and return the shortest item (of equals the first that came)."""
        return self._remove(0)

    def _remove(self, i):
        queue = self.arrivals[self.lengths[i]]
        item = self.waiting.pop(queue.popleft())
        if not queue:
            del self.arrivals[self.lengths.pop(i)]
        return item

# -----------------------------------------------------------------------------
# Which documents, and from where

class DocumentSource:
    """
    Endless slices of documents: row groups lane, lane + L, ... of each file in turn, then the files again.

    Where no file has L row groups, they are counted on from file to file, so that each lane finds some.

    place   [epoch, pq_idx, rg_idx, offset]: the next document is number `offset` of that row group; epochs count from 1
    """

    def __init__(self, paths, lane, num_lanes, slice_size, place):
        self.paths, self.lane, self.num_lanes, self.slice_size = paths, lane, num_lanes, slice_size
        self.epoch, self.pq_idx, self.rg_idx, self.offset = place
        self.is_by_file = any(num_row_groups(path) >= num_lanes for path in paths)
        self.texts = None      # the row group (pq_idx, rg_idx), once it is read
        self.empty_passes = 0  # ends of the file list since the last document

    def next_slice(self):
        """
        The next documents (list of 1 to `slice_size` str, all of one row group), and the index of the first of them.

        Afterwards pq_idx and rg_idx still name their row group. Raises ValueError when no file has one for the lane.
        """
        while True:
            if self.pq_idx >= len(self.paths):
                self._start_next_epoch()
            elif self.rg_idx >= num_row_groups(self.paths[self.pq_idx]):
                passed = self.rg_idx - num_row_groups(self.paths[self.pq_idx])
                self.pq_idx, self.rg_idx = self.pq_idx + 1, self.lane if self.is_by_file else passed
            else:
                if self.texts is None:
                    self.texts = read_row_group(self.paths[self.pq_idx], self.rg_idx)
                if self.offset < len(self.texts):
                    break
                self.rg_idx, self.offset, self.texts = self.rg_idx + self.num_lanes, 0, None
        self.empty_passes = 0
        first = self.offset
        self.offset = min((first // self.slice_size + 1) * self.slice_size, len(self.texts))
        return self.texts[first:self.offset], first

    def _start_next_epoch(self):
        self.empty_passes += 1
        if self.empty_passes == 2: # a whole pass; the first may have started at the end
            raise ValueError(f"lane {self.lane} of {self.num_lanes} finds no documents: too many row groups of the "
                             "split are empty, so build its files again, or use fewer lanes (ranks)")
        self.epoch, self.pq_idx, self.rg_idx = self.epoch + 1, 0, self.lane

    @property
    def place(self):
        return [self.epoch, self.pq_idx, self.rg_idx, self.offset]


class Share(NamedTuple):
    """The part of the stream that one rank yields, and where it starts."""
    rank: int
    world_size: int
    paths: list         # files of the split
    about: dict         # num_lanes, num_files, files (a hash): what must be the same in the saved run
    start_row: int      # rows that each rank has yielded before
    lane_states: dict   # lane -> its state, for the lanes of this rank

    def state(self, num_rows):
        """State of the loader (plain JSON) when this rank has yielded `num_rows` rows in all."""
        lanes = {str(lane): state for lane, state in self.lane_states.items()}
        return {**_furthest(lanes), **self.about, "rows": num_rows * self.world_size, "lanes": lanes}


def _furthest(lanes):
    """How far the lanes have come, in the three fields of published checkpoints."""
    epoch, pq_idx, rg_idx, _ = max(lane["place"] for lane in lanes.values())
    return {"pq_idx": pq_idx, "rg_idx": rg_idx, "epoch": epoch}


def usable_lanes(split, num_lanes):
    """`num_lanes`, or the number of row groups of the split where that is less: every lane needs one to read."""
    paths = split_files(split)
    if any(num_row_groups(path) >= num_lanes for path in paths): # no need to open them all
        return num_lanes
    return max(1, min(num_lanes, sum(map(num_row_groups, paths))))


def _refuse_other(saved, **now):
    """Raise ValueError when the state `saved` was made with another value of something than this run has."""
    for key, value in now.items():
        if saved.get(key, value) != value:
            raise ValueError(f"{key} is {saved[key]} in the saved state, {value} here: "
                             "resume with the data and flags of the saved run, or start a new one")


def _share(split, rank, world_size, num_lanes, saved, requeue=False):
    """
    Join the arguments of a loader and the state it resumes from (None: from the start) to a Share.

    A state of the three fields pq_idx, rg_idx, epoch alone (published checkpoints) continues behind that row group.
    Raises ValueError when ranks or files do not fit the saved state.
    """
    paths, saved = split_files(split), saved or {}
    _, env_rank, _, env_world_size = get_dist_info()
    rank, world_size = env_rank if rank is None else rank, env_world_size if world_size is None else world_size
    num_lanes = usable_lanes(split, num_lanes or saved.get("num_lanes", world_size))
    names_and_sizes = [(os.path.basename(path), os.path.getsize(path)) for path in paths]
    about = {"num_lanes": num_lanes, "requeue": requeue, "num_files": len(paths),
             "files": hashlib.sha256(repr(names_and_sizes).encode()).hexdigest()}
    _refuse_other(saved, **about)
    if saved.get("rows", 0) % world_size:
        raise ValueError(f"the {saved['rows']} rows of the saved run cannot be shared by {world_size} ranks: "
                         "resume with a number of ranks that divides them")
    step = math.gcd(world_size, num_lanes) # rank, rank + W, rank + 2W, ... mod L: the lanes of this rank's rows
    return Share(rank, world_size, paths, about, saved.get("rows", 0) // world_size,
                 {lane: _lane_start(saved, lane, num_lanes) for lane in range(rank % step, num_lanes, step)})


def _lane_start(saved, lane, num_lanes):
    if "lanes" not in saved:
        stripe = saved["rg_idx"] // num_lanes + 1 if saved else 0
        return {"place": [saved.get("epoch", 1), saved.get("pq_idx", 0), stripe * num_lanes + lane, 0]}
    if str(lane) not in saved["lanes"]:
        raise ValueError(f"the saved loader state lacks lane {lane}: resume from the states of all ranks, merged")
    return saved["lanes"][str(lane)]


def merge_lane_states(states):
    """One loader state from those that all ranks yielded with the same batch, in rank order."""
    assert len({(state["rows"], state["num_lanes"]) for state in states}) == 1, "states of different batches"
    lanes = {lane: kept for state in states for lane, kept in state["lanes"].items()}
    return {**states[0], **_furthest(lanes), "lanes": lanes}

# -----------------------------------------------------------------------------
# Pretraining batches

class Lane:
    """One lane: its place in the data, and the documents that wait in its buffer."""

    def __init__(self, share, lane, encode, capacity, slice_size, buffer_size):
        self.requeue = share.about["requeue"]
        start = share.lane_states[lane]
        self.source = DocumentSource(share.paths, lane, share.about["num_lanes"], slice_size, start["place"])
        self.encode, self.capacity, self.buffer_size = encode, capacity, buffer_size
        self.buffer = BestFitBuffer()
        self._restore(start.get("documents", "").split())

    def fill(self, row):
        """Fill `row`, int64 array (T+1,), with documents; the last one may be cut."""
        filled = 0
        while filled < len(row):
            self._refill()
            room = len(row) - filled
            ids, name = self.buffer.take(room) or self.buffer.take_shortest() # cutting the shortest loses least
            row[filled:filled + len(ids)] = ids[:room] # the slice ends with the row
            filled += min(room, len(ids))
            if self.requeue and len(ids) > room:
                doc, _, start = name.partition("+")
                rest = np.concatenate([ids[:1], ids[room:]]) # BOS again
                self.buffer.add(len(rest), (rest, f"{doc}+{int(start or 1) + room - 1}"))

    def state(self):
        """
        Plain JSON, about 10 bytes a waiting document: its file, row group and index, in order of arrival, and "+ n" for
        what was left of it when it was cut before its token n.
        """
        return {"place": self.source.place, "documents": " ".join(name for _, name in self.buffer.waiting.values())}

    def _refill(self):
        while len(self.buffer) < self.buffer_size:
            texts, first = self.source.next_slice()
            self._add(texts, [f"{self.source.pq_idx}.{self.source.rg_idx}.{first + i}" for i in range(len(texts))])

    def _add(self, texts, names):
        for ids, name in zip(self.encode(texts), names):
            if "+" in name:
                ids = ids[:1] + ids[int(name.partition("+")[2]):]
            # what lies beyond a row is never used unless it is queued again, only the length counts
            self.buffer.add(len(ids), (np.array(ids[:None if self.requeue else self.capacity], dtype=np.int32), name))

    def _restore(self, names):
        """Read the row groups of the documents that waited, one at a time, and encode these documents again."""
        wanted = collections.defaultdict(set)
        for name in names:
            pq_idx, rg_idx, i = map(int, name.partition("+")[0].split("."))
            wanted[pq_idx, rg_idx].add(i)
        texts = {}
        for (pq_idx, rg_idx), indices in wanted.items():
            row_group = read_row_group(self.source.paths[pq_idx], rg_idx)
            texts.update({f"{pq_idx}.{rg_idx}.{i}": row_group[i] for i in indices})
        for start in range(0, len(names), self.source.slice_size):
            some = names[start:start + self.source.slice_size]
            self._add([texts[name.partition("+")[0]] for name in some], some)


def _to_device(inputs, targets, device):
    """Two int64 arrays (B, T) as contiguous tensors on `device`, by one copy that does not stop the host."""
    both = torch.from_numpy(np.stack([inputs, targets]))
    if device.type == "cuda":
        with torch.cuda.device(device): # a thread begins at the first GPU, and pinning makes a context there
            both = both.pin_memory() # torch gives the memory to another batch when this copy has been made, not before
    return both.to(device, non_blocking=device.type == "cuda").unbind(0)


def pretraining_loader(tokenizer, B, T, split, tokenizer_threads=4, tokenizer_batch_size=128, device="cuda",
                       resume_state_dict=None, buffer_size=1000, num_lanes=None, rank=None, world_size=None,
                       requeue=False):
    """
    Endless (inputs, targets, state) for pretraining: full rows of whole documents, of which only the last may be cut.

    B, T                  rows and positions of a micro-batch of this rank
    split                 "train" or "val"
    tokenizer_batch_size  documents encoded at a time, with `tokenizer_threads` threads
    resume_state_dict     a state yielded before (of several ranks: merged): continues exactly behind its batch
    buffer_size           documents that a lane has to choose from
    num_lanes             L, more than there are row groups count as those; None: as saved, else the number of ranks
    rank, world_size      None: from torchrun's environment
    requeue               what is cut off a document waits for another row, with a BOS of its own; False: it is dropped
    Yields inputs, targets (B, T) int64, contiguous, on `device`; state is plain JSON. Raises ValueError or
    FileNotFoundError (at the call, not at the first batch) when the data or the state do not fit.
    """
    share = _share(split, rank, world_size, num_lanes, resume_state_dict, requeue)
    encode = functools.partial(tokenizer.encode, prepend=tokenizer.get_bos_token_id(), num_threads=tokenizer_threads)
    return _best_fit_batches(share, encode, B, T, tokenizer_batch_size, buffer_size, torch.device(device))


def _best_fit_batches(share, encode, B, T, slice_size, buffer_size, device):
    lanes = {lane: Lane(share, lane, encode, T + 1, slice_size, buffer_size) for lane in share.lane_states}
    num_rows, not_ours = share.start_row, np.empty(T + 1, dtype=np.int64)
    while True:
        rows, touched = np.empty((B, T + 1), dtype=np.int64), set()
        for n in range(num_rows * share.world_size, (num_rows + B) * share.world_size): # the rows of all ranks
            lane, (i, rank) = n % share.about["num_lanes"], divmod(n, share.world_size)
            if lane in lanes:
                lanes[lane].fill(rows[i - num_rows] if rank == share.rank else not_ours)
                touched.add(lane)
        num_rows += B
        share.lane_states.update({lane: lanes[lane].state() for lane in touched})
        yield *_to_device(rows[:, :-1], rows[:, 1:], device), share.state(num_rows)


def flat_loader(tokenizer, B, T, split, tokenizer_threads=4, tokenizer_batch_size=128, device="cuda",
                resume_state_dict=None, rank=None, world_size=None):
    """
    As `pretraining_loader`, but a rank's documents simply follow each other: rows may begin inside one, none is cut.

    Its number of lanes is the number of ranks, so it resumes on as many ranks as before.
    """
    world_size = get_dist_info()[3] if world_size is None else world_size
    share = _share(split, rank, world_size, world_size, resume_state_dict)
    if share.about["num_lanes"] < world_size:
        raise ValueError(f"the {split} split has fewer row groups than the {world_size} ranks: use fewer ranks")
    encode = functools.partial(tokenizer.encode, prepend=tokenizer.get_bos_token_id(), num_threads=tokenizer_threads)
    return _flat_batches(share, encode, B, T, tokenizer_batch_size, torch.device(device))


def _flat_batches(share, encode, B, T, slice_size, device):
    (lane, start), = share.lane_states.items()
    source = DocumentSource(share.paths, lane, share.world_size, slice_size, start.get("first", start["place"]))
    used = start.get("used", 0)               # ids of the first waiting document that have been yielded
    waiting, available = collections.deque(), -used
    num_rows = share.start_row
    while True:
        while available < B * T + 1:
            texts, first = source.next_slice()
            for i, ids in enumerate(encode(texts), first):
                waiting.append(([source.epoch, source.pq_idx, source.rg_idx, i], np.array(ids, dtype=np.int32)))
                available += len(ids)
        tokens, filled = np.empty(B * T + 1, dtype=np.int64), 0
        while filled < B * T:
            piece = waiting[0][1][used:used + B * T - filled]
            tokens[filled:filled + len(piece)] = piece
            filled, used = filled + len(piece), used + len(piece)
            if used == len(waiting[0][1]):
                waiting.popleft()
                used = 0
        tokens[-1] = waiting[0][1][used] # the last target is the first input of the next batch
        available, num_rows = available - B * T, num_rows + B
        share.lane_states[lane] = {"place": source.place, "first": waiting[0][0], "used": used}
        inputs, targets = tokens[:-1].reshape(B, T), tokens[1:].reshape(B, T)
        yield *_to_device(inputs, targets, device), share.state(num_rows)


def first_rows(batches, num_rows, rank, world_size):
    """(inputs, targets) of a loader from its start; beyond the first `num_rows` rows of all ranks, targets are -1."""
    for first, (inputs, targets, _) in enumerate(batches):
        B = len(targets)
        is_beyond = (first * B + torch.arange(B, device=targets.device)) * world_size + rank >= num_rows
        yield inputs, targets.masked_fill(is_beyond[:, None], -1)


def _without_state(batches):
    for inputs, targets, _ in batches:
        yield inputs, targets


def tokenizing_distributed_data_loader(*args, **kwargs):
    return _without_state(flat_loader(*args, **kwargs))


def tokenizing_distributed_data_loader_bos_bestfit(*args, **kwargs):
    return _without_state(pretraining_loader(*args, **kwargs))


# The names under which others know the two loaders
tokenizing_distributed_data_loader_with_state = flat_loader
tokenizing_distributed_data_loader_with_state_bos_bestfit = pretraining_loader

# -----------------------------------------------------------------------------
# Conversations

def render_pieces(tokenizer, conversation, capacity):
    """
    Render a conversation to pieces (ids, mask) of at most `capacity` ids: one piece, or several when it is too long.

    It is split between turns (a user message and its answer) only; each piece repeats the system message. A turn
    that is too long alone, and a piece without a supervised id, comes out as None.
    """
    def render(messages):
        return tokenizer.render_conversation({"messages": messages}, max_tokens=sys.maxsize)

    messages = conversation["messages"]
    pieces = [render(messages)]
    if len(pieces[0][0]) > capacity:
        system = messages[:1] if messages[0]["role"] == "system" else []
        groups = []
        for i in range(len(system), len(messages), 2):
            turn = messages[i:i + 2]
            if groups and len(render(groups[-1] + turn)[0]) <= capacity:
                groups[-1] = groups[-1] + turn
            else:
                groups.append(system + turn)
        pieces = map(render, groups)
    return [(ids, mask) if len(ids) <= capacity and any(mask) else None for ids, mask in pieces]


def pack_whole(pieces, capacity):
    """Best-fit rows of whole pieces: lists of pieces (ids, mask) of at most `capacity` ids together."""
    buffer, rows = BestFitBuffer(), []
    for piece in pieces:
        buffer.add(len(piece[0]), piece)
    while len(buffer):
        row, room = [], capacity
        while (piece := buffer.take(room)) is not None:
            row.append(piece)
            room -= len(piece[0])
        rows.append(row)
    return rows


def rows_to_tensors(rows, T, pad_id, learn_all=False):
    """
    Packed rows to inputs, targets (R, T) int64; targets are -1 on padding and, unless `learn_all`, where the mask is 0.

    The first id of a piece is never learned: what comes before it in the row is no reason for it.
    """
    tokens, learn = np.full((len(rows), T + 1), pad_id, dtype=np.int64), np.zeros((len(rows), T + 1), dtype=bool)
    for r, row in enumerate(rows):
        ids = [token for ids, _ in row for token in ids]
        masks = [[False] + [True] * (len(ids) - 1) if learn_all else mask for ids, mask in row]
        tokens[r, :len(ids)], learn[r, :len(ids)] = ids, list(itertools.chain.from_iterable(masks))
    targets = np.where(learn[:, 1:], tokens[:, 1:], -1)
    return torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets)


def conversation_steps(tokenizer, task, T, pad_id, seed, rank=0, world_size=1, resume_state_dict=None,
                       conversations_per_step=None, rows_per_step=None, learn_all=False, one_pass=False):
    """
    ((inputs, targets), state), one for each optimizer step; endless, or with `one_pass` to the end of the epoch.

    A step has the next `conversations_per_step` conversations, or as many as fit into `rows_per_step` rows (at least
    one). An epoch takes every conversation of `task` once, in an order drawn from (seed, epoch); steps run on over its
    end, or with `one_pass` (for conversations_per_step) the last one is smaller. The rows of a step depend on the data
    and the seed alone; row r goes to rank r mod `world_size`, so a rank may have none. A step without one is left out.
    inputs, targets  (R, T) int64 on the CPU; targets are -1 where there is nothing to learn, which with `learn_all` is
                     the padding and the first id of a conversation
    state            plain JSON; as `resume_state_dict` it continues behind its step. Its counters, over all ranks and
                     from the start: conversations taken, split ones, dropped pieces, tokens and padding of the rows
    Raises ValueError when the saved state is of other data or another seed, or when no conversation fits.
    """
    if not len(task):
        raise ValueError("the task has no conversations: check its data")
    counters = dict.fromkeys(("conversations", "split", "dropped", "tokens", "padding"), 0)
    state = resume_state_dict or {"epoch": 1, "position": 0, "seed": seed, "num_conversations": len(task),
                                  "counters": counters}
    _refuse_other(state, seed=seed, num_conversations=len(task))
    rendered = _rendered(tokenizer, task, T + 1, state, one_pass)
    if rows_per_step is None:
        groups = iter(lambda: list(itertools.islice(rendered, conversations_per_step)), [])
        taken = ((some, pack_whole(_pieces(some), T + 1)) for some in groups)
    else:
        taken = _filling(rendered, rows_per_step, T + 1)
    return _conversation_steps(taken, T, pad_id, rank, world_size, state, learn_all)


class _Rendered(NamedTuple):
    """One conversation: its usable pieces, how many were dropped, was it split, and the place behind it."""
    pieces: list
    dropped: int
    is_split: bool
    epoch: int
    position: int


def _rendered(tokenizer, task, capacity, state, one_pass):
    """_Rendered conversations from the place of a state on, endless or to the end of its epoch."""
    epoch, position = state["epoch"], state["position"]
    barren = 0 # conversations since the last one with a usable piece
    while epoch == state["epoch"] or not one_pass:
        order = _shuffled(len(task), state["seed"], epoch)
        while position < len(task):
            found = render_pieces(tokenizer, task[order[position]], capacity)
            usable, position = [piece for piece in found if piece is not None], position + 1
            barren = 0 if usable else barren + 1
            if barren == len(task) * (1 if one_pass else 2): # a whole pass; the first may have begun in the middle
                raise ValueError(f"none of the {len(task)} conversations has a turn that fits into {capacity} tokens "
                                 "and holds an answer to learn from: raise --max-seq-len, or check the data")
            yield _Rendered(usable, len(found) - len(usable), len(found) > 1, epoch, position)
        epoch, position = epoch + 1, 0


def _pieces(conversations):
    return [piece for conversation in conversations for piece in conversation.pieces]


def _filling(conversations, num_rows, capacity):
    """Endless (the next conversations that pack into num_rows rows, those rows)."""
    waiting = []
    while True:
        num_tokens = sum(len(ids) for ids, _ in _pieces(waiting))
        while num_tokens <= num_rows * capacity:
            waiting.append(next(conversations))
            num_tokens += sum(len(ids) for ids, _ in waiting[-1].pieces)
        count = max(1, len(waiting) - 1) # the last is too much for sure; packing loses so little that few more are
        while len(rows := pack_whole(_pieces(waiting[:count]), capacity)) > num_rows and count > 1:
            count -= 1
        yield waiting[:count], rows
        waiting = waiting[count:]


def _conversation_steps(taken, T, pad_id, rank, world_size, state, learn_all):
    counters = collections.Counter(state["counters"])
    for conversations, rows in taken:
        num_tokens = sum(len(ids) for ids, _ in _pieces(conversations))
        counters.update(conversations=len(conversations), split=sum(one.is_split for one in conversations),
                        dropped=sum(one.dropped for one in conversations), tokens=num_tokens,
                        padding=len(rows) * (T + 1) - num_tokens)
        state = {**state, "epoch": conversations[-1].epoch, "position": conversations[-1].position,
                 "counters": dict(counters)}
        if rows:
            yield rows_to_tensors(rows[rank::world_size], T, pad_id, learn_all), state


def prefetched(items):
    """The items of an endless iterator, each made in a thread while the one before is being used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items)
        while True:
            item, coming = coming.result(), pool.submit(next, items)
            yield item


def _shuffled(n, seed, epoch):
    """The order of an epoch: a permutation of 0 .. n-1 (list of int)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)).tolist()
