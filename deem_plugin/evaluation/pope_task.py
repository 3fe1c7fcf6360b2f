"""POPE's questions as the tasks `deem_pope*` ask and score them (https://arxiv.org/abs/2305.10355)."""

from deem_plugin.evaluation import questions

METRICS = ("accuracy", "precision", "recall", "f1", "auc", "yes_ratio", "unknown_rate")
# As lmms-eval's own POPE tasks ask, so that the accuracies compare.
INSTRUCTION = "\nAnswer the question using a single word or phrase."


def doc_to_text(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """Returns the question with the instruction of lmms-eval's own task."""
    return doc["question"].strip() + INSTRUCTION


def process_results(doc: dict, results: list[str]) -> dict[str, dict]:
    """Returns the metric rows of one answer. The ids of questions are unique in each of the three splits only."""
    question = {
        "question_id": f"{doc['category']}-{doc['question_id']}",
        "image_id": doc["image_source"],
        "category": doc["category"],
        "answer": doc["answer"].strip().lower(),
    }
    return questions.score(question, results, "deem_pope", METRICS)
