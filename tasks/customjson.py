"""
Conversations of one's own, from a JSONL file: one JSON array of messages a line, for example

    [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small chat model."}]
"""
import json
import logging
import os

from tasks.common import Task, check_messages

logger = logging.getLogger(__name__)


class CustomJSON(Task):
    """
    filepath       the file; blank lines are skipped. A broken line raises ValueError with file and line number
    allow_missing  an absent file is an empty task with a warning, instead of FileNotFoundError
    """

    def __init__(self, filepath, allow_missing=False, **slice_kwargs):
        super().__init__(**slice_kwargs)
        self.filepath, self.conversations = str(filepath), []
        if os.path.exists(self.filepath):
            self._read()
        elif allow_missing:
            logger.warning(f"{self.filepath} does not exist: going on without its conversations")
        else:
            raise FileNotFoundError(f"{self.filepath} does not exist: put conversations there, one JSON array of "
                                    "messages a line, or pass --allow-missing-identity to do without")

    def _read(self):
        with open(self.filepath, "rb") as file: # json decodes each line, so that bad UTF-8 is told with its place
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self.conversations.append(self._parse(line, f"{self.filepath}, line {number}"))

    def _parse(self, line, where):
        try:
            messages = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not valid JSON ({error})") from error
        check_messages(messages, where)
        if messages[-1]["role"] != "assistant":
            logger.warning(f"{where}: the last message is not from the assistant, so it teaches nothing")
        return messages

    @property
    def name(self):
        return os.path.basename(self.filepath)

    def num_examples(self):
        return len(self.conversations)

    def get_example(self, index):
        return {"messages": self.conversations[index]}
