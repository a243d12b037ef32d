"""
GSM8K: school arithmetic in words, solved step by step with a calculator.

Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems" (https://arxiv.org/abs/2110.14168). An answer
looks like "... 12/60 = $<<12/60=0.2>>0.2 ... #### 10": what stands in << >> becomes a tool call and its result.
"""
from tasks.common import Task, extract_answer, is_right_answer, load_rows, one_of, split_tool_calls

NUM_VALIDATION = 420 # rows of the train split that are not trained on: the test split is for the end


class GSM8K(Task):
    """
    subset  "main" or "socratic"
    split   "train" or "test"
    strict  compare final answers as strings, as the official evaluation does, instead of as numbers
    """
    eval_type = "generative"

    def __init__(self, subset, split, strict=False, **slice_kwargs):
        super().__init__(**slice_kwargs)
        self.subset = one_of("GSM8K's subset", subset, ("main", "socratic"))
        self.split = one_of("GSM8K's split", split, ("train", "test"))
        self.strict = strict
        self.data = load_rows("openai/gsm8k", subset, split, "question", "answer")
        for index, answer in enumerate(self.data["answer"]):
            if extract_answer(split_tool_calls(answer)[-1]["text"]) is None:
                raise ValueError(f"{self.name}, row {index}: must end in '#### <number>', got {answer[-40:]!r}")

    @property
    def name(self):
        return f"GSM8K {self.subset} {self.split}"

    def num_examples(self):
        return len(self.data)

    def get_example(self, index):
        row = self.data[index]
        return {"messages": [{"role": "user", "content": row["question"]},
                             {"role": "assistant", "content": split_tool_calls(row["answer"])}]}

    def evaluate(self, conversation, completion):
        return is_right_answer(conversation, completion, self.strict)
