"""
SmolTalk: general conversations for small models (460K to train on, 24K to test).

Ben Allal et al. 2025, "SmolLM2: When Smol Goes Big" (https://arxiv.org/abs/2502.02737). Not for scoring.
"""
from tasks.common import Task, check_messages, load_rows, one_of


class SmolTalk(Task):
    """split: "train" or "test" """

    def __init__(self, split, **slice_kwargs):
        super().__init__(**slice_kwargs)
        self.split = one_of("SmolTalk's split", split, ("train", "test"))
        self.data = load_rows("HuggingFaceTB/smol-smoltalk", None, split, "messages")

    @property
    def name(self):
        return f"SmolTalk {self.split}"

    def num_examples(self):
        return len(self.data)

    def get_example(self, index):
        messages = self.data[index]["messages"]
        check_messages(messages, f"{self.name}, row {index}")
        return {"messages": messages}
