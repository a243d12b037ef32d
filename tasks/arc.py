"""
ARC: multiple-choice science questions of school exams, in an easy and a challenging half.

Clark et al. 2018, "Think you have Solved Question Answering? Try ARC" (https://arxiv.org/abs/1803.05457).
A few questions have three or five options, or the labels 1 to 4.
"""
from tasks.common import Task, load_rows, multiple_choice, one_of


class ARC(Task):
    """
    subset        "ARC-Easy" or "ARC-Challenge"
    split         "train", "validation" or "test"
    letters_only  label the options A, B, C, ... by position whatever the data say. This changes scores a little;
                  published ones keep the labels as they come
    """
    eval_type = "categorical"

    def __init__(self, subset, split, letters_only=False, **slice_kwargs):
        super().__init__(**slice_kwargs)
        self.subset = one_of("ARC's subset", subset, ("ARC-Easy", "ARC-Challenge"))
        self.split = one_of("ARC's split", split, ("train", "validation", "test"))
        self.letters_only = letters_only
        self.data = load_rows("allenai/ai2_arc", subset, split, "question", "label", "text", "answerKey")

    @property
    def name(self):
        return f"{self.subset} {self.split}"

    def num_examples(self):
        return len(self.data)

    def get_example(self, index):
        row = self.data[index]
        labels, answer = row["choices"]["label"], row["answerKey"]
        if answer not in labels:
            raise ValueError(f"{self.name}, row {index}: the answer must be one of {labels}, got {answer!r}")
        letters = [chr(ord("A") + position) for position in range(len(labels))] if self.letters_only else labels
        return multiple_choice(row["question"], letters, row["choices"]["text"], letters[labels.index(answer)])

    def evaluate(self, conversation, completion):
        return completion == conversation["messages"][-1]["content"] # whatever is no letter is simply wrong
