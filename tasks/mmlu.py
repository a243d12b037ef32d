"""
MMLU: multiple-choice questions of 57 school, university and professional subjects.

Hendrycks et al. 2020, "Measuring Massive Multitask Language Understanding" (https://arxiv.org/abs/2009.03300).
"""
from tasks.common import Task, load_rows, multiple_choice, one_of

LETTERS = ("A", "B", "C", "D")


class MMLU(Task):
    """
    subset  "all" (the 57 subjects) or "auxiliary_train" (100K training questions in the style of other exams)
    split   "validation", "dev" or "test" of "all"; "train" of "auxiliary_train"
    """
    eval_type = "categorical"
    subjects = tuple("""
        abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
        college_computer_science college_mathematics college_medicine college_physics computer_security
        conceptual_physics econometrics electrical_engineering elementary_mathematics formal_logic global_facts
        high_school_biology high_school_chemistry high_school_computer_science high_school_european_history
        high_school_geography high_school_government_and_politics high_school_macroeconomics high_school_mathematics
        high_school_microeconomics high_school_physics high_school_psychology high_school_statistics
        high_school_us_history high_school_world_history human_aging human_sexuality international_law jurisprudence
        logical_fallacies machine_learning management marketing medical_genetics miscellaneous moral_disputes
        moral_scenarios nutrition philosophy prehistory professional_accounting professional_law
        professional_medicine professional_psychology public_relations security_studies sociology us_foreign_policy
        virology world_religions""".split())

    def __init__(self, subset, split, **slice_kwargs):
        super().__init__(**slice_kwargs)
        self.subset = one_of("MMLU's subset", subset, ("all", "auxiliary_train"))
        splits = ("train",) if subset == "auxiliary_train" else ("validation", "dev", "test")
        self.split = one_of(f"the split of MMLU's {subset}", split, splits)
        self.data = load_rows("cais/mmlu", subset, split, "question", "choices", "answer", "subject")

    @property
    def name(self):
        return f"MMLU {self.subset} {self.split}"

    def num_examples(self):
        return len(self.data)

    def get_example(self, index):
        row = self.data[index]
        row = row.get("train", row) # the hub wraps the rows of auxiliary_train in one more column
        if len(row["choices"]) != 4 or row["answer"] not in range(4):
            raise ValueError(f"{self.name}, row {index}: must have 4 options and an answer from 0 to 3, "
                             f"got {len(row['choices'])} and {row['answer']!r}")
        return multiple_choice(row["question"], LETTERS, row["choices"], LETTERS[row["answer"]],
                               subject=row["subject"])

    def evaluate(self, conversation, completion):
        return completion == conversation["messages"][-1]["content"] # whatever is no letter is simply wrong
